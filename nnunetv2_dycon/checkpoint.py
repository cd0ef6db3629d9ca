"""Checkpoint files: written whole or not at all, and read without running code from them."""

import logging
import os
import pickle
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.files import first_few, whole_file

KEY = "ssl"
TRUST = "NNUNETV2_DYCON_TRUST_FILES"

logger = logging.getLogger(__name__)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write `checkpoint` to `path`; the previous file stays until the new one is whole on disk.

    Raises
    ------
    WriteError
        If the disk is full, or the folder cannot be written.
    """
    with whole_file(path) as part, open(part, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch speaks of positions in its archive where the disk is full
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_checkpoint(path: Path, *keys: str) -> dict[str, Any]:
    """Return the checkpoint, on the CPU, without running code from the file.

    Files of nnU-Net hold numpy scalars in their log; those types are allowed. Any other object would be made by code
    that the file names, so the file is refused, unless the environment variable NNUNETV2_DYCON_TRUST_FILES is 1.

    Raises
    ------
    DataError
        If it cannot be read, holds such objects, or has not all `keys`.
    """
    try:
        checkpoint = _load(path)
        missing = [key for key in keys if key not in checkpoint]
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise _unreadable(path, str(error)) from error
    except pickle.UnpicklingError as error:  # any text, an LFS pointer for one
        raise _unreadable(path, "it is not a file of torch") from error
    if missing:
        raise _unreadable(path, f"it has no {missing[0]}")
    return checkpoint


def _load(path: Path) -> Any:
    with torch.serialization.safe_globals(_numpy_types()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if os.environ.get(TRUST) == "1":
                logger.warning("%s is unpickled in full, because %s is 1: this runs code that it names", path, TRUST)
                return torch.load(path, map_location="cpu", weights_only=False)
            foreign = _foreign_objects(path, str(error))
    if not foreign:
        raise pickle.UnpicklingError
    raise DataError(
        f"{path} was not opened: to read its {first_few(foreign)} means to run code that the file names. If you know "
        f"who made the file and trust them, type: export {TRUST}=1"
    )


def _foreign_objects(path: Path, reason: str) -> list[str]:
    """Return the names of what torch refuses to make from the file; none if it is not a file of torch."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # of a format before torch 1.6, or of no format of torch
        return ["objects"] if "GLOBAL" in reason else []


def _unreadable(path: Path, reason: str) -> DataError:
    first = shorten(reason.split(". ")[0], 150, placeholder=" ...") or "it is empty"
    return DataError(f"{path} cannot be read as a checkpoint ({first}); restore it, or train again with --c")


def _numpy_types() -> list[Any]:
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(1).__reduce__()[0]
    kinds = (np.float16, np.float32, np.float64, np.int16, np.int32, np.int64, np.bool_)
    return [scalar, array, np.dtype, np.ndarray, *(type(np.dtype(kind)) for kind in kinds)]
