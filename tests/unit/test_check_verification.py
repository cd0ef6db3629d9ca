"""check refuses what nnU-Net's own verification refuses, names the mend, and its last line can be typed."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from nnunetv2_dycon.commands import main
from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.errors import DataError
from tests.datasets import environment, make_dataset, no_pools

OPTIONS = {"labeled": 3, "unlabeled": 2, "test": 1, "shape": (8, 9, 10)}
COMMAND = "nnUNetv2_plan_and_preprocess -d {} -c {} --verify_dataset_integrity"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    return tmp_path


@pytest.fixture
def raw(root: Path) -> Path:
    make_dataset(root, dataset_id=4, **OPTIONS)
    return root / "nnUNet_raw/Dataset004_Tiny"


def failed(dataset: int | str = 4) -> dict[str, str]:
    """Findings that are not ok, by name; all are one line."""
    found = check(dataset, processes=1)
    assert not [one for one in found if "\n" in one.text]
    return {one.name: one.text for one in found if not one.ok}


def nnunet_accepts(raw: Path) -> bool:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), no_pools():
        try:
            verify_dataset_integrity(str(raw), 1)
        except Exception:
            return False
    return True


def entries(**changed: Any) -> Callable[[Path], None]:
    """Change dataset.json; None removes an entry."""

    def change(raw: Path) -> None:
        path = raw / "dataset.json"
        content = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = sitk.ReadImage(str(path))
    new = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
    new.CopyInformation(image)
    sitk.WriteImage(new, str(path))


def gap(raw: Path) -> None:
    entries(labels={"background": 0, "a": 1, "b": 3})(raw)
    for path in (*(raw / "labelsTr").iterdir(), *(raw / "labelsTs").iterdir()):
        rewrite(path, lambda array: np.where(array == 2, 3, array).astype(np.uint8))


def other_spacing(raw: Path) -> None:
    path = raw / "labelsTr/l_01.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetSpacing([1.0003 * edge for edge in image.GetSpacing()])
    sitk.WriteImage(image, str(path))


def four_d(raw: Path) -> None:
    path = raw / "imagesTr/l_00_0000.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.stack([np.asarray(image.dataobj)] * 2, -1), image.affine), path)


def cut(raw: Path) -> None:
    path = raw / "imagesTr/l_00_0000.nii.gz"  # the first one, by which nnU-Net chooses its reader
    path.write_bytes(path.read_bytes()[:60])


def copied(source: str, target: str) -> Callable[[Path], None]:
    return lambda raw: shutil.copy(raw / source, raw / target)


def hidden(raw: Path) -> None:
    (raw / "imagesTr/._l_00_0000.nii.gz").write_bytes(b"\x00\x05\x16\x07")


REFUSED: dict[str, tuple[Callable[[Path], Any], str, str]] = {  # fault, finding that fails, words in it
    "numTraining too high": (entries(numTraining=9), "numTraining", "is 9, and there are 3 training cases; to correct"),
    "numTraining a text": (entries(numTraining="3"), "numTraining", "is '3', and there are 3"),
    "no numTraining": (entries(numTraining=None), "numTraining", "type: nnUNetv2_dycon check -d 4 --fix"),
    "a gap": (gap, "nnU-Net", "Labels must be in consecutive order"),
    "no background": (entries(labels={"organ": 1, "other": 2}), "nnU-Net", "Background label not declared"),
    "background above 0": (entries(labels={"background": 1, "a": 0, "b": 2}), "nnU-Net", "Background label must be 0"),
    "old word": (entries(modality={"0": "MRI"}, channel_names=None), "nnU-Net", 'rename it to "channel_names"'),
    "regions without order": (
        entries(labels={"background": 0, "a": [1, 2], "b": [2]}),
        "nnU-Net",
        "regions_class_order",
    ),
    "order too short": (
        entries(labels={"background": 0, "a": [1, 2], "b": [2]}, regions_class_order=[1]),
        "nnU-Net",
        "as many entries as there are regions",
    ),
    "ignore in between": (entries(labels={"background": 0, "ignore": 1, "b": 2}), "nnU-Net", "highest label"),
    "ignore a region": (
        entries(labels={"background": 0, "a": 1, "b": 2, "ignore": [3]}),
        "nnU-Net",
        "has to be an integer",
    ),
    "another spacing": (other_spacing, "geometry", "l_01.nii.gz"),
    "a 4-D image": (four_d, "images", "2 channels, dataset.json names 1"),
    "a broken first file": (cut, "images", "l_00_0000.nii.gz cannot be read"),
    "a second channel": (copied("imagesTr/l_00_0000.nii.gz", "imagesTr/l_00_0001.nii.gz"), "images", "2 channels"),
    "no channel number": (
        copied("imagesTr/l_00_0000.nii.gz", "imagesTr/more.nii.gz"),
        "file names",
        "no channel number",
    ),
    "a hidden file": (hidden, "file names", "._l_00_0000.nii.gz is hidden, but nnU-Net takes it for a case; delete it"),
    "no label folder": (lambda raw: shutil.rmtree(raw / "labelsTr"), "labels", "missing: "),
    "no training case": (lambda raw: shutil.rmtree(raw / "imagesTr"), "roles", "0 labeled"),
    "an unknown value": (
        lambda raw: rewrite(raw / "labelsTr/l_02.nii.gz", lambda a: np.where(a == 2, 7, a).astype(np.uint8)),
        "label values",
        "has the value 7",
    ),
}
ACCEPTED: dict[str, Callable[[Path], Any]] = {
    "as it is": lambda raw: None,
    "numbers as texts": entries(labels={"background": "0", "class1": "1", "class2": "2"}),
    "a label that never occurs": entries(labels={"background": 0, "class1": 1, "class2": 2, "class3": 3}),
    "a region": entries(labels={"background": 0, "a": [1, 2], "b": [2]}, regions_class_order=[1, 2]),
    "an ignore label": entries(labels={"background": 0, "class1": 1, "ignore": 2}),
    "nibabel's reader": entries(overwrite_image_reader_writer="NibabelIO"),
    "no reader named": entries(overwrite_image_reader_writer=None),
}


@pytest.mark.parametrize("broken_reader", [False, True], ids=["", "reader by the first file"])
@pytest.mark.parametrize("fault", REFUSED)
def test_what_nnunet_refuses_fails_with_its_place(raw: Path, capfd: Any, fault: str, broken_reader: bool) -> None:
    if broken_reader:
        entries(overwrite_image_reader_writer=None)(raw)
    change, name, words = REFUSED[fault]
    change(raw)
    assert not nnunet_accepts(raw)
    capfd.readouterr()
    found = failed()
    assert words in found[name]
    assert found["next"] == "mend it, then type again: nnUNetv2_dycon check -d 4"
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("change", ACCEPTED)
def test_what_nnunet_accepts_passes(raw: Path, change: str) -> None:
    ACCEPTED[change](raw)
    assert nnunet_accepts(raw)
    assert failed() == {}


def test_labels_without_any_foreground_stop_nnunets_statistics_and_fail(raw: Path) -> None:
    for path in (raw / "labelsTr").iterdir():
        rewrite(path, np.zeros_like)
    assert failed()["classes"] == "no label map has any of class1, class2; annotate, or correct the files"


def test_a_class_that_no_labelled_case_has_is_said_but_no_failure(raw: Path) -> None:
    entries(labels={"background": 0, "class1": 1, "class2": 2, "class3": 3, "ignore": 4})(raw)
    (found,) = (one for one in check(4, processes=1) if one.name == "classes")
    assert found == ("classes", True, "no labelled case has class3, which cannot be learnt then")


def test_a_reader_that_nnunet_would_pass_over_fails(raw: Path) -> None:
    entries(overwrite_image_reader_writer="SimpelITKIO")(raw)
    assert "there is no reader 'SimpelITKIO'" in failed()["nnU-Net"]
    assert "SimpleITKIO" in failed()["nnU-Net"]


def test_an_ending_that_nnunet_cannot_read_is_one_line(raw: Path) -> None:
    entries(overwrite_image_reader_writer=None, file_ending=".dcm")(raw)
    with pytest.raises(DataError, match=r'nnU-Net has no reader for \.dcm; correct "file_ending"'):
        check(4, processes=1)


def test_content_that_is_not_packed_as_its_name_says_is_named_with_a_command_that_works(raw: Path) -> None:
    path = raw / "imagesTr/l_00_0000.nii.gz"
    image = nib.load(path)
    path.write_bytes(nib.Nifti1Image(np.asarray(image.dataobj), image.affine).to_bytes())
    command = failed()["images"].split("type: ")[1]
    assert os.system(command) == 0
    assert failed() == {}


# ---- --fix -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [9, "3", None, 3.5, True])
def test_fix_corrects_the_number_of_cases_and_nothing_else(raw: Path, capsys: Any, number: Any) -> None:
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    entries(numTraining=number)(raw)
    assert main(["check", "-d", "4", "-np", "1"]) == 1
    assert "--fix" in capsys.readouterr().out
    assert main(["check", "-d", "4", "-np", "1", "--fix"]) == 0
    assert main(["check", "-d", "4", "-np", "1"]) == 0
    assert json.loads((raw / "dataset.json").read_text()) == json.loads(before.pop(raw / "dataset.json"))
    for path, content in before.items():
        assert path.read_bytes() == content
    assert nnunet_accepts(raw)


def test_a_number_that_is_true_is_not_one(root: Path) -> None:
    make_dataset(root, dataset_id=4, **{**OPTIONS, "labeled": 1})
    entries(numTraining=True)(root / "nnUNet_raw/Dataset004_Tiny")
    assert "is True, and there are 1 training cases" in failed()["numTraining"]


def written(path: Path) -> tuple[int, int, int]:
    """Which file it is and when it was written; reading it changes another time."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def test_fix_of_a_right_number_does_not_touch_the_file(raw: Path) -> None:
    before = written(raw / "dataset.json")
    assert main(["check", "-d", "4", "-np", "1", "--fix"]) == 0
    assert written(raw / "dataset.json") == before


