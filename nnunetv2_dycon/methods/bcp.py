"""BCP: bidirectional copy-paste between labelled and unlabelled patches.

Bai et al., CVPR 2023. Every other patch is mixed in the one direction, the others in the other. Until all classes are
learnt the student keeps nnU-Net's own loss on the labelled patches as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.methods.settings import TeacherSettings, UnlabeledSettings
from nnunetv2_dycon.options import option
from nnunetv2_dycon.schedules import gaussian_ramp
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import BCP_BOX_SIDE, Outputs


@dataclass(frozen=True)
class BCPSettings(UnlabeledSettings, TeacherSettings):
    """Options of nnUNetTrainerBCP."""

    view: str = option(
        "copy_paste_either",
        neutral="bcp",
        choices=("bcp", "copy_paste_in", "copy_paste_out", "copy_paste_either", "bcp_intensity"),
        help="mixes: labelled patches with an unlabelled box (in), unlabelled patches with a labelled box (out), every "
        "other patch in one direction (either), or each patch in both directions, in two passes (bcp)",
    )
    pretrain: float = option(
        0.0, low=0.0, high=1.0, help="fraction of the training that pastes among labelled patches only"
    )
    rampup: float = option(
        0.0,
        low=0.0,
        high=1.0,
        help="fraction of the training after which pseudo-labels have their full weight; 0 = at once",
    )
    w: float = option(0.5, low=0.0, high=1000.0, help="weight of the loss on mixed patches")
    alpha: float = option(0.5, low=0.0, high=1.0, help="weight of a pseudo-labelled region relative to a labelled one")
    unmixed: bool = option(
        False,
        flag=True,
        neutral=True,
        help="also train on the unmixed labelled patches after all classes are learnt",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paste and not self.unmixed:
            raise ConfigError("option paste: its pastes go with the unmixed labelled patches; type _unmixed too.")

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Add `ramp`: 0 while pastes are among labelled patches, then the factor of the pseudo-labels."""
        return {**super().schedules(), "ramp": partial(gaussian_ramp, rampup=self.rampup, delay=self.pretrain)}


class BCP(Method[BCPSettings]):
    """Boxes pasted both ways between labelled and unlabelled patches, the teacher's labels on the unlabelled side."""

    settings_type = BCPSettings

    def passes(self, student: nn.Module, batch: Batch) -> Iterator[Pass]:
        """Yield the passes of the mixes, or before they begin that of option `pretrain`, if any.

        The labelled patches as they are come last. They are alone until the labels have taught the first class, and
        leave the mixes alone when these have taught all.
        """
        (pair,) = self.pairs(student)
        if batch.now["ramp"]:
            for view in self.views(batch):
                last = self._mixed_only and not view.name.startswith("in_")
                yield Pass(pair, view, self.ask_unlabeled, self._terms_of_learned, final=last)
            if self._mixed_only:
                return
        elif self.settings.pretrain:
            yield self.paste_pass(pair, batch, self.settings.w, BCP_BOX_SIDE)
        if self.paste:
            yield self.paste_pass(pair, batch, self.paste)
        yield self.labeled_pass(pair, batch)

    @property
    def _mixed_only(self) -> bool:
        """Whether a step that mixes has no pass of the labelled patches as they are."""
        return not self.settings.unmixed and self.learned.share == 1

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return the losses of both regions: true labels where a labelled patch shows, else the teacher's."""
        logits, target, pasted = full_resolution(outputs), answer.target, p.view.pasted
        labels, weight = target.argmax(1, keepdim=True), self.voxel_weight(logits, target, batch)
        w = self.settings.w / p.view.share  # each direction has the whole weight
        if self._mixed_only:
            self.learned.see(0, logits, labels.masked_fill(~pasted, -1))
            of_labeled = self._at_each_level(outputs, labels, pasted, batch)
        else:
            of_labeled = self.region_loss(logits, labels, pasted)
        return Cost(
            {
                "labeled": Term(w * self.learned.share, of_labeled),
                "pseudo": Term(
                    w * self.settings.alpha * batch.now["ramp"],
                    self.region_loss(logits, labels, ~pasted, weight, pseudo=True),
                ),
            },
            {"agreement": agreement(logits, target)},
        )

    def _at_each_level(self, outputs: Outputs, labels: Tensor, region: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a region, labels and region both (B, 1, *S), at each output as nnU-Net weighs its own."""
        each = [outputs] if isinstance(outputs, Tensor) else outputs
        values = []
        for logits, (weight, _) in zip(each, batch.levels, strict=True):
            if weight:
                there, y = (interpolate(x.float(), logits.shape[2:]) for x in (region, labels))  # the nearest voxel
                values.append(weight * self.region_loss(logits, y.long(), there > 0))
        return torch.stack(values).sum()
