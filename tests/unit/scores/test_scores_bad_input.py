"""What cannot be scored is refused in one line that names the file."""

import gzip
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.scores import evaluate, read_scores, summarize
from tests.label_maps import AFFINE, SHAPE, as_itk, as_picture, as_tif, label_map, write, write_dataset


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
    "spacing": (
        broken(lambda a: (label_map(10), a * [1, 1, 1.01, 1])),
        "a.nii.gz has spacing 0.5, 1, 2.525 instead",
    ),
    "origin": (broken(moved), "a.nii.gz has origin -13, 7, 30 instead of -12, 7, 30"),
    "direction": (broken(turned), "a.nii.gz has direction .* instead"),
    "unknown value": (
        broken(lambda a: (label_map(10) * 2, a)),
        r"a.nii.gz holds the value 4, not a label .*\(0, 1, 2\)",
    ),
    "negative value": (broken(lambda a: (-label_map(10).astype(np.int16), a)), "holds the value -2"),
    "probabilities": (broken(lambda a: (label_map(10) * 0.45, a)), r"a.nii.gz holds 0.\d+, so probabilities"),
    "nan": (broken(lambda a: (np.full(SHAPE, np.nan), a)), "a.nii.gz has NaN or Inf"),
    "probabilities of all classes": (broken(lambda a: (np.ones((*SHAPE, 3)), a)), "which is not a label map"),
    "npz alone": (only_npz, r"holds probabilities \(.npz\)"),
    "truncated": (truncated, "a.nii.gz cannot be read .*end-of-stream"),
    "not an image": (lambda folder: (folder / "a.nii.gz").write_text("hello"), "a.nii.gz is not gzip data"),
    "gzip data of no image": (
        lambda folder: (folder / "a.nii.gz").write_bytes(gzip.compress(b"hello" * 99)),
        "a.nii.gz cannot be read",
    ),
    "empty file": (lambda folder: (folder / "a.nii.gz").write_bytes(b""), "a.nii.gz is empty"),
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
    image = nib.Nifti1Image(label_map(10), rounded)
    image.set_qform(rounded, 1)  # which has right angles
    nib.save(image, prediction / "a.nii.gz")
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
    with pytest.raises(DataError, match=re.escape(f"cannot write {tmp_path / 'file'}: ")):
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
