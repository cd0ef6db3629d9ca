"""Labels of a soft organ on their CT: by position where that is proved, else by what the CT shows, or not at all.

Files of one case come from several programs, and a label may have fewer slices than its CT, or axes that run the other
way, under a header that does not say so. Such a label is shifted or turned, and still lies in soft tissue.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects

from nnunetv2_dycon.conversion.align import grid, resample
from nnunetv2_dycon.conversion.volumes import Volume
from nnunetv2_dycon.errors import DataError

_ANY_CT_TISSUE = (0.0, 200.0)  # HU between which the median of an abdominal organ lies
_AIR_HU, _AIR_SHARE = -200.0, 0.05
_WINDOW_HU = (-200.0, 300.0)  # beyond it, air and bone would outweigh all soft tissue
_LEAST_STEP_HU = 5.0  # over the border of an organ; it is 12 to 68 HU in scans, and about 0 for a label elsewhere
_CLEAR = 5.0  # standard errors between the best placement and any other
_SAME_BOX = 0.5  # voxels of the CT
_REACH = 20  # voxels; a label that belongs further away has no step at its border where it is, and is refused


class _Placement(NamedTuple):
    """One way to lay the label onto the CT: a mask (X, Y, Z), and a note unless it is that of the header."""

    mask: np.ndarray
    note: str | None


class _Step(NamedTuple):
    """Hounsfield units over the border of a mask, from outside to inside: mean and its standard error."""

    mean: float
    error: float


def by_position(image: Volume, label: Volume, name: str) -> tuple[np.ndarray, list[str]]:
    """Return the label (X, Y, Z) of a soft organ on the grid of its CT, and notes.

    Position in mm proves the placement if label and CT cover the same box, and the label lies in soft tissue.
    Otherwise each placement that its maker may have meant is compared: by the header; shifted along an axis on which
    the label covers another length than the CT, as a header with an uncorrected origin needs it; with turned axes where
    the numbers of voxels agree. The Hounsfield units of an organ end at its border: the placement with the largest step
    over the label's border is taken, if it is clearly the largest.

    Parameters
    ----------
    image : Volume
        CT in Hounsfield units.
    label : Volume
        Foreground is every value except 0.

    Raises
    ------
    DataError
        If the label is empty, lies in soft tissue in no placement, or no placement is clearly the best.
    """
    if not label.array.any():
        raise DataError(f"{name} is empty; a case of this collection has the organ: fetch it again")
    index = np.linalg.inv(image.affine) @ label.affine
    box, size = _box(index, label.array.shape), np.array(image.array.shape)
    candidates = list(_placements(image, label, box))
    by_header = candidates[0]
    proved = np.abs(box - [-0.5 * np.ones(3), size - 0.5]).max() <= _SAME_BOX
    if proved and is_organ(image.array, by_header.mask):
        return by_header.mask, []
    wanted = 0.5 * np.count_nonzero(label.array) * abs(np.linalg.det(index[:3, :3]))
    organs = [one for one in candidates if np.count_nonzero(one.mask) > wanted and is_organ(image.array, one.mask)]
    # an organ with much fat in it has another median
    fat = [by_header] if proved and _air(image.array, by_header.mask) < _AIR_SHARE else []
    best = _clearly_best(image.array, [*fat, *organs])
    if best is None and not organs:
        raise DataError(
            f"{name}: the label does not fit its CT, neither by position nor with turned axes (median "
            f"{_median(image.array, by_header.mask)} HU inside it); check that both are of the same case"
        )
    if best is None:
        raise DataError(
            f"{name}: the label has {grid(label)}, its CT {grid(image)}, and the CT does not show clearly how it lies; "
            "give a label with all slices of the CT and the header that belongs to them"
        )
    return best.mask, [f"the label's position does not fit the CT; {best.note}, which does"] if best.note else []


def _box(index: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the first and last border (2, 3) of a volume in voxels of another; `index` (4, 4) leads there."""
    corners = np.array([[*corner, 1] for corner in product(*((-0.5, n - 0.5) for n in shape))])
    inside = corners @ index[:3].T
    return np.stack([inside.min(0), inside.max(0)])


