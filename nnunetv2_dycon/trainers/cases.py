"""Which cases a training uses, checked before its first step: roles, folds, and the unlabelled images."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_dycon.data.checked_cases import CaseReader, folder_reader
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.data.ready import UnlabeledCases, ready_cases
from nnunetv2_dycon.data.roles import read_roles
from nnunetv2_dycon.data.splits import (
    SPLITS_FILE,
    STOCK_FOLDS,
    UNLABELED,
    adopt_splits,
    check_fold,
    check_planned_fold,
    check_splits,
    check_training_cases,
    read_splits,
    write_small_splits,
)
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few, is_hidden
from nnunetv2_dycon.folders import raw_folder

if TYPE_CHECKING:
    from nnunetv2_dycon.trainers.engine import nnUNetTrainerSSL


def find_unlabeled(trainer: "nnUNetTrainerSSL", processes: int) -> UnlabeledCases | None:
    """Check the roles of all cases, and return the unlabelled ones of the fold, prepared where that was needed.

    Returns None for a method that uses none. Raises as `ready_cases`.
    """
    preprocessed = Path(trainer.preprocessed_dataset_folder_base)
    raw = raw_folder(trainer.plans_manager.dataset_name)
    if raw is not None:
        read_roles(raw, trainer.dataset_json)
    if raw is not None and adopt_splits(
        preprocessed, raw
    ):  # stock copies it when it plans, and passes over one that came later
        trainer.print_to_log_file(f"Copied {raw / SPLITS_FILE} to {preprocessed}")
    _check_fold(trainer)  # preparing the images may take hours
    if not trainer.method_type.uses_unlabeled:
        return None
    return ready_cases(
        trainer.plans_manager.plans,
        trainer.configuration_name,
        trainer.fold,
        preprocessed,
        prepare=not trainer.is_ddp,
        processes=processes,
        log=trainer.print_to_log_file,
    )


def labeled_reader(trainer: "nnUNetTrainerSSL") -> CaseReader:
    """Return what reads the prepared labelled cases, by nnU-Net's class for the format of their folder.

    Raises
    ------
    DataError
        If the folder is missing or empty, or holds other files than cases of one format.
    """
    plans, configuration = trainer.plans_manager, trainer.configuration_name
    option = "" if plans.plans_name == "nnUNetPlans" else f" -plans_name {plans.plans_name}"
    number = dataset_number(plans.dataset_name)
    command = f"nnUNetv2_preprocess -d {number} -c {configuration}{option}"
    return folder_reader(Path(trainer.preprocessed_dataset_folder), command)


def write_missing_splits(trainer: "nnUNetTrainerSSL") -> None:
    """Write folds for fewer cases than stock's five folds need.

    Raises SplitError or ConfigError for a wrong split file, and for a fold that it does not have or allow.
    """
    cases = _check_fold(trainer)
    preprocessed = Path(trainer.preprocessed_dataset_folder_base)
    if trainer.fold == "all" or (preprocessed / SPLITS_FILE).exists() or len(cases) >= STOCK_FOLDS:
        return
    write_small_splits(preprocessed, cases)
    trainer.print_to_log_file(
        f"{len(cases)} labelled cases are too few for {STOCK_FOLDS} folds: wrote "
        f"{preprocessed / SPLITS_FILE}, each fold validates on one case. Fold 'all' trains on all of them."
    )


def _check_fold(trainer: "nnUNetTrainerSSL") -> Sequence[str]:
    """Refuse a wrong split file, and a fold that it does not have or allow; returns all preprocessed cases."""
    preprocessed, folder = Path(trainer.preprocessed_dataset_folder_base), trainer.preprocessed_dataset_folder
    cases: Sequence[str] = labeled_reader(trainer).get_identifiers(folder)
    hidden = sorted(case for case in cases if is_hidden(case))
    if hidden:
        raise DataError(
            f"{folder} holds {first_few(hidden)}, hidden files that nnU-Net takes for cases; delete them: "
            f"find {shlex.quote(str(folder))} -name '.*' -type f -delete"
        )
    splits = read_splits(preprocessed, raw_folder(trainer.plans_manager.dataset_name))
    if splits and (preprocessed / SPLITS_FILE).is_file():
        # the "unlabeled" ones are compared with what is prepared of them
        known = {*cases, *(case for fold in splits for case in fold.get(UNLABELED, ()))}
        check_splits(splits, preprocessed / SPLITS_FILE, known, folder)
        check_fold(splits, trainer.fold, preprocessed / SPLITS_FILE)
    else:
        check_planned_fold(len(cases), trainer.fold)
    return cases


def check_cases(trainer: "nnUNetTrainerSSL", train: Sequence[str], val: Sequence[str]) -> None:
    """Raise SplitError where a case of training or validation is unlabelled, or a test case, by now.

    Parameters
    ----------
    trainer : nnUNetTrainerSSL
        The training.
    train, val : sequence of str
        Cases of its fold.
    """
    raw = raw_folder(trainer.plans_manager.dataset_name)
    unlabeled, test = set(() if trainer.unlabeled is None else trainer.unlabeled.names), set[str]()
    if raw is not None:
        roles = read_roles(raw, trainer.dataset_json)
        unlabeled, test = unlabeled | {*roles.unlabeled}, {*roles.test}
    number = dataset_number(trainer.plans_manager.dataset_name)
    check_training_cases({*train, *val}, unlabeled, test, number, Path(trainer.preprocessed_dataset_folder_base))
