"""Images and label maps of a collection, whatever their format, and the NIfTI files made from them.

In memory a volume is an array with axes (X, Y, Z) and an affine to millimetres in NIfTI's RAS+ convention.
"""

import gzip
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_dycon.data.readers import Reader, find_reader, open_nifti, read_itk, read_itk_header, read_view, reading
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import whole_file

_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # SimpleITK counts millimetres to the left and to the back
_AGAIN = "fetch it again"


class Volume(NamedTuple):
    """Voxels and their place.

    Attributes
    ----------
    array : ndarray, shape (X, Y, Z)
        Values.
    affine : ndarray, shape (4, 4), float64
        From voxel indices to millimetres, RAS+.
    header : nibabel header or None
        Header of the NIfTI file that it was read from.
    """

    array: np.ndarray
    affine: np.ndarray
    header: Any = None

    @property
    def spacing(self) -> np.ndarray:
        """Edges of a voxel in mm, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


class Source(ABC):
    """One image or label map of a collection, not yet read; picklable."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """Files or folders that it is read from."""

    @abstractmethod
    def read(self) -> Volume:
        """Return its voxels and geometry.

        Raises
        ------
        DataError
            With the file's name, if it cannot be read.
        """

    def seen_in(self, ending: str) -> "Source":
        """Return the source as nnU-Net's reader of a data set with this file ending sees it."""
        return self


# ---- NIfTI -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NiftiFile(Source):
    """A 3-D NIfTI file.

    Attributes
    ----------
    path : Path
        The file.
    reader : type
        The reader of nnU-Net that sees it; two may disagree where its sform and qform do.
    """

    path: Path
    reader: Reader = SimpleITKIO

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)

    def seen_in(self, ending: str) -> "NiftiFile":
        """Return the file as nnU-Net's reader of a data set with this file ending sees it."""
        return replace(self, reader=find_reader({"file_ending": ending}))

    def read(self) -> Volume:
        """Read voxels and geometry as nnU-Net's reader sees them, scaled where the header says so."""
        image = self.open()
        with reading(self.path):
            if self.reader is SimpleITKIO:
                volume = from_sitk(read_itk(self.path, _AGAIN), str(self.path))
            else:
                volume = Volume(read_view(self.path, self.reader).values.T, image.affine)
        return volume._replace(header=image.header)

    def grid(self) -> Volume:
        """Return the volume without its voxels, all 0: shape and geometry from the header."""
        image = self.open()
        affine = image.affine if self.reader is not SimpleITKIO else affine_of(read_itk_header(self.path))
        return Volume(np.broadcast_to(np.uint8(0), image.shape), affine, image.header)

    def open(self) -> nib.Nifti1Image:
        """Check that the file is complete and 3-D; reads the header, and the voxels only if the header is not enough.

        Raises
        ------
        DataError
            If it is empty, truncated, of another format, not 3-D, or has no usable geometry.
        """
        with reading(self.path):
            image = open_nifti(self.path, _AGAIN)
            _check_header(self.path, image)
        return image


def _check_header(path: Path, image: nib.Nifti1Image) -> None:
    if len(image.shape) != 3:
        raise DataError(f"{path} is {len(image.shape)}-D {image.shape}; give one 3-D file for each channel")
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path} holds {image.get_data_dtype()} voxels; give one number per voxel")
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{path} has no usable geometry (affine {affine[:3].tolist()}); fetch it again")


def put_nifti(source: NiftiFile, path: Path) -> str:
    """Write the same image to `path` without decoding it; returns 'linked', 'copied' or 'compressed'.

    A hard link takes no space and stays when the collection is deleted; across file systems it is a copy.
    """
    source.open()
    packed, wanted = (file.name.lower().endswith(".gz") for file in (source.path, path))
    with _whole(path) as part:
        if packed == wanted:
            return _link(source.path.resolve(), part)
        _compress(source.path, part)
        return "compressed"


def put_file(source: Path, path: Path) -> str:
    """Link or copy a file to `path`; returns 'linked' or 'copied'."""
    with _whole(path) as part:
        return _link(source.resolve(), part)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    with whole_file(path, "or let nnUNet_raw point elsewhere") as part:
        yield part


def _link(source: Path, path: Path) -> str:
    try:
        os.link(source, path)
        return "linked"
    except OSError:  # another file system, one without links, or a file of another user
        shutil.copyfile(source, path)
        return "copied"


