"""A data set is written whole or not at all: on a full or read-only disk, and with two runs at once."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.conversion.split import split
from nnunetv2_dycon.errors import DataError, WriteError
from nnunetv2_dycon.files import whole_file
from tests.datasets import environment, make_dataset


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    make_dataset(tmp_path, dataset_id=4, labeled=4, unlabeled=2, test=1, shape=(6, 6, 6))
    return tmp_path / "nnUNet_raw"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(monkeypatch: pytest.MonkeyPatch, function: str, call: int, number: int) -> list[str]:
    """Let one call of a function of `os` fail as the system does; returns the calls."""
    real, calls = getattr(os, function), []

    def fail(path: Any, *rest: Any, **options: Any) -> Any:
        calls.append(str(path))
        if len(calls) == call + 1:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, function, fail)
    return calls


# ---- a disk that cannot be written -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG])
@pytest.mark.parametrize("function", ["replace", "fsync", "rename"])
def test_a_split_that_cannot_be_written_leaves_nothing(raw: Path, monkeypatch: Any, function: str, number: int) -> None:
    before = tree(raw)
    for call in range(100):  # at each place where it writes
        with monkeypatch.context() as patch:
            calls = failing(patch, function, call, number)
            try:
                split(4, 604, 2, processes=1)
            except WriteError as error:
                text = str(error)
            else:
                assert len(calls) == call
                break
        assert "\n" not in text
        assert text.startswith(f"cannot write {raw}")
        assert text.endswith("or let nnUNet_raw point elsewhere")
        full = number in (errno.ENOSPC, errno.EFBIG)
        assert bool(re.search(r" \([0-9.]+ MB are free\); make room, or", text)) is full
        if (raw / "Dataset604_Tiny").exists():  # the last thing failed: to bring the name of a whole folder to the disk
            assert split(4, 604, 2, processes=1).state == "up to date"
            shutil.rmtree(raw / "Dataset604_Tiny")
        assert tree(raw) == before
        assert sorted(path.name for path in raw.iterdir()) == ["Dataset004_Tiny"]
    assert call >= (1 if function == "rename" else 10)
    assert (raw / "Dataset604_Tiny/dataset.json").is_file()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_fix_that_cannot_be_written_leaves_the_file(raw: Path, monkeypatch: Any, function: str, number: int) -> None:
    path = raw / "Dataset004_Tiny/dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "numTraining": 9}))
    before = tree(raw)
    failing(monkeypatch, function, 0, number)
    with pytest.raises(WriteError, match=re.escape(f"cannot write {path}: ") + ".*or correct it by hand$"):
        check(4, processes=1, fix=True)
    monkeypatch.undo()
    assert tree(raw) == before


def test_a_temporary_file_that_a_read_only_disk_will_not_remove_hides_no_message(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(WriteError, match="Read-only file system; check its permissions"), whole_file(tmp_path / "a"):
        refuse()


def test_a_full_disk_is_named_by_the_size_limit_of_a_process_too(raw: Path) -> None:
    """A real limit of the system, in a process of its own."""
    code = (
        "import resource; from nnunetv2_dycon.commands import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
        "raise SystemExit(main(['split', '-d', '4', '--as', '604', '--labeled', '2', '-np', '1']))"
    )
    before = tree(raw)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: cannot write .*: File too large \([0-9.]+ MB are free\); make room, .*\n", done.stderr)
    assert tree(raw) == before


# ---- two runs at once --------------------------------------------------------------------------------------


def test_the_second_of_two_runs_stops_with_one_line_and_leaves_the_first_alone(raw: Path) -> None:
    with dataset.building(raw / "Dataset604_Tiny", stamp="x", made_by="split", overwrite=False) as space:
        (space.data / "mine").touch()
        code = "from nnunetv2_dycon.commands import main; raise SystemExit(main(__import__('sys').argv[1:]))"
        words = ("split", "-d", "4", "--as", "604", "--labeled", "2", "-np", "1")
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == f"error: another run is writing {space.work}: wait for it to end\n"
        assert (space.data / "mine").exists()
    assert (raw / "Dataset604_Tiny/mine").exists()


@pytest.mark.parametrize("moment", ["before the lock", "between the lock and the look", "twice"])
def test_a_run_that_ends_while_the_next_one_begins_is_no_error(raw: Path, monkeypatch: Any, moment: str) -> None:
    real, times = dataset.locked, iter(range(2 if moment == "twice" else 1))

    @contextmanager
    def ends_now(path: Path, *rest: Any) -> Iterator[Any]:
        again = next(times, None) is not None
        if again and moment != "between the lock and the look":
            shutil.rmtree(path)  # as a run that ends does
        with real(path, *rest) as handle:
            if again and moment == "between the lock and the look":
                shutil.rmtree(path)
                path.mkdir()  # by a third run
            yield handle

    monkeypatch.setattr(dataset, "locked", ends_now)
    assert split(4, 604, 2, processes=1).state == "written"
    assert sorted(path.name for path in raw.iterdir()) == ["Dataset004_Tiny", "Dataset604_Tiny"]


def test_the_lock_is_that_of_the_folder_that_is_there(raw: Path, monkeypatch: Any) -> None:
    real, times = dataset.locked, iter(range(1))

    @contextmanager
    def replaced(path: Path, *rest: Any) -> Iterator[Any]:
        with real(path, *rest) as handle:
            if next(times, None) is not None:  # by a run that ended, and one that began
                shutil.rmtree(path)
                path.mkdir()
            yield handle

    monkeypatch.setattr(dataset, "locked", replaced)
    with (
        dataset.building(raw / "Dataset604_Tiny", stamp="x", made_by="split", overwrite=False) as space,
        pytest.raises(DataError, match="busy"),
        real(space.work, "busy"),
    ):
        pass


def test_a_workspace_that_is_removed_while_it_is_settled_is_no_error(raw: Path, monkeypatch: Any) -> None:
    split(4, 604, 2, processes=1)
    work = dataset.workspace(raw / "Dataset604_Tiny").work
    work.mkdir()
    real = dataset.locked

    def ends_now(path: Path, *rest: Any) -> Any:
        shutil.rmtree(path)
        return real(path, *rest)

    monkeypatch.setattr(dataset, "locked", ends_now)
    assert split(4, 604, 2, processes=1).state == "up to date"


@pytest.mark.parametrize("name", ["mine.txt", "data/imagesTr/mine_0000.nii.gz", "old/mine.txt", "more/mine.txt"])
def test_a_hidden_folder_that_no_run_made_is_left_alone(raw: Path, name: str) -> None:
    mine = raw / ".Dataset604_Tiny.converting" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = tree(raw)
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"converting.* was not made by this command; move it away"):
            split(4, 604, 2, processes=1, overwrite=overwrite)
    with (
        pytest.raises(DataError, match="was not made by this command"),
        dataset.building(raw / "Dataset604_Tiny", stamp="x", made_by="split", overwrite=False),
    ):
        pass
    assert tree(raw) == before


def test_a_file_of_the_user_in_the_hidden_folder_of_a_killed_run_is_left_alone(raw: Path) -> None:
    work = dataset.workspace(raw / "Dataset604_Tiny").work
    for folder in (work / "data/imagesTr", work / "records"):
        folder.mkdir(parents=True)
    (work / "stamp").write_text("of a killed run")
    (work / ".0a1b2c3d.part.stamp").touch()
    (work / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"converting/mine\.txt was not made by this command"):
        split(4, 604, 2, processes=1)
    (work / "mine.txt").rename(raw / "mine.txt")
    assert split(4, 604, 2, processes=1).state == "written"
    assert not work.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_is_killed_while_it_tidies_up_is_no_stranger_to_the_next(
    raw: Path, monkeypatch: Any, overwrite: bool
) -> None:
    if overwrite:
        split(4, 604, 1, processes=1)
    remove, left = shutil.rmtree, 0

    def killed(path: Path, *rest: Any, **options: Any) -> None:
        nonlocal left
        ours = ".converting" in str(path)
        left -= ours
        if ours and left < 0:
            raise KeyboardInterrupt
        remove(path, *rest, **options)

    for moment in range(100):  # before each removal
        left = moment
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(dataset.shutil, "rmtree", killed)
            split(4, 604, 2, processes=1, overwrite=overwrite)
            break
        assert split(4, 604, 2, processes=1, overwrite=overwrite).state in ("written", "up to date")
        if not overwrite:
            remove(raw / "Dataset604_Tiny")
    assert moment >= 4
    assert [path.name for path in sorted(raw.iterdir())] == ["Dataset004_Tiny", "Dataset604_Tiny"]


def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    work = dataset.workspace(raw / "Dataset604_Tiny").work
    work.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="was not made by this command"):
        split(4, 604, 2, processes=1)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# ---- ids ---------------------------------------------------------------------------------------------------


def test_the_next_free_id_is_free_in_each_of_the_three_folders(raw: Path) -> None:
    for folder, number in (("nnUNet_raw", 700), ("nnUNet_preprocessed", 701), ("nnUNet_results", 702)):
        (raw.parent / folder / f"Dataset{number}_X").mkdir()
    assert [dataset.free_id(number) for number in (699, 700, 702, 999)] == [699, 703, 703, 999]


def test_ids_begin_again_at_1_and_may_be_used_up(raw: Path, monkeypatch: Any) -> None:
    taken = {*range(5, 1000)}
    monkeypatch.setattr(dataset, "find_candidate_datasets", lambda number: ["Dataset004_Tiny"] * (number in taken))
    assert [dataset.free_id(number) for number in (3, 5, 999)] == [3, 1, 1]
    taken |= {*range(1, 5)}
    assert dataset.free_id(5) is None
    with pytest.raises(DataError, match="all ids are taken; remove a data set"):
        dataset.new_folder(5, "Y")
