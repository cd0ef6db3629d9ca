"""Self-training with stock nnU-Net: train, predict the unlabelled images, train anew on labels and pseudo-labels.

Training 0 is an ordinary one of the data set. Each further training has a raw data set of its own, made of links: the
labelled cases with their labels, the unlabelled images with what the training before predicted for them. Whether a
step is done is seen on disk alone, so that a killed run goes on, and a step may be done by hand or on a cluster with
the command that is printed. Beside a training's checkpoints are

- `pseudo_labels/`: predictions of all images in imagesUn;
- `pseudo_labels.json`, written last: voxels of every structure in each of them, and the checkpoint they come from.
"""

import hashlib
import importlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunetv2_dycon import __version__, options, parallel
from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.conversion.cases import LinkTask
from nnunetv2_dycon.conversion.convert import Job, carry_out
from nnunetv2_dycon.data.roles import (
    SPLITS_FILE,
    UNLABELED,
    Roles,
    adopt_splits,
    read_roles,
    read_splits,
    training_labels,
)
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.label_files import Labels, read_label_map, read_labels
from nnunetv2_dycon.folders import environment_folder
from nnunetv2_dycon.trainers.names import TRAINERS

try:
    import fcntl
except ImportError:  # Windows has no fcntl; there two runs at the same time are the user's to avoid
    fcntl = None  # type: ignore[assignment]  # a module or nothing

logger = logging.getLogger(__name__)

MADE_BY = "self_train"
STOCK_TRAINER, STOCK_EPOCHS = "nnUNetTrainer", 1000
FINAL = "checkpoint_final.pth"
_CHECKPOINTS = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")
_LENGTHS = "nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs"
_FINGERPRINT = "dataset_fingerprint.json"
# A command of nnU-Net by its name, whatever is in PATH. It inherits the lock, so that nothing else works on its files
# when this process is killed; its loader processes do not, since they may outlive it.
_COMMAND = """
import os, sys
from importlib.metadata import entry_points
held = [int(fd) for fd in sys.argv.pop(1).split()]
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [os.close(held.pop()) for _ in held[:]])
sys.argv.pop(0)
(command,) = {e.value: e for e in entry_points(group="console_scripts", name=sys.argv[0])}.values()
command.load()()
"""

Voxels = dict[str, dict[str, int]]  # of each case and structure


def self_train(
    dataset_id: int | str,
    new_ids: Sequence[int],
    trainer: str = STOCK_TRAINER,
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    plans: str = "nnUNetPlans",
    epochs: Sequence[int] = (STOCK_EPOCHS,),
    repeat: int | str = "half",
    keep_empty: bool = False,
    device: str | None = None,
    processes: int | None = None,
    dry_run: bool = False,
) -> Path:
    """Train, pseudo-label and train anew, one round for each new data set; go on where an earlier run stopped.

    All trainings have the network, patch, spacing and intensity statistics of the given data set, start from random
    weights and end with their final checkpoint. Labels are read of the fold's training and validation cases alone;
    predicted are the images of imagesUn alone.

    Parameters
    ----------
    dataset_id : int or str
        Planned and preprocessed data set with unlabelled images in imagesUn.
    new_ids : sequence of int
        Free ids, one for the data set of each round.
    trainer : str
        nnUNetTrainer, or nnUNetTrainerLabeledOnly with options but for `epochs`.
    configuration, fold, plans
        As in nnU-Net's commands. The data sets of rounds have a single fold, 0, which validates on the same cases.
    epochs : sequence of int
        One number is the total, shared equally among all trainings (the last gets the rest); or one for each.
    repeat : int or "half"
        How often a round's fold lists each labelled case, so how often stock nnU-Net draws it for one draw of a
        pseudo-labelled case. "half" makes about half of all training patches labelled ones; 1 pools all cases.
    keep_empty : bool
        Train on pseudo-labels without any foreground too.
    device : {"cuda", "cpu", "mps"}, optional
        By default CUDA where there is any, else the processor.
    processes : int, optional
        Worker processes; by default as many as processors, 8 at most.
    dry_run : bool
        Say what would be done, with the commands, and write nothing.

    Returns
    -------
    Path
        The fold's folder of the last training.

    Raises
    ------
    ConfigError
        If trainer, epochs, fold, configuration or `repeat` cannot be used.
    DataError, SplitError
        If the data set is not ready, an id is taken, a command of nnU-Net ends with an error, or what an earlier run
        left does not fit.
    """
    experiment = _experiment(dataset_id, configuration, fold, plans, repeat, keep_empty, device, processes)
    trainings = _trainings(experiment, new_ids, trainer, share_epochs(epochs, len(new_ids)))
    lengths = [one.epochs for one in trainings]
    logger.info(
        "self-training on %s, fold %s: %s = %d epochs in all; its like on the labelled cases alone is one training "
        "of %d epochs. Predictions and preprocessing come on top.",
        experiment.name,
        fold,
        " + ".join(map(str, lengths)),
        sum(lengths),
        sum(lengths),
    )
    steps = _steps(trainings)
    if dry_run:
        for step in steps:
            _tell(step, "done" if step.done() else "to do")
        return trainings[-1].results
    with _locked(trainings[0]) as lock:
        for step in steps:
            if step.done():
                _tell(step, "done")
                continue
            _tell(step, "now")
            step.act(lock)
            if not step.done():
                raise DataError(f"{step.title}: the command ended well, but its results are not there; look above")
    logger.info("next: %s", shlex.join([*trainings[-1].predict_words(), "-i", "IMAGES", "-o", "PREDICTIONS"]))
    return trainings[-1].results


