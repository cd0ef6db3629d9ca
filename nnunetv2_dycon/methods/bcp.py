"""BCP: bidirectional copy-paste between labelled and unlabelled patches.

Bai et al., CVPR 2023. In addition to its two mixes the student keeps nnU-Net's own loss on the labelled patches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from nnunetv2_dycon.methods.settings import TeacherSettings, UnlabeledSettings
from nnunetv2_dycon.options import option
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pass, Term, full_resolution
from nnunetv2_dycon.views import BCP_BOX_SIDE, Outputs, View, draw_views


@dataclass(frozen=True)
class BCPSettings(UnlabeledSettings, TeacherSettings):
    """Options of nnUNetTrainerBCP."""

    pretrain: float = option(
        0.2, low=0.0, high=1.0, help="fraction of the training that pastes among labelled patches only"
    )
    w: float = option(0.5, low=0.0, high=1000.0, help="weight of the loss on mixed patches")
    alpha: float = option(0.5, low=0.0, high=1.0, help="weight of a pseudo-labelled region relative to a labelled one")

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Add `ramp`: 1 once unlabelled patches take part, before that 0."""
        return {**super().schedules(), "ramp": lambda t: float(t >= self.pretrain)}


class BCP(Method[BCPSettings]):
    """Boxes pasted both ways between labelled and unlabelled patches, the teacher's labels on the unlabelled side."""

    settings_type = BCPSettings

    def passes(self, student: nn.Module, batch: Batch) -> Iterator[Pass]:
        """Yield the pass of labelled mixes, or later one pass for each direction; then the labelled patches."""
        if batch.now["ramp"]:
            yield from super().passes(student, batch)
        else:
            (pair,) = self.pairs(student)
            yield self.paste_pass(pair, batch, self.settings.w, BCP_BOX_SIDE)
            yield self.labeled_pass(pair, batch)

    def views(self, batch: Batch) -> Iterator[View]:
        """Yield both mixes, each with the whole weight."""
        for view in draw_views(
            "bcp", batch.x_u, batch.x_l, batch.y_l, self.data.ignore_label, generator=batch.generator
        ):
            yield replace(view, share=1.0)

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return the losses of both regions: true labels where a labelled patch shows, else the teacher's."""
        logits, pasted = full_resolution(outputs), p.view.pasted
        labels = answer.target.argmax(1, keepdim=True)
        w = self.settings.w
        return Cost(
            {
                "labeled": Term(w, self.region_loss(logits, labels, pasted)),
                "pseudo": Term(w * self.settings.alpha, self.region_loss(logits, labels, ~pasted)),
            }
        )
