"""Contact sheets: one tile for each case, image and dual entropy next to each other."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from nnunetv2_dycon.evaluation.overlays import outline
from nnunetv2_dycon.pictures.canvas import ENTROPY_MAP, new_figure, show_gray, shown

COLUMNS, ROWS = 3, 4
STUDENT, TEACHER = "#56B4E9", "#E69F00"


class Tile(NamedTuple):
    """A slice of a case: image and dual entropy in [0, 1], both (Y, X), masks of both networks, pixel proportion."""

    title: str
    image: NDArray
    entropy: NDArray
    student: NDArray
    teacher: NDArray
    aspect: float


def contact_sheet(tiles: Sequence[Tile], title: str) -> Figure:
    """Return a page of at most `COLUMNS` times `ROWS` tiles.

    Parameters
    ----------
    tiles : sequence of Tile
        In order.
    title : str
        Above the page.
    """
    rows = max(1, -(-len(tiles) // COLUMNS))
    figure, axes = new_figure(rows, 2 * COLUMNS, 12.0, 0.9 + 2.3 * rows)
    shades = None
    top = max([float(tile.entropy.max()) for tile in tiles] + [1e-6])
    for at, (left, right) in enumerate(axes.reshape(-1, 2).tolist()):
        if at >= len(tiles):
            left.axis("off")
            right.axis("off")
            continue
        tile = tiles[at]
        show_gray(left, tile.image, tile.aspect)
        outline(left, tile.student, STUDENT, "solid")
        outline(left, tile.teacher, TEACHER, "dashed")
        shades = right.imshow(tile.entropy, cmap=ENTROPY_MAP, vmin=0, vmax=top, aspect=tile.aspect)
        right.set(xticks=[], yticks=[])
        left.set_title(shown(tile.title), fontsize=8, loc="left")
    if shades is not None:
        figure.colorbar(
            shades, ax=axes[:, -1].tolist(), label="dual entropy (share of the largest possible)", shrink=0.8
        )
    handles = [
        Line2D([], [], color=STUDENT, label="outline of the student"),
        Line2D([], [], color=TEACHER, linestyle="--", label="outline of the teacher"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(shown(title), fontsize=10)
    return figure
