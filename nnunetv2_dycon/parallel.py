"""Worker processes for work on many cases; a worker never outlives the process that started it."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nnunetv2_dycon.errors import ConfigError, DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    except OSError as error:  # its locks are files in shared memory
        raise DataError(
            f"worker processes cannot be started ({error.strerror}); look at the free space of /dev/shm, "
            "or type the command again with -np 1"
        ) from error
    try:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, most likely killed for lack of memory; "
            f"type the command again with fewer processes: -np {max(1, processes // 2)}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
    parent = multiprocessing.parent_process()
    direct = os.getppid() == parent.pid  # otherwise a fork server stands between them

    def watch() -> None:
        # Forked workers hold the other end of each other's pipe to the parent, so the pipe alone would not tell.
        while parent.is_alive() and (not direct or os.getppid() == parent.pid):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
