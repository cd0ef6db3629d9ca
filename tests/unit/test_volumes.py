"""Every format gives the voxels and millimetres that an independent reader sees; damage is named, never guessed."""

import contextlib
import errno
import gzip
import os
import pickle
import re
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_dycon.conversion import volumes
from nnunetv2_dycon.conversion.cases import Resampled
from nnunetv2_dycon.conversion.volumes import H5Array, NiftiFile, NrrdFile, Volume, put_file, put_nifti, save
from nnunetv2_dycon.errors import DataError
from tests.collections import oblique, write_h5, write_nifti, write_nrrd

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE = oblique((0.7, 0.9, 2.5), (-31.5, 47.25, 100.125), 20)


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(-900, 900, (6, 7, 5)).astype(np.int16)


def by_sitk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


def refused(source, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        source.read()
    for word in (str(source.path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- NIfTI -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_nifti_gives_voxels_in_their_type_and_the_geometry_that_sitk_sees(tmp_path, array, dtype, ending) -> None:
    path = tmp_path / f"a.nii{'.gz' if ending.lower() == '.nii.gz' else ''}"
    write_nifti(path, array.astype(dtype), AFFINE)
    volume = NiftiFile(path.rename(tmp_path / f"A b{ending}")).read()
    assert (volume.array.dtype, NiftiFile(path).files) == (dtype, (path,))
    assert np.array_equal(volume.array, array.astype(dtype))
    expected, affine = by_sitk(tmp_path / f"A b{ending}")
    assert np.array_equal(volume.array, expected)
    assert np.allclose(volume.affine, affine, rtol=0, atol=1e-4)
    assert np.allclose(volume.spacing, (0.7, 0.9, 2.5), atol=1e-5)


def test_scaled_nifti_is_read_scaled(tmp_path, array) -> None:
    image = nib.Nifti1Image(array, AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii")
    volume = NiftiFile(tmp_path / "a.nii").read()
    assert np.allclose(volume.array, by_sitk(tmp_path / "a.nii")[0])


@pytest.mark.parametrize(("ending", "reader"), [(".nii.gz", SimpleITKIO), (".nii", NibabelIO)])
def test_nifti_is_seen_as_by_nnunets_reader_of_the_data_set(tmp_path, array, ending, reader) -> None:
    image = nib.Nifti1Image(array, None)
    image.set_qform(AFFINE, 1)
    image.set_sform(oblique((1.5, 1, 2), (3, 4, 5), 70), 2)
    image.header.set_slope_inter(0.1, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    source = NiftiFile(tmp_path / "a.nii.gz").seen_in(ending)
    volume = source.read()
    assert (source.reader, source.files) == (reader, (tmp_path / "a.nii.gz",))
    assert np.array_equal(volume.array, reader().read_seg(str(tmp_path / "a.nii.gz"))[0][0].T)
    assert np.allclose(volume.affine, AFFINE if reader is SimpleITKIO else image.affine, atol=1e-4)
    grid = source.grid()
    assert np.array_equal(grid.affine, volume.affine)
    assert (grid.array.shape, grid.array.any(), grid.header) == (array.shape, False, volume.header)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_nifti_file_of_any_shorter_length_is_refused(tmp_path, array, ending) -> None:
    path = tmp_path / f"a{ending}"
    write_nifti(path, array, AFFINE)
    content = path.read_bytes()
    for length in {0, 1, 2, 9, 17, 18, 100, 347, 348, 352, *range(353, len(content), 7), len(content) - 1}:
        if length < len(content):
            path.write_bytes(content[:length])
            refused(NiftiFile(path))
    path.write_bytes(content)
    NiftiFile(path).read()
    if ending == ".nii.gz":
        for lost in (4, 8, 9):  # the size at the end is gone, though all voxels may be there
            path.write_bytes(content[:-lost] + bytes(lost))
            refused(NiftiFile(path))


def test_a_truncated_file_is_refused_before_it_is_linked(tmp_path) -> None:
    array = np.random.default_rng(0).integers(-900, 900, (40, 40, 30)).astype(np.int16)  # more than a reader's buffer
    for ending in (".nii", ".nii.gz"):
        path = tmp_path / f"a{ending}"
        write_nifti(path, array, AFFINE)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=re.escape(str(path))):
            put_nifti(NiftiFile(path), tmp_path / f"out{ending}")
        assert not list(tmp_path.glob("*out*"))


def test_gzip_under_a_plain_name_and_the_reverse_are_refused(tmp_path, array) -> None:
    write_nifti(tmp_path / "a.nii", array, AFFINE)
    write_nifti(tmp_path / "b.nii.gz", array, AFFINE)
    refused(NiftiFile((tmp_path / "a.nii").rename(tmp_path / "c.nii.gz")), "not gzip")
    refused(NiftiFile((tmp_path / "b.nii.gz").rename(tmp_path / "d.nii")), "is gzip data")


@pytest.mark.parametrize("content", [b"<html>no</html>" * 99, b"\x89HDF\r\n\x1a\n" * 99, bytes(2000), b"n+1" * 999])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_other_content_under_the_name_of_nifti_is_refused(tmp_path, content, ending) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    refused(NiftiFile(path))


def test_gzip_of_several_members_and_with_zeros_behind_is_whole(tmp_path, array) -> None:
    write_nifti(tmp_path / "a.nii", array, AFFINE)
    content = (tmp_path / "a.nii").read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    assert np.array_equal(NiftiFile(path).read().array, array)
    path.write_bytes(path.read_bytes()[:-9])
    refused(NiftiFile(path))
    path.write_bytes(gzip.compress(content[:500]))  # the second member is missing
    refused(NiftiFile(path))
    path.write_bytes(gzip.compress(content) + bytes(512))
    assert np.array_equal(NiftiFile(path).read().array, array)


def test_bytes_behind_the_voxels_do_no_harm(tmp_path, array) -> None:
    write_nifti(tmp_path / "a.nii", array, AFFINE)
    content = (tmp_path / "a.nii").read_bytes() + b"more"
    (tmp_path / "a.nii").write_bytes(content)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content))
    for name in ("a.nii", "b.nii.gz"):
        assert np.array_equal(NiftiFile(tmp_path / name).read().array, array)


def test_images_that_are_not_3d_of_one_number_a_voxel_are_refused(tmp_path, array) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(array[..., None], AFFINE), path)
    refused(NiftiFile(path), "4-D (6, 7, 5, 1)", "3-D file for each channel")
    nib.save(nib.Nifti1Image(array[0], AFFINE), path)
    refused(NiftiFile(path), "2-D")
    nib.save(nib.Nifti1Image(array.astype(np.complex64), AFFINE), path)
    refused(NiftiFile(path), "complex64")
    rgb = np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, AFFINE), path)
    refused(NiftiFile(path), "one number per voxel")
    nib.save(nib.Nifti1Pair(array, AFFINE), tmp_path / "p.img")
    refused(NiftiFile(tmp_path / "p.hdr"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_a_geometry_that_cannot_be_used_is_refused(tmp_path, array, value) -> None:
    path = tmp_path / "a.nii"
    write_nifti(path, array, AFFINE)
    content = bytearray(path.read_bytes())
    content[280:284] = np.float32(value).tobytes()  # srow_x
    if value == 0:
        content[280:296] = bytes(16)
    path.write_bytes(content)
    refused(NiftiFile(path), "no usable geometry")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:nibabel")
def test_a_header_with_any_byte_changed_is_read_or_refused(tmp_path, array) -> None:
    path = tmp_path / "a.nii"
    write_nifti(path, array, AFFINE)
    content = path.read_bytes()
    values = np.random.default_rng(0).integers(0, 256, 348)
    for place in range(348):
        changed = bytearray(content)
        changed[place] = (0, 255, values[place])[place % 3]
        path.write_bytes(changed)
        with contextlib.suppress(DataError):
            NiftiFile(path).open()


# ---- put and save ------------------------------------------------------------------------------------------


def test_nifti_is_linked_copied_or_compressed_and_the_same_voxels(tmp_path, array, monkeypatch) -> None:
    plain, packed = tmp_path / "a.nii", tmp_path / "b.nii.gz"
    for path in (plain, packed):
        write_nifti(path, array, AFFINE)
        out = tmp_path / f"out_{path.name}"
        assert put_nifti(NiftiFile(path), out) == "linked"
        assert out.samefile(path)
    outs = [tmp_path / f"{n}.nii.gz" for n in range(2)]
    assert [put_nifti(NiftiFile(plain), out) for out in outs] == ["compressed"] * 2
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert outs[0].read_bytes()[3:8] == bytes(5)  # no name, no time
    assert gzip.decompress(outs[0].read_bytes()) == plain.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert put_nifti(NiftiFile(packed), tmp_path / "c.nii.gz") == "copied"
    assert put_file(packed, tmp_path / "d.nii.gz") == "copied"
    assert (tmp_path / "c.nii.gz").read_bytes() == (tmp_path / "d.nii.gz").read_bytes() == packed.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_links_to_a_link_lead_to_the_file_itself(tmp_path, array) -> None:
    write_nifti(tmp_path / "a.nii.gz", array, AFFINE)
    (tmp_path / "link.nii.gz").symlink_to("a.nii.gz")
    put_nifti(NiftiFile(tmp_path / "link.nii.gz"), tmp_path / "out.nii.gz")
    put_file(tmp_path / "link.nii.gz", tmp_path / "out2.nii.gz")
    for name in ("out.nii.gz", "out2.nii.gz"):
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).samefile(tmp_path / "a.nii.gz")


def test_what_is_put_twice_leaves_nothing_beside(tmp_path, array) -> None:
    """Renaming one name of a file to another name of it does nothing, and both stay."""
    source, out = tmp_path / "a.nii.gz", tmp_path / "out" / "b.nii.gz"
    out.parent.mkdir()
    write_nifti(source, array, AFFINE)
    for put in (lambda: put_nifti(NiftiFile(source), out), lambda: put_file(source, out)):
        for _ in range(2):
            put()
            assert list(out.parent.iterdir()) == [out]
    out.unlink()
    out.write_bytes(b"half")
    put_nifti(NiftiFile(source), out)
    assert list(out.parent.iterdir()) == [out]
    assert out.samefile(source)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_saved_volumes_are_read_back_exactly_and_the_same_bytes_each_time(tmp_path, array, ending) -> None:
    one, two = tmp_path / f"one{ending}", tmp_path / f"two{ending}"
    for path in (one, two):
        save(Volume(array, AFFINE), path)
    assert one.read_bytes() == two.read_bytes()
    if ending == ".nii.gz":
        assert one.read_bytes()[4:8] == bytes(4)  # no time
    found, affine = by_sitk(one)
    assert found.dtype == np.int16
    assert np.array_equal(found, array)
    assert np.allclose(affine, AFFINE, rtol=0, atol=1e-4)
    header = nib.load(one).header
    assert (int(header["qform_code"]), int(header["sform_code"]), header.get_xyzt_units()[0]) == (1, 1, "mm")
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_a_label_keeps_the_geometry_of_the_header_bit_by_bit_and_nothing_of_its_scale(tmp_path, array) -> None:
    image = nib.Nifti1Image(array, AFFINE)
    image.set_qform(AFFINE, 2)
    image.set_sform(AFFINE, 4)
    image.header.set_slope_inter(2.5, 10)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii.gz")
    read = NiftiFile(tmp_path / "a.nii.gz").read()
    label = (array > 0).astype(np.uint8)
    save(Volume(label, read.affine, read.header), tmp_path / "l.nii.gz")
    written = nib.load(tmp_path / "l.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), label)
    assert written.get_data_dtype() == np.uint8
    for key in ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
        assert np.array_equal(written.header[key], read.header[key])
    one, other = by_sitk(tmp_path / "a.nii.gz")[1], by_sitk(tmp_path / "l.nii.gz")[1]
    assert np.array_equal(one, other)  # in whatever unit the image is


def test_what_the_disk_says_is_one_line_with_the_place(tmp_path, array, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(DataError, match=r"cannot write .*a\.nii: No space left on device .*; make room, or let"):
        save(Volume(array, AFFINE), tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"cannot write .*none/a\.nii"):
        put_file(tmp_path / "x.nii", tmp_path / "none" / "a.nii")


# ---- NRRD --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.int64])
def test_nrrd_has_its_own_anisotropic_geometry(tmp_path, array, dtype) -> None:
    write_nrrd(tmp_path / "a b.nrrd", array.clip(0, 255).astype(dtype), AFFINE)
    source = NrrdFile(tmp_path / "a b.nrrd")
    volume = source.read()
    assert np.array_equal(volume.array, array.clip(0, 255).astype(dtype))
    assert np.allclose(volume.affine, AFFINE, rtol=0, atol=1e-5)
    assert pickle.loads(pickle.dumps(source)) == source
    save(volume, tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asanyarray(image.dataobj), volume.array)
    assert np.allclose(image.affine, AFFINE, rtol=0, atol=1e-5)


def test_the_direction_of_nrrd_is_that_of_its_text(tmp_path, array) -> None:
    """Read the header as text, as a person would."""
    write_nrrd(tmp_path / "a.nrrd", array, AFFINE)
    head = (tmp_path / "a.nrrd").read_bytes().split(b"\n\n")[0].decode()
    directions = re.search(r"space directions: \((.*)\) \((.*)\) \((.*)\)", head)
    columns = np.array([[float(x) for x in directions[i].split(",")] for i in (1, 2, 3)]).T
    assert "space: left-posterior-superior" in head
    assert np.allclose(NrrdFile(tmp_path / "a.nrrd").read().affine[:3, :3], LPS[:3, :3] @ columns, atol=1e-5)


def test_a_damaged_nrrd_is_refused(tmp_path, array) -> None:
    path = tmp_path / "a.nrrd"
    write_nrrd(path, array, AFFINE)
    content = path.read_bytes()
    for length in {0, 1, 4, 50, *range(100, len(content), 23), len(content) - 1}:
        path.write_bytes(content[:length])
        refused(NrrdFile(path))
    path.write_bytes(b"<html>")
    refused(NrrdFile(path))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 3, 3, 2), np.uint8), isVector=True), str(path))
    refused(NrrdFile(path), "2 values per voxel")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 3), np.uint8)), str(path))
    refused(NrrdFile(path), "2-D")
    write_nrrd(path, array.astype(np.int64) + 2**40, AFFINE)
    refused(NrrdFile(path), "beyond 32 bits")


