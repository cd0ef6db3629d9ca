"""Scores of one prediction: overlap, surface distances, volumes and lesions of each structure of a case.

No file is read. Label maps have shape (X, Y, Z) or (X, Y), spacing in mm along the same axes.

A voxel is on the surface if one of its face neighbours is outside the mask. Outside the image is outside the mask,
except along an axis of one voxel: a single slice is a 2D image. Distances are exact, between voxel centres, in float64.
Directed distances are from each surface voxel of one mask to the nearest surface voxel of the other.

========  ========================================================  ===============================================
quantity  convention "mm"                                           convention "literature"
========  ========================================================  ===============================================
unit      mm                                                        voxels, spacing is passed over
HD95      the larger of the two directed 95th percentiles           95th percentile of both directions put together
ASD       mean from prediction to truth: blind to missed parts      the same
ASSD      mean over the surface voxels of both, put together        the same
NSD       share of both surfaces within the tolerance of the other  the same, the tolerance in voxels
========  ========================================================  ===============================================

The second column is MedPy's definition; most papers on semi-supervised segmentation use MedPy without a spacing.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from nnunetv2_dycon.errors import ConfigError

Convention = Literal["mm", "literature"]
Status = Literal["ok", "both_empty", "missed", "false_alarm"]
Box = tuple[slice, ...]

OVERLAPS = ("dice", "iou", "nsd")
DISTANCES = ("hd95_mm", "asd_mm", "assd_mm")
_SLAB = 1 << 16  # voxels that are counted at a time: a count needs eight times the memory of a label map
_LEAF = 48  # points of a leaf of the tree; with the usual 10, a surface takes half as long again
_DENSE = 12  # voxels of the box that a distance map covers in the time of one search in the tree, about


@dataclass(frozen=True)
class ScoreSettings:
    """Convention, tolerance and selection of scores.

    Attributes
    ----------
    convention : {"mm", "literature"}
        See the table of this module.
    tolerance : float
        Tolerance of NSD in mm; in voxels with "literature". The default, 2, is a typical difference between two
        observers on organs in CT; use a smaller one for small structures.
    distances : bool
        Whether to measure HD95, ASD, ASSD and NSD.
    lesions : bool
        Whether to count lesions.

    Raises
    ------
    ConfigError
        If the convention is unknown, or the tolerance is negative or not finite.
    """

    convention: Convention = "mm"
    tolerance: float = 2.0
    distances: bool = True
    lesions: bool = False

    def __post_init__(self) -> None:
        if self.convention not in get_args(Convention):
            raise ConfigError(f"--convention {self.convention}: must be one of {', '.join(get_args(Convention))}")
        if not (0 <= self.tolerance < math.inf):
            raise ConfigError(f"--tolerance {self.tolerance}: must be a length from 0 up")


class Structure(NamedTuple):
    """A class to score: nnU-Net's key ("1", or "(1, 2)" for a region), its name and its label values."""

    label: str
    name: str
    values: tuple[int, ...]


class Counts(NamedTuple):
    """Numbers of voxels of one structure by truth and prediction, without ignored voxels."""

    tp: int
    fp: int
    fn: int
    tn: int


class Lesions(NamedTuple):
    """Numbers of lesions: of the truth, found (tp) and missed (fn), and false ones of the prediction (fp)."""

    tp: int
    fp: int
    fn: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of one structure in one case; the fields are the columns of the table. None: undefined, or not computed.

    Attributes
    ----------
    dice, iou : float or None
        In [0, 1]; 0 if one of the masks is empty, None if both are, as in nnU-Net.
    hd95_mm, asd_mm, assd_mm : float or None
        Distances for status "ok"; in voxels if `convention` is "literature".
    nsd : float or None
        In [0, 1], with the tolerance `nsd_tolerance_mm` in the unit of the distances; empty masks as for `dice`.
    volume_truth_ml, volume_pred_ml, volume_error_ml : float or None
        The error is prediction minus truth. None for a 2D image.
    status : {"ok", "both_empty", "missed", "false_alarm"}
        Which of the masks are not empty: both, none, only the truth's, only the prediction's.
    lesion_tp, lesion_fp, lesion_fn, lesion_f1 : int, int, int and float, or None
        See `count_lesions`; F1 is None if neither mask has a lesion.
    diagonal_mm : float
        Diagonal of the image in the unit of the distances; replaces undefined distances in penalised means.
    convention : {"mm", "literature"}
        How distances are defined.
    """

    case: str
    label: str
    name: str
    dice: float | None
    iou: float | None
    hd95_mm: float | None
    asd_mm: float | None
    assd_mm: float | None
    nsd: float | None
    nsd_tolerance_mm: float
    volume_truth_ml: float | None
    volume_pred_ml: float | None
    volume_error_ml: float | None
    status: Status
    lesion_tp: int | None = None
    lesion_fp: int | None = None
    lesion_fn: int | None = None
    lesion_f1: float | None = None
    diagonal_mm: float
    convention: Convention = "mm"

    def penalized(self, metric: str) -> float | None:
        """Return the metric; for a distance, the image's diagonal if exactly one mask is empty."""
        if metric in DISTANCES and self.status in ("missed", "false_alarm"):
            return self.diagonal_mm
        return getattr(self, metric)


