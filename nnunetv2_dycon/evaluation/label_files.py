"""Read label maps in any format of nnU-Net's readers, and check that they are complete and have known labels."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnunetv2_dycon.data.readers import Reader, find_reader, read_view, readers_of
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.metrics import Structure
from nnunetv2_dycon.files import first_few, read_json, read_json_object

DATASET_FILE = "dataset.json"
PLANS_FILE = "plans.json"  # nnU-Net leaves a copy of both in every folder of predictions


class LabelMap(NamedTuple):
    """A label map and its geometry.

    Attributes
    ----------
    labels : unsigned integer array, shape (X, Y, Z), or (X, Y) for a 2D image
        Axes in the order of nnU-Net's arrays.
    spacing : tuple of float
        Voxel size in mm, one number per axis.
    place : dict
        Spacing, origin and direction as nnU-Net's reader sees them, as far as the format has them.
    """

    labels: NDArray
    spacing: tuple[float, ...]
    place: dict[str, NDArray[np.float64]]


class Labels(NamedTuple):
    """The labels and the file format of a data set, from its dataset.json.

    Attributes
    ----------
    structures : tuple of Structure
        nnU-Net's regions if the data set has them, else its labels; without the background.
    values : frozenset of int
        Values that are allowed in the truth.
    ignore : int or None
        The value of voxels that are not scored; not allowed in predictions.
    ending : str
        File ending.
    reader : type
        nnU-Net's reader of the data set.
    """

    structures: tuple[Structure, ...]
    values: frozenset[int]
    ignore: int | None
    ending: str
    reader: Reader


def read_labels(path: Path, folder: Path, predictions: Path | None = None) -> Labels:
    """Return labels, ignore label and file format from a dataset.json.

    Parameters
    ----------
    path : Path
        The dataset.json.
    folder : Path
        Folder of label maps: nnU-Net chooses the reader by the first file.
    predictions : Path, optional
        Folder of predictions; the plans in it name the reader that wrote them.

    Raises
    ------
    DataError
        If the file cannot be read, or its labels or file ending cannot be used.
    """
    content = read_json(path, "give another with -djfile")
    try:
        ending, named = content["file_ending"], dict(content["labels"])
        ignore = named.pop("ignore", None)
        spans = {name: tuple(map(int, v)) if isinstance(v, list) else (int(v),) for name, v in named.items()}
        structures = _structures(named, spans)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'{path} must have "file_ending" and "labels" such as {{"background": 0, "organ": 1}}; '
            "mend it or give another with -djfile"
        ) from error
    values = {value for span in spans.values() for value in span} | ({ignore} - {None})
    if not structures or min(values) < 0:
        raise DataError(f'{path}: "labels" must name at least one label above 0 and none below; mend it')
    plans = predictions / PLANS_FILE if predictions else None
    examples = sorted(_files(folder, ending))
    reader = find_reader(content, examples, read_json_object(plans) if plans and plans.is_file() else None)
    return Labels(structures, frozenset(values), ignore, ending, reader)


def _structures(named: Mapping[str, Any], spans: Mapping[str, tuple[int, ...]]) -> tuple[Structure, ...]:
    """Return the structures as nnU-Net's label manager: if one entry has several values, all are regions."""
    if not any(len(span) > 1 for span in spans.values()):
        return tuple(Structure(str(s[0]), name, s) for name, s in sorted(spans.items(), key=lambda i: i[1]) if s[0])
    return tuple(
        Structure(str(span if isinstance(named[name], list) else span[0]), name, span)
        for name, span in spans.items()
        if set(span) != {0}
    )


def read_label_map(path: Path, labels: Labels, *, truth: bool) -> LabelMap:
    """Read one label map.

    Parameters
    ----------
    path : Path
        The file.
    labels : Labels
        Labels of the data set.
    truth : bool
        Whether the ignore label is allowed.

    Raises
    ------
    DataError
        If the file is unreadable or truncated, or holds other values than the labels of the data set.
    """
    try:
        values, spacing, place = read_view(path, labels.reader)
    except (MemoryError, DataError):
        raise
    except Exception as error:  # every format and reader has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise DataError(f"{path} cannot be read ({reason[-200:]}); restore or replace it") from error
    if values.ndim not in (2, 3) or not values.size or values.dtype.kind not in "biuf":
        kind = f"shape {values.shape} and type {values.dtype}"
        raise DataError(f"{path} has {kind}, which is not a label map (probabilities, colours?); give label maps")
    if not all(0 < step < np.inf for step in spacing):
        raise DataError(f"{path} has spacing {_numbers(spacing)}; correct its header")
    known = labels.values if truth else labels.values - {labels.ignore}
    return LabelMap(_as_labels(values, path, known), spacing, place)


