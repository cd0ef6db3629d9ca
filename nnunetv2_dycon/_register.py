"""Start-up: tell nnU-Net's trainer search where our trainers are, and let its processes end with our trainings.

Runs at every start of the interpreter (setup.py explains how), so it imports `os` alone; more in processes that one of
our trainings starts.
"""

import os

VARIABLE = "nnUNet_extTrainer"
SWITCH_OFF = "NNUNETV2_DYCON_NO_AUTOREGISTER"
TRAINING = "NNUNETV2_DYCON_TRAINING"  # its process id, in the processes that it starts
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_nnunet_ext")


def register() -> None:
    """Append our one-file folder to nnUNet_extTrainer, after whatever the user has put there.

    Does nothing where the folder is already listed or NNUNETV2_DYCON_NO_AUTOREGISTER=1 is set.
    """
    starter = os.environ.get(TRAINING)
    if starter and (int(starter) == os.getppid() or _is_gone(int(starter))):
        from nnunetv2_dycon.parallel import follow_starter

        follow_starter(int(starter))
    before = os.environ.get(VARIABLE, "")
    if os.environ.get(SWITCH_OFF) == "1" or FOLDER in before.split(os.pathsep):
        return
    os.environ[VARIABLE] = f"{before}{os.pathsep}{FOLDER}" if before else FOLDER


def _is_gone(process: int) -> bool:
    """Return whether a process was killed before one that it started came here."""
    if not hasattr(os, "getpgid"):  # Windows
        return False
    try:
        os.getpgid(process)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