def score_case(
    truth: NDArray,
    prediction: NDArray,
    spacing: Sequence[float],
    structures: Sequence[Structure],
    *,
    case: str = "",
    ignore: int | None = None,
    settings: ScoreSettings | None = None,
) -> list[tuple[Score, Counts]]:
    """Return score and voxel counts of each structure.

    Parameters
    ----------
    truth, prediction : integer array, shape (X, Y, Z) or (X, Y)
        Label maps, values from 0 up.
    spacing : sequence of float
        Voxel size in mm, one number per axis.
    structures : sequence of Structure
        The structures to score.
    case : str
        Name of the case.
    ignore : int, optional
        Value in the truth of voxels that are not scored: they are in neither mask.
    settings : ScoreSettings, optional
        By default distances in mm and no lesions.

    Raises
    ------
    ValueError
        If the shapes or the numbers of axes differ.
    """
    if truth.shape != prediction.shape or len(spacing) != truth.ndim:
        raise ValueError(f"shapes {truth.shape} and {prediction.shape}, spacing {tuple(spacing)}: one must fit all")
    settings = settings or ScoreSettings()
    frames = [_frame(labels) for labels in (truth, prediction)]
    boxes = [_boxes(labels, frame) for labels, frame in zip((truth, prediction), frames, strict=True)]
    top = max([ignore or 0, *(value for structure in structures for value in structure.values)])
    table = _overlaps(truth, prediction, _around(frames), top + 1)
    if ignore is not None:
        table[ignore] = 0
    scored = []
    for structure in structures:
        counts = _count(table, structure.values)
        own_boxes = [_around([of.get(value) for value in structure.values]) for of in boxes]
        pair = _Pair(truth, prediction, own_boxes, structure.values, ignore)
        scored.append((_score(structure, counts, pair, spacing, case, settings), counts))
    return scored


