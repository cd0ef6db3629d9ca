"""Differences between methods: intervals, tests, and the rule by which a difference is established.

No file is read. The tests are over test cases. Folds are too few (five cannot give a two-sided p below 0.0625), and
seeds are a second factor, which is reported separately.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
FEWEST_FOR_P = 6  # with five pairs the smallest possible two-sided p is 0.0625
FEWEST_FOR_INTERVAL = 3
FEWEST_FOR_RANKS = 5  # of four pairs, one order in twelve gives a correlation of 1 or -1
_SMALLEST = 1e-12  # smaller differences are rounding errors


class Spread(NamedTuple):
    """Mean, standard deviation of a sample (None for one value), lowest and highest of the n values."""

    n: int
    mean: float
    sd: float | None
    lowest: float
    highest: float


class Paired(NamedTuple):
    """Difference between two methods over the same cases.

    Attributes
    ----------
    n : int
        Number of cases.
    mean : float
        Mean over cases of this method minus the other.
    low, high : float or None
        Bootstrap interval of the mean at `LEVEL`; None with fewer than `FEWEST_FOR_INTERVAL` cases.
    p : float or None
        Two-sided p of Wilcoxon's signed-rank test, not corrected; None with fewer than `FEWEST_FOR_P` cases.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None


class Ratio(NamedTuple):
    """Ratio of two means, and its bootstrap interval at `LEVEL`."""

    value: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean, standard deviation and range of several runs' values; None without values.

    Examples
    --------
    >>> spread([0.5, 0.75, 1.0])
    Spread(n=3, mean=0.75, sd=0.25, lowest=0.5, highest=1.0)
    """
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(len(values), float(np.mean(values)), sd, float(min(values)), float(max(values)))


def paired(differences: Sequence[float], rng: np.random.Generator) -> Paired | None:
    """Return mean, interval and test of paired differences; None without differences.

    Parameters
    ----------
    differences : sequence of float
        This method minus the other, one finite number per case.
    rng : Generator
        Draws the resamples.

    Raises
    ------
    ValueError
        If a difference is not finite.
    """
    d = np.asarray(differences, dtype=np.float64)
    if not np.isfinite(d).all():
        raise ValueError("differences must be finite")
    if not d.size:
        return None
    d = np.where(np.abs(d) < _SMALLEST, 0.0, d)
    low, high = bootstrap_interval(d, rng) if d.size >= FEWEST_FOR_INTERVAL else (None, None)
    return Paired(d.size, float(d.mean()), low, high, signed_rank(d))


def bootstrap_interval(d: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float]:
    """Return the bias-corrected and accelerated (BCa) bootstrap interval of the mean at `LEVEL`.

    Parameters
    ----------
    d : array, shape (n,)
        Differences, one per case.
    rng : Generator
        Draws the `RESAMPLES` resamples.

    References
    ----------
    Efron, "Better bootstrap confidence intervals", JASA 82 (1987); scipy's implementation.
    """
    if np.ptp(d) < _SMALLEST:  # all are equal, and the acceleration would be 0 / 0
        return float(d[0]), float(d[0])
    found = stats.bootstrap(
        (d,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="BCa", rng=rng, vectorized=True
    ).confidence_interval
    return float(found.low), float(found.high)


def ratio(parts: Sequence[float], wholes: Sequence[float], rng: np.random.Generator) -> Ratio:
    """Return the ratio of two means over the same cases with its percentile bootstrap interval.

    Both means are resampled with the same cases. BCa is not used: its jackknife fails if a denominator is near 0.

    Parameters
    ----------
    parts, wholes : sequence of float
        Numerators and denominators, one per case, in the same order.
    rng : Generator
        Draws the resamples.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (parts, wholes))
    drawn = rng.integers(a.size, size=(RESAMPLES, a.size))
    ratios = a[drawn].mean(1) / b[drawn].mean(1)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(a.mean() / b.mean()), float(low), float(high))


def signed_rank(d: NDArray[np.float64]) -> float | None:
    """Return the two-sided p of Wilcoxon's signed-rank test of differences, shape (n,).

    Zero differences are left out; p is 1 if all are zero, and None with fewer than `FEWEST_FOR_P` cases.
    """
    if d.size < FEWEST_FOR_P:
        return None
    return float(stats.wilcoxon(d).pvalue) if np.any(d) else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted by Holm's step-down method; None stays None and is not counted.

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).

    Examples
    --------
    >>> holm([0.01, None, 0.04, 0.015])
    [0.03, None, 0.04, 0.03]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


def holds(difference: Paired | None, adjusted_p: float | None, of_runs: Iterable[float] = ()) -> bool:
    """Return whether a difference is established.

    Three conditions: the interval excludes 0, the corrected p is below 1 - `LEVEL`, and the difference has the same
    sign for every pair of runs. The third is needed since a test over cases does not see the variation between seeds.

    Parameters
    ----------
    difference : Paired or None
        Difference over cases.
    adjusted_p : float or None
        p with Holm's correction.
    of_runs : iterable of float
        The mean difference of each pair of runs.
    """
    if difference is None or difference.low is None or difference.high is None or adjusted_p is None:
        return False
    sign = math.copysign(1.0, difference.mean)
    beyond_zero = difference.low > 0 or difference.high < 0
    return beyond_zero and adjusted_p < 1 - LEVEL and all(sign * run > 0 for run in of_runs)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None with fewer than `FEWEST_FOR_RANKS` pairs, or if all of one are equal.

    Parameters
    ----------
    x, y : sequence of float
        Pairs of numbers.
    """
    if len(x) < FEWEST_FOR_RANKS or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(stats.spearmanr(x, y).statistic)
