"""Trainings and commands as processes: killed at random moments, typed again, compared with one that was not killed.

NNUNETV2_DYCON_KILLS is the number of kills per kind of moment, 1 by default.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_dycon.checkpoint import KEY, read_checkpoint
from nnunetv2_dycon.files import PART
from tests.datasets import environment
from tests.processes import kill_alone, left_in
from tests.training import same

KILLS = int(os.environ.get("NNUNETV2_DYCON_KILLS", "1"))

NAMES = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
PHASES = ("training", "checkpoint", "validation")
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_def_n_proc": "1"}
_PROGRAM = "from nnunetv2.run.run_training import run_training_entry as run; run()"
_PATIENCE = 1800  # seconds for one training; on a machine that does much else its validation alone took 6 minutes


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
        sessions = kill_alone(process.pid) if process.poll() is None else {process.pid}
        process.wait()
    assert not left_in(sessions), "processes outlive the training"
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
    """Kill a training so often in each phase, let it end, and compare with one that was not killed.

    Returns what was found after each kill.
    """
    draw = random.Random(seed)
    training.finish()
    whole, folders = training.checkpoints(), _summaries(training.fold)
    shutil.rmtree(training.fold)
    found: list[Kill] = []
    while len(found) < kills * len(PHASES):
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
    """Compare with an uninterrupted run: every entry of every checkpoint but times, and the validation.

    Batches of loader processes come in no certain order, so that with these only what a training consists of is equal.
    """
    again = training.checkpoints()
    assert again.keys() == whole.keys() == {NAMES[0], NAMES[2]}
    assert not list(training.fold.rglob(f".*{PART}.*"))
    final = again[NAMES[0]]
    best = [value for value in final["logging"]["ema_fg_dice"] if value == value]
    assert final["_best_ema"] == max(best)
    if training.loaders:
        assert final["current_epoch"] == whole[NAMES[0]]["current_epoch"]
        assert final[KEY]["step"] == whole[NAMES[0]][KEY]["step"]
        assert {key: len(value) for key, value in final["logging"].items()} == {
            key: len(value) for key, value in whole[NAMES[0]]["logging"].items()
        }
        return
    for name, content in whole.items():
        for key in content.keys() - {"logging", KEY}:
            assert same(content[key], again[name][key]), (name, key)
        for part in content[KEY]:
            assert same(content[KEY][part], again[name][KEY][part]), (name, KEY, part)
        timeless = [key for key in content["logging"] if not key.endswith("timestamps")]
        for key in timeless:
            assert same(content["logging"][key], again[name]["logging"][key]), (name, key)
    assert _summaries(training.fold) == summaries


def _summaries(fold: Path) -> list[str]:
    return [(fold / folder / "validation" / "summary.json").read_text() for folder in (".", "teacher")]


class Command(NamedTuple):
    """A command of ours on a copy of `template` in `root`; files like `begun` appear when it begins to write."""

    template: Path
    root: Path
    words: tuple[str, ...]
    begun: str

    def start(self) -> subprocess.Popen:
        """Type it in a session of its own."""
        script = "from nnunetv2_dycon.commands import main; raise SystemExit(main())"
        with open(self.root.with_suffix(".said"), "w") as said:
            return subprocess.Popen(
                [sys.executable, "-c", script, *self.words],
                env={**os.environ, **environment(self.root), **QUIET},
                cwd=self.root,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def wait_for_work(self, process: subprocess.Popen) -> float:
        """Return when it began to write, or ended."""
        while process.poll() is None and not list(self.root.glob(self.begun)):
            time.sleep(0.001)
        return time.monotonic()

    def finish(self) -> float:
        """Let it end well; returns the seconds in which it writes."""
        process = self.start()
        begin = self.wait_for_work(process)
        assert process.wait(_PATIENCE) == 0, self.root.with_suffix(".said").read_text()[-3000:]
        return time.monotonic() - begin

    def is_killed(self, after: float) -> bool:
        """Kill it, and nothing that it started, some seconds after it began to write; False if it had ended."""
        process = self.start()
        self.wait_for_work(process)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            sessions = kill_alone(process.pid)
            process.wait()
            assert not left_in(sessions), "processes outlive the command"
            return True
        return False

    def anew(self) -> None:
        """Put the folder back to what it was before the command."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.template, self.root, symlinks=True)


def kill_and_type_again(command: Command, content: Callable[[Path], Any], seed: int) -> None:
    """Kill a command at random moments; typed again it must end in what one leaves that was not killed.

    Parameters
    ----------
    command : Command
        The command.
    content : callable
        What is compared of its folder, hidden files too.
    seed : int
        Of the moments.
    """
    draw = random.Random(seed)
    command.anew()
    seconds = command.finish()
    whole = content(command.root)
    left = KILLS
    for _ in range(20 * KILLS):
        command.anew()
        if command.is_killed(draw.uniform(0, seconds)):
            left -= 1
            command.finish()
            found = content(command.root)
            if found != whole and isinstance(found, dict):
                odd = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
                raise AssertionError(f"other than without a kill: {odd}")
            assert found == whole
        else:
            seconds *= 0.8  # the machine does less else than before
        if not left:
            break
    assert not left
