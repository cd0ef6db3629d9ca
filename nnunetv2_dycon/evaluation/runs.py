"""Runs to be compared: found by name, described by facts from their own files, refused where they are not alike.

A run is one training with one choice of weights, or a folder of predictions of any origin. What the files do not
say is None, and is shown as "not recorded"; it is never guessed.
"""

import csv
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nnunetv2_dycon.data.roles import read_roles, read_splits
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.folders import environment_folder, raw_folder

Weights = Literal["student", "teacher"]

RUN_FILE = "run.json"  # in a folder of predictions: where they come from
TRAINING_FILES = ("plans.json", "dataset.json")
_FINAL = "checkpoint_final.pth"
_SERIES = {"train_losses": "training loss", "val_losses": "validation loss", "mean_fg_dice": "pseudo Dice"}


@dataclass(frozen=True)
class Facts:
    """What is known of a run; None where its files do not say.

    Attributes
    ----------
    labeled, validation, unlabeled_cases : tuple of str or None
        Names of the cases; `labeled_count` and `unlabeled` may be known where the names are not.
    steps : int or None
        Optimiser steps; each saw `batch` labelled patches.
    mirroring : bool or None
        Whether the test cases were predicted with mirroring.
    seconds_per_step : float or None
        Median over epochs of an epoch's time by its steps; the epoch's validation is part of it.
    plans : str or None
        Digest of the planned configuration: equal where network, patch, spacing and intensities are.
    checkpoint_digest : str or None
        Start of the SHA-256 of the checkpoint file.
    settings : dict or None
        All options of the trainer, those that its name leaves at their defaults included.
    self_training : int or None
        Round of self-training; its steps are those of all rounds so far, its pseudo-labelled cases are `unlabeled`.
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
        """Labelled patches seen."""
        return None if self.steps is None or self.batch is None else self.steps * self.batch


@dataclass(frozen=True)
class Run:
    """One row of facts: as the user named it, what is known, where its predictions are or shall be written.

    `training` is the fold's folder with the checkpoint, None for a folder of predictions; `upper` marks an upper bound,
    which was trained on more labels than the others.
    """

    name: str
    facts: Facts
    predictions: Path
    training: Path | None = None
    upper: bool = False

    @property
    def method(self) -> str:
        """What runs that differ by seed or labelled draw alone have in common."""
        base = self.facts.trainer or self.predictions.name
        base += "" if self.facts.self_training is None else f"_self{self.facts.self_training}"
        base += "_upper-bound" if self.upper else ""
        return re.sub(r"_seed\d+(?=_|\Z)", "", base) + (f" ({self.facts.weights})" if self.facts.weights else "")


class Place(NamedTuple):
    """Where runs named by trainer are: the names in nnU-Net's results folder, and the checkpoint's file name."""

    dataset: str
    configuration: str = "3d_fullres"
    plans: str = "nnUNetPlans"
    folds: tuple[int | str, ...] = (0,)
    checkpoint: str = _FINAL


# ---- finding ---------------------------------------------------------------------------------------------------


def find_runs(text: str, place: Place, weights: Sequence[Weights], mirroring: bool) -> list[Run]:
    """Return the runs that a text names: one for each fold and choice of weights.

    Parameters
    ----------
    text : str
        A trainer name (`*` stands for anything), a results folder, a folder of predictions, or RUN=FOLDER for the
        predictions of RUN in FOLDER.
    place : Place
        Where trainings are.
    weights : sequence of {"student", "teacher"}
        Choices; a run without a teacher gives its student alone if that is among them.
    mirroring : bool
        Which predictions of a training are meant, where it has its own.

    Raises
    ------
    DataError
        If there is nothing of that name, or the training is not finished.
    """
    name, _, given = text.rpartition("=") if "=" in text and Path(text.rpartition("=")[2]).is_dir() else (text, "", "")
    trainings = _trainings(name, place)
    if trainings is None:
        return [Run(text, _recorded(Path(text)), Path(text))]
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
                _check_recorded(recorded, replace(facts, weights=choice), predictions)
            known = recorded.mirroring if recorded else None if given else mirroring
            runs.append(Run(text, replace(facts, weights=choice, mirroring=known), predictions, folder))
    return runs


def _own_predictions(folder: Path, checkpoint: str, weights: Weights, mirroring: bool) -> Path:
    return folder / "test" / f"{Path(checkpoint).stem}_{weights}{'' if mirroring else '_nomirror'}"


def _check_recorded(recorded: Facts, facts: Facts, predictions: Path) -> None:
    if recorded.weights != facts.weights:
        raise DataError(f"{predictions} was predicted by the {recorded.weights}; type --weights {recorded.weights}")
    if recorded.checkpoint_digest != facts.checkpoint_digest:
        raise DataError(
            f"{predictions} was predicted with another state of {facts.checkpoint}; delete it and type --predict"
        )


def _trainings(name: str, place: Place) -> list[Path] | None:
    """Return the folds' folders of the trainings of that name; None for a folder of predictions."""
    folder = Path(name)
    if folder.is_dir():
        if all((folder.parent / file).is_file() for file in TRAINING_FILES) and folder.name.startswith("fold_"):
            return [folder]
        if any(folder.glob("fold_*")):
            return [folder / f"fold_{fold}" for fold in place.folds]
        return None
    if os.sep in name:
        raise DataError(f"{name} is no folder; give a trainer name, a results folder or a folder of predictions")
    results = environment_folder("nnUNet_results") / place.dataset
    ending = f"__{place.plans}__{place.configuration}"
    found = sorted(results.glob(f"{name}{ending}"))
    if not found:
        known = [path.name.removesuffix(ending) for path in results.glob(f"*{ending}")]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"the nearest there is {near[0]}" if near else f"train it: nnUNetv2_train ... -tr {name}"
        raise DataError(f"{results} has no {name}{ending}; {hint}")
    return [path / f"fold_{fold}" for path in found for fold in place.folds]


