"""Pictures of a comparison, as PNG files in memory.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. A label, a marker or an outline
always repeats the information of a colour.
"""

import io
import math
import textwrap
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.comparison import METRICS, Comparison, Method
from nnunetv2_dycon.evaluation.label_files import Labels, read_channel, read_label_map
from nnunetv2_dycon.evaluation.metrics import DISTANCES
from nnunetv2_dycon.evaluation.overlays import box_of, colored, legend_handles, outline
from nnunetv2_dycon.evaluation.statistics import FEWEST_FOR_RANKS
from nnunetv2_dycon.evaluation.tables import column_title

WIDTH = 12.4  # inches; at 100 dots per inch the width of a laptop's screen
DPI = 100
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "os^DvPX"
MOST_OVERLAYS = 6
PANELS = 4  # next to each other
LINEAR = 10  # Dice points up to which an axis of differences is linear
FAR_TICKS = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100)
LEGEND_CHARACTERS = 150  # that fit the width, with 8 for each marker
BINS = 10


class Picture(NamedTuple):
    """A PNG file with its name, title, alternative text and caption."""

    name: str
    title: str
    png: bytes
    alt: str
    caption: str


class Images(NamedTuple):
    """Folder of truth, folder of images (None: there are no images), and the labels of the data set."""

    truth: Path
    images: Path | None
    labels: Labels


def box_plots(comparison: Comparison) -> Picture:
    """Return a picture with one box per method and metric, and every case as a dot."""
    methods = comparison.methods
    figure, axes = _figure(1, len(METRICS), 1.3 + 0.5 * len(methods), sharey=True)
    jitter = np.random.default_rng(0)
    for axis, metric in zip(axes, METRICS, strict=True):
        for at, method in enumerate(methods):
            values = _scaled(comparison.per_case(method, metric), metric)
            if not values.size:
                continue
            color = _color(at)
            axis.boxplot(
                values,
                positions=[at],
                orientation="horizontal",
                widths=0.6,
                showfliers=False,
                medianprops={"color": "black", "linewidth": 1.8},
                boxprops={"color": color, "linewidth": 1.5},
                whiskerprops={"color": color},
                capprops={"color": color},
            )
            y = at + jitter.uniform(-0.2, 0.2, values.size)
            axis.plot(values, y, _marker(at), color=color, markersize=3.5, alpha=0.55)
        axis.set(xlabel=_axis_title(metric, comparison), yticks=range(len(methods)), ylim=(len(methods) - 0.4, -0.6))
        axis.set_yticklabels([_wrapped(method.short) for method in methods])
        axis.grid(axis="x", alpha=0.3)
    medians = ", ".join(f"{m.short} {_median(comparison, m, 'dice'):.1f} %" for m in methods)
    return Picture(
        "boxes",
        "Distribution over test cases",
        _png(figure),
        f"Box plots of {_listed(METRICS, comparison)} for {len(methods)} methods. Median Dice: {medians}.",
        "Each dot is a test case (mean over runs and classes); box: quartiles, black line: median, whiskers: 1.5 "
        f"times the quartile range.{_penalty_note(comparison)}",
    )


