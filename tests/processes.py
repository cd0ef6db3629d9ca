"""Processes of this machine, those that tests start and those that these leave."""

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest


def running(processes: Iterable[int]) -> set[int]:
    """Those that run; one that ended and that nobody asked for its result does not."""
    found = set()
    for process in processes:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            found.add(process)
    return found


def left_after(processes: Iterable[int], seconds: float) -> set[int]:
    """Those that still run when so many seconds have passed, or none as soon as none does."""
    end, left = time.monotonic() + seconds, running(processes)
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = running(left)
    return left


def children_of(process: int) -> set[int]:
    """All processes that a process started, and those that these started."""
    found = set()
    for child in started_by(process):
        found |= {child} | children_of(child)
    return found


def started_by(process: int) -> set[int]:
    """The processes that a process started itself."""
    found: set[int] = set()
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found.update(map(int, task.read_text().split()))
    return found


def kill_alone(*processes: int) -> set[int]:
    """Kill processes, and nothing that they started; returns the sessions of all of them, to look for what is left."""
    _send(processes, signal.SIGSTOP)  # they start no more
    families = {one for process in processes for one in (process, *children_of(process))}
    sessions = {_session(one) for one in families} - {None, os.getsid(0)}
    _send(processes, signal.SIGKILL)
    return sessions


def _send(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def left_in(sessions: set[int], seconds: float = 10) -> set[int]:
    """Processes of these sessions that still run when so many seconds have passed, or none as soon as none does."""
    end = time.monotonic() + seconds
    while left := {one for one in running(_all()) if _session(one) in sessions}:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return left


def _all() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _session(process: int) -> int | None:
    try:
        return os.getsid(process)
    except (ProcessLookupError, PermissionError):
        return None


def with_shared_memory(size: str) -> list[str]:
    """The words before a command that let it run with a /dev/shm of this size; skips the test where that is refused."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", script, "sh"]
    try:
        done = subprocess.run([*words, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode:
        pytest.skip(f"/dev/shm cannot be replaced here: {done.stderr.strip()}")
    return words


def hear_ctrl_c() -> None:
    """Let a process that is about to start hear Ctrl-C and a closed terminal, as `preexec_fn` of `subprocess.Popen`.

    A shell without a terminal, and nohup, let their background processes, and all that these start, ignore them.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
