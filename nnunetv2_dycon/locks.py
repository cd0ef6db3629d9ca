"""A lock on a file or folder, so that two runs never write to the same place; it ends with its process."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2_dycon.errors import DataError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; there the user must avoid two runs at the same time
    fcntl = None  # type: ignore[assignment]  # a module or nothing

logger = logging.getLogger(__name__)

_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


# A forked loader process may outlive the process that holds the lock, and would keep it for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool | None]:
    """Hold the lock of an existing file or folder if no other process does.

    Gives whether it is held; None where there are no locks, so that nobody can know.
    """
    if fcntl is None:
        yield None
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    _held.add(handle)
    held: bool | None = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:  # some network file systems have no locks
            held = None
        yield held
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


@contextmanager
def locked(path: Path, busy: str, *, wait: bool = False) -> Iterator[int | None]:
    """Hold the lock of an existing file or folder; gives its handle, or None on Windows.

    Started commands may inherit the handle (`pass_fds`); forked processes do not. A file system without locks causes
    a warning.

    Parameters
    ----------
    path : Path
        An existing file or folder.
    busy : str
        The message if another process holds the lock.
    wait : bool
        Warn and wait for the other process instead of raising.

    Raises
    ------
    DataError
        If another process holds the lock and `wait` is False.
    """
    if fcntl is None:
        yield None
        return
    # NFS locks only files that are open for writing; a folder cannot be
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise DataError(busy) from error
            logger.warning(busy)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s); do not start a second run now", path, error.strerror)
        yield handle
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)
