"""Tables of a comparison, in the form that papers use, and all results as CSV."""

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.evaluation.comparison import ALL, METRICS, Comparison, Method, Result, run_mean
from nnunetv2_dycon.evaluation.forms import Cell, Table, csv_table
from nnunetv2_dycon.evaluation.metrics import DISTANCES, OVERLAPS
from nnunetv2_dycon.evaluation.statistics import LEVEL, Ratio, Spread, spread

UNKNOWN = "not recorded"
NOTHING = "–"
TITLES = {"dice": "Dice", "iou": "IoU", "hd95_mm": "HD95", "asd_mm": "ASD"}
OTHER_PROTOCOL = "‡"
FEW_CLASSES = 6  # whose names and spreads fit a page
_CSV_COLUMNS = (
    *("method", "weights", "label", "class", "metric", "unit", "convention"),
    *("runs", "mean", "sd", "lowest", "highest"),
    *("baseline", "difference", "low", "high", "p_holm", "holds", "best", "cases", "left_out"),
)


# ---- content ---------------------------------------------------------------------------------------------------


def main_table(comparison: Comparison, published: Sequence[dict[str, Any]] = ()) -> Table:
    """Return the table of methods with numbers of cases and the four metrics; published rows are marked.

    With missed structures or false alarms it also has their numbers, and HD95 that counts each as the image's diagonal.
    With an upper bound it also has the share of the gap that each method closes.
    """
    bounded = any(method.upper for method in comparison.methods)
    counted = any(comparison.status(m, s) for m in comparison.methods for s in ("missed", "false_alarm"))
    rows = []
    for method in comparison.methods:
        cells = [Cell(method.short), *_case_cells(method), Cell(str(len(method.runs)))]
        for metric in METRICS:
            result = comparison.results[method.name, ALL, metric]
            cells.append(_result_cell(result, metric, best=result.best))
            if bounded and metric == "dice":
                closed = comparison.gap_closed(method)
                cells.append(Cell(NOTHING if closed is None else _share(closed)))
        if counted:
            penalized = [run_mean(scores, ALL, "hd95_mm", penalized=True) for scores in method.scores]
            cells.append(Cell(_mean_text(spread([v for v in penalized if v is not None]), "hd95_mm")))
            each = [comparison.status(method, status) / len(method.runs) for status in ("missed", "false_alarm")]
            cells += [Cell(f"{number:.1f}".removesuffix(".0")) for number in each]
        rows.append(tuple(cells))
    header = ["Method", "Labelled", "Unlabelled", "Runs", *(column_title(k, comparison.unit) for k in METRICS)]
    notes = [_reading(comparison), _distances(comparison)]
    if bounded:
        header.insert(5, "Gap closed (%)")
        notes.append(_gap(comparison))
    if counted:
        header += [f"HD95 with penalty ({comparison.unit}) ↓", "Missed per run", "False alarms per run"]
    if published:
        rows += [_published_row(row, header) for row in published]
        notes.append(_published_note(published))
    return Table("Test cases", tuple(header), rows, tuple(notes))


def class_table(comparison: Comparison, published: Sequence[dict[str, Any]] = ()) -> Table | None:
    """Return average Dice, average ASD and the Dice of each class; None for a single class.

    More than a few classes have short names, explained below, and means alone, so that the table fits a page. Published
    rows that have numbers of these classes are marked.
    """
    if len(comparison.labels) < 2:
        return None
    many = len(comparison.labels) > FEW_CLASSES
    rows = []
    for method in comparison.methods:
        cells = [Cell(method.short)]
        for label, metric in ((ALL, "dice"), (ALL, "asd_mm"), *((label, "dice") for label in comparison.labels)):
            result = comparison.results[method.name, label, metric]
            cells.append(_result_cell(result, metric, best=result.best, narrow=many and label != ALL))
        rows.append(tuple(cells))
    header = ("Method", "Average Dice (%) ↑", f"Average ASD ({comparison.unit}) ↓")
    names = list(comparison.labels.values())
    note = "Dice of each class. Marks as above; p is corrected over all classes, metrics and methods."
    columns = [f"{name} (%) ↑" for name in names]
    if many:
        columns = short_names(names)
        explained = ", ".join(f"{s} {n}" for s, n in zip(columns, names, strict=True) if s != n)
        note = f"Dice of each class in %, mean over runs; their spread is in results.csv. {explained}. {note}"
    keys = [_key(name) for name in names]
    known = [row for row in published if any(_key(name) in keys for name in row.get("classes", ()))]
    rows += [_published_classes(row, keys) for row in known]
    notes = (note, _published_note(known)) if known else (note,)
    return Table("Classes", (*header, *columns), rows, notes)