# ---- facts -----------------------------------------------------------------------------------------------------


def read_training(folder: Path, checkpoint: str = _FINAL) -> Facts:
    """Return the facts of a finished training from the files that nnU-Net and the trainer left.

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
    state = _read_checkpoint(folder, checkpoint, trainer, configuration)
    plans = read_json(folder.parent / "plans.json")
    configuration = configuration or state["init_args"]["configuration"]
    debug = read_json(folder / "debug.json") if (folder / "debug.json").is_file() else {}
    ours = state.get("ssl") or {}
    settings = ours.get("settings") or {}
    epochs, iterations = _length(settings, debug, folder)
    if checkpoint == _FINAL and state["current_epoch"] < epochs:
        raise _unfinished(folder, trainer, configuration, f"epoch {state['current_epoch']} of {epochs}")
    planned = resolved_plans(plans, configuration)
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
        checkpoint_digest=_digest_of(folder / checkpoint),
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


def _of_all_rounds(facts: Facts, iterations: int) -> Facts:
    """Return the facts of a self-training, whose data set lists pseudo-labelled cases as training cases."""
    raw = raw_folder(facts.dataset)
    path = raw / "conversion.json" if raw else None
    entry = read_json(path).get("self_train") if path and path.is_file() else None
    if entry is None:
        return facts
    return replace(
        facts,
        labeled=tuple(sorted(entry["labeled"])),
        labeled_count=len(entry["labeled"]),
        unlabeled=len(entry["pseudo_labeled"]),
        unlabeled_cases=tuple(sorted(entry["pseudo_labeled"])),
        steps=entry["total_epochs"] * iterations,
        self_training=entry["round"],
    )


def _read_checkpoint(folder: Path, name: str, trainer: str | None, configuration: str | None) -> dict[str, Any]:
    path = folder / name
    for needed in (_FINAL, name):  # the best of a training that goes on may still change
        if not (folder / needed).is_file():
            there = sorted(file.name for file in folder.glob("checkpoint_*.pth"))
            raise _unfinished(
                folder, trainer, configuration, f"no {needed}, only {', '.join(there) or 'no checkpoint'}"
            )
    from nnunetv2_dycon.checkpoint import read_checkpoint  # imports torch, which takes seconds

    return read_checkpoint(path, "current_epoch", "init_args", "trainer_name")


def _unfinished(folder: Path, trainer: str | None, configuration: str | None, what: str) -> DataError:
    fold = folder.name.removeprefix("fold_")
    command = f"nnUNetv2_train DATASET {configuration or 'CONFIGURATION'} {fold} -tr {trainer or 'TRAINER'} --c"
    return DataError(f"{folder} is not a finished training ({what}); type: {command}")


def _length(settings: Mapping[str, Any], debug: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    if settings:
        return settings["epochs"], settings["iters"]
    try:
        return int(debug["num_epochs"]), int(debug["num_iterations_per_epoch"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{folder / 'debug.json'} says not how long the training is; restore the file") from error


def _cases(
    folder: Path, dataset: str, recorded: Mapping[str, Sequence[str]] | None
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, int | None, int | None]:
    """Return names of labelled and validation cases, number of labelled and of unlabelled ones.

    Our trainers record them in the checkpoint. Otherwise names come from the split file, which is not the run's own:
    the run's log must agree with it.
    """
    if recorded is not None:
        labeled, validation = (tuple(recorded[part]) for part in ("labeled", "validation"))
        return labeled, validation, len(labeled), len(recorded["unlabeled"])
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
            curves["teacher's pseudo Dice"] = [_mean([float(row[name] or "nan") for name in names]) for row in rows]
    return curves


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if math.isfinite(value)]
    return sum(there) / len(there) if there else math.nan


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it from where it was written") from error


def resolved_plans(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return a planned configuration with all that it inherits.

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
    """Return eight hexadecimal digits that are equal where the plans prepare and build the same."""
    matters = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
    content = [resolved_plans(plans, configuration), {key: plans.get(key) for key in matters}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


# ---- predictions that tell where they come from -----------------------------------------------------------------


def write_run_file(folder: Path, facts: Facts) -> None:
    """Write the facts beside predictions, so that the folder can go to another machine alone."""
    part = folder / f".{RUN_FILE}.{os.getpid()}"
    part.write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
    os.replace(part, folder / RUN_FILE)


def read_run_file(folder: Path) -> Facts:
    """Return the facts that `write_run_file` wrote.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    content = read_json(folder / RUN_FILE)
    if not isinstance(content, dict) or not content.keys() <= {entry.name for entry in fields(Facts)}:
        raise DataError(f"{folder / RUN_FILE} was not written by --predict; delete it")
    for key in ("labeled", "validation", "unlabeled_cases"):
        content[key] = None if content.get(key) is None else tuple(content[key])
    return Facts(**content)


