import math

import numpy as np
import pytest

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.comparison import ALL, Comparison, make_comparison, run_mean
from nnunetv2_dycon.evaluation.metrics import Score
from tests.madeup_runs import a_run

CASES = [f"c{i}" for i in range(8)]


def score(case, label="1", dice=0.5, distance=2.0, status="ok", **other):
    """Return a score whose metrics all differ; with empty masks they are those of `score_case`."""
    if status != "ok":
        distance = None
        dice = None if status == "both_empty" else 0.0
    iou = None if dice is None else dice / (2 - dice)
    surfaces = {
        "asd_mm": None if distance is None else distance / 2,
        "assd_mm": None if distance is None else distance / 3,
    }
    fields = {"iou": iou, "hd95_mm": distance, **surfaces, "nsd": dice}
    volumes = dict.fromkeys(("volume_truth_ml", "volume_pred_ml", "volume_error_ml"), 1.0)
    rest = {"nsd_tolerance_mm": 2.0, "diagonal_mm": 100.0, "name": f"name {label}", **volumes, **fields, **other}
    return Score(case=case, label=label, dice=dice, status=status, **rest)


def scores(dice, label="1", **other):
    return [score(case, label, d, **other) for case, d in zip(CASES, dice, strict=True)]


def result(comparison, method, metric="dice", label=ALL):
    return comparison.results[f"{method} (student)", label, metric]


DICE = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85]


def test_means_are_over_cases_then_classes_then_runs():
    one = [*scores([0.5] * 8), *scores([0.5] * 4 + [1.0] * 4, "2")]
    other = [*scores([0.25] * 8), *scores([0.25] * 8, "2")]
    compared = make_comparison([(a_run("a", seed=0), one), (a_run("a", seed=1), other)], "a (student)")
    found = result(compared, "a").mean
    assert found[:2] == (2, (0.625 + 0.25) / 2)
    assert found.sd == pytest.approx(np.std([0.625, 0.25], ddof=1))
    assert result(compared, "a", label="2").mean.mean == pytest.approx((0.75 + 0.25) / 2)


def test_identical_runs_differ_by_nothing_and_have_no_mark():
    compared = make_comparison([(a_run("a"), scores(DICE)), (a_run("b"), scores(DICE))], "a (student)")
    found = result(compared, "b")
    assert (found.difference.mean, found.p, found.holds, found.best) == (0.0, 1.0, False, False)
    assert not result(compared, "a").best


def test_a_method_that_is_ahead_in_every_case_is_best_and_the_baseline_is_first():
    better = scores([d + 0.05 + 0.001 * i for i, d in enumerate(DICE)], distance=1.0)
    compared = make_comparison([(a_run("b"), better), (a_run("a"), scores(DICE))], "a (student)")
    assert [method.name for method in compared.methods] == ["a (student)", "b (student)"]
    found = result(compared, "b")
    assert found.difference.mean == pytest.approx(0.0535)
    assert (found.holds, found.best) == (True, True)
    assert result(compared, "b", "asd_mm").best  # smaller is better
    assert not result(compared, "a").best
    assert not result(compared, "a", "asd_mm").best
    assert result(compared, "a").difference is None


def bounded(*shifts: float) -> Comparison:
    """Return baseline a, methods b and c, and upper bound u, each ahead of a by its shift in every case."""
    dice = [*DICE, *(d - 0.01 for d in DICE)]
    runs = [
        (
            a_run(name, upper=name == "u"),
            [score(f"c{i}", dice=d + shift * (1 + 0.01 * i)) for i, d in enumerate(dice)],
        )
        for name, shift in zip("uabc", shifts, strict=False)
    ]
    return make_comparison(runs, "a (student)")


def test_the_gap_is_closed_by_the_share_of_the_way_to_the_upper_bound():
    compared = bounded(0.1, 0.0, 0.075, -0.05)
    names = ["a (student)", "b (student)", "c (student)", "u_upper-bound (student)"]
    assert [method.name for method in compared.methods] == names
    assert [compared.gap_closed(method).value for method in compared.methods] == pytest.approx([0.0, 0.75, -0.5, 1.0])


