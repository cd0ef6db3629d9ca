"""Steps of any method with small networks and made-up batches; no data set, no nnU-Net."""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dhc import DHC, DHCSettings
from nnunetv2_dycon.methods.dycon import DyCON, DyCONSettings
from nnunetv2_dycon.methods.dycon_bcp import DyCONBCP, DyCONBCPSettings
from nnunetv2_dycon.methods.dycon_cps import DyCONCPS, DyCONCPSSettings
from nnunetv2_dycon.methods.dycon_magicnet import DyCONMagicNet, DyCONMagicNetSettings
from nnunetv2_dycon.methods.labeled_only import LabeledOnly
from nnunetv2_dycon.methods.magicnet import MagicNet, MagicNetSettings
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_dycon.methods.settings import TeacherSettings
from nnunetv2_dycon.methods.uamt import UAMT, UAMTSettings
from nnunetv2_dycon.options import Settings
from nnunetv2_dycon.step import DataInfo, Method, Step
from tests.recipes import CLASSES, SPACE, all_learned, images, seeded

UNSURE = {"anchors": 0, "gate": 0.0, "stage": 0}  # of DyCON: every patch counts, every voxel is a patch
SMALL = {"epochs": 1, "iters": 40}


def loader_batch(seed: int = 0, labeled: int = 2, unlabeled: int = 2) -> dict[str, Any]:
    """What a loader gives; a label of an unlabelled patch among it would be dropped."""
    return {
        "data": images(10 + seed, labeled),
        "target": torch.randint(0, CLASSES, (labeled, 1, *SPACE), generator=seeded(20 + seed)),
        "keys": [f"l_{i}" for i in range(labeled)],
        "unlabeled": images(30 + seed, unlabeled),
        "unlabeled_keys": [f"u_{i}" for i in range(unlabeled)],
    }


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, target[:, 0].long())


def made(kind: type[Method], settings: Settings, student: nn.Module, *, lr: float = 0.1, **how: Any) -> Step:
    """Return the step of a method with plain SGD, one optimiser for the student and one for what the method adds."""
    method = all_learned(kind(settings, DataInfo(CLASSES, patch=SPACE), seed=3))
    method.build(student)
    optimizers = [torch.optim.SGD(student.parameters(), lr)]
    own = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizers += [torch.optim.SGD(own, lr)] if own else []
    network = how.pop("network", student)
    how = {"loss": cross_entropy, "device": torch.device("cpu"), "generator": seeded(6)} | how
    return Step(network, method, optimizers, **how)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return deepcopy(module.state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def spoiled(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "unlabeled": batch["unlabeled"] * math.nan}


METHODS = {
    "LabeledOnly": (LabeledOnly, TeacherSettings(paste=0.5)),
    "MeanTeacher": (MeanTeacher, MeanTeacherSettings(view="bcp", paste=0.25)),
    "UAMT": (UAMT, UAMTSettings(view="cutmix")),
    "BCP": (BCP, BCPSettings(view="bcp", truth="both")),
    "BCP patches": (BCP, BCPSettings()),
    "BCP mixes": (BCP, BCPSettings(truth="mixes")),
    "CPS": (CPS, CPSSettings(view="copy_paste")),
    "DyCON": (DyCON, DyCONSettings(**UNSURE)),
    "DyCON mixing": (DyCON, DyCONSettings(**UNSURE, view="bcp", loss="ce_dice")),
    "DyCONBCP": (DyCONBCP, DyCONBCPSettings(**UNSURE, view="bcp")),
    "DHC": (DHC, DHCSettings()),
    "MagicNet": (MagicNet, MagicNetSettings(paste=0.25)),
    "DyCONGAMagicNet": (DyCONMagicNet, DyCONMagicNetSettings(**UNSURE, ga=True)),
    "DyCONCPS": (DyCONCPS, DyCONCPSSettings(**UNSURE, view="bcp", on="all", loss="guarded")),
}
