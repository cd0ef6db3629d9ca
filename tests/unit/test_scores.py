"""Folders of label maps are scored as nnU-Net scores them, in every format, and what does not fit is refused."""

import errno
import json
import math
import multiprocessing.dummy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon import commands
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.metrics import DISTANCES, ScoreSettings, Structure, score_case
from nnunetv2_dycon.evaluation.scores import evaluate, read_scores, summarize

LABELS = {"background": 0, "first": 1, "second": 2}
AFFINE = np.array([[-0.5, 0, 0, 12], [0, 1, 0, -7], [0, 0, 2.5, 30], [0, 0, 0, 1.0]])
SHAPE = (7, 8, 9)  # x, y, z


def label_map(seed: int, values: int = 3) -> np.ndarray:
    """Blocks of labels, so that there are surfaces of some size."""
    small = np.random.default_rng(seed).integers(0, values, (3, 3, 3), np.uint8)
    return small.repeat(3, 0).repeat(3, 1).repeat(3, 2)[: SHAPE[0], : SHAPE[1], : SHAPE[2]]


def write(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine), path)
    return path


def write_dataset(folder: Path, labels: dict = LABELS, ending: str = ".nii.gz", **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dataset.json"
    path.write_text(json.dumps({"labels": labels, "file_ending": ending, "channel_names": {"0": "CT"}, **more}))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Truth and prediction of three cases, and the dataset.json next to the truth."""
    write_dataset(tmp_path)
    truth, prediction = tmp_path / "labelsTs", tmp_path / "predicted"
    for number, case in enumerate("abc"):
        write(truth / f"{case}.nii.gz", label_map(number))
        write(prediction / f"{case}.nii.gz", label_map(number + 10))
    return truth, prediction


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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
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


# ---- formats ---------------------------------------------------------------------------------------------------


def as_itk(path: Path, labels: np.ndarray) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(labels.T)
    image.SetSpacing((0.5, 1.0, 2.5)[: labels.ndim])
    sitk.WriteImage(image, str(path))


def as_tif(path: Path, labels: np.ndarray) -> None:
    pytest.importorskip("tifffile").imwrite(path, labels.T)
    path.with_name(f"{path.name.split('.')[0]}.json").write_text(json.dumps({"spacing": [2.5, 1.0, 0.5]}))


def as_nifti(path: Path, labels: np.ndarray) -> None:
    write(path, labels, np.diag([0.5, 1, 2.5, 1]))


def as_floats(path: Path, labels: np.ndarray) -> None:
    as_nifti(path, labels.astype(np.float64))


def as_4d(path: Path, labels: np.ndarray) -> None:
    as_nifti(path, labels[..., None])


@pytest.mark.parametrize(
    ("ending", "writer"),
    [
        (".nii", as_nifti),
        (".nii.gz", as_nifti),
        (".nii.gz", as_floats),
        (".nii.gz", as_4d),
        (".nrrd", as_itk),
        (".mha", as_itk),
        (".gipl", as_itk),
        (".tif", as_tif),
        (".tiff", as_tif),
    ],
)
def test_every_format_gives_the_same_scores(
    tmp_path: Path, ending: str, writer: Callable[[Path, np.ndarray], None]
) -> None:
    dataset = write_dataset(tmp_path, ending=ending)
    for folder, seed in (("truth", 1), ("prediction", 2)):
        (tmp_path / folder).mkdir()
        writer(tmp_path / folder / f"a{ending}", label_map(seed))
    rows = evaluate(tmp_path / "truth", tmp_path / "prediction", dataset, processes=1)
    structures = [Structure("1", "first", (1,)), Structure("2", "second", (2,))]
    expected = score_case(label_map(1), label_map(2), (0.5, 1, 2.5), structures, case="a")
    for row, (other, _) in zip(rows, expected, strict=True):
        for metric in (*DISTANCES, "dice", "nsd", "volume_pred_ml", "diagonal_mm"):
            assert getattr(row, metric) == pytest.approx(getattr(other, metric), abs=1e-5), metric


def as_picture(path: Path, labels: np.ndarray) -> None:
    pytest.importorskip("skimage.io").imsave(path, labels.T, check_contrast=False)


@pytest.mark.parametrize(
    ("ending", "writer", "spacing"),
    [
        (".png", as_picture, (1, 1)),
        (".bmp", as_picture, (1, 1)),
        (".tif", as_picture, (1, 1)),
        (".mha", as_itk, (0.5, 1)),
        (".nii.gz", as_nifti, (0.5, 1)),
    ],
)
def test_2d_images_are_scored_in_2d(
    tmp_path: Path, ending: str, writer: Callable[[Path, np.ndarray], None], spacing: tuple[float, float]
) -> None:
    dataset = write_dataset(tmp_path, ending=ending)
    images = [label_map(seed)[:, :, 4] for seed in (1, 2)]
    for folder, image in zip(("truth", "prediction"), images, strict=True):
        (tmp_path / folder).mkdir()
        writer(tmp_path / folder / f"a{ending}", image)
    row = evaluate(tmp_path / "truth", tmp_path / "prediction", dataset, processes=1)[0]
    ((expected, _),) = score_case(*images, spacing, [Structure("1", "first", (1,))], case="a")
    for metric in (*DISTANCES, "dice", "nsd", "diagonal_mm"):
        assert getattr(row, metric) == pytest.approx(getattr(expected, metric)), metric
    assert row.volume_truth_ml is None


def test_spacing_goes_with_its_axis(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, {"background": 0, "point": 1})
    for folder, at in (("truth", (1, 1, 1)), ("prediction", (1, 1, 4))):
        labels = np.zeros(SHAPE, np.uint8)
        labels[at] = 1
        write(tmp_path / folder / "a.nii.gz", labels)
    assert evaluate(tmp_path / "truth", tmp_path / "prediction", dataset, processes=1)[0].hd95_mm == 7.5


@pytest.mark.parametrize(("unit", "scale"), [("micron", 1000.0), ("meter", 0.001), ("mm", 1.0), ("unknown", 1.0)])
def test_distances_and_volumes_are_in_mm_and_ml_whatever_unit_a_file_has(
    folders: tuple[Path, Path], tmp_path: Path, unit: str, scale: float
) -> None:
    """SimpleITK converts, and an image that nnU-Net wrote by it has the same geometry as the one that it read."""
    truth, prediction = folders
    expected = evaluate(truth, prediction, processes=1)
    image = nib.load(truth / "a.nii.gz")
    affine = np.diag([*(scale,) * 3, 1.0]) @ image.affine
    other = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    other.header.set_xyzt_units(unit)
    nib.save(other, truth / "a.nii.gz")
    assert sitk.ReadImage(str(truth / "a.nii.gz")).GetSpacing() == pytest.approx(tuple(image.header.get_zooms()))
    assert [row.hd95_mm for row in evaluate(truth, prediction, processes=1)] == pytest.approx(
        [row.hd95_mm for row in expected]
    )


def test_a_reader_that_reorients_may_compare_other_orientations(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    before = evaluate(truth, prediction, processes=1)
    for path in prediction.glob("*.nii.gz"):
        nib.save(nib.as_closest_canonical(nib.load(path)), path)
    with pytest.raises(DataError, match="direction"):
        evaluate(truth, prediction, processes=1)
    write_dataset(truth.parent, overwrite_image_reader_writer="NibabelIOWithReorient")
    after = evaluate(truth, prediction, processes=1)
    for one, other in zip(before, after, strict=True):
        assert one.hd95_mm == pytest.approx(other.hd95_mm)
        assert one.dice == other.dice


# ---- bad input -------------------------------------------------------------------------------------------------


def broken(change: Callable[[np.ndarray], tuple]) -> Callable[[Path], None]:
    """Write a.nii.gz anew with what `change` makes of its affine: labels and affine."""
    return lambda folder: write(folder / "a.nii.gz", *change(AFFINE.copy())) and None


def moved(affine: np.ndarray) -> tuple:
    affine[0, 3] += 1
    return label_map(10), affine


def turned(affine: np.ndarray) -> tuple:
    return label_map(10), affine @ np.diag([1, -1, 1, 1])


def truncated(folder: Path) -> None:
    path = write(folder / "a.nii.gz", np.random.default_rng(0).integers(0, 3, (40, 40, 40)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:2000])


def only_npz(folder: Path) -> None:
    for path in folder.glob("*.nii.gz"):
        path.rename(path.with_name(f"{path.name[0]}.npz"))


def renamed(folder: Path) -> None:
    for path in folder.glob("*.nii.gz"):
        path.rename(path.with_name(f"x_{path.name}"))


BAD = {
    "missing": (lambda folder: (folder / "b.nii.gz").unlink(), "predicted has no b.nii.gz; .*--chill"),
    "two missing": (
        lambda folder: [(folder / f"{case}.nii.gz").unlink() for case in "ab"],
        "predicted has no a.nii.gz, b.nii.gz; .*--chill",
    ),
    "extra": (lambda folder: write(folder / "d.nii.gz", label_map(1)), "d.nii.gz has no truth .*remove"),
    "no common name": (renamed, "share no file name"),
    "shape": (broken(lambda a: (label_map(10)[:-1], a)), r"a.nii.gz has shape \(9, 8, 6\) instead of \(9, 8, 7\)"),
    "spacing": (broken(lambda a: (label_map(10), a * [1, 1, 1.01, 1])), "a.nii.gz has spacing 2.525, 1, 0.5 instead"),
    "origin": (broken(moved), "a.nii.gz has origin 13, -7, 30 instead of 12, -7, 30"),
    "direction": (broken(turned), "a.nii.gz has direction .* instead"),
    "unknown value": (
        broken(lambda a: (label_map(10) * 2, a)),
        r"a.nii.gz holds the value 4, not a label .*\(0, 1, 2\)",
    ),
    "negative value": (broken(lambda a: (-label_map(10).astype(np.int16), a)), "holds the value -2"),
    "probabilities": (broken(lambda a: (label_map(10) * 0.45, a)), r"a.nii.gz holds 0.\d+, so probabilities"),
    "nan": (broken(lambda a: (np.full(SHAPE, np.nan), a)), "a.nii.gz holds nan, so probabilities"),
    "probabilities of all classes": (broken(lambda a: (np.ones((*SHAPE, 3)), a)), "which is not a label map"),
    "npz alone": (only_npz, r"holds probabilities \(.npz\)"),
    "truncated": (truncated, "a.nii.gz cannot be read"),
    "not an image": (lambda folder: (folder / "a.nii.gz").write_text("hello"), "a.nii.gz cannot be read"),
    "empty file": (lambda folder: (folder / "a.nii.gz").write_bytes(b""), "a.nii.gz cannot be read"),
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "predicted holds no file ending"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_names_the_file_and_nothing_is_written(
    folders: tuple[Path, Path], spoil: Callable[[Path], object], message: str
) -> None:
    truth, prediction = folders
    spoil(prediction)
    before = sorted(prediction.iterdir())
    with pytest.raises(DataError, match=message) as caught:
        evaluate(truth, prediction, processes=1)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)
    assert sorted(prediction.iterdir()) == before


def test_rounded_headers_are_the_same_geometry(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    rounded = AFFINE + np.random.default_rng(0).uniform(-1e-4, 1e-4, (4, 4)) * [[1], [1], [1], [0]]
    write(prediction / "a.nii.gz", label_map(10), rounded)
    evaluate(truth, prediction, processes=1)


def test_the_ignore_label_is_for_the_truth_alone(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    write_dataset(truth.parent, {"background": 0, "first": 1, "ignore": 2})
    with pytest.raises(DataError, match=r"predicted.*holds the value 2, not a label of the data set \(0, 1\)"):
        evaluate(truth, prediction, processes=1)


def test_a_value_in_a_gap_between_labels_is_unknown(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    write_dataset(truth.parent, {"background": 0, "second": 2, "fourth": 4})
    with pytest.raises(DataError, match=r"holds the value 1, not a label of the data set \(0, 2, 4\)"):
        evaluate(truth, prediction, processes=1)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".png", ".tif"])
def test_an_unreadable_file_of_any_format_is_named(tmp_path: Path, ending: str) -> None:
    dataset = write_dataset(tmp_path, ending=ending)
    flat = ending == ".png"
    for folder in ("truth", "prediction"):
        (tmp_path / folder).mkdir()
        writer = as_picture if flat else as_tif if ending == ".tif" else as_itk
        writer(tmp_path / folder / f"a{ending}", label_map(0)[:, :, 0] if flat else label_map(0))
    path = tmp_path / "prediction" / f"a{ending}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(DataError, match=f"prediction/a{ending} cannot be read"):
        evaluate(tmp_path / "truth", tmp_path / "prediction", dataset, processes=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"labels": {"background": 0, "a": 1}}', '"file_ending" and "labels"'),
        ('{"file_ending": ".nii.gz", "labels": {"0": "background", "1": "a"}}', '"file_ending" and "labels"'),
        ('{"file_ending": ".nii.gz", "labels": {"background": 0}}', "at least one label"),
        ('{"file_ending": ".xyz", "labels": {"background": 0, "a": 1}}', "no reader for .xyz"),
    ],
)
def test_a_dataset_json_that_cannot_be_used_is_named(folders: tuple[Path, Path], content: str, message: str) -> None:
    truth, prediction = folders
    (truth.parent / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        evaluate(truth, prediction, processes=1)
    assert "dataset.json" in str(caught.value)


def test_missing_folders_and_dataset_json_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    truth, prediction = folders
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        evaluate(truth, tmp_path / "nowhere", processes=1)
    with pytest.raises(DataError, match=r"nowhere.json cannot be read .*-djfile"):
        evaluate(truth, prediction, tmp_path / "nowhere.json", processes=1)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"neither .* -djfile"):
        evaluate(truth, prediction, processes=1)


def test_impossible_options_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tolerance -1"):
        evaluate(tmp_path, tmp_path, tolerance=-1)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(folders: tuple[Path, Path], tmp_path: Path) -> None:
    truth, prediction = folders
    (tmp_path / "file").touch()
    (prediction / "a.nii.gz").write_text("would be noticed in the work")
    with pytest.raises(DataError, match=re.escape(f"cannot write into {tmp_path / 'file'}")):
        evaluate(truth, prediction, output=tmp_path / "file", processes=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "lacks the columns"), ("case,dice\na,1\n", "lacks the columns"), (None, "line 3"), ("\0", "")],
)
def test_a_table_that_is_none_of_ours_is_refused(folders: tuple[Path, Path], text: str | None, message: str) -> None:
    truth, prediction = folders
    evaluate(truth, prediction, processes=1)
    path = prediction / "scores.csv"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:20]
    path.write_text("\n".join(lines) if text is None else text)
    with pytest.raises(DataError, match=f"scores.csv.*{message}"):
        read_scores(path)


def test_rows_of_two_conventions_are_not_summarized(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    rows = evaluate(truth, prediction, processes=1)
    with pytest.raises(DataError, match="2 conventions"):
        summarize([*rows, replace(rows[0], convention="literature")])


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