def paired_lines(comparison: Comparison) -> Picture:
    """Return a picture with one line per case through all methods, and the line of the means."""
    methods, cases = comparison.methods, comparison.cases
    figure, axes = _figure(1, len(METRICS), 3.5 + 0.12 * len(methods))
    for axis, metric in zip(axes, METRICS, strict=True):
        columns = [comparison.per_case(method, metric) for method in methods]
        table = np.array([[column.get(case, math.nan) for column in columns] for case in cases])
        table = table * _scale(metric)
        for line in table:
            axis.plot(line, color="0.6", linewidth=0.7, alpha=0.7, zorder=1)
        whole = table[np.isfinite(table).all(axis=1)]
        if len(whole):
            axis.plot(whole.mean(axis=0), color="black", linewidth=2, zorder=2)
            for at, mean in enumerate(whole.mean(axis=0)):
                marker = _marker(at)
                axis.plot([at], [mean], marker, color=_color(at), markeredgecolor="black", markersize=8, zorder=3)
        axis.set(ylabel=_axis_title(metric, comparison), xticks=range(len(methods)), xlim=(-0.4, len(methods) - 0.6))
        numbers = [str(at + 1) for at in range(len(methods))]  # the legend has the names, which may be long
        axis.set_xticklabels(numbers, fontsize=10 if len(methods) < 10 else 7)
        axis.grid(axis="y", alpha=0.3)
    handles = [
        Line2D([], [], color="0.6", linewidth=0.9, label="one test case"),
        Line2D([], [], color="black", linewidth=2, label="mean of the cases"),
    ]
    for at, method in enumerate(methods):
        style = {**_line(at), "markersize": 8, "markeredgecolor": "black", "linestyle": "none"}
        handles.append(Line2D([], [], label=_shown(f"{at + 1}: {method.short}"), **style))
    _legend(figure, handles)
    return Picture(
        "pairs",
        "The same cases with every method",
        _png(figure),
        f"Line plots of {_listed(METRICS, comparison)}: each of {len(cases)} test cases is a line through "
        f"{', '.join(m.short for m in methods)}; a thick line joins the means.",
        f"Lines that rise and fall together show cases that are hard for all.{_penalty_note(comparison)}",
    )


def size_and_gain(comparison: Comparison) -> Picture | None:
    """Return a picture of each method's gain in Dice by the volume of the structure, without upper bounds.

    None with fewer structures than a rank correlation needs, and for 2D images.
    """
    baseline, *others = (method for method in comparison.methods if not method.upper)
    volumes = comparison.volumes
    if not others or len(volumes) < FEWEST_FOR_RANKS:
        return None
    columns = min(PANELS, len(others))
    lines = math.ceil(len(others) / columns)
    figure, axes = _figure(lines, columns, 0.6 + 2.5 * lines, sharex=True, sharey=True)
    for empty in range(len(others), len(axes)):
        axes[empty].set_axis_off()
        axes[empty - columns].tick_params(labelbottom=True)
    for at, (axis, method) in enumerate(zip(axes, others, strict=False), 1):
        gains = comparison.gains(method)
        held = [comparison.results[method.name, label, "dice"].holds for label in gains]
        faces = [_color(at) if holds else "none" for holds in held]
        marker = _marker(at)
        sizes, points = [volumes[label] for label in gains], _scaled(gains, "dice")
        axis.axhline(0, color="black", linewidth=1)
        axis.scatter(sizes, points, s=24, marker=marker, facecolors=faces, edgecolors=_color(at), zorder=3)
        rank = comparison.gain_by_volume(method)
        correlation = "" if rank is None else f"\nrank correlation {rank:.2f}"
        axis.set_title(_wrapped(method.short) + correlation, fontsize=9)
        axis.set(xscale="log")
        axis.grid(alpha=0.3)
    far = max(abs(point) for method in others for point in _scaled(comparison.gains(method), "dice")) > LINEAR
    if far:  # one structure that is lost or found again would flatten all others
        axes[0].set_yscale("symlog", linthresh=LINEAR, linscale=1.5)
        axes[0].set_yticks(FAR_TICKS, [f"{tick}" for tick in FAR_TICKS])
        axes[0].minorticks_off()
    figure.supxlabel("Mean volume of the structure (ml)", fontsize=10)
    figure.supylabel(f"Dice (points) minus {_shown(baseline.short)}", fontsize=10)
    said = [f"{m.short} {rank:.2f}" for m in others if (rank := comparison.gain_by_volume(m)) is not None]
    return Picture(
        "sizes",
        "Size and gain",
        _png(figure),
        f"Scatter plots, one for each of {len(others)} methods: difference of the Dice to {baseline.short} by volume, "
        f"for {len(volumes)} structures. Rank correlation: {', '.join(said) or 'none'}.",
        "Each mark is a structure (mean over runs and test cases); filled: the difference holds. A positive rank "
        "correlation (Spearman) means that large structures gain more than small ones."
        + (f" The axis is linear up to {LINEAR} points and logarithmic beyond." if far else ""),
    )


