"""Every bad input is one line that names the file and what to do, and nothing that was good is lost."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_dycon.data import unlabeled
from nnunetv2_dycon.data.manifest import unlabeled_status
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.errors import ConfigError, DataError, SplitError, UserError, WriteError
from tests.datasets import environment, make_dataset, plan_and_preprocess

NAME = "Dataset901_Tiny"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    make_dataset(root, shape=(16, 16, 16), labeled=2, channels=2)
    plan_and_preprocess(root=root)
    return root


@pytest.fixture
def raw(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "nnUNet_raw" / NAME


def message(
    error: type[UserError] = DataError, function: Callable[..., Any] = preprocess_unlabeled, **options: Any
) -> str:
    """What the user is told; one line."""
    options = {"dataset": 901, **({"processes": 1} if function is preprocess_unlabeled else {}), **options}
    with pytest.raises(error) as caught:
        function(**options)
    assert caught.type in (error, WriteError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = nibabel.load(path)
    array = change(np.asarray(image.dataobj, np.float32))
    nibabel.save(nibabel.Nifti1Image(array, image.affine), path)


def use_reader(reader: str) -> None:
    plans = Path(os.environ["nnUNet_preprocessed"], NAME, "nnUNetPlans.json")
    plans.write_text(json.dumps({**json.loads(plans.read_text()), "image_reader_writer": reader}))


def put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[3, 4, 5] = value
        return array

    return change


def test_no_unlabelled_images_at_all(raw: Path) -> None:
    shutil.rmtree(raw / "imagesUn")
    for function in (preprocess_unlabeled, unlabeled_status):
        text = message(function=function)
        assert f"{raw / 'imagesUn'} does not exist" in text
        assert "as CASE_0000.nii.gz" in text
    (raw / "imagesUn").mkdir()
    assert f"{raw / 'imagesUn'} holds no image" in message()


def test_another_number_of_channels(raw: Path) -> None:
    (raw / "imagesUn/u_01_0000.nii.gz").unlink()
    text = message()
    assert str(raw / "imagesUn/u_01_0001.nii.gz") in text
    assert "channel file _0001, dataset.json names 2 (_0000 to _0001)" in text


def test_a_missing_last_channel_is_found_when_the_file_is_read(raw: Path) -> None:
    (raw / "imagesUn/u_01_0001.nii.gz").unlink()
    assert re.search(r"u_01_0000.nii.gz: 1 channel, dataset.json names 2", message())


def test_too_many_channels(raw: Path) -> None:
    shutil.copy(raw / "imagesUn/u_01_0001.nii.gz", raw / "imagesUn/u_01_0002.nii.gz")
    assert "_0000, _0001, _0002, dataset.json names 2" in message()


def test_another_file_ending(raw: Path) -> None:
    (raw / "imagesUn/x_0000.mha").touch()
    text = message(function=unlabeled_status)
    assert f"{raw / 'imagesUn/x_0000.mha'} does not end in .nii.gz" in text
    assert "convert or remove" in text


def test_a_file_without_channel_number(raw: Path) -> None:
    (raw / "imagesUn/some_scan.nii.gz").touch()
    assert f"{raw / 'imagesUn/some_scan.nii.gz'} has no channel number; rename" in message()


def test_a_name_that_nnunet_takes_for_a_mask(raw: Path) -> None:
    for channel in range(2):
        os.rename(raw / f"imagesUn/u_01_000{channel}.nii.gz", raw / f"imagesUn/u_seg_000{channel}.nii.gz")
    assert re.search(r"u_seg_0000.nii.gz: nnU-Net takes names in _seg for masks; rename", message())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty (0 bytes)"),
        (b"no image", "is not gzip data but its name says .gz"),
        (b"\x1f\x8b\x08" + bytes(40), "cannot be read"),
    ],
)
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_an_unreadable_file(raw: Path, content: bytes, reason: str, reader: str) -> None:
    use_reader(reader)
    (raw / "imagesUn/u_01_0001.nii.gz").write_bytes(content)
    assert f"{raw / 'imagesUn/u_01_0001.nii.gz'} {reason}" in message()


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_a_changed_bit(raw: Path, reader: str) -> None:
    """SimpleITK reads such a file as zeros or nearly so, and nibabel as other values."""
    use_reader(reader)
    path = raw / "imagesUn/u_01_0001.nii.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    text = message()
    assert f"{path} cannot be read" in text
    assert "replace or remove" in text


def test_a_truncated_file(raw: Path) -> None:
    path = raw / "imagesUn/u_01_0001.nii.gz"
    path.write_bytes(path.read_bytes()[:-1500])  # SimpleITK reads it, with zeros for the missing part
    assert re.search(r"u_01_0001.nii.gz cannot be read", message())


def test_channels_of_different_shape(raw: Path) -> None:
    rewrite(raw / "imagesUn/u_01_0001.nii.gz", lambda a: a[:-1])
    assert re.search(r"u_01_0000.nii.gz, .*u_01_0001.nii.gz cannot be read", message())


def test_an_image_of_zeros(raw: Path) -> None:
    for channel in range(2):
        rewrite(raw / f"imagesUn/u_01_000{channel}.nii.gz", np.zeros_like)
    text = message()
    assert "u_01_0000.nii.gz" in text
    assert "is empty (only zeros)" in text


def test_an_image_without_voxels(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    # SimpleITK refuses such files; other readers may not
    monkeypatch.setattr(SimpleITKIO, "read_images", lambda self, files: (np.zeros((2, 0, 4, 4), np.float32), {}))
    assert "is empty (no voxel)" in message()


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_names_the_channel(raw: Path, value: float, reader: str) -> None:
    use_reader(reader)
    rewrite(raw / "imagesUn/u_01_0001.nii.gz", put(value))
    text = message()
    assert text.startswith(f"{raw / 'imagesUn/u_01_0001.nii.gz'} has NaN or Inf in 1 voxel;")


def test_an_image_of_nothing_but_nan(raw: Path) -> None:
    for channel in range(2):
        rewrite(raw / f"imagesUn/u_01_000{channel}.nii.gz", lambda a: np.full_like(a, np.nan))
    assert "has NaN or Inf in" in message()


def test_a_4d_image(raw: Path) -> None:
    for channel in range(2):
        rewrite(raw / f"imagesUn/u_01_000{channel}.nii.gz", lambda a: np.stack([a] * 3, -1))
    text = message()
    assert "u_01_0000.nii.gz" in text
    assert "is 4-D (6 volumes); write one 3-D file per channel" in text


def test_a_4d_image_for_nibabel(raw: Path) -> None:
    use_reader("NibabelIO")
    rewrite(raw / "imagesUn/u_01_0000.nii.gz", lambda a: np.stack([a] * 3, -1))
    assert re.search(r"u_01_0000.nii.gz.*cannot be read \(only 3d images", message())


@pytest.mark.parametrize(("folder", "case"), [("imagesTr", "l_00"), ("imagesTs", "t_00")])
def test_the_name_of_a_labelled_or_test_case(raw: Path, folder: str, case: str) -> None:
    for channel in range(2):
        shutil.copy(raw / f"imagesUn/u_00_000{channel}.nii.gz", raw / f"imagesUn/{case}_000{channel}.nii.gz")
    for function in (preprocess_unlabeled, unlabeled_status):
        text = message(SplitError, function)
        assert str(raw / f"imagesUn/{case}_0000.nii.gz") in text
        assert str(raw / f"{folder}/{case}_0000.nii.gz") in text


def test_several_bad_files_are_counted_on_one_line(raw: Path) -> None:
    rewrite(raw / "imagesUn/u_00_0000.nii.gz", put(np.nan))
    for case in ("a", "b", "c"):
        for channel in range(2):
            (raw / f"imagesUn/{case}_000{channel}.nii.gz").touch()
    text = message()
    assert text.startswith("4 files are bad: ")
    assert text.endswith("and 1 more")
    status = unlabeled_status(901)
    assert status.state == "missing"
    assert "u_01" not in status.reason


def test_no_plans(raw: Path) -> None:
    plans = Path(os.environ["nnUNet_preprocessed"], NAME, "nnUNetPlans.json")
    plans.unlink()
    for function in (preprocess_unlabeled, unlabeled_status):
        assert message(function=function) == (
            f"{plans} does not exist; type: nnUNetv2_plan_and_preprocess -d 901 -c 3d_fullres"
        )
    assert "so that it makes mine" in message(plans="mine")


def test_an_unknown_configuration(raw: Path) -> None:
    text = message(ConfigError, configurations=("3d_fulres",))
    assert "'3d_fulres' is not in the plans" in text
    assert "there are: 2d, 3d_fullres" in text


def test_an_unknown_data_set(raw: Path) -> None:
    assert (
        message(dataset=902)
        == f"-d 902: no data set has this id; {raw.parent} has {NAME}; correct the id, or nnUNet_raw"
    )
    assert message(dataset="tiny") == "-d tiny: give an id (4) or a full name (Dataset004_Name)"


def test_the_raw_data_set_is_needed_for_preparing(raw: Path) -> None:
    shutil.rmtree(raw)
    assert f"{raw} does not exist" in message()
    assert "is missing; set nnUNet_raw" in message(function=unlabeled_status)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_unset_folders(raw: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable)
    assert message() == f"{variable} is not set; type: export {variable}=/path/to/{variable}"
    monkeypatch.setenv(variable, "/nowhere/at/all")
    assert f"{variable} is /nowhere/at/all, which is not a folder" in message()


def test_a_process_count_below_one(raw: Path) -> None:
    assert "-np 0" in message(ConfigError, processes=0)


def test_a_file_where_the_folder_should_be(raw: Path) -> None:
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    (folder / "nnUNetPlans_3d_fullres_unlabeled").touch()
    text = message()
    assert f"cannot write {folder / 'nnUNetPlans_3d_fullres_unlabeled'}" in text
    assert "check its permissions" in text


@pytest.mark.parametrize("call", range(5))
def test_no_permission_to_write(raw: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    # the superuser may write anywhere, so the refusal is played; 0 and 4 write the manifest, 1 to 3 a case
    replace, calls = os.replace, iter(range(100))

    def refuse(source: Any, target: Any) -> None:
        if next(calls) == call:
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert re.search(r"cannot write .*_unlabeled.*: Permission denied; check", message())
    monkeypatch.undo()


def test_a_full_disk_under_a_prepared_case(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:  # as blosc2 says it
        raise RuntimeError("Error while creating the NDArray")

    monkeypatch.setattr(nnUNetDatasetBlosc2, "save_case", full)
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    assert re.fullmatch(
        rf"cannot write {folder}/nnUNetPlans_3d_fullres_unlabeled: Error while creating the NDArray "
        r"\([0-9.]+ MB are free\); make room, or let nnUNet_preprocessed point elsewhere",
        message(),
    )
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert not list((folder / "nnUNetPlans_3d_fullres_unlabeled").iterdir())


@pytest.mark.parametrize("when", ["at the end", "all the time"])
def test_a_full_disk_leaves_no_work_folder(raw: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    real, calls = unlabeled.write_manifest, iter(range(100))

    def full(*arguments: Any) -> None:
        if when == "all the time" or next(calls):
            raise WriteError("full")
        real(*arguments)

    monkeypatch.setattr(unlabeled, "write_manifest", full)
    assert message() == "full"
    assert not [path for path in Path(os.environ["nnUNet_preprocessed"], NAME).iterdir() if path.name.endswith(".tmp")]


def test_a_missing_file_of_dataset_json(raw: Path) -> None:
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    content = json.loads((folder / "dataset.json").read_text())
    content["dataset"] = {"gone": {"images": ["nowhere_0000.nii.gz"], "label": "nowhere.nii.gz"}}
    (folder / "dataset.json").write_text(json.dumps(content))
    splits = [{"train": ["a"], "val": ["b"], "unlabeled": ["gone"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    assert f"{raw / 'nowhere_0000.nii.gz'}: No such file or directory; restore it" in message()


def test_sitk_reads_what_nibabel_rewrote(raw: Path) -> None:
    path = raw / "imagesUn/u_01_0001.nii.gz"
    before = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    rewrite(path, lambda a: a)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), before)