# ---- what is decided before the first step -----------------------------------------------------------------------


def share_epochs(epochs: Sequence[int], rounds: int) -> tuple[int, ...]:
    """Return the epochs of every training, the first one's before those of the rounds.

    Examples
    --------
    >>> share_epochs([1000], 2)
    (333, 333, 334)
    """
    number = rounds + 1
    if rounds < 1:
        raise ConfigError("--as: give one free data set id for each round")
    if len(epochs) not in (1, number):
        raise ConfigError(f"--epochs: give the total, or {number} numbers: one for each training")
    each = tuple(epochs)
    if len(epochs) == 1:
        share = epochs[0] // number
        each = (*(share,) * rounds, epochs[0] - share * rounds)
    if min(each) < 1:
        raise ConfigError(f"--epochs {' '.join(map(str, epochs))}: {number} trainings need at least 1 epoch each")
    return each


def trainer_of_length(trainer: str, epochs: int) -> str:
    """Return the name of a supervised trainer with this number of epochs.

    Raises
    ------
    ConfigError
        If the trainer is another one, its name has a length already, or stock has none of this length.
    """
    base = trainer.split("_")[0]
    if trainer == STOCK_TRAINER:
        name = trainer if epochs == STOCK_EPOCHS else f"{trainer}_{epochs}epoch{'s' * (epochs > 1)}"
        if epochs != STOCK_EPOCHS and not hasattr(importlib.import_module(_LENGTHS), name):
            raise ConfigError(
                f"nnU-Net has no trainer of {epochs} epochs; give --epochs one number for each training, as "
                "--epochs 500 250 250, or -tr nnUNetTrainerLabeledOnly, which is the same training of any length"
            )
        return name
    if base not in TRAINERS or TRAINERS[base][0].uses_unlabeled:
        raise ConfigError(f"-tr {trainer}: give nnUNetTrainer, or nnUNetTrainerLabeledOnly with options")
    if re.search(r"_epochs\d", trainer):
        raise ConfigError(f"-tr {trainer}: leave epochs out of the name and give the total as --epochs")
    try:
        options.parse(trainer[len(base) :], TRAINERS[base][1])
    except ConfigError as error:
        raise ConfigError(f"-tr {trainer}: {error}") from None
    return f"{trainer}_epochs{epochs}"


@dataclass(frozen=True)
class _Experiment:
    """What all trainings have in common; `plans` is the content of the data set's plans file."""

    raw: Path
    preprocessed: Path
    content: Mapping[str, Any]
    roles: Roles
    labels: Labels
    plans: Mapping[str, Any]
    plans_name: str
    configuration: str
    fold: int | str
    repeat: int | str
    keep_empty: bool
    device: str | None
    processes: int

    @property
    def name(self) -> str:
        return self.raw.name

    @property
    def ending(self) -> str:
        return self.content["file_ending"]

    @property
    def data_folder(self) -> str:
        return PlansManager(dict(self.plans)).get_configuration(self.configuration).data_identifier

    def fold_cases(self) -> tuple[list[str], list[str]]:
        """Return the fold's training and validation cases, as nnU-Net takes them."""
        if self.fold == "all":
            return list(self.roles.labeled), list(self.roles.labeled)
        splits = read_splits(self.preprocessed)
        _check_splits(splits, self.fold)
        if not splits:
            raise DataError(f"{self.preprocessed / SPLITS_FILE} is gone: restore the split of the first training")
        train, val = (list(dict.fromkeys(splits[int(self.fold)][key])) for key in ("train", "val"))
        unknown = sorted({*train, *val} - set(self.roles.labeled))
        if unknown:
            raise DataError(
                f"{SPLITS_FILE} of {self.name}, fold {self.fold}, names {unknown[0]!r}, which is no labelled case "
                f"of {self.raw}; correct the list"
            )
        return train, val


