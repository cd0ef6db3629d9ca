"""Trainers of tiny data sets, in this process, and what a run leaves behind in comparable form."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.step import Term

DATASET_ID = 901


def make_trainer(
    name: str,
    *,
    dataset: str = "Dataset901_Tiny",
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    resume: bool = False,
    plans: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Any:
    """Return the trainer of a name as nnU-Net's command would make it."""
    import os

    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_dycon.trainers.names import TRAINERS, trainer_class

    folder = Path(os.environ["nnUNet_preprocessed"], dataset)
    loaded = json.loads((folder / "nnUNetPlans.json").read_text()) if plans is None else plans
    dataset_json = json.loads((folder / "dataset.json").read_text())
    kind = trainer_class(name) if name.split("_")[0] in TRAINERS else recursive_find_trainer_class_by_name(name)
    return kind({**loaded, "continue_training": resume}, configuration, fold, dataset_json, torch.device(device))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def begin(trainer: Any) -> Any:
    """Do what nnU-Net does before the first step."""
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def steps(trainer: Any, number: int) -> list[dict[str, Any]]:
    """Run steps of a trainer that has begun; returns each step's batch and loss."""
    done = []
    for _ in range(number):
        batch = next(trainer.dataloader_train)
        copy = {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
        done.append({**copy, "loss": float(trainer.train_step(batch)["loss"])})
    return done


def same(one: Any, other: Any) -> bool:
    """Whether two nests of tensors, numbers and texts are equal bit for bit (nan equals nan)."""
    if torch.is_tensor(one) or isinstance(one, np.ndarray):
        a, b = (
            torch.as_tensor(x) if not (isinstance(x, np.ndarray) and x.dtype.kind in "UO") else x for x in (one, other)
        )
        if not torch.is_tensor(a):
            return bool((a == b).all())
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other or (one != one and other != other)


SHORT = "epochs6_iters2_valiters1_save3"
AVERAGING = (
    "nnUNetTrainerLabeledOnly",
    "nnUNetTrainerMeanTeacher",
    "nnUNetTrainerDyCON",
    "nnUNetTrainerDyCONPaper",
    "nnUNetTrainerDyCONBCP",
    "nnUNetTrainerDyCON_viewcutmix_lossguarded_lambdah0p1",
    "nnUNetTrainerDyCON_viewbcp_lossce_dice_learned0",
    "nnUNetTrainerMeanTeacher_viewintensity_lossce_dice",
    "nnUNetTrainerDyCON_feclonlabeled_lossguarded_focusuncertain",
    "nnUNetTrainerPseudoLabel",
    "nnUNetTrainerUAMT_viewcutmix",
    "nnUNetTrainerBCP",
    "nnUNetTrainerBCP_truthmixes",
    "nnUNetTrainerMagicNet",
    "nnUNetTrainerGAMagicNet",
    "nnUNetTrainerDyCONMagicNet",
    "nnUNetTrainerMagicNet_noacross_noblend",
)
CO_TRAINING = (
    "nnUNetTrainerCPS",
    "nnUNetTrainerCPS_viewcopy_paste",
    "nnUNetTrainerDyCONCPS",
    "nnUNetTrainerDyCONCPS_onall_lossguarded",
    "nnUNetTrainerDHC",
)
METHODS = (*AVERAGING, *CO_TRAINING)
USING_UNLABELED = METHODS[1:]


def at_once(method: str) -> str:
    """The trainer with all its terms at work from the first step, on a network that knows nothing."""
    kind = method.removeprefix("nnUNetTrainer").split("_")[0]
    ramp = "" if kind in ("LabeledOnly", "BCP", "DyCONBCP", "DyCONPaper") else "_rampup0_delay0"
    learned = "" if kind in ("LabeledOnly", "DyCONPaper") or "_learned" in method else "_learned0"
    own = {"LabeledOnly": "_paste0p5", "BCP": "_pretrain0", "DyCONBCP": "_pretrain0", "PseudoLabel": "_gate0p5"}
    gate = "_gate0p3" if "DyCON" in kind and "feclonlabeled" not in method else ""
    return f"{method}{ramp}{learned}{own.get(kind, '')}{gate}"


def named(method: str, options: str = SHORT) -> str:
    return f"{method}_{options}"


def weights(trainer) -> dict:
    return {k: v.clone() for k, v in unwrap(trainer.network).state_dict().items()}


def run_epochs(trainer, number: int) -> None:
    """The body of nnU-Net's run_training for some epochs, as if it were killed afterwards."""
    for _ in range(number):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end(
            [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
        )
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val)) for _ in range(1)])
        trainer.on_epoch_end()


def poison(method, number: int) -> None:
    """Make the pass of the unlabelled patches not finite for some steps."""
    inner, left = method.unlabeled_terms, [number]

    def spoiled(*arguments):
        cost = inner(*arguments)
        left[0] -= 1
        if left[0] < 0:
            return cost
        return cost._replace(terms={k: Term(1.0, term.value * float("nan")) for k, term in cost.terms.items()})

    method.unlabeled_terms = spoiled
