"""Online pseudo-labels: hard labels of the teacher where it is sure, learnt on a strong view of the same patch.

FixMatch (Sohn et al., NeurIPS 2020) and UniMatch (Yang et al., CVPR 2023), with one strong view and an EMA teacher;
`ema0` makes the labels the student's own, as they have it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_dycon.losses.consistency import soft_ce_dice
from nnunetv2_dycon.losses.targets import hard_targets
from nnunetv2_dycon.methods.base import (
    Batch,
    Group,
    TeacherSettings,
    Term,
    ViewMethod,
    ViewSettings,
    agreement,
)
from nnunetv2_dycon.networks import full_resolution
from nnunetv2_dycon.options import Settings, option
from nnunetv2_dycon.views import PASSES, View


@dataclass(frozen=True)
class PseudoLabelSettings(ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerPseudoLabel."""

    view: str = option("intensity", choices=tuple(PASSES), help="what differs between student and teacher input")
    gate: float = option(0.95, low=0.0, high=1.0, help="teacher confidence from which a voxel counts; 0 = all count")
    w: float = option(1.0, low=0.0, high=1000.0, help="weight of the pseudo-label term after the ramp")


class PseudoLabel(ViewMethod):
    """The teacher's hard labels where it is sure, learnt on a strong view of each unlabelled patch."""

    settings_type: ClassVar[type[Settings]] = PseudoLabelSettings

    def compare(self, student: nn.Module, teacher: Callable[[Tensor], Tensor], batch: Batch, view: View) -> Group:
        """Return cross-entropy plus Dice against the pseudo-labels of voxels that pass the gate."""
        with torch.no_grad():
            target = view.mix(teacher(view.teacher))
            hard = hard_targets(target, self.settings.gate)
        logits = full_resolution(student(view.student))
        term = Term(self.settings.w * self.ramp(batch), soft_ce_dice(logits, hard.one_hot, hard.weight))
        return Group({"pseudo": term}, {"agreement": agreement(logits, target), "voxels_kept": hard.weight.mean()})
