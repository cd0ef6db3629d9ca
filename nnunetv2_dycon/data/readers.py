"""Files as nnU-Net's readers see them, and what these readers do not notice: damage, NaN, two places in one header.

One reader of a data set for scores, checks and conversion: the one that its trainings and predictions go through.
"""

import contextlib
import gzip
import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_dataset_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from numpy.typing import NDArray

from nnunetv2_dycon.errors import DataError

Reader = type[BaseReaderWriter]
MEND = "restore or replace it"
_EXAMPLES = 5  # files that are tried for a reader
_MILLIMETERS = {"meter": 1000.0, "micron": 0.001}  # as SimpleITK reads them; without a unit: mm
_UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, RuntimeError, zlib.error, struct.error),
    *(ImageFileError, HeaderDataError),
)


class View(NamedTuple):
    """Voxels and geometry of a file, as a reader of nnU-Net sees them.

    Attributes
    ----------
    values : array, shape (X, Y, Z), or (X, Y) for a 2D image
        Axes in the order of nnU-Net's arrays, the type as on disk (float32 where the reader scales).
    spacing : tuple of float
        Voxel size in mm, one number per axis.
    place : dict
        Spacing, origin and direction in the reader's own form, as far as the format has them. A prediction that this
        reader's class wrote has the place of its image.
    """

    values: NDArray
    spacing: tuple[float, ...]
    place: dict[str, NDArray[np.float64]]


def find_reader(
    content: Mapping[str, Any], examples: Iterable[Path] = (), plans: Mapping[str, Any] | None = None
) -> Reader:
    """Return nnU-Net's reader of a data set: the one in the plans, else that of nnU-Net's rule.

    Parameters
    ----------
    content : mapping
        Content of dataset.json.
    examples : iterable of Path
        Files of the data set, in nnU-Net's order: of several readers for one ending nnU-Net takes the one that can read
        the first file. Where that is broken, the next one decides that is not.
    plans : mapping, optional
        Content of plans.json.

    Raises
    ------
    DataError
        If nnU-Net has no reader for the ending.
    """
    named = (plans or {}).get("image_reader_writer")
    known = {**content, "overwrite_image_reader_writer": named} if named else dict(content)
    ending = content["file_ending"]
    tried = islice(examples, _EXAMPLES) if len(readers_of(ending)) > 1 else ()
    for file in (*map(str, tried), None):  # None: all are broken, which reading each of them will tell
        with contextlib.suppress(RuntimeError), _quiet():
            return determine_reader_writer_from_dataset_json(known, file, verbose=False)
    raise DataError(f'nnU-Net has no reader for {ending}; correct "file_ending" in dataset.json, or convert the images')


def readers_of(ending: str) -> list[Reader]:
    """Return nnU-Net's readers for a file ending, in the order in which nnU-Net tries them."""
    return [reader for reader in LIST_OF_IO_CLASSES if ending.lower() in reader.supported_file_endings]


def read_view(path: Path, reader: Reader) -> View:
    """Return a file as nnU-Net's reader sees it, in the memory of its own type and not of floats.

    Parameters
    ----------
    path : Path
        The file, with one channel.
    reader : type
        A reader of nnU-Net.

    Raises
    ------
    DataError
        If it is damaged, holds NaN or Inf where the reader would see 0, or has a geometry that the reader refuses.
    Exception
        The reader's own errors; see `reading`.
    """
    if reader in (SimpleITKIO, SimpleITKIOWithReorient):
        return _view_of_itk(read_itk(path, reorient=reader is SimpleITKIOWithReorient))
    if reader in (NibabelIO, NibabelIOWithReorient):
        return _view_of_nibabel(open_nifti(path, unpack=True), reorient=reader is NibabelIOWithReorient)
    check_nifti(path)
    values, properties = reader().read_seg(str(path))
    spacing = tuple(map(float, properties["spacing"]))
    values = values[0] if len(values) == 1 else values
    # nnU-Net gives a 2D image a first axis with 999 times the largest spacing
    if len(values) == 1 and np.isclose(spacing[0], 999 * max(spacing[1:])):
        values, spacing = values[0], spacing[1:]
    return View(values, spacing, {"spacing": np.array(spacing)})


def read_itk(path: Path, mend: str = MEND, *, reorient: bool = False) -> Any:
    """Return the SimpleITK image of a whole file without NaN and Inf, which SimpleITK reads as 0 from NIfTI.

    Parameters
    ----------
    path : Path
        The file.
    mend : str
        What the user can do about damage; ends the error message.
    reorient : bool
        Turn its axes to RAS, as `SimpleITKIOWithReorient`.
    """
    check_nifti(path, mend)
    with _quiet(), _right_angles(path):
        image = sitk.ReadImage(str(path))
        return sitk.DICOMOrient(image, "RAS") if reorient else image


