"""Predict test cases of a run with nnU-Net's own predictor, in a separate process."""

import errno
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.facts import FINAL, write_run_file
from nnunetv2_dycon.evaluation.runs import Run
from nnunetv2_dycon.files import scratch_folder, whole_folder, writing

# Its workers are a group with it, which ends when this process is killed: nobody would read what it still predicts.
_WATCH = """
import os, signal, sys, threading, time
def watch(parent=int(sys.argv.pop(1))):
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
if hasattr(os, "killpg"):
    threading.Thread(target=watch, daemon=True).start()
"""
_PREDICT = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as go; go()"
_EXPORT = "from nnunetv2_dycon.commands import main; sys.exit(main())"


def predict(
    run: Run, images: Path, *, mirroring: bool, device: str | None = None, save_probabilities: bool = False
) -> None:
    """Write the run's predictions of all images together with its facts, all or none.

    Parameters
    ----------
    run : Run
        A training. The teacher's weights are exported first, since stock nnU-Net predicts with the student's.
    images : Path
        Folder of the test images.
    mirroring : bool
        Average over mirrored images, as nnU-Net does.
    device : str, optional
        As -device of nnU-Net; by default CUDA if available, else the CPU.
    save_probabilities : bool
        Also write .npz files, which calibration needs.

    Raises
    ------
    DataError
        If the run is a folder of predictions, nothing can be written, or a command of nnU-Net fails.
    """
    if run.training is None:
        raise DataError(f"{run.name} is a folder of predictions: it cannot be predicted; name its training")
    model, checkpoint = run.training.parent, str(run.facts.checkpoint)
    options = ["-f", str(run.facts.fold), "-device", device or _best_device(), "-npp", "1", "-nps", "1"]
    options += [*([] if mirroring else ["--disable_tta"]), *(["--save_probabilities"] if save_probabilities else [])]
    place = run.predictions
    with writing(place), scratch_folder(place.with_name("predict")) as scratch, whole_folder(place) as out:
        by_hand = _ByHand({out: str(place), scratch: "."})
        if run.facts.weights == "teacher":
            model = _export_teacher(run, scratch / "model", by_hand)
            checkpoint = FINAL
        words = ["-i", str(images), "-o", str(out), "-m", str(model), "-chk", checkpoint, *options]
        _call(_PREDICT, ["nnUNetv2_predict_from_modelfolder", *words], run, by_hand)
        write_run_file(out, run.facts)


@dataclass
class _ByHand:
    """Commands so far, as a user can type them: with names in place of temporary folders."""

    names: Mapping[Path, str]
    commands: list[str] = field(default_factory=list)

    def add(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        changed = [f"{key}={shlex.quote(value)} " for key, value in environment.items() if os.environ.get(key) != value]
        self.commands.append("".join(changed) + shlex.join(words))

    def __str__(self) -> str:
        text = " && ".join(self.commands)
        for folder, name in self.names.items():
            text = text.replace(shlex.quote(str(folder)), shlex.quote(name)).replace(str(folder), name)
        return text


def _best_device() -> str:
    import torch  # imported when the run was read

    return "cuda" if torch.cuda.is_available() else "cpu"


def _export_teacher(run: Run, model: Path, by_hand: _ByHand) -> Path:
    folder: Any = run.training
    trainer, plans, configuration = folder.parent.name.split("__")
    words = ["nnUNetv2_dycon", "export", "-d", folder.parents[1].name, "-tr", trainer, "-c", configuration, "-p", plans]
    words += ["-f", str(run.facts.fold), "-chk", str(run.facts.checkpoint), "--weights", "teacher", "-o", str(model)]
    _call(_EXPORT, words, run, by_hand, {"nnUNet_results": str(folder.parents[2])})
    return model


def _call(
    script: str, words: Sequence[str], run: Run, by_hand: _ByHand, environment: Mapping[str, str] | None = None
) -> None:
    """Run a command by the Python script that is behind it.

    Raises
    ------
    DataError
        If it fails: its last line, and the commands that show all of its output.
    OSError
        If it fails since the disk is full.
    """
    by_hand.add(words, environment or {})
    with subprocess.Popen(
        [sys.executable, "-c", _WATCH + script, str(os.getpid()), *words[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate()
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        full = os.strerror(errno.ENOSPC)
        if full in said:
            raise OSError(errno.ENOSPC, full)
        last = ([line for line in said.splitlines() if line.strip()] or ["no message"])[-1].strip()
        raise DataError(
            f"prediction with {run.method}, fold {run.facts.fold}, failed ({last[:200]}); to see all that it prints, "
            f"type: {by_hand}"
        )


def _end(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
