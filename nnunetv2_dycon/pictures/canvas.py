"""What all pictures share: figures without a window, PNG and SVG files, and the numbers behind them as CSV."""

import csv
import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nnunetv2_dycon.files import whole_file, write_text, writing

DPI = 120
ENTROPY_MAP = "magma"  # its lightness rises evenly, so that it is read without hue
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "nnunetv2_dycon", "image.interpolation": "none"}


class Drawn(NamedTuple):
    """What a picture command made: its figures, one for each page, and the files that it wrote."""

    figures: tuple[Figure, ...]
    files: tuple[Path, ...]


def new_figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, NDArray]:
    """Return a figure, without pyplot's state, and its axes in an array (rows, columns).

    Parameters
    ----------
    rows, columns : int
        Panels.
    width, height : float
        Inches.
    options
        As `Figure.subplots`.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or not at all; returns both.

    Parameters
    ----------
    figure : Figure
        What to write.
    folder : Path
        Its folder exists.
    name : str
        File name without ending.
    """
    written = []
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font lacks; the CSV has it
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = folder / f"{name}.{ending}"
            with whole_file(path) as part:
                figure.savefig(part, format=ending, metadata=metadata)
            written.append(path)
    return written


def save_pages(figures: Sequence[Figure], folder: Path, name: str) -> list[Path]:
    """Write pages as `save_figure`; where there are several, numbers follow the name. Earlier pages go away."""
    remove_pages(folder, name)
    one = len(figures) == 1
    names = [name if one else f"{name}_{at}" for at in range(1, len(figures) + 1)]
    return [
        path for figure, of_page in zip(figures, names, strict=True) for path in save_figure(figure, folder, of_page)
    ]


def remove_pages(folder: Path, name: str) -> None:
    """Delete the pages of an earlier run, and nothing else of such a name."""
    for old in list(folder.iterdir()):
        if re.fullmatch(rf"{re.escape(name)}_\d+\.(png|svg)", old.name):
            old.unlink()


def make_folder(folder: Path) -> Path:
    """Make a folder for pictures, and its parents; WriteError where that is not possible."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a table as CSV, whole or not at all; numbers have six digits. Returns the path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_text(path, text.getvalue())
    return path


def _cell(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value


def shown(text: str) -> str:
    """Return a name as matplotlib shows it: no formula between dollars, no legend entry hidden for an underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def wrapped(text: str, width: int = 26) -> str:
    """Return a name as `shown`, in lines that fit above a panel, broken after underscores if possible."""
    spaced = textwrap.fill(text.replace("_", "_ "), width, break_long_words=True, break_on_hyphens=False)
    return shown(spaced.replace("_ ", "_"))


def show_gray(axis: Axes, image: NDArray, aspect: float) -> None:
    """Draw a slice (Y, X) in grey between its outer half percents, pixels in true proportion, without ticks."""
    low, high = np.percentile(image, (0.5, 99.5)) if image.size else (0.0, 1.0)
    axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
    axis.set(xticks=[], yticks=[])
