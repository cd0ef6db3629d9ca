"""Prepared unlabelled cases that are damaged, copied, or from an earlier version."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_dycon.commands import main
from nnunetv2_dycon.data import manifest
from nnunetv2_dycon.data.manifest import unlabeled_status
from nnunetv2_dycon.data.prepared_files import SUFFIXES
from nnunetv2_dycon.errors import DataError
from tests.prepared import ID, Place, prepare, tree
from tests.training import begin, make_trainer, steps


def same_size(content: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(content))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "halved": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    "garbage of the same size": same_size,
    "longer": lambda content: content + b"\0",
}


def damage(path: Path, kind: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(kind(content))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_case_is_named_and_prepared_anew_alone(
    place: Place, made: list[str], caplog: pytest.LogCaptureFixture, kind: str, suffix: str
) -> None:
    prepare()
    before = tree(place)
    damage(place.folder / f"u_01{suffix}", DAMAGE[kind])
    status = unlabeled_status(ID)
    assert (status.state, status.reason) == ("stale", "1 case with damaged files (u_01)")
    made.clear()
    caplog.set_level(logging.INFO)
    prepare()
    assert "1 case with damaged files (u_01)" in caplog.text
    assert made == ["u_01"]
    assert tree(place) == before
    assert unlabeled_status(ID).state == "ok"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_byte_is_found_by_the_digest(place: Place, made: list[str], suffix: str) -> None:
    prepare()
    before = tree(place)
    damage(place.folder / f"u_02{suffix}", flipped)
    made.clear()
    prepare()
    assert made == ["u_02"]
    assert tree(place) == before


def copy_anew(folder: Path) -> None:
    """Copy a folder as `cp -r` does: with new times."""
    shutil.move(folder, folder.with_name("old"))
    shutil.copytree(folder.with_name("old"), folder, copy_function=shutil.copyfile)
    for path in folder.iterdir():
        os.utime(path, (1, 1))


def test_copied_cases_are_not_prepared_again(place: Place, made: list[str]) -> None:
    prepare()
    copy_anew(place.folder)
    status = unlabeled_status(ID)
    assert status.state == "ok"
    (note,) = status.notes
    assert "3 of the prepared unlabelled cases have other times" in note
    assert "3 of them were opened" in note
    assert status.command in note
    made.clear()
    prepare()
    assert made == []
    assert unlabeled_status(ID).notes == ()


def test_a_training_does_not_wait_until_thousands_of_copied_cases_are_opened(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    copy_anew(place.folder)
    damage(place.folder / "u_02.b2nd", same_size)
    monkeypatch.setattr(manifest, "_OPENING", -1.0)
    status = unlabeled_status(ID)
    assert status.state == "ok"
    assert "0 of them were opened" in status.notes[0]


@pytest.mark.parametrize("kind", [None, *DAMAGE])
def test_cases_of_a_manifest_without_their_files_are_read_and_kept_where_they_are_whole(
    place: Place, made: list[str], kind: str | None
) -> None:
    prepare()
    before = tree(place)
    content = json.loads(place.manifest.read_text())
    for record in content["cases"].values():
        del record["prepared"]
    place.manifest.write_text(json.dumps(content))
    assert unlabeled_status(ID).state == "ok"
    if kind:
        damage(place.folder / "u_00.b2nd", DAMAGE[kind])
    made.clear()
    prepare()
    if kind != "longer":  # nnU-Net reads what comes before
        assert made == (["u_00"] if kind else [])
        assert tree(place) == before
    assert (unlabeled_status(ID).state, unlabeled_status(ID).notes) == ("ok", ())


@pytest.mark.parametrize("record", [[], {}, {"sizes": 1}, {"sizes": None, "mtimes_ns": "x", "sha256": 0}])
def test_a_record_of_another_form_means_that_the_case_is_looked_at(place: Place, record: object) -> None:
    prepare()
    before = tree(place)
    content = json.loads(place.manifest.read_text())
    content["cases"]["u_00"]["prepared"] = record
    place.manifest.write_text(json.dumps(content))
    prepare()
    assert tree(place) == before
    assert (unlabeled_status(ID).state, unlabeled_status(ID).notes) == ("ok", ())


def test_a_training_prepares_a_damaged_case_and_says_which(place: Place, made: list[str], capsys) -> None:
    prepare()
    damage(place.folder / "u_01.pkl", DAMAGE["halved"])
    made.clear()
    (place.folder / "stray.npz").touch()  # of no format that is looked for
    begin(make_trainer("nnUNetTrainerMeanTeacher_epochs1_iters1", fold="all"))
    assert made == ["u_01"]
    assert "stale: 1 case with damaged files (u_01). Preparing them now" in capsys.readouterr().out


def test_cases_are_prepared_again_by_name(place: Place, made: list[str]) -> None:
    prepare()
    made.clear()
    prepare(again=["u_02", "u_00"])
    assert made == ["u_00", "u_02"]
    with pytest.raises(DataError, match=r"--again l_00: .* has no unlabelled case of that name"):
        prepare(again=["u_00", "l_00"])
    assert unlabeled_status(ID).state == "ok"


def test_damage_that_sizes_and_times_hide_is_a_line_when_drawn_whose_command_mends_it(place: Place) -> None:
    """Up-to-date cases are not opened, so that thousands of them take no time."""
    prepare()
    before = tree(place)
    path = place.folder / "u_01_seg.b2nd"
    stat = path.stat()
    damage(path, same_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert unlabeled_status(ID).state == "ok"
    t = begin(make_trainer("nnUNetTrainerMeanTeacher_epochs1_iters1", fold="all"))
    with pytest.raises(DataError) as caught:
        steps(t, 50)
    command = "nnUNetv2_dycon preprocess_unlabeled -d 901 -c 3d_fullres --again u_01"
    assert f"{place.folder / 'u_01'}: the prepared case cannot be read (" in str(caught.value)
    assert f"; type: {command} (then train on with --c)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert main([*command.split()[1:], "-np", "1"]) == 0
    assert tree(place) == before