def read_itk_header(path: Path) -> Any:
    """Return a SimpleITK reader that knows the size and the geometry of a file, without its voxels."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _quiet(), reading(path), _right_angles(path):
        reader.ReadImageInformation()
    return reader


@contextlib.contextmanager
def _right_angles(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "orthonormal" not in str(error):
            raise
        raise DataError(
            f"{path} has axes that are not at right angles, which SimpleITK, by which nnU-Net reads it, does not "
            "accept; resample it, or write it with the header of its image if it is a label map"
        ) from error


def _view_of_itk(image: Any) -> View:
    spacing = tuple(abs(step) for step in reversed(image.GetSpacing()))
    place = {key: getattr(image, f"Get{key.title()}")() for key in ("spacing", "origin", "direction")}
    return View(sitk.GetArrayFromImage(image), spacing, {key: np.array(value) for key, value in place.items()})


def _view_of_nibabel(image: Any, *, reorient: bool) -> View:
    if reorient:
        image = nib.as_closest_canonical(image)
    values = np.asanyarray(image.dataobj)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.dtype.kind == "f":
        values = values.astype(np.float32, copy=False)  # as nnU-Net: the double of a scale such as 0.1 is not exact
    # these readers pass over the unit, and what they write has none: the place is in the unit of the file
    spacing = [millimeters(image) * float(step) for step in image.header.get_zooms()[: values.ndim]]
    steps = np.linalg.norm(image.affine[:3, :3], axis=0)
    direction = image.affine[:3, :3] / np.where(steps > 0, steps, 1)
    place = {"spacing": steps, "origin": image.affine[:3, 3], "direction": direction.ravel()}
    return View(values.T, tuple(reversed(spacing)), place)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the screen what readers print: warnings about headers, a traceback for each reader that does not fit."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


@contextlib.contextmanager
def reading(path: Path, mend: str = "it may be damaged: fetch it again") -> Iterator[None]:
    """Turn the errors of a reader of `path` into one line.

    Parameters
    ----------
    path : Path
        The file.
    mend : str
        What the user can do; ends the error message.

    Raises
    ------
    DataError
        In place of the reader's own errors.
    """
    try:
        yield
    except DataError:
        raise
    except _UNREADABLE as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][-200:] if lines else type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); {mend}") from error


# ---- NIfTI -----------------------------------------------------------------------------------------------------


def is_nifti(path: Path) -> bool:
    """Return whether a file has a name of NIfTI."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def open_nifti(path: Path, mend: str = MEND, *, unpack: bool = False) -> Any:
    """Return the nibabel image of a complete file, its voxels not yet read.

    SimpleITK reads the missing part of a truncated file as 0, and all of a damaged one; nibabel does not notice a
    changed byte in gzip data.

    Parameters
    ----------
    path : Path
        The file.
    mend : str
        What the user can do; ends the error message.
    unpack : bool
        Compare the checksum of gzip data too, for which they are unpacked; without it only if the sizes differ.

    Raises
    ------
    DataError
        If it is empty, truncated, damaged or of another format.
    """
    with reading(path, mend):
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path} is empty (0 bytes); {mend}")
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if packed != path.name.lower().endswith(".gz"):
            now, then = ("gzip", "no .gz") if packed else ("not gzip", ".gz")
            raise DataError(f"{path} is {now} data but its name says {then}; rename it, or {mend}")
        image: Any = nib.load(path)
        if not isinstance(image, nib.Nifti1Image | nib.Nifti2Image):
            raise DataError(f"{path} is not a single NIfTI file ({type(image).__name__}); {mend}")
        stored = int(image.dataobj.offset) + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
        if packed:
            # gzip ends with the unpacked size
            whole = (not unpack and _last_size(path) == stored % 2**32) or _unpacked_size(path) >= stored
        else:
            whole = size >= stored
        if not whole:
            raise DataError(f"{path} is truncated ({size} bytes); {mend}")
        return image


def _last_size(path: Path) -> int:
    """Return the last four bytes of a gzip file: the size of its (last) content, modulo 2^32."""
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return struct.unpack("<I", file.read(4))[0]


def _unpacked_size(path: Path) -> int:
    """Return the size of a gzip file's content; unpacks it, which compares its checksum."""
    size = 0
    with gzip.open(path) as file:
        while part := file.read(1 << 22):
            size += len(part)
    return size


def check_nifti(path: Path, mend: str = MEND) -> None:
    """Refuse a NIfTI file that is damaged or has NaN or Inf; a file of another format passes.

    Parameters
    ----------
    path : Path
        The file.
    mend : str
        What the user can do about damage; ends the error message.

    Raises
    ------
    DataError
        With the file's name.
    """
    if not is_nifti(path):
        return
    image = open_nifti(path, mend, unpack=True)
    with reading(path, mend):
        floats = image.get_data_dtype().kind in "fc"
        if floats and not np.isfinite(np.asanyarray(image.dataobj.get_unscaled())).all():
            raise DataError(f"{path} has NaN or Inf; replace the values or remove the case")


def millimeters(image: Any) -> float:
    """Return the unit of a NIfTI image in mm, as SimpleITK reads it; without a unit 1."""
    return _MILLIMETERS.get(image.header.get_xyzt_units()[0], 1.0)
