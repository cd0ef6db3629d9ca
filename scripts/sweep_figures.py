"""Figures of sweeps: Dice and HD95 against gamma and K (top-k), and bars for frameworks with and without DyCON.

They are like Figs. 5, 6 and 7 of the paper's supplement, with the spread over runs. Cost: seconds. The script reads
every scores.json below the given folders. `evaluate`, `compare` and the workflow leave it in a folder named after the
run: TRAINER_student, or 03_TRAINER_teacher. The script writes sweep_gamma.png, sweep_topk.png and frameworks.png, each
if there are at least two values to show, and a .csv with the same numbers next to each.

    python scripts/sweep_figures.py experiments/hippocampus/scores -o figures
"""

import argparse
import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.evaluation.figures import COLORS, MARKERS

SWEEPS = {"gamma": "γ, focal exponent of FeCL", "topk": "K, hardest teacher negatives of FeCL"}
# framework: trainer without and with DyCON
FRAMEWORKS = {
    "mean teacher": ("nnUNetTrainerMeanTeacher", "nnUNetTrainerDyCON"),
    "co-training": ("nnUNetTrainerCPS", "nnUNetTrainerDyCONCPS"),
    "copy-paste": ("nnUNetTrainerBCP", "nnUNetTrainerDyCONBCP"),
    "cubes": ("nnUNetTrainerMagicNet", "nnUNetTrainerDyCONMagicNet"),
    "cubes, ga": ("nnUNetTrainerGAMagicNet", "nnUNetTrainerDyCONGAMagicNet"),
}
PANELS = ("Dice (%) ↑", "HD95 (mm) ↓")
HATCHES = ("", "///")


class Score(NamedTuple):
    """One run: data set (with the labelled number, without the draw), trainer name, weights, Dice in %, HD95 in mm.

    `folder` has its scores.json and scores.csv.
    """

    data: str
    trainer: str
    weights: str
    dice: float
    hd95: float
    folder: Path

    @property
    def base(self) -> str:
        """Trainer without options."""
        return self.trainer.split("_")[0]

    def without(self, *options: str) -> str:
        """Return the trainer name without some options, which runs of one method share."""
        kept = [part for part in self.trainer.split("_") if option_of(part)[0] not in options]
        return "_".join(kept)

    def value(self, option: str) -> float | None:
        """Return the value of a numeric option; None if the name does not have it."""
        values = [text for name, text in map(option_of, self.trainer.split("_")[1:]) if name == option]
        return float(values[0].replace("p", ".")) if values else None


class Pair(NamedTuple):
    """The runs of a framework on a data set, alone and with DyCON's losses.

    `framework` also names the options that not all pairs on this data set have.
    """

    framework: str
    data: str
    weights: str
    alone: list[Score]
    with_dycon: list[Score]


Rows = list[tuple[str, str, float, float, float]]  # group, label on the x axis, value there, Dice, HD95


def option_of(part: str) -> tuple[str, str]:
    """Return name and value of a part of a trainer name.

    Examples
    --------
    >>> option_of("gamma0p5"), option_of("bf16")
    (('gamma', '0p5'), ('bf', '16'))
    """
    name, value = re.fullmatch(r"([A-Za-z]*)(.*)", part, re.DOTALL).groups()
    return name, value


