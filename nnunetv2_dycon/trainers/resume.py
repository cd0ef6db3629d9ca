"""The files that a training starts from: the checkpoint that it continues from, and pretrained weights."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from nnunetv2_dycon.checkpoint import KEY, read_checkpoint, reading_without_code
from nnunetv2_dycon.errors import ConfigError, DamagedError, DataError
from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.trainers.results import CHECKPOINTS, set_aside
from nnunetv2_dycon.trainers.state import compare_settings, restore

if TYPE_CHECKING:
    from nnunetv2_dycon.trainers.engine import nnUNetTrainerSSL

NEEDED = ("network_weights", "optimizer_state", "logging", "_best_ema", "current_epoch", "init_args")
_before_training = ExitStack()


def guard_files() -> None:
    """Let no file of torch run code until the training begins.

    nnU-Net's command makes and initialises the trainer, reads the file of -pretrained_weights in full, and starts the
    training; between the first and the last it calls nothing of a trainer that knows the file. So for this time torch
    itself is told to refuse, in this process.
    """
    _before_training.close()
    _before_training.enter_context(reading_without_code())


def end_guard() -> None:
    """End what `guard_files` began."""
    _before_training.close()


@contextmanager
def checkpoint_file(file_or_content: dict[str, Any] | str) -> Iterator[Path]:
    """Give the file of a checkpoint; nnU-Net's signature takes its content too, but its body reads files alone."""
    with TemporaryDirectory() if isinstance(file_or_content, dict) else nullcontext("") as folder:
        if isinstance(file_or_content, dict):
            path = Path(folder, "checkpoint.pth")
            torch.save(file_or_content, path)
        else:
            path = Path(file_or_content)
        try:
            yield path
        finally:
            end_guard()  # to load it may have initialised the trainer


def choose_checkpoint(trainer: "nnUNetTrainerSSL", path: Path) -> tuple[Path, dict[str, Any] | None]:
    """Return the checkpoint to load, and its entry of ours; None if another trainer wrote it.

    Where a training continues and the file is damaged, this is the newest whole one of the same folder.

    Parameters
    ----------
    trainer : nnUNetTrainerSSL
        The training, not yet restored.
    path : Path
        What nnU-Net chose: the final, else the latest, else the best checkpoint.

    Raises
    ------
    DataError
        If it cannot be read, and there is no other.
    ConfigError
        If it was trained with other settings, or has another network.
    """
    try:
        checkpoint = read_checkpoint(path, *NEEDED)
    except DamagedError as error:
        if not (trainer.continues and trainer.restored is None and path.parent == Path(trainer.output_folder)):
            raise
        path, checkpoint = _newest_whole(path, error)
        trainer.print_to_log_file(
            f"WARNING: {str(error).split(';')[0]}. Going on from {path.name}, at epoch {checkpoint['current_epoch']}."
        )
    state = checkpoint.get(KEY)
    if state is not None:
        compare_settings(state["settings"], trainer.settings, trainer.output_folder)
    if not trainer.was_initialized:
        trainer.initialize()
    _compare_networks(checkpoint["network_weights"], trainer, path)
    return path, state


def _newest_whole(broken: Path, error: DamagedError) -> tuple[Path, dict[str, Any]]:
    found = []
    for name in CHECKPOINTS:
        path = broken.with_name(name)
        if path != broken and path.is_file():
            try:
                found.append((path, read_checkpoint(path, *NEEDED)))
            except DamagedError:
                continue
    if not found:
        raise DataError(
            f"{str(error).split(';')[0]}, and there is no whole one next to it; restore it, or train anew: "
            f"{set_aside(broken.parent)}"
        ) from error
    return max(found, key=lambda one: one[1]["current_epoch"])


def _compare_networks(weights: dict[str, Any], trainer: "nnUNetTrainerSSL", path: Path) -> None:
    """Raise ConfigError where the planned network is not that of a checkpoint."""
    there = {name.removeprefix("module."): tuple(weight.shape) for name, weight in weights.items()}
    here = {name: tuple(weight.shape) for name, weight in unwrap(trainer.network).state_dict().items()}
    wrong = [name for name in dict.fromkeys([*here, *there]) if here.get(name) != there.get(name)]
    if wrong:
        raise ConfigError(
            f"{path} has another network than {trainer.plans_manager.plans_name} plans now ({wrong[0]}: "
            f"{there.get(wrong[0])}, planned {here.get(wrong[0])}); restore the plans, which are in "
            f"{os.path.join(trainer.output_folder_base, 'plans.json')}, or train under another name of plans (-p)"
        )


def take_over(trainer: "nnUNetTrainerSSL", state: dict[str, Any] | None, path: Path) -> None:
    """Restore the method after nnU-Net has restored the network; without a state it starts anew.

    Parameters
    ----------
    trainer : nnUNetTrainerSSL
        The training.
    state : dict, optional
        Our entry in the checkpoint.
    path : Path
        The checkpoint, for the message.
    """
    if state is None:
        trainer.print_to_log_file(
            f"WARNING: {path} has no '{KEY}' entry (another trainer wrote it): network, optimiser, epoch and schedules "
            "go on; teacher and all that the method adds start anew."
        )
        trainer.step.number = trainer.current_epoch * trainer.num_iterations_per_epoch
        trainer.method.start(unwrap(trainer.network))
    else:
        restore(trainer, state)
    trainer.restored = state or {}
