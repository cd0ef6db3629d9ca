"""Slices of volumes: in which plane, which one, and in which proportion."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Plane(NamedTuple):
    """Slices along one axis of arrays (Z, Y, X); `aspect` is height over width of a pixel in mm."""

    axis: int
    aspect: float

    def of(self, volume: NDArray, at: int) -> NDArray:
        """Return slice `at` of a volume."""
        return np.take(volume, at, axis=self.axis)


def plane_of(spacing: Sequence[float]) -> Plane:
    """Return the plane in which an image was taken: across the axis of the largest spacing, of equal ones the first.

    Parameters
    ----------
    spacing : sequence of float
        In mm, one number for each axis.

    Examples
    --------
    >>> plane_of((5.0, 0.5, 1.0))
    Plane(axis=0, aspect=0.5)
    """
    axis = int(np.argmax(spacing))
    height, width = (step for at, step in enumerate(spacing) if at != axis)
    return Plane(axis, float(height / width))


def fullest(weight: NDArray, plane: Plane) -> int:
    """Return the slice with the largest sum of a volume (Z, Y, X); the middle one where all is 0."""
    sums = weight.sum(axis=tuple(at for at in range(3) if at != plane.axis), dtype=np.float64)
    return int(sums.argmax()) if sums.any() else len(sums) // 2


def spread(weight: NDArray, plane: Plane, number: int) -> list[int]:
    """Return slices that divide a weight (Z, Y, X) into equal parts, each once, in order.

    Parameters
    ----------
    weight : array
        Not negative; where all is 0, slices are spread over the volume.
    plane : Plane
        The plane.
    number : int
        How many; fewer where the weight is in fewer slices.
    """
    sums = weight.sum(axis=tuple(at for at in range(3) if at != plane.axis), dtype=np.float64)
    if not sums.any():
        sums = np.ones(len(sums))
    share = np.cumsum(sums) / sums.sum()
    wanted = (np.arange(number) + 0.5) / number
    return sorted({int(np.searchsorted(share, one)) for one in wanted})


def as_volume(values: NDArray) -> NDArray:
    """Return an array (Y, X) as (1, Y, X); (Z, Y, X) as it is."""
    return values[None] if values.ndim == 2 else values
