"""Plans, dataset.json and fingerprint of a training: one that is missing or cannot be used is one line."""

import os
import shlex
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_dycon.data.dataset_json import FILE, check_dataset_json
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.files import read_json, read_json_object
from nnunetv2_dycon.folders import environment_folder, raw_folder

FINGERPRINT = "dataset_fingerprint.json"
# What a training and its final validation look up, by nnU-Net's names
_OF_PLANS = (
    "plans_name",
    "transpose_forward",
    "transpose_backward",
    "image_reader_writer_class",
    "label_manager_class",
)
_OF_CONFIGURATION = (
    *("data_identifier", "batch_size", "patch_size", "spacing", "batch_dice", "normalization_schemes"),
    *("network_arch_class_name", "network_arch_init_kwargs", "network_arch_init_kwargs_req_import"),
    *("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"),
)


def check_plans(plans: dict[str, Any], configuration: str, dataset_json: Any) -> None:
    """Refuse plans and a dataset.json that nnU-Net cannot train with.

    Parameters
    ----------
    plans : dict
        Content of the plans.
    configuration : str
        The configuration to train.
    dataset_json : any
        Content of dataset.json.

    Raises
    ------
    DataError
        With the file and the entry.
    RuntimeError
        nnU-Net's, for a configuration that the plans do not have.
    """
    name = str(plans.get("dataset_name"))
    path = environment_folder("nnUNet_preprocessed") / name / f"{plans.get('plans_name')}.json"
    check_entries(plans, configuration, path, plan_again(path))
    check_dataset_json(dataset_json, path.with_name(FILE))


def check_entries(plans: dict[str, Any], configuration: str, path: Path, mend: str) -> None:
    """Refuse plans that lack an entry which nnU-Net looks up in a training, or have one that it cannot use.

    Parameters
    ----------
    plans : dict
        Content of the plans.
    configuration : str
        The configuration to train or to predict with.
    path : Path
        Their file, for the message.
    mend : str
        What the user can do; ends the message.

    Raises
    ------
    DataError
        With the file and the entry.
    """
    try:
        manager = PlansManager(plans)
        if configuration in plans["configurations"]:  # nnU-Net itself says which ones there are
            for entry in _OF_CONFIGURATION:
                getattr(manager.get_configuration(configuration), entry)
        for entry in ("dataset_name", *_OF_PLANS):
            getattr(manager, entry)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{path} cannot be used ({reason}); {mend}") from error


def check_fingerprint(preprocessed: Path) -> None:
    """Refuse a folder of a data set without its fingerprint, which nnU-Net copies when the network is there.

    Parameters
    ----------
    preprocessed : Path
        Folder of the data set in nnUNet_preprocessed.

    Raises
    ------
    DataError
        If it is missing or not JSON.
    """
    command = f"nnUNetv2_extract_fingerprint -d {dataset_number(preprocessed.name)} --clean"
    read_json(preprocessed / FINGERPRINT, f"type: {command}")


def unreadable(plans: Path) -> str | None:
    """Return what is wrong with plans, or the dataset.json next to them, that are not a JSON object; None if they are.

    Parameters
    ----------
    plans : Path
        The plans in the data set's folder in nnUNet_preprocessed.
    """
    for path, mend in ((plans, plan_again(plans)), (plans.with_name(FILE), copy_again(plans.parent))):
        try:
            read_json_object(path, mend)
        except UserError as error:
            return str(error)
    return None


def plan_again(plans: Path) -> str:
    """Return how to restore plans: those of nnU-Net's default planner by a command."""
    number = dataset_number(plans.parent.name) if plans.parent.name.startswith("Dataset") else "ID"
    if plans.name == "nnUNetPlans.json":
        return f"type: nnUNetv2_plan_experiment -d {number}"
    return f"restore it, or plan again with the planner that wrote it: nnUNetv2_plan_experiment -d {number} -pl PLANNER"


def copy_again(preprocessed: Path) -> str:
    """Return how to restore dataset.json, which nnU-Net copies from the raw data set when it plans."""
    raw = raw_folder(preprocessed.name)
    if raw is None or not (raw / FILE).is_file():
        return "restore it"
    return f"type: {shlex.join(['cp', os.fspath(raw / FILE), os.fspath(preprocessed / FILE)])}"
