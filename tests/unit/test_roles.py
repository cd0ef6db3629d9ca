"""Roles are read from names alone, clashes stop, and hidden files are nobody's."""

import json
import re
from pathlib import Path

import pytest

from nnunetv2_dycon.data.roles import read_roles
from nnunetv2_dycon.errors import SplitError

JSON = {"file_ending": ".nii.gz", "channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "x": 1}}


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
