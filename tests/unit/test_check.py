import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.commands import main
from nnunetv2_dycon.conversion.check import Finding, check
from nnunetv2_dycon.conversion.split import split
from nnunetv2_dycon.errors import DataError
from tests.datasets import environment, make_dataset

OPTIONS = {"dataset_id": 4, "labeled": 3, "unlabeled": 2, "test": 1, "shape": (8, 9, 10)}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    return tmp_path


@pytest.fixture
def raw(root: Path) -> Path:
    make_dataset(root, **OPTIONS)
    return root / "nnUNet_raw/Dataset004_Tiny"


def failed() -> dict[str, str]:
    found = {one.name: one.text for one in check(4, processes=1) if not one.ok}
    assert found.pop("next", "mend it, then type again: nnUNetv2_dycon check -d 4").endswith("check -d 4")
    return found


def rewrite(path: Path, change) -> None:
    image = sitk.ReadImage(str(path))
    array = change(sitk.GetArrayFromImage(image))
    new = sitk.GetImageFromArray(array)
    new.CopyInformation(image)
    sitk.WriteImage(new, str(path))


def test_a_good_data_set_passes_and_the_next_command_is_said(raw, capsys):
    checks = check(4, processes=1)
    assert all(one.ok for one in checks)
    assert checks[-1] == Finding(
        "next", True, "nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres --verify_dataset_integrity"
    )
    assert main(["check", "-d", "4", "-np", "1"]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_the_command_ends_with_1_where_something_is_wrong(raw, capsys):
    (raw / "labelsTr/l_00.nii.gz").unlink()
    assert main(["check", "-d", "4", "-np", "1"]) == 1
    assert "FAIL  labels" in capsys.readouterr().out


def test_regions_and_ignore_label_pass(root):
    make_dataset(root, regions=True, ignore=True, **OPTIONS)
    assert failed() == {}


def test_a_name_in_two_roles_is_found(raw):
    shutil.copy(raw / "imagesTr/l_01_0000.nii.gz", raw / "imagesUn/l_01_0000.nii.gz")
    assert "'l_01' is in two roles" in failed()["roles"]


@pytest.mark.parametrize("kind", ["copy", "other compression and type"])
def test_the_same_image_under_two_names_in_two_roles_is_found(raw, kind):
    source, target = raw / "imagesTr/l_01_0000.nii.gz", raw / "imagesUn/u_07_0000.nii.gz"
    if kind == "copy":
        shutil.copy(source, target)
    else:
        image = nib.load(source)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj, np.float32), image.affine), target)
    assert "l_01 (labeled) = u_07 (unlabeled)" in failed()["duplicates"]


def test_the_same_image_twice_in_one_role_is_said_but_no_failure(raw):
    shutil.copy(raw / "imagesUn/u_01_0000.nii.gz", raw / "imagesUn/u_07_0000.nii.gz")
    (one,) = (one for one in check(4, processes=1) if one.name == "duplicates")
    assert one.ok
    assert "u_01 = u_07 (unlabeled)" in one.text


def test_a_label_of_an_unlabeled_case_anywhere_is_found(raw):
    (raw / "labelsUn").mkdir()
    shutil.copy(raw / "labelsTr/l_00.nii.gz", raw / "labelsUn/u_00.nii.gz")
    assert "labelsUn/u_00.nii.gz" in failed()["unlabelled"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("foo_0000.nii", "does not end in .nii.gz"), ("foo.nii.gz", "no channel number"), ("a_seg_0000.nii.gz", "masks")],
)
def test_a_name_in_images_un_that_the_preparation_would_refuse_is_found(raw, name, message):
    shutil.copy(raw / "imagesTr/l_00_0000.nii.gz", raw / "imagesUn" / name)
    assert f"imagesUn/{name}" in failed()["unlabelled"]
    assert message in failed()["unlabelled"]


def test_images_un_with_nothing_usable_is_not_taken_for_a_data_set_without_unlabeled_cases(raw):
    for path in (raw / "imagesUn").iterdir():
        path.rename(path.with_suffix(""))  # .nii
    assert "does not end in .nii.gz" in failed()["unlabelled"]


def test_a_label_on_another_grid_is_found(raw):
    path = raw / "labelsTr/l_01.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetOrigin((0, 0, 0))
    sitk.WriteImage(image, str(path))
    assert str(path) in failed()["geometry"]


def test_rounding_in_a_header_is_no_other_grid(raw):
    path = raw / "labelsTr/l_01.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetOrigin([value + 1e-4 for value in image.GetOrigin()])
    sitk.WriteImage(image, str(path))
    assert failed() == {}


def test_an_unknown_label_value_is_found(raw):
    rewrite(raw / "labelsTr/l_02.nii.gz", lambda a: np.where(a == 2, 7, a).astype(np.uint8))
    assert "l_02.nii.gz has the value 7" in failed()["label values"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:150]), "u_00_0000.nii.gz"),
        (lambda path: path.write_bytes(b""), "u_00_0000.nii.gz"),
        (lambda path: rewrite(path, np.zeros_like), "only zeros"),
    ],
)
def test_an_unusable_image_is_named(raw, damage, message):
    path = raw / "imagesUn/u_00_0000.nii.gz"
    damage(path)
    text = failed()["images"]
    assert message in text
    assert "u_00_0000.nii.gz" in text


def test_nan_in_an_image_is_found(raw):
    path = raw / "imagesUn/u_00_0000.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj, np.float32).copy()
    array[2, 2, 2] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)
    assert "NaN" in failed()["images"]


