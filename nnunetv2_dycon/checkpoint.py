"""Checkpoint files: written whole or not at all, and read without running code from them."""

import errno
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from nnunetv2_dycon.errors import DamagedError, DataError, UserError
from nnunetv2_dycon.files import first_few, whole_file

KEY = "ssl"
TRUST = "NNUNETV2_DYCON_TRUST_FILES"
_FOLDER = 0x10  # a bit of external attributes in the zip format
_FORCE = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # torch refuses both at once

logger = logging.getLogger(__name__)


def write_checkpoint(checkpoint: dict[str, Any], path: Path, elsewhere: str = "or choose another folder") -> None:
    """Write `checkpoint` to `path`; the previous file stays until the new one is whole on disk.

    Parameters
    ----------
    checkpoint : dict
        What to write.
    path : Path
        Its file.
    elsewhere : str
        What the user can do if the disk is full, except making room; ends the error message.

    Raises
    ------
    WriteError
        If the disk is full, or the folder cannot be written.
    """
    with whole_file(path, elsewhere) as part, open(part, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch speaks of positions in its archive where the disk is full
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_checkpoint(path: Path, *keys: str, mend: str = "") -> dict[str, Any]:
    """Return the checkpoint, on the CPU, without running code from the file.

    Files of nnU-Net hold numpy scalars in their log; those types are allowed. Any other object would be made by code
    that the file names, so the file is refused, unless the environment variable NNUNETV2_DYCON_TRUST_FILES is 1. The
    content is compared with the check sums that torch writes, and does not look at when it reads.

    Parameters
    ----------
    path : Path
        The file.
    keys : str
        What it must have.
    mend : str
        What the user can do about a damaged file, if it is not one of a training; ends the error message.

    Raises
    ------
    DamagedError
        If its content is not that of a checkpoint with all `keys`, or not what was written.
    DataError
        If it cannot be read, or holds such objects.
    """
    try:
        _check_sums(path)
        checkpoint = _load(path)
        missing = [key for key in keys if key not in checkpoint]
    except UserError:
        raise
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno == errno.EINVAL:  # sought before the file's begin, by either
            raise DamagedError(_unreadable(path, "its parts are not where it says", mend)) from error
        raise DataError(_unreadable(path, str(error), mend)) from error
    except pickle.UnpicklingError as error:  # any text, an LFS pointer for one
        raise DamagedError(_unreadable(path, "it is not a file of torch", mend)) from error
    except Exception as error:  # damaged bytes can make torch and zipfile raise anything
        raise DamagedError(_unreadable(path, str(error), mend)) from error
    if missing:
        raise DamagedError(_unreadable(path, f"it has no {missing[0]}", mend))
    return checkpoint


@contextmanager
def reading_without_code() -> Iterator[None]:
    """Let nothing in this process make other objects than nnU-Net's from a file of torch, whoever reads it.

    Does nothing where the environment variable NNUNETV2_DYCON_TRUST_FILES is 1. torch then raises UnpicklingError;
    `read_checkpoint` of the same file says why in one line.
    """
    if os.environ.get(TRUST) == "1":
        yield
        return
    before = {name: os.environ.pop(name, None) for name in _FORCE}
    os.environ[_FORCE[0]] = "1"  # of torch: callers that ask for full unpickling do not get it
    try:
        with torch.serialization.safe_globals(_numpy_types()):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _check_sums(path: Path) -> None:
    if not path.stat().st_size:
        raise EOFError("it is empty")
    if not zipfile.is_zipfile(path):  # cut short, or of a format before torch 1.6
        return
    with zipfile.ZipFile(path) as archive:
        # torch reads nothing, and says nothing, where a part is marked as a folder
        folders = [part.filename for part in archive.infolist() if part.external_attr & _FOLDER]
        damaged = archive.testzip() or next(iter(folders), None)
    if damaged:
        raise zipfile.BadZipFile(f"its part {damaged} is damaged")


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


def _unreadable(path: Path, reason: str, mend: str) -> str:
    first = shorten(reason.split(". ")[0], 150, placeholder=" ...") or "it is cut short"
    if not mend:  # --c replaces the latest and the final one
        best = path.name == "checkpoint_best.pth"
        mend = f"restore it, or {'take another checkpoint' if best else 'train again with --c'}"
    return f"{path} cannot be read as a checkpoint ({first}); {mend}"


def _numpy_types() -> list[Any]:
    import numpy as np

    makers = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    module = "numpy.{}.multiarray.{}"  # _core from numpy 2 on, core before: either may have written the file
    named = [(maker, module.format(core, maker.__name__)) for maker in makers for core in ("core", "_core")]
    kinds = (np.float16, np.float32, np.float64, np.int16, np.int32, np.int64, np.bool_)
    return [*named, np.dtype, np.ndarray, *(type(np.dtype(kind)) for kind in kinds)]
