"""DyCON: uncertainty-aware consistency (UnCL) and focal entropy-aware contrast (FeCL) with an EMA teacher.

Assefa et al., CVPR 2025, after its supplement; where we depart from the released code docs/method.md says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.consistency import region_ce_dice, soft_ce_dice
from nnunetv2_dycon.losses.fecl import fecl
from nnunetv2_dycon.losses.patches import (
    labels_from_probabilities,
    labels_from_target,
    patch_weight,
    sample_anchors,
)
from nnunetv2_dycon.losses.targets import hard_targets
from nnunetv2_dycon.losses.uncl import entropy_weight, uncl_guarded, uncl_literal
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
from nnunetv2_dycon.methods.mean_teacher import TargetSettings
from nnunetv2_dycon.networks import (
    FeatureTap,
    Guide,
    ProjectionHead,
    Teacher,
    choose_stage,
    full_resolution,
    has_encoder_stages,
)
from nnunetv2_dycon.options import Schedule, Settings, option
from nnunetv2_dycon.schedules import exponential
from nnunetv2_dycon.views import PASSES, View, make_view


@dataclass(frozen=True)
class DyCONTermSettings(TargetSettings):
    """Options of UnCL and FeCL in any framework; the reasons for the starting values are in docs/method.md."""

    target: str | None = option(
        None,
        choices=("mse", "ce_dice"),
        none_text="ce_dice; mse where uncl is given",
        help="how the student is held to the teacher",
    )
    uncl: str | None = option(
        None,
        choices=("literal", "guarded"),
        none_text="literal, where target is mse",
        help="UnCL on squared differences: as in Eq. 1, or its guarded form",
    )
    labels: str = option(
        "soft", choices=("soft", "hard"), help="UnCL's target: the teacher's probabilities or its largest class"
    )
    beta: Schedule = option(Schedule(0.5, 0.05), schedule=True, low=0.001, high=20.0, help="entropy scale of UnCL")
    entropy: str = option("dual", choices=("dual", "teacher", "student"), help="whose entropy weighs UnCL")
    focus: str = option(
        "confident",
        choices=("confident", "uncertain"),
        help="voxels that UnCL weighs most; uncertain needs unclguarded",
    )
    lambdah: float = option(0.0, low=0.0, high=10.0, help="weight of the entropy term of guarded UnCL")
    on: str = option("unlabeled", choices=("unlabeled", "all"), help="patches that UnCL is taken on")
    wuncl: float = option(1.0, low=0.0, high=1000.0, help="weight of UnCL after the ramp")
    wpasted: float = option(1.0, low=0.0, high=1000.0, help="weight of the true labels of what a view pastes")
    wfecl: float = option(0.3, low=0.0, high=1000.0, help="weight of FeCL after the ramp; 0 builds no head")
    feclon: str = option("all", choices=("all", "labeled"), help="patches that FeCL is taken on")
    tau: float = option(0.6, low=0.01, high=10.0, help="temperature of FeCL")
    gamma: float = option(0.8, low=0.0, high=10.0, help="focal exponent of FeCL")
    topk: int = option(16, low=0, high=4096, help="hardest teacher negatives of FeCL; 0 = none")
    anchors: int = option(512, low=0, high=100000, help="patches of an image in FeCL; 0 = all")
    rule: str = option("majority", choices=("majority", "any_foreground"), help="how a patch gets its class")
    gate: float = option(0.8, low=0.0, high=1.0, help="teacher confidence from which an unlabelled patch counts")
    stage: int | None = option(None, low=0, high=20, none_text="stride nearest 8", help="encoder stage of FeCL")

    @property
    def form(self) -> str:
        """What UnCL is: literal, guarded or ce_dice."""
        if self.target == "ce_dice" or (self.target, self.uncl) == (None, None):
            return "ce_dice"
        return self.uncl or "literal"

    @property
    def hard(self) -> bool:
        """Whether UnCL's target is the teacher's largest class."""
        return self.labels == "hard"


@dataclass(frozen=True)
class DyCONSettings(DyCONTermSettings, ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerDyCON; docs/results.md has the trainings that chose view, target, labels and ramp."""

    ramp: float | None = option(
        None,
        low=0.0,
        high=1.0,
        none_text="0p1, at least 800 steps, at most 0p4",
        help="fraction of the training over which unlabelled terms rise",
    )
    view: str = option("bcp", choices=tuple(PASSES), help="what differs between student and teacher input")
    labels: str | None = option(
        None,
        choices=("soft", "hard"),
        none_text="hard; soft where UnCL is on squares",
        help="UnCL's target: the teacher's probabilities or its largest class",
    )
    wuncl: float = option(0.5, low=0.0, high=1000.0, help="weight of UnCL after the ramp")

    @property
    def rampup(self) -> float:
        """Fraction of the training at which the unlabelled terms have their full weight.

        A class takes some hundreds of steps to appear, however long the training is. Where the teacher teaches before
        that, its labels say that the class is absent, and the student may never learn it.
        """
        return max(0.1, min(0.4, 800 / (self.epochs * self.iters))) if self.ramp is None else self.ramp

    @property
    def hard(self) -> bool:
        """Whether UnCL's target is the teacher's largest class."""
        return self.form == "ce_dice" if self.labels is None else super().hard