def test_moving_images_to_images_un_is_mended_by_the_command_that_is_printed(raw: Path) -> None:
    (raw / "imagesTr/l_02_0000.nii.gz").rename(raw / "imagesUn/l_02_0000.nii.gz")
    (raw / "labelsTr/l_02.nii.gz").unlink()
    command = failed()["numTraining"].split("to correct it type: ")[1]
    assert main([*command.split()[1:], "-np", "1"]) == 0


# ---- the next command --------------------------------------------------------------------------------------


def last(dataset: int | str = 4) -> tuple[bool, str]:
    _, good, text = check(dataset, processes=1)[-1]
    return good, text


@pytest.mark.parametrize("kind", ["slices", "pictures"])
def test_2d_data_get_the_2d_configuration(root: Path, raw: Path, kind: str) -> None:
    for path in (path for path in raw.rglob("*.nii.gz")):
        image = sitk.ReadImage(str(path))
        if kind == "slices":
            sitk.WriteImage(image[:, :, 4:5], str(path))
        else:
            picture = sitk.GetArrayFromImage(image)[4].astype(np.uint8) + ("images" in path.parent.name)
            sitk.WriteImage(sitk.GetImageFromArray(picture), str(path).replace(".nii.gz", ".png"))
            path.unlink()
    if kind == "pictures":
        entries(file_ending=".png", overwrite_image_reader_writer=None)(raw)
    assert last() == (True, COMMAND.format(4, "2d"))


