"""A file is seen as nnU-Net's reader sees it; what that reader would read wrongly without a word is refused."""

import gzip
from collections.abc import Callable
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunetv2_dycon.data.readers import find_reader, open_nifti, read_view
from nnunetv2_dycon.errors import DataError
from tests.collections import oblique
from tests.label_maps import as_picture, as_tif, label_map

HERE = oblique((0.5, 1.0, 2.5), (12.0, -7.0, 30.0), 20)
THERE = oblique((0.5, 1.0, 2.5), (-3.0, 4.0, 55.0), -35)
READERS = (SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient)


def header(path: Path, qform: int, sform: int, unit: str = "mm", slope: float = 1, inter: float = 0) -> Path:
    """Write a label map whose sform and qform, if their codes are not 0, name two places."""
    image = nib.Nifti1Image(label_map(3).astype(np.int16) * round(1 / slope), None)
    image.set_qform(HERE, qform)
    image.set_sform(THERE, sform)
    image.header.set_xyzt_units(unit)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


HEADERS: dict[str, dict] = {
    **{f"qform {q}, sform {s}": {"qform": q, "sform": s} for q, s in product(range(5), repeat=2)},
    "scaled": {"qform": 1, "sform": 1, "slope": 0.1},
    "scaled and moved": {"qform": 1, "sform": 1, "slope": 0.5, "inter": -3},
    "micron": {"qform": 1, "sform": 1, "unit": "micron"},
    "meter": {"qform": 2, "sform": 0, "unit": "meter"},
}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("reader", READERS)
def test_values_and_spacing_are_those_of_nnunets_reader(tmp_path: Path, reader, ending: str) -> None:
    for name, options in HEADERS.items():
        path = header(tmp_path / f"a{ending}", **options)
        expected, properties = reader().read_seg(str(path))
        view = read_view(path, reader)
        assert np.array_equal(view.values, expected[0]), name
        unit = {"micron": 1e-3, "meter": 1e3}.get(options.get("unit", ""), 1)
        passed_over = unit if "Nibabel" in reader.__name__ else 1
        assert view.spacing == pytest.approx([passed_over * step for step in properties["spacing"]]), name


@pytest.mark.parametrize("reader", READERS)
def test_what_a_reader_writes_for_an_image_is_in_its_place(tmp_path: Path, reader) -> None:
    for name, options in HEADERS.items():
        path = header(tmp_path / "a.nii.gz", **options)
        values, properties = reader().read_seg(str(path))
        reader().write_seg(values[0].astype(np.uint8), str(tmp_path / "b.nii.gz"), properties)
        one, other = read_view(path, reader), read_view(tmp_path / "b.nii.gz", reader)
        assert np.array_equal(other.values, values[0].astype(np.uint8)), name
        assert one.place.keys() == other.place.keys() == {"spacing", "origin", "direction"}
        for key, value in one.place.items():
            assert other.place[key] == pytest.approx(value, abs=1e-3), (name, key)


def test_the_place_is_the_one_of_the_two_that_the_reader_goes_by(tmp_path: Path) -> None:
    path = header(tmp_path / "a.nii.gz", 1, 2)
    assert read_view(path, SimpleITKIO).place["origin"] == pytest.approx([-12, 7, 30], abs=1e-4)  # x and y to the left
    assert read_view(path, NibabelIO).place["origin"] == pytest.approx([-3, 4, 55], abs=1e-4)


@pytest.mark.parametrize("shape", [(7, 8, 9, 1), (7, 8, 9, 1, 1), (7, 8, 1), (1, 8, 9)])
@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_axes_of_one_voxel_are_kept_up_to_the_third(tmp_path: Path, shape: tuple, reader) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), HERE), tmp_path / "a.nii.gz")
    assert read_view(tmp_path / "a.nii.gz", reader).values.shape == shape[2::-1]


# ---- which reader ----------------------------------------------------------------------------------------------


def sheared(path: Path) -> Path:
    affine = HERE.copy()
    affine[0, 1] += 0.3
    image = nib.Nifti1Image(label_map(3), affine)
    image.set_qform(None, 0)
    nib.save(image, path)
    return path


