"""Start-up: tell nnU-Net's trainer search where our trainers are.

Runs at every start of the interpreter (setup.py explains how), so it imports `os` alone.
"""

import os

VARIABLE = "nnUNet_extTrainer"
SWITCH_OFF = "NNUNETV2_DYCON_NO_AUTOREGISTER"
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_nnunet_ext")


def register() -> None:
    """Append our one-file folder to nnUNet_extTrainer, after whatever the user has put there.

    Does nothing where the folder is already listed or NNUNETV2_DYCON_NO_AUTOREGISTER=1 is set.
    """
    before = os.environ.get(VARIABLE, "")
    if os.environ.get(SWITCH_OFF) == "1" or FOLDER in before.split(os.pathsep):
        return
    os.environ[VARIABLE] = f"{before}{os.pathsep}{FOLDER}" if before else FOLDER
