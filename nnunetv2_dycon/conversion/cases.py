"""The files of one case in nnU-Net's format, written by one process."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_dycon.conversion.align import Fit, map_values, on_grid, present, resample, same_grid
from nnunetv2_dycon.conversion.dataset import ELSEWHERE, IMAGES, LABELS, Workspace
from nnunetv2_dycon.conversion.volumes import (
    NiftiFile,
    Source,
    Volume,
    names_of,
    put_file,
    put_nifti,
    save,
)
from nnunetv2_dycon.data.roles import image_sidecar, label_sidecar
from nnunetv2_dycon.errors import DataError, WriteError
from nnunetv2_dycon.files import check_case_names, read_json, write_json


@dataclass(frozen=True)
class SourceCase:
    """A case of a collection.

    Attributes
    ----------
    images : tuple of Source
        One for each channel.
    label : Source, optional
        Its label map.
    """

    images: tuple[Source, ...]
    label: Source | None = None


@dataclass(frozen=True)
class LabelRule:
    """How the label maps of a collection become those of the data set.

    Attributes
    ----------
    maps : sequence of mapping
        From old to new values; the first one with all values of a case is used.
    fit : callable
        Puts a label map on the grid of its image.
    needs_image : bool
        Whether `fit` needs the values of the image in addition to its grid.
    hint : str
        Ends the message about an unknown value.
    """

    maps: Sequence[Mapping[int, int]]
    fit: Fit = on_grid
    needs_image: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Resampled(Source):
    """An image that is resampled linearly onto the grid of another one, by position in mm."""

    image: Source
    onto: Source

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the image."""
        return self.image.files

    def seen_in(self, ending: str) -> "Resampled":
        """Return both images as nnU-Net's reader of a data set with this file ending sees them."""
        return Resampled(self.image.seen_in(ending), self.onto.seen_in(ending))

    def read(self) -> Volume:
        """Return the values at the voxels of the other image, float32; 0 outside this image."""
        grid, image = self.onto.read(), self.image.read()
        values = resample(image._replace(array=image.array.astype(np.float32)), grid, order=1)
        return Volume(values, grid.affine, grid.header)


@dataclass(frozen=True)
class Task(ABC):
    """Input of the worker process that writes one case; picklable.

    Attributes
    ----------
    name, role : str
        The case and its role; one of `assign.ROLES`.
    ending : str
        File ending of the data set.
    work : Path
        Folder of the `Workspace`.
    """

    name: str
    role: str
    ending: str
    work: Path

    def __post_init__(self) -> None:
        check_case_names([self.name], "the source data")

    @property
    @abstractmethod
    def sources(self) -> tuple[Path, ...]:
        """Files and folders that are read."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Files that are written, relative to the data set's folder."""

    @abstractmethod
    def make(self) -> dict[str, Any]:
        """Write the outputs; returns the record ("how" of each image, "notes", ...)."""

    def write(self) -> str | None:
        """Write the case and its record; returns the problem with it, None if it is done.

        Raises
        ------
        WriteError
            If nothing can be written.
        """
        try:
            write_json(self._record, self.make(), elsewhere=ELSEWHERE)
        except WriteError:
            raise
        except DataError as error:
            return str(error)
        return None

    def is_whole(self) -> bool:
        """Return whether an earlier run finished this case; its NIfTI files are checked like those of a source."""
        if not self._record.is_file():
            return False
        data = Workspace(self.work).data
        try:
            for path in (data / name for name in self.outputs):
                if not path.is_file():
                    return False
                if path.name.endswith((".nii", ".nii.gz")):
                    NiftiFile(path).open()
        except DataError:
            return False
        return True

    def record(self) -> dict[str, Any]:
        """Return the record that `write` left."""
        return read_json(self._record)

    @property
    def _record(self) -> Path:
        return Workspace(self.work).records / f"{self.name}.json"

    def _place(self, name: str) -> Path:
        return Workspace(self.work).data / name


def image_name(task: Task, channel: int) -> str:
    """Return the name of a channel's file, relative to the data set's folder."""
    return f"{IMAGES[task.role]}/{task.name}_{channel:04d}{task.ending}"


def label_name(task: Task) -> str:
    """Return the name of the label map's file, relative to the data set's folder."""
    return f"{LABELS[task.role]}/{task.name}{task.ending}"


