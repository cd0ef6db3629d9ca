"""Label maps on the grid of their image, with the values of the data set."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
from scipy.ndimage import affine_transform

from nnunetv2_dycon.conversion.volumes import Volume
from nnunetv2_dycon.errors import DataError

TOLERANCE_MM = 1e-3
TOLERANCE_VOXELS = 0.01  # two programs round headers differently

Fit = Callable[[Volume, Volume, str], tuple[np.ndarray, list[str]]]


def map_values(array: np.ndarray, maps: Sequence[Mapping[int, int]], name: str, hint: str = "") -> np.ndarray:
    """Return `array` with new values, uint8; the first of `maps` that knows all its values is used.

    Parameters
    ----------
    array : array, shape (X, Y, Z)
        Label values of the source.
    maps : sequence of mapping
        Candidates from source values to labels; the first that knows every value is taken.
    name : str
        File name, for messages.
    hint : str
        What to do; ends the error message.

    Raises
    ------
    DataError
        If a value is not a whole number, or is unknown; nothing is rounded.
    """
    if array.dtype.kind == "f":
        broken = array[~(np.isfinite(array) & (array == np.rint(array)))]
        if broken.size:
            raise DataError(
                f"{name} has {broken.size} voxels that are not whole numbers, such as {broken.flat[0]:g}; "
                "a label map must hold integers: get the original file, not a resampled one"
            )
    values = present(array)
    for known in maps:
        if values <= known.keys():
            return _apply(array, known)
    allowed = " or ".join("{" + ", ".join(map(str, known)) + "}" for known in maps)
    closest = max(maps, key=lambda known: len(values & known.keys()))
    unknown = min(values - closest.keys())
    count = int(np.count_nonzero(array == unknown))
    raise DataError(f"{name} has the label value {unknown} ({count} voxels); expected is {allowed}{hint}")


def present(array: np.ndarray) -> set[int]:
    """Return the values in an array (X, Y, Z) of whole numbers."""
    # by slices, since np.unique sorts a copy of its input
    return {int(value) for part in array.T for value in np.unique(part)}


def _apply(array: np.ndarray, known: Mapping[int, int]) -> np.ndarray:
    """Return an array (X, Y, Z) with new values, uint8."""
    out = np.zeros(array.shape, np.uint8)
    for old, new in known.items():
        if new:
            out[array == old] = new
    return out


# ---- grids -------------------------------------------------------------------------------------------------


def same_grid(one: Volume, other: Volume) -> bool:
    """Return whether two volumes have the same voxels in millimetres, apart from rounding in their headers."""
    if one.array.shape != other.array.shape:
        return False
    apart = np.abs(_corners(one) - _corners(other)).max()
    return bool(apart <= max(TOLERANCE_MM, TOLERANCE_VOXELS * one.spacing.min()))


def _corners(volume: Volume) -> np.ndarray:
    """Return the corner voxels in mm, (8, 3)."""
    indices = np.array(list(product(*((0, n - 1) for n in volume.array.shape))), float)
    return indices @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def on_grid(image: Volume, label: Volume, name: str) -> tuple[np.ndarray, list[str]]:
    """Return the label (X, Y, Z) unchanged, if it is on the grid of its image, and no notes.

    Parameters
    ----------
    image : Volume
        The image.
    label : Volume
        The label map.
    name : str
        File name, for messages.

    Raises
    ------
    DataError
        If the grids differ in shape or by more than rounding.
    """
    if not same_grid(image, label):
        raise DataError(f"{name}: mask and image are on different grids ({grid(label)} and {grid(image)})")
    return label.array, []


def grid(volume: Volume) -> str:
    """Return shape, spacing and origin, for messages."""
    spacing = " x ".join(f"{s:.4g}" for s in volume.spacing)
    origin = ", ".join(f"{o:.5g}" for o in volume.affine[:3, 3])
    return f"{' x '.join(map(str, volume.array.shape))} voxels of {spacing} mm from ({origin})"


def resample(volume: Volume, onto: Volume, order: int) -> np.ndarray:
    """Return the values of `volume` at the voxels of `onto` by position in mm, (X, Y, Z); 0 outside `volume`.

    Parameters
    ----------
    volume : Volume
        The values.
    onto : Volume
        The new grid.
    order : int
        0 is nearest neighbour, 1 is linear.
    """
    index = np.linalg.inv(volume.affine) @ onto.affine
    flips = flips_between(index, volume.array.shape, onto.array.shape)
    if flips is not None:
        return np.flip(volume.array, flips)
    return affine_transform(
        volume.array, index[:3, :3], index[:3, 3], onto.array.shape, order=order, mode="grid-constant", cval=0
    )


def flips_between(index: np.ndarray, shape: Sequence[int], onto: Sequence[int]) -> tuple[int, ...] | None:
    """Return the axes to flip, if a matrix (4, 4) between voxel indices only flips axes; None otherwise."""
    signs = np.sign(np.diag(index)[:3])
    offset = np.where(signs < 0, np.array(shape) - 1, 0)
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = np.diag(signs), offset
    slack = np.abs(index - exact)
    if tuple(shape) != tuple(onto) or slack[:3, :3].max() * max(shape) > 0.1 or slack[:3, 3].max() > 0.1:
        return None
    return tuple(int(axis) for axis in np.flatnonzero(signs < 0))
