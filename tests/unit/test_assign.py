"""Roles are complete, disjoint and repeatable for whatever is on disk; validation never takes a test case."""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.conversion.assign import ROLES, Assignment, Known, Request, assign, draw, parse_labeled
from nnunetv2_dycon.conversion.protocols import PUBLISHED, Protocol, read_protocol
from nnunetv2_dycon.dataset_conversion import CONVERTERS, converter
from nnunetv2_dycon.errors import ConfigError, SplitError

PUBLISHED_PROTOCOLS = [(name, protocol) for name in CONVERTERS for protocol in converter(name).COLLECTION.protocols]


def plain(text: str) -> str:
    return text


def protocol(train: int = 10, val: int = 2, test: int = 3, labeled: Iterable[int] = (2, 4)) -> Protocol:
    lists = [tuple(f"{kind}{i}" for i in range(n)) for kind, n in (("t", train), ("v", val), ("x", test))]
    return Protocol("made", "here", "", *lists, {n: lists[0][:n] for n in labeled})


def known(cases: Iterable[str], **more) -> Known:
    return Known(dict.fromkeys(cases, True), **more)


def everybody(one: Protocol) -> tuple[str, ...]:
    return (*one.train, *one.val, *one.test)


def roles(one: Protocol, labeled=2, seed=None, cases=None, **more) -> Assignment:
    return assign(one, Request(labeled, seed), known(everybody(one) if cases is None else cases, **more), plain)


# ---- properties --------------------------------------------------------------------------------------------

REQUESTS = st.one_of(st.floats(0.05, 0.95), st.sampled_from(["all"]))
SEEDS = st.one_of(st.none(), st.integers(0, 50))


@given(
    pick=st.sampled_from(PUBLISHED_PROTOCOLS),
    dice=st.integers(0, 9999),
    share=st.floats(0.1, 1),
    fraction=REQUESTS,
    seed=SEEDS,
)
def test_any_subset_on_disk_gets_roles_that_are_disjoint_and_complete(pick, dice, share, fraction, seed) -> None:
    choice = random.Random(dice)
    collection = converter(pick[0]).COLLECTION
    one = read_protocol(PUBLISHED / f"{pick[1]}.json", collection.case_name)
    there = {case: choice.random() < 0.9 for case in everybody(one) if choice.random() < share}
    there["stranger"] = True
    on_disk = Known(there, empty=collection.empty, dropped=collection.dropped)
    try:
        result = assign(one, Request(fraction, seed), on_disk, collection.case_name)
    except (ConfigError, SplitError):
        return  # too few are there
    cases = [case for role in ROLES for case in result.cases[role]]
    missing = [case for role in ROLES for case in result.missing[role]]
    assert len(set(cases)) == len(cases)
    assert set(cases) <= set(there)
    assert not set(cases) & set(missing)
    # everybody of the protocol but the dropped ones is somewhere, once; nobody else is
    assert sorted(cases + missing) == sorted(set(everybody(one)) - collection.dropped)
    assert set(result.unknown) == {"stranger"}
    assert set(result.cases["test"]) <= set(one.test)
    assert set(result.cases["validation"]) <= set(one.val)
    for role in ("labeled", "validation", "test"):
        assert all(there[case] or case in collection.empty for case in result.cases[role])
    _check_folds(result, one)


def _check_folds(result: Assignment, one: Protocol) -> None:
    labeled, validation = set(result.cases["labeled"]), set(result.cases["validation"])
    for fold in result.folds:
        train, val = set(fold["train"]), set(fold["val"])
        assert train
        assert val
        if validation:
            assert (train, val) == (labeled, validation)
        else:
            assert train | val == labeled
            assert not train & val or len(labeled) == 1
        assert not (train | val) & set(one.test)


@given(st.integers(1, 30), st.integers(0, 99), st.floats(0.01, 1))
def test_a_fraction_is_the_rounded_part_of_the_training_cases(train, seed, fraction) -> None:
    one = protocol(train=train, labeled=())
    expected = round(fraction * train)
    if fraction == 1 or not 1 <= expected <= train:
        return
    assert len(roles(one, fraction, seed).cases["labeled"]) == expected


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 9), st.sets(st.integers(0, 9)))
def test_draws_are_nested_and_do_not_depend_on_what_is_on_disk(seed, small, large, gone) -> None:
    small, large = sorted((small, large))
    one = protocol(labeled=())
    few, many = (roles(one, n, seed).cases["labeled"] for n in (small, large))
    assert set(few) <= set(many)
    order = draw(one.train, seed, {}, 10)
    assert draw(reversed(one.train), seed, {}, 10) == order
    left = [case for case in one.train if case not in {f"t{i}" for i in gone}]
    if left:
        number = min(small, len(left))
        drawn = roles(one, number, seed, cases=[*left, *one.val, *one.test]).cases["labeled"]
        assert set(drawn) == set([case for case in order if case in left][:number])


