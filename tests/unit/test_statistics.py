import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nnunetv2_dycon.evaluation import statistics
from nnunetv2_dycon.evaluation.statistics import (
    LEVEL,
    Paired,
    bootstrap_interval,
    holds,
    holm,
    paired,
    ratio,
    signed_rank,
    spread,
)

# Worked by hand: differences 1 to 8 with 3 negative. The smaller rank sum is 3; of the 256 sign patterns those with a
# sum of at most 3 are {}, {1}, {2}, {3}, {1, 2}: p = 2 * 5 / 256.
WORKED = np.array([1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0])


def rng():
    return np.random.default_rng(0)


def test_the_signed_rank_test_gives_the_worked_example():
    assert signed_rank(WORKED) == pytest.approx(10 / 256)


def test_the_signed_rank_test_equals_all_sign_patterns_counted():
    d = np.random.default_rng(3).normal(0.4, 1.0, 9)
    ranks = stats.rankdata(np.abs(d))
    sums = [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=9)]
    positive = ranks[d > 0].sum()
    extreme = max(positive, ranks.sum() - positive)
    count = sum(s >= extreme or s <= ranks.sum() - extreme for s in sums)
    assert signed_rank(d) == pytest.approx(count / 2**9)


def test_there_is_no_p_value_under_six_cases():
    assert signed_rank(WORKED[3:]) is None
    assert signed_rank(WORKED[2:]) is not None


def test_identical_runs_differ_by_nothing_and_get_no_star():
    same = paired([0.0] * 20, rng())
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert not holds(same, same.p)


def test_rounding_is_no_difference():
    assert paired([1e-16] * 12, rng()).p == 1.0


def test_the_interval_equals_scipys_bca_and_is_the_same_each_time():
    d = np.random.default_rng(5).gamma(2.0, 1.0, 25) - 1.5
    expected = stats.bootstrap((d,), np.mean, n_resamples=9999, confidence_level=0.95, method="BCa", rng=rng())
    assert bootstrap_interval(d, rng()) == tuple(expected.confidence_interval)
    assert paired(d, rng()) == paired(d, rng())


def test_the_interval_follows_the_skew_of_the_differences():
    """A percentile interval of the mean would not: BCa lies further towards the long tail."""
    d = np.random.default_rng(5).exponential(1.0, 30)
    means = np.random.default_rng(1).choice(d, (20000, 30)).mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    ours = bootstrap_interval(d, rng())
    assert ours[0] > low
    assert ours[1] > high


def test_a_constant_difference_has_an_interval_of_no_width():
    assert paired([0.25] * 8, rng())[:4] == (8, 0.25, 0.25, 0.25)


def test_two_cases_have_no_interval_and_none_has_nothing():
    assert paired([0.1, 0.2], rng())[2:] == (None, None, None)
    assert paired([], rng()) is None


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        paired([0.1, float("nan")], rng())


def test_holm_gives_the_worked_example():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, then never smaller than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_equals_its_definition(p):
    adjusted = holm(p)
    order = sorted(range(len(p)), key=lambda i: p[i])
    for rank, index in enumerate(order):
        expected = max(min(1.0, (len(p) - j) * p[order[j]]) for j in range(rank + 1))
        assert adjusted[index] == pytest.approx(expected)


def test_holm_leaves_out_what_was_not_tested():
    assert holm([None, 0.02, None, 0.03]) == [None, 0.04, None, 0.04]


def test_a_difference_holds_where_interval_p_and_all_runs_agree():
    d = paired([0.1, 0.2, 0.15, 0.12, 0.18, 0.16, 0.11, 0.14], rng())
    assert holds(d, 0.03)
    assert holds(d, 0.03, [0.1, 0.2])
    assert not holds(d, 0.06)
    assert not holds(d, None)
    assert not holds(d, 0.03, [0.1, -0.02])
    assert not holds(d._replace(low=-0.01), 0.03)
    assert not holds(None, 0.03)


def test_at_its_boundaries_a_difference_does_not_hold():
    better, worse = Paired(8, 0.1, 0.05, 0.2, 0.01), Paired(8, -0.1, -0.2, -0.05, 0.01)
    limit = 1 - LEVEL
    for d, sign in ((better, 1), (worse, -1)):
        assert holds(d, np.nextafter(limit, 0), [sign * 1e-9])
        assert not holds(d, limit, [sign * 1e-9])
        assert not holds(d, 0.01, [sign * 0.1, 0.0])
    assert not holds(better._replace(low=0.0), 0.01)
    assert not holds(worse._replace(high=0.0), 0.01)


def test_the_ratio_is_that_of_the_means():
    assert ratio([1.0, 2.0], [4.0, 4.0], rng()).value == 3 / 8
    assert ratio([1.0, 1.0], [4.0, 4.0], rng()) == (0.25, 0.25, 0.25)


def test_a_worse_method_holds_too():
    d = paired([-0.1, -0.2, -0.15, -0.12, -0.18, -0.16], rng())
    assert holds(d, 0.04, [-0.1])


def test_the_spread_of_one_run_has_no_deviation():
    assert spread([0.5]) == (1, 0.5, None, 0.5, 0.5)
    assert spread([]) is None


def test_false_alarms_come_at_the_nominal_rate(monkeypatch):
    """Simulated null: 400 comparisons of two methods that do not differ, 20 cases each."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    draws = np.random.default_rng(11)
    found = [paired(draws.normal(0, 1, 20), draws) for _ in range(400)]
    by_p = np.mean([f.p < 0.05 for f in found])
    by_interval = np.mean([not f.low <= 0 <= f.high for f in found])
    # 0.05 +- 3 standard errors of 0.011; a bootstrap of 20 cases is known to be a little too narrow
    assert 0.017 < by_p < 0.083
    assert 0.017 < by_interval < 0.105


def test_holm_keeps_false_alarms_of_a_whole_table_at_the_nominal_rate():
    draws = np.random.default_rng(12)
    families = [[signed_rank(draws.normal(0, 1, 20)) for _ in range(8)] for _ in range(400)]
    assert np.mean([min(holm(family)) < 0.05 for family in families]) < 0.083
    assert np.mean([min(family) < 0.05 for family in families]) > 0.2  # without it