def _check_splits(splits: Sequence[Mapping[str, Any]], fold: int | str) -> None:
    if any(UNLABELED in entry for entry in splits):
        raise ConfigError(
            f'{SPLITS_FILE} lists "unlabeled" cases of imagesTr; self-training takes the images of imagesUn: make such '
            "a data set with nnUNetv2_dycon split"
        )
    if fold != "all" and not isinstance(fold, int):
        raise ConfigError(f"-f {fold}: give a number or all")
    if splits and fold != "all" and not 0 <= int(fold) < len(splits):
        raise ConfigError(f"-f {fold}: {SPLITS_FILE} has folds 0 to {len(splits) - 1}")


def _experiment(
    dataset_id: int | str,
    configuration: str,
    fold: int | str,
    plans_name: str,
    repeat: int | str,
    keep_empty: bool,
    device: str | None,
    processes: int | None,
) -> _Experiment:
    if repeat != "half" and not (isinstance(repeat, int) and repeat >= 1):
        raise ConfigError(f"--repeat {repeat}: give half, or how often each labelled case is listed (1 and more)")
    try:
        name = str(maybe_convert_to_dataset_name(dataset_id))
    except (RuntimeError, ValueError) as error:
        raise DataError(f"-d {dataset_id}: {str(error).split('. ')[0]}; check the id and nnUNet_raw") from error
    environment_folder("nnUNet_results")
    raw, preprocessed = environment_folder("nnUNet_raw") / name, environment_folder("nnUNet_preprocessed") / name
    content = _json(raw / "dataset.json", "a raw data set of nnU-Net has one")
    roles = read_roles(raw, content)
    if not roles.unlabeled:
        raise DataError(f"{raw / 'imagesUn'} has no image; put the unlabelled images there")
    plan = f"plan it first: nnUNetv2_plan_and_preprocess -d {_number(name)} -c {configuration}"
    plans = _json(preprocessed / f"{plans_name}.json", plan)
    if configuration not in plans["configurations"]:
        raise ConfigError(f"-c {configuration}: the plans have {', '.join(plans['configurations'])}")
    if PlansManager(plans).get_configuration(configuration).previous_stage_name is not None:
        raise ConfigError(f"-c {configuration} is a cascade, which needs predictions of another stage; take another")
    _check_splits(read_splits(preprocessed, raw), fold)
    experiment = _Experiment(
        raw=raw,
        preprocessed=preprocessed,
        content=content,
        roles=roles,
        labels=read_labels(raw / "dataset.json", raw / "labelsTr"),
        plans=plans,
        plans_name=plans_name,
        configuration=configuration,
        fold=fold,
        repeat=repeat,
        keep_empty=keep_empty,
        device=device,
        processes=parallel.default_processes() if processes is None else processes,
    )
    if not (preprocessed / experiment.data_folder).is_dir():
        raise DataError(f"{preprocessed / experiment.data_folder} does not exist; {plan}")
    return experiment


def _trainings(
    experiment: _Experiment, new_ids: Sequence[int], trainer: str, epochs: Sequence[int]
) -> list["_Training"]:
    if len({*new_ids, _number(experiment.name)}) <= len(new_ids):
        raise ConfigError(f"--as {' '.join(map(str, new_ids))}: give each round an id of its own, and none that -d has")
    trainings = [
        _Training(experiment, 0, experiment.raw, experiment.fold, trainer_of_length(trainer, epochs[0]), epochs)
    ]
    for number, new_id in enumerate(new_ids, start=1):
        words = experiment.name.split("_", 1)[1]
        raw = dataset.target_folder(new_id, f"{words}_fold{experiment.fold}_self{number}")
        one = _Training(experiment, number, raw, 0, trainer_of_length(trainer, epochs[number]), epochs)
        for left in (one.preprocessed, one.results.parents[1]):
            if left.exists() and not raw.exists():
                raise DataError(f"{left} is from an earlier data set of this id: delete it, or choose another id")
        trainings.append(one)
    return trainings