@pytest.mark.parametrize(("number", "name"), [(1004, "Dataset1004_Tiny"), (12, "Dataset012_Tiny")])
def test_the_id_is_not_cut(root: Path, number: int, name: str) -> None:
    make_dataset(root, dataset_id=number, **OPTIONS)
    for asked in (number, name):
        assert last(asked) == (True, COMMAND.format(number, "3d_fullres"))


def test_an_id_is_not_that_of_a_longer_one(root: Path) -> None:
    make_dataset(root, dataset_id=1004, **OPTIONS)
    with pytest.raises(DataError, match=r"-d 100: no data set has this id; .* has Dataset1004_Tiny; correct"):
        check(100, processes=1)


def test_an_id_that_nnunet_would_not_find_fails(root: Path, raw: Path) -> None:
    (root / "nnUNet_preprocessed/Dataset004_Other").mkdir(parents=True)
    good, text = last("Dataset004_Tiny")
    assert not good
    assert text.startswith("-d 4 may be Dataset004_Other or Dataset004_Tiny; rename")
    raw.rename(raw.with_name("Dataset4_Tiny"))
    with pytest.raises(DataError, match="needs three digits: Dataset012_Name"):
        check("Dataset4_Tiny", processes=1)


def test_a_variable_that_the_next_command_needs_is_named(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    good, text = last()
    assert not good
    assert text.startswith("nnUNet_preprocessed is not set; type: export nnUNet_preprocessed=/path/to/nnUNet_pre")