@given(
    st.lists(st.sampled_from("abcde"), min_size=2, max_size=14),
    st.integers(0, 20),
    st.integers(1, 14),
)
def test_subjects_are_never_divided(subjects, seed, number) -> None:
    groups = {f"t{i}": s for i, s in enumerate(subjects)}
    drawn = draw(groups, seed, groups, number)
    assert len(drawn) <= number
    for subject in set(subjects):
        members = {case for case, s in groups.items() if s == subject}
        assert members <= set(drawn) or not members & set(drawn)
    one = protocol(train=len(subjects), val=0, labeled=())
    number = min(number, len(subjects))
    try:
        result = roles(one, number, seed, groups=groups)
    except SplitError:
        return  # the first subject is larger than what was asked for
    for fold in result.folds:
        if fold["train"] != fold["val"]:
            assert not {groups[c] for c in fold["train"]} & {groups[c] for c in fold["val"]}


def test_a_case_called_like_a_subject_is_not_of_it() -> None:
    groups = {"a": "b", "c": "b"}
    assert {draw("abc", seed, groups, 1) for seed in range(9)} == {("b",)}  # the other two fit together or not at all


def test_scans_of_a_subject_validate_together_though_only_one_is_in_the_smallest_list() -> None:
    groups = {"t0": "one", "t5": "one", "t1": "two", "t6": "two"}
    folds = roles(protocol(val=0), "all", groups=groups).folds
    assert sorted(fold["val"] for fold in folds) == [["t0", "t5"], ["t1", "t6"]]
    assert all(len(fold["train"]) == 8 for fold in folds)


def test_different_seeds_give_different_draws() -> None:
    one = protocol(train=40, labeled=())
    assert len({roles(one, 4, seed).cases["labeled"] for seed in range(10)}) == 10


# ---- single statements -------------------------------------------------------------------------------------


def test_without_a_seed_the_published_cases_are_taken() -> None:
    result = roles(protocol(), 0.2)
    assert result.cases["labeled"] == ("t0", "t1")
    assert result.cases["unlabeled"] == tuple(f"t{i}" for i in range(2, 10))
    assert (result.cases["validation"], result.cases["test"]) == (("v0", "v1"), ("x0", "x1", "x2"))
    assert result.role_of["t2"] == "unlabeled"


def test_another_number_is_the_first_ones_with_a_note_or_refused_where_lists_are_not_the_first() -> None:
    result = roles(protocol(), 3)
    assert result.cases["labeled"] == ("t0", "t1", "t2")
    assert any("3 labelled cases are not a published number (2, 4)" in note for note in result.notes)
    odd = Protocol("odd", "", "", ("a", "b", "c"), (), ("d",), {2: ("b", "c")})
    with pytest.raises(ConfigError, match=r"odd has no list of 1 labelled cases \(it has: 2\)"):
        roles(odd, 1)
    with pytest.raises(ConfigError, match="it has: none"):
        roles(protocol(labeled=()), 1)
    assert len(roles(odd, 1, seed=0).cases["labeled"]) == 1


def test_cases_without_foreground_are_never_drawn_nor_first_but_all_has_them() -> None:
    one = protocol(labeled=(4,))
    empty = ("t0", "t5")
    assert roles(one, 2, empty=empty).cases["labeled"] == ("t1", "t2")
    assert all(not set(roles(one, 8, s, empty=empty).cases["labeled"]) & set(empty) for s in range(20))
    assert set(empty) <= set(roles(one, "all", empty=empty).cases["labeled"])


@pytest.mark.parametrize("fold", range(3))
def test_the_lesion_free_cases_of_isles_are_never_labeled(fold) -> None:
    collection = converter("ISLES22").COLLECTION
    assert collection.empty == {f"sub-strokecase{n}" for n in ("0150", "0151", "0170")}
    one = read_protocol(PUBLISHED / f"isles22_dycon_fold{fold}.json", collection.case_name)
    there = known(everybody(one), empty=collection.empty)
    requests = [Request(n) for n in (10, 20, 40, 197)] + [Request(197, s) for s in range(4)]
    for request in requests:
        labeled = assign(one, request, there, plain).cases["labeled"]
        assert not set(labeled) & collection.empty
    every = assign(one, Request("all"), there, plain).cases["labeled"]
    assert set(every) & collection.empty == set(one.train) & collection.empty


