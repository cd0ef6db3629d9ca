"""Trainings as processes that are killed at random moments, taken up again, and compared with one that was not."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_dycon.checkpoint import KEY, read_checkpoint
from nnunetv2_dycon.files import PART
from tests.datasets import environment
from tests.training import same

NAMES = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
PHASES = ("training", "checkpoint", "validation")
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_def_n_proc": "1"}
_PROGRAM = "from nnunetv2.run.run_training import run_training_entry as run; run()"
_PATIENCE = 600  # seconds for one training


class Training(NamedTuple):
    """One training of the tiny data set in `root`; `loaders` is the number of its loader processes."""

    root: Path
    trainer: str
    loaders: int = 0

    @property
    def fold(self) -> Path:
        return Path(
            self.root, "nnUNet_results", "Dataset901_Tiny", f"{self.trainer}__nnUNetPlans__3d_fullres", "fold_0"
        )

    def start(self, *flags: str) -> subprocess.Popen:
        """Type nnUNetv2_train in a session of its own."""
        variables = {**os.environ, **environment(self.root), **QUIET, "nnUNet_n_proc_DA": str(self.loaders)}
        words = ["901", "3d_fullres", "0", "-tr", self.trainer, "-device", "cpu", *flags]
        with open(self.root / "said.txt", "a") as said:
            return subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *words],
                env=variables,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def finish(self, *flags: str) -> None:
        """Train to the end."""
        assert self.start(*flags).wait(_PATIENCE) == 0, (self.root / "said.txt").read_text()[-3000:]

    def log(self) -> str:
        """What all its runs have logged."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.fold.glob("training_log_*.txt")))

    def checkpoints(self) -> dict[str, dict[str, Any]]:
        """Its checkpoints, each of which must be whole."""
        return {name: read_checkpoint(self.fold / name) for name in NAMES if (self.fold / name).is_file()}


class Kill(NamedTuple):
    """What was found after a kill: the phase, the last epoch that had begun, the epoch from which it goes on."""

    phase: str
    begun: int
    kept: int


def kill(training: Training, phase: str, draw: random.Random) -> Kill | None:
    """Start or continue a training, and kill it somewhere in a phase; None if it ended before.

    Checks that all its checkpoints are whole and that nothing is lost but the epoch that had begun.
    """
    there = training.checkpoints()
    process = training.start(*(["--c"] if there else []))
    try:
        if not _wait_for(_event(training, phase, draw), process):
            assert process.returncode == 0, (training.root / "said.txt").read_text()[-3000:]
            return None
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # and its loaders: they are not the subject here
        process.wait()
    begun = max(map(int, re.findall(r": Epoch (\d+)", training.log())), default=0)
    kept = max((content["current_epoch"] for content in training.checkpoints().values()), default=0)
    assert kept >= begun, f"epoch {begun} had begun, and the newest checkpoint is of epoch {kept}"
    return Kill(phase, begun, kept)


def _event(training: Training, phase: str, draw: random.Random) -> Callable[[], bool]:
    """Return a function that says whether the random moment in a phase has come."""
    before = training.log()
    if phase == "checkpoint":  # a temporary file is there for some milliseconds
        pattern, left = f".????????{PART}.checkpoint_*", set(training.fold.glob(f".*{PART}.*"))
        skip = draw.randrange(3)
        seen: set[Path] = set()

        def moment() -> bool:
            seen.update(set(training.fold.glob(pattern)) - left)
            return len(seen) > skip

        return moment
    first = phase == "training"
    wanted, delay = (r": Epoch \d", draw.uniform(0, 3)) if first else (": predicting", draw.uniform(0, 8))
    number = len(re.findall(wanted, before)) + (draw.randrange(1, 5) if first else 1)
    times: list[float] = []

    def later() -> bool:
        if not times and len(re.findall(wanted, training.log())) >= number:
            times.append(time.monotonic() + delay)
        return bool(times) and time.monotonic() >= times[0]

    return later


def _wait_for(event: Callable[[], bool], process: subprocess.Popen) -> bool:
    end = time.monotonic() + _PATIENCE
    while process.poll() is None:
        if event():
            return True
        assert time.monotonic() < end
        time.sleep(0.0005)
    return False


def kill_often(training: Training, kills: int, seed: int) -> list[Kill]:
    """Kill a training in random phases, let it end, and compare with one that was not killed.

    Returns what was found after each kill.
    """
    draw = random.Random(seed)
    training.finish()
    whole, folders = training.checkpoints(), _summaries(training.fold)
    shutil.rmtree(training.fold)
    found: list[Kill] = []
    while len(found) < kills:
        one = kill(training, PHASES[len(found) % len(PHASES)], draw)
        if one is None:  # it ended first: begin anew
            assert_equal(training, whole, folders)
            shutil.rmtree(training.fold)
        else:
            found.append(one)
    training.finish("--c")
    assert_equal(training, whole, folders)
    return found


def assert_equal(training: Training, whole: dict[str, dict[str, Any]], summaries: list[str]) -> None:
    """Compare with an uninterrupted run: every entry of every checkpoint but times, and the validation."""
    again = training.checkpoints()
    assert again.keys() == whole.keys() == {NAMES[0], NAMES[2]}
    for name, content in whole.items():
        for key in content.keys() - {"logging", KEY}:
            assert same(content[key], again[name][key]), (name, key)
        for part in content[KEY]:
            assert same(content[KEY][part], again[name][KEY][part]), (name, KEY, part)
        timeless = [key for key in content["logging"] if not key.endswith("timestamps")]
        for key in timeless:
            assert same(content["logging"][key], again[name]["logging"][key]), (name, key)
    assert _summaries(training.fold) == summaries
    assert not list(training.fold.glob(f".*{PART}.*"))


def _summaries(fold: Path) -> list[str]:
    return [(fold / folder / "validation" / "summary.json").read_text() for folder in (".", "teacher")]