def test_the_gap_closed_is_of_the_differences_that_are_tested_and_has_an_interval_over_cases():
    """Class 2 is in one case alone, where the bound is worst: class means and case means disagree."""
    rng = np.random.default_rng(1)

    def of(shift, rare):
        own = [score(f"c{i}", "1", 0.5 + shift + rng.normal(0, 0.004)) for i in range(20)]
        rows = [score(f"c{i}", "2", status="both_empty") for i in range(19)]
        return [*own, *rows, score("c19", "2", rare)]

    shifts = [("a", 0.0, 0.7, False), ("b", 0.05, 0.69, False), ("u", 0.1, 0.4, True)]
    rows = [(a_run(name, upper=upper), of(shift, rare)) for name, shift, rare, upper in shifts]
    compared = make_comparison(rows, "a (student)")
    closed = compared.gap_closed(compared.methods[1])
    to_baseline = [compared.results[m.name, ALL, "dice"].difference.mean for m in compared.methods[1:]]
    assert closed.value == pytest.approx(to_baseline[0] / to_baseline[1])
    assert closed.low < closed.value < closed.high
    # a slow bootstrap of its own, with other draws
    pairs = [
        [np.mean([s.dice for s in run if s.case == f"c{i}" and s.dice is not None]) for i in range(20)]
        for _, run in rows
    ]
    own, whole = np.subtract(pairs[1], pairs[0]), np.subtract(pairs[2], pairs[0])
    drawn = [np.sum(own[k]) / np.sum(whole[k]) for k in (rng.integers(20, size=20) for _ in range(4000))]
    assert (closed.low, closed.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)
    assert [compared.gap_closed(compared.methods[k])[:] for k in (0, 2)] == [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]


@pytest.mark.parametrize("cases", [6, 7])
def test_no_number_is_bold_whose_difference_does_not_hold_in_the_table_below(cases):
    """Four metrics of so few cases: p is small enough alone, and not corrected over the table."""
    names = [f"c{i}" for i in range(cases)]
    low = [score(case, dice=0.5, distance=2.0) for case in names]
    high = [score(case, dice=0.6 + 0.01 * i, distance=1.0 - 0.1 * i) for i, case in enumerate(names)]
    for baseline in ("a (student)", "b (student)"):
        compared = make_comparison([(a_run("a"), low), (a_run("b"), high)], baseline)
        for found in compared.results.values():
            assert not found.holds
            assert not found.best


def test_an_upper_bound_is_no_rival():
    assert result(bounded(0.1, 0.0, 0.075, -0.05), "b").best
    assert not bounded(0.1, 0.0, 0.075).results["u_upper-bound (student)", ALL, "dice"].best


def test_the_gap_is_that_of_dice_whatever_the_other_metrics_are():
    runs = [
        (a_run(name, upper=name == "u"), [score(c, dice=d + shift, iou=0.5) for c, d in zip(CASES, DICE, strict=True)])
        for name, shift in (("a", 0.0), ("b", 0.05), ("u", 0.1))
    ]
    compared = make_comparison(runs, "a (student)")
    assert compared.gap_closed(compared.methods[1]).value == pytest.approx(0.5)


@pytest.mark.parametrize("shifts", [(0.0, 0.0, 0.05), (-0.1, 0.0, 0.05)])
def test_there_is_no_gap_to_a_bound_that_is_not_ahead(shifts):
    compared = bounded(*shifts)
    assert [compared.gap_closed(method) for method in compared.methods] == [None] * 3


def test_a_lead_that_one_seed_contradicts_is_not_marked():
    runs = [(a_run(name, seed=s), scores(DICE)) for name in "a" for s in (0, 1)]
    good, bad = ([d + shift + 0.001 * i for i, d in enumerate(DICE)] for shift in (0.1, -0.02))
    compared = make_comparison(
        [*runs, (a_run("b", seed=1), scores(bad)), (a_run("b", seed=0), scores(good))], "a (student)"
    )
    found = result(compared, "b")
    assert found.difference.low > 0
    assert found.p < 0.05
    assert (found.holds, found.best) == (False, False)


def test_seeds_are_paired_by_their_number():
    low, high = [0.5 * d for d in DICE], [d + 0.1 for d in DICE]
    noise = [0.01 + 0.001 * i for i in range(8)]
    a = [(a_run("a", seed=0), scores(low)), (a_run("a", seed=1), scores(high))]
    b = [(a_run("b", seed=s), scores(np.add(v, noise))) for s, v in ((1, high), (0, low))]
    assert result(make_comparison([*a, *b], "a (student)"), "b").holds
    unmatched = [(a_run("b", seed=s + 5), found) for s, (_, found) in enumerate(b)]
    assert not result(make_comparison([*a, *unmatched], "a (student)"), "b").holds  # all pairs then


