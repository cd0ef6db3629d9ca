"""Commands of nnU-Net as a user of this machine types them."""

import shlex
from typing import NamedTuple


class Model(NamedTuple):
    """The name of a results folder, in its parts."""

    trainer: str
    plans: str
    configuration: str

    @property
    def folder(self) -> str:
        """The name as nnU-Net writes it."""
        return "__".join(self)


def train_command(dataset: int | str, model: Model, fold: int | str, *flags: str) -> str:
    """Return the command that trains a model on this machine.

    Parameters
    ----------
    dataset : int or str
        Number or name.
    model : Model
        What to train.
    fold : int or 'all'
        The fold.
    flags : str
        Further arguments.
    """
    words = ["nnUNetv2_train", str(dataset), model.configuration, str(fold), "-tr", model.trainer]
    if model.plans != "nnUNetPlans":
        words += ["-p", model.plans]
    return shlex.join([*words, *device_flag(), *flags])


def device_flag() -> tuple[str, ...]:
    """Return what nnU-Net's commands need where there is no CUDA device, which they use otherwise."""
    import torch  # takes seconds, and is only needed where a command is shown

    if torch.cuda.is_available():
        return ()
    return ("-device", "mps" if torch.backends.mps.is_available() else "cpu")