def training_curves(comparison: Comparison) -> Picture | None:
    """Return a picture of losses and pseudo Dice by epoch of every training; None if no run has a log."""
    panels = ("training loss", "validation loss", "pseudo Dice")
    trainings: dict[tuple, tuple[int, Any]] = {}
    for at, method in enumerate(comparison.methods):
        for run in method.runs:
            if run.facts.curves:
                trainings.setdefault((run.training, run.facts.trainer, run.facts.fold), (at, run))
    if not trainings:
        return None
    figure, axes = _figure(1, len(panels), 3.7)
    handles: dict[str, Line2D] = {}
    for at, run in trainings.values():
        for axis, panel in zip(axes, panels, strict=True):
            series = run.facts.curves.get(panel, [])
            axis.plot(range(1, len(series) + 1), series, color=_color(at), linewidth=1.3, **_every(at, series))
        teacher = run.facts.curves.get("teacher's pseudo Dice", [])
        axes[-1].plot(range(1, len(teacher) + 1), teacher, "--", color=_color(at), linewidth=1)
        label = comparison.methods[at].short.removesuffix(" (student)").removesuffix(" (teacher)")
        handles.setdefault(label, Line2D([], [], label=_shown(label), **_line(at)))
    for axis, panel in zip(axes, panels, strict=True):
        axis.set(xlabel="epoch", ylabel=panel[0].upper() + panel[1:])
        axis.grid(alpha=0.3)
    if any("teacher's pseudo Dice" in run.facts.curves for _, run in trainings.values()):
        handles[""] = Line2D([], [], color="0.3", linestyle="--", label="its teacher")
    _legend(figure, list(handles.values()))
    return Picture(
        "curves",
        "Training",
        _png(figure),
        f"Curves of {', '.join(panels)} by epoch for {len(trainings)} trainings of {', '.join(filter(None, handles))}.",
        "One line per training. Pseudo Dice: mean over classes, on patches of the validation cases in an epoch.",
    )


# ---- calibration -----------------------------------------------------------------------------------------------


def calibration(comparison: Comparison, images: Images) -> Picture | None:
    """Return a picture of accuracy against confidence; None if no run has probabilities, or for regions.

    Only voxels that are foreground in truth or prediction count, since the many background voxels would hide them.
    Overlapping regions have no single confidence per voxel.
    """
    if any(len(structure.values) > 1 for structure in images.labels.structures):
        return None
    found = {at: curve for at, m in enumerate(comparison.methods) if (curve := _reliability(m, comparison, images))}
    if not found:
        return None
    figure, (axis, bars) = _figure(1, 2, 4.0)
    axis.plot([0, 1], [0, 1], ":", color="0.4", label="perfect")
    errors = {}
    for at, (count, confidence, right) in found.items():
        there = count > 0
        share, mean = right[there] / count[there], confidence[there] / count[there]
        errors[at] = float(np.sum(np.abs(share - mean) * count[there]) / count.sum())
        label = _shown(f"{comparison.methods[at].short} (ECE {100 * errors[at]:.1f} %)")
        axis.plot(mean, share, marker=_marker(at), color=_color(at), markersize=5, label=label)
        bars.plot((np.arange(BINS) + 0.5) / BINS, 100 * count / count.sum(), **_line(at))
    axis.set(xlabel="Confidence (largest probability)", ylabel="Share of voxels that are right")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    bars.set(xlabel="Confidence (largest probability)", ylabel="Voxels (%)", xlim=(0, 1))
    for one in (axis, bars):
        one.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False)
    said = ", ".join(f"{comparison.methods[at].short} {100 * error:.1f} %" for at, error in errors.items())
    return Picture(
        "calibration",
        "Calibration",
        _png(figure),
        f"Reliability diagram: share of right voxels against confidence. Expected calibration error: {said}.",
        f"Voxels that are foreground in truth or prediction, {BINS} bins, all cases and runs with probabilities. Below "
        "the diagonal a method is overconfident. ECE: expected calibration error, the mean distance to the diagonal.",
    )


def _reliability(method: Method, comparison: Comparison, images: Images) -> tuple[NDArray, NDArray, NDArray] | None:
    """Return the sums of `reliability_counts` over cases; None if a run lacks the probabilities of a case."""
    totals = np.zeros((3, BINS))
    for run in method.runs:
        for case in comparison.cases:
            path = run.predictions / f"{case}.npz"
            if not path.is_file():
                return None
            truth = read_label_map(images.truth / f"{case}{images.labels.ending}", images.labels, truth=True).labels
            totals += reliability_counts(_probabilities(path), truth, images.labels)
    return totals[0], totals[1], totals[2]


