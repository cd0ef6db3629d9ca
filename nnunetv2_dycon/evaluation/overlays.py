"""Overlays of a prediction on the truth: colours, outlines, and the part of a slice to show.

Colours are those of the paper's figures: true positive green, false negative blue, false positive red. They differ in
lightness too, and outlines repeat what they say.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

GREEN, RED, BLUE, YELLOW = "#7FD34E", "#D62728", "#1B2FB8", "#FFE94A"
KINDS = (
    (GREEN, "true positive"),
    (BLUE, "false negative"),
    (RED, "false positive"),
    (YELLOW, "another structure's label"),
)


def kinds(true: NDArray, predicted: NDArray) -> tuple[NDArray[np.bool_], ...]:
    """Return one mask for each entry of `KINDS`, in its order.

    Parameters
    ----------
    true, predicted : array
        Label maps of one shape, 0 for background.
    """
    return (
        (true == predicted) & (true > 0),
        (true > 0) & (predicted == 0),
        (true == 0) & (predicted > 0),
        (true > 0) & (predicted > 0) & (true != predicted),
    )


def colored(true: NDArray, predicted: NDArray) -> NDArray[np.float64]:
    """Return the overlay of two label maps (*S) as RGBA (*S, 4); background is transparent."""
    out = np.zeros((*true.shape, 4))
    for mask, (color, _) in zip(kinds(true, predicted), KINDS, strict=True):
        out[mask] = [*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)), 0.6]
    return out


def outline(axis: Axes, mask: NDArray[np.bool_], color: str, style: str, width: float = 1.2) -> None:
    """Draw the edge of a mask (Y, X); of an empty or a full one there is none."""
    if mask.any() and not mask.all():
        axis.contour(mask, levels=[0.5], colors=color, linewidths=width, linestyles=style)


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Return the box around the structures of a slice, with a margin; all of it where there is none."""
    box = []
    for axis in range(2):
        at = np.flatnonzero(mask.any(axis=1 - axis))
        if not at.size:
            return (slice(None), slice(None))
        margin = max(8, int(0.5 * (at[-1] - at[0] + 1)))
        box.append(slice(max(0, at[0] - margin), at[-1] + 1 + margin))
    return tuple(box)


def legend_handles(*, several: bool) -> list[Any]:
    """Return the entries of a legend; with `several` structures that of a wrong label too."""
    return [
        *(Patch(color=color, label=label) for color, label in KINDS[: 4 if several else 3]),
        Line2D([], [], color="white", linewidth=1.8, label="outline of truth"),
        Line2D([], [], color="black", linestyle="--", linewidth=1.6, label="outline of prediction"),
    ]
