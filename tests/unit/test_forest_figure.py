"""What DyCON's losses add to a framework: pairs of runs, values per case, and the files that are written."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.scores import evaluate
from nnunetv2_dycon.evaluation.statistics import bootstrap_interval
from scripts import case_tables, forest_figure, sweep_figures
from tests.madeup_runs import CASES, make_dataset, make_predictions, write_volume

HOME = "Dataset501_Made_labeled4_draw0"
LONG = "Dataset502_Made_labeled4_draw1"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that scores predictions moved by some voxels as a run of a trainer."""
    raw = make_dataset(tmp_path, monkeypatch)

    def scored(trainer: str, shift: int, *, home: str = HOME, cases: tuple = CASES) -> Path:
        folder = make_predictions(tmp_path / "predictions" / home / trainer, shift, cases)
        output = tmp_path / "scores" / home / f"nnUNetTrainer{trainer}_student"
        output.mkdir(parents=True)
        evaluate(raw / "labelsTs", folder, raw / "dataset.json", output, 1, chill=True)
        return output

    scored.raw = raw
    return scored


def table_of(tmp_path: Path) -> Path:
    """The table of all runs, as the workflow writes it."""
    table = tmp_path / "dice.csv"
    case_tables.write(table, *case_tables.of_folders((tmp_path / "scores").glob("*/*")))
    return table


def dice(folder: Path) -> dict[tuple[str, str], float]:
    with open(folder / "scores.csv", newline="") as file:
        return {(row["case"], row["label"]): float(row["dice"]) for row in csv.DictReader(file)}


def test_a_row_is_the_mean_over_seeds_and_classes_of_each_case(run, tmp_path):
    folders = [(run(f"BCP_epochs3_seed{seed}", 2 + seed), run(f"DyCONBCP_epochs3_seed{seed}", 1)) for seed in (0, 1)]
    run("DyCON_epochs3_seed0", 0)  # without mean teacher
    (row,) = forest_figure.find_rows([table_of(tmp_path)])
    tables = [(dice(alone), dice(with_dycon)) for alone, with_dycon in folders]
    wanted = [
        100 * np.mean([with_dycon[case, label] - alone[case, label] for alone, with_dycon in tables for label in "12"])
        for case in CASES
    ]
    assert (row.data, row.framework, row.weights, row.difference.n) == ("Made, 4 labelled", "copy-paste", "student", 10)
    assert row.difference.mean == pytest.approx(np.mean(wanted))
    interval = bootstrap_interval(np.array(wanted), np.random.default_rng(forest_figure.SEED))
    assert (row.difference.low, row.difference.high) == pytest.approx(interval, abs=1e-4)  # six decimals in the table
    of_runs = [100 * np.mean([with_dycon[unit] - alone[unit] for unit in alone]) for alone, with_dycon in tables]
    assert row.of_runs == pytest.approx(of_runs, abs=1e-4)
    assert row.established


def test_a_framework_names_the_options_that_its_data_set_does_not_share(run, tmp_path):
    for trainers in ("BCP", "DyCONBCP"), ("GAMagicNet", "DyCONGAMagicNet"), ("MagicNet", "DyCONMagicNet"):
        for trainer in trainers:
            run(f"{trainer}_bf16_epochs3_seed0", 2 if trainer == "DyCONGAMagicNet" else 1)
    for trainer in ("BCP", "DyCONBCP"):
        run(f"{trainer}_ga_bf16_epochs3_seed0", 2)
        run(f"{trainer}_epochs5_seed0", 2, home="Dataset503_Other_labeled4_draw0")
    run("DyCONBCP_nomirror_bf16_epochs3_seed0", 2)  # without a partner
    made = ["copy-paste", "copy-paste, ga", "cubes", "cubes, ga"]
    wanted = [("Made, 4 labelled", name) for name in made] + [("Other, 4 labelled", "copy-paste")]
    rows = forest_figure.find_rows([table_of(tmp_path)])
    assert [(row.data, row.framework) for row in rows] == wanted
    (axis,) = forest_figure.draw(rows).axes
    assert len({line.get_color() for line in axis.get_lines() if line.get_marker() not in ("|", "None")}) == len(made)
    assert [row.framework for row in rows if row.difference.mean] == ["cubes, ga"]
    scores = sweep_figures.read_scores([tmp_path / "scores"])
    assert {group for group, *_ in sweep_figures.framework_rows(scores)} == {f"{n}, {d}, student" for d, n in wanted}


def test_a_run_that_disagrees_keeps_a_difference_from_being_established(run, tmp_path):
    for seed, (alone, with_dycon) in enumerate([(4, 1), (1, 2)]):
        run(f"CPS_seed{seed}", alone)
        run(f"DyCONCPS_seed{seed}", with_dycon)
    (row,) = forest_figure.find_rows([table_of(tmp_path)])
    assert row.difference.low > 0 > row.of_runs[1]
    assert not row.established


