"""Surfaces of label maps in millimetres, each face in the colour of what lies inside of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LightSource, to_rgb
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from nnunetv2_dycon.evaluation.overlays import KINDS, kinds

_LONGEST = 96  # cells along an axis: more faces than can be seen cost minutes


class Surface(NamedTuple):
    """Triangles (n, 3, 3) with corners (Z, Y, X) in mm, and the number of each one's kind in `KINDS` (n,)."""

    triangles: NDArray[np.float64]
    kind: NDArray[np.intp]


def surface_of(true: NDArray, predicted: NDArray, spacing: Sequence[float]) -> Surface | None:
    """Return the surface of what either label map has; None where both are empty.

    Parameters
    ----------
    true, predicted : array, shape (Z, Y, X)
        Label maps.
    spacing : sequence of float
        In mm.
    """
    either = (true > 0) | (predicted > 0)
    if not either.any():
        return None
    box = tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(either))
    step = max(1, -(-max(either[box].shape) // _LONGEST))
    kind = np.full(either[box].shape, -1)
    for number, mask in enumerate(kinds(true[box], predicted[box])):
        kind[mask] = number
    kind = np.pad(_coarser(kind, step), 1, constant_values=-1)
    scale = np.asarray(spacing, float) * step
    points, faces, _, _ = marching_cubes((kind >= 0).astype(np.float32), 0.5)
    cells = np.argwhere(kind >= 0)
    _, nearest = cKDTree(cells).query(points[faces].mean(1))
    found = kind[tuple(cells[nearest].T)]
    start = np.array([one.start for one in box])
    return Surface(((points - 1) * scale + start * np.asarray(spacing))[faces], found)


def _coarser(kind: NDArray, step: int) -> NDArray:
    """Return the kinds of blocks of `step` voxels: the largest number in a block, so that errors are not lost."""
    if step == 1:
        return kind
    pad = [(0, -size % step) for size in kind.shape]
    padded = np.pad(kind, pad, constant_values=-1)
    shape = [part for size in padded.shape for part in (size // step, step)]
    return padded.reshape(shape).max(axis=(1, 3, 5))


def _unit(vectors: NDArray) -> NDArray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def draw_surface(axis: Any, surface: Surface | None) -> None:
    """Draw a surface with light from above, in true proportion.

    Parameters
    ----------
    axis : Axes
        A 3D axis.
    surface : Surface or None
        What to draw; for None the axis says that there is nothing.
    """
    axis.set_axis_off()
    if surface is None:
        axis.text2D(0.5, 0.5, "nothing is segmented", ha="center", va="center", transform=axis.transAxes)
        return
    triangles = surface.triangles[..., ::-1]  # X, Y, Z
    across = _unit(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]))
    light = LightSource(azdeg=225, altdeg=45)
    shade = 0.55 + 0.45 * np.abs(across @ light.direction)
    colors = np.array([to_rgb(color) for color, _ in KINDS])[surface.kind] * shade[:, None]
    axis.add_collection3d(Poly3DCollection(triangles, facecolors=colors, edgecolors="none", rasterized=True))
    low, high = triangles.min((0, 1)), triangles.max((0, 1))
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axis.set_box_aspect(np.maximum(high - low, 1e-3), zoom=1.15)
    axis.view_init(elev=20, azim=-60)