def read_scores(folders: Iterable[Path]) -> list[Score]:
    """Return one score per scores.json; HD95 counts a missed structure as the image's diagonal.

    Raises
    ------
    DataError
        If there is no scores.json, one cannot be read or has distances in voxels, or runs are there twice.
    """
    found, places = {}, defaultdict(set)
    for folder in folders:
        for path in sorted(folder.rglob("scores.json")):
            run, _, weights = re.sub(r"^\d+_", "", path.parent.name).rpartition("_")
            place = path.parents[1] if path.parents[1].name != "scores" else path.parents[2]  # of a report of compare
            data = re.sub(r"^Dataset\d+_|_draw[^_]*$", "", place.name)
            data = re.sub(r"_labeled(.+)$", r", \1 labelled", data)
            places[data, run, weights].add(place.parent)
            try:
                means = json.loads(path.read_text())["mean_over_classes"]
                dice, hd95 = 100 * means["dice"]["mean"], means["hd95_mm"]["penalized_mean"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path} has no Dice and HD95 in mm ({error}); evaluate with --convention mm"
                ) from error
            found[path.resolve()] = Score(data, run, weights, dice, float("nan") if hd95 is None else hd95, path.parent)
    if not found:
        raise DataError(f"no scores.json below {', '.join(map(str, folders))}; run evaluate, compare or the workflow")
    for (data, run, _), homes in places.items():
        if len(homes) > 1:  # the workflow's scores, and a report on the same runs
            both = " and in ".join(map(str, sorted(homes)))
            raise DataError(f"{run} on {data} is in {both}; give one of these folders")
    return list(found.values())


def sweep_rows(scores: Sequence[Score], option: str, defaults: dict[str, float]) -> Rows:
    """Return the runs that differ only in one option, seed and draw, if the option has two or more values.

    Parameters
    ----------
    scores : sequence of Score
        All runs.
    option : str
        Name of the option.
    defaults : dict
        The option's default for each trainer that has it.
    """
    groups: dict[str, Rows] = defaultdict(list)
    for one in scores:
        if one.base in defaults:
            value = one.value(option)
            value = defaults[one.base] if value is None else value
            group = f"{one.data}: {one.without(option, 'seed').removeprefix('nnUNetTrainer')} ({one.weights})"
            groups[group].append((group, f"{value:g}", value, one.dice, one.hd95))
    return [row for rows in groups.values() if len({row[2] for row in rows}) > 1 for row in sorted(rows)]


def framework_pairs(scores: Sequence[Score]) -> list[Pair]:
    """Return the runs of each framework with and without DyCON's losses, all other options equal."""
    found: dict[tuple[str, str, tuple[str, ...], str], tuple[list[Score], list[Score]]] = {}
    for framework, trainers in FRAMEWORKS.items():
        for one in scores:
            if one.base in trainers:
                key = framework, one.data, tuple(one.without("seed").split("_")[1:]), one.weights
                found.setdefault(key, ([], []))[trainers.index(one.base)].append(one)
    whole = {key: pair for key, pair in found.items() if all(pair)}
    shared: dict[str, set[str]] = {}
    for _, data, options, _ in whole:
        shared[data] = shared.get(data, set(options)) & set(options)
    return [
        Pair(", ".join([framework, *(each for each in options if each not in shared[data])]), data, weights, *pair)
        for (framework, data, options, weights), pair in whole.items()
    ]


def framework_rows(scores: Sequence[Score]) -> Rows:
    """Return the runs of frameworks with and without DyCON, all other options equal."""
    return [
        (f"{pair.framework}, {pair.data}, {pair.weights}", ("without DyCON", "with DyCON")[at], at, one.dice, one.hd95)
        for pair in framework_pairs(scores)
        for at, runs in enumerate((pair.alone, pair.with_dycon))
        for one in runs
    ]


def draw_sweep(rows: Rows, title: str) -> Figure:
    """Return two panels, Dice and HD95: a line through the means, bars of one standard deviation, one dot per run."""
    figure, axes = _panels()
    everywhere = sorted({row[2] for row in rows})
    groups = list(dict.fromkeys(row[0] for row in rows))
    for at, group in enumerate(groups):
        apart = (at - (len(groups) - 1) / 2) * 0.012 * (everywhere[-1] - everywhere[0])  # no bar hides another
        color, marker = COLORS[at % len(COLORS)], MARKERS[at % len(MARKERS)]
        values = sorted({row[2] for row in rows if row[0] == group})
        for axis, column in zip(axes, (3, 4), strict=True):
            runs = [[row[column] for row in rows if row[0] == group and row[2] == value] for value in values]
            means, spreads = _mean_and_spread(runs)
            style = {"color": color, "marker": marker, "capsize": 4, "linewidth": 1.8, "markersize": 7}
            places = [value + apart for value in values]
            axis.errorbar(places, means, yerr=spreads, label=group, **style)
            _dots(axis, places, runs, color)
            axis.set_xticks(everywhere)
    for axis in axes:
        axis.set_xlabel(title)
    _finish(figure, axes, "± one standard deviation over runs (seeds and labelled draws); small dots are runs.")
    return figure


