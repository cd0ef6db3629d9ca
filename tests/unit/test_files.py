"""Every file is whole or absent, and nothing temporary stays."""

import errno
import os
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from nnunetv2_dycon import files, locks
from nnunetv2_dycon.errors import DataError, SplitError, WriteError
from tests.small_disk import run_on_small_disk


def test_a_write_that_fails_leaves_the_previous_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def fail_after_half() -> None:
        with files.whole_file(path) as part:
            part.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_after_half()
    assert files.read_json(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_content_and_folder_reach_the_disk_before_and_after_the_rename(tmp_path: Path, monkeypatch) -> None:
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(f"rename to {Path(target).name}")
        assert Path(source).read_text() == "text"
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", noted_fsync)
    monkeypatch.setattr(files.os, "replace", noted_replace)
    files.write_text(tmp_path / "a.txt", "text")
    assert events == ["file", "rename to a.txt", "folder"]
    assert os.listdir(tmp_path) == ["a.txt"]  # renamed, not copied


def test_two_writers_have_different_temporary_names_with_the_ending_of_the_file(tmp_path: Path) -> None:
    one, other = (files.temporary_name(tmp_path / "case.nii.gz") for _ in range(2))
    assert one != other
    assert all(name.name.startswith(".") and name.name.endswith(".case.nii.gz") for name in (one, other))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    said = (
        r"cannot write .*a\.txt: No space left on device \(\d+\.\d MB are free\); make room, or choose another folder"
    )
    with pytest.raises(WriteError, match=said):
        files.write_text(tmp_path / "a.txt", "text")
    assert os.listdir(tmp_path) == []


FILL = """
import os, sys
from pathlib import Path
from nnunetv2_dycon import files, locks
from nnunetv2_dycon.errors import WriteError

disk, how = Path(sys.argv[1]), sys.argv[2]
target = disk / "target"
(disk / "ballast").write_bytes(bytes(3_000_000))
if how == "file":
    files.write_bytes(target, b"before")
else:
    target.mkdir()
    (target / "a").write_bytes(b"before")
try:
    if how == "file":
        files.write_bytes(target, bytes(2_000_000))
    else:
        with files.whole_folder(target) as part:
            (part / "a").mkdir()
            files.write_bytes(part / "a" / "b", bytes(600_000))
            files.write_bytes(part / "a" / "c", bytes(600_000))
except WriteError as error:
    print(error)
whole = target if how == "file" else target / "a"
print(whole.read_bytes().decode(), sorted(os.listdir(disk)))
"""


@pytest.mark.parametrize("how", ["file", "folder"])
def test_a_disk_that_is_full_is_said_with_its_free_space_and_the_previous_one_stays(tmp_path: Path, how: str) -> None:
    said = run_on_small_disk(tmp_path / "disk", 4, FILL, tmp_path / "disk", how).splitlines()
    space = r"No space left on device \((\d\.\d) MB are free\); make room, or choose another folder"
    found = re.fullmatch(f"cannot write {re.escape(str(tmp_path))}/disk/target: {space}", said[0])
    assert found, said
    assert 1.1 <= float(found[1]) <= 1.3  # 4 MiB less the ballast, and the unfinished files are gone
    assert said[1] == "before ['ballast', 'target']"


@pytest.mark.parametrize(("content", "reason"), [(b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (None, "No such")])
def test_a_json_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json .*{reason}.*; fetch it again") as caught:
        files.read_json(path, "fetch it again")
    assert "\n" not in str(caught.value)


def test_a_json_file_that_cannot_be_read_has_the_error_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for path in (tmp_path / "a.json", tmp_path / "b.json"):
        with pytest.raises(SplitError, match="cannot be read"):
            files.read_json(path, error=SplitError)


def test_first_few_counts_what_it_leaves_out() -> None:
    assert [files.first_few("abcd"[:n], 2) for n in range(5)] == ["", "a", "a, b", "a, b and 1 more", "a, b and 2 more"]


def test_digests_follow_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.json_digest({"a": 1, "b": 2}) == files.json_digest({"b": 2, "a": 1}) != files.json_digest({"a": 2})


def test_a_folder_replaces_the_previous_one_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("")
    with files.whole_folder(path) as part:
        (part / "fold_0").mkdir()
        (part / "fold_0" / "new").write_text("text")
        inode = (part / "fold_0" / "new").stat().st_ino
        assert os.listdir(path) == ["old"]
    assert [str(file.relative_to(path)) for file in sorted(path.rglob("*"))] == ["fold_0", "fold_0/new"]
    assert (path / "fold_0" / "new").stat().st_ino == inode  # renamed, not copied
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_fails_leaves_the_previous_one_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("")

    def fill(error: BaseException | None) -> None:
        with files.whole_folder(path) as part:
            (part / "new").write_text("")
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        fill(KeyboardInterrupt())
    rename = os.rename

    def refuse_the_new_one(source: Path, target: Path) -> None:
        if (Path(source) / "new").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", refuse_the_new_one)
    with pytest.raises(DataError, match=r"cannot write .*model: Input/output error"):
        fill(None)
    assert os.listdir(path) == ["old"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_folders_files_reach_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch) -> None:
    events, fsync, rename = [], os.fsync, os.rename

    def noted_fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".")[-1])
        fsync(handle)

    def noted_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(files.os, "fsync", noted_fsync)
    monkeypatch.setattr(files.os, "rename", noted_rename)
    with files.whole_folder(tmp_path / "model") as part:
        (part / "fold_0").mkdir()
        (part / "fold_0" / "a").write_text("text")
    assert events == ["fold_0", "a", "model", "rename", tmp_path.name]


