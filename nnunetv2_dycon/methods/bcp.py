"""BCP: bidirectional copy-paste between labelled and unlabelled patches.

Bai et al., CVPR 2023. Every other patch is mixed in the one direction, the others in the other. Unlike there, true
labels are taught on the labelled patches as they are, and the mixes teach pseudo-labels (docs/results_choices.md).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunetv2_dycon.methods.settings import TeacherSettings, UnlabeledSettings, learned_option, paste_option
from nnunetv2_dycon.options import option
from nnunetv2_dycon.pieces import OnePiece, largest_pieces
from nnunetv2_dycon.schedules import gaussian_ramp
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import BCP_BOX_SIDE, Outputs


@dataclass(frozen=True)
class BCPSettings(UnlabeledSettings, TeacherSettings):
    """Options of nnUNetTrainerBCP."""

    renamed: ClassVar[Mapping[str, str]] = {"unmixed": "truthboth"}

    learned: float = learned_option(0.5)
    paste: float = paste_option(0.5)
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
    truth: str = option(
        "patches",
        neutral="both",
        choices=("patches", "mixes", "both"),
        help="where true labels are taught: on labelled patches as they are, on the labelled regions of mixes once all "
        "classes are learnt (mixes: from then on there alone), or on both",
    )
    largest: str = option(
        "labeled",
        neutral="none",
        choices=("labeled", "all", "none"),
        help="classes whose pseudo-labels keep their largest connected piece in a patch alone: those that labelled "
        "patches show in one piece, all, or none",
    )

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Add `ramp`: 0 while pastes are among labelled patches, then the factor of the pseudo-labels."""
        return {**super().schedules(), "ramp": partial(gaussian_ramp, rampup=self.rampup, delay=self.pretrain)}

    @classmethod
    def translated(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """Rename options. Where `unmixed` was off, the labelled patches left when all classes were learnt.

        `largest` was a switch for all classes.
        """
        if "unmixed" in stored:
            stored["truth"] = "both" if stored.pop("unmixed") else "mixes"
        if isinstance(stored.get("largest"), bool):
            stored["largest"] = "all" if stored["largest"] else "none"
        return super().translated(stored)


class BCP(Method[BCPSettings]):
    """Boxes pasted both ways between labelled and unlabelled patches, the teacher's labels on the unlabelled side."""

    settings_type = BCPSettings

    def build(self, student: nn.Module) -> None:
        """Make the teacher, and with option `largestlabeled` the counts of pieces."""
        super().build(student)
        self.one_piece = OnePiece(self.data.classes) if self.settings.largest == "labeled" else None

    def passes(self, student: nn.Module, batch: Batch) -> Iterator[Pass]:
        """Yield the passes of the mixes, or before they begin that of option `pretrain`, if any.

        The labelled patches as they are come last. They are alone until the labels have taught the first class. With
        option `truthmixes` they, and pastes among them, leave the mixes alone when all classes are learnt.
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
        yield from self.pastes(pair, batch)
        yield self.labeled_pass(pair, batch)

    @property
    def _mixed_only(self) -> bool:
        """Whether a step that mixes has no pass of the labelled patches as they are."""
        return self.settings.truth == "mixes" and self.learned.share == 1

    @torch.no_grad()
    def ask_unlabeled(self, p: Pass, batch: Batch, before: Answer | None) -> Answer:
        """Return the teacher's answer, by option `largest` without what is not in the largest piece of its class."""
        answer = super().ask_unlabeled(p, batch, before)
        if self.settings.largest == "none":
            return answer
        classes = None if self.one_piece is None else self.one_piece.classes
        return answer._replace(target=p.view.mix(largest_pieces(answer.logits, classes)))

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return the loss of the teacher's labels, and with option `truth` that of true ones where they show."""
        logits, target, pasted = full_resolution(outputs), answer.target, p.view.pasted
        labels, weight = target.argmax(1, keepdim=True), self.voxel_weight(logits, target, batch)
        w = self.settings.w / p.view.share  # each direction has the whole weight
        of_pseudo = self.region_loss(logits, labels, ~pasted, weight, pseudo=True)
        terms = {"pseudo": Term(w * self.settings.alpha * batch.now["ramp"], of_pseudo)}
        if self._mixed_only:
            self.learned.see(0, logits, labels.masked_fill(~pasted, -1))
            terms["labeled"] = Term(w, self._at_each_level(outputs, labels, pasted, batch))
        elif self.settings.truth == "both" and self.learned.share == 1:
            terms["labeled"] = Term(w, self.region_loss(logits, labels, pasted))
        return Cost(terms, {"agreement": agreement(logits, target)})

    def labeled_terms(self, p: Pass, outputs: Outputs, answer: Any, batch: Batch) -> Cost:
        """Return the labelled terms, and count the pieces of each class in the truth."""
        if self.one_piece is not None:
            self.one_piece.see(batch.y_l)
        return super().labeled_terms(p, outputs, answer, batch)

    def _at_each_level(self, outputs: Outputs, labels: Tensor, region: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a region, labels and region both (B, 1, *S), at each output as nnU-Net weighs its own."""
        each = [outputs] if isinstance(outputs, Tensor) else outputs
        values = []
        for logits, (weight, _) in zip(each, batch.levels, strict=True):
            if weight:
                there, y = (interpolate(x.float(), logits.shape[2:]) for x in (region, labels))  # the nearest voxel
                values.append(weight * self.region_loss(logits, y.long(), there > 0))
        return torch.stack(values).sum()
