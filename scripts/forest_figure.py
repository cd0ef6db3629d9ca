"""What DyCON's losses add to a framework: a forest plot and a table of the paired difference, per data set.

For each data set, framework and weights: Dice with DyCON's losses minus Dice without, all other options equal. One
value per test case (the mean over the runs with equal seeds and labelled draws, then over classes), then mean, 95 %
bootstrap interval and Wilcoxon's p with Holm's correction over all rows. A difference is established if the interval
excludes 0, p is below 0.05 and every pair of runs has its sign. Cost: seconds. The script reads tables of the workflow
(dice.csv) and writes forest.png, forest.csv and forest.md.

    python scripts/forest_figure.py experiments/hippocampus/dice.csv experiments/mouse_brain/dice.csv -o figures
"""

import argparse
import csv
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.evaluation.figures import COLORS, MARKERS
from nnunetv2_dycon.evaluation.statistics import Paired, holds, holm, paired
from scripts import case_tables
from scripts.sweep_figures import FRAMEWORKS, Pair, Score, framework_pairs

SEED = 20251
TITLES = ("data set", "framework", "weights", "runs", "cases", "difference", "95 % interval", "p", "established")


class Row(NamedTuple):
    """DyCON's losses in a framework, on a data set.

    Attributes
    ----------
    data, framework, weights : str
        Data set with the labelled number, framework with its options, student or teacher.
    difference : Paired
        Dice in % with DyCON's losses minus without, over cases.
    of_runs : tuple of float
        The mean difference of each pair of runs.
    p : float or None
        p with Holm's correction over all rows.
    """

    data: str
    framework: str
    weights: str
    difference: Paired
    of_runs: tuple[float, ...]
    p: float | None

    @property
    def established(self) -> bool:
        """Whether interval, p and every pair of runs agree."""
        return holds(self.difference, self.p, self.of_runs)


def find_rows(tables: Iterable[Path]) -> list[Row]:
    """Return a row for each data set, framework and weights that has runs with and without DyCON's losses.

    Raises
    ------
    DataError
        If runs of one pair were scored on other cases, or their seeds and draws do not match.
    """
    runs: case_tables.Runs = {}
    for table in tables:
        more = case_tables.read(table)
        for data, column in runs.keys() & more.keys():
            raise DataError(f"{table}: {column} of {data} is in another table too; give one of them")
        runs |= more
    pairs = sorted(framework_pairs([_score(*key, dice) for key, dice in runs.items()]), key=lambda pair: pair.data)
    found = [_row(pair, runs) for pair in pairs]
    adjusted = holm([row.difference.p for row in found])
    return [row._replace(p=p) for row, p in zip(found, adjusted, strict=True)]


def _score(data: str, column: str, dice: case_tables.Dice) -> Score:
    """Return a run of a table; its folder is data set, labelled number with draw, and the run's own name."""
    place, _, run = column.partition("/")
    trainer, _, weights = run.rpartition("_")
    labeled = re.sub("^labeled(.+)_draw.*", r"\1 labelled", place)
    mean = 100 * float(np.nanmean(list(dice.values())))
    return Score(f"{data}, {labeled}", trainer, weights, mean, math.nan, Path(data, place, run))


def _row(pair: Pair, runs: case_tables.Runs) -> Row:
    data, framework = pair.data, pair.framework
    alone, with_dycon = ({_draw_and_options(one): one for one in side} for side in (pair.alone, pair.with_dycon))
    if alone.keys() != with_dycon.keys():
        odd = sorted(option for _, option in alone.keys() ^ with_dycon.keys())
        raise DataError(f"{framework} on {data}: {', '.join(odd)} has no partner; train both with the same seeds")
    by_case: dict[str, list[float]] = defaultdict(list)
    of_runs = []
    for key in sorted(alone):
        ours, theirs = (runs[_key(one)] for one in (with_dycon[key], alone[key]))
        if ours.keys() != theirs.keys():
            raise DataError(f"{with_dycon[key].folder} and {alone[key].folder} were scored on other cases or classes")
        differences = case_differences(ours, theirs)
        of_runs.append(float(np.mean(list(differences.values()))))
        for case, value in differences.items():
            by_case[case].append(value)
    each = [float(np.mean(by_case[case])) for case in sorted(by_case)]
    difference = paired(each, np.random.default_rng(SEED))
    if difference is None:
        raise DataError(f"{framework} on {data}: every case is empty in truth and prediction; there is no Dice")
    return Row(data, framework, pair.weights, difference, tuple(of_runs), None)