def _probabilities(path: Path) -> NDArray:
    try:
        with np.load(path) as archive:
            return archive["probabilities"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no probabilities of nnU-Net ({error}); predict again or delete it") from error


def reliability_counts(probabilities: NDArray, truth: NDArray, labels: Labels) -> NDArray[np.float64]:
    """Return number of voxels, sum of confidences and number of right voxels by confidence, shape (3, BINS).

    Parameters
    ----------
    probabilities : array, shape (C, X, Y, Z)
        As nnU-Net saves them: background, then the labels in order.
    truth : array, shape (X, Y, Z)
        Label values.
    labels : Labels
        Labels of the data set.

    Raises
    ------
    DataError
        If the shapes do not match.
    """
    values = np.array([0, *sorted(structure.values[0] for structure in labels.structures)])
    if probabilities.shape[0] != len(values) or math.prod(probabilities.shape[1:]) != truth.size:
        raise DataError(
            f"probabilities of shape {probabilities.shape} do not match {len(values)} labels and a truth of shape "
            f"{truth.shape}; predict again with --save_probabilities"
        )
    flat = probabilities.reshape(len(values), -1)
    winner, confidence = values[flat.argmax(0)], flat.max(0).astype(np.float64)
    true = truth.reshape(-1)
    used = ((winner > 0) | (true > 0)) & (true != (-1 if labels.ignore is None else labels.ignore))
    confidence, right = confidence[used], (winner == true)[used]
    at = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    return np.stack([np.bincount(at, weights, BINS) for weights in (None, confidence, right)])


# ---- overlays --------------------------------------------------------------------------------------------------


def overlays(comparison: Comparison, images: Images) -> Picture:
    """Return a picture of the best, median and worst case by mean Dice over methods, with each method's first run."""
    methods = comparison.methods[:MOST_OVERLAYS]
    dice = [comparison.per_case(method, "dice") for method in comparison.methods]
    mean = {case: float(np.mean([d[case] for d in dice if case in d])) for case in comparison.cases if case in dice[0]}
    if not mean:
        mean = dict.fromkeys(comparison.cases, 0.0)
    ranked = sorted(mean, key=lambda case: (-mean[case], case))
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    lines = max(_wrapped(method.short).count("\n") for method in methods)
    height = (8.4 if len(methods) < 4 else 6.6) + 0.14 * len(chosen) * lines
    figure, axes = _figure(len(chosen), len(methods) + 1, height)
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.1)
    several = len(comparison.labels) > 1
    for row, (title, case) in zip(axes.reshape(len(chosen), -1).tolist(), chosen.items(), strict=True):
        _overlay_row(
            row, f"{title} case, truth\n{_wrapped(case)}", case, methods, images, [d.get(case, math.nan) for d in dice]
        )
    handles = legend_handles(several=several)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, facecolor="0.75")
    legend.set_in_layout(True)
    seeds = {run.facts.seed for method in methods for run in method.runs[:1]} - {None}
    which = f"seed {seeds.pop()}" if len(seeds) == 1 else "the first run of each method"
    return Picture(
        "overlays",
        "Best, median and worst case",
        _png(figure),
        f"Slices of the cases {', '.join(f'{case} ({title})' for title, case in chosen.items())} with truth and the "
        f"predictions of {', '.join(m.short for m in methods)}: true positive green, false negative blue, false "
        "positive red.",
        f"Cases by mean Dice over all methods. Shown: {which}, in the slice with the most labelled voxels. The Dice "
        "next to a method is the mean over its runs and classes in the whole case. False negatives lie inside the "
        "solid outline, false positives inside the dashed one."
        + (f" Only the first {MOST_OVERLAYS} methods are shown." if len(comparison.methods) > MOST_OVERLAYS else ""),
    )