def size_table(comparison: Comparison) -> Table | None:
    """Return volume, Dice of the baseline and gain of each method by structure, the largest first.

    None for a single class and for 2D images, which have no volumes.
    """
    if len(comparison.labels) < 2 or not comparison.volumes:
        return None
    baseline, *others = comparison.methods
    rows = []
    for label, volume in comparison.volumes.items():
        own = comparison.results[baseline.name, label, "dice"]
        cells = [
            Cell(comparison.labels[label]),
            Cell(f"{volume:.3g}"),
            _result_cell(own, "dice", best=False, narrow=True),
        ]
        for method in others:
            result = comparison.results[method.name, label, "dice"]
            gain = NOTHING if result.difference is None else _printed(100 * result.difference.mean, "+.1f")
            cells.append(Cell(gain, star=result.holds))
        rows.append(tuple(cells))
    notes = [
        f"Structures by size: mean volume over the test cases that hold the structure, Dice of {baseline.short}, and "
        f"the difference of each method to it, in points. Marks as above."
    ]
    ranks = [comparison.gain_by_volume(method) for method in others]
    if any(rank is not None for rank in ranks):
        texts = [NOTHING if rank is None else _printed(rank, "+.2f") for rank in ranks]
        rows.append((Cell("Rank correlation"), Cell(NOTHING), Cell(NOTHING), *map(Cell, texts)))
        notes.append(
            "Rank correlation of volume and difference over structures (Spearman): positive if large structures gain "
            "more than small ones."
        )
    header = ("Structure", "Volume (ml)", f"{baseline.short} (%)", *(method.short for method in others))
    return Table("Size and gain", header, rows, tuple(notes))


def short_names(names: Sequence[str]) -> list[str]:
    """Return initials of names of several words and the first two letters of others; equal ones stay whole.

    Examples
    --------
    >>> short_names(["spleen", "left_kidney", "portal_and_splenic_vein", "stomach", "stone"])
    ['Sp', 'LK', 'PSV', 'stomach', 'stone']
    """
    short = []
    for name in names:
        words = [word for word in re.split(r"[\W_]+", name) if word and word.lower() not in ("and", "of", "the")]
        short.append("".join(word[0].upper() for word in words) if len(words) > 1 else name[:2].capitalize())
    return [s if short.count(s) == 1 else name for s, name in zip(short, names, strict=True)]


def difference_table(comparison: Comparison) -> Table:
    """Return the paired differences to the baseline with interval, corrected p and whether each one holds."""
    rows = []
    for method in comparison.methods[1:]:
        for metric in METRICS:
            result = comparison.results[method.name, ALL, metric]
            if result.difference is None:
                continue
            d = result.difference
            interval = (
                NOTHING if d.low is None or d.high is None else f"{_signed(d.low, metric)} to {_signed(d.high, metric)}"
            )
            p = NOTHING if result.p is None else "< 0.001" if result.p < 0.001 else f"{result.p:.3f}"
            holds = "yes" if result.holds else "no"
            texts = (column_title(metric, comparison.unit), _signed(d.mean, metric), interval, p, holds, str(d.n))
            rows.append((Cell(method.short), *map(Cell, texts), Cell(str(result.left_out))))
    header = ("Method", "Metric", "Difference", f"{LEVEL:.0%} interval", "p (Holm)", "Holds", "Cases", "Left out")
    unequal = [method.short for method in comparison.methods[1:] if not comparison.uses_all_runs(method)]
    of_shared = (
        f"{', '.join(unequal)}: the difference is of the runs whose seed and labelled draw "
        f"{comparison.methods[0].short} has too, so it is not that of the means above.",
    )
    notes = (
        f"Method minus {comparison.methods[0].short} in each case (mean over runs and classes). Interval: BCa "
        "bootstrap over cases. p: two-sided Wilcoxon signed-rank test with Holm's correction over this table; none "
        f"with fewer than six cases. A difference holds (is established) if the interval excludes 0, p is below "
        f"{1 - LEVEL:.2f}, and it has the same sign for every pair of runs. The test uses these runs only: a few runs "
        "say little about other seeds and labelled draws. Left out: pairs of case and class that are empty in the "
        "truth and in all predictions of both methods.",
        *(of_shared if unequal else ()),
    )
    return Table(f"Differences to {comparison.methods[0].short}", header, rows, notes)