def draw_frameworks(rows: Rows) -> Figure:
    """Return two panels, Dice and HD95, with two bars per framework; hatching distinguishes them without colour."""
    groups = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = _panels(max(11.0, 2.4 * len(groups)))
    for axis, column in zip(axes, (3, 4), strict=True):
        for side, name in enumerate(("without DyCON", "with DyCON")):
            places = [at + 0.4 * (side - 0.5) for at in range(len(groups))]
            runs = [[row[column] for row in rows if row[0] == group and row[2] == side] for group in groups]
            means, spreads = _mean_and_spread(runs)
            style = {"color": COLORS[side], "hatch": HATCHES[side], "edgecolor": "black", "alpha": 0.75}
            axis.bar(places, means, 0.38, yerr=spreads, capsize=4, label=name, **style)
            _dots(axis, places, runs, "black")
        axis.set_xticks(range(len(groups)), [group.replace(", ", "\n") for group in groups])
        axis.set_ylim(bottom=0)
    _finish(figure, axes, "± one standard deviation over runs (seeds and labelled draws); small dots are runs.")
    return figure


def _panels(width: float = 11.0) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, PANELS, strict=True):
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def _mean_and_spread(runs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each list; the latter is 0 for a single run."""
    return [statistics.fmean(one) for one in runs], [statistics.stdev(one) if len(one) > 1 else 0.0 for one in runs]


def _dots(axis: Axes, places: Sequence[float], runs: Sequence[Sequence[float]], color: str) -> None:
    for place, values in zip(places, runs, strict=True):
        axis.plot([place] * len(values), values, ".", color=color, markersize=4, alpha=0.8, zorder=3)


def _finish(figure: Figure, axes: Sequence[Axes], note: str) -> None:
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    text = f"Test cases. {note} HD95 counts a missed structure as the image's diagonal."
    figure.supxlabel(text, fontsize=8)


def defaults_of(option: str) -> dict[str, float]:
    """Return the default of an option for each trainer that has it."""
    from nnunetv2_dycon.trainers.names import list_trainers  # imports torch

    found: dict[str, float] = {}
    for trainer in list_trainers():
        for row in trainer.options:
            if row.option == option:
                found[trainer.name] = float(row.default.replace("p", "."))
    return found


def write(rows: Rows, figure: Figure, path: Path, x: str) -> None:
    """Write the picture, and a .csv with its numbers.

    Parameters
    ----------
    rows : Rows
        The runs.
    figure : Figure
        The picture of them.
    path : Path
        Of the picture.
    x : str
        Column name of the values on the x axis.
    """
    figure.savefig(path)
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        shown = [(group, name, dice, hd95) for group, name, _, dice, hd95 in rows]
        csv.writer(file).writerows([("group", x, "dice_percent", "hd95_penalized_mm"), *shown])
    print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw every picture that the runs allow; return 2 if there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with scores.json, at any depth")
    parser.add_argument("-o", dest="output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    try:
        scores = read_scores(arguments.folders)
        arguments.output.mkdir(parents=True, exist_ok=True)
        drawn = 0
        for option, title in SWEEPS.items():
            if rows := sweep_rows(scores, option, defaults_of(option)):
                write(rows, draw_sweep(rows, title), arguments.output / f"sweep_{option}.png", option)
                drawn += 1
        if rows := framework_rows(scores):
            write(rows, draw_frameworks(rows), arguments.output / "frameworks.png", "side")
            drawn += 1
        if not drawn:
            raise DataError(
                f"{len(scores)} runs, but no option {' or '.join(SWEEPS)} with two values, and no framework with and "
                "without DyCON; train those too, with all other options equal"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
