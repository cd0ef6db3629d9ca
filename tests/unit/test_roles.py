"""Roles are read from names alone, clashes stop, and an "unlabeled" list is checked against its fold."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.data.roles import read_roles
from nnunetv2_dycon.data.splits import benchmark_cases, check_fold, fold_unlabeled, read_splits
from nnunetv2_dycon.errors import ConfigError, SplitError

JSON = {"file_ending": ".nii.gz", "channel_names": {"0": "a", "1": "b"}}


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for case in ("a_1", "b_0001"):  # the second looks as if it had a channel number
        touch(tmp_path / "imagesTr", f"{case}_0000.nii.gz", f"{case}_0001.nii.gz")
        touch(tmp_path / "labelsTr", f"{case}.nii.gz")
    touch(tmp_path / "imagesUn", "c_0000.nii.gz", "c_0001.nii.gz", "notes.txt")
    touch(tmp_path / "imagesTs", "d_0000.nii.gz", "d_0001.nii.gz")
    return tmp_path


def test_roles_follow_the_folders_and_files_are_in_channel_order(raw: Path) -> None:
    roles = read_roles(raw, JSON)
    assert (roles.labeled, roles.unlabeled, roles.test) == (("a_1", "b_0001"), ("c",), ("d",))
    assert set(roles.files) == {"a_1", "b_0001", "c", "d"}
    assert roles.files["b_0001"] == tuple(raw / "imagesTr" / f"b_0001_000{c}.nii.gz" for c in (0, 1))
    assert roles.files["c"] == tuple(raw / "imagesUn" / f"c_000{c}.nii.gz" for c in (0, 1))


def test_missing_folders_are_empty_roles(tmp_path: Path) -> None:
    roles = read_roles(tmp_path, JSON)
    assert (roles.labeled, roles.unlabeled, roles.test) == ((), (), ())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("imagesTr/a_1_0000.nii.gz", "imagesUn/a_1_0000.nii.gz"),
        ("imagesTr/a_1_0000.nii.gz", "imagesTs/a_1_0000.nii.gz"),
        ("imagesUn/c_0000.nii.gz", "imagesTs/c_0000.nii.gz"),
        ("labelsTr/c.nii.gz", "imagesUn/c_0000.nii.gz"),  # image moved, label left behind
        ("imagesUn/c_0000.nii.gz", "labelsTs/c.nii.gz"),
    ],
)
def test_a_name_in_two_roles_stops_with_both_paths(raw: Path, one: str, other: str) -> None:
    for path in (one, other):
        touch((raw / path).parent, Path(path).name)
    with pytest.raises(SplitError) as caught:
        read_roles(raw, JSON)
    assert str(raw / one) in str(caught.value)
    assert str(raw / other) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_cases_of_dataset_json_are_honoured_and_left_unchanged(raw: Path) -> None:
    entry = {"x": {"images": ["elsewhere/p.nii.gz", "elsewhere/q.nii.gz"], "label": "elsewhere/l.nii.gz"}}
    content = {**JSON, "dataset": entry}
    before = json.dumps(content)
    roles = read_roles(raw, content)
    assert roles.labeled == ("x",)
    assert roles.files["x"] == (raw / "elsewhere/p.nii.gz", raw / "elsewhere/q.nii.gz")
    assert json.dumps(content) == before
    touch(raw / "imagesUn", "x_0000.nii.gz")
    with pytest.raises(SplitError, match=re.escape(str(raw / "elsewhere/p.nii.gz"))):
        read_roles(raw, content)


def fold(train: list, val: list, *unlabeled: list) -> dict:
    return {"train": train, "val": val, **({"unlabeled": unlabeled[0]} if unlabeled else {})}


def test_a_fold_gives_its_own_list_only() -> None:
    splits = [fold(["a"], ["b"], ["d", "c"]), fold(["c"], ["d"], ["a"]), fold(["a", "b"], ["c"])]
    assert [fold_unlabeled(splits, f, "abcd") for f in range(3)] == [("c", "d"), ("a",), ()]
    assert benchmark_cases(splits, "abcd") == ("a", "c", "d")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (fold(["a"], ["b"], ["a", "c"]), '\'a\' in both "unlabeled" and "train"'),
        (fold(["a"], ["b"], ["b"]), '\'b\' in both "unlabeled" and "val"'),
        (fold(["a"], ["b"], ["c", "c"]), "'c' twice"),
        (fold(["a"], ["b"], ["z"]), "'z', not in imagesTr"),
        (fold(["a"], ["b"], "c"), "must be a list"),
        (fold(["a"], ["b"], [1]), "must be a list"),
    ],
)
def test_a_wrong_list_names_fold_and_case(entry: dict, words: str) -> None:
    with pytest.raises(SplitError, match=re.escape(words)) as caught:
        fold_unlabeled([fold(["a"], ["b"]), entry], 1, known=["a", "b", "c"])
    assert "splits_final.json, fold 1" in str(caught.value)


@pytest.mark.parametrize("wrong", ["all", 2, 7, -1])
def test_folds_that_stock_would_fill_with_hidden_labels_are_refused(wrong: int | str) -> None:
    splits = [fold(["a"], ["b"], ["c"]), fold(["b"], ["a"])]
    for function in (check_fold, fold_unlabeled):
        with pytest.raises(ConfigError, match=r"would train on the labels.*use fold 0 to 1"):
            function(splits, wrong)
    plain = [fold(["a"], ["b"]), fold(["b"], ["a"])]
    check_fold(plain, wrong)
    assert fold_unlabeled(plain, wrong) == ()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_any_partition_is_accepted_and_any_overlap_refused(roles: list[int]) -> None:
    names = [[f"c{i}" for i, r in enumerate(roles) if r == role] for role in range(3)]
    assert fold_unlabeled([fold(*names)], 0) == tuple(sorted(names[2]))
    for other in (0, 1):
        if names[other]:
            with pytest.raises(SplitError):
                fold_unlabeled([fold(*names[:2], [*names[2], names[other][0]])], 0)


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
        ([], [plain], True),
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