def test_the_reader_is_that_of_the_plans_then_of_dataset_json_then_of_nnunets_rule(tmp_path: Path) -> None:
    content = {"file_ending": ".nii.gz"}
    named = content | {"overwrite_image_reader_writer": "SimpleITKIOWithReorient"}
    assert find_reader(content) is SimpleITKIO
    assert find_reader({"file_ending": ".nii"}) is NibabelIO
    assert find_reader(named) is SimpleITKIOWithReorient
    assert find_reader(named, plans={"image_reader_writer": "NibabelIO"}) is NibabelIO
    assert find_reader(named, plans={}) is SimpleITKIOWithReorient
    assert find_reader(content | {"overwrite_image_reader_writer": "None"}) is SimpleITKIO


def test_the_first_file_decides_between_readers_of_one_ending(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    content = {"file_ending": ".nii.gz"}
    assert find_reader(content, [header(tmp_path / "a.nii.gz", 1, 1)]) is SimpleITKIO
    oblique = sheared(tmp_path / "b.nii.gz")
    assert find_reader(content, [oblique]) is NibabelIO
    broken = tmp_path / "c.nii.gz"
    broken.write_bytes(b"broken")
    assert find_reader(content, [broken]) is SimpleITKIO
    assert find_reader(content, [broken, oblique]) is NibabelIO
    assert find_reader(content, iter([broken] * 5 + [oblique])) is SimpleITKIO  # five broken files are enough
    as_tif(tmp_path / "d.tif", label_map(0))
    as_picture(tmp_path / "e.tif", label_map(0)[0])
    assert [find_reader({"file_ending": ".tif"}, [tmp_path / f"{n}.tif"]) for n in "de"] == [Tiff3DIO, NaturalImage2DIO]
    assert capfd.readouterr() == ("", "")
    with pytest.raises(DataError, match=r'no reader for \.xyz; correct "file_ending"'):
        find_reader({"file_ending": ".xyz"})


def test_axes_that_are_not_at_right_angles_are_said_and_no_lines_of_simpleitk(tmp_path: Path, capfd) -> None:
    with pytest.raises(DataError, match=r"a\.nii\.gz has axes that are not at right angles.*resample it"):
        read_view(sheared(tmp_path / "a.nii.gz"), SimpleITKIO)
    read_view(tmp_path / "a.nii.gz", NibabelIO)
    image = nib.load(tmp_path / "a.nii.gz")
    image.set_qform(HERE, 1)
    nib.save(image, tmp_path / "b.nii.gz")
    assert read_view(tmp_path / "b.nii.gz", SimpleITKIO).place["origin"] == pytest.approx([-12, 7, 30], abs=1e-4)
    assert capfd.readouterr() == ("", "")
    assert sitk.ProcessObject.GetGlobalWarningDisplay()


# ---- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
def test_a_changed_bit_of_compressed_voxels_is_found(tmp_path: Path, reader) -> None:
    """SimpleITK reads many such files as zeros alone, and nibabel as other values."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(rng.integers(0, 3, (40, 40, 40)).astype(np.uint8), HERE), path)
    content = path.read_bytes()
    for place in rng.integers(300, len(content) - 4, 20):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"a\.nii\.gz"):
            read_view(path, reader)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_that_ends_early_is_found(tmp_path: Path, reader, ending: str) -> None:
    path = header(tmp_path / f"a{ending}", 1, 1)
    content = path.read_bytes()
    for length in (0, 1, 200, len(content) // 2, len(content) - 9, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=rf"a{ending}"):
            read_view(path, reader)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused_where_simpleitk_sees_0(tmp_path: Path, value: float) -> None:
    values = np.ones((3, 4, 5), np.float32)
    values[1, 1, 1] = value
    nib.save(nib.Nifti1Image(values, HERE), tmp_path / "a.nii.gz")
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz"))).min() == 0
    with pytest.raises(DataError, match=r"a\.nii\.gz has NaN or Inf"):
        read_view(tmp_path / "a.nii.gz", SimpleITKIO)
    assert not np.isfinite(read_view(tmp_path / "a.nii.gz", NibabelIO).values).all()


def unpackings(monkeypatch: pytest.MonkeyPatch) -> list:
    opened: list = []
    whole: Callable = gzip.open
    monkeypatch.setattr("nnunetv2_dycon.data.readers.gzip.open", lambda *a: opened.append(a) or whole(*a))
    return opened


def test_a_complete_file_is_unpacked_only_where_that_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    opened = unpackings(monkeypatch)
    path = header(tmp_path / "a.nii.gz", 1, 1)
    open_nifti(path)
    assert opened == []
    open_nifti(path, unpack=True)
    assert len(opened) == 1
