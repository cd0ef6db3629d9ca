"""What headers say and nnU-Net's reader passes over is said, and nothing where it sees all."""

from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.conversion.headers import passed_over
from tests.collections import oblique
from tests.datasets import environment, make_dataset

HERE = oblique((0.5, 1.0, 2.5), (12.0, -7.0, 30.0), 20)
TURNED = oblique((0.5, 1.0, 2.5), (12.0, -7.0, 30.0), -35)


def write(path: Path, qform: int, sform: int, unit: str = "mm", other: np.ndarray = TURNED) -> Path:
    image = nib.Nifti1Image(np.zeros((7, 8, 9), np.uint8), None)
    image.set_qform(HERE, qform)
    image.set_sform(other, sform)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def is_at(path: Path, reader: type, affine: np.ndarray) -> bool:
    """Whether nnU-Net's reader sees a file at a place in the file's unit."""
    _, properties = reader().read_seg(str(path))
    if reader is NibabelIO:
        return np.allclose(properties["nibabel_stuff"]["original_affine"], affine, atol=1e-4)
    place = np.diag([-1, -1, 1]) @ np.reshape(properties["sitk_stuff"]["direction"], (3, 3))
    return np.allclose(place * properties["sitk_stuff"]["spacing"], affine[:3, :3], atol=1e-4)


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
@pytest.mark.parametrize(("qform", "sform"), list(product((1, 2, 4), repeat=2)))
def test_of_two_places_the_one_is_named_that_nnunets_reader_goes_by(tmp_path, qform, sform, reader) -> None:
    path = write(tmp_path / "a.nii.gz", qform, sform)
    own = "sform" if is_at(path, reader, TURNED) else "qform"
    assert is_at(path, reader, {"sform": TURNED, "qform": HERE}[own])
    text = passed_over(path, reader)
    assert f"nnU-Net goes by the {own} ({reader.__name__})" in text
    assert str(path) in text


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_headers_that_every_program_reads_alike_are_no_matter(tmp_path, reader) -> None:
    rounded = HERE + 1e-3
    rounded[3] = HERE[3]
    for number, (qform, sform, other) in enumerate([(1, 0, TURNED), (0, 1, TURNED), (1, 1, HERE), (1, 2, rounded)]):
        assert passed_over(write(tmp_path / f"{number}.nii.gz", qform, sform, other=other), reader) is None
    (tmp_path / "a.nrrd").touch()
    assert passed_over(tmp_path / "a.nrrd", reader) is None
    nib.save(nib.Nifti1Image(np.zeros((7, 8), np.uint8), None), tmp_path / "flat.nii.gz")
    assert passed_over(tmp_path / "flat.nii.gz", reader) is None


def test_a_file_without_a_place_and_a_unit_that_is_taken_for_mm_are_named(tmp_path) -> None:
    path = write(tmp_path / "a.nii.gz", 0, 0)
    assert f"{path} does not say where it lies" in passed_over(path, SimpleITKIO)
    path = write(tmp_path / "a.nii", 1, 1, "micron", HERE)
    assert f"{path} is in micron, which nnU-Net takes for mm (NibabelIO)" in passed_over(path, NibabelIO)
    assert passed_over(path, SimpleITKIO) is None


def test_the_distance_is_in_mm_whatever_the_unit(tmp_path) -> None:
    moved = HERE.copy()
    moved[2, 3] += 4000
    text = passed_over(write(tmp_path / "a.nii.gz", 1, 2, "micron", moved), SimpleITKIO)
    assert "puts it 4 mm from where its qform does" in text


def test_check_says_it_and_passes(tmp_path, monkeypatch) -> None:
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    make_dataset(tmp_path, dataset_id=4, labeled=3, unlabeled=1, test=1, shape=(8, 9, 10))
    raw = tmp_path / "nnUNet_raw/Dataset004_Tiny"
    assert [one.text for one in check(4, processes=1) if one.name == "headers"] == [
        "nnU-Net's reader passes over nothing in them"
    ]
    for path in (raw / "imagesTr/l_01_0000.nii.gz", raw / "labelsTr/l_01.nii.gz"):
        image = nib.load(path, mmap=False)
        image.set_sform(TURNED, 2)
        nib.save(image, path)
    findings = check(4, processes=1)
    assert all(one.ok for one in findings)
    (text,) = (one.text for one in findings if one.name == "headers")
    assert str(raw / "imagesTr/l_01_0000.nii.gz") in text
    assert str(raw / "labelsTr/l_01.nii.gz") in text


def test_check_finds_a_changed_bit(tmp_path, monkeypatch) -> None:
    """SimpleITK reads such a file as zeros, or nearly so."""
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    make_dataset(tmp_path, dataset_id=4, labeled=3, unlabeled=1, test=1, shape=(8, 9, 10))
    for name in ("imagesUn/u_00_0000.nii.gz", "labelsTr/l_01.nii.gz"):
        path = tmp_path / "nnUNet_raw/Dataset004_Tiny" / name
        content = bytearray(path.read_bytes())
        content[len(content) - 40] ^= 4
        path.write_bytes(content)
    texts = " ".join(one.text for one in check(4, processes=1) if not one.ok)
    assert "u_00_0000.nii.gz cannot be read" in texts
    assert "l_01.nii.gz cannot be read" in texts
