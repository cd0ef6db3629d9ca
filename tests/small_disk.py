"""A small disk of its own for a program, to fill it for real."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def run_on_small_disk(folder: Path, megabytes: int, program: str, *arguments: object) -> str:
    """Run a Python program that sees a disk of that size at `folder`; returns what it printed.

    The disk is gone when the program ends. Skips the test where a user may not mount one.
    """
    folder.mkdir(exist_ok=True)
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    alone = ["unshare", "-m", "sh", "-c", _MOUNT, "sh", f"{megabytes}m", str(folder)]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    command = [*alone, sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
