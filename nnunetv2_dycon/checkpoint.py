"""Checkpoint files: written whole or not at all, read without unpickling objects where the file allows it."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import whole_file

KEY = "ssl"

logger = logging.getLogger(__name__)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write `checkpoint` to `path`; the previous file stays until the new one is whole on disk."""
    with whole_file(path) as part:
        torch.save(checkpoint, part)


def read_checkpoint(path: Path, *keys: str) -> dict[str, Any]:
    """Return the checkpoint, on the CPU; a warning says so where arbitrary objects had to be unpickled for it.

    Files of nnU-Net hold numpy scalars in their log; those types are allowed, anything else needs full unpickling.

    Raises
    ------
    DataError
        If it cannot be read, or has not all `keys`.
    """
    try:
        checkpoint = _load(path)
        missing = [key for key in keys if key not in checkpoint]
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, ImportError) as error:
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
        except pickle.UnpicklingError:
            checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    logger.warning("%s holds objects that had to be unpickled; open only files that you trust", path)
    return checkpoint


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(f"{path} cannot be read as a checkpoint ({reason[:100]}); restore it, or train again with --c")


def _numpy_types() -> list[Any]:
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(1).__reduce__()[0]
    kinds = (np.float16, np.float32, np.float64, np.int16, np.int32, np.int64, np.bool_)
    return [scalar, array, np.dtype, np.ndarray, *(type(np.dtype(kind)) for kind in kinds)]
