"""Scores of several runs as numbers side by side: means and spread of each method, and what differences hold.

Means are taken over cases first, then over classes. A method is all runs that differ by seed or labelled draw alone.
For a test, a case has one value a method: the mean over its runs, then over classes. Distances are those of status
"ok" in means; where methods are compared, a missed structure and a false alarm cost the image's diagonal. An empty
structure that is left empty counts as a whole overlap (1) and as no distance (0) against a method that has a false
alarm there; where neither has one, the case says nothing and is left out and counted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.likeness import short_names
from nnunetv2_dycon.evaluation.metrics import DISTANCES, OVERLAPS, Score
from nnunetv2_dycon.evaluation.runs import Run
from nnunetv2_dycon.evaluation.statistics import Paired, Ratio, Spread, holds, holm, paired, ratio, spread

METRICS = ("dice", "iou", "hd95_mm", "asd_mm")  # the paper's four
ALL = ""  # the mean over classes, in place of a label
SEED = 20250

Unit = tuple[str, str]  # case and label


@dataclass(frozen=True)
class Method:
    """Runs that differ by seed or labelled draw alone, and their scores, by (case, label)."""

    name: str
    short: str
    runs: tuple[Run, ...]
    scores: tuple[Mapping[Unit, Score], ...]

    @property
    def upper(self) -> bool:
        """Whether it is an upper bound, which knows more labels than the others."""
        return self.runs[0].upper


class Result(NamedTuple):
    """One number of a table, and whether it holds.

    Attributes
    ----------
    mean : Spread or None
        Over runs, of each run's mean over cases (and classes); None where nothing is defined.
    difference : Paired or None
        To the baseline, over cases; None for the baseline itself.
    p : float or None
        Corrected by Holm's method over all comparisons of the same kind.
    holds : bool
        Whether the difference to the baseline is established.
    best : bool
        Whether this method is ahead of every other but upper bounds, and each of these differences holds; those to the
        baseline hold as in `holds`.
    left_out : int
        Cases times classes that the comparison could not use.
    """

    mean: Spread | None
    difference: Paired | None
    p: float | None
    holds: bool
    best: bool
    left_out: int


class _ByCase(NamedTuple):
    values: dict[str, float]
    of_runs: tuple[float, ...]
    left_out: int

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values()))) if self.values else 0.0


class _Difference(NamedTuple):
    paired: Paired | None
    of_runs: tuple[float, ...]
    left_out: int


@dataclass(frozen=True)
class Comparison:
    """Methods over the same test cases.

    Attributes
    ----------
    methods : tuple of Method
        The baseline first, upper bounds last.
    labels : dict
        Names of classes by label, in the order of the data set.
    convention : {"mm", "literature"}
        Of the distances.
    """

    methods: tuple[Method, ...]
    labels: Mapping[str, str]
    convention: str

    @property
    def unit(self) -> str:
        """Return the unit of the distances."""
        return "mm" if self.convention == "mm" else "voxels"

    @property
    def cases(self) -> tuple[str, ...]:
        """Return the names of the test cases, sorted."""
        return tuple(sorted({case for case, _ in self.methods[0].scores[0]}))

    def status(self, method: Method, status: str) -> int:
        """Return how many structures of all cases and runs have a status."""
        return sum(score.status == status for scores in method.scores for score in scores.values())

    def per_case(self, method: Method, metric: str) -> dict[str, float]:
        """Return one value per case: the mean over runs and classes where the metric is defined."""
        return _case_means(
            {
                unit: [scores[unit].penalized(metric) for scores in method.scores if unit in scores]
                for unit in method.scores[0]
            }
        )

    def gap_closed(self, method: Method) -> Ratio | None:
        """Return how much of the way from the baseline's Dice to the first upper bound's a method goes.

        Both are mean differences over the same cases, as in the tests. None without an upper bound that is ahead of the
        baseline, by an interval that leaves out 0.
        """
        upper = next((m for m in self.methods if m.upper), None)
        if upper is None:
            return None
        gap = self.results[upper.name, ALL, "dice"].difference
        if gap is None or gap.low is None or gap.low <= 0:
            return None
        own, whole = (self._by_case(m, self.methods[0], ALL, "dice").values for m in (method, upper))
        cases = sorted(own.keys() & whole.keys())
        rng = np.random.default_rng(SEED)
        return ratio([own[case] for case in cases], [whole[case] for case in cases], rng)

    @cached_property
    def results(self) -> dict[tuple[str, str, str], Result]:
        """All results by (name of the method, label or `ALL`, metric).

        The comparisons of the mean over classes are one family for Holm's correction, those of single classes another.
        """
        found = {}
        for labels in ([ALL], list(self.labels) if len(self.labels) > 1 else []):
            keys = [(m, label, metric) for m in self.methods for label in labels for metric in METRICS]
            found.update(self._family(keys))
        return found

    def _family(self, keys: Sequence[tuple[Method, str, str]]) -> dict[tuple[str, str, str], Result]:
        baseline = self.methods[0]
        differences = [None if m is baseline else self._difference(m, baseline, label, k) for m, label, k in keys]
        adjusted = holm([d.paired.p if d and d.paired else None for d in differences])
        held = {
            (m.name, label, k): d is not None and holds(d.paired, p, d.of_runs)
            for (m, label, k), d, p in zip(keys, differences, adjusted, strict=True)
        }
        leaders = {(label, metric): self._leader(label, metric, held) for _, label, metric in keys}
        return {
            (method.name, label, metric): Result(
                mean=spread([v for v in (run_mean(s, label, metric) for s in method.scores) if v is not None]),
                difference=d.paired if d else None,
                p=p,
                holds=held[method.name, label, metric],
                best=leaders[label, metric] is method,
                left_out=d.left_out if d else 0,
            )
            for (method, label, metric), d, p in zip(keys, differences, adjusted, strict=True)
        }

    def _leader(self, label: str, metric: str, held: Mapping[tuple[str, str, str], bool]) -> Method | None:
        """Return the method that is better than every other one, None where that does not hold.

        `held` are the differences to the baseline that hold, by label and metric.
        """
        ahead = 1.0 if metric in OVERLAPS else -1.0
        rivals = [method for method in self.methods if not method.upper]
        for method in rivals:
            others = [other for other in rivals if other is not method]
            to_baseline = [method] if method is not self.methods[0] else others
            if not all(held[one.name, label, metric] for one in to_baseline):
                continue
            means = [self._by_case(method, other, label, metric).mean for other in others]
            if not others or not all(ahead * mean > 0 for mean in means):  # no test is needed
                continue
            rest = [self._difference(method, other, label, metric) for other in others]
            adjusted = holm([d.paired.p if d.paired else None for d in rest])
            if all(holds(d.paired, p, d.of_runs) for d, p in zip(rest, adjusted, strict=True)):
                return method
        return None

    def _difference(self, method: Method, other: Method, label: str, metric: str) -> _Difference:
        """Return the difference with interval and test; worked out once for both directions."""
        first, second = sorted((method, other), key=self.methods.index)
        key = (first.name, second.name, label, metric)
        if key not in self._tested:
            by_case = self._by_case(second, first, label, metric)
            rng = np.random.default_rng(SEED)  # of its own, so that no comparison depends on which others are made
            self._tested[key] = _Difference(
                paired(list(by_case.values.values()), rng), by_case.of_runs, by_case.left_out
            )
        found = self._tested[key]
        return found if method is second else _turned(found)

    @cached_property
    def _tested(self) -> dict[tuple[str, ...], _Difference]:
        return {}

    def _by_case(self, method: Method, other: Method, label: str, metric: str) -> _ByCase:
        values: dict[Unit, list[float | None]] = {}
        left_out = 0
        pairs = _run_pairs(method, other)
        by_pair: list[dict[Unit, list[float | None]]] = [{} for _ in pairs]
        for unit in method.scores[0]:
            if label not in (ALL, unit[1]):
                continue
            ours, theirs = ([scores[unit] for scores in m.scores] for m in (method, other))
            a, b = (cast(Any, [_paired_value(score, metric) for score in scores]) for scores in (ours, theirs))
            if None in (*a, *b) or all(score.status == "both_empty" for score in (*ours, *theirs)):
                left_out += 1
                continue
            values[unit] = [float(np.mean(a) - np.mean(b))]
            for (i, j), found in zip(pairs, by_pair, strict=True):
                found[unit] = [a[i] - b[j]]
        of_runs = tuple(float(np.mean(list(_case_means(found).values()))) for found in by_pair if found)
        return _ByCase(_case_means(values), of_runs, left_out)


def _turned(found: _Difference) -> _Difference:
    """Return the same difference seen from the other method."""
    of_runs = tuple(-value for value in found.of_runs)
    if found.paired is None:
        return found._replace(of_runs=of_runs)
    n, mean, low, high, p = found.paired
    low, high = (None, None) if low is None or high is None else (-high, -low)
    return found._replace(paired=Paired(n, 0.0 - mean, low, high, p), of_runs=of_runs)


def _run_pairs(method: Method, other: Method) -> list[tuple[int, int]]:
    """Return pairs of runs of the same seed and draw; where these do not match one to one, all pairs."""
    keys = [[(run.facts.seed, run.facts.labeled, run.facts.fold) for run in m.runs] for m in (method, other)]
    if len(set(keys[0])) == len(keys[0]) and sorted(map(repr, keys[0])) == sorted(map(repr, keys[1])):
        return [(i, keys[1].index(key)) for i, key in enumerate(keys[0])]
    return [(i, j) for i in range(len(keys[0])) for j in range(len(keys[1]))]


def _paired_value(score: Score, metric: str) -> float | None:
    if score.status == "both_empty":  # rightly empty, where another run has a false alarm
        return 0.0 if metric in DISTANCES else 1.0
    return score.penalized(metric)


def _case_means(values: Mapping[Unit, Sequence[float | None]]) -> dict[str, float]:
    """Return the mean over runs, then over classes, of every case that has a value."""
    by_case: dict[str, list[float]] = {}
    for (case, _), of_runs in values.items():
        there = [value for value in of_runs if value is not None]
        if there:
            by_case.setdefault(case, []).append(float(np.mean(there)))
    return {case: float(np.mean(of_classes)) for case, of_classes in sorted(by_case.items())}


def run_mean(scores: Mapping[Unit, Score], label: str, metric: str, *, penalized: bool = False) -> float | None:
    """Return a run's mean over cases, then over classes; None if it is defined nowhere.

    Parameters
    ----------
    scores : mapping
        Of one run, by (case, label).
    label : str
        A class, or `ALL` for the mean over classes.
    metric : str
        Field of Score.
    penalized : bool
        Let a missed structure and a false alarm count as the image's diagonal.
    """
    means = []
    for one in dict.fromkeys(own for _, own in scores):
        if label not in (ALL, one):
            continue
        values = [
            s.penalized(metric) if penalized else getattr(s, metric) for (_, own), s in scores.items() if own == one
        ]
        there = [value for value in values if value is not None and math.isfinite(value)]
        if there:
            means.append(float(np.mean(there)))
    return float(np.mean(means)) if means else None


def make_comparison(runs: Sequence[tuple[Run, Sequence[Score]]], baseline: str) -> Comparison:
    """Return the comparison of runs with their scores.

    Parameters
    ----------
    runs : sequence of (Run, scores)
        Runs of the same method follow from their names.
    baseline : str
        Name of a method.

    Raises
    ------
    DataError
        If runs were scored on other cases or classes, or with another convention.
    """
    first_run, first = runs[0]
    known = {(score.case, score.label): score for score in first}
    groups: dict[str, list[tuple[Run, dict[Unit, Score]]]] = {}
    for run, scores in runs:
        by_unit = {(score.case, score.label): score for score in scores}
        if by_unit.keys() != known.keys() or {s.convention for s in scores} != {s.convention for s in first}:
            raise DataError(f"{run.name} was scored on other cases or classes than {first_run.name}; score both again")
        groups.setdefault(run.method, []).append((run, by_unit))
    order = sorted(groups, key=lambda name: (groups[name][0][0].upper, name != baseline))
    short = short_names(order)
    methods = [Method(name, short[name], *map(tuple, zip(*groups[name], strict=True))) for name in order]
    labels = {score.label: score.name for score in first}
    return Comparison(tuple(methods), labels, first[0].convention)
