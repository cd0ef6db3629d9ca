"""nnU-Net's three folders; a missing one is an error that tells how to set it."""

import os
import shlex
from pathlib import Path

from nnunetv2_dycon.errors import DataError

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def unset(variable: str) -> str:
    """Return what to type where one of nnU-Net's variables is not set."""
    return f"{variable} is not set; type: export {variable}=/path/to/{variable}"


def environment_folder(variable: str) -> Path:
    """Return the folder that one of nnU-Net's variables names.

    Raises
    ------
    DataError
        If the variable is not set or does not name a folder.
    """
    value = os.environ.get(variable)
    if not value:
        raise DataError(unset(variable))
    if not Path(value).is_dir():
        typed = f"mkdir -p {shlex.quote(value)}"
        raise DataError(f"{variable} is {value}, which is not a folder; type: {typed}, or correct the variable")
    return Path(value)


def raw_folder(dataset: str) -> Path | None:
    """Return the raw data set, or None if only the preprocessed one is on this machine."""
    value = os.environ.get("nnUNet_raw")
    folder = Path(value, dataset) if value else None
    return folder if folder is not None and folder.is_dir() else None
