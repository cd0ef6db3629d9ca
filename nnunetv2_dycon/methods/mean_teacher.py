"""Mean teacher: the student agrees with its own moving average on unlabelled patches.

Tarvainen and Valpola, NeurIPS 2017. The ramp is that of Laine and Aila, ICLR 2017, over a fraction of the training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from nnunetv2_dycon.losses.mse import mse
from nnunetv2_dycon.losses.voxels import soft_ce_dice
from nnunetv2_dycon.methods.settings import TeacherSettings, ViewSettings
from nnunetv2_dycon.options import option
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import Outputs


@dataclass(frozen=True)
class MeanTeacherSettings(ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerMeanTeacher."""

    renamed: ClassVar[Mapping[str, str]] = {**ViewSettings.renamed, "target": "loss"}

    loss: str = option("mse", choices=("mse", "ce_dice"), help="distance of the student from the teacher")
    w: float = option(4.0, low=0.0, high=1000.0, help="weight of the consistency term after the ramp")


class MeanTeacher(Method[MeanTeacherSettings]):
    """Consistency with the EMA teacher on a view of each unlabelled patch."""

    settings_type = MeanTeacherSettings

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return the distance of the student's probabilities from the teacher's."""
        logits, target = full_resolution(outputs), answer.target
        weight = self.voxel_weight(logits, target, batch)
        if self.settings.loss == "ce_dice":
            value = soft_ce_dice(logits, torch.softmax(target.float(), 1), weight)
        else:
            value = mse(logits, target, weight)
        term = Term(self.settings.w * batch.now["ramp"], value)
        return Cost({"consistency": term}, {"agreement": agreement(logits, target)})
