"""MagicNet: cubes exchanged between labelled and unlabelled patches, cubes seen alone, and pseudo-labels from both.

Chen et al., CVPR 2023; docs/many_organs.md has what differs from its released code, which puts cubes back elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nnunetv2_dycon import ranks
from nnunetv2_dycon.cubes import draw_exchange, exchange, fitting_cubes, partition, recover
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.voxels import hard_targets, widen
from nnunetv2_dycon.methods.settings import TeacherSettings, ViewSettings
from nnunetv2_dycon.networks import CubeClassifier, FeatureTap, has_encoder_stages, total_stride
from nnunetv2_dycon.options import option
from nnunetv2_dycon.step import Answer, Batch, Cost, DataInfo, Method, Pass, Term, agreement, full_resolution
from nnunetv2_dycon.views import Outputs, View

MEMORY = 20  # steps whose pseudo-labels say how large a class is


@dataclass(frozen=True)
class MagicNetSettings(ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerMagicNet; the weights are the paper's for a supervised loss of weight 1."""

    view: str = option(
        "noise", choices=("weak", "noise", "intensity"), help="what differs between student and teacher input"
    )
    cubes: int = option(2, low=2, high=16, help="cubes per axis; an axis where they do not fit the network stays whole")
    w: float = option(0.4, low=0.0, high=1000.0, help="weight of the pseudo-label term after the ramp")
    wcubes: float = option(1.0, low=0.0, high=1000.0, help="weight of the labelled loss in each of across and within")
    wlocation: float = option(
        0.4, low=0.0, high=1000.0, help="weight of the classification of a cube's place; 0 = no classifier"
    )
    noacross: bool = option(False, flag=True, help="no cubes exchanged between patches")
    nowithin: bool = option(
        False, flag=True, help="no single cubes as inputs, so no classification and no blending either"
    )
    noblend: bool = option(False, flag=True, help="pseudo-labels of the teacher alone")


M = TypeVar("M", bound=MagicNetSettings)


