"""Mean teacher: the student agrees with its own moving average on unlabelled patches.

Tarvainen and Valpola, NeurIPS 2017. The ramp is that of Laine and Aila, ICLR 2017, over a fraction of the training.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_dycon.losses.consistency import mse, soft_ce_dice
from nnunetv2_dycon.methods.base import (
    Batch,
    Group,
    Method,
    TeacherSettings,
    Term,
    agreement,
    full_resolution,
)
from nnunetv2_dycon.options import Settings, option
from nnunetv2_dycon.schedules import gaussian_ramp
from nnunetv2_dycon.views import VIEWS, View, make_view


@dataclass(frozen=True)
class ConsistencySettings(TeacherSettings):
    """Options of every method whose student learns from a teacher on a view of the unlabelled patch."""

    ramp: float = option(0.4, low=0.0, high=1.0, help="fraction of the training over which unlabelled terms rise")
    delay: float = option(0.02, low=0.0, high=1.0, help="fraction of the training before unlabelled terms begin")
    view: str = option("noise", choices=tuple(VIEWS), help="what differs between student and teacher input")
    target: str = option("mse", choices=("mse", "ce_dice"), help="how the student is held to the teacher")


@dataclass(frozen=True)
class MeanTeacherSettings(ConsistencySettings):
    """Options of nnUNetTrainerMeanTeacher."""

    w: float = option(4.0, low=0.0, high=1000.0, help="weight of the consistency term after the ramp")


class MeanTeacher(Method):
    """Consistency with the EMA teacher on a view of each unlabelled patch."""

    settings_type: ClassVar[type[Settings]] = MeanTeacherSettings

    def ramp(self, batch: Batch) -> float:
        """Return the factor r(t) in [0, 1] of all unlabelled terms."""
        return gaussian_ramp(batch.t, rampup=self.settings.ramp, delay=self.settings.delay)

    def figures(self, t: float) -> dict[str, float]:
        """Return the ramp at fraction `t` of the training, for the log."""
        return {"ramp": gaussian_ramp(t, rampup=self.settings.ramp, delay=self.settings.delay)}

    def view(self, batch: Batch) -> View:
        """Return the student's and the teacher's input for the unlabelled patches."""
        return make_view(
            self.settings.view,
            batch.x_u,
            x_labeled=batch.x_l,
            target=batch.y_l,
            ignore_label=self.task.ignore_label,
            generator=batch.generator,
        )

    def unlabeled(self, student: nn.Module, batch: Batch) -> Group:
        """Return the consistency term of the unlabelled patches."""
        view = self.view(batch)
        with torch.no_grad():
            target = view.mix(self.teacher(view.teacher))
        logits = full_resolution(student(view.student))
        term = Term(self.settings.w * self.ramp(batch), self.consistency(logits, target))
        return Group({"consistency": term}, {"agreement": agreement(logits, target)})

    def consistency(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the distance of student logits from teacher logits, both (B, C, *S), as `target` chooses.

        weight : Tensor, shape (B, *S), optional
            Weight of each voxel.
        """
        if self.settings.target == "ce_dice":
            return soft_ce_dice(logits, torch.softmax(target.float(), 1), weight)
        return mse(logits, target, weight)
