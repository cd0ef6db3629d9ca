"""Predict test cases of a run with nnU-Net's own predictor, in a separate process."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.facts import write_run_file
from nnunetv2_dycon.evaluation.runs import Run
from nnunetv2_dycon.files import whole_folder

_PREDICT = (
    "import sys, torch; from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as go; "
    "sys.argv += [] if '-device' in sys.argv or torch.cuda.is_available() else ['-device', 'cpu']; go()"
)
_EXPORT = "import sys; from nnunetv2_dycon.commands import main; sys.exit(main())"


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
        If the run is a folder of predictions, or a command of nnU-Net fails.
    """
    if run.training is None:
        raise DataError(f"{run.name} is a folder of predictions: it cannot be predicted; name its training")
    run.predictions.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".predict.", dir=run.predictions.parent) as scratch:
        model, fold, checkpoint = run.training.parent, str(run.facts.fold), str(run.facts.checkpoint)
        if run.facts.weights == "teacher":
            model = _export_teacher(run, Path(scratch, "model"))
            checkpoint = "checkpoint_final.pth"
        options = ["-npp", "1", "-nps", "1", *([] if mirroring else ["--disable_tta"])]
        options += [*(["-device", device] if device else []), *(["--save_probabilities"] if save_probabilities else [])]
        with whole_folder(run.predictions) as out:
            files = ["-i", str(images), "-o", str(out), "-m", str(model), "-f", fold, "-chk", checkpoint]
            _call(_PREDICT, [*files, *options], run)
            write_run_file(out, run.facts)


def _export_teacher(run: Run, model: Path) -> Path:
    training: Any = run.training
    folder = training.parent
    trainer, plans, configuration = folder.name.split("__")
    arguments = ["export", "-d", folder.parent.name, "-tr", trainer, "-c", configuration, "-p", plans]
    arguments += ["-f", str(run.facts.fold), "-chk", str(run.facts.checkpoint), "--weights", "teacher"]
    _call(_EXPORT, [*arguments, "-o", str(model)], run, nnUNet_results=str(folder.parent.parent))
    return model


def _call(script: str, arguments: Sequence[str], run: Run, **environment: str) -> None:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, errors="replace"
    )
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1].strip()
        raise DataError(
            f"prediction with {run.method}, fold {run.facts.fold}, failed ({last[:200]}); try nnUNetv2_predict"
        )
