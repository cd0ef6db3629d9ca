"""The loaders of a training: nnU-Net's, with unlabelled patches in the same batches, in processes that end in time."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_dycon.data.loader import IsolatedLoader, MixedLoader, unlabeled_loader
from nnunetv2_dycon.data.processes import LoaderProcesses, share, shared_bytes, tensors_of
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.randomness import (
    RandomStream,
    derived_seed,
    global_states,
    process_seed,
    seed_everything,
    seed_from_here,
    set_global_states,
)
from nnunetv2_dycon.ranks import world_size
from nnunetv2_dycon.shared_memory import file_shortage, free_bytes, memory_shortage, waiting_batches
from nnunetv2_dycon.views import check_number, check_pastes

if TYPE_CHECKING:
    from nnunetv2_dycon.trainers.engine import nnUNetTrainerSSL

Augmenter: TypeAlias = SingleThreadedAugmenter | LoaderProcesses
_PROCESSES = "nnUNet_n_proc_DA"
_OPENING = 1.0  # s in which labelled cases are opened before a training; the rest is opened when it is drawn


class PoolSize(NamedTuple):
    """Loader processes of one loader, and batches that wait in its queue."""

    processes: int
    cached: int


def loader_processes() -> int:
    """Return the number of loader processes for training, nnU-Net's.

    Raises
    ------
    ConfigError
        If nnUNet_n_proc_DA is below 0: nnU-Net would wait for ever for a batch of no process.
    """
    processes: int = get_allowed_n_proc_DA()
    if processes < 0:
        raise ConfigError(f"{_PROCESSES} is {processes}, not a number of processes; type: export {_PROCESSES}=4")
    return processes


def pool_sizes(processes: int) -> tuple[PoolSize, PoolSize]:
    """Return the sizes that nnU-Net gives its pools for training and validation, from `nnUNet_n_proc_DA`."""
    return (
        PoolSize(processes, max(6, processes // 2)),
        PoolSize(max(1, processes // 2), max(3, processes // 4)),
    )


def dataloaders(
    trainer: "nnUNetTrainerSSL", stock: Callable[[], tuple[SingleThreadedAugmenter, SingleThreadedAugmenter]]
) -> tuple[Augmenter, Augmenter]:
    """Return the loaders of training and validation.

    The validation loader gets random states of its own wherever it may not shift the training stream: its draws
    depend on validation labels. The control without option `seed` keeps stock's stream, draw for draw.

    Parameters
    ----------
    trainer : nnUNetTrainerSSL
        The training.
    stock : callable
        nnU-Net's `get_dataloaders`.

    Raises
    ------
    ConfigError
        If a process has too few patches for what the options do with them.
    DataError
        If a case cannot be read, or the loader processes would lack shared memory or open files.
    """
    seed = trainer.settings.seed
    if seed is not None:  # a training that goes on in loader processes must not draw its first patches again
        seed = process_seed(seed, trainer.local_rank, trainer.step.number)
    apart = seed is not None or trainer.method_type.uses_unlabeled
    processes, before = loader_processes(), global_states()
    with _in_this_process():
        train, val = (augmenter.data_loader for augmenter in stock())
    for loader in (train, val):
        loader._data.open_some(_OPENING)
    if seed is not None:
        seed_everything(seed)
    elif apart or processes:
        set_global_states(before)
    if trainer.method.paste:
        check_pastes(trainer.batch_size)  # pastes may begin hours later
    train = MixedLoader(train, unlabeled_patches(trainer, train) if trainer.unlabeled else None)
    if apart:
        val = IsolatedLoader(val, seed_from_here("validation"))
    if not processes:
        return SingleThreadedAugmenter(train, None), SingleThreadedAugmenter(val, None)
    sizes, pin_memory = pool_sizes(processes), trainer.device.type == "cuda"
    _check_resources(train, sizes, pin_memory)
    return _started(train, sizes[0], seed, pin_memory), _started(val, sizes[1], seed, pin_memory)


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Let nnU-Net make its loaders without processes, which it would start only for us to stop them."""
    before = os.environ.get(_PROCESSES)
    os.environ[_PROCESSES] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PROCESSES]
        else:
            os.environ[_PROCESSES] = before


def unlabeled_patches(trainer: "nnUNetTrainerSSL", labeled: DataLoader) -> IsolatedLoader:
    """Return the loader of the unlabelled patches of one process of the training."""
    wanted = trainer.settings.unlabeledbatch
    size = trainer.batch_size if not wanted else len(range(trainer.local_rank, wanted, world_size()))
    if size == 0:
        raise ConfigError(f"option unlabeledbatch{wanted} leaves no unlabelled patch for each of the GPUs.")
    check_number(trainer.method.view, size)  # the first view may be drawn hours later
    unlabeled: Any = trainer.unlabeled  # asked for where there are some
    dataset = unlabeled.dataset()
    return unlabeled_loader(labeled, dataset, size, seed_from_here("unlabeled"), trainer.label_manager)


def _check_resources(train: MixedLoader, sizes: tuple[PoolSize, PoolSize], pin_memory: bool) -> None:
    """Draw a batch here, move it into shared memory, and raise DataError if not as many as may wait have room."""
    with RandomStream(0).active():
        batch = next(train)
    share(batch)
    files = memory = 0
    for part, pool in zip((batch, {key: batch[key] for key in ("data", "target")}), sizes, strict=True):
        waiting = waiting_batches(*pool, pinned=pin_memory)
        files += waiting * len(list(tensors_of(part)))
        memory += waiting * shared_bytes(part)
    del batch, part
    # the processes of a training are all on one machine
    found = memory_shortage(free_bytes(), memory * world_size()) or file_shortage(files)
    if found:
        raise DataError(f"{_PROCESSES}={sizes[0].processes}: {found}")


def _started(loader: DataLoader, size: PoolSize, seed: int | None, pin_memory: bool) -> LoaderProcesses:
    """Return loader processes that run: they are forked before the first forward pass, as nnU-Net does."""
    seeds = None if seed is None else [derived_seed(seed, worker) for worker in range(size.processes)]
    pool = LoaderProcesses(loader, *size, seeds, pin_memory=pin_memory)
    next(pool)
    return pool