def _number(name: str) -> int:
    return int(name[len("Dataset") :][:3])


def _json(path: Path, hint: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON ({error}); mend it") from error


# ---- one training and what follows from it -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Training:
    """One of the trainings: `number` 0 is that on the labelled cases alone; `all_epochs` are those of all."""

    experiment: _Experiment
    number: int
    raw: Path
    fold: int | str
    trainer: str
    all_epochs: Sequence[int]

    @property
    def epochs(self) -> int:
        return self.all_epochs[self.number]

    @property
    def preprocessed(self) -> Path:
        return self.experiment.preprocessed.with_name(self.raw.name)

    @property
    def results(self) -> Path:
        """The fold's folder."""
        model = f"{self.trainer}__{self.experiment.plans_name}__{self.experiment.configuration}"
        return environment_folder("nnUNet_results") / self.raw.name / model / f"fold_{self.fold}"

    @property
    def pseudo_labels(self) -> Path:
        return self.results / "pseudo_labels"

    @property
    def report(self) -> Path:
        return self.results / "pseudo_labels.json"

    # -- train

    def is_trained(self) -> bool:
        return _is_checkpoint(self.results / FINAL) and (self.results / "validation" / "summary.json").is_file()

    def train_words(self) -> list[str]:
        there = [name for name in _CHECKPOINTS if _is_checkpoint(self.results / name)]
        how = [] if not there else ["--val"] if FINAL in there else ["--c"]
        experiment = self.experiment
        words = ["nnUNetv2_train", str(_number(self.raw.name)), experiment.configuration, str(self.fold)]
        return [*words, "-tr", self.trainer, "-p", experiment.plans_name, "-device", _device(experiment.device), *how]

    def train(self, lock: int | None) -> None:
        for path in (self.results / name for name in _CHECKPOINTS):
            if path.is_file() and not _is_checkpoint(path):  # stock writes in place: a kill cuts it short
                logger.warning("%s is cut short and is put aside", path)
                os.replace(path, path.with_name(f"{path.name}.cut"))
        if self.number == 0 and self.fold != "all":
            adopt_splits(self.preprocessed, self.raw)  # stock would pass over one that came after planning
        _call(self.train_words(), lock, training=True)

    # -- predict

    def is_predicted(self) -> bool:
        return self.is_trained() and self.voxels() is not None

    def voxels(self) -> Voxels | None:
        """Return the voxels of each structure in each pseudo-label, None where the prediction is not whole."""
        try:
            noted = json.loads(self.report.read_text())
        except (OSError, ValueError):
            return None
        if noted["checkpoint"] != self.checkpoint_digest():
            raise DataError(
                f"{self.pseudo_labels} was predicted by another state of {self.results / FINAL}; delete "
                f"{self.report} and the folder, and what was made from it"
            )
        voxels = noted["voxels"]
        return voxels if voxels and set(voxels) == set(self.experiment.roles.unlabeled) else None

    def checkpoint_digest(self) -> str:
        with open(self.results / FINAL, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def predict_words(self) -> list[str]:
        experiment = self.experiment
        words = ["nnUNetv2_predict", "-d", str(_number(self.raw.name)), "-c", experiment.configuration]
        words += ["-f", str(self.fold), "-tr", self.trainer, "-p", experiment.plans_name]
        workers = str(max(1, min(3, experiment.processes // 2)))  # nnU-Net's own number is 3
        return [*words, "-device", _device(experiment.device), "-npp", workers, "-nps", workers]

    def label_words(self) -> list[str]:
        images = self.experiment.raw / "imagesUn"
        return [*self.predict_words(), "-i", str(images), "-o", str(self.pseudo_labels), "--continue_prediction"]

    def label(self, lock: int | None) -> None:
        """Predict what is missing or cut short of the pseudo-labels, then look at each of them."""
        cases = self.experiment.roles.unlabeled
        files = [self.pseudo_labels / f"{case}{self.experiment.ending}" for case in cases]
        _write_json(self.report, {"checkpoint": self.checkpoint_digest(), "voxels": None})
        seen = self._look(files)
        for path, counts in seen.items():
            if counts is None:
                path.unlink(missing_ok=True)
        if None in seen.values():
            _call(self.label_words(), lock)
            seen |= self._look([path for path, counts in seen.items() if counts is None])
        bad = [str(path) for path, counts in seen.items() if counts is None]
        if bad:
            raise DataError(f"{bad[0]} was not predicted ({len(bad)} such cases); look above, then type this again")
        voxels = {case: seen[path] for case, path in zip(cases, files, strict=True)}
        _write_json(self.report, {"checkpoint": self.checkpoint_digest(), "voxels": voxels})

    def _look(self, files: Sequence[Path]) -> dict[Path, dict[str, int] | None]:
        tasks = [(path, self.experiment.labels) for path in files]
        with closing(parallel.run(_count, tasks, self.experiment.processes)) as results:
            found = tqdm(results, total=len(tasks), desc="Pseudo-labels", unit="case", disable=None)
            return {path: counts for (path, _), counts in found}

    # -- the data set of a round

    def is_gathered(self, teacher: "_Training") -> bool:
        if not teacher.is_predicted() or not self.raw.exists():
            return False
        if dataset.conversion_of(self.raw).get("fingerprint") != self.job(teacher).fingerprint:
            raise DataError(
                f"{self.raw} was made with other settings or pseudo-labels; give --as other ids, or delete it with "
                f"{self.preprocessed} and {self.results.parents[1]}"
            )
        return True

    def gather(self, teacher: "_Training", lock: int | None) -> None:
        job = self.job(teacher)
        for note in job.notes:
            logger.info("- %s", note)
        carry_out(job, processes=self.experiment.processes)

    def job(self, teacher: "_Training") -> Job:
        """Return the raw data set of a round: who is in it, how often, and where every file comes from."""
        experiment = self.experiment
        train, val = experiment.fold_cases()
        voxels = teacher.voxels() or {}
        empty = [case for case, counts in voxels.items() if not any(counts.values())]
        pseudo = [case for case in voxels if experiment.keep_empty or case not in set(empty)]
        if not pseudo:
            raise DataError(
                f"all {len(empty)} pseudo-labels in {teacher.pseudo_labels} are empty: train longer, or on more cases"
            )
        wanted = round(len(pseudo) / len(train)) if experiment.repeat == "half" else int(experiment.repeat)
        repeat = max(1, wanted)
        role_of = {
            **dict.fromkeys(experiment.roles.test, "test"),
            **dict.fromkeys(val, "validation"),
            **dict.fromkeys([*train, *pseudo], "labeled"),
        }
        true = training_labels(experiment.raw, experiment.content, {*train, *val})
        true |= {case: experiment.raw / "labelsTs" / f"{case}{experiment.ending}" for case in experiment.roles.test}
        labels = true | {case: teacher.pseudo_labels / f"{case}{experiment.ending}" for case in pseudo}
        tasks = [self._task(case, role, labels[case]) for case, role in sorted(role_of.items())]
        share = repeat * len(train) / (repeat * len(train) + len(pseudo))
        facts = {
            "round": self.number,
            "dataset": experiment.name,
            "fold": experiment.fold,
            "epochs": list(self.all_epochs),
            "total_epochs": sum(self.all_epochs),
            "trainer": self.trainer,
            "teacher": {"dataset": teacher.raw.name, "trainer": teacher.trainer, "fold": teacher.fold}
            | {"checkpoint_sha256": teacher.checkpoint_digest()},
            "plans": f"{experiment.plans_name} of {experiment.name}",
            "labeled": train,
            "validation": val,
            "pseudo_labeled": pseudo,
            "empty": {"kept" if experiment.keep_empty else "left_out": empty},
            "repeat": repeat,
            "labeled_share_of_patches": round(share, 4),
        }
        cases = {task.name: {"role": task.role, "files": _described(task)} for task in tasks}
        for case in pseudo:
            cases[case]["label"] = "pseudo"
        return Job(
            target=self.raw,
            tasks=tasks,
            plan={"converter": MADE_BY, "version": __version__, MADE_BY: facts, "cases": cases},
            folds=[{"train": [*(train * repeat), *pseudo], "val": val}],
            describe=partial(self._describe, len(set(role_of) - set(experiment.roles.test))),
            title=f"{experiment.name}, round {self.number} of self-training",
            rows=(),
            notes=tuple(self._notes(facts, voxels)),
        )

    def _task(self, case: str, role: str, label: Path) -> LinkTask:
        files, ending = self.experiment.roles.files[case], self.experiment.ending
        folders = dataset.IMAGES[role], dataset.LABELS[role]
        links = [(path, f"{folders[0]}/{case}_{channel:04d}{ending}") for channel, path in enumerate(files)]
        image = files[0].with_name(files[0].name.removesuffix(ending).removesuffix("_0000") + ending)
        optional = [
            # nnU-Net's TIFF reader takes the spacing from a file beside the image
            (path.with_name(path.name.removesuffix(ending) + ".json"), f"{folder}/{case}.json")
            for path, folder in zip((image, label), folders, strict=True)
        ]
        (optional if role == "test" else links).append((label, f"{folders[1]}/{case}{ending}"))
        links += [(path, name) for path, name in optional if path.is_file()]
        return LinkTask(case, role, ending, dataset.workspace(self.raw).work, tuple(links))

    def _describe(self, number: int, folder: Path) -> None:
        content = {key: value for key, value in self.experiment.content.items() if key != "dataset"}
        content |= {"name": self.raw.name.split("_", 1)[1], "numTraining": number}
        dataset.write_json(folder / "dataset.json", content | {"converted_by": f"nnunetv2_dycon {__version__}"})

    def _notes(self, facts: Mapping[str, Any], voxels: Voxels) -> Iterator[str]:
        yield (
            f"round {self.number}: {len(facts['labeled'])} labelled cases, each listed {facts['repeat']} times, and "
            f"{len(facts['pseudo_labeled'])} pseudo-labelled; {facts['labeled_share_of_patches']:.0%} of training "
            f"patches are from labelled cases; {len(facts['validation'])} validation cases"
        )
        for what, cases in facts["empty"].items():
            if cases:
                names = ", ".join(cases[:8]) + (" ..." if len(cases) > 8 else "")
                yield f"{len(cases)} pseudo-labels are empty and {what.replace('_', ' ')}: {names}"
        for structure in self.experiment.labels.structures:
            lacking = sum(not counts[structure.label] for counts in voxels.values())
            if lacking:
                yield f"{structure.name} is absent from {lacking} of {len(voxels)} pseudo-labels"
        others = set(self.experiment.roles.labeled) - {*facts["labeled"], *facts["validation"]}
        if others:
            yield f"{len(others)} cases of imagesTr are in neither list of the fold and are left out"

    # -- plans and preprocessing

    def is_planned(self) -> bool:
        """Whether all that nnU-Net's planner would leave is there, with the plans of the first data set."""
        if not all((self.preprocessed / path.name).is_file() for path in self._copied()):
            return False
        try:
            plans = json.loads((self.preprocessed / f"{self.experiment.plans_name}.json").read_text())
        except (OSError, ValueError):  # not there, or cut short by a kill
            return False
        if _without_names(plans) != _without_names(self.experiment.plans):
            raise DataError(
                f"plans of {self.preprocessed} are no longer those of {self.experiment.preprocessed}: the data set was "
                "planned again; delete the first and its results, or restore the plans"
            )
        return all(path.read_bytes() == (self.preprocessed / path.name).read_bytes() for path in self._copied())

    def _copied(self) -> list[Path]:
        raw = self.raw / "dataset.json", self.raw / SPLITS_FILE
        fingerprint = self.experiment.preprocessed / _FINGERPRINT
        return [*raw, *([fingerprint] if fingerprint.is_file() else [])]

    def copy_words(self) -> list[str]:
        return ["cp", *map(str, self._copied()), f"{self.preprocessed}/"]

    def plan_words(self) -> list[str]:
        numbers = str(_number(self.experiment.name)), str(_number(self.raw.name))
        name = self.experiment.plans_name
        return ["nnUNetv2_move_plans_between_datasets", "-s", numbers[0], "-t", numbers[1], "-sp", name]

    def plan(self, lock: int | None) -> None:
        self.preprocessed.mkdir(exist_ok=True)
        for path in self._copied():
            shutil.copyfile(path, self.preprocessed / path.name)
        _call(self.plan_words(), lock)

    def is_preprocessed(self) -> bool:
        if not self.raw.is_dir():
            return False
        ending = self.experiment.ending
        cases = [path.name.removesuffix(ending) for path in (self.raw / "labelsTr").glob(f"*{ending}")]
        folder = self.preprocessed / self.experiment.data_folder
        made = all(_size(folder / f"{case}.pkl") for case in cases)  # which nnU-Net writes last for a case
        return made and all((self.preprocessed / "gt_segmentations" / f"{case}{ending}").is_file() for case in cases)

    def preprocess_words(self) -> list[str]:
        experiment = self.experiment
        words = ["nnUNetv2_preprocess", "-d", str(_number(self.raw.name)), "-plans_name", experiment.plans_name]
        return [*words, "-c", experiment.configuration, "-np", str(experiment.processes)]

    def preprocess(self, lock: int | None) -> None:
        _call(self.preprocess_words(), lock)


def _without_names(plans: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plans.items() if key not in ("dataset_name", "plans_name")}


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)  # torch's format ends with its table of contents


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _count(task: tuple[Path, Labels]) -> dict[str, int] | None:
    """Return the voxels of each structure; None where the file is not there or not whole."""
    path, labels = task
    if not path.is_file():
        return None
    try:
        values = read_label_map(path, labels, truth=False).labels
    except DataError:
        return None
    counts = dict(enumerate(np.bincount(values.ravel()).tolist()))
    return {one.label: sum(counts.get(value, 0) for value in one.values) for one in labels.structures}


def _described(task: LinkTask) -> list[dict[str, Any]]:
    return [{"name": "/".join(path.parts[-2:]), "bytes": path.stat().st_size} for path in task.sources]


def _write_json(path: Path, content: object) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


# ---- steps -------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """One step: whether it is done, the command that a user would type, and doing it."""

    title: str
    done: Callable[[], bool]
    command: Callable[[], str]
    act: Callable[[int | None], None]


def _steps(trainings: Sequence[_Training]) -> list[_Step]:
    first = trainings[0]
    steps = [_Step("train on the labelled cases", first.is_trained, _shown(first.train_words), first.train)]
    for teacher, one in pairwise(trainings):
        of = f"round {one.number}: "
        steps += [
            _Step(of + "pseudo-labels", teacher.is_predicted, _shown(teacher.label_words), teacher.label),
            _Step(
                of + f"data set {one.raw.name}",
                partial(one.is_gathered, teacher),
                lambda: "(links to images, labels and pseudo-labels: by this command)",
                partial(one.gather, teacher),
            ),
            _Step(of + f"plans of {first.raw.name}", one.is_planned, _shown(one.copy_words, one.plan_words), one.plan),
            _Step(of + "preprocessing", one.is_preprocessed, _shown(one.preprocess_words), one.preprocess),
            _Step(of + "train", one.is_trained, _shown(one.train_words), one.train),
        ]
    return steps


def _shown(*commands: Callable[[], list[str]]) -> Callable[[], str]:
    return lambda: " && ".join(shlex.join(words()) for words in commands)


def _tell(step: _Step, state: str) -> None:
    logger.info("%s: %s%s", state, step.title, "" if state == "done" else f"\n  {step.command()}")


def _device(wanted: str | None) -> str:
    if wanted is not None:
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _call(words: Sequence[str], lock: int | None, *, training: bool = False) -> None:
    environment = dict(os.environ)
    if not training and environment.get("nnUNet_n_proc_DA") == "0":
        del environment["nnUNet_n_proc_DA"]  # meant for training; elsewhere nnU-Net takes it for a number of threads
    keep = () if lock is None else (lock,)
    command = [sys.executable, "-c", _COMMAND, " ".join(map(str, keep)), *words]
    done = subprocess.run(command, env=environment, pass_fds=keep, check=False)
    if done.returncode:
        raise DataError(
            f"{words[0]} ended with code {done.returncode}; its output is above. When it is mended, type this command "
            f"again, or by hand: {shlex.join(words)}"
        )


@contextmanager
def _locked(first: _Training) -> Iterator[int | None]:
    """Keep two runs from working on the same first training; gives the handle that commands inherit."""
    try:
        first.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {first.results} ({error.strerror}); set nnUNet_results") from error
    if fcntl is None:
        yield None
        return
    handle = os.open(first.results, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another run, or a command that it started, is at work on {first.results}: wait for it, or end it"
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        yield handle
    finally:
        os.close(handle)
