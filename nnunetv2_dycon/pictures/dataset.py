"""The structures of a data set: how many pieces, how large, how scattered, and how rare (supplement, Fig. 1)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy import ndimage
from tqdm import tqdm

from nnunetv2_dycon import parallel
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.data.raw_cases import raw_cases
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.figures import COLORS, MARKERS
from nnunetv2_dycon.evaluation.label_files import Labels, read_label_map, read_labels
from nnunetv2_dycon.pictures.canvas import Drawn, make_folder, new_figure, save_figure, shown, write_rows

HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++")
_SIDE_BY_SIDE = 7  # structures in one histogram


class Pieces(NamedTuple):
    """The connected pieces of a structure in a case, touching by faces, edges or corners.

    Attributes
    ----------
    case, structure : str
        Names.
    volumes_ml : tuple of float
        One for each piece, the largest first.
    share : float
        Of the image's voxels that are labelled, in [0, 1].
    scatter_mm : float
        Mean distance of the pieces' centroids from their own centroid; 0 for one piece, NaN for none.
    """

    case: str
    structure: str
    volumes_ml: tuple[float, ...]
    share: float
    scatter_mm: float


def pieces_of(mask: NDArray[np.bool_], spacing: Sequence[float], known: int) -> tuple[tuple[float, ...], float, float]:
    """Return volumes in ml, share of the image and scatter in mm of the connected pieces of a mask.

    Parameters
    ----------
    mask : array, shape (Z, Y, X) or (Y, X)
        The structure.
    spacing : sequence of float
        In mm, one number for each axis; a 2D image counts as 1 mm thick.
    known : int
        Voxels of the image with a label.

    Examples
    --------
    Two voxels of 1 x 2 x 5 mm, two voxels apart along the first axis:

    >>> mask = np.zeros((3, 1, 1), bool)
    >>> mask[[0, 2]] = True
    >>> pieces_of(mask, (1.0, 2.0, 5.0), 3)
    ((0.01, 0.01), 0.6666666666666666, 1.0)
    """
    components, number = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))
    if not number:
        return (), 0.0, math.nan
    sizes = np.bincount(components.ravel())[1:]
    volumes = sizes * math.prod(spacing) / 1000
    centers = np.array(ndimage.center_of_mass(mask, components, range(1, number + 1))) * np.asarray(spacing)
    scatter = np.linalg.norm(centers - centers.mean(0), axis=1).mean()
    return tuple(sorted(map(float, volumes), reverse=True)), float(sizes.sum() / known), float(scatter)


class _Task(NamedTuple):
    case: str
    path: Path
    labels: Labels


def _measure(task: _Task) -> list[Pieces]:
    truth = read_label_map(task.path, task.labels, truth=True)
    known = truth.labels.size
    if task.labels.ignore is not None:
        known -= int(np.count_nonzero(truth.labels == task.labels.ignore))
    found = []
    for structure in task.labels.structures:
        mask = np.isin(truth.labels, structure.values)
        found.append(Pieces(task.case, structure.name, *pieces_of(mask, truth.spacing, max(known, 1))))
    return found


def plot_dataset(dataset_id: int | str, output: str | Path | None = None, processes: int | None = None) -> Drawn:
    """Draw how many pieces the structures of the labelled cases have, how large and how scattered they are.

    Only label maps of labelled training cases are opened, never one of a case that a fold uses without labels.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    output : path, optional
        Folder to write; by default `DATASET_pictures` in the present folder.
    processes : int, optional
        Worker processes; one per processor, at most 8, by default.

    Returns
    -------
    Drawn
        One figure; PNG, SVG, and the numbers behind them: one line for each case and structure, one for each piece.

    Raises
    ------
    DataError
        If there is no labelled case, or a label map cannot be used.
    """
    folder, content = find_raw(dataset_id)
    raw = raw_cases(folder, content)
    paths = {case: path for case in raw.labeled if (path := raw.truth(case)) is not None}
    if not paths:
        raise DataError(f"{folder / 'labelsTr'} has no label map of a labelled case; there is nothing to draw")
    labels = read_labels(folder / "dataset.json", next(iter(paths.values())).parent)
    tasks = [_Task(case, path, labels) for case, path in paths.items()]
    results = parallel.run(_measure, tasks, processes)
    measured = {task.case: pieces for task, pieces in tqdm(results, total=len(tasks), desc="Measuring label maps")}
    pieces = [one for case in sorted(measured) for one in measured[case]]
    figure = draw_dataset(pieces, folder.name)
    out = make_folder(Path(f"{folder.name}_pictures") if output is None else Path(output))
    rows = [[p.case, p.structure, len(p.volumes_ml), sum(p.volumes_ml), 100 * p.share, p.scatter_mm] for p in pieces]
    header = ["case", "structure", "pieces", "volume (ml)", "share of the image (%)", "scatter (mm)"]
    each = [[p.case, p.structure, at, volume] for p in pieces for at, volume in enumerate(p.volumes_ml, start=1)]
    files = [
        *save_figure(figure, out, "dataset"),
        write_rows(out / "dataset.csv", header, rows),
        write_rows(out / "dataset_pieces.csv", ["case", "structure", "piece", "volume (ml)"], each),
    ]
    return Drawn((figure,), tuple(files))


def draw_dataset(pieces: Sequence[Pieces], title: str) -> Figure:
    """Return the figure: number of pieces, their volumes, their scatter, and the share of each structure.

    Parameters
    ----------
    pieces : sequence of Pieces
        One for each case and structure.
    title : str
        Name of the data set.
    """
    names = list(dict.fromkeys(one.structure for one in pieces))
    cases = len({one.case for one in pieces})
    figure, axes = new_figure(2, 2, 11.0, 7.2 + 0.12 * max(0, len(names) - 8))
    counts, sizes, scatter, share = axes.ravel()
    by_name = {name: [one for one in pieces if one.structure == name] for name in names}
    _histogram(counts, {n: [len(p.volumes_ml) for p in of] for n, of in by_name.items()}, whole=True)
    counts.set(xlabel="connected pieces in a case", ylabel="cases")
    _histogram(sizes, {n: [v for p in of for v in p.volumes_ml] for n, of in by_name.items()}, whole=False)
    sizes.set(xlabel="volume of a piece (ml)", ylabel="pieces")
    for at, (name, of_name) in enumerate(by_name.items()):
        several = [p for p in of_name if p.volumes_ml]
        scatter.plot(
            [len(p.volumes_ml) for p in several],
            [p.scatter_mm for p in several],
            MARKERS[at % len(MARKERS)],
            color=COLORS[at % len(COLORS)],
            alpha=0.6,
            markersize=5,
            label=shown(name),
        )
    scatter.set(xlabel="connected pieces in a case", ylabel="mean distance from their centroid (mm)")
    scatter.set(xlim=(0, None), ylim=(0, max([1.0] + [1.1 * p.scatter_mm for p in pieces if p.volumes_ml])))
    for axis in (scatter, counts, sizes):
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    scatter.xaxis.set_major_locator(MaxNLocator(integer=True))
    scatter.grid(alpha=0.3)
    _shares(share, by_name)
    handles, texts = counts.get_legend_handles_labels()
    if not handles:
        handles, texts = scatter.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    figure.suptitle(shown(f"{title}: {cases} labelled case{'s' * (cases != 1)}"))
    return figure


def _histogram(axis: Axes, values: Mapping[str, Sequence[float]], *, whole: bool) -> None:
    """Draw bars for each structure, next to each other; volumes on a logarithmic scale."""
    few = {name: list(numbers) for name, numbers in list(values.items())[:_SIDE_BY_SIDE]}
    if len(values) > _SIDE_BY_SIDE:
        few = {"all structures": [number for numbers in values.values() for number in numbers]}
    every = [number for numbers in few.values() for number in numbers]
    if not every:
        axis.text(0.5, 0.5, "nothing is labelled", ha="center", va="center", transform=axis.transAxes)
        return
    if whole and max(every) <= 20:
        bins = np.arange(-0.5, max(every) + 1)
        axis.set_xticks(range(int(max(every)) + 1))
    elif whole:
        bins = np.linspace(0, max(every), 21)
    else:
        low, high = min(every), max(every)
        bins = np.geomspace(low * 0.999, high * 1.001, 16)
        if high / low > 3:
            axis.set_xscale("log")
    bars: Any = axis.hist(list(few.values()), bins=list(bins), label=[shown(name) for name in few])[2]
    for at, container in enumerate([bars] if len(few) == 1 else bars):
        for bar in container:
            bar.set(facecolor=COLORS[at % len(COLORS)], hatch=HATCHES[at % len(HATCHES)], edgecolor="white")
    axis.grid(axis="y", alpha=0.3)


def _shares(axis: Axes, by_name: Mapping[str, Sequence[Pieces]]) -> None:
    """Draw the share of the image that is each structure: a box over the cases that have it."""
    values = [[100 * one.share for one in of_name if one.share > 0] for of_name in by_name.values()]
    boxes = axis.boxplot(
        values, orientation="horizontal", widths=0.6, patch_artist=True, medianprops={"color": "black", "linewidth": 2}
    )
    for at, box in enumerate(boxes["boxes"]):
        box.set(facecolor=COLORS[at % len(COLORS)], hatch=HATCHES[at % len(HATCHES)], edgecolor="white")
    means = [100 * float(np.mean([one.share for one in of_name])) for of_name in by_name.values()]
    names = [f"{shown(name)}\nmean {mean:.2g} %" for name, mean in zip(by_name, means, strict=True)]
    axis.set_yticks(range(1, len(values) + 1), names)
    axis.invert_yaxis()
    every = [value for of_name in values for value in of_name]
    if every and max(every) / min(every) > 20:
        axis.set_xscale("log")
    axis.set_xlabel("share of the image (%), in cases that have the structure")
    axis.grid(axis="x", alpha=0.3)
