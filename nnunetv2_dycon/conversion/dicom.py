"""CT series as DICOM files, one file per slice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunetv2_dycon.conversion.volumes import Source, Volume, from_sitk, reading
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import is_hidden

_POSITION, _ORIENTATION, _MODALITY = "0020|0032", "0020|0037", "0008|0060"


class _Series(NamedTuple):
    folder: Path
    uid: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class CtSeries(Source):
    """The CT series in the folders of one case.

    Attributes
    ----------
    case : str
        Its name, for messages.
    folders : tuple of Path
        Folders that hold its files; each may hold several series.
    """

    case: str
    folders: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The folders, since there are too many files to list."""
        return self.folders

    def read(self) -> Volume:
        """Read the series in Hounsfield units, slices in the order of their positions.

        Of several series the largest is read if the others are far smaller (scouts).

        Raises
        ------
        DataError
            If a CT series is missing, two have a similar size, or a slice is missing, doubled or unreadable.
        """
        import SimpleITK as sitk

        chosen = self._largest([series for folder in self.folders for series in _series(folder)])
        files, gap = _in_order(chosen)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        with reading(chosen.folder):
            image = reader.Execute()
        image.SetSpacing((*image.GetSpacing()[:2], gap))
        return from_sitk(image, str(chosen.folder))

    def _largest(self, found: list[_Series]) -> _Series:
        if not found:
            raise DataError(f"{self.folders[0]} holds no readable DICOM series; fetch it again")
        ordered = sorted(found, key=lambda series: (-len(series.files), str(series.folder), series.uid))
        first, *others = ordered
        if others and 2 * len(others[0].files) > len(first.files):
            raise DataError(
                f"{first.folder} has two series of {len(first.files)} and {len(others[0].files)} slices "
                f"(the other in {others[0].folder}), and either may be the scan of {self.case}; remove one"
            )
        return first


def _series(folder: Path) -> list[_Series]:
    import SimpleITK as sitk

    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames
    with reading(folder):
        uids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        found = [_Series(folder, uid, names(str(folder), uid)) for uid in uids]
    listed = {Path(name).name for series in found for name in series.files}
    # the reader skips files that it cannot read, and a stack without its last slice looks complete
    for path in sorted(folder.iterdir()):
        if path.name not in listed and _should_be_slice(path):
            raise DataError(f"{path} cannot be read as a slice; fetch it again, or remove it if it is not one")
    return found


def _should_be_slice(path: Path) -> bool:
    if is_hidden(path.name) or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    with reading(path), path.open("rb") as file:
        start = file.read(132)
    return path.suffix.lower() == ".dcm" or not start or start.endswith(b"DICM")


def _in_order(series: _Series) -> tuple[list[str], float]:
    """Return the files by position along the normal of the slices, and the distance between neighbours in mm."""
    placed = sorted(_placed(series.files))
    if len(placed) < 2:
        raise DataError(f"{series.folder} has a series of one slice; fetch it again")
    names = [name for _, name, _ in placed]
    heights = np.array([height for height, _, _ in placed])
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    for name, following, height, gap in zip(names, names[1:], heights, gaps, strict=False):
        if gap < 0.1 * usual or usual <= 0:
            raise DataError(f"{name} and {following} are slices at the same position ({height:.2f} mm); remove one")
        if gap > 1.5 * usual:
            raise DataError(
                f"{series.folder} lacks slices: {gap:.2f} mm from {Path(name).name} to {Path(following).name}, "
                f"elsewhere {usual:.2f} mm; fetch it again"
            )
    _check_straight(series.folder, heights, np.array([aside for _, _, aside in placed]))
    return names, float(gaps.mean())


def _placed(files: Sequence[str]) -> Iterator[tuple[float, str, tuple[float, ...]]]:
    """Yield each slice's position along its normal in mm, its file, and the rest of its position."""
    for name in files:
        header = _header(Path(name))
        modality = header.GetMetaData(_MODALITY).strip() if header.HasMetaDataKey(_MODALITY) else ""
        if modality not in ("CT", ""):
            raise DataError(f"{name} is a {modality} image; a CT series is needed")
        normal = np.cross(*np.reshape(_numbers(header, _ORIENTATION, name, 6), (2, 3)))
        position = _numbers(header, _POSITION, name, 3)
        height = float(np.dot(normal, position))
        yield height, name, tuple(position - height * normal)


def _check_straight(folder: Path, heights: np.ndarray, asides: np.ndarray) -> None:
    """Refuse a stack that is not a grid with right angles and equal distances between slices.

    Parameters
    ----------
    folder : Path
        For the message.
    heights : ndarray, shape (S,)
        Position of each slice along the normal, in mm.
    asides : ndarray, shape (S, 3)
        Rest of each slice's position, in mm.

    Raises
    ------
    DataError
        If slices are displaced against each other (a tilted gantry), or lie half a slice from even steps.
    """
    step = float(np.diff(heights).mean())
    if np.abs(asides - asides[0]).max() > 0.5 * step:
        raise DataError(
            f"{folder} has slices that are displaced sideways (a tilted gantry); straighten the series first"
        )
    even = heights[0] + step * np.arange(len(heights))
    off = np.abs(heights - even).max()
    if off > 0.5 * step:
        raise DataError(f"{folder} has uneven steps: a slice is {off:.2f} mm from its place; resample the series first")


def _header(path: Path) -> Any:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    with reading(path):
        reader.ReadImageInformation()
    return reader


def _numbers(header: Any, tag: str, name: str, count: int) -> np.ndarray:
    """Return the numbers of a tag, (count,)."""
    text = header.GetMetaData(tag) if header.HasMetaDataKey(tag) else ""
    try:
        numbers = np.array([float(part) for part in text.split("\\")])
    except ValueError:
        numbers = np.empty(0)
    if len(numbers) != count:
        raise DataError(f"{name} does not say where its slice lies (tag {tag.replace('|', ',')}); fetch it again")
    return numbers
