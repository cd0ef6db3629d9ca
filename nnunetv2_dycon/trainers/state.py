"""Our key in a checkpoint: everything that an exact continuation needs in addition to stock's entries."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

import nnunetv2_dycon
from nnunetv2_dycon.data.loader import IsolatedLoader
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.options import Settings, stored_values
from nnunetv2_dycon.randomness import RandomStream, global_states, process_seed, set_global_states
from nnunetv2_dycon.trainers.history import History

if TYPE_CHECKING:
    from nnunetv2_dycon.trainers.engine import nnUNetTrainerSSL

TEACHER = "teacher."  # where the teacher's weights are in the method; they get a key of their own, with stock's names


def state_of(trainer: "nnUNetTrainerSSL") -> dict[str, Any]:
    """Return the trainer's state as plain values and tensors, readable without unpickling objects."""
    method, optimizer = trainer.method, trainer.method_optimizer
    return {
        "version": nnunetv2_dycon.__version__,
        "nnunetv2_version": version("nnunetv2"),
        "settings": asdict(trainer.settings),
        "step": trainer.step.number,
        "cases": trainer.fold_cases | {"unlabeled": list(trainer.unlabeled.names) if trainer.unlabeled else []},
        "teacher": method.teacher.network.state_dict(),
        "method": {name: value for name, value in method.state_dict().items() if not name.startswith(TEACHER)},
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "history": trainer.history.rows,
        "random": {
            "global": global_states(),
            "cuda": torch.cuda.get_rng_state_all() if trainer.device.type == "cuda" else [],
            "step": trainer.step.generator.get_state(),
            "streams": {name: stream.states for name, stream in _streams(trainer).items()},
        },
    }


def restore(trainer: "nnUNetTrainerSSL", state: dict[str, Any]) -> None:
    """Put what `state_of` returned back, but for random states (the loaders are not there yet).

    Raises
    ------
    ConfigError
        If the state belongs to a method with other modules.
    """
    trainer.step.number = state["step"]
    trainer._best_ema = _best(trainer.logger.local_logger.my_fantastic_logging["ema_fg_dice"])
    trainer.history = History(state["history"])
    trainer.method.teacher.network.load_state_dict(state["teacher"])
    missing, unexpected = trainer.method.load_state_dict(state["method"], strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.startswith(TEACHER))]
    if wrong:
        raise ConfigError(f"the checkpoint in {trainer.output_folder} is of another method: {', '.join(wrong[:3])} ...")
    if trainer.method_optimizer is not None:
        trainer.method_optimizer.load_state_dict(state["optimizer"])


def _best(series: Sequence[float]) -> float | None:
    """Return what nnU-Net takes for the best value after these epochs.

    It saves the latest checkpoint before it looks at the value of the same epoch, so the one in the checkpoint is that
    of the epoch before, and a worse epoch could replace checkpoint_best.pth.
    """
    best = None
    for value in series:
        if best is None or value > best:
            best = value
    return best


def restore_random_states(trainer: "nnUNetTrainerSSL", states: dict[str, Any]) -> None:
    """Continue every random stream of the first process. Others, and loader workers, start new ones.

    The checkpoint has the states of the first process alone: with these, all would draw the same patches.
    """
    if trainer.local_rank:
        trainer.step.generator.manual_seed(process_seed(trainer.method.seed, trainer.local_rank, trainer.step.number))
        return
    set_global_states(states["global"])
    if trainer.device.type == "cuda" and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    trainer.step.generator.set_state(states["step"].cpu())
    for name, stream in _streams(trainer).items():
        stream.states = states["streams"].get(name)


def compare_settings(stored: dict[str, Any], settings: Settings, folder: str) -> None:
    """Raise ConfigError that lists the differences if a checkpoint was trained with other settings.

    Parameters
    ----------
    stored : dict
        The settings in the checkpoint; options that were renamed or came later are understood.
    settings : Settings
        Those of the trainer name.
    folder : str
        Results folder, for the message.
    """
    there, here = stored_values(type(settings), stored), asdict(settings)
    changed = [
        f"{name} is {here.get(name)}, there {there.get(name)}"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    if changed:
        raise ConfigError(
            f"cannot continue {folder} with other settings: {'; '.join(changed)}. Use the trainer name it was "
            "trained with, or start anew under another name."
        )


def _streams(trainer: "nnUNetTrainerSSL") -> dict[str, RandomStream]:
    """Return the random streams of loaders that run in this process."""
    train, validation = (getattr(a, "data_loader", None) for a in (trainer.dataloader_train, trainer.dataloader_val))
    loaders = {"unlabeled": getattr(train, "unlabeled", None), "validation": validation}
    return {name: loader.stream for name, loader in loaders.items() if isinstance(loader, IsolatedLoader)}
