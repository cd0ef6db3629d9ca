"""Checkpoint files: written whole or not at all, read without unpickling objects where the file allows it."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

KEY = "ssl"


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write `checkpoint` to `path`; the previous file stays until the new one is whole on disk."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], bool]:
    """Return the checkpoint and whether it was read without unpickling arbitrary objects.

    Files of nnU-Net hold numpy scalars in their log; those types are allowed, anything else needs full unpickling.
    """
    with torch.serialization.safe_globals(_numpy_types()):
        try:
            return torch.load(path, map_location=device, weights_only=True), True
        except pickle.UnpicklingError:
            return torch.load(path, map_location=device, weights_only=False), False


def _numpy_types() -> list[Any]:
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(1).__reduce__()[0]
    kinds = (np.float16, np.float32, np.float64, np.int16, np.int32, np.int64, np.bool_)
    return [scalar, array, np.dtype, np.ndarray, *(type(np.dtype(kind)) for kind in kinds)]