def _recorded(folder: Path) -> Facts:
    if (folder / RUN_FILE).is_file():
        return read_run_file(folder)
    if not (folder / "plans.json").is_file():  # nnU-Net leaves a copy in every folder of predictions
        return Facts()
    return Facts(dataset=read_json(folder / "plans.json").get("dataset_name"))


# ---- refusals --------------------------------------------------------------------------------------------------


def check_alike(runs: Sequence[Run], cases: Collection[str], predicted: Mapping[str, Collection[str]]) -> None:
    """Refuse what cannot be laid side by side.

    Parameters
    ----------
    runs : sequence of Run
        All that are compared.
    cases : collection of str
        The test cases.
    predicted : mapping of str to collection of str
        Cases of each folder of predictions, by its path.

    Raises
    ------
    DataError
        If a run has other test cases, was trained or chose its checkpoint on test cases, if runs differ in
        labelled cases, plans, checkpoint or mirroring, or if runs of one name differ in more than the seed, or in
        nothing. An upper bound must have all labelled cases of the others, and more, and the plans of one of them.
        Facts that are not recorded cannot be checked.
    """
    for run in runs:
        _check_cases(run, set(cases), set(predicted[str(run.predictions)]))
    others = [run for run in runs if not run.upper]
    _check_draws(others)
    _check_settings(runs)
    _check_repeats(runs)
    for run in runs:
        if run.upper:
            _check_upper(run, others)
    by_draw: dict[Any, Run] = {}
    for run in others:
        first = by_draw.setdefault(_draw(run.facts), run)
        if None not in (run.facts.plans, first.facts.plans) and run.facts.plans != first.facts.plans:
            raise DataError(
                f"{run.name} was trained with other plans ({run.facts.plans}) than {first.name} "
                f"({first.facts.plans}); train both with the same -p and -c, planned once"
            )
    for key, mend in (
        ("checkpoint", "compare the final checkpoints of all: -chk checkpoint_final.pth"),
        ("mirroring", "predict all with it, or all with --disable_tta"),
    ):
        known = {getattr(run.facts, key): run for run in runs if getattr(run.facts, key) is not None}
        if len(known) > 1:
            (one, a), (other, b) = list(known.items())[:2]
            raise DataError(f"runs differ in {key}: {one} in {a.name}, {other} in {b.name}; {mend}")


