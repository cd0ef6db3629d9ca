"""One training at a time in a results folder."""

import atexit
import os
import socket
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from nnunetv2_dycon.files import remove_leftovers, writing
from nnunetv2_dycon.locks import locked

_LOCK = ".training.lock"
_held: dict[Path, ExitStack] = {}  # until this process ends: the final validation comes after the training


def lock_training(folder: Path) -> None:
    """Keep other processes from training in a results folder until this process ends, and tidy it up.

    Two trainings of one name and fold would write the same checkpoints in turn. Temporary files in the folder are
    those of a killed training, and are deleted.

    Parameters
    ----------
    folder : Path
        The results folder of a fold.

    Raises
    ------
    DataError
        If another process trains there; the message names it.
    """
    path = folder.resolve() / _LOCK
    if path not in _held:
        _held[path] = _lock(path, folder)
    remove_leftovers(folder)


def _lock(path: Path, folder: Path) -> ExitStack:
    with writing(path):
        path.touch()
    owner = path.read_text(errors="replace").strip() or "another process"
    stack = ExitStack()
    stack.enter_context(locked(path, f"{folder}: {owner} trains here; wait until it ends, or end it"))
    atexit.register(stack.close)  # later, at the end of the interpreter, it would complain
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M}\n")
    return stack