def _overlay_row(
    row: Sequence[Axes], title: str, case: str, methods: Sequence[Method], images: Images, dice: Sequence[float]
) -> None:
    name = f"{case}{images.labels.ending}"
    truth = read_label_map(images.truth / name, images.labels, truth=True)
    found = [read_label_map(m.runs[0].predictions / name, images.labels, truth=False).labels for m in methods]
    known = truth.labels != (-1 if images.labels.ignore is None else images.labels.ignore)
    true = np.where(known, truth.labels, 0)
    image = _image(images, case, true.shape)
    spacing = truth.spacing[-2:]
    if true.ndim == 3:
        area = np.count_nonzero(true, axis=(1, 2))
        at = int(np.argmax(area if area.any() else sum(np.count_nonzero(f, axis=(1, 2)) for f in found)))
        true, image, known, found = true[at], image[at], known[at], [f[at] for f in found]
    box = box_of((true > 0) | np.any([f > 0 for f in found], axis=0))
    true, image, known = true[box], image[box], known[box]
    low, high = np.percentile(image, (0.5, 99.5))
    for axis, predicted in zip(row, [None, *(f[box] for f in found)], strict=True):
        axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=spacing[0] / spacing[1])
        if predicted is not None:
            axis.imshow(colored(true, np.where(known, predicted, 0)), aspect=spacing[0] / spacing[1])
            outline(axis, predicted > 0, "black", "dashed")
        outline(axis, true > 0, "white", "solid")
        axis.set(xticks=[], yticks=[])
    row[0].set_title(title, fontsize=8)
    for axis, method, value in zip(row[1:], methods, dice, strict=False):
        axis.set_title(f"{_wrapped(method.short)}\nDice {100 * value:.1f} %", fontsize=8)


def _image(images: Images, case: str, shape: tuple[int, ...]) -> NDArray:
    path = images.images / f"{case}_0000{images.labels.ending}" if images.images else None
    return read_channel(path, images.labels, shape) if path and path.is_file() else np.zeros(shape)


# ---- helpers ---------------------------------------------------------------------------------------------------


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, NDArray]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")  # no pyplot: no state, no window
    FigureCanvasAgg(figure)
    return figure, np.ravel(figure.subplots(rows, columns, **options))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font lacks; the tables have it
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _color(at: int) -> str:
    return COLORS[at % len(COLORS)]


def _marker(at: int) -> str:
    """Return a method's marker: where colours begin again, another one than before."""
    return MARKERS[(at + at // len(COLORS)) % len(MARKERS)]


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Add a legend below, with as many columns as the names leave room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, LEGEND_CHARACTERS // (longest + 8)))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, frameon=False)


def _line(at: int) -> dict[str, Any]:
    return {"color": _color(at), "marker": _marker(at), "markersize": 5}


def _every(at: int, series: Sequence[float]) -> dict[str, Any]:
    return {"marker": _marker(at), "markersize": 4, "markevery": max(1, len(series) // 8)}


def _wrapped(text: str) -> str:
    """Return a name in lines that fit above a narrow panel, broken after underscores if possible."""
    spaced = textwrap.fill(text.replace("_", "_ "), 22, break_long_words=True, break_on_hyphens=False)
    return _shown(spaced.replace("_ ", "_"))


def _shown(text: str) -> str:
    """Return a name as matplotlib shows it: no formula between dollars, no legend entry hidden for an underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _scale(metric: str) -> float:
    return 1.0 if metric in DISTANCES else 100.0


def _scaled(values: Mapping[str, float], metric: str) -> NDArray[np.float64]:
    return np.array(list(values.values())) * _scale(metric)


def _median(comparison: Comparison, method: Method, metric: str) -> float:
    values = _scaled(comparison.per_case(method, metric), metric)
    return float(np.median(values)) if values.size else math.nan


def _axis_title(metric: str, comparison: Comparison) -> str:
    arrow = {"↑": "higher is better", "↓": "lower is better"}
    title = column_title(metric, comparison.unit)
    return f"{title[:-2]}\n{arrow[title[-1]]}"


def _listed(metrics: Sequence[str], comparison: Comparison) -> str:
    return ", ".join(column_title(metric, comparison.unit)[:-2] for metric in metrics)


def _penalty_note(comparison: Comparison) -> str:
    missed = any(comparison.status(m, s) for m in comparison.methods for s in ("missed", "false_alarm"))
    return " Distances: a missed structure or a false alarm counts as the image's diagonal." if missed else ""
