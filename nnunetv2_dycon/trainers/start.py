"""What is checked before a training begins: device, data, threads, and that no results would be lost."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nnunetv2_dycon.command_lines import device_flag
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.folders import environment_folder
from nnunetv2_dycon.trainers.names import read_name
from nnunetv2_dycon.trainers.results import FINAL, checkpoints, set_aside

if TYPE_CHECKING:
    from nnunetv2_dycon.trainers.engine import nnUNetTrainerSSL

_THREADS = "OMP_NUM_THREADS"


def check_machine(device: torch.device) -> None:
    """Refuse to train without nnU-Net's folders, or on a device that is not there.

    Raises
    ------
    DataError
        If a folder is missing.
    ConfigError
        If there is no CUDA device, which nnU-Net's command takes if not told otherwise.
    """
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        environment_folder(variable)
    if device.type == "cuda" and not torch.cuda.is_available():
        other = " ".join(device_flag())
        raise ConfigError(f"torch {torch.__version__} finds no CUDA device here; add to the command: {other}")


def limit_threads(device: torch.device) -> None:
    """Let OMP_NUM_THREADS limit the threads of a training on a CPU.

    nnU-Net's command sets as many as there are cores, whatever the variable says, before it makes the trainer. Two
    trainings next to each other are then many times slower.

    Raises
    ------
    ConfigError
        If the variable is not a number.
    """
    value = os.environ.get(_THREADS, "").split(",")[0].strip()  # further numbers are those of nested loops
    if device.type != "cpu" or not value:
        return
    if not value.isdecimal() or not int(value):
        raise ConfigError(f"{_THREADS} is {value!r}; type: export {_THREADS}=1, or more, or: unset {_THREADS}")
    torch.set_num_threads(min(torch.get_num_threads(), int(value)))


def check_start(trainer: "nnUNetTrainerSSL") -> None:
    """Refuse a training that would start over where results are, or that was meant to go on under another name.

    Raises
    ------
    DataError
        If it starts from the beginning and the folder has checkpoints or a validation, which it would overwrite; or if
        it should continue, and a folder of the same settings in another order has the checkpoints.
    """
    if trainer.restored is not None:
        return
    folder = Path(trainer.output_folder)
    there = checkpoints(folder)
    if there or (folder / "validation" / "summary.json").is_file():
        state, flag = ("stopped", "add --c to continue it; or, ") if there else ("finished", "")
        if FINAL in there:
            state, flag = "finished", "add --val to validate it again; or, "
        raise DataError(
            f"a {state} training is there, which this one would overwrite: {flag}to train anew, first type: "
            f"{set_aside(folder)}"
        )
    if trainer.continues:
        twin = _twin(trainer)
        if twin:
            raise DataError(f"{folder} has no checkpoint to continue from; the same training is there as -tr {twin}")
        trainer.print_to_log_file(f"{folder} has no checkpoint to continue from: a new training begins.")


def _twin(trainer: "nnUNetTrainerSSL") -> str | None:
    """Return a trainer of the same settings, in another order, whose fold has checkpoints."""
    model, fold = Path(trainer.output_folder_base), Path(trainer.output_folder).name
    name, *rest = model.name.split("__")
    for path in sorted(model.parent.glob("__".join(["*", *rest]))):
        other = path.name.split("__")[0]
        if other == name or not checkpoints(path / fold):
            continue
        with suppress(AttributeError, ConfigError):  # a trainer that is not ours, or a former option
            if read_name(other) == read_name(name):
                return other
    return None