def facts_table(comparison: Comparison) -> Table:
    """Return the facts of each run, with its full name."""
    rows = []
    for method in comparison.methods:
        for run in method.runs:
            facts = run.facts
            versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
            texts: tuple[Any, ...] = (
                facts.trainer or run.predictions.name,
                facts.weights,
                facts.labeled_count,
                facts.unlabeled,
                facts.steps,
                facts.patches,
                facts.checkpoint,
                None if facts.mirroring is None else "yes" if facts.mirroring else "no",
                facts.seed if facts.seed is not None or facts.trainer is None else "not set",
                None if facts.seconds_per_step is None else f"{facts.seconds_per_step:.3g}",
                facts.hardware,
                facts.fold,
                facts.plans,
                versions or None,
            )
            rows.append((Cell(method.short), *(Cell(UNKNOWN if text is None else str(text)) for text in texts)))
    header: tuple[str, ...] = (
        "Method",
        "Trainer or folder",
        "Weights",
        "Labelled",
        "Unlabelled",
        "Steps",
        "Labelled patches seen",
        "Checkpoint",
    )
    header += ("Mirroring", "Seed", "Seconds per step", "Hardware", "Fold", "Plans", "Versions")
    notes = (
        "Seconds per step: median over epochs, including the epoch's validation. Plans: digest of the planned "
        f"network and preprocessing. {UNKNOWN.capitalize()}: not in the run's files.",
    )
    return Table("Runs", header, rows, notes, folded=f"Full names and facts of the {len(rows)} runs")


def _case_cells(method: Method) -> list[Cell]:
    columns = ([run.facts.labeled_count for run in method.runs], [run.facts.unlabeled for run in method.runs])
    return [Cell("/".join(UNKNOWN if v is None else str(v) for v in dict.fromkeys(values))) for values in columns]


def column_title(metric: str, unit: str) -> str:
    """Return a metric's heading with its unit and an arrow in the direction that is better."""
    return f"{TITLES[metric]} (%) ↑" if metric in OVERLAPS else f"{TITLES[metric]} ({unit}) ↓"


def _result_cell(result: Result, metric: str, *, best: bool, narrow: bool = False) -> Cell:
    if narrow and result.mean is not None:
        return Cell(f"{100 * result.mean.mean:.1f}", best, result.holds)
    return Cell(_mean_text(result.mean, metric), best, result.holds)


def _mean_text(mean: Spread | None, metric: str) -> str:
    if mean is None:
        return NOTHING
    scale = 1.0 if metric in DISTANCES else 100.0
    text = f"{scale * mean.mean:.2f}"
    return text if mean.sd is None else f"{text} ± {scale * mean.sd:.2f}"


def _signed(value: float, metric: str) -> str:
    return _printed((1.0 if metric in DISTANCES else 100.0) * value, "+.2f")


def _printed(value: float, form: str) -> str:
    """Return a number with a typographic minus sign, and without a sign if it is printed as 0."""
    text = format(value, form)
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def _share(closed: Ratio) -> str:
    value, low, high = (_printed(100 * number, ".0f") for number in closed)
    return value if low == high else f"{value} ({low} to {high})"


def _reading(comparison: Comparison) -> str:
    return (
        f"{len(comparison.cases)} test cases. Mean over cases, then classes, then runs; ± standard deviation over runs "
        f"(seeds and labelled draws). Bold: better than every other method, and each difference holds. *: the "
        f"difference to {comparison.methods[0].short} holds (see the table of differences)."
    )


def _gap(comparison: Comparison) -> str:
    upper = next(method for method in comparison.methods if method.upper)
    return (
        f"{upper.short} is an upper bound: it was trained on more labels and does not compete with the others. Gap "
        f"closed: position of the mean Dice from {comparison.methods[0].short} (0) to {upper.short} (100), with a "
        f"{LEVEL:.0%} bootstrap interval over cases; none if the interval of that difference includes 0."
    )


def _distances(comparison: Comparison) -> str:
    if comparison.convention == "mm":
        text = "Distances in mm; HD95 is the larger of the two directions, ASD is from prediction to truth."
    else:
        text = "Distances in voxels with MedPy's definitions, as in most papers."
    return (
        f"{text} Means use structures that are in truth and prediction; tests count a missed structure and a false "
        "alarm as the image's diagonal."
    )


