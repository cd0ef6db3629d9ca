"""Converters as people run them: by path, by command, in several processes, killed at any moment."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_dycon.conversion.protocols import PUBLISHED, read_protocol
from tests import collections
from tests.datasets import environment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KILLS = 10


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def start(root: Path, *command: str | Path) -> subprocess.Popen:
    """Start a command with data folders of its own, in its own process group."""
    folders = environment(root)
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | folders,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(root: Path, *command: str | Path) -> str:
    with start(root, *command) as process:
        text = process.communicate()[0]
    assert process.returncode == 0, text
    return text


def group_members(group: int) -> list[int]:
    """Processes of a group that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


COLLECTIONS = {
    "Dataset501_ISLES22": (collections.isles, ("--labeled", "0.1", "--modalities", "dwi", "adc", "flair")),
    "Dataset502_BraTS19": (collections.brats, ("--labeled", "25", "--labels", "multi", "--modalities")),
    "Dataset503_LA": (collections.la_nrrd, ("--labeled", "8")),
    "Dataset504_PancreasNIH": (collections.pancreas_dicom, ("--labeled", "12", "--keep_withdrawn")),
    "Dataset505_BTCV": (collections.btcv, ("--labeled", "4", "--protocol", "skcdf")),
}


@pytest.mark.parametrize("name", COLLECTIONS)
def test_the_script_by_its_path_and_the_command_write_the_same_tree(tmp_path: Path, name: str) -> None:
    make, arguments = COLLECTIONS[name]
    source = tmp_path / "a download"
    make(source)
    by_path = finish(tmp_path / "one", f"dataset_conversion/{name}.py", source, "-np", "1", *arguments)
    module = ("-c", "from nnunetv2_dycon.commands import main; raise SystemExit(main())", "convert", name.split("_")[1])
    by_command = finish(tmp_path / "two", *module, source, "-np", "2", *arguments)
    trees = [tree(tmp_path / part / "nnUNet_raw") for part in ("one", "two")]
    assert trees[0] == trees[1]
    assert {path.split("/")[0] for path in trees[0]} == {name}
    for text in (by_path, by_command):
        assert f"next: nnUNetv2_dycon check -d {name[7:10]}" in text


def test_an_error_of_a_script_is_one_line_and_2(tmp_path: Path) -> None:
    collections.btcv(tmp_path / "btcv")
    with start(tmp_path, "dataset_conversion/Dataset503_LA.py", tmp_path / "btcv", "--labeled", "8") as process:
        text = process.communicate()[0]
    assert process.returncode == 2
    assert text.count("\n") == 1
    assert "it looks like BTCV; type: nnUNetv2_dycon convert BTCV" in text


def wait_for_work(root: Path, process: subprocess.Popen) -> float:
    """Wait until a conversion has started to write; returns the time."""
    while process.poll() is None and not list(root.glob("nnUNet_raw/.*.converting")):
        time.sleep(0.001)
    return time.monotonic()


def clean_run(root: Path, command: Sequence[str | Path]) -> tuple[dict[str, str], float]:
    """Tree of a conversion, and the seconds in which it writes."""
    with start(root, *command) as process:
        begin = wait_for_work(root, process)
        text = process.communicate()[0]
    assert process.returncode == 0, text
    return tree(root / "nnUNet_raw"), time.monotonic() - begin


def ended(process: subprocess.Popen, after: float) -> bool:
    """Kill a process after some seconds; returns whether it was done before."""
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)  # it alone: its workers must notice by themselves
        process.wait()
        return False
    return True


def wait_for_workers(process: subprocess.Popen) -> None:
    until = time.monotonic() + 300
    while group_members(process.pid):
        assert time.monotonic() < until, f"workers are alive: {group_members(process.pid)}"
        time.sleep(0.05)


def killed_again_and_again(root: Path, command: Sequence[str | Path], whole: float, chooser: random.Random) -> int:
    """Kill a conversion at random moments, each time going on with what is there; returns how many were killed.

    The time of a run changes with what else the machine does, so a run that ended before its kill shortens the next.
    """
    killed = 0
    for _ in range(4 * KILLS):
        if killed == KILLS:
            break
        process = start(root, *command)
        wait_for_work(root, process)
        done = ended(process, chooser.uniform(0, 1) * whole)
        wait_for_workers(process)
        killed += not done
        whole *= 0.8 if done else 1.0
        if done or chooser.random() < 0.5:  # some are killed while going on, others from the start
            for folder in environment(root).values():
                shutil.rmtree(folder)
    return killed


def test_a_conversion_that_is_killed_at_any_moment_ends_in_the_tree_of_a_clean_run(tmp_path: Path) -> None:
    cases = read_protocol(PUBLISHED / "la_80_20.json", str)
    source = tmp_path / "2018LA"
    collections.la_h5(source, [*cases.train[:9], *cases.test[:3]], shape=(150, 140, 88))
    command = ("dataset_conversion/Dataset503_LA.py", source, "--labeled", "4", "-np", "2")
    clean, whole = clean_run(tmp_path / "clean", command)
    assert len(clean) == 12 + 7 + 3
    root = tmp_path / "killed"
    killed = killed_again_and_again(root, command, whole, random.Random(5))
    assert killed >= KILLS // 2
    finish(root, *command)
    assert tree(root / "nnUNet_raw") == clean


def test_links_that_are_killed_at_any_moment_end_in_the_tree_of_a_clean_run(tmp_path: Path) -> None:
    source = tmp_path / "isles"
    for number in range(1, 121):
        case = f"sub-strokecase{number:04d}"
        mask = np.zeros((40, 40, 30), np.uint16)
        mask[3:9, 3:9, 3:9] = 1
        for kind, array in (("dwi", mask * 100.0), ("msk", mask)):
            part = "derivatives" if kind == "msk" else "rawdata"
            collections.write_nifti(source / part / case / f"{case}_ses-0001_{kind}.nii.gz", array, np.eye(4))
    command = ("dataset_conversion/Dataset501_ISLES22.py", source, "--labeled", "all", "-np", "1")
    clean, whole = clean_run(tmp_path / "clean", command)
    root = tmp_path / "killed"
    assert killed_again_and_again(root, command, whole, random.Random(6)) >= KILLS // 2
    finish(root, *command)
    assert tree(root / "nnUNet_raw") == clean