def test_an_empty_case_needs_no_label_and_any_other_does() -> None:
    one = protocol()
    there = dict.fromkeys(everybody(one), True) | {"v0": False, "x0": False, "t5": False, "t0": False}
    result = assign(one, Request(2), Known(there, empty=("v0",)), plain)
    assert result.missing == {"labeled": ("t0",), "validation": (), "unlabeled": (), "test": ("x0",)}
    assert "t5" in result.cases["unlabeled"]


def test_all_keeps_validation_and_test_cases_and_their_folds() -> None:
    for one in (protocol(), protocol(val=0)):
        some, every = roles(one, 4), roles(one, "all")
        assert every.cases["unlabeled"] == ()
        assert all(some.cases[role] == every.cases[role] for role in ("validation", "test"))
        assert [f["val"] for f in some.folds] == [f["val"] for f in every.folds]


def test_without_validation_cases_the_same_labeled_ones_serve_for_every_number() -> None:
    one = protocol(train=40, val=0, labeled=(4, 8, 16))
    held = [[fold["val"] for fold in roles(one, n).folds] for n in (4, 8, 16, "all")]
    assert held[0] == held[1] == held[2] == held[3]
    assert {case for fold in held[0] for case in fold} <= {"t0", "t1", "t2", "t3"}
    meaning = roles(one, 8).notes[-1]
    assert "fold 0 trains on 7 of the 8 labelled cases and validates on 1" in meaning
    alone = roles(protocol(val=0, labeled=(1,)), 1)
    assert alone.folds == ({"train": ["t0"], "val": ["t0"]},)
    assert "measures nothing" in alone.notes[-1]


def test_dropped_cases_are_in_no_role_and_named() -> None:
    result = roles(protocol(), 2, dropped=("t1", "x0", "v0", "other"))
    everywhere = {case for role in ROLES for case in (*result.cases[role], *result.missing[role])}
    assert not everywhere & {"t1", "x0", "v0"}
    assert "left out of the protocol's lists: t1, v0, x0" in result.notes
    assert result.unknown == ()


def test_a_list_of_ids_names_labeled_cases_of_the_protocol(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("t7\nt3\n", encoding="utf-8")
    assert roles(protocol(), path).cases["labeled"] == ("t7", "t3")
    path.write_text("t7\nx0\n", encoding="utf-8")
    with pytest.raises(SplitError, match=r"'x0' is not a training case of made"):
        roles(protocol(), path)


def test_a_json_file_is_a_protocol_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"labeled": ["t9"], "unlabeled": ["x0"], "test": ["t0"]}', encoding="utf-8")
    result = roles(protocol(), path)
    assert result.protocol.name == "own"
    assert {role: result.cases[role] for role in ROLES} == {
        "labeled": ("t9",),
        "validation": (),
        "unlabeled": ("x0",),
        "test": ("t0",),
    }
    assert "t1" in result.unknown
    path.write_text('{"labeled": {"1": ["a"], "2": ["a", "b"]}, "train": ["a", "b"]}', encoding="utf-8")
    with pytest.raises(SplitError, match=r'has "labeled" lists of 1, 2 cases; .* --protocol .*own\.json --labeled 1$'):
        roles(protocol(), path)


def test_no_labeled_case_there_is_an_error_that_names_some() -> None:
    with pytest.raises(SplitError, match=r"none of the 4 labelled cases of made .* \(t0, t1, t2 and 1 more\)"):
        roles(protocol(), 4, cases=["t9", "x0"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("8", 8), (8, 8), (0.2, 0.2), ("all", "all"), (1, 1), ("8.0", 8), (5e-1, 0.5)],
)
def test_what_labeled_may_be(text, value) -> None:
    parsed = parse_labeled(text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize("text", ["1.0", 1.0, "1.", "1e0"])
def test_one_that_may_mean_a_case_or_all_of_them_is_refused(text) -> None:
    with pytest.raises(ConfigError, match=r"--labeled 1.* type 1 \(one case\) or all$"):
        parse_labeled(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "inf", "1e400", "-inf", "ten", "", "0.0", 2.5])
def test_what_labeled_may_not_be(text) -> None:
    with pytest.raises(ConfigError, match="--labeled"):
        parse_labeled(text)