def read_published() -> list[dict[str, Any]]:
    """Return the published results with their sources."""
    text = files("nnunetv2_dycon.evaluation").joinpath("published_results.json").read_text(encoding="utf-8")
    return json.loads(text)


def choose_published(name: str, labeled: Sequence[int | None]) -> list[dict[str, Any]]:
    """Return published rows of a data set: those with as many labelled cases as the runs, or all if none has.

    Parameters
    ----------
    name : str
        A name in published_results.json, or nnU-Net's name that contains it, such as Dataset503_LA.
    labeled : sequence of int or None
        Numbers of labelled cases of the runs.

    Raises
    ------
    ConfigError
        If the data set has no published results.
    """
    rows = read_published()
    known = dict.fromkeys(row["dataset"] for row in rows)
    words = re.split(r"[\W_]", re.sub(r"^Dataset\d+_", "", name).lower())
    keys = {dataset: re.split(r"\W", dataset.lower())[0] for dataset in known}  # pancreas of Pancreas-CT
    found = [dataset for dataset, key in keys.items() if any(_same_name(word, key) for word in words)]
    if len(found) != 1:
        raise ConfigError(f"--published {name}: there are results of {', '.join(known)}; give one of these names")
    own = [row for row in rows if row["dataset"] == found[0]]
    return [row for row in own if row["labelled"] in labeled] or own


def _same_name(word: str, key: str) -> bool:
    return word == key or (len(key) > 3 and word.startswith(key))  # PancreasNIH; LA is too short to be a beginning


def _published_row(row: dict[str, Any], header: Sequence[str]) -> tuple[Cell, ...]:
    known = {"Method": f"{row['method']} {OTHER_PROTOCOL}"}
    known |= {"Labelled": str(row["labelled"]), "Unlabelled": str(row["unlabelled"])}
    for title, key in (("Dice", "dice"), ("IoU", "jaccard"), ("HD95", "hd95"), ("ASD", "asd")):
        known[title] = NOTHING if row[key] is None else f"{row[key]:.2f}"
    return tuple(Cell(known.get(re.split(r" \(.*\) [↑↓]", title)[0], NOTHING)) for title in header)


def _published_classes(row: dict[str, Any], keys: Sequence[str]) -> tuple[Cell, ...]:
    """Return a published row of the table of classes, whose names are `keys`."""
    classes = {_key(name): dice for name, dice in row["classes"].items()}
    averages = (NOTHING if row[key] is None else f"{row[key]:.2f}" for key in ("dice", "asd"))
    each = (f"{classes[key]:.1f}" if key in classes else NOTHING for key in keys)
    return tuple(map(Cell, (f"{row['method']} {OTHER_PROTOCOL}", *averages, *each)))


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().lower()


def _published_note(rows: Sequence[dict[str, Any]]) -> str:
    origins: dict[str, list[str]] = {}
    for row in rows:
        origins.setdefault(f"{row['protocol']}; {row['source']}", []).append(row["method"])
    sources = (f"{', '.join(dict.fromkeys(methods))}: {origin}" for origin, methods in origins.items())
    return (
        f"{OTHER_PROTOCOL} Published with another evaluation protocol (networks, checkpoints, crops; most distances in "
        f"voxels): not comparable with the rows above. {'. '.join(sources)}."
    )


def results_csv(comparison: Comparison) -> str:
    """Return all results as CSV, one per line, numbers with all digits; overlaps are fractions."""
    rows = []
    for (name, label, metric), result in comparison.results.items():
        method = next(m for m in comparison.methods if m.name == name)
        unit = comparison.unit if metric in DISTANCES else "1"
        d = result.difference or (None,) * 5
        weights = method.runs[0].facts.weights
        head = [name.removesuffix(f" ({weights})"), weights, label or "mean over classes"]
        head += [comparison.labels.get(label, ""), metric.removesuffix("_mm"), unit, comparison.convention]
        numbers = list(result.mean or (0, None, None, None, None))
        tail = [
            comparison.methods[0].name,
            d[1],
            d[2],
            d[3],
            result.p,
            result.holds,
            result.best,
            d[0],
            result.left_out,
        ]
        rows.append([*head, *numbers, *tail])
    return csv_table(_CSV_COLUMNS, rows)
