"""Worker processes for work on many cases, and commands of others; all end when their user interrupts them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from nnunetv2_dycon.errors import ConfigError, DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_SECONDS_TO_END = 10


def run(
    work: Callable[[Item], Result], tasks: Sequence[Item], processes: int | None
) -> Generator[tuple[Item, Result], None, None]:
    """Yield each task and its result, in the order in which they finish.

    Parameters
    ----------
    work : callable
        A function at the top of a module. Function, tasks and results must be picklable.
    tasks : sequence
        Arguments of `work`, one per call.
    processes : int, optional
        Worker processes; one per processor, at most 8, by default; 1 works in this process. Close the iterator to end
        them early.

    Raises
    ------
    ConfigError
        If `processes` is below 1.
    DataError
        If a worker process was killed, or none can be started.
    """
    processes = worker_processes(processes)
    workers = min(processes, len(tasks))
    if workers <= 1:  # a process costs a second or more of imports
        for task in tasks:
            yield task, work(task)
        return
    # spawn, as nnU-Net: a fork after torch has used threads may hang
    context = multiprocessing.get_context("spawn")
    others, finished = {*multiprocessing.active_children()}, False
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    except OSError as error:  # its locks are files in shared memory
        raise DataError(
            f"worker processes cannot be started ({error.strerror}); look at the free space of /dev/shm, "
            "or type the command again with -np 1"
        ) from error
    try:
        with interrupts_held():
            futures = {pool.submit(work, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
        finished = True
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, most likely killed for lack of memory; "
            f"type the command again with fewer processes: -np {max(1, processes // 2)}"
        ) from error
    finally:
        with interrupts_held():
            if not finished:  # what they write is whole or not there, so that nobody need wait for their cases
                for worker in {*multiprocessing.active_children()} - others:
                    worker.terminate()
            pool.shutdown(cancel_futures=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends. Processes that start in it never get it: their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_command(words: Sequence[str], **how: Any) -> int:
    """Run a command and return its exit code; where this process is interrupted, end all that it started.

    The command has a session of its own, so that Ctrl-C reaches this process alone: its own processes would each print
    a traceback. It goes on where this process is killed.

    Parameters
    ----------
    words : sequence of str
        The command.
    how
        As `subprocess.Popen`.
    """
    process = None
    try:
        with _ending_signals():
            with interrupts_held():
                process = subprocess.Popen(words, start_new_session=True, **how)
            return process.wait()
    except BaseException:
        if process is not None:
            _end_session(process)
        raise


@contextmanager
def _ending_signals() -> Iterator[None]:
    """Turn requests to end, as of a closed terminal or a scheduler, into SystemExit until the block ends."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    here = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    numbers = [number for name in names if here and signal.getsignal(number := getattr(signal, name)) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _end_session(process: subprocess.Popen) -> None:
    """End a command that leads a session and all of its processes: asked first, then killed."""
    with interrupts_held():
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)


def worker_processes(processes: int | None) -> int:
    """Return the number of worker processes: one per processor, at most 8, where the user gave none.

    Raises
    ------
    ConfigError
        If `processes` is below 1.
    """
    if processes is None:
        return default_processes()
    if processes < 1:
        raise ConfigError(f"-np {processes}: the number of processes must be at least 1")
    return processes


def default_processes() -> int:
    """Return the number of processors that this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def end_with_parent() -> None:
    """End this process within a second or two of the one that started it, however that one ended.

    A killed process cannot stop its workers, and a worker that waits for work, or for room in a queue, waits for ever.
    """
    parent: Any = multiprocessing.parent_process()
    direct = os.getppid() == parent.pid  # otherwise a fork server stands between them
    # Forked workers hold the other end of each other's pipe to the parent, so the pipe alone would not tell.
    _end_unless(lambda: parent.is_alive() and (not direct or os.getppid() == parent.pid))


def follow_starter(starter: int) -> None:
    """Let a process of multiprocessing, at its very start, end with the one that started it, and pass over Ctrl-C.

    For processes that nnU-Net starts: until they have imported what they need they would not notice that it is gone,
    and each would print where Ctrl-C met it.

    Parameters
    ----------
    starter : int
        The process that started this one; it may have ended since.
    """
    if "--multiprocessing-fork" not in sys.orig_argv:  # the one that tidies up after all others
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_unless(lambda: os.getppid() == starter)


def end_forks_with_this_process() -> None:
    """Let every process that this one forks from now on end within a second or two of it."""

    def follow() -> None:
        starter = os.getppid()
        _end_unless(lambda: os.getppid() == starter)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=follow)


def _end_unless(alive: Callable[[], bool]) -> None:
    def watch() -> None:
        while alive():
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
