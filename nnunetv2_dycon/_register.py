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
    if os.environ.get(TRAINING) == str(os.getppid()):
        from nnunetv2_dycon.parallel import follow_starter

        follow_starter()
    before = os.environ.get(VARIABLE, "")
    if os.environ.get(SWITCH_OFF) == "1" or FOLDER in before.split(os.pathsep):
        return
    os.environ[VARIABLE] = f"{before}{os.pathsep}{FOLDER}" if before else FOLDER
