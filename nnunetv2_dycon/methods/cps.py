"""CPS, co-training by cross pseudo supervision: two networks, each learns the other's hard labels.

Chen et al., CVPR 2021. The second network is the teacher of the first, and the first that of the second.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nnunetv2_dycon.losses.voxels import hard_targets
from nnunetv2_dycon.methods.settings import ViewSettings
from nnunetv2_dycon.networks import SecondNetwork, TargetNetwork, unwrap
from nnunetv2_dycon.options import option
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pair, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import VIEWS, Outputs


@dataclass(frozen=True)
class CPSSettings(ViewSettings):
    """Options of nnUNetTrainerCPS."""

    view: str = option("weak", choices=tuple(VIEWS), help="what differs between the inputs of the two networks")
    w: float = option(1.0, low=0.0, high=1000.0, help="weight of the cross pseudo supervision after the ramp")


class CPS(Method[CPSSettings]):
    """Two networks with different starts, each trained on the labels and on the other's hard labels."""

    settings_type = CPSSettings
    endings = ("", "_second")

    def build(self, student: nn.Module) -> None:
        """Make the second network."""
        self.teacher = SecondNetwork(student, seed=self.seed)

    def start(self, student: nn.Module) -> None:
        """Leave the second network at its own start, also where the first one got pretrained weights."""

    def after_step(self, student: nn.Module, number: int) -> None:
        """Do nothing: the second network has moved by its own gradient."""

    def models(self, student: nn.Module) -> dict[str, nn.Module]:
        """Return the second network as `teacher`, and the mean of both."""
        return {**super().models(student), "mean": Mean(student, self.teacher.network)}

    def pairs(self, student: nn.Module) -> tuple[Pair, ...]:
        """Return both networks, each with the other as its teacher."""
        return Pair(student, self.teacher), Pair(self.teacher.network, TargetNetwork(unwrap(student)), "_second")

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return cross-entropy plus Dice (or option `ga`) against the hard labels of the other network."""
        logits, target = full_resolution(outputs), answer.target
        value = self.pseudo_loss(logits, hard_targets(target), self.voxel_weight(logits, target, batch))
        term = Term(self.settings.w * batch.now["ramp"], value)
        return Cost({"cps": term}, {"agreement": agreement(logits, target)})


class Mean(nn.Module):
    """The mean of what networks answer at full resolution: as nnU-Net predicts with several folds.

    Parameters
    ----------
    networks : nn.Module
        Plain networks, which stay the caller's.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.decoder = SimpleNamespace(deep_supervision=False)  # nnU-Net switches it; the answer is the finest always
        self.train(networks[0].training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits `(B, K, *S)` of images `(B, C, *S)`."""
        return torch.stack([full_resolution(network(x)) for network in self.networks]).mean(0)
