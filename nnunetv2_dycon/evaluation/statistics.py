"""Differences between methods: intervals, tests, and the rule by which a difference is established.

Numbers in, numbers out. The unit is the test case: folds are too few to test on (with five, no two-sided p is below
0.0625), and seeds are a second factor, which is shown apart.
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
_SMALLEST = 1e-12  # differences below it are rounding


class Spread(NamedTuple):
    """Mean, standard deviation of a sample (None for one value), lowest and highest of the n values."""

    n: int
    mean: float
    sd: float | None
    lowest: float
    highest: float


class Paired(NamedTuple):
    """Comparison of a method with another over the same cases.

    Attributes
    ----------
    n : int
        Cases.
    mean : float
        Mean over cases of this method minus the other.
    low, high : float or None
        Bootstrap interval of the mean at `LEVEL`; None with fewer than `FEWEST_FOR_INTERVAL` cases.
    p : float or None
        Of Wilcoxon's signed-rank test, two-sided, not corrected; None with fewer than `FEWEST_FOR_P` cases.
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
    """Return how values of several runs lie; None if there is none.

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
    """Interval and test of differences case by case; None if there is none.

    Parameters
    ----------
    differences : sequence of float
        This method minus the other, one number per case, all finite.
    rng : Generator
        Draws the resamples.

    Raises
    ------
    ValueError
        If a difference is not finite: undefined ones have to be left out, and counted, before.
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
    """Bias-corrected and accelerated (BCa) bootstrap interval of the mean, at `LEVEL`, from `RESAMPLES` resamples.

    References
    ----------
    Efron, "Better bootstrap confidence intervals", JASA 82 (1987); scipy's implementation.
    """
    if np.ptp(d) < _SMALLEST:  # nothing to resample, and the acceleration would be 0 / 0
        return float(d[0]), float(d[0])
    found = stats.bootstrap(
        (d,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="BCa", rng=rng, vectorized=True
    ).confidence_interval
    return float(found.low), float(found.high)


def ratio(parts: Sequence[float], wholes: Sequence[float], rng: np.random.Generator) -> Ratio:
    """Ratio of two means over the same cases with its percentile bootstrap interval, cases drawn jointly.

    Not BCa: its jackknife has no meaning where a resample's denominator comes near 0.

    Parameters
    ----------
    parts, wholes : array, shape (n,)
        Paired numbers of the same cases.
    rng : numpy.random.Generator
        Source of the bootstrap.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (parts, wholes))
    drawn = rng.integers(a.size, size=(RESAMPLES, a.size))
    ratios = a[drawn].mean(1) / b[drawn].mean(1)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(a.mean() / b.mean()), float(low), float(high))


def signed_rank(d: NDArray[np.float64]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test, zero differences left out; 1 if all are zero.

    None with fewer than `FEWEST_FOR_P` cases.
    """
    if d.size < FEWEST_FOR_P:
        return None
    return float(stats.wilcoxon(d).pvalue) if np.any(d) else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's step-down method; None stays None and does not count.

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

    The interval leaves 0 out, the corrected p is below 1 - `LEVEL`, and no pair of runs (seeds, labelled draws)
    points the other way: a test over cases knows nothing of other seeds.

    Parameters
    ----------
    difference : Paired or None
        Over cases.
    adjusted_p : float or None
        Of the same comparison, corrected for all that were made.
    of_runs : iterable of float
        The same mean difference for pairs of runs.
    """
    if difference is None or difference.low is None or difference.high is None or adjusted_p is None:
        return False
    sign = math.copysign(1.0, difference.mean)
    beyond_zero = difference.low > 0 or difference.high < 0
    return beyond_zero and adjusted_p < 1 - LEVEL and all(sign * run > 0 for run in of_runs)
