"""Trainer classes by name: `nnUNetTrainerDyCON_epochs100_beta0p5` is made when it is asked for.

nnU-Net takes no options for a trainer, names the results folder after the class and finds a trainer of a
checkpoint by that name again; so the name carries the options. A class is made once, and this module returns
it as an attribute, which is what pickling by name needs.
"""

import difflib
from functools import cache
from typing import NamedTuple

from nnunetv2_dycon import options
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dhc import DHC, DHCSettings
from nnunetv2_dycon.methods.dycon import PAPER, DyCON, DyCONSettings
from nnunetv2_dycon.methods.dycon_bcp import DyCONBCP, DyCONBCPSettings
from nnunetv2_dycon.methods.dycon_cps import DyCONCPS, DyCONCPSSettings
from nnunetv2_dycon.methods.dycon_magicnet import DyCONMagicNet, DyCONMagicNetSettings
from nnunetv2_dycon.methods.labeled_only import LabeledOnly
from nnunetv2_dycon.methods.magicnet import MagicNet, MagicNetSettings
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_dycon.methods.pseudo_label import PseudoLabel, PseudoLabelSettings
from nnunetv2_dycon.methods.settings import TeacherSettings
from nnunetv2_dycon.methods.uamt import UAMT, UAMTSettings
from nnunetv2_dycon.step import Method

_START = "nnUNetTrainer"

# Base name (without underscore: options begin at the first), method, settings that options depart from.
TRAINERS: dict[str, tuple[type[Method], options.Settings]] = {
    "nnUNetTrainerLabeledOnly": (LabeledOnly, TeacherSettings()),
    "nnUNetTrainerMeanTeacher": (MeanTeacher, MeanTeacherSettings()),
    "nnUNetTrainerUAMT": (UAMT, UAMTSettings()),
    "nnUNetTrainerPseudoLabel": (PseudoLabel, PseudoLabelSettings()),
    "nnUNetTrainerBCP": (BCP, BCPSettings()),
    "nnUNetTrainerCPS": (CPS, CPSSettings()),
    "nnUNetTrainerDHC": (DHC, DHCSettings()),
    "nnUNetTrainerMagicNet": (MagicNet, MagicNetSettings()),
    "nnUNetTrainerGAMagicNet": (MagicNet, MagicNetSettings(ga=True)),
    "nnUNetTrainerDyCON": (DyCON, DyCONSettings()),
    "nnUNetTrainerDyCONPaper": (DyCON, PAPER),
    "nnUNetTrainerDyCONCPS": (DyCONCPS, DyCONCPSSettings()),
    "nnUNetTrainerDyCONBCP": (DyCONBCP, DyCONBCPSettings()),
    "nnUNetTrainerDyCONMagicNet": (DyCONMagicNet, DyCONMagicNetSettings()),
    "nnUNetTrainerDyCONGAMagicNet": (DyCONMagicNet, DyCONMagicNetSettings(ga=True)),
}


class TrainerInfo(NamedTuple):
    """One entry of the list of trainers: name, summary, options with defaults and ranges.

    `preset_of` is the trainer of the same method from which only defaults differ.
    """

    name: str
    summary: str
    options: list[options.Row]
    preset_of: str | None


@cache
def trainer_class(name: str) -> type:
    """Return the trainer class of a name, always the same object for the same name.

    Parameters
    ----------
    name : str
        A key of `TRAINERS`, alone or followed by `_` and options.

    Raises
    ------
    AttributeError
        If the name is not one of ours.
    ConfigError
        If it is ours but its options cannot be read, or but for capital letters.
    """
    method, settings = read_name(name)
    # Late, since it takes seconds: the engine imports nnU-Net, which is not needed to list the names.
    from nnunetv2_dycon.trainers.engine import nnUNetTrainerSSL

    members = {"method_type": method, "settings": settings, "__module__": __name__, "__doc__": method.__doc__}
    return type(name, (nnUNetTrainerSSL,), members)


def read_name(name: str) -> tuple[type[Method], options.Settings]:
    """Return method and settings of a trainer name; raises as `trainer_class`."""
    base_name = name.split("_", 1)[0]
    if base_name not in TRAINERS:
        for known in TRAINERS:
            if known.lower() == base_name.lower():
                raise ConfigError(f"there is no trainer {base_name}: type {known}{name[len(base_name) :]}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    method, base = TRAINERS[base_name]
    try:
        return method, options.parse(name[len(base_name) :], base)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def nearest_trainer(name: str) -> str | None:
    """Return what a trainer name that nobody knows was probably meant to be; None if that cannot be told.

    Parameters
    ----------
    name : str
        A trainer name. One of ours, and one that is not like any of ours, gives None.

    Raises
    ------
    ConfigError
        If it is one of ours with options that cannot be read.

    Examples
    --------
    >>> nearest_trainer("nnUNetTrainerDyCom_epochs5")
    'nnUNetTrainerDyCON_epochs5'
    """
    base_name = name.split("_", 1)[0]
    if base_name in TRAINERS:
        read_name(name)
        return None
    known = {known.lower().removeprefix(_START.lower()): known for known in TRAINERS}
    near = difflib.get_close_matches(base_name.lower().removeprefix(_START.lower()), known, n=1)
    return known[near[0]] + name[len(base_name) :] if near else None


def list_trainers() -> list[TrainerInfo]:
    """Return every trainer name with its summary and its options, in the canonical order of a name."""
    first: dict[type[Method], str] = {}  # of each method
    found = []
    for name, (method, base) in TRAINERS.items():
        summary = (method.__doc__ or "").strip().split("\n")[0]
        found.append(TrainerInfo(name, summary, options.describe(base), first.get(method)))
        first.setdefault(method, name)
    return found


def __getattr__(name: str) -> type:
    """Return the trainer class of that name as an attribute of this module, for pickle."""
    return trainer_class(name)