def read_channel(path: Path, labels: Labels, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an image of the data set, for a picture; of several channels in one file the first.

    Parameters
    ----------
    path : Path
        The file.
    labels : Labels
        Labels of the data set, with its reader.
    shape : tuple of int
        Shape of the label map that belongs to it.

    Raises
    ------
    DataError
        If it cannot be read, or has another shape.
    """
    try:
        values = read_view(path, labels.reader).values
        first = values.reshape(-1, *values.shape[values.ndim - len(shape) :])[0]
        if first.shape != shape:
            raise ValueError(f"shape {first.shape} instead of {shape}")
    except MemoryError:
        raise
    except Exception as error:  # every format and reader has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise DataError(f"{path} cannot be shown ({reason[:100]}); replace it, or move imagesTs away") from error
    return first.astype(np.float32)


def _as_labels(values: NDArray, path: Path, known: Collection[int]) -> NDArray:
    """Return the values in the smallest unsigned type; raises DataError for unknown labels."""
    top = max(known)
    small = np.min_scalar_type(top)
    out = None if values.dtype == small else np.empty(values.shape, small)
    for at, part in enumerate(values):  # by slices, to save memory
        if part.dtype.kind == "f" and not np.array_equal(part, np.rint(part)):
            odd = part[part != np.rint(part)].flat[0]
            raise DataError(f"{path} holds {odd!s}, so probabilities or intensities; give label maps")
        lowest, highest = part.min(), part.max()
        if lowest < 0 or highest > top:
            raise _unknown(path, lowest if lowest < 0 else highest, known)
        if out is not None:
            out[at] = part
    labels = values if out is None else out
    if len(known) <= top:  # there are gaps
        unknown = set(np.unique(labels).tolist()) - set(known)
        if unknown:
            raise _unknown(path, min(unknown), known)
    return labels


def _unknown(path: Path, value: float, known: Collection[int]) -> DataError:
    return DataError(
        f"{path} holds the value {value:g}, not a label of the data set ({_numbers(sorted(known))}); "
        "convert the file or give the right -djfile"
    )


def same_geometry(truth: LabelMap, prediction: LabelMap) -> str | None:
    """Return how the geometry of the prediction differs from that of the truth, None if it does not.

    Conversion between formats rounds headers, so spacing may differ by a thousandth, an entry of the direction
    by 0.001, the origin by a tenth of the smallest voxel size.
    """
    if truth.labels.shape != prediction.labels.shape:
        return f"shape {prediction.labels.shape} instead of {truth.labels.shape}"
    step = min(truth.place["spacing"])
    for key, limit in {"spacing": 1e-3 * step, "direction": 1e-3, "origin": 0.1 * step}.items():
        one, other = truth.place.get(key), prediction.place.get(key)
        if one is not None and other is not None and not np.allclose(one, other, rtol=0, atol=limit):
            return f"{key} {_numbers(other)} instead of {_numbers(one)}"
    return None


def reader_that_agrees(truth: Path, prediction: Path, labels: Labels) -> str | None:
    """Return another reader of nnU-Net for these files, to which they have one geometry; None if there is none.

    Parameters
    ----------
    truth, prediction : Path
        Label maps that differ in geometry.
    labels : Labels
        Labels of the data set.
    """
    for reader in readers_of(labels.ending):
        other = labels._replace(reader=reader)
        try:
            seen = [read_label_map(path, other, truth=True) for path in (truth, prediction)]
        except DataError:
            continue
        if same_geometry(*seen) is None:
            return reader.__name__
    return None


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def case_files(folder: Path, ending: str) -> dict[str, Path]:
    """Return the label maps of a folder by case name, sorted.

    Raises
    ------
    DataError
        If the folder does not exist, or has no label map.
    """
    if not folder.is_dir():
        parts = folder.parts
        if not os.environ.get("nnUNet_raw") and len(parts) > 2 and parts[1].startswith("Dataset"):
            raise DataError(f"{folder} is not a folder, since nnUNet_raw is not set; type: export nnUNet_raw=FOLDER")
        raise DataError(f"{folder} is not a folder; give the folder with the label maps")
    files = sorted(_files(folder, ending))
    if files:
        return {path.name.removesuffix(ending): path for path in files}
    if any(folder.glob("*.npz")):
        raise DataError(f"{folder} holds probabilities (.npz) and no {ending}; predict without --save_probabilities")
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and any(_files(path, ending)))
    if inside:
        raise DataError(f"{folder} holds no file ending in {ending}, but {first_few(inside)} does; give that folder")
    endings = sorted({re.sub(r"^[^.]*", "", path.name) for path in folder.iterdir()} - {""})
    there = f", only {first_few(endings)}" if endings else ""
    raise DataError(f"{folder} holds no file ending in {ending}{there}; give the folder with the label maps")


def _files(folder: Path, ending: str) -> Iterator[Path]:
    # hidden files such as ._a.nii.gz are notes of file managers
    files = (path for path in folder.glob(f"*{ending}") if not path.name.startswith("."))
    return (path for path in files if path.is_file())