def test_a_method_with_fewer_seeds_is_compared_on_the_seeds_that_both_have():
    """The third seed of the baseline is 0.3 better for all methods, and its class 2 is missed."""
    noise = np.linspace(0.01, 0.02, 8)

    def run(name, seed, values, second=None):
        return a_run(name, seed=seed), [*scores(values), *(second or scores(DICE, "2"))]

    missed = [score(case, "2", status="both_empty") for case in CASES]
    a = [run("a", s, np.add(DICE, 0.3 * (s == 2)), missed if s == 2 else None) for s in (2, 0, 1)]
    b = [run("b", s, np.add(DICE, noise)) for s in (1, 0)]
    c = [run("c", s, np.add(DICE, noise + 0.3 * (s == 2))) for s in (0, 1, 2)]
    compared = make_comparison([*a, *b, *c], "a (student)")
    found = result(compared, "b")
    assert found.difference.mean == pytest.approx(noise.mean() / 2)  # of two classes, one of them equal
    assert found.left_out == 0
    assert [compared.uses_all_runs(method) for method in compared.methods] == [True, False, True]
    alone = make_comparison([*a[1:], *b], "a (student)")
    assert result(alone, "b").difference == found.difference
    assert result(alone, "b").holds
    first, second = (compared._difference(compared.methods[1], m, ALL, "dice") for m in compared.methods[::2])
    assert (len(first.of_runs), len(second.of_runs)) == (2, 2)
    assert second.of_runs == pytest.approx((0.0, 0.0))


def test_runs_whose_seed_is_not_known_are_compared_each_with_each():
    """Seeds are the same for all, so they pair nothing: 2 x 3 differences."""
    a, b = ([(a_run(name), scores(np.add(DICE, 0.1 * i))) for i in range(n)] for name, n in (("a", 2), ("b", 3)))
    compared = make_comparison([*a, *b], "a (student)")
    found = compared._difference(compared.methods[1], compared.methods[0], ALL, "dice")
    assert sorted(found.of_runs) == pytest.approx([-0.1, 0.0, 0.0, 0.1, 0.1, 0.2])
    assert compared.uses_all_runs(compared.methods[1])


def test_a_false_alarm_of_a_seed_that_is_not_compared_does_not_count():
    def run(name, seed, status):
        return a_run(name, seed=seed), [*scores(DICE), *(score(case, "2", status=status) for case in CASES)]

    a = [run("a", 1, "false_alarm"), run("a", 0, "both_empty")]
    found = result(make_comparison([*a, run("b", 0, "both_empty")], "a (student)"), "b")
    assert (found.difference.mean, found.left_out) == (0.0, 8)


def test_a_case_has_the_mean_over_runs_then_classes_and_a_pair_of_runs_the_mean_over_cases():
    def run(one, other):
        return [*scores([one] * 8), *scores([other] * 8, "2")]

    a = [(a_run("a", seed=seed), run(0.5, 0.25 + 0.25 * seed)) for seed in (0, 1)]
    b = [(a_run("b", seed=seed), run(0.75, 0.5 + 0.5 * seed)) for seed in (0, 1)]
    compared = make_comparison([*a, *b], "a (student)")
    assert compared.per_case(compared.methods[0], "dice") == dict.fromkeys(CASES, (0.5 + (0.25 + 0.5) / 2) / 2)
    assert compared._difference(*compared.methods[::-1], ALL, "dice").of_runs == (0.25, 0.375)


def test_classes_are_a_family_of_their_own_for_holms_correction():
    low, high = ([*scores(np.add(DICE, s)), *scores(np.add(DICE, s), "2")] for s in (0.0, 0.1))
    compared = make_comparison([(a_run("a"), low), (a_run("b"), high)], "a (student)")
    smallest = 2 / 2**8  # of eight cases, all ahead; distances are equal
    assert result(compared, "b").p == pytest.approx(4 * smallest)
    assert result(compared, "b", label="2").p == pytest.approx(8 * smallest)


