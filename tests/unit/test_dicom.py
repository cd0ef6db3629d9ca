"""A CT series is read by position, and one with gaps, doubles or doubts is refused."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.conversion.dicom import CtSeries
from nnunetv2_dycon.errors import DataError
from tests.collections import ct, ct_affine, write_series


@pytest.fixture
def scan() -> np.ndarray:
    return ct("scan")[0]


def read(*folders: Path):
    return CtSeries("PANCREAS_0001", folders).read()


def refused(*folders: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(*folders)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".dcm", "", ".DCM", ".0001"])
def test_voxels_and_millimetres_are_those_that_were_written_whatever_the_order_of_names(tmp_path, scan, ending) -> None:
    write_series(tmp_path, scan, ending=ending)
    volume = read(tmp_path)
    assert np.array_equal(volume.array, scan)
    assert np.allclose(volume.affine, ct_affine(), rtol=0, atol=1e-6)
    assert volume.array.dtype.kind == "i"


def test_spacing_follows_the_positions_and_a_stack_that_runs_down_has_the_same_voxels_in_millimetres(tmp_path, scan):
    positions = [100 - 2.5 * k for k in range(scan.shape[2])]
    write_series(tmp_path, scan, positions=positions)
    volume = read(tmp_path)
    assert np.allclose(volume.spacing, (0.75, 0.875, 2.5))
    assert np.array_equal(volume.array, scan[:, :, ::-1])
    assert np.isclose(volume.affine[2, 3], positions[-1])


def test_agrees_with_a_reading_slice_by_slice(tmp_path, scan) -> None:
    files = write_series(tmp_path, scan)
    volume = read(tmp_path)
    for path in files:
        one = sitk.ReadImage(str(path))
        corner = np.array(one.GetOrigin()) * (-1, -1, 1)
        index = np.rint(np.linalg.solve(volume.affine, [*corner, 1])[:3]).astype(int)
        assert tuple(index[:2]) == (0, 0)
        assert np.array_equal(sitk.GetArrayFromImage(one)[0].T, volume.array[:, :, index[2]])


def test_a_small_series_beside_is_not_taken_wherever_it_lies(tmp_path, scan) -> None:
    write_series(tmp_path / "a", scan, uid="1.2.1")
    write_series(tmp_path / "a", scan[:, :, :3], uid="1.2.2", first=50)
    write_series(tmp_path / "b", scan[:, :, :2], uid="1.2.3")
    for folders in ((tmp_path / "a", tmp_path / "b"), (tmp_path / "b", tmp_path / "a")):
        assert np.array_equal(read(*folders).array, scan)


def test_files_that_are_no_dicom_do_no_harm(tmp_path, scan) -> None:
    write_series(tmp_path, scan)
    (tmp_path / "LICENSE").write_text("text")
    (tmp_path / "notes.xml").write_text("<x/>")
    (tmp_path / "._1-001.dcm").write_bytes(b"\x00")
    assert np.array_equal(read(tmp_path).array, scan)


def test_two_series_of_similar_size_are_refused_in_one_folder_and_in_two(tmp_path, scan) -> None:
    write_series(tmp_path / "a", scan, uid="1.2.1")
    write_series(tmp_path / "a", scan[:, :, :7], uid="1.2.2", first=50)
    text = refused(tmp_path / "a")
    assert f"{tmp_path / 'a'} has two series of 10 and 7 slices" in text
    assert "PANCREAS_0001" in text
    write_series(tmp_path / "b", scan, uid="1.2.3")
    write_series(tmp_path / "c", scan, uid="1.2.4")
    assert str(tmp_path / "c") in refused(tmp_path / "b", tmp_path / "c")


@pytest.mark.parametrize("missing", [1, 5, 8])
def test_a_missing_slice_is_said_with_its_neighbours(tmp_path, scan, missing) -> None:
    files = write_series(tmp_path, scan)
    files[missing].unlink()
    text = refused(tmp_path)
    assert f"{tmp_path} lacks slices: 3.00 mm" in text
    assert files[missing - 1].name in text
    assert files[missing + 1].name in text


def test_a_tilted_stack_is_refused_and_rounding_is_not(tmp_path, scan) -> None:
    write_series(tmp_path / "tilted", scan, tilt=0.4)
    assert "tilted gantry" in refused(tmp_path / "tilted")
    write_series(tmp_path / "rounded", scan, tilt=0.001)
    assert np.array_equal(read(tmp_path / "rounded").array, scan)


def test_uneven_steps_that_no_grid_describes_are_refused(tmp_path, scan) -> None:
    depth = scan.shape[2]
    steps = [1.0] * (depth // 2) + [1.4] * (depth - depth // 2 - 1)
    write_series(tmp_path, scan, positions=list(np.cumsum([0.0, *steps])))
    assert "uneven steps" in refused(tmp_path)


def test_a_doubled_slice_is_said_with_both_files(tmp_path, scan) -> None:
    files = write_series(tmp_path, scan)
    (tmp_path / "copy.dcm").write_bytes(files[3].read_bytes())
    text = refused(tmp_path)
    assert "same position" in text
    assert str(files[3]) in text
    assert "copy.dcm" in text


@pytest.mark.parametrize("modality", ["MR", "PT"])
def test_another_modality_is_refused(tmp_path, scan, modality) -> None:
    write_series(tmp_path, scan, modality=modality)
    assert f"is a {modality} image" in refused(tmp_path)


def test_one_slice_no_file_and_rubbish_are_refused(tmp_path, scan) -> None:
    write_series(tmp_path / "one", scan[:, :, :1])
    assert "one slice" in refused(tmp_path / "one")
    (tmp_path / "none").mkdir()
    assert "no readable DICOM" in refused(tmp_path / "none")
    (tmp_path / "none" / "1.dcm").write_bytes(b"rubbish" * 99)
    assert str(tmp_path / "none" / "1.dcm") in refused(tmp_path / "none")


@pytest.mark.parametrize("share", [0, 0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("index", [0, 4, -1])
@pytest.mark.parametrize("ending", [".dcm", ""])
def test_a_truncated_slice_is_named_and_at_the_end_of_the_stack_too(tmp_path, scan, share, index, ending) -> None:
    files = write_series(tmp_path, scan, ending=ending)
    content = files[index].read_bytes()
    if ending or not 0 < share < 0.1:  # a start that short does not even say that it is DICOM
        files[index].write_bytes(content[: int(share * len(content))])
        assert str(files[index]) in refused(tmp_path)


def without(path: Path, tag: bytes) -> None:
    """Cut an element (explicit little endian, short form) out of a DICOM file."""
    content = path.read_bytes()
    start = content.index(tag)
    length = int.from_bytes(content[start + 6 : start + 8], "little")
    path.write_bytes(content[:start] + content[start + 8 + length :])


@pytest.mark.parametrize("tag", [b"\x20\x00\x32\x00", b"\x20\x00\x37\x00"], ids=["position", "orientation"])
@pytest.mark.parametrize("which", [[0], [2], [-1], range(10)], ids=str)
def test_slices_without_their_place_are_refused(tmp_path, scan, tag, which) -> None:
    files = write_series(tmp_path, scan)
    for index in which:
        without(files[index], tag)
    assert any(str(files[index]) in refused(tmp_path) for index in which)