@dataclass(frozen=True)
class CaseTask(Task):
    """A case of a collection: images as NIfTI, the label map checked and on the grid of the image.

    Attributes
    ----------
    case : SourceCase
        Without its label if the case is unlabelled, so that no worker knows the label's file.
    rule : LabelRule
        How the label map is converted.
    empty : bool
        Whether the case is known to have no foreground: a missing label map is then written as an empty one.
    """

    case: SourceCase
    rule: LabelRule
    empty: bool = False

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files and folders of images and label."""
        label = [self.case.label] if self.case.label else []
        return tuple(path for source in (*self.case.images, *label) for path in source.files)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Images in channel order, then the label."""
        images = [image_name(self, channel) for channel in range(len(self.case.images))]
        return (*images, *([label_name(self)] if self.role in LABELS else []))

    def make(self) -> dict[str, Any]:
        """Write images, then the label.

        Raises
        ------
        DataError
            If channels are on different grids, or the label is missing or does not fit.
        """
        first: Any = None  # of the case's volumes
        how = []
        for channel, source in enumerate(self.case.images):
            whole = first is None and self.role in LABELS and self.rule.needs_image
            volume, done = _write_image(source.seen_in(self.ending), self._place(image_name(self, channel)), whole)
            how.append(done)
            if first is None:
                first = volume
            elif not same_grid(first, volume):
                both = names_of(self.case.images[0], source)
                raise DataError(f"{both} are on different grids; channels must share one")
        record: dict[str, Any] = {"how": how, "notes": []}
        if self.role in LABELS:
            self._write_label(first, record)
        return record

    def _write_label(self, image: Volume, record: dict[str, Any]) -> None:
        if self.case.label is None:
            if not self.empty:
                raise DataError(f"{self.name} has no label map; add it or leave the case out")
            array = np.zeros(image.array.shape, np.uint8)
            record["notes"].append("no label file; it is known to have no lesion, so an empty label was written")
        else:
            name = names_of(self.case.label)
            array, notes = self.rule.fit(image, self.case.label.seen_in(self.ending).read(), name)
            record["notes"] += notes
            array = map_values(array, self.rule.maps, name, self.rule.hint)
        save(Volume(array, image.affine, image.header), self._place(label_name(self)))
        record["label_voxels"] = {str(v): int(np.count_nonzero(array == v)) for v in sorted(present(array))}


@dataclass(frozen=True)
class LinkTask(Task):
    """A case of a data set in nnU-Net's format: its files under other names.

    Attributes
    ----------
    links : tuple of (Path, str)
        Each file, and its name relative to the new data set's folder.
    """

    links: tuple[tuple[Path, str], ...]

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files that are linked."""
        return tuple(source for source, _ in self.links)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their new names."""
        return tuple(name for _, name in self.links)

    def make(self) -> dict[str, Any]:
        """Link all files."""
        return {"how": [put_file(source, self._place(name)) for source, name in self.links], "notes": []}


def link_case(name: str, role: str, images: Sequence[Path], label: Path | None, ending: str, work: Path) -> LinkTask:
    """Return the task that links one case: images, label map, and the files that give a TIFF its spacing.

    Parameters
    ----------
    name, role : str
        The case and its role in the new data set.
    images : sequence of Path
        Its files in channel order.
    label : Path, optional
        Its label map. Not linked where the role has none; that of a test case may be missing.
    ending : str
        File ending of both data sets.
    work : Path
        Folder of the `Workspace`.
    """
    links = [(path, f"{IMAGES[role]}/{name}_{channel:04d}{ending}") for channel, path in enumerate(images)]
    links.append((image_sidecar(images[0], ending), f"{IMAGES[role]}/{name}.json"))
    needed = {*images}
    if role in LABELS and label is not None:
        links.append((label, f"{LABELS[role]}/{name}{ending}"))
        links.append((label_sidecar(label, ending), f"{LABELS[role]}/{name}.json"))
        needed |= {label} if role != "test" else set()
    return LinkTask(name, role, ending, work, tuple(link for link in links if link[0] in needed or link[0].is_file()))


def _write_image(source: Source, path: Path, whole: bool) -> tuple[Volume, str]:
    if isinstance(source, NiftiFile):
        done = put_nifti(source, path)
        return source.read() if whole else source.grid(), done
    volume = source.read()
    if volume.array.size == 0:
        raise DataError(f"{names_of(source)} holds no voxel; fetch it again")
    save(volume, path)
    return volume, "written"
