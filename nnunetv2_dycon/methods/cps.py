"""CPS, co-training by cross pseudo supervision: two networks, each learns the other's hard labels.

Chen et al., CVPR 2021. The second network stands where other methods have the teacher.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_dycon.losses.consistency import soft_ce_dice
from nnunetv2_dycon.losses.targets import hard_targets
from nnunetv2_dycon.methods.base import Batch, Group, Pass, Term, ViewMethod, ViewSettings, agreement, passes
from nnunetv2_dycon.networks import Guide, Mean, Peer, full_resolution, unwrap
from nnunetv2_dycon.options import Settings, option
from nnunetv2_dycon.views import PASSES, View

SECOND = "_second"  # ends the names of the second network's terms


@dataclass(frozen=True)
class CPSSettings(ViewSettings):
    """Options of nnUNetTrainerCPS."""

    view: str = option("weak", choices=tuple(PASSES), help="what differs between the input that is learnt and labelled")
    w: float = option(1.0, low=0.0, high=1000.0, help="weight of the cross pseudo supervision after the ramp")


class CPS(ViewMethod):
    """Two networks with different starts, each trained on the labels and on the other's hard labels."""

    settings_type: ClassVar[type[Settings]] = CPSSettings

    def build(self, student: nn.Module) -> None:
        """Make the second network."""
        self.teacher = Peer(student, seed=self.task.seed)

    def start(self, student: nn.Module) -> None:
        """Leave the second network at its own start, also where the first one got pretrained weights."""

    def after_step(self, student: nn.Module, step: int) -> None:
        """Do nothing: the second network has moved by its own gradient."""

    def models(self, student: nn.Module) -> dict[str, nn.Module]:
        """Return the second network as `teacher`, and the mean of both."""
        return {**super().models(student), "mean": Mean(student, self.teacher.network)}

    def groups(self, student: nn.Module, batch: Batch) -> tuple[Pass, ...]:
        """Return both networks' unlabelled passes, then their labelled ones, the student's last."""
        views = self.views(batch)  # each made in the first pass, for both
        first, second = Guide(unwrap(student)), self.teacher
        return (
            *passes(views, partial(self.cross, student, second, batch)),
            *passes(views, lambda view: self.cross(second.network, first, batch, view).named(end=SECOND)),
            lambda: self.learn(second.network, first, batch).named(end=SECOND),
            lambda: self.learn(student, second, batch),
        )

    def cross(self, learner: nn.Module, guide: Guide, batch: Batch, view: View) -> Group:
        """Return the terms of one network on the unlabelled patches; `guide` is the other one."""
        with torch.no_grad():
            target = view.mix(guide(view.teacher))
        logits = full_resolution(learner(view.student))
        return Group({"cps": self.cross_term(logits, target, batch)}, {"agreement": agreement(logits, target)})

    def learn(self, learner: nn.Module, guide: Guide, batch: Batch) -> Group:
        """Return the terms of one network on the labelled patches; `guide` is the other one."""
        return self.labeled(learner, batch)

    def cross_term(self, logits: Tensor, target: Tensor, batch: Batch) -> Term:
        """Return the loss of logits against the hard labels of the other network's, both (B, C, *S)."""
        return Term(self.settings.w * self.ramp(batch), soft_ce_dice(logits, hard_targets(target).one_hot))
