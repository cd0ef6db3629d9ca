"""The ids of the rounds, taken before the first training: no other self-training gets them meanwhile."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import read_json_object, write_json, writing
from nnunetv2_dycon.locks import locked
from nnunetv2_dycon.self_training.training import FINAL, Training

CLAIM_FILE = "self_train.json"  # in the round's folder in nnUNet_results: the settings that its data set has


def check_ids(trainings: Sequence[Training]) -> None:
    """Refuse ids of rounds that belong to anything else than this self-training.

    Parameters
    ----------
    trainings : sequence of Training
        All trainings, the first one on the labelled cases.

    Raises
    ------
    DataError
        If an id belongs to another data set, to a self-training with other settings or from another first training, or
        to the remains of a data set.
    """
    wanted = _settings(trainings)
    for teacher, one in pairwise(trainings):
        data = one.data
        dataset.new_folder(data.id, data.name.split("_", 1)[1], "--as")
        claim = data.results / CLAIM_FILE
        noted = read_json_object(claim, "delete it") if claim.is_file() else wanted
        changed = [f"{key} {noted.get(key)}, now {value}" for key, value in wanted.items() if noted.get(key) != value]
        made_from = teacher.folder / FINAL
        if changed:
            raise _taken(one, f"{claim} is of a self-training with other settings ({'; '.join(changed)})")
        if data.raw.exists() and not made_from.is_file():
            raise _taken(one, f"{data.raw} was made with a training whose {made_from} is gone")
        others = [path for path in data.results.glob("*") if path != claim]
        if not data.raw.exists() and (others or data.preprocessed.exists()):
            raise _taken(one, f"{others[0] if others else data.preprocessed} is from an earlier data set of this id")


def take_ids(trainings: Sequence[Training]) -> None:
    """Note in each round's folder which self-training has its id.

    Raises
    ------
    DataError
        As `check_ids`.
    WriteError
        If nnUNet_results cannot be written.
    """
    root = trainings[0].data.results.parent
    with locked(root, f"another self-training is taking its ids in {root}: waiting for it", wait=True):
        check_ids(trainings)
        for one in trainings[1:]:
            with writing(one.data.results, "or set nnUNet_results"):
                one.data.results.mkdir(exist_ok=True)
            write_json(one.data.results / CLAIM_FILE, _settings(trainings))


def _settings(trainings: Sequence[Training]) -> dict[str, Any]:
    experiment = trainings[0].experiment
    return {
        "dataset": experiment.data.name,
        "configuration": experiment.configuration,
        "fold": experiment.fold,
        "plans": experiment.plans_name,
        "rounds": [one.data.id for one in trainings[1:]],
        "trainers": [one.trainer for one in trainings],
        "repeat": experiment.repeat,
        "keep_empty": experiment.keep_empty,
    }


def _taken(one: Training, what: str) -> DataError:
    there = [str(path) for path in (one.data.raw, one.data.preprocessed, one.data.results) if path.exists()]
    return DataError(f"{what}; type --as another id than {one.data.id}, or delete {' and '.join(there)}")
