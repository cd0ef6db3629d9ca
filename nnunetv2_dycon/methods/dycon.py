"""DyCON: uncertainty-aware consistency (UnCL) and focal entropy-aware contrast (FeCL), in any framework.

Assefa et al., CVPR 2025, after its supplement; where we depart from the released code docs/authors_code.md says why.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from nnunetv2_dycon import ranks
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.patches import (
    Rule,
    covered_share,
    fecl,
    labels_from_probabilities,
    labels_from_truth,
    patch_weight,
    sample_anchors,
)
from nnunetv2_dycon.losses.voxels import Entropy, Focus, Form, entropy_weight, hard_targets, soft_ce_dice, uncl
from nnunetv2_dycon.methods.settings import TeacherSettings, ViewSettings
from nnunetv2_dycon.networks import FeatureTap, ProjectionHead, Teacher, choose_stage, has_encoder_stages
from nnunetv2_dycon.options import Schedule, Settings, option
from nnunetv2_dycon.schedules import exponential
from nnunetv2_dycon.step import Answer, Batch, Cost, Method, Pass, Term, average_, full_resolution
from nnunetv2_dycon.views import Outputs, noisy


@dataclass(frozen=True)
class DyCONTermSettings(Settings):
    """Options of UnCL and FeCL in any framework; docs/method.md has the reasons for the values.

    The framework's settings follow this class in the list of bases, so that their defaults hold.
    """

    renamed: ClassVar[Mapping[str, str]] = {**ViewSettings.renamed, "uncl": "loss", "labels": "target"}

    loss: str = option(
        "own",
        choices=("own", "literal", "guarded", "ce_dice"),
        help="UnCL: its weight on the framework's own loss, or in addition to it on squared differences (Eq. 1, or its "
        "guarded form) or on cross-entropy and Dice",
    )
    target: Literal["soft", "hard"] | None = option(
        None,
        choices=("soft", "hard"),
        none_text="hard with lossce_dice, else soft",
        help="target of UnCL in addition to the framework's loss: the teacher's probabilities or its largest class",
    )
    beta: Schedule = option(
        Schedule(0.5, 0.05), schedule=True, low=0.001, high=20.0, help="entropy scale of UnCL, per unit of H / ln C"
    )
    nats: bool = option(False, flag=True, help="beta of lossliteral is per nat of entropy")
    entropy: Entropy = option("dual", choices=("dual", "teacher", "student"), help="whose entropy UnCL uses")
    focus: Focus = option(
        "confident",
        choices=("confident", "uncertain"),
        help="voxels with the largest weight in UnCL; uncertain is refused with lossliteral",
    )
    lambdah: float = option(0.0, low=0.0, high=10.0, help="weight of the entropy term of guarded UnCL")
    on: str = option("unlabeled", choices=("unlabeled", "all"), help="patches that UnCL is taken on")
    wuncl: float = option(1.0, low=0.0, high=1000.0, help="weight of UnCL after the ramp")
    wfecl: float = option(0.3, low=0.0, high=1000.0, help="weight of FeCL after the ramp; 0 = no FeCL")
    feclon: str = option("all", choices=("all", "labeled"), help="patches that FeCL is taken on")
    tau: float = option(0.6, low=0.01, high=10.0, help="temperature of FeCL")
    gamma: float = option(0.8, low=0.0, high=10.0, help="focal exponent of FeCL")
    topk: int = option(16, low=0, high=4096, help="hardest teacher negatives of FeCL; 0 = none")
    anchors: int = option(512, low=0, high=100000, help="patches of an image in FeCL; 0 = all")
    rule: Rule = option("majority", choices=("majority", "any_foreground"), help="how a patch gets its class")
    gate: float = option(0.8, low=0.0, high=1.0, help="teacher confidence from which an unlabelled patch counts")
    stage: int | None = option(None, low=0, high=20, none_text="stride nearest 8", help="encoder stage of FeCL")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "own" and (self.target, self.on, self.wuncl) != (None, "unlabeled", 1.0):
            raise ConfigError("options target, on and wuncl: lossown is the framework's loss with its weight; use w.")
        if self.lambdah and self.loss != "guarded":
            raise ConfigError("option lambdah: guarded UnCL alone has this term; add _lossguarded.")
        if self.focus == "uncertain" and self.loss == "literal":
            raise ConfigError(
                "option focusuncertain: literal UnCL is Eq. 1, which weighs confident voxels most; use _lossguarded."
            )
        if self.target == "hard" and self.loss in ("literal", "guarded"):
            raise ConfigError(
                f"option targethard: UnCL on squared differences compares probabilities; leave loss{self.loss} out."
            )

    @property
    def hard(self) -> bool:
        """Whether UnCL's target is the teacher's largest class."""
        return self.loss == "ce_dice" if self.target is None else self.target == "hard"

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Add `beta`, the entropy scale of UnCL."""
        return {**super().schedules(), "beta": partial(exponential, start=self.beta.start, end=self.beta.end)}

    @classmethod
    def translated(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """Rename options. What `loss` says was said by `target` and `uncl` together, `target` was called `labels`.

        The beta of literal UnCL counted per nat, and the ramp could depend on the length of the training.
        """
        if "uncl" in stored:
            stored = dict(stored)
            distance, form = stored.pop("target"), stored.pop("uncl")
            stored["loss"] = form or ("literal" if distance == "mse" else "ce_dice")
        stored = super().translated({"nats": stored.get("loss") == "literal", **stored})
        if stored.get("rampup", 0.0) is None:
            stored["rampup"] = max(0.1, min(0.4, 800 / (stored["epochs"] * stored["iters"])))
        return stored


@dataclass(frozen=True)
class DyCONSettings(DyCONTermSettings, ViewSettings, TeacherSettings):
    """Options of nnUNetTrainerDyCON: DyCON's losses in the framework of mean teacher."""

    loss: str = option(
        "literal",
        choices=("literal", "guarded", "ce_dice"),
        help="UnCL: on squared differences as in Eq. 1, in its guarded form, or its weight on cross-entropy and Dice",
    )
    wuncl: float = option(8.0, low=0.0, high=1000.0, help="weight of UnCL after the ramp")
    wpasted: float = option(1.0, low=0.0, high=1000.0, help="weight of the true labels of pasted voxels")


PAPER = DyCONSettings(
    view="noise",
    loss="literal",
    ema=0.99,
    rampup=0.0,
    delay=0.0,
    beta=Schedule(5.0, 0.5),
    nats=True,
    learned=0.0,
    on="all",
    wuncl=0.5,
    wfecl=0.5,
    gamma=2.0,
)

D = TypeVar("D", bound=DyCONTermSettings)


class LabeledAnswer(NamedTuple):
    """The teacher's answer for the labelled patches, where asked: features (B, F, *G) and logits (B, C, *S)."""

    features: Tensor | None
    logits: Tensor | None


class DyCONTerms(Method[D]):
    """UnCL and FeCL for every pair of a framework; the framework follows this class in the list of bases."""

    def build(self, student: nn.Module) -> None:
        """Make the framework's modules, a projection head, and a tap on each student's encoder.

        The teacher's embeddings are those of the head's average where the teacher is an average too; in co-training
        one head serves both networks, so that their embeddings can be compared.

        Raises
        ------
        ConfigError
            If FeCL is on and the network has no `encoder.stages`, or not the stage of option `stage`.
        """
        super().build(student)
        self._anchors = torch.zeros(self.data.classes)  # of each class in a step
        self.taps: dict[str, FeatureTap] = {}  # by the ending of the pair; none without FeCL
        self.teacher_head: Teacher | None = None
        if self.settings.wfecl == 0:
            return
        if not has_encoder_stages(student):
            raise ConfigError(
                f"{type(student).__name__} has no encoder.stages for FeCL; add _wfecl0 to the trainer name."
            )
        encoder: Any = student.encoder
        stages = len(encoder.stages)
        self.stage = choose_stage(encoder.strides) if self.settings.stage is None else self.settings.stage
        if self.stage >= stages:
            raise ConfigError(f"option stage{self.stage}: the network has encoder stages 0 to {stages - 1}.")
        self.head = ProjectionHead(encoder.output_channels[self.stage], seed=self.seed)
        if isinstance(self.teacher, Teacher):
            self.teacher_head = Teacher(self.head)
        self.taps = {pair.ending: FeatureTap(pair.student, self.stage) for pair in self.pairs(student)}

    def after_step(self, student: nn.Module, number: int) -> None:
        """Move the teacher's head towards the student's as the teacher moves."""
        super().after_step(student, number)
        if self.teacher_head is not None:
            average_(self.teacher_head.network, self.head, self.decay(number))

    # ------------------------------------------------------------------------------------------ unlabelled patches
    @torch.no_grad()
    def ask_unlabeled(self, p: Pass, batch: Batch, before: Answer | None) -> Answer:
        """Add the teacher's features of the student's input, where FeCL has teacher negatives."""
        wanted = self._wants_features and self.settings.feclon == "all"
        if wanted and not p.view.mixes:
            features, logits = self._features_and_logits(p, p.view.teacher)
            return Answer(p.pair.teacher, p.view.teacher, logits, logits, features)
        answer = super().ask_unlabeled(p, batch, before)
        return answer._replace(extra=self._features(p, p.view.student)) if wanted else answer

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return UnCL, the framework's own terms, and FeCL."""
        logits, share = full_resolution(outputs), self._unlabeled_share(batch)
        of_framework = super().unlabeled_terms(p, outputs, answer, batch)
        terms: dict[str, Term] = {}
        if self.settings.loss != "own":
            of_unlabeled = share if self.settings.on == "all" else 1.0
            terms = self._uncl(logits, answer.target, batch, of_unlabeled, p.view.pasted)
        terms.update(of_framework.terms)
        logged = dict(of_framework.logged)
        features = self._taken(p)
        if features is not None and self.settings.feclon == "all":
            with torch.no_grad():
                labels = labels_from_probabilities(
                    torch.softmax(answer.target.float(), 1),
                    features.shape[2:],
                    gate=self.settings.gate,
                    rule=self.settings.rule,
                    taught=answer.taught,
                )
            terms["fecl_unlabeled"] = self._fecl(features, labels, answer.extra, logits, batch, share)
            logged["patches_kept"] = (labels >= 0).float().mean()
            logged["foreground_patches"] = (labels > 0).float().mean()
        return Cost(terms, logged)

    def voxel_weight(self, logits: Tensor, target: Tensor, batch: Batch) -> Tensor | None:
        """Return UnCL's weight (B, *S) of each voxel, 1 where both networks are certain, for the framework's loss."""
        s = self.settings
        if s.loss != "own":
            return None
        return entropy_weight(logits, target, beta=batch.now["beta"], entropy=s.entropy, focus=s.focus)

    # -------------------------------------------------------------------------------------------- labelled patches
    @torch.no_grad()
    def ask_labeled(self, p: Pass, batch: Batch, before: Any) -> LabeledAnswer:
        """Return the teacher's features where FeCL has teacher negatives, its logits with option `onall`."""
        if self.settings.on == "all":
            x = noisy(batch.x_l, batch.generator) if self.view == "noise" else batch.x_l
            if self._wants_features:
                return LabeledAnswer(*self._features_and_logits(p, x))
            return LabeledAnswer(None, full_resolution(p.pair.teacher.network(x)))
        return LabeledAnswer(self._features(p, batch.x_l) if self._wants_features else None, None)

    def labeled_terms(self, p: Pass, outputs: Outputs, answer: LabeledAnswer, batch: Batch) -> Cost:
        """Return the framework's terms, FeCL with the true labels, and UnCL too with option `onall`."""
        logits, share = full_resolution(outputs), 1.0 - self._unlabeled_share(batch)
        terms = dict(super().labeled_terms(p, outputs, answer, batch).terms)
        if answer.logits is not None:
            of_student, of_teacher, _ = self.of_learned(logits, answer.logits)
            of_uncl = self._uncl(of_student, of_teacher, batch, share)
            terms.update({f"{name}_labeled": term for name, term in of_uncl.items()})
        features = self._taken(p)
        if features is not None:
            labels = labels_from_truth(
                batch.y_l,
                features.shape[2:],
                num_classes=self.data.classes,
                ignore_label=self.data.ignore_label,
                rule=self.settings.rule,
            )
            share = 1.0 if self.settings.feclon == "labeled" else share
            terms["fecl_labeled"] = self._fecl(features, labels, answer.features, logits, batch, share)
            if not p.pair.ending:  # the last pass of a step
                return Cost(terms, self._of_classes(labels, features.shape[2:], batch))
        return Cost(terms)

    def _of_classes(self, labels: Tensor, grid: Sequence[int], batch: Batch) -> dict[str, Tensor]:
        """Return the step's anchors of each foreground class, and the share of its voxels in patches (B, n) of it.

        Organs smaller than a patch are seldom its majority: these numbers say what FeCL never sees of them.
        """
        covered = covered_share(batch.y_l, labels, grid, self.data.classes)
        anchors, self._anchors = self._anchors, torch.zeros_like(self._anchors)
        names = self.data.names or tuple(map(str, range(1, self.data.classes)))
        logged = {f"anchors_{name}": anchors[c] for c, name in enumerate(names, 1)}
        return logged | {f"covered_{name}": covered[c] for c, name in enumerate(names, 1)}

    # --------------------------------------------------------------------------------------------------- the terms
    def _uncl(
        self, logits: Tensor, target: Tensor, batch: Batch, share: float, pasted: Tensor | None = None
    ) -> dict[str, Term]:
        """Return UnCL for student and teacher logits (B, C, *S), its parts apart.

        On cross-entropy and Dice it is the mean outside of the `pasted` voxels (B, 1, *S): true labels have a term of
        their own. The forms on squares take all voxels, as in Eq. 1.
        """
        s = self.settings
        weight = s.wuncl * batch.now["ramp"] * share
        if s.loss == "ce_dice":
            voxels = entropy_weight(logits, target, beta=batch.now["beta"], entropy=s.entropy, focus=s.focus)
            if pasted is not None:
                unpasted = (~pasted[:, 0]).float()
                voxels = voxels * unpasted / ranks.mean_everywhere(unpasted.mean()).clamp_min(1e-12)
            if s.hard:
                return {"uncl": Term(weight, self.pseudo_loss(logits, hard_targets(target), voxels))}
            return {"uncl": Term(weight, soft_ce_dice(logits, torch.softmax(target.float(), 1), voxels))}
        beta, guarded = batch.now["beta"], s.loss == "guarded"
        if not guarded and not s.nats:
            beta /= math.log(self.data.classes)
        form: Form = "guarded" if guarded else "literal"
        parts = uncl(logits, target, beta=beta, form=form, entropy=s.entropy, focus=s.focus)
        of_entropy = weight * s.lambdah if guarded else weight
        return {"uncl": Term(weight, parts.consistency), "uncl_entropy": Term(of_entropy, parts.entropy)}

    def _fecl(
        self,
        features: Tensor,
        labels: Tensor,
        teacher_features: Tensor | None,
        logits: Tensor,
        batch: Batch,
        share: float,
    ) -> Term:
        """Return FeCL of the student's features (B, F, *G) with patch labels (B, n).

        `teacher_features` are the teacher's of the same input or None, `logits` (B, C, *S) the student's.
        """
        s = self.settings
        z = self.head(features)
        with torch.no_grad():
            chosen, labels = sample_anchors(labels, s.anchors, batch.generator)
            counts = torch.bincount(labels[labels >= 0], minlength=self.data.classes)
            self._anchors = counts + self._anchors.to(counts.device)
            teacher = None
            if teacher_features is not None:
                head = self.head if self.teacher_head is None else self.teacher_head.network
                teacher = _at(head(teacher_features), chosen)
            weight = _at(patch_weight(logits, features.shape[2:])[..., None], chosen)[..., 0]
            images = anchored_images(labels)  # the loss is a mean over those of this process
            of_all = images / ranks.mean_everywhere(images).clamp_min(1e-12)
        value = fecl(_at(z, chosen), labels, teacher=teacher, weight=weight, tau=s.tau, gamma=s.gamma, topk=s.topk)
        return Term(s.wfecl * batch.now["ramp"] * share, value * of_all)

    # ------------------------------------------------------------------------------------------------- the networks
    @property
    def _wants_features(self) -> bool:
        return bool(self.taps) and self.settings.topk > 0

    def _features(self, p: Pass, x: Tensor) -> Tensor:
        """Return the teacher's features (B, F, *G) of an input (B, C, *S) without running its decoder."""
        network: Any = p.pair.teacher.network
        return network.encoder(x)[self.stage]

    def _features_and_logits(self, p: Pass, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's features (B, F, *G) and logits (B, C, *S) of an input (B, C, *S), from one pass."""
        network: Any = p.pair.teacher.network
        skips = network.encoder(x)
        return skips[self.stage], full_resolution(network.decoder(skips))

    def _taken(self, p: Pass) -> Tensor | None:
        """Return the features (B, F, *G) of the student's pass in the frame of the patches, None without FeCL."""
        return p.view.restore(self.taps[p.pair.ending].take()) if self.taps else None

    def _unlabeled_share(self, batch: Batch) -> float:
        """Return the unlabelled share of the patches, so that means over both halves are means over all patches."""
        return len(batch.x_u) / (len(batch.x_u) + len(batch.x_l))


class DyCON(DyCONTerms[DyCONSettings]):
    """Mean teacher with DyCON's losses: UnCL on the full-resolution output, FeCL on patches of one encoder stage."""

    settings_type = DyCONSettings

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Add the loss of pasted voxels against their true labels, where the view pastes."""
        cost, view = super().unlabeled_terms(p, outputs, answer, batch), p.view
        if view.pasted is None:
            return cost
        value = self.region_loss(full_resolution(outputs), view.truth, view.pasted)
        return cost._replace(terms={**cost.terms, "pasted": Term(self.settings.wpasted, value)})


def anchored_images(labels: Tensor) -> Tensor:
    """Return the number of images that have an anchor of FeCL, from patch labels (B, n), -1 for not used.

    Examples
    --------
    >>> anchored_images(torch.tensor([[0, 0, 1], [0, 0, -1], [0, 1, 2]])).item()
    1.0
    """
    patches = one_hot(labels + 1)[..., 1:].sum(1)  # of each class
    return ((patches > 1).any(1) & ((patches > 0).sum(1) > 1)).float().sum()


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` (B, m) of values (B, n, d) as (B, m, d)."""
    return torch.gather(values, 1, index[..., None].expand(-1, -1, values.shape[-1]))
