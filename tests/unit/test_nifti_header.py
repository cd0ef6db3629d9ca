"""A header proves that a file is whole only where reading it would find no fault."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunetv2_dycon.conversion.nifti_header import holds_whole_integers

INTEGERS = (np.uint8, np.int16, np.int32, np.int8, np.uint16, np.uint32)
OTHERS = (np.float32, np.float64, np.complex64)


@pytest.fixture(params=[".nii", ".nii.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"a{request.param}"


def save(path: Path, dtype: type, shape: tuple[int, ...] = (5, 6, 7), kind: type = nib.Nifti1Image) -> None:
    values = np.random.default_rng(3).integers(0, 99, shape).astype(dtype)
    nib.save(kind(values, np.eye(4)), path)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6), (4, 4, 4, 2), (1, 1, 1)])
def test_whole_integers_are_known_by_the_header(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    save(path, dtype, shape)
    assert holds_whole_integers(path)


@pytest.mark.parametrize("dtype", OTHERS)
def test_other_voxels_have_to_be_read(path: Path, dtype: type) -> None:
    save(path, dtype)
    assert not holds_whole_integers(path)


def test_either_order_of_bytes_and_a_longer_header_are_understood(path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=">i2").reshape(2, 3, 4), np.eye(4), nib.Nifti1Header(endianness=">"))
    image.set_data_dtype(np.int16)
    nib.save(image, path)
    assert nib.load(path).header.endianness == ">"
    assert holds_whole_integers(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment of some length"))
    nib.save(image, path)
    assert holds_whole_integers(path)


@pytest.mark.parametrize("lost", [1, 4, 9, 100, 10**6])
def test_a_file_that_lacks_its_end_has_to_be_read(path: Path, lost: int) -> None:
    save(path, np.int16)
    path.write_bytes(path.read_bytes()[:-lost])
    assert not holds_whole_integers(path)


@pytest.mark.parametrize(("slope", "intercept", "plain"), [(1, 0, True), (2, 0, False), (1, 5, False), (0.1, 0, False)])
def test_scaled_voxels_have_to_be_read(path: Path, slope: float, intercept: float, plain: bool) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, path)
    assert holds_whole_integers(path) is plain


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b", b"\x1f\x8b" + bytes(400), b"text" * 200, bytes(352), bytes(348) + b"n+1"]
)
def test_anything_else_has_to_be_read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert not holds_whole_integers(path)
    path.write_bytes(gzip.compress(content))
    assert not holds_whole_integers(path)


def test_the_second_format_of_nifti_has_to_be_read(path: Path) -> None:
    save(path, np.int16, kind=nib.Nifti2Image)
    assert not holds_whole_integers(path)
