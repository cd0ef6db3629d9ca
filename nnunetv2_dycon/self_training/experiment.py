"""The experiment that all trainings share: first data set, plans, split and settings; checked before any work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_dycon import parallel
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.data.file_names import hidden_cases
from nnunetv2_dycon.data.roles import Roles, read_roles
from nnunetv2_dycon.data.splits import (
    SPLITS_FILE,
    UNLABELED,
    check_fold,
    check_planned_fold,
    check_splits,
    read_splits,
)
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.label_files import Labels, read_labels
from nnunetv2_dycon.files import read_json
from nnunetv2_dycon.folders import environment_folder


@dataclass(frozen=True)
class DataSet:
    """The three folders of one of nnU-Net's data sets, there or not."""

    results: Path
    raw: Path
    preprocessed: Path

    @classmethod
    def named(cls, name: str) -> "DataSet":
        """Return the folders of this name; raises DataError if one of nnU-Net's variables cannot be used."""
        variables = ("nnUNet_results", "nnUNet_raw", "nnUNet_preprocessed")
        return cls(*(environment_folder(variable) / name for variable in variables))

    @property
    def name(self) -> str:
        """DatasetXXX_Name."""
        return self.raw.name

    @property
    def id(self) -> int:
        """Number in the name."""
        return dataset_number(self.name)


@dataclass(frozen=True)
class Experiment:
    """Data, plans and settings that all trainings share.

    Attributes
    ----------
    data : DataSet
        Data set of the first training.
    content, plans : mapping
        Its dataset.json and its plans file.
    data_identifier : str
        Name of the folder of the configuration's preprocessed cases.
    roles, labels
        Its cases, and its labels as the evaluation reads them.
    plans_name, configuration, fold, repeat, keep_empty, device, processes
        See `self_train`; none is missing.
    """

    data: DataSet
    content: Mapping[str, Any]
    roles: Roles
    labels: Labels
    plans: Mapping[str, Any]
    plans_name: str
    configuration: str
    data_identifier: str
    fold: int | str
    repeat: int | str
    keep_empty: bool
    device: str
    processes: int

    @property
    def ending(self) -> str:
        """File ending of images and labels."""
        return self.content["file_ending"]

    def fold_cases(self, splits: Sequence[Mapping[str, Any]] | None = None) -> tuple[list[str], list[str]]:
        """Return the fold's training and validation cases, as nnU-Net uses them.

        Parameters
        ----------
        splits : sequence of mapping, optional
            The folds; those that the trainings read by default.

        Raises
        ------
        DataError
            If the split is gone.
        SplitError
            If it is wrong, or names a case that is not labelled.
        ConfigError
            If it lists "unlabeled" cases, or has no such fold.
        """
        if self.fold == "all":
            return list(self.roles.labeled), list(self.roles.labeled)
        path = self.data.preprocessed / SPLITS_FILE
        splits = read_splits(path.parent) if splits is None else splits
        if not splits:
            raise DataError(f"{path} is gone: restore the split of the first training")
        _check_splits(splits, self.fold)
        check_splits(splits, path, self.roles.labeled, self.data.raw / "imagesTr")
        fold = splits[int(self.fold)]
        return list(dict.fromkeys(fold["train"])), list(fold["val"])


def read_experiment(
    dataset_id: int | str,
    configuration: str,
    fold: int | str,
    plans_name: str,
    repeat: int | str,
    keep_empty: bool,
    device: str | None,
    processes: int | None,
) -> Experiment:
    """Return the experiment of `self_train`'s arguments.

    Parameters
    ----------
    dataset_id, configuration, fold, plans_name, repeat, keep_empty, device, processes
        As the parameters of `self_train`; `plans_name` is its `plans`.

    Raises
    ------
    ConfigError
        If `repeat`, `processes`, the configuration or the fold cannot be used.
    DataError, SplitError
        If the data set is not there, not planned or not preprocessed, or has no unlabelled images.
    """
    if repeat != "half" and not (isinstance(repeat, int) and repeat >= 1):
        raise ConfigError(f"--repeat {repeat}: give half, or how often each labelled case is listed (1 and more)")
    raw, content = find_raw(dataset_id)
    data = DataSet.named(raw.name)
    roles = read_roles(data.raw, content)
    hidden = hidden_cases(data.raw, content)  # which nnU-Net's prediction would stop at
    if hidden:
        raise DataError(hidden[0])
    if not roles.unlabeled:
        raise DataError(f"{data.raw / 'imagesUn'} has no image; put the unlabelled images there")
    plan = f"plan it first: nnUNetv2_plan_and_preprocess -d {data.id} -c {configuration}"
    plans = read_json(data.preprocessed / f"{plans_name}.json", plan)
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
        raise DataError(f"{data.preprocessed / f'{plans_name}.json'} has no configurations; {plan}")
    if configuration not in plans["configurations"]:
        raise ConfigError(f"-c {configuration}: the plans have {', '.join(plans['configurations'])}")
    manager = PlansManager(plans)
    try:
        _ = manager.image_reader_writer_class
    except RuntimeError as error:
        raise DataError(
            f"plans {plans_name} have the reader {plans['image_reader_writer']}, which nnU-Net lacks; {plan}"
        ) from error
    planned = manager.get_configuration(configuration)
    if planned.previous_stage_name is not None:
        raise ConfigError(f"-c {configuration} is a cascade, which needs predictions of another stage; take another")
    splits = read_splits(data.preprocessed, data.raw)
    _check_splits(splits, fold)
    if not splits:  # the first training makes them
        check_planned_fold(len(roles.labeled), fold)
    labels = read_labels(data.raw / "dataset.json", data.raw / "labelsTr")
    if not (data.preprocessed / planned.data_identifier).is_dir():
        raise DataError(f"{data.preprocessed / planned.data_identifier} does not exist; {plan}")
    return Experiment(
        data=data,
        content=content,
        roles=roles,
        labels=labels,
        plans=plans,
        plans_name=plans_name,
        configuration=configuration,
        data_identifier=planned.data_identifier,
        fold=fold,
        repeat=repeat,
        keep_empty=keep_empty,
        device=_usable_device(device),
        processes=parallel.worker_processes(processes),
    )


def _usable_device(device: str | None) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return "cuda" if there["cuda"] else "cpu"
    if not there.get(device):
        usable = " or ".join(name for name, is_there in there.items() if is_there)
        raise ConfigError(f"-device {device}: torch has no such device here; type -device {usable}")
    return device


def _check_splits(splits: Sequence[Mapping[str, Any]], fold: int | str) -> None:
    if any(UNLABELED in entry for entry in splits):
        raise ConfigError(
            f'{SPLITS_FILE} lists "unlabeled" cases of imagesTr; self-training takes the images of imagesUn: make such '
            "a data set with nnUNetv2_dycon split"
        )
    if fold != "all" and not isinstance(fold, int):
        raise ConfigError(f"-f {fold}: give a number or all")
    check_fold(splits, fold)
