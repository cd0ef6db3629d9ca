"""Locks: one holder at a time, across processes; a file system without locks is said."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nnunetv2_dycon import locks
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.locks import lock_if_free, locked

HOLD = """
import sys
from pathlib import Path
from nnunetv2_dycon.locks import lock_if_free, locked
with locked(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["file", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "place"
    path.touch() if request.param == "file" else path.mkdir()
    return path


@contextmanager
def holder(place: Path) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        # a lock that waits where it should refuse must fail the test, not hang it
        end = threading.Timer(20, process.kill)
        end.start()
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            end.cancel()


def test_another_process_is_kept_out_until_the_first_is_killed(place: Path) -> None:
    with holder(place) as other:
        with pytest.raises(DataError, match=r"^busy here$"), locked(place, "busy here"):
            pytest.fail("two hold it")
        other.kill()
        other.wait()
        with locked(place, "busy here") as handle:
            assert isinstance(handle, int)


def test_waiting_says_so_and_gets_the_lock(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(place) as other:
        real, waited = locks.fcntl.flock, []

        class Flock:
            """The lock is given up when a waiting call comes, so that the order is certain."""

            def __getattr__(self, name: str) -> object:
                return getattr(locks_fcntl, name)

            def flock(self, handle: int, how: int) -> None:
                if not how & locks_fcntl.LOCK_NB:
                    waited.append(other.poll())
                    other.communicate("")
                real(handle, how)

        locks_fcntl = locks.fcntl
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(locks, "fcntl", Flock())
            with locked(place, "waiting for it", wait=True):
                assert other.poll() == 0
    assert waited == [None]
    assert [record.getMessage() for record in caplog.records] == ["waiting for it"]


FORK = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from nnunetv2_dycon.locks import lock_if_free, locked
def live(ready):
    ready.set()  # before it runs for the first time, nobody can have closed anything in it
    time.sleep(60)
with locked(Path(sys.argv[1]), "busy"):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=live, args=(ready,))
    child.start()
    ready.wait()
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_process_that_outlives_the_holder_does_not_keep_the_lock(place: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", FORK, str(place)], stdout=subprocess.PIPE, text=True) as process:
        orphan = int(process.stdout.readline())
        try:
            assert process.wait() == -signal.SIGKILL
            os.kill(orphan, 0)  # it is there
            with locked(place, "kept by the orphan"):
                pass
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_it_can_be_taken_again_also_after_an_error(place: Path) -> None:
    with pytest.raises(RuntimeError), locked(place, "busy"):
        raise RuntimeError
    with locked(place, "busy"):
        pass


def test_a_file_system_without_locks_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    caplog.set_level(logging.WARNING)
    with locked(place, "busy"):
        pass
    assert f"{place} cannot be locked (No locks available)" in caplog.text


def test_without_fcntl_there_is_no_lock(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with locked(place, "busy") as handle:
        assert handle is None


def test_a_lock_that_another_process_holds_is_told_from_one_that_is_free_and_from_none(
    place: Path, monkeypatch
) -> None:
    with holder(place), lock_if_free(place) as held:
        assert held is False
    with lock_if_free(place) as held:
        assert held is True
        with lock_if_free(place) as again:
            assert again is False
    with lock_if_free(place) as held:
        assert held is True

    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", no_locks)
        with lock_if_free(place) as held:
            assert held is None
    monkeypatch.setattr(locks, "fcntl", None)
    with lock_if_free(place) as held:
        assert held is None