def test_a_missing_channel_is_found(root):
    make_dataset(root, channels=2, **OPTIONS)
    (root / "nnUNet_raw/Dataset004_Tiny/imagesUn/u_01_0001.nii.gz").unlink()
    assert "1 channels, dataset.json names 2" in failed()["images"]


def test_folds_that_name_other_cases_are_found(raw):
    (raw / "splits_final.json").write_text(json.dumps([{"train": ["l_00", "t_00"], "val": ["l_01"]}]))
    assert "'t_00', not in" in failed()["splits_final.json"]


@pytest.mark.parametrize(
    ("planned", "words"),
    [
        ([{"train": ["l_00"], "val": ["l_02"]}], "fold 0 of"),
        ([{"train": ["l_01", "l_00"], "val": ["l_02"]}, {"train": ["l_00"], "val": ["l_01"]}], None),
        ([{"train": ["l_00", "l_01"], "val": ["l_02"], "unlabeled": ["l_03"]}], "fold 0 of"),
    ],
)
def test_folds_that_differ_from_those_that_training_reads_are_found(raw, root, planned, words):
    path = root / "nnUNet_preprocessed/Dataset004_Tiny/splits_final.json"
    path.parent.mkdir()
    path.write_text(json.dumps(planned))
    (raw / "splits_final.json").write_text(json.dumps([{"train": ["l_00", "l_01"], "val": ["l_02"]}]))
    text = failed().get("splits_final.json")
    if words is None:
        assert text is None
    else:
        assert words in text
        assert f"cp {raw / 'splits_final.json'} {path}" in text


@pytest.mark.parametrize(
    ("cases", "text"), [(1, "trains and validates on it"), (4, "one fold per case"), (5, "5 folds")]
)
def test_the_number_of_folds_to_come_is_that_of_the_cases(root, cases, text):
    make_dataset(root, **{**OPTIONS, "labeled": cases})
    (found,) = (one for one in check(4, processes=1) if one.name == "splits_final.json")
    assert found.ok
    assert text in found.text


def test_a_case_that_was_moved_after_the_conversion_is_found(raw):
    cases = {c: {"role": "labeled"} for c in ("l_00", "l_01", "l_02")}
    cases |= {"u_00": {"role": "unlabeled"}, "u_01": {"role": "test"}, "t_00": {"role": "test"}}
    (raw / "conversion.json").write_text(json.dumps({"converter": "split", "cases": cases}))
    assert "'u_01' was written as test and is now unlabeled" in failed()["conversion.json"]


def test_a_data_set_that_is_not_there_is_one_line(root):
    (root / "nnUNet_raw").mkdir()
    with pytest.raises(DataError, match="-d 4"):
        check(4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": {"0": "background", "1": "a"}}, '"background": 0, "organ": 1}, or run nnUNetv2_convert_old_'),
        ({"labels": {"0": "background", "1": "a"}, "file_ending": None}, "nnUNetv2_convert_old_nnUNet_dataset"),
        ({"labels": ["background", "a"]}, "; write a number for each name"),
        ({"labels": {"background": 0, "a": {"b": 1}}}, "; write a number for each name"),
        ({"labels": None}, 'has no "labels"; add '),
        ({"file_ending": None}, 'has no "file_ending"; add '),
        ({"channel_names": None}, 'has no "channel_names"; add '),
    ],
)
@pytest.mark.parametrize("command", [lambda: check(4, processes=1), lambda: split(4, 604, 1)], ids=["check", "split"])
def test_a_wrong_dataset_json_is_one_line(raw, command, change, words):
    path = raw / "dataset.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(DataError) as caught:
        command()
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dataset_json_that_is_a_list_is_one_line(raw):
    (raw / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset\.json must be \{"):
        check(4, processes=1)


# ---- spacing -----------------------------------------------------------------------------------------------


def respaced(path: Path, factor: float) -> None:
    image = sitk.ReadImage(str(path))
    image.SetSpacing([factor * edge for edge in image.GetSpacing()])
    sitk.WriteImage(image, str(path))


@pytest.mark.parametrize("name", ["imagesUn/u_01_0000.nii.gz", "imagesTs/t_00_0000.nii.gz"])
@pytest.mark.parametrize("factor", [0.001, 0.3, 3.6, 1000])
def test_an_image_with_voxels_of_quite_another_size_is_found(raw, name, factor):
    path = raw / name
    respaced(path, factor)
    if "Ts" in name:
        respaced(raw / "labelsTs/t_00.nii.gz", factor)
    text = failed()["spacing"]
    assert text.startswith(f"{path} has voxels of ")
    size = " x ".join(f"{edge:.3g}" for edge in sitk.ReadImage(str(path)).GetSpacing())
    assert f" {size} mm, labelled images from 0.9 x 1 x 1.4 to 1 x 1.1 x 1.5 mm" in text


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_voxels_of_another_size_are_fine_within_reason(raw, factor):
    respaced(raw / "imagesUn/u_01_0000.nii.gz", factor)
    assert failed() == {}


def test_a_slice_among_volumes_is_found(raw):
    path = raw / "imagesUn/u_01_0000.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(path))[:, :, 3:4], str(path))
    assert failed()["spacing"].startswith(f"{path} is 2-D, labelled images are 3-D")


def test_an_image_that_cannot_be_read_is_not_said_to_have_another_spacing(raw):
    (raw / "imagesTr/l_00_0000.nii.gz").write_bytes(b"")
    (raw / "imagesUn/u_01_0000.nii.gz").write_bytes(b"")
    assert failed().keys() == {"images"}
    for path in (raw / "imagesTr").iterdir():
        path.write_bytes(b"")
    assert failed().keys() == {"images"}