PAPER = DyCONSettings(
    view="noise",
    target="mse",
    ema=0.99,
    ramp=0.0,
    delay=0.0,
    beta=Schedule(5.0, 0.5),
    on="all",
    wuncl=0.5,
    wfecl=0.5,
    gamma=2.0,
)


class Pair(NamedTuple):
    """Who learns from whom: a network that is trained, and what it compares its voxels and patches with.

    Attributes
    ----------
    learner : nn.Module
        The network that is trained, wrapped or not.
    guide : Guide
        The network that gives the targets.
    tap : FeatureTap or None
        The learner's encoder features; None without FeCL.
    head : callable or None
        Turns the guide's encoder features (B, F, *G) into embeddings (B, n, d); None without FeCL.
    """

    learner: nn.Module
    guide: Guide
    tap: FeatureTap | None
    head: Callable[[Tensor], Tensor] | None


class DyCONTerms(ViewMethod):
    """UnCL and FeCL of a pair of networks; a framework says which pairs there are."""

    def build_head(self, student: nn.Module) -> bool:
        """Make the projection head and choose its stage; returns whether FeCL is on.

        Raises
        ------
        ConfigError
            If FeCL is on and the network has no `encoder.stages`, or the stage does not exist, or options contradict
            each other.
        """
        s = self.settings
        if s.target == "ce_dice" and s.uncl is not None:
            raise ConfigError(f"option uncl{s.uncl} is a form on squared differences; leave targetce_dice out.")
        if s.lambdah and s.form != "guarded":
            raise ConfigError("option lambdah: guarded UnCL alone has this term; add _unclguarded.")
        if s.focus == "uncertain" and s.form == "literal":
            raise ConfigError(
                "option focusuncertain: literal UnCL is Eq. 1, which weighs confident voxels most; add _unclguarded."
            )
        if s.labels == "hard" and s.form != "ce_dice":
            squares = f"uncl{s.uncl}" if s.uncl else "targetmse"
            raise ConfigError(f"option labelshard: UnCL on squares compares probabilities; leave {squares} out.")
        if s.wfecl == 0:
            return False
        if not has_encoder_stages(student):
            raise ConfigError(
                f"{type(student).__name__} has no encoder.stages for FeCL; add _wfecl0 to the trainer name."
            )
        stages = len(student.encoder.stages)
        self.stage = choose_stage(student.encoder.strides) if s.stage is None else s.stage
        if self.stage >= stages:
            raise ConfigError(f"option stage{self.stage}: the network has encoder stages 0 to {stages - 1}.")
        self.head = ProjectionHead(student.encoder.output_channels[self.stage], seed=self.task.seed)
        return True

    def figures(self, t: float) -> dict[str, float]:
        """Return the scheduled numbers at fraction `t` of the training, for the log."""
        return {
            **super().figures(t),
            "beta": exponential(t, self.settings.beta.start, self.settings.beta.end),
        }

    def unlabeled_terms(
        self, pair: Pair, teach: Callable[[Tensor], tuple[Tensor | None, Tensor]], batch: Batch, view: View
    ) -> Group:
        """Return UnCL and FeCL of one view of the unlabelled patches; `teach` is `self.teach` of the pair."""
        if self.settings.feclon == "labeled":
            pair = pair._replace(head=None)
        taught, target = teach(view.teacher)
        target = view.mix(target)
        if view.mixes:
            taught = self._teach_features(pair, view.student)
        logits = full_resolution(pair.learner(view.student))
        share = self._unlabeled_share(batch)
        terms = self._uncl(logits, target, batch, share if self.settings.on == "all" else 1.0, view.pasted)
        if view.pasted is not None:
            terms["pasted"] = Term(self.settings.wpasted, region_ce_dice(logits, view.truth, view.pasted))
        terms.update(self.framework_terms(logits, target, batch))
        stats = {"agreement": agreement(logits, target)}
        features = None if pair.tap is None else pair.tap.take()
        if pair.head is not None:
            with torch.no_grad():
                labels = labels_from_probabilities(
                    torch.softmax(target.float(), 1),
                    features.shape[2:],
                    gate=self.settings.gate,
                    rule=self.settings.rule,
                )
            terms["fecl_unlabeled"] = self._fecl(pair, features, labels, taught, logits, batch, share)
            stats["patches_kept"] = (labels >= 0).float().mean()
            stats["foreground_patches"] = (labels > 0).float().mean()
        return Group(terms, stats)

    def labeled_terms(self, pair: Pair, batch: Batch) -> Group:
        """Return nnU-Net's own loss, FeCL with the true labels, and UnCL too with option `onall`."""
        share = 1.0 - self._unlabeled_share(batch)
        target = None
        if self.settings.on == "all":
            noise = "noise" if self.settings.view == "noise" else "weak"
            taught, target = self.teach(pair, make_view(noise, batch.x_l, generator=batch.generator).teacher)
        else:
            taught = self._teach_features(pair, batch.x_l)
        outputs = pair.learner(batch.x_l)
        logits = full_resolution(outputs)
        terms = {"supervised": Term(1.0, batch.supervised(outputs))}
        if target is not None:
            terms.update({f"{name}_labeled": term for name, term in self._uncl(logits, target, batch, share).items()})
        if pair.head is not None:
            features = pair.tap.take()
            labels = labels_from_target(
                batch.y_l,
                features.shape[2:],
                num_classes=self.task.classes,
                ignore_label=self.task.ignore_label,
                rule=self.settings.rule,
            )
            share = 1.0 if self.settings.feclon == "labeled" else share
            terms["fecl_labeled"] = self._fecl(pair, features, labels, taught, logits, batch, share)
        return Group(terms)

    def framework_terms(self, logits: Tensor, target: Tensor, batch: Batch) -> dict[str, Term]:
        """Return what the framework adds for unlabelled logits and targets (B, C, *S)."""
        return {}

    def teach(self, pair: Pair, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the guide's features (None where FeCL asks for none) and logits for (B, C, *S), in one pass."""
        if pair.head is None or self.settings.topk == 0:
            return None, pair.guide(x)
        return pair.guide.features_and_logits(x, self.stage)

    def _teach_features(self, pair: Pair, x: Tensor) -> Tensor | None:
        """Return the guide's features for (B, C, *S) without running its decoder, None where FeCL asks for none."""
        if pair.head is None or self.settings.topk == 0:
            return None
        return pair.guide.encode(x)[self.stage]

    def _unlabeled_share(self, batch: Batch) -> float:
        """Return the unlabelled share of the patches, so that means over both halves are means over all patches."""
        return len(batch.x_u) / (len(batch.x_u) + len(batch.x_l))

    def _uncl(
        self, logits: Tensor, target: Tensor, batch: Batch, share: float, pasted: Tensor | None = None
    ) -> dict[str, Term]:
        """Return both parts of UnCL for student and teacher logits (B, C, *S).

        On cross-entropy and Dice it is the mean outside of what was `pasted` (B, 1, *S): true labels have a term of
        their own. The forms on squares take all voxels, as in Eq. 1.
        """
        s = self.settings
        beta = exponential(batch.t, s.beta.start, s.beta.end)
        weight = s.wuncl * self.ramp(batch) * share
        if s.form == "ce_dice":
            voxels = entropy_weight(logits, target, beta=beta, entropy=s.entropy, focus=s.focus)
            if pasted is not None:
                taught = (~pasted[:, 0]).float()
                voxels = voxels * taught / taught.mean().clamp_min(1e-12)
            q = hard_targets(target).one_hot if s.hard else torch.softmax(target.float(), 1)
            return {"uncl": Term(weight, soft_ce_dice(logits, q, voxels))}
        if s.form == "literal":
            parts = uncl_literal(logits, target, beta=beta, entropy=s.entropy)
            return {"uncl": Term(weight, parts.consistency), "uncl_entropy": Term(weight, parts.entropy)}
        parts = uncl_guarded(logits, target, beta=beta, entropy=s.entropy, focus=s.focus)
        return {
            "uncl": Term(weight, parts.consistency),
            "uncl_entropy": Term(weight * s.lambdah, parts.entropy),
        }

    def _fecl(
        self,
        pair: Pair,
        features: Tensor,
        labels: Tensor,
        taught: Tensor | None,
        logits: Tensor,
        batch: Batch,
        share: float,
    ) -> Term:
        """Return FeCL of the learner's features (B, F, *G) with patch labels (B, n).

        `taught` are the guide's features of the same input or None, `logits` (B, C, *S) the learner's.
        """
        s = self.settings
        z = self.head(features)
        with torch.no_grad():
            chosen, labels = sample_anchors(labels, s.anchors, batch.generator)
            teacher = None if taught is None else _at(pair.head(taught), chosen)
            weight = _at(patch_weight(logits, features.shape[2:])[..., None], chosen)[..., 0]
        value = fecl(_at(z, chosen), labels, teacher=teacher, weight=weight, tau=s.tau, gamma=s.gamma, topk=s.topk)
        return Term(s.wfecl * self.ramp(batch) * share, value)


class DyCON(DyCONTerms):
    """UnCL on the full-resolution output, FeCL on the patches of one encoder stage."""

    settings_type: ClassVar[type[Settings]] = DyCONSettings

    def build(self, student: nn.Module) -> None:
        """Make teacher, projection head, its EMA copy and the tap on the student's encoder."""
        super().build(student)
        self.tap = self.teacher_head = None
        if self.build_head(student):
            self.teacher_head = Teacher(self.head)
            self.tap = FeatureTap(student, self.stage)

    def unlabeled(self, student: nn.Module, batch: Batch) -> tuple[Pass, ...]:
        """Return UnCL and FeCL of the unlabelled patches, one pass for each view."""
        pair = self._pair(student)
        teach = cache(partial(self.teach, pair))  # one pass of the teacher for all views of the same patches
        return passes(self.views(batch), partial(self.unlabeled_terms, pair, teach, batch))

    def labeled(self, student: nn.Module, batch: Batch) -> Group:
        """Return the terms of the labelled patches."""
        return self.labeled_terms(self._pair(student), batch)

    def after_step(self, student: nn.Module, step: int) -> None:
        """Move teacher and teacher head towards student and head."""
        super().after_step(student, step)
        if self.teacher_head is not None:
            self.teacher_head.update(self.head, self.decay(step))

    def _pair(self, student: nn.Module) -> Pair:
        return Pair(student, self.teacher, self.tap, self.teacher_head)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` (B, m) of values (B, n, d) as (B, m, d)."""
    return torch.gather(values, 1, index[..., None].expand(-1, -1, values.shape[-1]))