def _placements(image: Volume, label: Volume, box: np.ndarray) -> Iterator[_Placement]:
    """Yield the label by its header, then shifted, then turned; `box` (2, 3) is what it covers, in voxels of the CT."""
    shape = image.array.shape
    shifts = [_shifts(first, last, n) for (first, last), n in zip(box.T, shape, strict=True)]
    margin = [max((abs(shift) for shift in of_axis), default=0) for of_axis in shifts]
    wide = _resampled_beyond(label, image, margin)
    yield _Placement(_window(wide, margin, shape, (0, 0, 0)), None)
    for axis, of_axis in enumerate(shifts):
        for shift in of_axis:
            offset = tuple(shift if a == axis else 0 for a in range(3))
            note = f"placed {abs(shift)} voxels {'further' if shift > 0 else 'back'} along {'xyz'[axis]}"
            yield _Placement(_window(wide, margin, shape, offset), note)
    if label.array.shape == shape:
        for axes in (axes for n in range(4) for axes in combinations(range(3), n)):
            how = f"axes {', '.join('xyz'[axis] for axis in axes)} turned" if axes else "voxel by voxel"
            yield _Placement(np.flip(label.array, axes), f"placed {how}")


def _shifts(first: float, last: float, n: int) -> list[int]:
    """Return the whole shifts, other than 0, that keep a label inside an axis of n voxels, or around it if longer.

    Parameters
    ----------
    first, last : float
        Borders of the label; those of the CT are -0.5 and n - 0.5.
    n : int
        Voxels of the CT.
    """
    low, high = sorted((round(-0.5 - first), round(n - 0.5 - last)))
    return [shift for shift in range(max(low, -_REACH), min(high, _REACH) + 1) if shift]


def _resampled_beyond(label: Volume, image: Volume, margin: Sequence[int]) -> np.ndarray:
    """Return the label on the grid of the CT, and `margin` voxels beyond it at both ends of each axis."""
    affine = image.affine.copy()
    affine[:3, 3] -= image.affine[:3, :3] @ np.array(margin)
    shape = [n + 2 * more for n, more in zip(image.array.shape, margin, strict=True)]
    return resample(label, Volume(np.broadcast_to(np.uint8(0), shape), affine), order=0)


def _window(wide: np.ndarray, margin: Sequence[int], shape: Sequence[int], shift: Sequence[int]) -> np.ndarray:
    """Return the part (X, Y, Z) of `wide` that lies on the CT once it is shifted."""
    starts = [more - along for more, along in zip(margin, shift, strict=True)]
    return wide[tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))]


# ---- what the CT shows -------------------------------------------------------------------------------------


def _clearly_best(ct: np.ndarray, placements: Sequence[_Placement]) -> _Placement | None:
    """Return the placement with the largest step over its border; None if it is small, or another one's is near."""
    if not placements:
        return None
    steps = [border_step(ct, one.mask) for one in placements]
    best = int(np.argmax([step.mean for step in steps]))
    if steps[best].mean < _LEAST_STEP_HU:
        return None
    for one, step in zip(placements, steps, strict=True):
        near = steps[best].mean - step.mean < _CLEAR * np.hypot(steps[best].error, step.error)
        if near and not np.array_equal(one.mask, placements[best].mask):
            return None
    return placements[best]


def border_step(ct: np.ndarray, mask: np.ndarray) -> _Step:
    """Return the mean step over the border of a mask, from the voxel outside to its neighbour inside, in HU.

    Parameters
    ----------
    ct, mask : ndarray, shape (X, Y, Z)
        Hounsfield units, and a mask with foreground.
    """
    (around,) = find_objects((mask != 0).astype(np.uint8))
    around = tuple(slice(max(0, along.start - 1), along.stop + 1) for along in around)
    values = np.clip(ct[around].astype(np.float32), *_WINDOW_HU)
    inside = (mask[around] != 0).astype(np.int8)
    steps = []
    for axis in range(3):
        border = np.diff(inside, axis=axis)
        steps.append((np.diff(values, axis=axis) * border)[border != 0])
    over = np.concatenate(steps)
    if over.size < 2:  # the mask fills the CT
        return _Step(0.0, 0.0)
    return _Step(float(over.mean()), float(over.std(ddof=1) / np.sqrt(over.size)))


def is_organ(ct: np.ndarray, mask: np.ndarray) -> bool:
    """Return whether a mask can be a soft organ: median 0 to 200 HU, less than 5 % below -200 HU; both (X, Y, Z)."""
    values = ct[mask != 0]
    if not values.size:
        return False
    low, high = _ANY_CT_TISSUE
    return bool(low <= np.median(values) <= high and _air(ct, mask) < _AIR_SHARE)


def _air(ct: np.ndarray, mask: np.ndarray) -> float:
    """Return the share of air inside a mask with foreground; both (X, Y, Z)."""
    return float(np.mean(ct[mask != 0] < _AIR_HU))


def _median(ct: np.ndarray, mask: np.ndarray) -> str:
    """Return the median inside a mask, for messages; both (X, Y, Z)."""
    values = ct[mask != 0]
    return f"{np.median(values):.0f}" if values.size else "no"
