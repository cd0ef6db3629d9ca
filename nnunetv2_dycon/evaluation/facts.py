"""Facts of a run, read from its files.

A fact that is not in these files is None and is shown as "not recorded"; nothing is guessed.
"""

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from nnunetv2_dycon.data.roles import read_roles
from nnunetv2_dycon.data.splits import read_splits
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.advice import unfinished
from nnunetv2_dycon.files import file_digest, json_digest, read_json, read_json_object, write_json
from nnunetv2_dycon.folders import raw_folder

Weights = Literal["student", "teacher"]
RUN_FILE = "run.json"  # in a folder of predictions: where they come from
TRAINING_FILES = ("plans.json", "dataset.json")
FINAL = "checkpoint_final.pth"
_SERIES = {"train_losses": "training loss", "val_losses": "validation loss", "mean_fg_dice": "pseudo Dice"}


@dataclass(frozen=True)
class Facts:
    """Facts of a run; None if they are not in its files.

    Attributes
    ----------
    labeled, validation, unlabeled_cases : tuple of str or None
        Names of the cases. Their numbers, `labeled_count` and `unlabeled`, may be known without the names.
    steps : int or None
        Optimiser steps, with `batch` labelled patches each.
    mirroring : bool or None
        Whether the test cases were predicted with mirroring.
    seconds_per_step : float or None
        Duration of an epoch, including its validation, divided by its steps; median over epochs.
    plans : str or None
        Digest of the planned configuration: network, patch, spacing and intensities.
    checkpoint_digest : str or None
        Start of the SHA-256 of the checkpoint file.
    settings : dict or None
        All options of the trainer, including those at their defaults.
    self_training : int or None
        Round of self-training. `steps` counts those of all rounds so far, `unlabeled` the pseudo-labelled cases.
    curves : dict
        Series by epoch: training loss, validation loss, pseudo Dice, teacher's pseudo Dice.
    """

    trainer: str | None = None
    dataset: str | None = None
    configuration: str | None = None
    fold: str | None = None
    labeled: tuple[str, ...] | None = None
    labeled_count: int | None = None
    unlabeled: int | None = None
    validation: tuple[str, ...] | None = None
    epochs: int | None = None
    steps: int | None = None
    batch: int | None = None
    checkpoint: str | None = None
    checkpoint_digest: str | None = None
    weights: Weights | None = None
    has_teacher: bool = False
    mirroring: bool | None = None
    seed: int | None = None
    seconds_per_step: float | None = None
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    plans: str | None = None
    settings: dict[str, Any] | None = None
    self_training: int | None = None
    curves: dict[str, list[float]] = field(default_factory=dict)
    unlabeled_cases: tuple[str, ...] | None = None

    @property
    def patches(self) -> int | None:
        """Number of labelled patches seen."""
        return None if self.steps is None or self.batch is None else self.steps * self.batch


def read_training(folder: Path, checkpoint: str = FINAL) -> Facts:
    """Return the facts of a finished training from the files of nnU-Net and the trainer.

    Parameters
    ----------
    folder : Path
        A fold's folder, `.../TRAINER__PLANS__CONFIGURATION/fold_X`.
    checkpoint : str
        File name of the checkpoint.

    Raises
    ------
    DataError
        If the training is not finished, a file is missing or unreadable, or the split has changed since.
    """
    trainer, _, configuration = folder.parent.name.split("__") if folder.parent.name.count("__") == 2 else (None,) * 3
    state = _read_checkpoint(folder, checkpoint)
    configuration = configuration or state["init_args"]["configuration"]
    plans, planned = _plans(folder.parent / "plans.json", configuration)
    debug = read_json_object(folder / "debug.json") if (folder / "debug.json").is_file() else {}
    ours = state.get("ssl") or {}
    settings = ours.get("settings") or {}
    epochs, iterations = _length(settings, debug, folder)
    if checkpoint == FINAL and state["current_epoch"] < epochs:
        done = f"epoch {state['current_epoch']} of {epochs}"
        raise DataError(f"{folder} is not a finished training ({done}); {unfinished(folder)}")
    labeled, validation, count, unlabeled = _cases(folder, plans["dataset_name"], ours.get("cases"))
    unlabeled_cases = tuple(ours["cases"]["unlabeled"]) if "cases" in ours else None
    logged = state.get("logging") or {}
    facts = Facts(
        trainer=trainer or state["trainer_name"],
        dataset=plans["dataset_name"],
        configuration=configuration,
        fold=folder.name.removeprefix("fold_"),
        labeled=labeled,
        labeled_count=count,
        unlabeled=unlabeled,
        validation=validation,
        epochs=state["current_epoch"],
        steps=ours.get("step", state["current_epoch"] * iterations),
        batch=settings.get("batch") or planned["batch_size"],
        checkpoint=checkpoint,
        checkpoint_digest=file_digest(folder / checkpoint)[:16],
        has_teacher="teacher" in ours,
        seed=settings.get("seed"),
        seconds_per_step=_seconds_per_step(logged, iterations),
        hardware=debug.get("gpu_name") or debug.get("device"),
        versions={
            name: version
            for name, version in (
                ("nnunetv2_dycon", ours.get("version")),
                ("nnunetv2", ours.get("nnunetv2_version")),
                ("torch", debug.get("torch_version")),
            )
            if version
        },
        plans=plans_digest(plans, configuration),
        settings=settings or None,
        curves=_curves(logged, folder),
        unlabeled_cases=unlabeled_cases,
    )
    return _of_all_rounds(facts, iterations)


