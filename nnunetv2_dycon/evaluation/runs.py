"""Find runs by name.

A run is one training with one choice of weights, or a folder of predictions from anywhere.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.advice import unknown
from nnunetv2_dycon.evaluation.facts import (
    FINAL,
    RUN_FILE,
    TRAINING_FILES,
    Facts,
    Weights,
    read_run_file,
    read_training,
    recorded_facts,
)
from nnunetv2_dycon.folders import environment_folder


@dataclass(frozen=True)
class Run:
    """The name that the user gave, the facts of the run, and the folder of its predictions.

    `training` is the fold's folder with the checkpoint, None for a folder of predictions. `upper` marks an upper bound,
    which was trained on more labels than the others.
    """

    name: str
    facts: Facts
    predictions: Path
    training: Path | None = None
    upper: bool = False

    @property
    def method(self) -> str:
        """Name of the method: the same for runs that differ by seed or labelled draw alone."""
        base = self.facts.trainer or self.predictions.name
        base += "" if self.facts.self_training is None else f"_self{self.facts.self_training}"
        base += "_upper-bound" if self.upper else ""
        return re.sub(r"_seed\d+(?=_|\Z)", "", base) + (f" ({self.facts.weights})" if self.facts.weights else "")


class Place(NamedTuple):
    """Where a trainer's trainings are in nnU-Net's results folder, and the file name of the checkpoint."""

    dataset: str
    configuration: str = "3d_fullres"
    plans: str = "nnUNetPlans"
    folds: tuple[int | str, ...] = (0,)
    checkpoint: str = FINAL


def find_runs(text: str, place: Place, weights: Sequence[Weights], mirroring: bool) -> list[Run]:
    """Return the runs of a name: one for each training, fold and choice of weights.

    Parameters
    ----------
    text : str
        A trainer name (`*` stands for anything), a results folder, a folder of predictions, or RUN=FOLDER for the
        predictions of RUN in FOLDER.
    place : Place
        Where the trainings are.
    weights : sequence of {"student", "teacher"}
        A run without a teacher gives its student only, if that is among them.
    mirroring : bool
        Whether to use the predictions with mirroring in the training's own folder, or those without.

    Raises
    ------
    DataError
        If nothing has that name, or a training is not finished.
    """
    name, _, given = text.rpartition("=") if "=" in text and not Path(text).exists() else (text, "", "")
    if given and not Path(given).is_dir():
        raise DataError(f"--runs {text}: {given} is not a folder; name the folder of the predictions of {name}")
    trainings = _trainings(name, place)
    if trainings is None:
        return [Run(text, recorded_facts(Path(text)), Path(text))]
    runs = []
    for folder in trainings:
        facts = read_training(folder, place.checkpoint)
        chosen = [choice for choice in weights if choice == "student" or facts.has_teacher]
        if not chosen:
            raise DataError(f"{folder / place.checkpoint} holds no teacher; type --weights student for {facts.trainer}")
        if given and len(trainings) * len(chosen) > 1:
            raise DataError(f"{text} names one folder for several runs; give each RUN=FOLDER its own, one --weights")
        for choice in chosen:
            predictions = Path(given) if given else _own_predictions(folder, place.checkpoint, choice, mirroring)
            recorded = read_run_file(predictions) if (predictions / RUN_FILE).is_file() else None
            if recorded:
                _check_recorded(recorded, replace(facts, weights=choice), predictions, own=not given)
            known = recorded.mirroring if recorded else None if given else mirroring
            runs.append(Run(text, replace(facts, weights=choice, mirroring=known), predictions, folder))
    return runs


def _own_predictions(folder: Path, checkpoint: str, weights: Weights, mirroring: bool) -> Path:
    return folder / "test" / f"{Path(checkpoint).stem}_{weights}{'' if mirroring else '_nomirror'}"


def _check_recorded(recorded: Facts, facts: Facts, predictions: Path, *, own: bool) -> None:
    if recorded.weights not in (None, facts.weights):  # None: not recorded
        raise DataError(f"{predictions} was predicted by the {recorded.weights}; type --weights {recorded.weights}")
    if recorded.checkpoint_digest != facts.checkpoint_digest:
        mend = "delete it and" if own else f"name other predictions of {facts.trainer}, or none and"
        raise DataError(f"{predictions} was predicted with another state of {facts.checkpoint}; {mend} type --predict")


def _trainings(name: str, place: Place) -> list[Path] | None:
    """Return the fold folders of the trainings of that name; None for a folder of predictions."""
    folder = Path(name)
    if folder.is_dir():
        if all((folder.parent / file).is_file() for file in TRAINING_FILES) and folder.name.startswith("fold_"):
            return [folder]
        if any(folder.glob("fold_*")):
            return [folder / f"fold_{fold}" for fold in place.folds]
        return None
    if os.sep in name:
        raise DataError(f"{name} is not a folder; give a trainer name, a results folder or a folder of predictions")
    results = environment_folder("nnUNet_results") / place.dataset
    ending = f"__{place.plans}__{place.configuration}"
    found = sorted(results.glob(f"{name}{ending}"))
    if not found:
        advice = unknown(name, results, place.plans, place.configuration, str(place.folds[0]))
        raise DataError(f"{results} has no {name}{ending}; {advice}")
    return [path / f"fold_{fold}" for path in found for fold in place.folds]