def _check_cases(run: Run, cases: set[str], predicted: set[str]) -> None:
    if predicted != cases:
        missing, extra = sorted(cases - predicted), sorted(predicted - cases)
        what = f"lacks {_some(missing)}" if missing else f"has {_some(extra)}, which has no truth"
        raise DataError(
            f"{run.name} has other test cases: {run.predictions} {what}; predict the same cases with every run"
        )
    trained = cases & set(run.facts.labeled or ())
    if trained:
        raise DataError(f"{run.name} was trained on the test cases {_some(sorted(trained))}; test on others")
    seen = cases & set(run.facts.unlabeled_cases or ())
    if seen:
        raise DataError(
            f"{run.name} was trained on images of the test cases {_some(sorted(seen))}, as unlabelled ones; test on "
            "others"
        )
    chosen = cases & set(run.facts.validation or ())
    if chosen and run.facts.checkpoint != _FINAL:
        raise DataError(
            f"{run.facts.checkpoint} of {run.name} was chosen on the test cases {_some(sorted(chosen))}; "
            f"use -chk {_FINAL}"
        )


def _some(cases: Sequence[str]) -> str:
    return ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")


def _draw(facts: Facts) -> Any:
    return facts.labeled if facts.labeled is not None else facts.labeled_count


def _check_draws(runs: Sequence[Run]) -> None:
    """Every method must have been trained on the same labelled draws, one or several."""
    draws: dict[str, dict[Any, Run]] = {}
    for run in runs:
        if _draw(run.facts) is not None:
            draws.setdefault(run.method, {}).setdefault(_draw(run.facts), run)
    methods = list(draws.items())
    for method, own in methods[1:]:
        first, others = methods[0]
        if own.keys() != others.keys():
            only = next(iter((own.keys() - others.keys()) or (others.keys() - own.keys())))
            run = own.get(only) or others[only]
            raise DataError(
                f"{run.name} (fold {run.facts.fold}) was trained on {_count(run.facts)} labelled cases that "
                f"{first if only in own else method} was not trained on; compare runs of the same labelled cases"
            )


def _check_settings(runs: Sequence[Run]) -> None:
    """Runs of one method must have the same options: a default may have changed from one version to the next."""
    known: dict[tuple[str, str], Run] = {}
    for run in runs:
        for option, value in (run.facts.settings or {}).items():
            first = known.setdefault((run.method, option), run)
            if option != "seed" and value != first.facts.settings[option]:
                raise DataError(
                    f"{run.training or run.predictions} and {first.training or first.predictions} have one trainer "
                    f"name, but {option} is {value} and {first.facts.settings[option]}: its default changed between "
                    "them; train one of them anew"
                )


