"""The unlabelled cases of one training, prepared and up to date before the first step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_dycon.data.checked_cases import CASE, CaseReader, CheckedCases
from nnunetv2_dycon.data.manifest import unlabeled_status
from nnunetv2_dycon.data.splits import read_splits
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.errors import DataError


class UnlabeledCases(NamedTuple):
    """Folder of the prepared cases, the cases of a fold, and the command that prepares the folder."""

    folder: Path
    names: tuple[str, ...]
    command: str

    def dataset(self) -> CheckedCases:
        """Return the data set of the cases, in the format of this folder, whatever that of the labelled cases is."""
        return CaseReader(nnUNetDatasetBlosc2, f"{self.command} --again {CASE}")(str(self.folder), list(self.names))


def ready_cases(
    plans: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    preprocessed: Path,
    *,
    prepare: bool,
    processes: int,
    log: Callable[[str], None],
) -> UnlabeledCases:
    """Return the unlabelled cases of a fold.

    Parameters
    ----------
    plans : mapping
        nnU-Net's plans, as the trainer holds them.
    preprocessed : Path
        Preprocessed folder of the data set.
    prepare : bool
        Prepare missing and stale cases. Otherwise, as with several processes, stop and name the command.
    processes : int
        Worker processes of the preparation.
    log : callable
        Takes warnings and progress.

    Raises
    ------
    DataError
        If there is no unlabelled image, or one cannot be used, or `prepare` is False and cases are missing or stale.
    SplitError, ConfigError
        If a case has two roles, or the fold would train on hidden labels.
    """
    dataset = plans["dataset_name"]
    status = unlabeled_status(dataset, configuration, plans)
    if status.state != "ok":
        if not prepare:
            raise DataError(
                f"unlabelled images of {dataset} are {status.state}: {status.reason}; type: {status.command}"
            )
        log(f"Unlabelled images are {status.state}: {status.reason}. Preparing them now, as by: {status.command}")
        preprocess_unlabeled(dataset, (configuration,), plans, processes)
        status = unlabeled_status(dataset, configuration, plans)
    for note in status.notes:
        log(f"WARNING: {note}")
    names = status.cases(read_splits(preprocessed), fold)
    if not names:
        raise DataError(
            f"fold {fold} of {dataset} has no unlabelled case: put images into imagesUn, or train another fold"
        )
    return UnlabeledCases(status.folder, names, status.command)
