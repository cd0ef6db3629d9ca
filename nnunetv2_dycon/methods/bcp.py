"""BCP: bidirectional copy-paste between labelled and unlabelled patches.

Bai et al., CVPR 2023. In addition to its two mixes the student keeps nnU-Net's own loss on the labelled patches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from nnunetv2_dycon.methods.settings import TeacherSettings, UnlabeledSettings
from nnunetv2_dycon.options import option
from nnunetv2_dycon.schedules import gaussian_ramp
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import BCP_BOX_SIDE, Outputs


@dataclass(frozen=True)
class BCPSettings(UnlabeledSettings, TeacherSettings):
    """Options of nnUNetTrainerBCP."""

    view: ClassVar[str] = "bcp"

    pretrain: float = option(
        0.0, low=0.0, high=1.0, help="fraction of the training that pastes among labelled patches only"
    )
    rampup: float = option(
        0.0,
        low=0.0,
        high=1.0,
        help="fraction of the training at which pseudo-labels have their whole weight; 0 = at once",
    )
    w: float = option(0.5, low=0.0, high=1000.0, help="weight of the loss on mixed patches")
    alpha: float = option(0.5, low=0.0, high=1.0, help="weight of a pseudo-labelled region relative to a labelled one")

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Add `ramp`: 0 while pastes are among labelled patches, then the factor of the pseudo-labels."""
        return {**super().schedules(), "ramp": partial(gaussian_ramp, rampup=self.rampup, delay=self.pretrain)}


class BCP(Method[BCPSettings]):
    """Boxes pasted both ways between labelled and unlabelled patches, the teacher's labels on the unlabelled side."""

    settings_type = BCPSettings

    def passes(self, student: nn.Module, batch: Batch) -> Iterator[Pass]:
        """Yield one pass for each direction, or before it pastes with pseudo-labels that of option `pretrain`, if any.

        Then the labelled patches as they are, which are alone until the labels have taught the first class.
        """
        if batch.now["ramp"]:
            yield from super().passes(student, batch)
        else:
            (pair,) = self.pairs(student)
            if self.settings.pretrain:
                yield self.paste_pass(pair, batch, self.settings.w, BCP_BOX_SIDE)
            yield self.labeled_pass(pair, batch)

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return the losses of both regions: true labels where a labelled patch shows, else the teacher's."""
        logits, target, pasted = full_resolution(outputs), answer.target, p.view.pasted
        labels, weight = target.argmax(1, keepdim=True), self.voxel_weight(logits, target, batch)
        w = self.settings.w / p.view.share  # each direction has the whole weight
        return Cost(
            {
                "labeled": Term(w * self.learned.share, self.region_loss(logits, labels, pasted)),
                "pseudo": Term(
                    w * self.settings.alpha * batch.now["ramp"],
                    self.region_loss(logits, labels, ~pasted, weight, pseudo=True),
                ),
            },
            {"agreement": agreement(logits, target)},
        )