def test_five_cases_have_no_p_and_no_mark():
    few = [score(case, dice=d) for case, d in zip(CASES[:5], DICE, strict=False)]
    more = [score(case, dice=d + 0.1) for case, d in zip(CASES[:5], DICE, strict=False)]
    found = result(make_comparison([(a_run("a"), few), (a_run("b"), more)], "a (student)"), "b")
    assert (found.difference.n, found.difference.p, found.holds, found.best) == (5, None, False, False)
    assert found.difference.low == pytest.approx(0.1)


def test_a_missed_structure_costs_the_diagonal_where_methods_are_compared():
    one = scores(DICE)
    other = [score("c0", status="missed"), *one[1:]]
    compared = make_comparison([(a_run("a"), one), (a_run("b"), other)], "a (student)")
    assert result(compared, "b", "hd95_mm").mean.mean == 2.0  # of the others
    assert result(compared, "b", "hd95_mm").difference.mean == pytest.approx(98 / 8)
    method = compared.methods[1]
    assert run_mean(method.scores[0], ALL, "hd95_mm", penalized=True) == pytest.approx((100 + 7 * 2) / 8)
    assert (compared.status(method, "missed"), compared.status(method, "ok")) == (1, 7)
    assert compared.per_case(method, "hd95_mm")["c0"] == 100.0


def test_a_false_alarm_counts_against_a_structure_that_is_rightly_empty():
    empty = [score("c0", status="both_empty"), *scores(DICE)[1:]]
    alarm = [score("c0", status="false_alarm"), *scores(DICE)[1:]]
    compared = make_comparison([(a_run("a"), empty), (a_run("b"), alarm), (a_run("c"), empty)], "a (student)")
    found = result(compared, "b")
    assert (found.difference.mean, found.left_out) == (pytest.approx(-1 / 8), 0)
    distance = result(compared, "b", "asd_mm")  # the diagonal against no distance
    assert (distance.difference.mean, distance.left_out) == (pytest.approx(100 / 8), 0)
    assert (result(compared, "c").left_out, result(compared, "c").difference.n) == (1, 7)


def test_a_metric_that_is_defined_nowhere_has_no_result():
    nothing = [score(case, status="both_empty") for case in CASES]
    found = result(make_comparison([(a_run("a"), nothing), (a_run("b"), nothing)], "a (student)"), "b")
    assert (found.mean, found.difference, found.holds, found.left_out) == (None, None, False, 8)


def test_corrections_are_made_over_methods_and_metrics():
    rng = np.random.default_rng(2)
    runs = [(a_run(name), scores(np.clip(DICE + rng.normal(0.02, 0.03, 8), 0, 1))) for name in "abc"]
    compared = make_comparison(runs, "a (student)")
    raw = [r.difference.p for r in compared.results.values() if r.difference]
    smallest = min(raw)
    assert len(raw) == 2 * 4
    assert min(r.p for r in compared.results.values() if r.p is not None) == pytest.approx(min(1.0, 8 * smallest))


def test_an_undefined_value_is_no_zero():
    assert run_mean({("c0", "1"): score("c0", status="both_empty"), ("c1", "1"): score("c1")}, ALL, "dice") == 0.5
    assert run_mean({("c0", "1"): score("c0", dice=math.nan)}, ALL, "dice") is None


@pytest.mark.parametrize("other", [scores(DICE)[:-1], scores(DICE, "2"), scores(DICE, convention="literature")])
def test_scores_of_other_cases_classes_or_conventions_are_refused(other):
    with pytest.raises(DataError, match="b was scored on other cases or classes than a"):
        make_comparison([(a_run("a"), scores(DICE)), (a_run("b"), other)], "a (student)")


def test_a_difference_seen_from_the_other_method_is_turned_round():
    noisy = np.clip(np.add(DICE, [0.1, 0.0, 0.02, 0.2, 0.05, -0.04, 0.01, 0.03]), 0, 1)
    compared = make_comparison([(a_run("a"), scores(DICE)), (a_run("b"), scores(noisy))], "a (student)")
    a, b = compared.methods
    there, back = (compared._difference(one, other, ALL, "dice") for one, other in ((b, a), (a, b)))
    assert there.paired.low < there.paired.mean < there.paired.high
    assert (back.paired.low, back.paired.high) == (-there.paired.high, -there.paired.low)
    assert (back.paired.mean, back.paired.p) == (-there.paired.mean, there.paired.p)
    assert back.of_runs == (-there.of_runs[0],)