def test_draws_and_seeds_have_to_match(run, tmp_path):
    for home in (HOME, LONG):
        run("BCP_seed0", 1, home=home)
    run("DyCONBCP_seed0", 0)
    with pytest.raises(DataError, match="copy-paste on Made, 4 labelled: _seed0 has no partner; train both"):
        forest_figure.find_rows([table_of(tmp_path)])


def test_other_cases_are_refused(run, tmp_path):
    run("BCP_seed0", 1)
    run("DyCONBCP_seed0", 0, cases=CASES[:5])
    with pytest.raises(DataError, match="were scored on other cases or classes"):
        forest_figure.find_rows([table_of(tmp_path)])


def test_a_false_alarm_counts_against_a_correct_silence(run, tmp_path):
    """The truth of one case is empty: Dice 1 where nothing is predicted, 0 where something is."""
    for case in CASES[:2]:
        write_volume(run.raw / "labelsTs" / f"{case}.nii.gz", np.zeros((16, 14, 12), np.uint8))
    silent, loud = run("DyCONBCP_seed0", 0), run("BCP_seed0", 0)

    def differences() -> dict[str, float]:
        runs, _ = case_tables.of_folders([silent, loud])
        return forest_figure.case_differences(*(runs["Made", f"labeled4_draw0/{run.name}"] for run in (silent, loud)))

    before = differences()
    assert before[CASES[0]] == 0  # both are loud
    predictions = tmp_path / "predictions" / HOME / "DyCONBCP_seed0"
    write_volume(predictions / f"{CASES[0]}.nii.gz", np.zeros((16, 14, 12), np.uint8))
    evaluate(run.raw / "labelsTs", predictions, run.raw / "dataset.json", silent, 1)
    assert differences()[CASES[0]] == 100
    write_volume(tmp_path / "predictions" / HOME / "BCP_seed0" / f"{CASES[0]}.nii.gz", np.zeros((16, 14, 12), np.uint8))
    evaluate(run.raw / "labelsTs", tmp_path / "predictions" / HOME / "BCP_seed0", run.raw / "dataset.json", loud, 1)
    assert CASES[0] not in differences()


def test_picture_and_tables_are_written_and_nothing_to_pair_is_one_line(run, tmp_path, capsys):
    run("MeanTeacher_seed0", 2)
    out = str(tmp_path / "figures")
    assert forest_figure.main([str(table_of(tmp_path)), "-o", out]) == 2
    assert "no data set has runs of both trainers of a framework" in capsys.readouterr().err
    run("DyCON_seed0", 1)
    assert forest_figure.main([str(table_of(tmp_path)), "-o", out]) == 0
    assert {path.name for path in Path(out).iterdir()} == {"forest.png", "forest.csv", "forest.md"}
    lines = (Path(out) / "forest.md").read_text().splitlines()
    assert lines[0].startswith("| data set | framework |")
    assert lines[2].startswith("| Made, 4 labelled | mean teacher | student | 1 | 10 | +")


def test_a_run_in_two_tables_and_another_file_are_refused(run, tmp_path, capsys):
    run("BCP_seed0", 1)
    table = str(table_of(tmp_path))
    assert forest_figure.main([table, table, "-o", str(tmp_path)]) == 2
    assert "BCP_seed0_student of Made is in another table too" in capsys.readouterr().err
    other = tmp_path / "results.csv"
    other.write_text("dataset,run,dice\nA,B,0.5\n")
    for path in (other, tmp_path / "absent.csv"):
        assert forest_figure.main([str(path), "-o", str(tmp_path)]) == 2
        assert f"error: {path} is not a table of the workflow (dice.csv)" in capsys.readouterr().err


def test_a_table_gives_back_what_was_scored(run, tmp_path):
    """A run on fewer cases has no value there; a structure that nobody sees has nan."""
    for case in CASES[:1]:
        write_volume(run.raw / "labelsTs" / f"{case}.nii.gz", np.zeros((16, 14, 12), np.uint8))
        write_volume(tmp_path / "predictions" / HOME / "BCP_seed0" / f"{case}.nii.gz", np.zeros((16, 14, 12), np.uint8))
    folders = {"labeled4_draw0": run("BCP_seed0", 2), "labeled4_draw1": run("BCP_seed0", 1, home=LONG, cases=CASES[:3])}
    runs = case_tables.read(table_of(tmp_path))
    assert runs.keys() == {("Made", f"{place}/nnUNetTrainerBCP_seed0_student") for place in folders}
    for (_, column), found in runs.items():
        with open(folders[column.split("/")[0]] / "scores.csv", newline="") as file:
            wanted = {(row["case"], int(row["label"])): row["dice"] for row in csv.DictReader(file)}
        assert found == pytest.approx(
            {unit: float(value or "nan") for unit, value in wanted.items()}, abs=6e-7, nan_ok=True
        )
    with open(tmp_path / "dice.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["data"], first["case"], first["label"]) == ("Made", CASES[0], "1")
    labels = json.loads((run.raw / "dataset.json").read_text())["labels"]
    assert labels[first["name"]] == 1
