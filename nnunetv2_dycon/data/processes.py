"""Processes of a training: nnU-Net's, but that they end with it, and that loaders hand their errors over.

Left alone, a loader process outlives a killed training, and one that finds no shared memory prints for ever.
"""

import atexit
import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from nnunetv2_dycon._register import TRAINING
from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.parallel import end_with_parent
from nnunetv2_dycon.shared_memory import FOLDER, REMEDY, free_bytes, in_words, pages

_ERROR = "error"  # the only key of a batch that is none


@contextmanager
def ending_with_this_process() -> Iterator[None]:
    """Let the processes that nnU-Net starts anew within the block, as its final validation does, end with this one."""
    before = os.environ.get(TRAINING)
    os.environ[TRAINING] = str(os.getpid())
    try:
        yield
    finally:
        if before is None:
            del os.environ[TRAINING]
        else:
            os.environ[TRAINING] = before


class LoaderProcesses(NonDetMultiThreadedAugmenter):
    """nnU-Net's pool of loader processes, which raises in the training what went wrong in a process.

    Parameters
    ----------
    loader : DataLoader
        What each process runs.
    processes, cached : int
        Number of processes, and of batches that wait.
    seeds : list of int or None
        Start of the random states of each process; None as nnU-Net.
    pin_memory : bool
        Whether batches go to a GPU.
    """

    def __init__(
        self, loader: DataLoader, processes: int, cached: int, seeds: list[int] | None, *, pin_memory: bool
    ) -> None:
        super().__init__(_InProcess(loader), None, processes, cached, seeds, pin_memory, wait_time=0.002)
        self._started: list[Any] = []

    def _start(self) -> None:
        super()._start()
        self._started = list(self._processes)  # nnU-Net's pool forgets them when it ends
        # Python ends them at its exit, which the pool's thread would report below the error that the exit is for.
        atexit.register(_finish, weakref.ref(self))

    def __next__(self) -> dict[str, Any]:
        """Return the next batch.

        Raises
        ------
        DataError
            If a process cannot read a case, finds no shared memory, or was killed.
        """
        try:
            batch = super().__next__()
        except RuntimeError as error:
            numbers = [-(process.exitcode or 0) for process in self._started]
            killed = [number for number in numbers if number > 0 and number != signal.SIGTERM]  # that one was ours
            if not killed:
                raise
            raise DataError(_death(signal.Signals(killed[0]).name, self.num_processes)) from error
        if _ERROR in batch:
            self.end()
            raise batch[_ERROR]
        return batch

    def end(self, timeout: int = 10) -> None:
        """End the processes; the pool's thread says nothing of those that end before it does."""
        before = threading.excepthook
        threading.excepthook = lambda _: None
        try:
            self._finish(timeout)
        finally:
            threading.excepthook = before


def _finish(pool: "weakref.ref[LoaderProcesses]") -> None:
    if (alive := pool()) is not None:
        alive.end(timeout=2)


def _death(name: str, processes: int) -> str:
    if name == "SIGBUS":  # it wrote to memory that is not there
        return f"a loader process found no memory in {FOLDER}; {REMEDY} (then train on with --c)"
    if name == "SIGKILL":
        return (
            "a loader process was killed, most likely for lack of memory; train on with --c, with "
            f"nnUNet_n_proc_DA={processes // 2} in front of nnUNetv2_train"
        )
    return f"a loader process was ended by {name}; train on with --c"


class _InProcess(DataLoader):
    """What a loader process runs: its loader, whose batches it puts into shared memory."""

    def __init__(self, loader: DataLoader) -> None:
        super().__init__(None, loader.batch_size, 1, None, True, False, True)
        self.loader = loader
        self.transforms = loader.transforms  # nnU-Net writes them into debug.json

    def set_thread_id(self, thread_id: int) -> None:
        """Make this process ready; nnU-Net's pool calls this first."""
        super().set_thread_id(thread_id)
        end_with_parent()
        # What was forked is not looked through for garbage: that would copy every page of it, in every process.
        gc.freeze()

    def generate_train_batch(self) -> dict[str, Any]:
        """Return a batch in shared memory, or what the user can mend."""
        try:
            batch = self.loader.generate_train_batch()
            share(batch)
        except UserError as error:
            return {_ERROR: error}
        return batch


def share(batch: dict[str, Any]) -> None:
    """Move the tensors of a batch into shared memory, as the queue would do it.

    The queue does it in a thread that prints an error and goes on with the next batch.

    Raises
    ------
    DataError
        If there is none left.
    """
    try:
        for tensor in tensors_of(batch):
            tensor.share_memory_()
    except RuntimeError as error:
        free = free_bytes()
        raise DataError(
            f"no shared memory for a batch of {in_words(shared_bytes(batch))}"
            f"{'' if free is None else f', {in_words(free)} are free in {FOLDER}'} ({str(error).splitlines()[0]}); "
            f"{REMEDY}"
        ) from error


def shared_bytes(batch: dict[str, Any]) -> int:
    """Return the bytes that a batch takes in shared memory."""
    return sum(pages(tensor.numel() * tensor.element_size()) for tensor in tensors_of(batch))


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
