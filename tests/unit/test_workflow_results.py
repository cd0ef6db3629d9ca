"""Results of the workflow: the summary over seeds and draws, and figures of sweeps."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.metrics import Score
from scripts import sweep_figures
from scripts.workflow import steps


def write_scores(folder: Path, data: str, run: str, dice: float, hd95: float, missed: int = 0) -> None:
    place = folder / data / run
    place.mkdir(parents=True)
    status = {"ok": 3, "both_empty": 0, "missed": missed, "false_alarm": 0}
    means = {"dice": {"mean": dice}, "hd95_mm": {"mean": hd95 / 2, "penalized_mean": hd95}}
    content = {"mean_over_classes": means, "classes": {"1": {"n": 3, "status": status}}}
    (place / "scores.json").write_text(json.dumps(content))
    header = [field.name for field in dataclasses.fields(Score)]
    values = {"case": "a", "label": 1, "name": "blob", "dice": dice, "status": "ok", "convention": "mm"}
    with open(place / "scores.csv", "w", newline="") as file:
        table = csv.DictWriter(file, header)
        table.writeheader()
        table.writerow(
            values | {"diagonal_mm": 9.0, "nsd_tolerance_mm": 2.0, "volume_truth_ml": 1.0, "volume_pred_ml": 1.0}
        )


def test_the_summary_pools_seeds_and_draws(tmp_path):
    for draw, seed, dice in ((0, 0, 0.5), (0, 1, 0.6), (1, 0, 0.7)):
        data = f"Dataset61{draw}_Blobs_labeled4_draw{draw}"
        write_scores(tmp_path / "scores", data, f"nnUNetTrainerA_x1_seed{seed}_student", dice, 4.0, missed=seed)
    steps.summary(tmp_path / "scores", tmp_path)
    assert (
        "| Blobs_labeled4 | nnUNetTrainerA_x1 | student | 3 | 60.00 ± 10.00 | 4.00 ± 0.00 | 1 |"
        in (tmp_path / "results.md").read_text()
    )
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["dice"]) for row in rows] == [0.5, 0.6, 0.7]
    assert [float(row["hd95_mm"]) for row in rows] == [2.0, 2.0, 2.0]
    assert (tmp_path / "dice.csv").read_text().splitlines() == [
        "data,case,label,name,"
        "labeled4_draw0/nnUNetTrainerA_x1_seed0_student,labeled4_draw0/nnUNetTrainerA_x1_seed1_student,"
        "labeled4_draw1/nnUNetTrainerA_x1_seed0_student",
        "Blobs,a,1,blob,0.500000,0.600000,0.700000",
    ]


def test_a_sweep_has_the_default_where_the_name_has_no_option(tmp_path):
    for name, dice in (("", 0.8), ("_gamma0p5", 0.7), ("_gamma2", 0.6), ("_gamma2_beta1", 0.1)):
        for seed in (0, 1):
            run = f"nnUNetTrainerDyCON{name}_epochs3_seed{seed}_student"
            write_scores(tmp_path, "Dataset610_Blobs_labeled4_draw0", run, dice + seed / 10, 3.0)
    scores = sweep_figures.read_scores([tmp_path])
    rows = sweep_figures.sweep_rows(scores, "gamma", sweep_figures.defaults_of("gamma"))
    assert {row[0] for row in rows} == {"Blobs, 4 labelled: DyCON_epochs3 (student)"}  # beta1 has one value alone
    seen = [(row[2], round(row[3])) for row in rows]
    assert seen == [(0.5, 70), (0.5, 80), (0.8, 80), (0.8, 90), (2, 60), (2, 70)]
    assert not sweep_figures.sweep_rows(scores, "topk", sweep_figures.defaults_of("topk"))


def test_the_same_runs_in_two_places_are_refused(tmp_path):
    for seed in (0, 1):
        run = f"nnUNetTrainerDyCON_gamma{seed}_seed0_student"
        write_scores(tmp_path / "scores", "Dataset610_Blobs_labeled4_draw0", run, 0.5, 3.0)
        write_scores(tmp_path / "reports" / "Blobs_labeled4" / "scores", ".", f"0{seed}_{run}", 0.5, 3.0)
    with pytest.raises(DataError, match=r"gamma0_seed0 on Blobs, 4 labelled is in .*reports.* and in .*scores; give"):
        sweep_figures.read_scores([tmp_path])
    assert len(sweep_figures.read_scores([tmp_path / "scores"])) == 2


def test_frameworks_are_paired_with_equal_options_and_all_figures_are_written(tmp_path, capsys):
    runs = ("CPS_epochs3", "DyCONCPS_epochs3", "MeanTeacher_epochs3", "DyCON_epochs9", "DyCON_epochs9_topk8")
    for at, run in enumerate(runs):
        write_scores(tmp_path / "report" / "scores", ".", f"0{at}_nnUNetTrainer{run}_seed0_teacher", at / 10, 3.0)
    rows = sweep_figures.framework_rows(sweep_figures.read_scores([tmp_path]))
    assert [(row[0], row[1], round(row[3])) for row in rows] == [
        ("co-training, report, teacher", "without DyCON", 0),
        ("co-training, report, teacher", "with DyCON", 10),
    ]
    assert sweep_figures.main([str(tmp_path), "-o", str(tmp_path / "figures")]) == 0
    pictures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert pictures == {"frameworks.png", "frameworks.csv", "sweep_topk.png", "sweep_topk.csv"}
    assert sweep_figures.main([str(tmp_path / "figures"), "-o", str(tmp_path)]) == 2
    assert "no scores.json below" in capsys.readouterr().err
