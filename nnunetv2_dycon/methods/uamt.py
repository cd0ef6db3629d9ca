"""UA-MT: mean teacher that learns only where the teacher, asked several times, is certain.

Yu et al., MICCAI 2019. There the teacher's dropout makes its answers differ; a planned network has none, so here noise
on its input does alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_dycon.losses.consistency import mse
from nnunetv2_dycon.losses.targets import certain_voxels
from nnunetv2_dycon.methods.base import (
    Batch,
    Group,
    Pass,
    TeacherSettings,
    Term,
    ViewMethod,
    ViewSettings,
    agreement,
    passes,
)
from nnunetv2_dycon.networks import full_resolution
from nnunetv2_dycon.options import Settings, option
from nnunetv2_dycon.schedules import gaussian_ramp
from nnunetv2_dycon.views import View, noisy


@dataclass(frozen=True)
class UAMTSettings(ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerUAMT."""

    samples: int = option(4, low=1, high=64, help="noised teacher passes that the uncertainty is taken from")
    w: float = option(4.0, low=0.0, high=1000.0, help="weight of the consistency term after the ramp")


class UAMT(ViewMethod):
    """Mean teacher on the voxels where the mean of several noised teacher passes has low entropy."""

    settings_type: ClassVar[type[Settings]] = UAMTSettings

    def unlabeled(self, student: nn.Module, batch: Batch) -> tuple[Pass, ...]:
        """Return one pass for each view; the noised teacher is asked once for all of them."""
        mean = cache(partial(self._mean_answer, batch))
        return passes(self.views(batch), partial(self._certain_terms, student, cache(self.teacher), mean, batch))

    def _certain_terms(
        self,
        student: nn.Module,
        teacher: Callable[[Tensor], Tensor],
        mean: Callable[[], Tensor],
        batch: Batch,
        view: View,
    ) -> Group:
        """Return the mean squared norm over the certain voxels, a zero on the graph where there is none."""
        with torch.no_grad():
            target = view.mix(teacher(view.teacher))
            certain = certain_voxels(view.mix(mean()), _threshold(batch.t))
            kept = certain.mean()
        logits = full_resolution(student(view.student))
        value = mse(logits, target, certain / kept.clamp_min(1e-12))  # the mean over certain voxels alone
        term = Term(self.settings.w * self.ramp(batch), value)
        return Group({"consistency": term}, {"agreement": agreement(logits, target), "voxels_kept": kept})

    def figures(self, t: float) -> dict[str, float]:
        """Return ramp and threshold at fraction `t` of the training, for the log."""
        return {**super().figures(t), "threshold": _threshold(t)}

    def _mean_answer(self, batch: Batch) -> Tensor:
        """Return the logarithm of the teacher's mean probabilities (B, C, *S) over noised inputs, in float32."""
        total: Tensor | float = 0.0
        for _ in range(self.settings.samples):
            total = total + torch.softmax(self.teacher(noisy(batch.x_u, batch.generator)).float(), 1)
        return (total / self.settings.samples).clamp_min_(torch.finfo(torch.float32).tiny).log_()


def _threshold(t: float) -> float:
    """Return the largest entropy of a certain voxel as a share of ln C: from 3/4 to 1 over the whole training."""
    return 0.75 + 0.25 * gaussian_ramp(t, rampup=1.0, delay=0.0)