def count_lesions(truth: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> Lesions:
    """Return numbers of lesions in two masks of the same shape, (X, Y, Z) or (X, Y).

    A lesion is a connected component; voxels are connected by a face, an edge or a corner. A lesion of the truth is
    found (tp) if any of its voxels is predicted, else missed (fn). A lesion of the prediction is false (fp) if it
    overlaps with no lesion of the truth. Several predicted lesions in one of the truth count once.
    """
    found, lesions = _touched(truth, prediction)
    met, predicted = _touched(prediction, truth)
    return Lesions(tp=found, fp=predicted - met, fn=lesions - found)


def precision(tp: int, fp: int) -> float | None:
    """Return the share of positives that are true, None without positives."""
    return tp / (tp + fp) if tp + fp else None


def recall(tp: int, fn: int) -> float | None:
    """Return the share of the truth that is found, None if the truth is empty."""
    return tp / (tp + fn) if tp + fn else None


def f1(tp: int, fp: int, fn: int) -> float | None:
    """Return the harmonic mean of precision and recall: 0 if nothing is right, None if truth and prediction are empty.

    Parameters
    ----------
    tp, fp, fn : int
        True positives, false positives and false negatives.
    """
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None


class _Pair(NamedTuple):
    """One structure in truth and prediction; its masks are made on demand, within a box."""

    truth: NDArray
    prediction: NDArray
    boxes: Sequence[Box | None]
    values: tuple[int, ...]
    ignore: int | None

    def masks(self, boxes: Sequence[Box]) -> Iterator[NDArray[np.bool_]]:
        """Yield the truth's mask in the first box, then the prediction's in the second."""
        for labels, box in zip((self.truth, self.prediction), boxes, strict=True):
            mask = labels[box] == self.values[0]
            for value in self.values[1:]:
                mask |= labels[box] == value
            if self.ignore is not None:
                mask &= self.truth[box] != self.ignore
            yield mask


def _score(
    structure: Structure, counts: Counts, pair: _Pair, spacing: Sequence[float], case: str, settings: ScoreSettings
) -> Score:
    tp, fp, fn, _ = counts
    status = _status(tp + fn, tp + fp)
    unit = tuple(spacing) if settings.convention == "mm" else (1.0,) * len(spacing)
    ml = math.prod(spacing) / 1000 if len(spacing) == 3 else None
    volumes = (None,) * 3 if ml is None else ((tp + fn) * ml, (tp + fp) * ml, (fp - fn) * ml)
    lesions = _lesions(pair, status) if settings.lesions else None
    return Score(
        case=case,
        label=structure.label,
        name=structure.name,
        dice=f1(tp, fp, fn),
        iou=tp / (tp + fp + fn) if tp + fp + fn else None,
        **cast(Any, _measure(pair, status, unit, settings)),
        nsd_tolerance_mm=float(settings.tolerance),
        **cast(Any, dict(zip(("volume_truth_ml", "volume_pred_ml", "volume_error_ml"), volumes, strict=True))),
        status=status,
        **cast(Any, {} if lesions is None else {f"lesion_{k}": v for k, v in lesions._asdict().items()}),
        lesion_f1=None if lesions is None else f1(*lesions),
        diagonal_mm=math.hypot(*(n * step for n, step in zip(pair.truth.shape, unit, strict=True))),
        convention=settings.convention,
    )


def _status(truth_voxels: int, predicted_voxels: int) -> Status:
    if truth_voxels:
        return "ok" if predicted_voxels else "missed"
    return "false_alarm" if predicted_voxels else "both_empty"


def _measure(pair: _Pair, status: Status, unit: Sequence[float], settings: ScoreSettings) -> dict[str, float | None]:
    none = dict.fromkeys((*DISTANCES, "nsd"))
    if not settings.distances or status == "both_empty":
        return none
    if status != "ok":
        return {**none, "nsd": 0.0}
    shape = pair.truth.shape
    boxes: Any = pair.boxes  # not None for status "ok"
    surfaces = [_surface(mask, box, shape) for mask, box in zip(pair.masks(boxes), boxes, strict=True)]
    of_truth, of_prediction = surfaces
    around: Any = _around(boxes)
    to_truth = _directed(of_prediction, of_truth, around, shape, unit)
    to_prediction = _directed(of_truth, of_prediction, around, shape, unit)
    both = np.concatenate((to_truth, to_prediction))
    if settings.convention == "mm":
        hd95 = max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))
    else:
        hd95 = np.percentile(both, 95)
    # a surface exactly as far as the tolerance is within it, whatever the rounding of a spacing in a header
    nsd = int(np.count_nonzero(both <= settings.tolerance + 1e-6)) / len(both)
    return {"hd95_mm": float(hd95), "asd_mm": float(to_truth.mean()), "assd_mm": float(both.mean()), "nsd": nsd}


def _lesions(pair: _Pair, status: Status) -> Lesions:
    if status == "both_empty":
        return Lesions(0, 0, 0)
    box: Any = _around(pair.boxes)
    return count_lesions(*pair.masks([box, box]))


def _touched(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[int, int]:
    """Number of components of `mask` that hold a voxel of `other`, and number of all its components."""
    components, number = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))
    return np.unique(components[mask & other]).size, number


def _surface(mask: NDArray[np.bool_], box: Box, shape: Sequence[int]) -> NDArray[np.intp]:
    """Sorted flat indices, in an image of `shape`, of the surface voxels of a mask that is cut to `box`."""
    inside = mask.copy()
    for axis in [axis for axis in range(mask.ndim) if shape[axis] > 1] or range(mask.ndim):
        first, last = (tuple(at if a == axis else slice(None) for a in range(mask.ndim)) for at in (0, -1))
        lower, upper = (
            tuple(at if a == axis else slice(None) for a in range(mask.ndim)) for at in (slice(-1), slice(1, None))
        )
        inside[upper] &= mask[lower]
        inside[lower] &= mask[upper]
        inside[first] = inside[last] = False
    np.logical_xor(mask, inside, out=inside)
    places = np.unravel_index(np.flatnonzero(inside), inside.shape)  # much quicker than np.nonzero of several axes
    return np.ravel_multi_index([at + part.start for at, part in zip(places, box, strict=True)], tuple(shape))