def _check_repeats(runs: Sequence[Run]) -> None:
    """Runs of one method are its spread: each must be of a seed or labelled draw of its own, all else equal."""
    known: dict[Any, Run] = {}
    images: dict[Any, Run] = {}
    for run in runs:
        facts = run.facts
        # of a folder of predictions nothing may be recorded; then its name has to tell
        own = run.predictions.name if facts.trainer is None else (facts.seed, facts.fold, _draw(facts))
        first = known.setdefault((run.method, own), run)
        if first is not run:
            raise DataError(
                f"{run.training or run.predictions} and {first.training or first.predictions} would be two runs of "
                f"{run.method}, but neither seed nor labelled cases tell them apart; leave one out, or rename a folder "
                "of predictions"
            )
        if facts.unlabeled is not None:
            first = images.setdefault((run.method, _draw(facts)), run)
            if facts.unlabeled != first.facts.unlabeled:
                raise DataError(
                    f"{run.training or run.predictions} and {first.training or first.predictions} would be runs of "
                    f"{run.method}, but with {facts.unlabeled} and {first.facts.unlabeled} unlabelled images; compare "
                    "them in two reports"
                )


def _check_upper(upper: Run, others: Sequence[Run]) -> None:
    for run in others:
        if None not in (upper.facts.labeled, run.facts.labeled) and not (
            set(run.facts.labeled) < set(upper.facts.labeled)
        ):
            raise DataError(
                f"--upper {upper.name} was trained on {_count(upper.facts)} labelled cases, which are not those of "
                f"{run.name} and more; give a training on all labels of the same data"
            )
    plans = {run.facts.plans for run in others}
    if upper.facts.plans is not None and None not in plans and upper.facts.plans not in plans:
        raise DataError(
            f"--upper {upper.name} was trained with other plans ({upper.facts.plans}) than {others[0].name} "
            f"({others[0].facts.plans}); move those to its data set first: nnUNetv2_move_plans_between_datasets"
        )


def _count(facts: Facts) -> int | None:
    return len(facts.labeled) if facts.labeled is not None else facts.labeled_count


def find_baseline(text: str, runs: Sequence[Run]) -> str:
    """Return the method that a text names.

    Raises
    ------
    DataError
        If it names none of the runs, or several methods.
    """
    named = [run.method for run in runs if text in (run.name, run.facts.trainer, run.method)]
    if not named:
        named = [run.method for run in runs if run.method.split(" (")[0] == text]
    trainers = {method.split(" (")[0] for method in named}
    if len(trainers) != 1:
        names = ", ".join(dict.fromkeys(run.method.split(" (")[0] for run in runs))
        many = "names several methods" if trainers else "names none of the runs"
        raise DataError(f"--baseline {text} {many}; give one of {names}")
    return named[0]


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """Return a short name for each method: without nnU-Net's prefix and what all have in common.

    Examples
    --------
    >>> short_names(["nnUNetTrainer_epochs5 (student)", "nnUNetTrainerDyCON_epochs5 (student)"])
    {'nnUNetTrainer_epochs5 (student)': 'nnU-Net', 'nnUNetTrainerDyCON_epochs5 (student)': 'DyCON'}
    """
    parts = {method: re.fullmatch(r"([^_ ]*)(.*?)( \(\w+\))?", method).groups() for method in methods}
    options = {method: set(part[1].split("_")[1:]) for method, part in parts.items()}
    shared = set.intersection(*options.values()) if len(methods) > 1 else set()
    same_weights = len({part[2] for part in parts.values()}) == 1
    names = {}
    for method, (base, text, weights) in parts.items():
        own = [option for option in text.split("_")[1:] if option not in shared]
        head = re.sub(r"^nnUNetTrainer", "", base) or "nnU-Net"
        names[method] = "_".join([head, *own]) + ("" if same_weights else weights or "")
    return names if len(set(names.values())) == len(methods) else {method: method for method in methods}
