"""Commands of nnU-Net as processes, and the lock that they inherit."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from nnunetv2_dycon.errors import DataError

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
    """Run a command of nnU-Net to its end.

    Parameters
    ----------
    words : sequence of str
        The command.
    lock : int or None
        Handle of a lock that the command inherits.
    training : bool
        Whether the command trains: only then nnUNet_n_proc_DA=0 is kept.

    Raises
    ------
    DataError
        If the command ends with an error.
    """
    environment = dict(os.environ)
    if not training and environment.get("nnUNet_n_proc_DA") == "0":
        del environment["nnUNet_n_proc_DA"]  # meant for training; other commands read it as a number of threads
    keep = () if lock is None else (lock,)
    command = [sys.executable, "-c", _COMMAND, " ".join(map(str, keep)), *words]
    done = subprocess.run(command, env=environment, pass_fds=keep, check=False)
    if done.returncode:
        raise DataError(
            f"{words[0]} ended with code {done.returncode}; its output is above. Mend it, then type this command "
            f"again, or by hand: {shlex.join(words)}"
        )
