"""A lock on a file or folder, so that two runs never write the same place; it ends with the process that holds it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2_dycon.errors import DataError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; there two runs at the same time are the user's to avoid
    fcntl = None  # type: ignore[assignment]  # a module or nothing

logger = logging.getLogger(__name__)

_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


# A forked loader process may outlive the process that holds the lock, and would hold it for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path, busy: str, *, wait: bool = False) -> Iterator[int | None]:
    """Hold the lock of a file or folder that exists; gives its handle, or None.

    Commands that are started may inherit the handle (`pass_fds`), forked processes do not.

    Where the file system has no locks a warning says so.

    Parameters
    ----------
    path : Path
        An existing file or folder.
    busy : str
        What to say when another process holds the lock.
    wait : bool
        Warn and wait for the other process, in place of raising.

    Raises
    ------
    DataError
        If another process holds the lock and `wait` is False.
    """
    if fcntl is None:
        yield None
        return
    # NFS locks only what is open for writing, which a folder cannot be
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
            logger.warning("%s cannot be locked (%s); start no second run now", path, error.strerror)
        yield handle
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)