# ---- folders that killed processes left ------------------------------------------------------------------------

REPLACE = """
import os, signal, sys
from pathlib import Path
from nnunetv2_dycon import files, locks
path, moment = Path(sys.argv[1]), sys.argv[2]
rename, renamed = os.rename, []
def die_after(*paths):
    rename(*paths)
    renamed.append(paths)
    if moment == str(len(renamed)):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = die_after
with files.whole_folder(path) as part:
    (part / "new").write_text("")
    print("filling", flush=True)
    if moment == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def fill(path: Path, moment: str) -> subprocess.Popen:
    """Start a process that writes a folder, and is killed after so many renames."""
    words = [sys.executable, "-c", REPLACE, str(path), moment]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "filling\n"
    return process


def write_folder(path: Path) -> None:
    with files.whole_folder(path) as part:
        (part / "newest").write_text("")


@pytest.mark.parametrize("moment", range(3))
def test_a_folder_that_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path, moment: int) -> None:
    path = tmp_path / "model [1]"  # a name that means something to glob
    path.mkdir()
    (path / "previous").write_text("")
    process = fill(path, str(moment))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    with files.scratch_folder(path):  # the one that was there is back, or the new one in its place; nothing is lost
        assert os.listdir(path) == (["new"] if moment == 2 else ["previous"])
    assert os.listdir(tmp_path) == [path.name]
    write_folder(path)
    assert os.listdir(path) == ["newest"]
    assert os.listdir(tmp_path) == [path.name]


def test_the_folder_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with fill(path, "never") as living:
        (part,) = tmp_path.iterdir()
        write_folder(path)
        assert {entry.name for entry in tmp_path.iterdir()} == {part.name, "model"}
        assert os.listdir(part) == ["new"]
        living.communicate()
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_is_being_replaced_is_left_to_the_process_that_does_it(tmp_path: Path, monkeypatch) -> None:
    path, rename, seen = tmp_path / "model", os.rename, []
    path.mkdir()

    def looked_at(*paths: Path) -> None:
        rename(*paths)
        before = sorted(os.listdir(tmp_path))
        files.remove_dead(path)
        seen.append(sorted(os.listdir(tmp_path)) == before)

    monkeypatch.setattr(files.os, "rename", looked_at)
    write_folder(path)
    assert seen[0]
    assert len(seen) == 2
    assert os.listdir(path) == ["newest"]
    assert os.listdir(tmp_path) == ["model"]


def test_other_folders_and_files_of_such_names_are_left_alone(tmp_path: Path) -> None:
    others = {".01234567.part.model_2", ".01234567.part.my model", ".0123.part.model", "model.part"}
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".01234567.part.model").write_text("a file that is being written")
    write_folder(tmp_path / "model")
    assert {entry.name for entry in tmp_path.iterdir()} == {*others, ".01234567.part.model", "model"}


@pytest.mark.parametrize("code", [errno.ENOLCK, None])
def test_without_locks_nobody_knows_whether_a_process_lives(tmp_path: Path, monkeypatch, code: int | None) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    (tmp_path / ".01234567.part.model").mkdir()
    write_folder(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == [".01234567.part.model", "model"]


def test_a_folder_that_is_taken_for_a_dead_ones_is_made_again(tmp_path: Path, monkeypatch) -> None:
    """Another process may look at it before it is locked, and may hold the lock or have removed it."""
    names: list[Path] = []
    temporary_name = files.temporary_name

    def noted(path: Path) -> Path:
        names.append(temporary_name(path))
        return names[-1]

    def lock_if_free(path: Path) -> AbstractContextManager:
        if len(names) == 1:  # it holds the lock, to remove it
            return nullcontext(False)
        if len(names) == 2:  # it was quicker
            path.rmdir()
        return locks.lock_if_free(path)

    monkeypatch.setattr(files, "temporary_name", noted)
    monkeypatch.setattr(files, "lock_if_free", lock_if_free)
    with files.scratch_folder(tmp_path / "model") as part:
        assert part == names[2]
        assert part.is_dir()
    assert not part.exists()
    assert len(names) == 3
