"""Folds that would train or validate on other cases than their author believes are refused wherever they are read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.data.splits import (
    adopt_splits,
    benchmark_cases,
    check_copies,
    check_fold,
    check_planned_fold,
    check_splits,
    fold_unlabeled,
    read_splits,
)
from nnunetv2_dycon.errors import ConfigError, DataError, SplitError, UserError
from tests.datasets import environment, make_dataset
from tests.training import begin, make_trainer

KNOWN = ("l_00", "l_01", "l_02", "l_03")
GOOD = {"train": ["l_00", "l_01", "l_02"], "val": ["l_03"]}


def fold(train: list, val: list, *unlabeled: list) -> dict:
    return {"train": train, "val": val, **({"unlabeled": unlabeled[0]} if unlabeled else {})}


WRONG: dict[str, tuple[Any, str]] = {  # content, and what is said of it
    "an object": ({"train": ["l_00"], "val": ["l_01"]}, "must be a list with one"),
    "a text": ("l_00", "must be a list with one"),
    "no fold": ([], "must be a list with one"),
    "folds that are lists": ([["l_00"], ["l_01"]], "must be a list with one"),
    "no val": ([{"train": ["l_00"]}], 'fold 0 has no "val"; add the list'),
    "no train": ([GOOD, {"val": ["l_00"]}], 'fold 1 has no "train"; add the list'),
    "empty val": ([fold(list(KNOWN), [])], 'fold 0: "val" is empty'),
    "empty train": ([fold([], list(KNOWN))], 'fold 0: "train" is empty'),
    "a text for a list": ([fold("l_00", ["l_01"])], '"train" must be a list of case names'),
    "a number for a name": ([fold([1], ["l_01"])], '"train" must be a list of case names'),
    "unlabelled": ([{**GOOD, "unlabelled": ["l_00"]}], 'nothing reads "unlabelled"; write "unlabeled"'),
    "Unlabeled": ([{**GOOD, "Unlabeled": ["l_00"]}], 'nothing reads "Unlabeled"; write "unlabeled"'),
    "validation": ([{"train": ["l_00"], "validation": ["l_01"]}], 'nothing reads "validation"'),
    "test": ([{**GOOD, "test": ["t_00"]}], 'nothing reads "test"; remove it'),
    "val in train": ([fold(["l_00", "l_01"], ["l_01"])], '\'l_01\' in both "train" and "val"'),
    "val is train": ([fold(["l_00"], ["l_00"])], "though 'l_01', 'l_02', 'l_03' could be validated on"),
    "unlabeled in train": ([fold(["l_00"], ["l_01"], ["l_00"])], '\'l_00\' in both "train" and "unlabeled"'),
    "unlabeled in val": ([fold(["l_00"], ["l_01"], ["l_01"])], '\'l_01\' in both "val" and "unlabeled"'),
    "twice in train": (
        [fold(["l_00", "l_00"], ["l_01"])],
        '"train" names \'l_00\' twice; remove one, or add "repeats"',
    ),
    "twice in val": ([fold(["l_00"], ["l_01", "l_01"])], "\"val\" names 'l_01' twice; remove one"),
    "twice unlabeled": ([fold(["l_00"], ["l_01"], ["l_02"] * 2)], "\"unlabeled\" names 'l_02' twice; remove one"),
    "unknown in train": ([fold(["l_00", "x"], ["l_01"])], "\"train\" names 'x', not in "),
    "unknown in val": ([GOOD, fold(["l_00"], ["t_00"])], "fold 1: \"val\" names 't_00', not in "),
    "a switch that is a word": ([{**GOOD, "repeats": "yes"}], '"repeats" must be true or false'),
}
FINE: dict[str, Any] = {
    "one fold": [GOOD],
    "cases left out": [fold(["l_00"], ["l_01"])],
    "benchmark": [fold(["l_00"], ["l_01"], ["l_02", "l_03"])],
    "all of the labelled cases on both sides": [fold(list(KNOWN), list(KNOWN))],
    "the one labelled case on both sides": [fold(["l_00"], ["l_00"], ["l_01", "l_02", "l_03"])],
    "drawn more often": [{"train": ["l_00", "l_00", "l_01"], "val": ["l_02"], "repeats": True}],
    "meant overlap": [{"train": ["l_00", "l_01"], "val": ["l_00"], "overlap": True}],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_split_is_one_line_that_names_file_fold_and_remedy(name: str) -> None:
    content, words = WRONG[name]
    with pytest.raises(SplitError, match=re.escape(words)) as caught:
        check_splits(content, "file.json", KNOWN)
    assert str(caught.value).startswith("file.json")
    assert "\n" not in str(caught.value)
    assert re.search("; (mend|add|name|remove|write|correct)|must be", str(caught.value))


@pytest.mark.parametrize("name", FINE)
def test_a_split_that_can_be_trained_passes(name: str) -> None:
    check_splits(FINE[name], "file.json", KNOWN)


def test_only_meant_oddities_pass_for_their_switch() -> None:
    for key, words in (("repeats", "in both"), ("overlap", "twice")):
        with pytest.raises(SplitError, match=words):
            check_splits([{"train": ["a", "a", "b"], "val": ["b"], key: True}], "file.json")
    with pytest.raises(SplitError, match="twice"):
        check_splits([{"train": ["a"], "val": ["b", "b"], "repeats": True, "overlap": True}], "file.json")
    with pytest.raises(SplitError, match=r'in both "train" and "unlabeled"'):
        check_splits([{**fold(["a"], ["a"], ["a"]), "overlap": True}], "file.json")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_any_partition_is_accepted_and_any_overlap_refused(roles: list[int]) -> None:
    names = [["x", *(f"c{i}" for i, r in enumerate(roles) if r == role)] for role in range(3)]
    for role, cases in enumerate(names):
        cases[0] = f"first of {role}"
    check_splits([fold(*names)], "file.json", {case for cases in names for case in cases} | {"other"})
    assert fold_unlabeled([fold(*names)], 0) == tuple(sorted(names[2]))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        mixed = [list(cases) for cases in names]
        mixed[other].append(mixed[one][-1])
        with pytest.raises(SplitError, match="in both"):
            check_splits([fold(*mixed)], "file.json")


# ---- where they are read -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    make_dataset(root, dataset_id=4, labeled=4, unlabeled=1, test=1, shape=(6, 6, 6))
    return root


@pytest.mark.parametrize("name", [*WRONG, *FINE])
def test_check_says_what_is_wrong_with_the_file(small: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, folder in environment(small).items():
        monkeypatch.setenv(variable, folder)
    path = small / "nnUNet_raw/Dataset004_Tiny/splits_final.json"
    path.write_text(json.dumps(FINE.get(name) or WRONG[name][0]))
    (found,) = (one for one in check(4, processes=1) if one.name == "splits_final.json")
    assert found.ok is (name in FINE)
    if name in WRONG:
        assert WRONG[name][1] in found.text
        assert str(path) in found.text


@pytest.mark.parametrize("trained", ["nnUNetTrainerDyCON", "nnUNetTrainerLabeledOnly"])
@pytest.mark.parametrize(
    "name", ["no val", "unlabelled", "val in train", "empty val", "unknown in val", "val is train"]
)
def test_a_training_does_not_begin_with_a_wrong_file(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, trained: str, name: str
) -> None:
    content, words = WRONG[name]
    monkeypatch.setattr("nnunetv2_dycon.trainers.cases.ready_cases", lambda *_, **__: pytest.fail("prepared first"))
    path = tiny / "nnUNet_preprocessed/Dataset901_Tiny/splits_final.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=re.escape(words)):
            begin(make_trainer(f"{trained}_epochs1_iters1"))
    finally:
        path.write_text(before)


@pytest.mark.parametrize("trained", ["nnUNetTrainerDyCON", "nnUNetTrainerLabeledOnly"])
def test_a_fold_beyond_the_file_is_not_a_random_split(tiny: Path, trained: str) -> None:
    with pytest.raises(ConfigError, match=r"splits_final\.json has no fold 1; type -f 0$"):
        begin(make_trainer(f"{trained}_epochs1_iters1", fold=1))


def test_a_fold_beyond_those_that_will_be_made_is_refused_and_none_is_made(tiny: Path) -> None:
    path = tiny / "nnUNet_preprocessed/Dataset901_Tiny/splits_final.json"
    raw = tiny / "nnUNet_raw/Dataset901_Tiny/splits_final.json"
    before = path.read_text(), raw.read_text()
    try:
        path.unlink()
        raw.unlink()
        with pytest.raises(ConfigError, match=r"no fold 4: 4 labelled cases are divided into 4 folds; type -f 0 to 3$"):
            begin(make_trainer("nnUNetTrainerLabeledOnly_epochs1_iters1", fold=4))
        assert not path.exists()
    finally:
        path.write_text(before[0])
        raw.write_text(before[1])


@pytest.mark.parametrize(
    ("cases", "wanted", "words"),
    [
        (12, 5, "divided into 5 folds; type -f 0 to 4"),
        (1, 1, "divided into 1 fold; type -f 0$"),
        (12, -1, "no fold -1"),
        (12, "best", "no fold best"),
    ],
)
def test_folds_that_will_not_be_made(cases: int, wanted: int | str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_planned_fold(cases, wanted)
    check_planned_fold(cases, 0)
    check_planned_fold(cases, "all")
    with pytest.raises(DataError, match="no labelled case"):
        check_planned_fold(0, 0)


def test_a_wrong_file_is_not_copied_to_where_it_is_read(tmp_path: Path) -> None:
    used, raw = tmp_path / "used", tmp_path / "raw"
    for folder in (used, raw):
        folder.mkdir()
    (raw / "splits_final.json").write_text(json.dumps([{"train": ["a"]}]))
    with pytest.raises(SplitError, match=re.escape(str(raw))):
        adopt_splits(used, raw)
    assert not list(used.iterdir())
    (raw / "splits_final.json").write_text(json.dumps([fold(["a"], ["b"])]))
    assert adopt_splits(used, raw)
    assert read_splits(used) == [fold(["a"], ["b"])]


# ---- benchmark mode ----------------------------------------------------------------------------------------


def test_a_fold_gives_its_own_list_only() -> None:
    splits = [fold(["a"], ["b"], ["d", "c"]), fold(["c"], ["d"], ["a"]), fold(["a", "b"], ["c"])]
    assert [fold_unlabeled(splits, f, "abcd") for f in range(3)] == [("c", "d"), ("a",), ()]
    assert benchmark_cases(splits, "abcd") == ("a", "c", "d")


def test_a_list_that_names_an_unknown_case_names_fold_and_case() -> None:
    with pytest.raises(SplitError, match=r"splits_final\.json, fold 1: .*'z', not in imagesTr"):
        fold_unlabeled([fold(["a"], ["b"]), fold(["a"], ["b"], ["z"])], 1, known=["a", "b", "c"])


@pytest.mark.parametrize("wrong", ["all", 2, 7, -1])
def test_folds_that_stock_would_fill_with_hidden_labels_are_refused(wrong: int | str) -> None:
    splits = [fold(["a"], ["b"], ["c"]), fold(["b"], ["a"])]
    for function in (check_fold, fold_unlabeled):
        with pytest.raises(ConfigError, match=r"(would train on the labels|has no fold).*type -f 0 to 1$"):
            function(splits, wrong)
        with pytest.raises(ConfigError, match=r"has no fold 1; type -f 0$"):
            function(splits[:1], 1)


def test_fold_all_of_a_plain_file_and_any_fold_without_a_file_pass() -> None:
    plain = [fold(["a"], ["b"]), fold(["b"], ["a"])]
    for splits, asked in ((plain, "all"), (plain, 1), (plain, "1"), ([], 7)):
        check_fold(splits, asked)
        assert fold_unlabeled(splits, asked) == ()


def test_splits_are_read_where_training_reads_them(tmp_path: Path) -> None:
    used, raw = tmp_path / "used", tmp_path / "raw"
    for folder in (used, raw):
        folder.mkdir()
    assert read_splits(used, raw) == []
    marked, plain = [fold(["a"], ["b"], ["c"])], [fold(["a", "c"], ["b"])]
    (raw / "splits_final.json").write_text(json.dumps(marked))
    assert read_splits(used, raw) == marked
    (used / "splits_final.json").write_text(json.dumps(plain))
    assert read_splits(used) == plain
    with pytest.raises(SplitError, match="training reads the first; type: cp"):
        read_splits(used, raw)
    (used / "splits_final.json").write_text(json.dumps(marked * 2))
    assert read_splits(used, raw) == marked * 2


def test_only_lists_that_training_would_pass_over_are_differences(tmp_path: Path) -> None:
    used, raw = tmp_path / "used", tmp_path / "raw"
    for folder in (used, raw):
        folder.mkdir()
    plain, marked = fold(["a"], ["b"]), fold(["a"], ["b"], ["c"])
    for splits, others, same in (
        ([plain], [plain] * 5, True),
        ([plain] * 5, [plain], True),
        ([marked], [marked, plain], True),
        ([plain], [plain, marked], False),
        ([plain, marked], [marked, plain], False),
    ):
        (used / "splits_final.json").write_text(json.dumps(splits))
        (raw / "splits_final.json").write_text(json.dumps(others))
        if same:
            assert read_splits(used, raw) == splits
        else:
            with pytest.raises(SplitError, match=r"cp .*raw.* .*used.* \(this replaces the first\), or: cp .*used"):
                read_splits(used, raw)


@pytest.mark.parametrize("text", ["{", '{"train": []}', "[1]"])
def test_a_broken_splits_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "splits_final.json").write_text(text)
    with pytest.raises(SplitError, match=re.escape(str(tmp_path / "splits_final.json"))):
        read_splits(tmp_path)


def test_a_copy_in_the_raw_folder_that_differs_is_named_with_both_ways_to_mend_it(tmp_path: Path) -> None:
    used, other = (tmp_path / name / "splits_final.json" for name in ("preprocessed", "raw"))
    for path in (used, other):
        path.parent.mkdir()
        path.write_text(json.dumps([GOOD]))
    check_copies(used.parent, other.parent)
    other.write_text(json.dumps([GOOD, fold(["l_00", "l_01"], ["l_02"])]))
    said = (
        f"fold 1 of {other} differs from that of {used}, which training reads and planning refuses; "
        f"type: cp {other} {used} (this replaces the second), or: cp {used} {other}"
    )
    with pytest.raises(SplitError, match=f"^{re.escape(said)}$"):
        check_copies(used.parent, other.parent)
