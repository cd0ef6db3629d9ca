"""Mean teacher: the student agrees with its own moving average on unlabelled patches.

Tarvainen and Valpola, NeurIPS 2017. The ramp is that of Laine and Aila, ICLR 2017, over a fraction of the training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_dycon.losses.consistency import mse, soft_ce_dice
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
from nnunetv2_dycon.views import View


@dataclass(frozen=True)
class TargetSettings(Settings):
    """Options of every method whose student is held to probabilities."""

    target: str = option("mse", choices=("mse", "ce_dice"), help="how the student is held to the teacher")


@dataclass(frozen=True)
class MeanTeacherSettings(TargetSettings, ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerMeanTeacher."""

    w: float = option(4.0, low=0.0, high=1000.0, help="weight of the consistency term after the ramp")


class MeanTeacher(ViewMethod):
    """Consistency with the EMA teacher on a view of each unlabelled patch."""

    settings_type: ClassVar[type[Settings]] = MeanTeacherSettings

    def compare(self, student: nn.Module, teacher: Callable[[Tensor], Tensor], batch: Batch, view: View) -> Group:
        """Return the consistency term of one view of the unlabelled patches."""
        with torch.no_grad():
            target = view.mix(teacher(view.teacher))
        logits = full_resolution(student(view.student))
        term = Term(self.settings.w * self.ramp(batch), self.consistency(logits, target))
        return Group({"consistency": term}, {"agreement": agreement(logits, target)})

    def consistency(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the distance of student logits from teacher logits, both (B, C, *S), as `target` chooses."""
        if self.settings.target == "ce_dice":
            return soft_ce_dice(logits, torch.softmax(target.float(), 1))
        return mse(logits, target)