# ---- HDF5 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16, np.float32, np.float64])
def test_h5_arrays_are_x_y_z_with_the_spacing_that_is_said(tmp_path, array, dtype) -> None:
    write_h5(tmp_path / "a.h5", (array / 2).astype(dtype), array)
    volume = H5Array(tmp_path / "a.h5", "image", 0.625).read()
    assert np.array_equal(volume.array, (array / 2).astype(dtype))
    assert np.array_equal(volume.affine, np.diag([-0.625, -0.625, 0.625, 1]))
    save(volume, tmp_path / "a.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(image).T, volume.array)
    assert image.GetSpacing() == (0.625, 0.625, 0.625)
    assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert image.GetOrigin() == (0, 0, 0)


def test_h5_files_that_lack_the_array_or_hold_another_kind_are_refused(tmp_path, array) -> None:
    path = tmp_path / "a.h5"
    write_h5(path, array, array)
    refused(H5Array(path, "mask", 1), "no array 'mask'", "image, label")
    for content, words in (
        (array[0], "(7, 5)"),
        (array[None], "(1, 6, 7, 5)"),
        (array.astype(complex), "complex128"),
        (b"text", "is object"),
    ):
        with h5py.File(path, "w") as file:
            file["image"] = content
        refused(H5Array(path, "image", 1), words)
    with h5py.File(path, "w") as file:
        file.create_group("image")
    refused(H5Array(path, "image", 1), "not an array stored in this file")
    with h5py.File(path, "w") as file:
        file["image"] = array.astype(np.int64) + 2**40
    refused(H5Array(path, "image", 1), "beyond 32 bits")


def test_a_damaged_h5_file_is_refused(tmp_path, array) -> None:
    path = tmp_path / "a.h5"
    write_h5(path, array, array)
    content = path.read_bytes()
    for length in {0, 1, 8, 100, *range(200, len(content), 301), len(content) - 1}:
        path.write_bytes(content[:length])
        refused(H5Array(path, "image", 1))


def test_h5_links_are_refused_whether_they_lead_somewhere_or_not(tmp_path, array) -> None:
    path = tmp_path / "a.h5"
    write_h5(tmp_path / "b.h5", array, array)
    for link in (h5py.ExternalLink("b.h5", "/image"), h5py.ExternalLink("none.h5", "/x"), h5py.SoftLink("/none")):
        with h5py.File(path, "w") as file:
            file["image"] = link
        refused(H5Array(path, "image", 1), "'image' is a link to other data")


def test_without_h5py_the_command_to_install_it_is_said(tmp_path, array, monkeypatch) -> None:
    write_h5(tmp_path / "a.h5", array, array)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        H5Array(tmp_path / "a.h5", "image", 1).read()


# ---- onto another grid -------------------------------------------------------------------------------------


def test_resampling_agrees_with_sitk_and_keeps_the_header_of_the_grid(tmp_path, array) -> None:
    write_nifti(tmp_path / "moving.nii.gz", array, AFFINE)
    grid = oblique((1.1, 0.8, 1.7), AFFINE[:3, 3] + 0.7, 10)
    write_nifti(tmp_path / "grid.nii.gz", np.zeros((5, 6, 7), np.uint8), grid)
    source = Resampled(NiftiFile(tmp_path / "moving.nii.gz"), NiftiFile(tmp_path / "grid.nii.gz"))
    volume = source.read()
    assert source.files == (tmp_path / "moving.nii.gz",)
    seen = source.seen_in(".nii")
    assert [one.reader for one in (seen.image, seen.onto)] == [NibabelIO] * 2
    assert (volume.array.shape, volume.array.dtype) == ((5, 6, 7), np.float32)
    assert np.allclose(volume.affine, grid, atol=1e-5)
    moving, onto = (sitk.ReadImage(str(tmp_path / f"{n}.nii.gz"), sitk.sitkFloat64) for n in ("moving", "grid"))
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, onto, sitk.Transform(), sitk.sitkLinear, np.nan)).T
    inside = np.array(
        [
            [(0 < x < n - 1) for x, n in zip(np.linalg.solve(AFFINE, grid @ [*i, 1])[:3], array.shape, strict=True)]
            for i in np.ndindex(5, 6, 7)
        ]
    )
    inside = inside.all(1).reshape(5, 6, 7)
    assert inside.sum() > 10
    assert np.allclose(volume.array[inside], expected[inside], atol=0.05)


def test_reasons_of_readers_are_one_line(tmp_path) -> None:
    with pytest.raises(DataError) as caught, volumes.reading(tmp_path / "x"):
        raise RuntimeError("first\n\n  the reason  \n")
    assert "(the reason)" in str(caught.value)
    with pytest.raises(MemoryError), volumes.reading(tmp_path / "x"):
        raise MemoryError