def _key(run: Score) -> tuple[str, str]:
    """Return the data set and the column that the run has in a table."""
    data, *column = run.folder.parts
    return data, "/".join(column)


def _draw_and_options(run: Score) -> tuple[str, str]:
    return run.folder.parts[1], run.trainer.replace(run.base, "", 1)  # options with the seed


def case_differences(ours: case_tables.Dice, theirs: case_tables.Dice) -> dict[str, float]:
    """Return for each case the mean over classes of our Dice minus theirs, in %.

    A structure that is empty in the truth and in one prediction alone has Dice 1 there; one that is empty in the truth
    and in both is left out.
    """
    by_case: dict[str, list[float]] = defaultdict(list)
    for unit, own in ours.items():
        values = own, theirs[unit]
        if not all(map(math.isnan, values)):
            own, other = (1.0 if math.isnan(value) else value for value in values)
            by_case[unit[0]].append(100 * (own - other))
    return {case: float(np.mean(of_classes)) for case, of_classes in by_case.items()}


def draw(rows: Sequence[Row]) -> Figure:
    """Return the forest plot: a line per row, grouped by data set; a filled marker is an established difference."""
    data_sets = list(dict.fromkeys(row.data for row in rows))
    ordered = [row for data in data_sets for row in rows if row.data == data]
    frameworks = list(dict.fromkeys(row.framework for row in rows))
    figure = Figure(figsize=(9.0, 1.6 + 0.34 * (len(ordered) + len(data_sets))), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.axvline(0, color="black", linewidth=1)
    place, ticks = 0.0, []
    for data in data_sets:
        axis.text(0.0, place, data, transform=axis.get_yaxis_transform(), fontweight="bold", va="center")
        place -= 1
        for row in (one for one in ordered if one.data == data):
            at, d = frameworks.index(row.framework), row.difference
            color, marker = COLORS[at % len(COLORS)], MARKERS[at % len(MARKERS)]
            if d.low is not None and d.high is not None:
                axis.plot([d.low, d.high], [place, place], color=color, linewidth=2)
            face = color if row.established else "white"
            axis.plot([d.mean], [place], marker, color=color, markerfacecolor=face, markersize=9, zorder=3)
            axis.plot(row.of_runs, [place] * len(row.of_runs), "|", color="black", markersize=9, zorder=4)
            ticks.append((place, f"{row.framework} ({row.weights}, {len(row.of_runs)} runs)"))
            place -= 1
    axis.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axis.set_ylim(place + 0.4, 0.7)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("Dice (points) with DyCON's losses minus without   → DyCON better")
    figure.supxlabel(
        "Lines: 95 % bootstrap interval over test cases. Strokes: single runs. Filled: established.", fontsize=8
    )
    return figure


def cells(row: Row) -> tuple[str, ...]:
    """Return the texts of a row, in the order of `TITLES`."""
    d = row.difference
    interval = "too few cases" if d.low is None or d.high is None else f"{d.low:+.2f} to {d.high:+.2f}"
    p = "too few cases" if row.p is None else f"{row.p:.3f}"
    runs, established = str(len(row.of_runs)), "yes" if row.established else "no"
    return row.data, row.framework, row.weights, runs, str(d.n), f"{d.mean:+.2f}", interval, p, established


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write forest.png, forest.csv and forest.md into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"forest{ending}" for ending in (".png", ".csv", ".md")]
    draw(rows).savefig(paths[0])
    table = [TITLES, *map(cells, rows)]
    with open(paths[1], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    lines = ["| " + " | ".join(line) + " |" for line in table]
    lines.insert(1, "|" + "---|" * len(TITLES))
    paths[2].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def main(argv: Iterable[str] | None = None) -> int:
    """Write plot and tables; return 2 where no framework has runs with and without DyCON's losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, help="dice.csv of the workflow")
    parser.add_argument("-o", dest="output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(None if argv is None else list(argv))
    try:
        rows = find_rows(arguments.tables)
        if not rows:
            names = "; ".join(" and ".join(pair) for pair in FRAMEWORKS.values())
            raise DataError(f"no data set has runs of both trainers of a framework with equal options: {names}")
        for path in write(rows, arguments.output):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
