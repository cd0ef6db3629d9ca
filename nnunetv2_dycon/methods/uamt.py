"""UA-MT: mean teacher that learns only where the teacher, asked several times, is certain.

Yu et al., MICCAI 2019. There the teacher's dropout makes its answers differ; a planned network has none, so here noise
on its input does alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunetv2_dycon import ranks
from nnunetv2_dycon.losses.mse import mse
from nnunetv2_dycon.losses.voxels import entropy
from nnunetv2_dycon.methods.settings import TeacherSettings, ViewSettings
from nnunetv2_dycon.networks import TargetNetwork
from nnunetv2_dycon.options import option
from nnunetv2_dycon.schedules import gaussian_ramp
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import Outputs, noisy


@dataclass(frozen=True)
class UAMTSettings(ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerUAMT."""

    samples: int = option(4, low=1, high=64, help="noised teacher passes that the uncertainty is taken from")
    w: float = option(4.0, low=0.0, high=1000.0, help="weight of the consistency term after the ramp")

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Add the largest entropy of a certain voxel as a share of ln C: from 3/4 to 1 over the whole training."""
        return {
            **super().schedules(),
            "threshold": lambda t: 0.75 + 0.25 * gaussian_ramp(t, rampup=1.0, delay=0.0),
        }


class UAMT(Method[UAMTSettings]):
    """Mean teacher on the voxels where the mean of several noised teacher passes has low entropy."""

    settings_type = UAMTSettings

    @torch.no_grad()
    def ask_unlabeled(self, p: Pass, batch: Batch, before: Answer | None) -> Answer:
        """Add the logarithm of the teacher's mean probabilities over noised inputs, once for all views."""
        answer = super().ask_unlabeled(p, batch, before)
        return answer if answer.extra is not None else answer._replace(extra=self._mean_answer(p.pair.teacher, batch))

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return the mean squared norm over the certain voxels, a zero on the graph where there is none."""
        logits, target = full_resolution(outputs), answer.target
        certain = certain_voxels(p.view.mix(answer.extra), batch.now["threshold"])
        kept = ranks.mean_everywhere(certain.mean())
        value = mse(logits, target, certain / kept.clamp_min(1e-12))  # the mean over certain voxels alone
        term = Term(self.settings.w * batch.now["ramp"], value)
        return Cost({"consistency": term}, {"agreement": agreement(logits, target), "voxels_kept": kept})

    def _mean_answer(self, teacher: TargetNetwork, batch: Batch) -> Tensor:
        """Return the logarithm of the mean probabilities (B, C, *S) over noised inputs, in float32."""
        total = torch.zeros(())
        for _ in range(self.settings.samples):
            logits = full_resolution(teacher.network(noisy(batch.x_u, batch.generator)))
            total = total + torch.softmax(logits.float(), 1)
        return (total / self.settings.samples).clamp_min_(torch.finfo(torch.float32).tiny).log_()


@torch.no_grad()
def certain_voxels(logits: Tensor, threshold: float) -> Tensor:
    """Return 1 for a voxel whose entropy is below `threshold` times the largest, ln C, else 0.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; the logarithm of a mean probability will do.
    threshold : float
        Share of ln C, at least 0.

    Returns
    -------
    Tensor, shape (B, *S), float32

    Examples
    --------
    Probabilities (3/4, 1/4): entropy 0.562 = 0.811 ln 2.

    >>> logits = torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1)
    >>> certain_voxels(logits, 0.80).item(), certain_voxels(logits, 0.82).item()
    (0.0, 1.0)
    """
    h = entropy(logits)
    return (h < threshold * math.log(logits.shape[1])).to(h.dtype)
