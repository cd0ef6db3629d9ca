"""Real scans in the public layouts, one or two of each collection: name their folder in NNUNETV2_DYCON_TEST_DATA.

The folder holds isles22_sample, brats19_like, btcv_like and pancreas_ct_like, each in the form that the converter
reads, and for LA the 2018LA_Seg_Training Set with mri_norm2.h5.
"""

import json
import os
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.conversion.placement import is_organ
from nnunetv2_dycon.dataset_conversion import converter
from tests.datasets import environment

pytestmark = pytest.mark.data
VARIABLE = "NNUNETV2_DYCON_TEST_DATA"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in environment(tmp_path).items():
        Path(folder).mkdir()
        monkeypatch.setenv(name, folder)
    return tmp_path / "nnUNet_raw"


def sample(name: str) -> Path:
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} names no folder of real scans")
    folder = Path(os.environ[VARIABLE], name)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def convert(collection: str, name: str, labeled: object, **options: object) -> Path:
    return converter(collection).convert_collection(sample(name), labeled=labeled, processes=1, **options).folder


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


def same_place(one: Path, other: Path) -> bool:
    a, b = (sitk.ReadImage(str(path)) for path in (one, other))
    return a.GetSize() == b.GetSize() and all(
        np.allclose(getattr(a, get)(), getattr(b, get)(), rtol=0, atol=1e-4)
        for get in ("GetSpacing", "GetOrigin", "GetDirection")
    )


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def test_isles_is_linked_and_its_mask_is_exact(raw) -> None:
    source = sample("isles22_sample")
    folder = convert("ISLES22", "isles22_sample", 10)
    dwi, image = one(source, "*_dwi.nii.gz"), one(folder, "*_0000.nii.gz")
    assert image.read_bytes() == dwi.read_bytes()
    mask, label = one(source, "*_msk.nii.gz"), one(folder / "labelsTr", "*.nii.gz")
    assert np.array_equal(voxels(mask), voxels(label))
    assert voxels(label).dtype == np.uint8
    assert int(voxels(label).sum()) == 523  # as its publishers' table says
    assert same_place(label, dwi)


def test_brats_has_its_three_classes(raw, tmp_path) -> None:
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps({"labeled": ["BraTS19_SAMPLE_001_1"], "unlabeled": ["BraTS19_SAMPLE_002_1"]}))
    folder = convert("BraTS19", "brats19_like", cases, modalities=(), labels="multi")
    seg = voxels(one(sample("brats19_like"), "*001_1_seg.nii.gz"))
    label = voxels(one(folder / "labelsTr", "*.nii.gz"))
    for old, new in {0: 0, 1: 1, 2: 2, 4: 3}.items():
        assert np.array_equal(seg == old, label == new)
    assert all(found.ok for found in check(502, processes=1))


def test_btcv_has_its_organs(raw, tmp_path) -> None:
    cases = tmp_path / "cases.txt"
    cases.write_text("img0001\r\n")
    folder = convert("BTCV", "btcv_like", cases)
    label = one(folder / "labelsTr", "*.nii.gz")
    assert np.array_equal(voxels(one(sample("btcv_like"), "label0001.nii.gz")), voxels(label))
    assert same_place(label, one(folder, "img0001_0000.nii.gz"))


def test_the_label_of_the_pancreas_is_placed_by_position_and_not_by_index(raw) -> None:
    folder = convert("PancreasNIH", "pancreas_ct_like", 6)
    ct = voxels(one(folder, "PANCREAS_0001_0000.nii.gz"))
    label = voxels(one(folder / "labelsTr", "*.nii.gz"))
    by_index = voxels(one(sample("pancreas_ct_like"), "label0001.nii.gz"))
    assert is_organ(ct, label)
    assert not is_organ(ct, by_index)
    assert np.array_equal(label, by_index[:, ::-1])
    assert round(float(np.median(ct[label > 0]))) == 65


def test_la_is_the_arrays_of_its_h5_files(raw) -> None:
    source = sample("2018LA_Seg_Training Set")
    folder = convert("LA", "2018LA_Seg_Training Set", 8)
    for image in folder.glob("images*/*.nii.gz"):
        case = image.name.removesuffix("_0000.nii.gz")
        with h5py.File(one(source / case, "mri_norm2.h5")) as file:
            assert np.array_equal(file["image"][()], voxels(image))
            if image.parent.name != "imagesUn":
                label = image.parent.with_name(image.parent.name.replace("images", "labels")) / f"{case}.nii.gz"
                assert np.array_equal(file["label"][()], voxels(label))
        assert sitk.ReadImage(str(image)).GetSpacing() == (0.625, 0.625, 0.625)
