"""BCP: bidirectional copy-paste between labelled and unlabelled patches.

Bai et al., CVPR 2023. Beside its two mixes the student keeps nnU-Net's own loss on the labelled patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_dycon.losses.consistency import region_ce_dice
from nnunetv2_dycon.methods.base import Batch, Group, Method, Pass, TeacherSettings, Term
from nnunetv2_dycon.networks import full_resolution
from nnunetv2_dycon.options import Settings, option
from nnunetv2_dycon.views import BCP_BOX_SIDE, random_box


@dataclass(frozen=True)
class BCPSettings(TeacherSettings):
    """Options of nnUNetTrainerBCP."""

    pretrain: float = option(
        0.2, low=0.0, high=1.0, help="fraction of the training that pastes among labelled patches only"
    )
    w: float = option(0.5, low=0.0, high=1000.0, help="weight of the loss on mixed patches")
    alpha: float = option(0.5, low=0.0, high=1.0, help="weight of a pseudo-labelled region beside a labelled one")


class BCP(Method):
    """Boxes pasted both ways between labelled and unlabelled patches, the teacher's labels on the unlabelled side."""

    settings_type: ClassVar[type[Settings]] = BCPSettings

    def ramp(self, batch: Batch) -> float:
        """Return 1 once unlabelled patches take part, before that 0."""
        return float(batch.t >= self.settings.pretrain)

    def figures(self, t: float) -> dict[str, float]:
        """Return whether unlabelled patches take part at fraction `t` of the training, for the log."""
        return {"ramp": float(t >= self.settings.pretrain)}

    def groups(self, student: nn.Module, batch: Batch) -> tuple[Pass, ...]:
        """Return the pass of labelled mixes, or later one pass for each direction; then the labelled patches."""
        labeled = partial(self.labeled, student, batch)
        if not self.ramp(batch):
            return (partial(self.paste_labeled, student, batch, self.settings.w, BCP_BOX_SIDE), labeled)
        pseudo = cache(partial(self._pseudo_labels, batch))  # one teacher pass, within the first student pass
        pastes = [partial(self._paste, student, batch, pseudo, way) for way in ("in", "out")]
        return (*pastes, *self.pastes(student, batch), labeled)

    def _paste(self, student: nn.Module, batch: Batch, pseudo: Callable[[], Tensor], way: str) -> Group:
        """Return the terms of both regions: way "in" puts unlabelled boxes into labelled patches, "out" the reverse."""
        order = torch.randperm(len(batch.x_l), generator=batch.generator, device=batch.x_l.device)
        partner = order[torch.arange(len(batch.x_u), device=order.device) % len(order)]
        box = random_box(batch.x_u.shape, batch.x_u.device, batch.generator, BCP_BOX_SIDE)
        unlabeled = box if way == "in" else ~box
        truth = batch.y_l[partner]
        target = torch.where(unlabeled, pseudo().to(truth.dtype), truth)
        logits = full_resolution(student(torch.where(unlabeled, batch.x_u, batch.x_l[partner])))
        terms = {
            f"{way}_labeled": Term(self.settings.w, region_ce_dice(logits, target, ~unlabeled & self.known(truth))),
            f"{way}_pseudo": Term(self.settings.w * self.settings.alpha, region_ce_dice(logits, target, unlabeled)),
        }
        return Group(terms)

    @torch.no_grad()
    def _pseudo_labels(self, batch: Batch) -> Tensor:
        """Return the teacher's hard labels (B, 1, *S) of the whole unlabelled patches."""
        return self.teacher(batch.x_u).argmax(1, keepdim=True)
