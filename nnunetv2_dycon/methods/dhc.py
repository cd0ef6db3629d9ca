"""DHC: co-training of two networks, one that weighs classes by their difficulty and one that does by their rarity.

Wang et al., MICCAI 2023; docs/many_organs.md has what differs from its released code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_dycon import ranks
from nnunetv2_dycon.learned import class_counts
from nnunetv2_dycon.losses.class_weighted import class_weighted
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.options import option
from nnunetv2_dycon.step import Answer, Batch, Cost, DataInfo, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import Outputs

RARITY_DECAY = 0.99  # share of the old class shares that a step keeps
DIFFICULTY_DECAY = 49 / 50  # the same of what was learnt and unlearnt
RAREST = 1e-6  # share of the voxels below which a class gets no rarer: absent ones must not outweigh all others
_TINY = 1e-8


@dataclass(frozen=True)
class DHCSettings(CPSSettings):
    """Options of nnUNetTrainerDHC."""

    w: float = option(0.1, low=0.0, high=1000.0, help="weight of the cross pseudo supervision after the ramp")


class DHC(CPS):
    """Co-training with class weights: by difficulty for the first network, by rarity for the second."""

    settings_type = DHCSettings
    shares: Tensor
    dice: Tensor
    learning: Tensor
    unlearning: Tensor
    error: Tensor

    def __init__(self, settings: DHCSettings, data: DataInfo, seed: int = 0) -> None:
        super().__init__(settings, data, seed)
        zeros = torch.zeros(data.classes)
        self.register_buffer("shares", zeros.clone())  # of the voxels, averaged over steps; 0 before the first
        self.register_buffer("dice", zeros + _TINY)  # of the last step that showed a class
        self.register_buffer("learning", zeros.clone())
        self.register_buffer("unlearning", zeros.clone())
        self.register_buffer("error", zeros + 1.0)
        self._counts: Tensor | None = None
        self._truth = self._said = zeros
        self._from_labels = True

    def class_weight(self, ending: str) -> Tensor:
        """Return the weight (C,) of each class, the largest is C, for the network of the pair with this ending.

        Rarity is `log(max n / n_c)`, with n the voxels of each class: the largest class, background, gets 0. Difficulty
        is `(u / l)^(1/5) (1 - d)`, with u and l what Dice d has lately lost and gained. Before the first step all weigh
        the same.
        """
        if not ending:
            weight = ((self.unlearning + _TINY) / (self.learning + _TINY)) ** 0.2 * self.error
        else:
            n = self.shares.clamp_min(RAREST)
            weight = (n.max() / n).log() if self.shares.any() else torch.ones_like(n)
        return len(weight) * weight / weight.max().clamp_min(_TINY)

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return class-weighted cross-entropy (or option `ga`) against the hard labels of the other network."""
        logits, target = full_resolution(outputs), answer.target
        if not p.pair.ending:
            self._said = self._shares_of(answer.logits.argmax(1))
        term = self._cross(p, logits, target, batch, len(batch.x_u))
        return Cost({"cps": term}, {"agreement": agreement(logits, target)})

    @torch.no_grad()
    def ask_labeled(self, p: Pass, batch: Batch, before: Any) -> Tensor:
        """Return what the other network says of the labelled patches."""
        return full_resolution(p.pair.teacher.network(batch.x_l))

    def labeled_terms(self, p: Pass, outputs: Outputs, answer: Tensor, batch: Batch) -> Cost:
        """Return class-weighted Dice and cross-entropy at each output, and the cross supervision here too."""
        logits, weight = full_resolution(outputs), self.class_weight(p.pair.ending)
        if not p.pair.ending:
            self._counts = class_counts(logits, batch.y_l, self.data.ignore_label)
            self._truth = self._shares_of(batch.y_l)
            self._from_labels = batch.now["ramp"] == 0

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            if self.settings.ga:
                return self.gradient_aware(logits, labels, self.settings.gahardest, class_weight=weight)
            ignore, everywhere = self.data.ignore_label, ranks.mean_everywhere
            parts = class_weighted(logits, labels, weight, ignore_label=ignore, everywhere=everywhere)
            return parts.dice + parts.ce

        supervised = Term(1.0, batch.at_each_level(loss, outputs))
        learned, target, _ = self.of_learned(logits, answer)
        cross = self._cross(p, learned, target, batch, len(batch.x_l))
        return Cost({"supervised": supervised, "cps_labeled": cross})

    def after_step(self, student: nn.Module, number: int) -> None:
        """Take over what this step says of each class; the second network has moved by its own gradient."""
        if self._counts is None:
            return
        first = ~self.shares.any()
        now = self._truth if self._from_labels else torch.where(first, self._truth, self._said)
        now = ranks.mean_everywhere(now)
        self.shares.copy_(torch.where(first, now, torch.lerp(now, self.shares, RARITY_DECAY)))
        right, wrong, missed = ranks.mean_everywhere(self._counts)
        dice = (2 * right + _TINY) / (2 * right + wrong + missed + 2 * _TINY)
        change = (dice - self.dice) * (dice / self.dice).log()  # never negative
        shown = right + wrong + missed > 0
        for average, value in (
            (self.learning, torch.where(dice > self.dice, change, 0.0)),
            (self.unlearning, torch.where(dice > self.dice, 0.0, change)),
            (self.error, 1 - dice),
        ):
            average.copy_(torch.where(shown, torch.lerp(value, average, DIFFICULTY_DECAY), average))
        self.dice.copy_(torch.where(shown, dice, self.dice))
        self._counts = None

    def _cross(self, p: Pass, logits: Tensor, target: Tensor, batch: Batch, patches: int) -> Term:
        """Return the term against the hard labels of the other network, for a number of all the patches."""
        labels, weight = target.argmax(1, keepdim=True), self.class_weight(p.pair.ending)
        if self.settings.ga:
            value = self.gradient_aware(logits, labels, class_weight=weight)
        else:
            value = class_weighted(logits, labels, weight, everywhere=ranks.mean_everywhere).ce
        return Term(self.settings.w * batch.now["ramp"] * patches / (len(batch.x_u) + len(batch.x_l)), value)

    def _shares_of(self, labels: Tensor) -> Tensor:
        """Return the share (C,) of each class among the voxels that have a label."""
        counted = labels[(labels >= 0) & (labels < self.data.classes)].long()
        counts = torch.bincount(counted, minlength=self.data.classes).to(self.shares.dtype)
        return counts / counts.sum().clamp_min(1.0)
