"""What to type where a run cannot be compared: commands as a user of this machine can copy them."""

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnunetv2_dycon import command_lines
from nnunetv2_dycon.files import first_few

_PREFIX = "nnUNetTrainer"
_CLOSE = 0.8  # BCP and CPS, DyCON and DyCONCPS are different methods and not misspelt


def train_command(dataset: str, configuration: str, fold: str, trainer: str, plans: str, *flags: str) -> str:
    """Return the command that trains a fold on this machine; all arguments as in nnU-Net's results folder."""
    return command_lines.train_command(short(dataset), command_lines.Model(trainer, plans, configuration), fold, *flags)


def short(dataset: str) -> str:
    """Return the id of a data set as it is typed, without leading zeros.

    Examples
    --------
    >>> short("Dataset004_Hippocampus")
    '4'
    """
    fit = re.fullmatch(r"Dataset0*(\d+)_.*", dataset)
    return fit[1] if fit else dataset


def unfinished(folder: Path) -> str:
    """Return what to type where the training in a fold's folder is not finished.

    Parameters
    ----------
    folder : Path
        `.../DATASET/TRAINER__PLANS__CONFIGURATION/fold_X`.
    """
    begun = any(folder.glob("checkpoint_*.pth"))
    done = sorted(path.parent.name for path in folder.parent.glob("fold_*/checkpoint_final.pth"))
    if done and not begun:
        numbers = [name.removeprefix("fold_") for name in done]
        return f"there is {first_few(done)}: type -f {shlex.join(numbers)}"
    results = os.environ.get("nnUNet_results")
    parts = folder.parent.name.split("__")
    ours = results and folder.absolute().parents[2] == Path(results).absolute() if len(parts) == 3 else False
    if not ours:
        return "finish it where it was trained"
    trainer, plans, configuration = parts
    dataset, fold = folder.parent.parent.name, folder.name.removeprefix("fold_")
    return f"type: {train_command(dataset, configuration, fold, trainer, plans, *(['--c'] if begun else []))}"


def unknown(name: str, results: Path, plans: str, configuration: str, fold: str) -> str:
    """Return what to type where no training of a data set has a name.

    Parameters
    ----------
    name : str
        What the user typed.
    results : Path
        The data set's folder in nnUNet_results.
    plans, configuration, fold : str
        What the user looked for.
    """
    trained = [path.name.split("__") for path in sorted(results.glob("*__*__*")) if path.is_dir()]
    known = [trainer for trainer, *rest in trained if rest == [plans, configuration]]
    parts = name.split("__")
    if len(parts) == 3 and parts in trained:
        return f"give the name of the trainer: --runs {parts[0]}" + _place(parts[1], parts[2], plans, configuration)
    elsewhere = next((parts for parts in trained if parts[0] == name), None)
    if elsewhere:
        return f"there is {'__'.join(elsewhere)}: type{_place(elsewhere[1], elsewhere[2], plans, configuration)}"
    near = nearest(name, known)
    if near:
        return f"the nearest there is {near}"
    there = f"there is {first_few(known)}" if known else f"nothing is trained there with -p {plans} -c {configuration}"
    if set(name) & set("*?[") or not name.startswith(_PREFIX):
        return f"{there}; give one of its trainers, or a folder" if known else there
    return f"{there}; train it: {train_command(results.name, configuration, fold, name, plans)}"


def _place(plans: str, configuration: str, other_plans: str, other_configuration: str) -> str:
    text = "" if plans == other_plans else f" -p {shlex.quote(plans)}"
    return text + ("" if configuration == other_configuration else f" -c {shlex.quote(configuration)}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the name that was probably meant: the same method with other options, or a misspelt one; None otherwise.

    Parameters
    ----------
    name : str
        What the user typed.
    known : iterable of str
        Names that exist.

    Examples
    --------
    >>> nearest("nnUNetTrainerDyCON_epoch4", ["nnUNetTrainerCPS_epochs4", "nnUNetTrainerDyCON_epochs4"])
    'nnUNetTrainerDyCON_epochs4'
    >>> nearest("nnUNetTrainerCPS", ["nnUNetTrainerBCP"])
    """
    by_method: dict[str, list[str]] = {}
    for other in known:
        by_method.setdefault(_method(other), []).append(other)
    methods = difflib.get_close_matches(_method(name), by_method, n=1, cutoff=_CLOSE)
    found: Sequence[str] = difflib.get_close_matches(name, by_method[methods[0]], n=1, cutoff=0.0) if methods else ()
    return found[0] if found else None


def _method(name: str) -> str:
    return name.removeprefix(_PREFIX).split("_")[0].lower()
