"""Commands of nnU-Net as processes, and the lock that they inherit."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from nnunetv2_dycon import parallel
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.exit_codes import NOBODY_READS
from nnunetv2_dycon.folders import VARIABLES, environment_folder

_LITTLE = 2  # GB; a checkpoint that did not fit is deleted again, so that some space is free

# A command of nnU-Net by its name, whatever is in PATH. It inherits the lock, so that nothing else works on its files
# when this process is killed; the processes that it starts do not. These end with it, since nobody would wait for them.
_COMMAND = """
import os, sys
from importlib.metadata import entry_points
held = [int(fd) for fd in sys.argv.pop(1).split()]
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [os.close(held.pop()) for _ in held[:]])
sys.argv.pop(0)
(command,) = {e.value: e for e in entry_points(group="console_scripts", name=sys.argv[0])}.values()
from nnunetv2_dycon.data.processes import ending_with_this_process
from nnunetv2_dycon.exit_codes import exit_code
from nnunetv2_dycon.parallel import end_forks_with_this_process
end_forks_with_this_process()
with ending_with_this_process():
    sys.exit(exit_code(lambda: command.load()() or 0))
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
    BrokenPipeError
        If nobody reads what the command prints.
    """
    environment = dict(os.environ)
    if not training and environment.get("nnUNet_n_proc_DA") == "0":
        del environment["nnUNet_n_proc_DA"]  # meant for training; other commands read it as a number of threads
    keep = () if lock is None else (lock,)
    command = [sys.executable, "-c", _COMMAND, " ".join(map(str, keep)), *words]
    code = parallel.run_command(command, env=environment, pass_fds=keep)
    if code == NOBODY_READS:
        raise BrokenPipeError
    if code:
        raise DataError(
            f"{words[0]} ended with code {code}; its output is above{_little_space()}. Mend it, then type this "
            f"command again, or by hand: {shlex.join(words)}"
        )


def _little_space() -> str:
    """Return which of nnU-Net's folders are on a disk that is nearly full, as the end of a sentence."""
    free = {variable: shutil.disk_usage(environment_folder(variable)).free / 1e9 for variable in VARIABLES}
    little = [f"{space:.2f} GB in {variable}" for variable, space in free.items() if space < _LITTLE]
    return f", and the disk may be full: free are {' and '.join(little)}" if little else ""
