"""The length of each training, and the trainer with this length."""

import importlib
import re
from collections.abc import Sequence

from nnunetv2_dycon import options
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.trainers.names import TRAINERS

STOCK_TRAINER, STOCK_EPOCHS = "nnUNetTrainer", 1000
_LENGTHS = "nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs"


def share_epochs(epochs: Sequence[int], rounds: int) -> tuple[int, ...]:
    """Return the epochs of every training, the first training first.

    Raises
    ------
    ConfigError
        If there is no round, or the epochs cannot be shared.

    Examples
    --------
    >>> share_epochs([1000], 2)
    (333, 333, 334)
    """
    number = rounds + 1
    if rounds < 1:
        raise ConfigError("--as: give one free data set id for each round")
    if len(epochs) not in (1, number):
        raise ConfigError(f"--epochs: give the total, or {number} numbers: one for each training")
    each = tuple(epochs)
    if len(epochs) == 1:
        share = epochs[0] // number
        each = (*(share,) * rounds, epochs[0] - share * rounds)
    if min(each) < 1:
        raise ConfigError(f"--epochs {' '.join(map(str, epochs))}: {number} trainings need at least 1 epoch each")
    return each


def trainer_of_length(trainer: str, epochs: int) -> str:
    """Return the name of a supervised trainer with this number of epochs.

    Raises
    ------
    ConfigError
        If the trainer cannot be used, its name has a length already, or nnU-Net has no trainer of this length.
    """
    base = trainer.split("_")[0]
    if trainer == STOCK_TRAINER:
        name = trainer if epochs == STOCK_EPOCHS else f"{trainer}_{epochs}epoch{'s' * (epochs > 1)}"
        if epochs != STOCK_EPOCHS and not hasattr(importlib.import_module(_LENGTHS), name):
            raise ConfigError(
                f"nnU-Net has no trainer of {epochs} epochs; give --epochs one number for each training, as "
                "--epochs 500 250 250, or -tr nnUNetTrainerLabeledOnly, which is the same training of any length"
            )
        return name
    if base not in TRAINERS or TRAINERS[base][0].uses_unlabeled:
        raise ConfigError(f"-tr {trainer}: give nnUNetTrainer, or nnUNetTrainerLabeledOnly with options")
    if re.search(r"_epochs\d", trainer):
        raise ConfigError(f"-tr {trainer}: leave epochs out of the name and give the total as --epochs")
    try:
        options.parse(trainer[len(base) :], TRAINERS[base][1])
    except ConfigError as error:
        raise ConfigError(f"-tr {trainer}: {error}") from None
    return f"{trainer}_epochs{epochs}"
