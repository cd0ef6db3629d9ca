"""Commands of nnU-Net as processes, and the lock that they inherit."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nnunetv2_dycon.errors import DataError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; there two runs at the same time are the user's to avoid
    fcntl = None  # type: ignore[assignment]  # a module or nothing

# A command of nnU-Net by its name, whatever is in PATH. It inherits the lock, so that nothing else works on its files
# when this process is killed; its loader processes do not, since they may outlive it.
_COMMAND = """
import os, sys
from importlib.metadata import entry_points
held = [int(fd) for fd in sys.argv.pop(1).split()]
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [os.close(held.pop()) for _ in held[:]])
sys.argv.pop(0)
(command,) = {e.value: e for e in entry_points(group="console_scripts", name=sys.argv[0])}.values()
command.load()()
"""


def call(words: Sequence[str], lock: int | None, *, training: bool = False) -> None:
    """Run a command of nnU-Net to its end; `lock` is what `locked` gives.

    Raises
    ------
    DataError
        If the command ends with an error.
    """
    environment = dict(os.environ)
    if not training and environment.get("nnUNet_n_proc_DA") == "0":
        del environment["nnUNet_n_proc_DA"]  # meant for training; elsewhere nnU-Net takes it for a number of threads
    keep = () if lock is None else (lock,)
    command = [sys.executable, "-c", _COMMAND, " ".join(map(str, keep)), *words]
    done = subprocess.run(command, env=environment, pass_fds=keep, check=False)
    if done.returncode:
        raise DataError(
            f"{words[0]} ended with code {done.returncode}; its output is above. When it is mended, type this command "
            f"again, or by hand: {shlex.join(words)}"
        )


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Keep two runs from working on the same folder of results; gives the handle that commands inherit.

    Raises
    ------
    DataError
        If the folder cannot be made, or another run or a command of one holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {folder} ({error.strerror}); set nnUNet_results") from error
    if fcntl is None:
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another run, or a command that it started, is at work on {folder}: wait for it, or end it"
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        yield handle
    finally:
        os.close(handle)
