"""Mean and spread of each method's scores, and tests of the differences to the baseline.

A method is all runs that differ by seed or labelled draw alone. A run's mean is taken over cases, then over classes.
A test compares one value per case and method: the mean over runs, then over classes. If both methods have runs with
the same seed and labelled draw, it uses these runs alone.

Means use distances of status "ok" only. Tests count a missed structure and a false alarm as the image's diagonal. If
a structure is absent from the truth and only one of the two methods predicts it, the other one gets overlap 1 and
distance 0. If neither predicts it, the case is left out of the test and counted.
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
from nnunetv2_dycon.evaluation.statistics import (
    Paired,
    Ratio,
    Spread,
    holds,
    holm,
    paired,
    rank_correlation,
    ratio,
    spread,
)

METRICS = ("dice", "iou", "hd95_mm", "asd_mm")  # the four of the DyCON paper
ALL = ""  # stands for the mean over classes where a label is expected
SEED = 20250

Unit = tuple[str, str]  # case and label


@dataclass(frozen=True)
class Method:
    """Runs that differ by seed or labelled draw alone, and the scores of each run by (case, label)."""

    name: str
    short: str
    runs: tuple[Run, ...]
    scores: tuple[Mapping[Unit, Score], ...]

    @property
    def upper(self) -> bool:
        """Whether it is an upper bound, trained on more labels than the others."""
        return self.runs[0].upper


class Result(NamedTuple):
    """A metric's mean for one method, and its difference to the baseline.

    Attributes
    ----------
    mean : Spread or None
        Spread over runs of the run's mean; None if the metric is undefined everywhere.
    difference : Paired or None
        To the baseline, over cases; None for the baseline itself.
    p : float or None
        p of the difference with Holm's correction over all comparisons of the same family.
    holds : bool
        Whether the difference to the baseline is established.
    best : bool
        Whether this method is better than every other one except upper bounds, and each of these differences is
        established.
    left_out : int
        Pairs of case and class that are left out of the test.
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
        Class names by label, in the order of the data set.
    convention : {"mm", "literature"}
        Convention of the distances.
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
        """Return the number of structures with a status, over all cases and runs."""
        return sum(score.status == status for scores in method.scores for score in scores.values())

    def uses_all_runs(self, method: Method) -> bool:
        """Return whether the difference of a method to the baseline uses every run of both."""
        used = zip(*_run_pairs(method, self.methods[0]), strict=True)
        return all(len(set(i)) == len(m.runs) for m, i in zip((method, self.methods[0]), used, strict=True))

    def per_case(self, method: Method, metric: str) -> dict[str, float]:
        """Return one value per case: the mean over runs and classes where the metric is defined."""
        return _case_means(
            {
                unit: [scores[unit].penalized(metric) for scores in method.scores if unit in scores]
                for unit in method.scores[0]
            }
        )

    @property
    def volumes(self) -> dict[str, float]:
        """Return each class's mean volume in ml over the cases whose truth holds it, by label, the largest first.

        Classes that no truth holds are left out, and so are all of 2D images.
        """
        found: dict[str, list[float]] = {}
        for (_, label), score in self.methods[0].scores[0].items():
            if score.volume_truth_ml:
                found.setdefault(label, []).append(score.volume_truth_ml)
        means = {label: float(np.mean(volumes)) for label, volumes in found.items()}
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    def gains(self, method: Method) -> dict[str, float]:
        """Return a method's Dice minus the baseline's for each class of `volumes` that has one, in the same order."""
        differences = {label: self.results[method.name, label, "dice"].difference for label in self.volumes}
        return {label: difference.mean for label, difference in differences.items() if difference}

    def gain_by_volume(self, method: Method) -> float | None:
        """Return Spearman's correlation of volume and gain over classes, None with few classes or equal gains.

        Positive: large structures gain more than small ones.
        """
        gains = self.gains(method)
        return rank_correlation([self.volumes[label] for label in gains], list(gains.values()))

    def gap_closed(self, method: Method) -> Ratio | None:
        """Return the share of the Dice gap between baseline and first upper bound that a method closes.

        Both differences are means over the same cases, as in the tests. None without an upper bound, or if the interval
        of its difference to the baseline reaches 0.
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

        Holm's correction has two families: comparisons of the mean over classes, and those of single classes.
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
        """Return the method that is better than every other one except upper bounds, None if there is no such method.

        `held` tells, by (method, label, metric), whether the difference to the baseline is established.
        """
        ahead = 1.0 if metric in OVERLAPS else -1.0
        rivals = [method for method in self.methods if not method.upper]
        for method in rivals:
            others = [other for other in rivals if other is not method]
            to_baseline = [method] if method is not self.methods[0] else others
            if not all(held[one.name, label, metric] for one in to_baseline):
                continue
            means = [self._by_case(method, other, label, metric).mean for other in others]
            if not others or not all(ahead * mean > 0 for mean in means):  # behind another one: no test is needed
                continue
            rest = [self._difference(method, other, label, metric) for other in others]
            adjusted = holm([d.paired.p if d.paired else None for d in rest])
            if all(holds(d.paired, p, d.of_runs) for d, p in zip(rest, adjusted, strict=True)):
                return method
        return None

    def _difference(self, method: Method, other: Method, label: str, metric: str) -> _Difference:
        """Return the difference with interval and test; computed once for both directions."""
        first, second = sorted((method, other), key=self.methods.index)
        key = (first.name, second.name, label, metric)
        if key not in self._tested:
            by_case = self._by_case(second, first, label, metric)
            rng = np.random.default_rng(SEED)  # a new one, so that a comparison does not depend on the others
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
            used = [(ours[i], theirs[j]) for i, j in pairs]
            a, b = (cast(Any, [_paired_value(score, metric) for score in scores]) for scores in zip(*used, strict=True))
            if None in (*a, *b) or all(score.status == "both_empty" for both in used for score in both):
                left_out += 1
                continue
            values[unit] = [float(np.mean(a) - np.mean(b))]
            for value, value_of_other, found in zip(a, b, by_pair, strict=True):
                found[unit] = [value - value_of_other]
        of_runs = tuple(float(np.mean(list(_case_means(found).values()))) for found in by_pair if found)
        return _ByCase(_case_means(values), of_runs, left_out)


def _turned(found: _Difference) -> _Difference:
    """Return the difference with its sign changed."""
    of_runs = tuple(-value for value in found.of_runs)
    if found.paired is None:
        return found._replace(of_runs=of_runs)
    n, mean, low, high, p = found.paired
    low, high = (None, None) if low is None or high is None else (-high, -low)
    return found._replace(paired=Paired(n, 0.0 - mean, low, high, p), of_runs=of_runs)


def _run_pairs(method: Method, other: Method) -> list[tuple[int, int]]:
    """Return the pairs of runs with the same seed and labelled draw; all pairs if there is none, or not one to one."""
    keys = [[(run.facts.seed, run.facts.labeled, run.facts.fold) for run in m.runs] for m in (method, other)]
    if all(len(set(of_method)) == len(of_method) for of_method in keys):
        shared = [(i, keys[1].index(key)) for i, key in enumerate(keys[0]) if key in keys[1]]
        if shared:
            return shared
    return [(i, j) for i in range(len(keys[0])) for j in range(len(keys[1]))]


def _paired_value(score: Score, metric: str) -> float | None:
    if score.status == "both_empty":  # correctly empty, while another run has a false alarm
        return 0.0 if metric in DISTANCES else 1.0
    return score.penalized(metric)


def _case_means(values: Mapping[Unit, Sequence[float | None]]) -> dict[str, float]:
    """Return the mean over runs, then over classes, of each case with a value."""
    by_case: dict[str, list[float]] = {}
    for (case, _), of_runs in values.items():
        there = [value for value in of_runs if value is not None]
        if there:
            by_case.setdefault(case, []).append(float(np.mean(there)))
    return {case: float(np.mean(of_classes)) for case, of_classes in sorted(by_case.items())}


def run_mean(scores: Mapping[Unit, Score], label: str, metric: str, *, penalized: bool = False) -> float | None:
    """Return a run's mean over cases, then over classes; None if the metric is undefined everywhere.

    Parameters
    ----------
    scores : mapping
        Scores of one run by (case, label).
    label : str
        A class, or `ALL` for the mean over classes.
    metric : str
        A field of Score.
    penalized : bool
        Count a missed structure and a false alarm as the image's diagonal.
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
        Runs of one name, seeds aside, are one method.
    baseline : str
        Name of the method that the others are compared with.

    Raises
    ------
    DataError
        If the runs' cases, classes or conventions differ.
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