def _directed(
    start: NDArray[np.intp], end: NDArray[np.intp], box: Box, shape: Sequence[int], unit: Sequence[float]
) -> NDArray[np.float64]:
    """Distance from every voxel of `start` to the nearest of `end`; both as from `_surface`, and within `box`."""
    distances = np.zeros(len(start))
    # voxels of both surfaces are 0 apart: with a good prediction most need no search
    apart = end[np.minimum(np.searchsorted(end, start), len(end) - 1)] != start
    if not apart.any():
        return distances
    asked = start[apart]
    # the time of a map is that of its box; that of searches grows with the voxels, and for noise with their distances
    if _DENSE * len(asked) > math.prod(part.stop - part.start for part in box):
        distances[apart] = _on_map(asked, end, box, shape, unit)
    else:
        # quicker on a grid than a balanced tree
        tree = KDTree(_points(end, shape, unit), leafsize=_LEAF, balanced_tree=False, compact_nodes=False)
        distances[apart] = tree.query(_points(asked, shape, unit))[0]
    return distances


def _on_map(
    start: NDArray[np.intp], end: NDArray[np.intp], box: Box, shape: Sequence[int], unit: Sequence[float]
) -> NDArray[np.float64]:
    """Distances as from `_directed`, by a map of the nearest voxel of `end` for each voxel of the box."""
    corner = np.array([[part.start] for part in box])
    places, ends = (np.stack(np.unravel_index(flat, tuple(shape))) - corner for flat in (start, end))
    outside = np.ones([part.stop - part.start for part in box], bool)
    outside[tuple(ends)] = False
    nearest = ndimage.distance_transform_edt(outside, unit, return_distances=False, return_indices=True)
    steps = (np.stack([axis[tuple(places)] for axis in nearest]) - places) * np.reshape(unit, (-1, 1))
    return np.sqrt(np.einsum("ij,ij->j", steps, steps))


def _points(places: NDArray[np.intp], shape: Sequence[int], unit: Sequence[float]) -> NDArray[np.float64]:
    return np.stack(np.unravel_index(places, tuple(shape)), axis=1) * np.asarray(unit)


def _overlaps(truth: NDArray, prediction: NDArray, box: Box | None, size: int) -> NDArray[np.int64]:
    """Voxels by value in the truth (rows) and in the prediction; outside `box` both are 0."""
    if box is not None:
        truth_part, predicted_part = truth[box], prediction[box]
        size = max(size, int(truth_part.max()) + 1, int(predicted_part.max()) + 1)
    table = np.zeros(size * size, np.int64)
    inside = 0
    if box is not None:
        step = max(1, _SLAB // max(1, truth_part[0].size))
        for start in range(0, len(truth_part), step):
            at = slice(start, start + step)
            pairs = truth_part[at].astype(np.intp)
            pairs *= size
            pairs += predicted_part[at]
            table += np.bincount(pairs.ravel(), minlength=size * size)
            inside += pairs.size
    table[0] += truth.size - inside
    return table.reshape(size, size)


def _count(table: NDArray[np.int64], values: Sequence[int]) -> Counts:
    of = list(values)
    truth, predicted, tp = (int(part.sum()) for part in (table[of], table[:, of], table[np.ix_(of, of)]))
    return Counts(tp, predicted - tp, truth - tp, int(table.sum()) - truth - predicted + tp)


def _frame(labels: NDArray) -> Box | None:
    """Smallest box around all voxels that are not 0, None if there are none."""
    box: list[slice] = []
    for axis in range(labels.ndim):
        at = np.flatnonzero(labels.any(axis=tuple(a for a in range(labels.ndim) if a != axis)))
        if not at.size:
            return None
        box.append(slice(int(at[0]), int(at[-1]) + 1))
    return tuple(box)


def _around(boxes: Iterable[Box | None]) -> Box | None:
    """Smallest box around all boxes, None if there are none."""
    there = [box for box in boxes if box is not None]
    if not there:
        return None
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*there, strict=True))


def _boxes(labels: NDArray, frame: Box | None) -> dict[int, Box]:
    """Box around every value that is there."""
    boxes = {0: tuple(slice(0, n) for n in labels.shape)}  # a region may hold the background
    if frame is None:
        return boxes
    if labels[frame].max() == 1:  # no need to look for other labels
        return {**boxes, 1: frame}
    for value, box in enumerate(ndimage.find_objects(labels[frame]), 1):
        if box is not None:
            boxes[value] = tuple(slice(o.start + s.start, o.start + s.stop) for o, s in zip(frame, box, strict=True))
    return boxes