class MagicNet(Method[M]):
    """Cubes exchanged between patches, single cubes as inputs, and pseudo-labels of teacher and cubes, blended."""

    settings_type = MagicNetSettings
    recent: Tensor

    def __init__(self, settings: M, data: DataInfo, seed: int = 0) -> None:
        super().__init__(settings, data, seed)
        # Share of each class in the pseudo-labels of the last steps, the latest first.
        self.register_buffer("recent", torch.zeros(MEMORY, data.classes))
        self._now: Tensor | None = None
        self._of_cubes: Tensor | None = None

    def build(self, student: nn.Module) -> None:
        """Make the teacher, say how patches are cut, and make the classifier of cubes.

        Raises
        ------
        ConfigError
            If the network does not tell its strides, or the patch cannot be cut.
        """
        super().build(student)
        self.cubes: tuple[int, ...] = ()
        self.location: CubeClassifier | None = None
        if self.settings.noacross and self.settings.nowithin:
            return
        if not has_encoder_stages(student):
            raise ConfigError(
                f"{type(student).__name__} has no encoder.stages that tell its stride, so its patches cannot be cut "
                "into cubes: type _noacross_nowithin, or train another method."
            )
        self.cubes = fitting_cubes(self.data.patch, total_stride(student), self.settings.cubes)
        if self.settings.wlocation and not self.settings.nowithin:
            encoder: Any = student.encoder
            self.location = CubeClassifier(encoder.output_channels[-1], self.cubes, seed=self.seed)
            self.location_tap = FeatureTap(student, len(encoder.stages) - 1)

    def describe(self) -> str:
        """Return how patches are cut."""
        return f"cubes {' x '.join(map(str, self.cubes))}" if self.cubes else "no cubes"

    def passes(self, student: nn.Module, batch: Batch) -> Iterator[Pass]:
        """Yield a pass of cubes alone, one of exchanged cubes, both of all patches; then the labelled patches."""
        (pair,) = self.pairs(student)
        (view,) = self.views(batch)
        if not self.settings.nowithin:
            yield Pass(pair, self._alone(batch, view), lambda p, batch, before: None, self._terms_within)
        if self.settings.noacross:
            yield Pass(pair, view, self.ask_unlabeled, self._terms_of_blended)
        else:
            yield Pass(pair, self._exchanged(batch, view), self.ask_unlabeled, self._terms_across)
        yield from self.pastes(pair, batch)
        yield self.labeled_pass(pair, batch)

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return cross-entropy plus Dice (or option `ga`) against the pseudo-labels."""
        logits, target = full_resolution(outputs), answer.target
        value = self.pseudo_loss(logits, hard_targets(target), self.voxel_weight(logits, target, batch))
        term = Term(self.settings.w * batch.now["ramp"], value)
        return Cost({"pseudo": term}, {"agreement": agreement(logits, target)})

    def after_step(self, student: nn.Module, number: int) -> None:
        """Move the teacher, and take over the class shares of this step."""
        super().after_step(student, number)
        if self._now is not None:
            self.recent.copy_(torch.cat([self._now[None], self.recent[:-1]]))
            self._now = None

    # -------------------------------------------------------------------------------------------------- the views
    def _alone(self, batch: Batch, view: View) -> View:
        """Return the cubes of labelled and unlabelled patches, each an input of its own."""
        x = torch.cat([batch.x_l, view.student])
        return View(partition(x, self.cubes), restore=partial(recover, cubes=self.cubes))

    def _exchanged(self, batch: Batch, view: View) -> View:
        """Return labelled and unlabelled patches that have exchanged cubes, at each place in another way."""
        x = torch.cat([batch.x_l, view.student])
        origin = draw_exchange(len(x), len(partition(x[:1], self.cubes)), x.device, batch.generator)
        return replace(
            view,
            student=exchange(x, origin, self.cubes),
            restore=partial(exchange, origin=origin.argsort(0), cubes=self.cubes),
        )

    # -------------------------------------------------------------------------------------------------- the terms
    def _terms_within(self, p: Pass, outputs: Outputs, answer: None, batch: Batch) -> Cost:
        """Return what cubes alone cost where there are labels, and how well they tell their place."""
        labeled, unlabeled = _halves(outputs, len(batch.x_l))
        self._of_cubes = full_resolution(unlabeled).detach()
        terms = {"within": Term(self.settings.wcubes, self.supervised_loss(labeled, batch))}
        if self.location is None:
            return Cost(terms)
        logits = self.location(self.location_tap.take())
        place = torch.arange(logits.shape[1], device=logits.device).repeat(len(logits) // logits.shape[1])
        terms["location"] = Term(self.settings.wlocation, cross_entropy(logits, place))
        return Cost(terms, {"cubes_placed": (logits.argmax(1) == place).float().mean()})

    def _terms_across(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return what exchanged cubes cost after they were put back: with labels, and with pseudo-labels."""
        count, restore = len(batch.x_l), p.view.restore
        labeled, unlabeled = _halves(outputs, count)
        of_unlabeled = p._replace(view=replace(p.view, restore=lambda x: restore(x)[count:]))
        cost = self._terms_of_blended(of_unlabeled, unlabeled, answer, batch)
        across = Term(self.settings.wcubes, self.supervised_loss(labeled, batch))
        return cost._replace(terms={"across": across, **cost.terms})

    def _terms_of_blended(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return the unlabelled terms with the blended pseudo-labels."""
        return self._terms_of_learned(p, outputs, answer._replace(target=self._blended(answer.target)), batch)

    @torch.no_grad()
    def _blended(self, target: Tensor) -> Tensor:
        """Return logits (B, C, *S) of the teacher and of the student's cubes, the larger a class the more of cubes.

        At a voxel that the teacher gives class c the cubes have the share n_c / max n, n the voxels of each class in
        the pseudo-labels of the last steps.
        """
        cubes, self._of_cubes = self._of_cubes, None
        if cubes is not None and not self.settings.noblend:
            sizes = self.recent.sum(0)
            share = (sizes / sizes.max().clamp_min(1e-12))[target.argmax(1, keepdim=True)]
            target = torch.lerp(widen(target), widen(cubes), share.to(widen(target[:0]).dtype))
        counts = torch.bincount(target.argmax(1).flatten(), minlength=self.data.classes).to(self.recent.dtype)
        self._now = ranks.mean_everywhere(counts / counts.sum())
        return target


def _halves(outputs: Outputs, count: int) -> tuple[Outputs, Outputs]:
    """Return the outputs for the first `count` patches and for the others, one or a list of each."""
    if isinstance(outputs, Tensor):
        return outputs[:count], outputs[count:]
    return [output[:count] for output in outputs], [output[count:] for output in outputs]
