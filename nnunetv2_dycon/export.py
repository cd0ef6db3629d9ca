"""Export a model folder for stock nnU-Net, for prediction on a machine without this package."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nnunetv2_dycon.checkpoint import read_checkpoint, write_checkpoint
from nnunetv2_dycon.command_lines import Model
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few, read_json_object, whole_folder
from nnunetv2_dycon.trained import NEEDED, RESTORE, weights_of
from nnunetv2_dycon.trainers.results import model_folder, trained_checkpoint

STOCK_TRAINER = "nnUNetTrainer"
MODEL_FILES = ("plans.json", "dataset.json")
MEAN_OF = ("student", "teacher")


def export_model(
    dataset_id: int | str,
    trainer: str,
    configuration: str = "3d_fullres",
    folds: Sequence[int | str] = (0,),
    plans: str = "nnUNetPlans",
    weights: Literal["teacher", "student", "mean"] = "teacher",
    output: str | Path = "",
    checkpoint: str = "checkpoint_final.pth",
) -> Path:
    """Write a model folder for `nnUNetv2_predict_from_modelfolder -m OUTPUT`: plans, dataset.json and checkpoints.

    The network is the planned one, so the checkpoints name nnU-Net's own trainer. They hold only what prediction needs;
    training cannot be continued from them.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    trainer : str
        Trainer name with options, as trained.
    configuration, plans : str
        As in nnU-Net.
    folds : sequence of int or 'all'
        Trained folds.
    weights : {"teacher", "student", "mean"}
        Network to export. In co-training the student is the first network and the teacher the second. "mean" exports
        both, the teachers as further folds with the next numbers: nnU-Net averages the outputs of the folds in -f, so
        give it all of them.
    output : path
        Folder to write; it must not exist.
    checkpoint : str
        File name of the checkpoint in each fold.

    Returns
    -------
    Path
        `output`, which is written completely or not at all.

    Raises
    ------
    DataError
        If a file of the training is missing, cannot be read or has no teacher, or `output` exists or cannot be written.
    """
    output = Path(output)
    if output.exists():
        raise DataError(f"{output} exists; give -o a new folder")
    name = Model(trainer, plans, configuration)
    trained = {fold: trained_checkpoint(dataset_id, name, fold, checkpoint) for fold in folds}
    model = model_folder(dataset_id, name)
    lost = [file for file in MODEL_FILES if not (model / file).is_file()]
    if lost:
        raise DataError(f"{model} has no {first_few(lost)}; {RESTORE}")
    for file in MODEL_FILES:  # or another machine would find out that it was cut short
        read_json_object(model / file, RESTORE)
    with whole_folder(output) as whole:
        for file in MODEL_FILES:
            shutil.copyfile(model / file, whole / file)
        for number, fold, kind in _members(folds, weights):
            target = whole / f"fold_{number}" / "checkpoint_final.pth"
            target.parent.mkdir()
            write_checkpoint(_stock_checkpoint(trained[fold], kind), target)
    return output


def _members(folds: Sequence[int | str], weights: str) -> list[tuple[int | str, int | str, str]]:
    """Return for each fold of the model its number, its trained fold, and its network."""
    if weights != "mean":
        return [(fold, fold, weights) for fold in folds]
    student, teacher = MEAN_OF
    first = 1 + max((int(fold) for fold in folds if fold != "all"), default=-1)
    return [
        *((fold, fold, student) for fold in folds),
        *((first + i, fold, teacher) for i, fold in enumerate(folds)),
    ]


def _stock_checkpoint(path: Path, weights: str) -> dict[str, Any]:
    checkpoint = read_checkpoint(path, *NEEDED)
    return {
        "network_weights": weights_of(checkpoint, weights, path),
        "trainer_name": STOCK_TRAINER,
        "init_args": {**checkpoint["init_args"], "device": torch.device("cpu")},
        "inference_allowed_mirroring_axes": checkpoint["inference_allowed_mirroring_axes"],
    }