def _plans(path: Path, configuration: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plans of a training and their configuration, which have what is looked up in them."""
    plans = read_json_object(path)
    try:
        planned = resolved_plans(plans, configuration)
        _ = Path(plans["dataset_name"]), planned["batch_size"]  # the name of folders
    except (KeyError, RecursionError, TypeError) as error:
        raise DataError(f"{path} cannot be used ({type(error).__name__}: {error}); restore it") from error
    return plans, planned


def _of_all_rounds(facts: Facts, iterations: int) -> Facts:
    """Return the facts of a self-training, whose data set lists pseudo-labelled cases as training cases."""
    raw = raw_folder(facts.dataset or "")
    path = raw / "conversion.json" if raw else None
    entry = read_json_object(path).get("self_train") if path and path.is_file() else None
    if entry is None:
        return facts
    try:
        return replace(
            facts,
            labeled=tuple(sorted(entry["labeled"])),
            labeled_count=len(entry["labeled"]),
            unlabeled=len(entry["pseudo_labeled"]),
            unlabeled_cases=tuple(sorted(entry["pseudo_labeled"])),
            steps=entry["total_epochs"] * iterations,
            self_training=entry["round"],
        )
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not as self_train wrote it ({reason}); restore it") from error


def _read_checkpoint(folder: Path, name: str) -> dict[str, Any]:
    there = sorted(file.name for file in folder.glob("checkpoint_*.pth"))
    if FINAL not in there:  # another checkpoint of a running training may still change
        what = f"no {FINAL}, only {', '.join(there)}" if there else "it has no checkpoint"
        raise DataError(f"{folder} is not a finished training ({what}); {unfinished(folder)}")
    if name not in there:
        raise DataError(f"{folder} has no {name}, only {', '.join(there)}; correct -chk")
    from nnunetv2_dycon.checkpoint import read_checkpoint  # imports torch, which takes seconds

    return read_checkpoint(folder / name, "current_epoch", "init_args", "trainer_name")


def _length(settings: Mapping[str, Any], debug: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    if settings:
        return settings["epochs"], settings["iters"]
    try:
        return int(debug["num_epochs"]), int(debug["num_iterations_per_epoch"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{folder / 'debug.json'} does not record the training length; restore the file") from error


def _cases(
    folder: Path, dataset: str, recorded: Mapping[str, Sequence[str]] | None
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, int | None, int | None]:
    """Return names of labelled and validation cases, number of labelled and of unlabelled ones.

    Our trainers record them in the checkpoint. Otherwise the names come from the split file of the data set, which
    must agree with the log of the run.
    """
    if recorded is not None:
        names = [tuple(recorded[part]) for part in ("labeled", "validation")]
        return names[0], names[1], len(names[0]), len(recorded["unlabeled"])
    logs = "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("training_log_*.txt")))
    numbers = re.findall(r"split has (\d+) training and (\d+) validation cases", logs)
    logged = tuple(map(int, numbers[0])) if numbers else None
    used = re.findall(r": \w+, (?:(\d+)|no) unlabelled images", logs)
    unlabeled = int(used[0] or 0) if used else 0 if "nnunetv2_dycon" not in logs and logs else None
    labeled, validation = _split(folder.name.removeprefix("fold_"), dataset, folder.parent / "dataset.json")
    if labeled is None:
        return None, None, logged[0] if logged else None, unlabeled
    if logged and logged != (len(labeled), len(validation or ())):
        raise DataError(
            f"{folder} was trained on {logged[0]} and validated on {logged[1]} cases, splits_final.json of {dataset} "
            f"has {len(labeled)} and {len(validation or ())}; restore the split file of the training"
        )
    return labeled, validation, len(labeled), unlabeled


def _split(fold: str, dataset: str, dataset_json: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    raw, place = raw_folder(dataset), os.environ.get("nnUNet_preprocessed")
    if fold == "all":
        cases = read_roles(raw, read_json(dataset_json)).labeled if raw else None
        return cases, cases  # nnU-Net validates on its training cases then
    splits = read_splits(Path(place, dataset), raw) if place else []
    if int(fold) >= len(splits):
        return None, None
    return tuple(sorted(splits[int(fold)]["train"])), tuple(sorted(splits[int(fold)]["val"]))


def _seconds_per_step(logged: Mapping[str, Any], iterations: int) -> float | None:
    starts, ends = logged.get("epoch_start_timestamps", ()), logged.get("epoch_end_timestamps", ())
    times = sorted(float(end) - float(start) for start, end in zip(starts, ends, strict=False))
    return times[len(times) // 2] / iterations if times else None


def _curves(logged: Mapping[str, Any], folder: Path) -> dict[str, list[float]]:
    curves = {title: [float(v) for v in logged[key]] for key, title in _SERIES.items() if logged.get(key)}
    path = folder / "ssl_history.csv"
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in (rows[0] if rows else ()) if name.startswith("dice_teacher_")]
        if names:
            try:
                of_epochs = [[float(row[name] or "nan") for name in names] for row in rows]
            except ValueError as error:
                raise DataError(f"{path} cannot be read ({error}); restore it, or delete it") from error
            curves["teacher's pseudo Dice"] = [_mean(values) for values in of_epochs]
    return curves


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if math.isfinite(value)]
    return sum(there) / len(there) if there else math.nan


def resolved_plans(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return a planned configuration including inherited entries.

    Raises
    ------
    DataError
        If the plans have no such configuration.
    """
    known = plans["configurations"]
    if configuration not in known:
        raise DataError(f"plans.json has no configuration {configuration}, only {', '.join(known)}; correct -c")
    own = dict(known[configuration])
    parent = own.pop("inherits_from", None)
    return {**resolved_plans(plans, parent), **own} if parent else own


def plans_digest(plans: Mapping[str, Any], configuration: str) -> str:
    """Return eight hexadecimal digits that identify the planned preprocessing and network."""
    matters = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
    content = [resolved_plans(plans, configuration), {key: plans.get(key) for key in matters}]
    return json_digest(content)[:8]


def write_run_file(folder: Path, facts: Facts) -> None:
    """Write the facts next to predictions, so that the folder can go to another machine alone."""
    write_json(folder / RUN_FILE, asdict(facts))


def read_run_file(folder: Path) -> Facts:
    """Return the facts that `write_run_file` wrote.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    content = read_json(folder / RUN_FILE)
    names, known = ("labeled", "validation", "unlabeled_cases"), {entry.name for entry in fields(Facts)}
    ours = isinstance(content, dict) and content.keys() <= known
    if not ours or not all(isinstance(content.get(key), list | None) for key in names):
        raise DataError(f"{folder / RUN_FILE} was not written by --predict; delete it")
    for key in names:
        content[key] = None if content.get(key) is None else tuple(content[key])
    return Facts(**content)


def recorded_facts(folder: Path) -> Facts:
    """Return the facts recorded in a folder of predictions."""
    if (folder / RUN_FILE).is_file():
        return read_run_file(folder)
    if not (folder / "plans.json").is_file():  # nnU-Net leaves a copy in every folder of predictions
        return Facts()
    return Facts(dataset=read_json_object(folder / "plans.json").get("dataset_name"))