def _compress(source: Path, path: Path) -> None:
    with (
        source.open("rb") as plain,
        path.open("wb") as file,
        # without name and time, so that the same image gives the same bytes
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
    ):
        shutil.copyfileobj(plain, packed, 1 << 22)


def save(volume: Volume, path: Path) -> None:
    """Write `volume` as NIfTI, whole or not at all; a header that it came with keeps its geometry."""
    if volume.header is None:
        image = nib.Nifti1Image(volume.array, volume.affine)
        image.set_qform(volume.affine, 1)
        image.set_sform(volume.affine, 1)
        image.header.set_xyzt_units("mm")
    else:
        header = volume.header.copy()
        header.set_data_dtype(volume.array.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0
        image = nib.Nifti1Image(volume.array, None, header)
    with _whole(path) as part:
        nib.save(image, part)


# ---- other formats -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NrrdFile(Source):
    """A 3-D NRRD file."""

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)

    def read(self) -> Volume:
        """Read voxels in their type on disk, with the geometry of the file; raises DataError if it is not 3-D."""
        import SimpleITK as sitk

        if self.path.stat().st_size == 0:
            raise DataError(f"{self.path} is empty (0 bytes); fetch it again")
        with reading(self.path):
            image = sitk.ReadImage(str(self.path), imageIO="NrrdImageIO")
        if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
            raise DataError(
                f"{self.path} is {image.GetDimension()}-D with {image.GetNumberOfComponentsPerPixel()} values per "
                "voxel; give a 3-D image with one"
            )
        return from_sitk(image, str(self.path))


@dataclass(frozen=True)
class H5Array(Source):
    """An array (X, Y, Z) of an HDF5 file, which does not store a geometry.

    Attributes
    ----------
    path : Path
        The file.
    key : str
        Name of the array; no other array is opened.
    spacing : float
        Edge of a voxel in mm, along all axes. The direction is the identity in patient coordinates (LPS).
    """

    path: Path
    key: str
    spacing: float

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)

    def read(self) -> Volume:
        """Read the array.

        Raises
        ------
        DataError
            If it is missing, not 3-D, or a link to other data; or if h5py is not installed.
        """
        h5py = _h5py()
        if self.path.stat().st_size == 0:
            raise DataError(f"{self.path} is empty (0 bytes); fetch it again")
        with reading(self.path), h5py.File(self.path, "r") as file:
            if self.key not in set(file):  # `in file` would follow a link
                raise DataError(f"{self.path} has no array {self.key!r} (it has: {', '.join(file) or 'none'})")
            if not isinstance(file.get(self.key, getlink=True), h5py.HardLink):
                raise DataError(
                    f"{self.path}: {self.key!r} is a link to other data, which is not followed; fetch it again"
                )
            data = file[self.key]
            if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
                raise DataError(f"{self.path}: {self.key!r} is not an array stored in this file; fetch it again")
            if data.ndim != 3 or data.dtype.kind not in "iuf":
                raise DataError(f"{self.path}: {self.key!r} is {data.dtype} {data.shape}; a 3-D array is needed")
            array = data[()]
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        return Volume(_smaller(array, str(self.path)), _TO_RAS @ np.diag([self.spacing] * 3 + [1.0]))


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise DataError("HDF5 files need h5py, which is not installed; type: pip install h5py") from error
    return h5py


def from_sitk(image: Any, name: str) -> Volume:
    """Return voxels (X, Y, Z) and geometry of a 3-D SimpleITK image; `name` is for messages."""
    import SimpleITK as sitk

    array = _smaller(np.ascontiguousarray(sitk.GetArrayFromImage(image).T), name)
    return Volume(array, affine_of(image))


def affine_of(image: Any) -> np.ndarray:
    """Return the affine (4, 4) to RAS+ of a SimpleITK image, or of a reader that knows its header."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return _TO_RAS @ affine


def _smaller(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array (X, Y, Z) with 4-byte instead of 8-byte integers, which few programs read from NIfTI."""
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 8:
        return array
    smaller = array.astype(np.int32)
    if not np.array_equal(smaller, array):
        raise DataError(f"{name} holds integers beyond 32 bits; convert it to a smaller type")
    return smaller


def names_of(*sources: Source) -> str:
    """Return the names of all files, for messages."""
    return " and ".join(str(path) for source in sources for path in source.files)
