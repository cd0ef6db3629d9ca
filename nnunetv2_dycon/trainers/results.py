"""Results folders by the names of their trainings, and the command that sets one aside."""

import difflib
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_dycon.command_lines import Model, train_command
from nnunetv2_dycon.data.splits import STOCK_FOLDS, read_splits
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.files import first_few
from nnunetv2_dycon.folders import VARIABLES, environment_folder, raw_folder
from nnunetv2_dycon.trainers.names import nearest_trainer

FINAL = "checkpoint_final.pth"
CHECKPOINTS = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")  # in the order in which nnU-Net looks for them
GO_ON = "then type the same command with --c"  # ends errors about writing in a training


T = TypeVar("T")


def set_aside(fold: Path) -> str:
    """Return the command that renames a fold's folder, so that nnU-Net's own search for folds passes over it."""
    name, number = f"old_{fold.name}", 1
    while fold.with_name(name).exists():
        number += 1
        name = f"old{number}_{fold.name}"
    return shlex.join(["mv", str(fold), str(fold.with_name(name))])


def checkpoints(fold: Path) -> list[str]:
    """Return the names of a fold's checkpoints, in the order in which nnU-Net looks for them."""
    found = {path.name for path in fold.glob("checkpoint_*.pth")}
    return [*(name for name in CHECKPOINTS if name in found), *sorted(found - set(CHECKPOINTS))]


def model_folder(dataset: int | str, model: Model) -> Path:
    """Return the results folder of a model.

    Parameters
    ----------
    dataset : int or str
        Number or name.
    model : Model
        Its trainer, plans and configuration.

    Raises
    ------
    DataError, ConfigError
        If it was not trained. The message says what was trained on the same data set, or how to train it.
    """
    results = environment_folder("nnUNet_results")
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError):  # none of nnU-Net's three folders has it, or two names have its number
        name = str(dataset)
    folder = results / name / model.folder
    if folder.is_dir() and folder.parent == results / name:  # a path is not a name: it may lead to another data set
        return folder
    known = _models(results / name)
    if known:
        near = _nearest(model.folder, {one.folder: one for one in known})
        shown = first_few([f"-tr {one.trainer} -c {one.configuration} -p {one.plans}" for one in near], separator="; ")
        raise DataError(f"{results / name} has no {model.folder}; trained there, give one of them: {shown}")
    if any(Path(os.environ.get(variable, ""), name).is_dir() for variable in VARIABLES):
        raise DataError(f"nothing was trained on {name}; {_train_it(dataset, name, model, 0)}")
    others = _nearest(name, {path.name: path.name for path in results.glob("Dataset*_*") if _models(path)})
    there = f"trainings of {first_few(others)}" if others else "no trainings at all"
    raise DataError(
        f"there is no data set {dataset}; {results} has {there}; correct -d, or the variable nnUNet_results"
    )


def trained_checkpoint(dataset: int | str, model: Model, fold: int | str, name: str) -> Path:
    """Return a checkpoint of a fold.

    Parameters
    ----------
    dataset : int or str
        Number or name.
    model : Model
        Its trainer, plans and configuration.
    fold : int or 'all'
        The trained fold.
    name : str
        File name of the checkpoint.

    Raises
    ------
    DataError, ConfigError
        If it is not there. The message says what is, or how to train it.
    """
    folder = model_folder(dataset, model) / f"fold_{fold}"
    if (folder / name).is_file():
        return folder / name
    there = checkpoints(folder)
    if FINAL in there or (there and name not in CHECKPOINTS):
        raise DataError(f"{folder} has no {name}; give -chk one that it has: {', '.join(there)}")
    if there:
        command = train_command(dataset, model, fold, "--c")
        raise DataError(f"{folder} has no {name}: its training is not finished; type: {command}")
    others = _folds(folder.parent)
    trained = f"trained are -f {' '.join(others)}; " if others else ""
    raise DataError(f"{folder} holds no training; {trained}{_train_it(dataset, folder.parents[1].name, model, fold)}")


def _train_it(dataset: int | str, name: str, model: Model, fold: int | str) -> str:
    """Return the command that trains a fold; ConfigError for a misspelt trainer."""
    near = nearest_trainer(model.trainer)
    if near is not None:
        raise ConfigError(f"there is no trainer {model.trainer}: type -tr {near}")
    preprocessed = os.environ.get("nnUNet_preprocessed")
    splits = read_splits(Path(preprocessed, name), raw_folder(name)) if preprocessed else []
    last = (len(splits) or STOCK_FOLDS) - 1
    if fold != "all" and fold not in range(last + 1):
        return f"there are the folds 0{f' to {last}' if last else ''} and all"
    return f"to train it, type: {train_command(dataset, model, fold)}"


def _models(dataset: Path) -> list[Model]:
    """Return the models of a data set of which a fold has a checkpoint."""
    names = [path.name.split("__") for path in sorted(dataset.glob("*__*__*")) if _folds(path)]
    return [Model(*parts) for parts in names if len(parts) == 3]


def _folds(model: Path) -> list[str]:
    return sorted(path.name.removeprefix("fold_") for path in model.glob("fold_*") if checkpoints(path))


def _nearest(name: str, known: Mapping[str, T]) -> list[T]:
    """Return all values, those whose names are most like `name` first."""
    by_likeness = sorted(known, key=lambda one: difflib.SequenceMatcher(None, name, one).ratio(), reverse=True)
    return [known[one] for one in by_likeness]
