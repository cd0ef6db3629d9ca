"""Folders of label maps are scored as nnU-Net scores them, in every format, and what does not fit is refused."""

import errno
import json
import math
import multiprocessing.dummy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from nnunetv2_dycon import commands
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.metrics import DISTANCES, ScoreSettings, Structure, score_case
from nnunetv2_dycon.evaluation.scores import evaluate, read_scores, summarize
from tests.label_maps import (
    LABELS,
    SHAPE,
    label_map,
    write,
    write_dataset,
)


# ---- what is written -------------------------------------------------------------------------------------------
def nnunet_writes(truth: Path, prediction: Path, dataset: dict, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what nnU-Net's own evaluation writes, without its processes."""
    from nnunetv2.evaluation import evaluate_predictions
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    threads = SimpleNamespace(get_context=lambda _: multiprocessing.dummy)
    monkeypatch.setattr(evaluate_predictions, "multiprocessing", threads)
    manager = LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    path = prediction.with_name("nnunet.json")
    evaluate_predictions.compute_metrics_on_folder(
        str(truth),
        str(prediction),
        str(path),
        SimpleITKIO(),
        ".nii.gz",
        manager.foreground_regions if manager.has_regions else manager.foreground_labels,
        manager.ignore_label,
        1,
    )
    return path.read_text()


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize(
    "dataset",
    [
        {"labels": LABELS},
        {"labels": {"second": 2, "background": 0, "never_there": 3, "first": 1}},
        {"labels": {**LABELS, "ignore": 3}},
        {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]},
        {"labels": {"background": 0, "whole": [1, 2, 3], "core": 2, "ignore": 4}, "regions_class_order": [1, 2]},
    ],
    ids=["labels", "a label that is never there", "ignore", "regions", "regions and ignore"],
)
def test_summary_json_is_nnunets_to_the_last_digit(
    folders: tuple[Path, Path], dataset: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, prediction = folders
    top = dataset["labels"].get("ignore", 2)
    for number in range(12):  # enough for sums to depend on their order
        write(truth / f"{number}.nii.gz", label_map(number + 20, top + 1))
        write(prediction / f"{number}.nii.gz", label_map(number + 40))
    write(truth / "0_none.nii.gz", np.zeros(SHAPE, np.uint8))
    write(prediction / "0_none.nii.gz", np.zeros(SHAPE, np.uint8))
    write(truth / "missed.nii.gz", label_map(0))
    write(prediction / "missed.nii.gz", np.zeros(SHAPE, np.uint8))
    path = write_dataset(truth.parent, **dataset)
    rows = evaluate(truth, prediction, path, processes=1, distances=False)
    written = (prediction / "summary.json").read_text()
    assert written == nnunet_writes(truth, prediction, dataset, monkeypatch)
    means = json.loads(written)["mean"]
    for label, of_class in summarize(rows)["classes"].items():
        of_nnunet = means[label]["Dice"]
        assert of_class["dice"]["mean"] == (None if math.isnan(of_nnunet) else of_nnunet)


def test_rows_are_the_scores_of_each_case_and_come_back_from_the_table(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    rows = evaluate(truth, prediction, processes=1, lesions=True)
    structures = [Structure("1", "first", (1,)), Structure("2", "second", (2,))]
    expected = []
    for number, case in enumerate("abc"):
        one = score_case(
            label_map(number),
            label_map(number + 10),
            (0.5, 1, 2.5),
            structures,
            case=case,
            settings=ScoreSettings(lesions=True),
        )
        expected += [row for row, _ in one]
    assert [(row.case, row.label) for row in rows] == [(row.case, row.label) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for metric in (*DISTANCES, "dice", "nsd", "volume_error_ml", "lesion_f1", "diagonal_mm"):
            assert getattr(row, metric) == pytest.approx(getattr(other, metric), abs=1e-6)
    assert read_scores(prediction / "scores.csv") == rows
    header = (prediction / "scores.csv").read_text().splitlines()[0]
    assert header == (
        "case,label,name,dice,iou,hd95_mm,asd_mm,assd_mm,nsd,nsd_tolerance_mm,volume_truth_ml,volume_pred_ml,"
        "volume_error_ml,status,lesion_tp,lesion_fp,lesion_fn,lesion_f1,diagonal_mm,convention"
    )


def test_the_literatures_tables_have_names_and_columns_of_their_own(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    rows = evaluate(truth, prediction, processes=1)
    literature = evaluate(truth, prediction, processes=1, convention="literature")
    assert read_scores(prediction / "scores.csv") == rows
    assert read_scores(prediction / "scores_literature.csv") == literature
    header = (prediction / "scores_literature.csv").read_text().splitlines()[0]
    assert "hd95_voxels" in header
    assert "_mm" not in header
    text = (prediction / "scores_literature.json").read_text()
    assert json.loads(text)["convention"] == "literature"
    assert "_mm" not in text


def test_a_distance_empties_its_cell_where_a_mask_is_empty(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    write(prediction / "a.nii.gz", np.zeros(SHAPE, np.uint8))
    missed = evaluate(truth, prediction, processes=1)[0]
    assert (missed.status, missed.dice, missed.hd95_mm) == ("missed", 0, None)
    line = (prediction / "scores.csv").read_text().splitlines()[1]
    assert line.startswith("a,1,first,0.0,0.0,,,,0.0,2.0,")


def test_the_summary_of_a_worked_example(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    row = evaluate(truth, prediction, processes=1)[0]
    base = replace(row, label="1", diagonal_mm=100.0)
    none = {"hd95_mm": None, "asd_mm": None, "assd_mm": None}
    rows = [
        replace(base, dice=0.9, hd95_mm=2.0, lesion_tp=2, lesion_fp=2, lesion_fn=0, lesion_f1=2 / 3),
        replace(base, dice=0.6, hd95_mm=6.0, lesion_tp=0, lesion_fp=0, lesion_fn=1, lesion_f1=0.0),
        replace(base, status="missed", dice=0.0, **none),
        replace(base, status="false_alarm", dice=0.0, **none),
        replace(base, status="both_empty", dice=None, nsd=None, **none),
    ]
    summary = summarize(rows)
    of_class = summary["classes"]["1"]
    assert of_class["n"] == 5
    assert of_class["status"] == {"ok": 2, "both_empty": 1, "missed": 1, "false_alarm": 1}
    dice, hd95 = of_class["dice"], of_class["hd95_mm"]
    assert (dice["n"], dice["mean"], dice["median"]) == (4, 0.375, 0.3)
    assert hd95 == {
        "n": 2,
        "mean": 4.0,
        "sd": pytest.approx(math.sqrt(8)),
        "median": 4.0,
        "q1": 3.0,
        "q3": 5.0,
        "penalized_mean": 52.0,
    }
    assert of_class["lesions"] == {"tp": 2, "fp": 2, "fn": 1, "precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7}
    rows += [replace(row, label="2", hd95_mm=8.0) for row in rows[:1]]
    assert summarize(rows)["mean_over_classes"]["hd95_mm"] == {"mean": 6.0, "penalized_mean": 30.0}


def test_the_json_is_strict_and_says_what_it_is_of(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    for case in "abc":
        write(prediction / f"{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    evaluate(truth, prediction, processes=1)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    content = json.loads((prediction / "scores.json").read_text(), parse_constant=refuse)
    assert (content["truth"], content["predictions"]) == (str(truth), str(prediction))
    assert content["classes"]["1"]["hd95_mm"]["mean"] is None


def test_files_go_where_o_says_and_nowhere_else(folders: tuple[Path, Path], tmp_path: Path) -> None:
    truth, prediction = folders
    evaluate(truth, prediction, output=tmp_path / "new" / "folder", processes=1)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "scores.csv",
        "scores.json",
        "summary.json",
    ]
    assert sorted(path.name for path in prediction.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_the_three_files_are_written_together_or_not_at_all(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, prediction = folders
    evaluate(truth, prediction, processes=1)
    before = {path.name: path.read_bytes() for path in prediction.iterdir()}
    write(prediction / "a.nii.gz", label_map(0))
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.endswith("summary.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"cannot write .*summary.json: No space left .*, or give -o another folder"):
        evaluate(truth, prediction, processes=1)
    after = {path.name: path.read_bytes() for path in prediction.iterdir()}
    assert {**after, "a.nii.gz": b""} == {**before, "a.nii.gz": b""}


def test_processes_change_nothing_and_none_of_them_needs_torch(folders: tuple[Path, Path], tmp_path: Path) -> None:
    truth, prediction = folders
    script = f"""
import sys
from nnunetv2_dycon.evaluation.scores import evaluate
if __name__ == "__main__":
    evaluate({str(truth)!r}, {str(prediction)!r}, output={str(tmp_path / "out")!r}, processes=2)
    sys.exit("torch" in sys.modules)
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True, capture_output=True, env=environment)
    assert read_scores(tmp_path / "out" / "scores.csv") == evaluate(truth, prediction, processes=1)


def test_the_predictions_own_dataset_json_comes_first(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    write_dataset(prediction, {"background": 0, "organ": 1, "other": 2, "third": 3})
    assert [row.name for row in evaluate(truth, prediction, processes=1)][:3] == ["organ", "other", "third"]


def test_chill_scores_what_is_there(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    (prediction / "b.nii.gz").unlink()
    assert {row.case for row in evaluate(truth, prediction, processes=1, chill=True)} == {"a", "c"}


# ---- the command -----------------------------------------------------------------------------------------------
def test_the_command_prints_a_line_a_class(folders: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    truth, prediction = folders
    assert commands.main(["evaluate", str(truth), str(prediction), "-np", "1", "--lesions", "--tolerance", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["label", "name", "ok", "both_empty", "missed", "false_alarm"]
    assert lines[0].split()[6:] == ["dice", "iou", "nsd", *DISTANCES, "volume_error_ml", "lesion_f1"]
    assert [line.split()[:3] for line in lines[1:3]] == [["1", "first", "3"], ["2", "second", "3"]]
    assert len(lines) == 4


def test_the_command_prints_every_metric_that_any_class_has(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    truth, prediction = folders
    for path in (*truth.iterdir(), *prediction.iterdir()):  # the first class is nowhere
        labels = np.asarray(nib.load(path).dataobj)
        write(path, np.where(labels == 1, 0, labels).astype(np.uint8))
    assert commands.main(["evaluate", str(truth), str(prediction), "-np", "1"]) == 0
    title, first, second = (line.split() for line in capsys.readouterr().out.splitlines()[:3])
    assert {"dice", *DISTANCES} <= set(title)
    at = title.index("dice")
    assert first[at] == "-"
    assert 0 < float(second[at]) < 1


def test_the_command_prints_one_line_for_an_error(folders: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    truth, prediction = folders
    (prediction / "b.nii.gz").unlink()
    assert commands.main(["evaluate", str(truth), str(prediction), "-np", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {prediction} has no b.nii.gz;")
