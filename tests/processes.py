"""Processes of this machine, those that tests start and those that these leave."""

import signal
import subprocess
import time
from collections.abc import Iterable
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
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children_of(child)
    return found


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
