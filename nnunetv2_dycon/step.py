"""One training step: what a semi-supervised method says of it, and how it runs. It knows nothing of nnU-Net.

A method is a framework (which network teaches which, on which views of the patches) with the terms that it carries
(what a student's output costs). `Step` runs it: for each pass the teacher answers, the student computes, the terms go
backward; then the optimisers step and the teacher follows.

Shapes: `(B, C, *S)` is batch, channel or class, space (two or three axes).
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import tee
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_dycon import ranks
from nnunetv2_dycon.errors import ConfigError, DivergedError
from nnunetv2_dycon.learned import LearnedClasses, Taught, teach_learned
from nnunetv2_dycon.losses.gradient_aware import gradient_aware
from nnunetv2_dycon.losses.voxels import HardTargets, region_ce_dice, soft_ce_dice
from nnunetv2_dycon.networks import TargetNetwork, Teacher, unwrap
from nnunetv2_dycon.options import Settings
from nnunetv2_dycon.views import BOX_SIDE, Outputs, View, draw_views, paste_labeled

CLIP_NORM = 12.0  # as nnU-Net
SKIPS_TO_STOP = 5

S = TypeVar("S", bound=Settings)


class Term(NamedTuple):
    """One summand of the loss: `weight * value` enters the total, both are logged."""

    weight: float
    value: Tensor


class Cost(NamedTuple):
    """Cost of one student pass: the terms to add up, and numbers that are only logged."""

    terms: Mapping[str, Term]
    logged: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class DataInfo:
    """Facts of the data set that a method may know."""

    classes: int  # outputs of the network, background included
    ignore_label: int | None = None  # value of voxels that count for nothing
    regions: bool = False  # whether the labels are regions that overlap
    cascaded: bool = False  # whether the network also takes the segmentation of an earlier stage
    patch: tuple[int, ...] = ()  # voxels of a patch along each axis
    names: tuple[str, ...] = ()  # of the foreground classes


@dataclass(frozen=True)
class Batch:
    """One step's patches on the device. There is no field for labels of unlabelled patches.

    Attributes
    ----------
    x_l : Tensor, shape (B_l, C, *S)
        Labelled patches.
    y_l : Tensor, shape (B_l, 1, *S), integer
        Their labels at full resolution.
    x_u : Tensor, shape (B_u, C, *S)
        Unlabelled patches; B_u is 0 for a method that uses none.
    supervised : callable
        nnU-Net's own loss of the student's outputs for `x_l` (with deep supervision if it is on).
    now : mapping
        The scheduled numbers of this step by name, as `Settings.schedules` has them.
    generator : torch.Generator
        Source of every random draw of a step, on the device of the patches.
    levels : tuple of (float, Tensor)
        Weight and labels (B_l, 1, *G) of each output in nnU-Net's own loss, the finest first.
    """

    x_l: Tensor
    y_l: Tensor
    x_u: Tensor
    supervised: Callable[[Outputs], Tensor]
    now: Mapping[str, float]
    generator: torch.Generator = field(repr=False)
    levels: tuple[tuple[float, Tensor], ...] = field(default=(), repr=False)

    def at_each_level(self, loss: Callable[[Tensor, Tensor], Tensor], outputs: Outputs) -> Tensor:
        """Return the weighted sum of a loss of each output (B_l, C, *G) and its labels, as nnU-Net weighs its own."""
        if not self.levels:
            raise ConfigError("the trainer's loss has no weight_factors, as nnU-Net's has: leave _ga out.")
        each = [outputs] if isinstance(outputs, Tensor) else outputs
        values = [w * loss(output, y) for output, (w, y) in zip(each, self.levels, strict=True) if w]
        return torch.stack(values).sum()


class Pair(NamedTuple):
    """A network that learns and the one that gives its targets; `ending` ends the names of the terms."""

    student: nn.Module
    teacher: TargetNetwork
    ending: str = ""


class Answer(NamedTuple):
    """A teacher's answer to its input x (B, C, *S), and the target that the student learns.

    `logits` (B, K, *S) are the teacher's, `target` are the same in the frame of the student's input, `extra` is for
    further questions of a method. `taught` (B, 1, *S) are the voxels that count, None where all do.
    """

    teacher: TargetNetwork
    x: Tensor
    logits: Tensor
    target: Tensor
    extra: Any = None
    taught: Tensor | None = None


class Pass(NamedTuple):
    """One student pass: who learns from whom, what both see, what is asked, and what the student's outputs cost.

    `ask` takes the pass, the batch and the answer of the pass before, and returns the teacher's answer; `cost` takes
    the pass, the student's outputs in the frame of the patches, the answer and the batch.
    `final` marks the step's last pass through the network that nnU-Net trains; distributed training exchanges
    gradients there, so that pass uses every output of the network.
    """

    pair: Pair
    view: View
    ask: Callable[["Pass", Batch, Any], Any]
    cost: Callable[["Pass", Outputs, Any, Batch], Cost]
    final: bool = False


class Method(nn.Module, Generic[S]):
    """A method; as it stands it is the framework of mean teacher, without a term for unlabelled patches.

    A subclass is one small file. Terms: `unlabeled_terms` says what a student's outputs cost, `ask_unlabeled` what the
    teacher is asked beyond logits; so for the labelled patches. Framework: `pairs` says who learns from whom, `views`
    on which inputs, `passes` in which order. What requires a gradient in a method is optimised like the student.

    `teacher` is the target network: the average of the student, or a second network. Its weights have the student's
    names and a key of their own in the checkpoint, and it is scored in addition to the student.

    Parameters
    ----------
    settings : Settings
        The options of the trainer name.
    data : DataInfo
        Facts of the data set.
    seed : int
        Start of every random draw that belongs to the method.

    Raises
    ------
    ConfigError
        If the method cannot train on such data.
    """

    settings_type: ClassVar[type[Settings]]
    uses_unlabeled: ClassVar[bool] = True
    endings: ClassVar[tuple[str, ...]] = ("",)  # of the pairs, one for each network that learns
    teacher: TargetNetwork

    def __init__(self, settings: S, data: DataInfo, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.data = data
        self.seed = seed
        self.view: str = getattr(settings, "view", "weak")  # not every framework has these options
        self.paste: float = getattr(settings, "paste", 0.0)
        ema: float | None = getattr(settings, "ema", None)
        self.ema = max(0.0, min(0.999, 1 - 10 / settings.steps)) if ema is None else ema
        self.refuse()
        threshold: float = getattr(settings, "learned", 0.0)
        self.learned = LearnedClasses(data.classes, threshold, len(self.endings), data.ignore_label)

    def refuse(self) -> None:
        """Raise ConfigError where the method is not defined for the data."""
        if self.data.regions and self.settings.ga:
            raise ConfigError("option ga: region-based labels have more than one class at a voxel; leave it out.")
        if self.data.regions and self.paste:
            raise ConfigError("option paste: region-based labels cannot be pasted; leave it out.")
        if self.data.regions and self.uses_unlabeled:
            raise ConfigError(
                "region-based labels (regions_class_order in dataset.json) cannot learn from unlabelled images: "
                "give dataset.json plain labels, or train -tr nnUNetTrainerLabeledOnly."
            )
        if self.data.cascaded and self.uses_unlabeled:
            raise ConfigError(
                "the second stage of a cascade has no input for unlabelled images: train 3d_fullres or 3d_lowres, or "
                "-tr nnUNetTrainerLabeledOnly."
            )

    # ---------------------------------------------------------------------------------------- once per training
    def build(self, student: nn.Module) -> None:
        """Make the teacher and other modules for a plain (not compiled, not distributed) student network."""
        self.teacher = Teacher(student)

    def start(self, student: nn.Module) -> None:
        """Begin training: the teacher equals the student, also after pretrained weights were loaded."""
        average_(self.teacher.network, student, decay=0.0)

    def models(self, student: nn.Module) -> dict[str, nn.Module]:
        """Return the networks that can predict in addition to the plain student, by name."""
        return {"teacher": self.teacher.network}

    def describe(self) -> str:
        """Return what a built method settled by itself, for the log; the base has nothing to say."""
        return ""

    # ---------------------------------------------------------------------------------------- once per step
    def passes(self, student: nn.Module, batch: Batch) -> Iterator[Pass]:
        """Yield the student passes of a step, each when its turn comes: unlabelled views, pastes, labelled patches.

        While the unlabelled terms have no weight, there are no unlabelled views.
        """
        pairs = self.pairs(student)
        if self.uses_unlabeled and batch.now["ramp"]:
            for pair, views in zip(pairs, tee(self.views(batch), len(pairs)), strict=True):  # all pairs see the same
                for view in views:
                    yield Pass(pair, view, self.ask_unlabeled, self._terms_of_learned)
        yield from self.pastes(pairs[0], batch)
        for pair in reversed(pairs):
            yield self.labeled_pass(pair, batch)

    def pairs(self, student: nn.Module) -> tuple[Pair, ...]:
        """Return who learns from whom; the first student is the network that nnU-Net trains."""
        return (Pair(student, self.teacher),)

    def views(self, batch: Batch) -> Iterator[View]:
        """Yield the views of the unlabelled patches, each drawn when its turn comes."""
        return draw_views(self.view, batch.x_u, batch.x_l, batch.y_l, self.data.ignore_label, generator=batch.generator)

    @torch.no_grad()
    def ask_unlabeled(self, p: Pass, batch: Batch, before: Answer | None) -> Answer:
        """Return the teacher's answer for a view of the unlabelled patches.

        Two views of the same patches need the teacher once: `before` is the answer of the pass before.
        """
        x, teacher = p.view.teacher, p.pair.teacher
        if before is None or before.x is not x or before.teacher is not teacher:
            logits = full_resolution(teacher.network(x))
            before = Answer(teacher, x, logits, logits)
        return before._replace(target=p.view.mix(before.logits))

    def unlabeled_terms(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return what the student's outputs for a view of the unlabelled patches cost; the base has no term."""
        return Cost({}, {"agreement": agreement(full_resolution(outputs), answer.target)})

    def _terms_of_learned(self, p: Pass, outputs: Outputs, answer: Answer, batch: Batch) -> Cost:
        """Return the unlabelled terms of the classes that the labelled patches have taught."""
        logits, target, taught = self.of_learned(full_resolution(outputs), answer.target, p.view.pasted)
        outputs = logits if isinstance(outputs, Tensor) else [logits, *outputs[1:]]
        return self.unlabeled_terms(p, outputs, answer._replace(target=target, taught=taught), batch)

    def of_learned(self, logits: Tensor, target: Tensor, known: Tensor | None = None) -> Taught:
        """Return student and teacher logits (B, C, *S) without the classes that are not learnt, and what is taught.

        `known` (B, 1, *S) has a true label. Where all classes are learnt both come back as they are.
        """
        learned = self.learned.learned
        return Taught(logits, target) if learned.all() else teach_learned(logits, target, learned, known)

    def _terms_of_labels(self, p: Pass, outputs: Outputs, answer: Any, batch: Batch) -> Cost:
        """Return the labelled terms, and count how well each class is known."""
        self.learned.see(self.endings.index(p.pair.ending), full_resolution(outputs), batch.y_l)
        return self.labeled_terms(p, outputs, answer, batch)

    def voxel_weight(self, logits: Tensor, target: Tensor, batch: Batch) -> Tensor | None:
        """Return how much each voxel counts (B, *S) in the framework's unlabelled terms; the base has None: all alike.

        Both logits (B, C, *S) are in the frame of the student's input.
        """

    def ask_labeled(self, p: Pass, batch: Batch, before: Any) -> Any:
        """Return what the teacher says of the labelled patches; the base asks for nothing."""

    def labeled_terms(self, p: Pass, outputs: Outputs, answer: Any, batch: Batch) -> Cost:
        """Return what the student's outputs for the labelled patches cost; the base has nnU-Net's own loss alone."""
        return Cost({"supervised": Term(1.0, self.supervised_loss(outputs, batch))})

    def supervised_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the loss of outputs for the labelled patches: nnU-Net's own, or what option `ga` puts in its place."""
        if not self.settings.ga:
            return batch.supervised(outputs)
        hardest = self.settings.gahardest
        return batch.at_each_level(lambda logits, labels: self.gradient_aware(logits, labels, hardest), outputs)

    def pseudo_loss(self, logits: Tensor, hard: HardTargets, weight: Tensor | None = None) -> Tensor:
        """Return the loss of logits (B, C, *S) against hard pseudo-labels; `weight` (B, *S) is that of each voxel."""
        if self.settings.ga:
            return self.gradient_aware(logits, hard.one_hot.argmax(1, keepdim=True), weight=weight)
        return soft_ce_dice(logits, hard.one_hot, weight)

    def region_loss(
        self, logits: Tensor, labels: Tensor, region: Tensor, weight: Tensor | None = None, *, pseudo: bool = False
    ) -> Tensor:
        """Return the loss of logits (B, C, *S) against labels over a region, both (B, 1, *S): that of all mixes.

        `weight` (B, *S) is that of each voxel inside the region; `pseudo` tells that its labels are a network's.
        """
        if self.settings.ga:
            share = 1.0 if pseudo else self.settings.gahardest
            return self.gradient_aware(logits, labels.masked_fill(~region, -1), share, weight)
        return region_ce_dice(logits, labels, region, ranks.mean_everywhere(region.float().mean()), weight)

    def gradient_aware(
        self,
        logits: Tensor,
        labels: Tensor,
        keep: float = 1.0,
        weight: Tensor | None = None,
        class_weight: Tensor | None = None,
    ) -> Tensor:
        """Return GADice plus GACE over all processes; the arguments are those of `losses.gradient_aware`."""
        parts = gradient_aware(
            logits,
            labels,
            keep=keep,
            ignore_label=self.data.ignore_label,
            weight=weight,
            class_weight=class_weight,
            everywhere=ranks.mean_everywhere,
        )
        return parts.dice + parts.ce

    def labeled_pass(self, pair: Pair, batch: Batch) -> Pass:
        """Return the pass of the labelled patches as they are: the last one of nnU-Net's network in every step."""
        return Pass(pair, View(batch.x_l), self.ask_labeled, self._terms_of_labels, final=not pair.ending)

    def pastes(self, pair: Pair, batch: Batch) -> Iterator[Pass]:
        """Yield the pass of option `paste`, if any. Next to unlabelled terms it has their ramp.

        Pastes slow the learning of many classes, so they too wait for the labels.
        """
        weight = self.paste * batch.now.get("ramp", 1.0)
        if weight:
            yield self.paste_pass(pair, batch, weight)

    def paste_pass(self, pair: Pair, batch: Batch, weight: float, side: tuple[float, float] = BOX_SIDE) -> Pass:
        """Return the pass of labelled patches with a box from the next labelled patch, images and labels alike."""
        view = paste_labeled(batch.x_l, batch.y_l, self.data.ignore_label, side, generator=batch.generator)

        def cost(p: Pass, outputs: Outputs, answer: None, batch: Batch) -> Cost:
            value = self.region_loss(full_resolution(outputs), view.truth, view.pasted)
            return Cost({"paste_labeled": Term(weight, value)})

        return Pass(pair, view, lambda p, batch, before: None, cost)

    def after_step(self, student: nn.Module, number: int) -> None:
        """Move the teacher towards the plain student after optimiser step `number` (counted from 0)."""
        average_(self.teacher.network, student, self.decay(number))

    def decay(self, number: int) -> float:
        """Return the share of the old teacher that optimiser step `number` keeps, `min(1 - 1 / (number + 1), ema)`.

        The first steps average all students so far: the teacher forgets its random start. Without option `ema` it
        averages over 1,000 steps, but at most a tenth of the training: it must not lag behind what the student knows.
        """
        return min(1.0 - 1.0 / (number + 1), self.ema)


class Step:
    """Runs the optimiser steps of a training, one call each.

    Parameters
    ----------
    network, method : nn.Module, Method
        The student, which may be compiled and distributed, and the method, built for it.
    optimizers : sequence of torch.optim.Optimizer
        All that step.
    loss : callable
        nnU-Net's loss of outputs and target.
    device, generator : torch.device, torch.Generator
        Where the patches go, and the source of every random draw of a step there.
    autocast : callable
        Makes the context of the forward passes.
    scaler : torch.amp.GradScaler, optional
        Loss scale of float16.
    warn : callable
        Takes a line for the log.
    weights : sequence of float
        Those of the outputs in the loss, the finest first; empty where it does not tell them.

    Attributes
    ----------
    number : int
        The steps done.
    log : list of dict
        The logged numbers of each step; whoever reads it empties it.
    """

    def __init__(
        self,
        network: Any,
        method: Method,
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Callable[[Any, Any], Tensor],
        *,
        device: torch.device,
        generator: torch.Generator,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        scaler: Any = None,
        warn: Callable[[str], object] = print,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        self.weights = weights
        self.network, self.method, self.optimizers, self.loss = network, method, optimizers, loss
        self.device, self.generator, self.autocast, self.scaler, self.warn = device, generator, autocast, scaler, warn
        self.plain = unwrap(network)
        self.distributed = isinstance(network, DistributedDataParallel)
        steps = method.settings.steps
        self.schedules = {
            name: array("d", (value(i / steps) for i in range(steps + 1)))
            for name, value in method.settings.schedules().items()
        }
        self.number = 0
        self.skipped_in_a_row = 0
        self.log: list[dict[str, Any]] = []

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run one step on the loader's batch: each pass with its own backward, gradients added up."""
        data = self.moved(batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        log: dict[str, Any] = dict(data.now)
        if self.method.uses_unlabeled:
            log["classes_learned"] = self.method.learned.share
        total = torch.zeros((), device=self.device)
        answer = None
        for p in self.method.passes(self.network, data):
            loss, answer = self._run(p, data, answer, log)
            total += loss
        if self._finite(total) and self._optimize():
            self.method.after_step(self.plain, self.number)
            self.method.learned.update()
            self.skipped_in_a_row = 0
        else:
            self._skip(batch)
        log["skipped_steps"] = float(self.skipped_in_a_row > 0)
        self.log.append(log)
        self.number += 1
        return {"loss": total.cpu().numpy()}

    def moved(self, batch: Mapping[str, Any]) -> Batch:
        """Return the loader's batch on the device, without anything about labels of unlabelled patches."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        x_l, target = move(batch["data"]), batch["target"]
        target = [move(t) for t in target] if isinstance(target, list) else move(target)
        now = {name: values[min(self.number, len(values) - 1)] for name, values in self.schedules.items()}
        if "ramp" in now:
            now["ramp"] *= self.method.learned.share
        return Batch(
            x_l=x_l,
            y_l=target[0] if isinstance(target, list) else target,
            x_u=move(batch["unlabeled"]) if self.method.uses_unlabeled else x_l[:0],
            supervised=lambda outputs: self.loss(outputs, target),
            now=now,
            generator=self.generator,
            levels=tuple(
                zip(self.weights, target if isinstance(target, list) else [target], strict=bool(self.weights))
            ),
        )

    def _run(self, p: Pass, data: Batch, before: Any, log: dict[str, Any]) -> tuple[Tensor, Any]:
        """Run one pass and its backward; only numbers and the answer outlive it, so its graph is freed."""
        waits = self.distributed and not p.final
        with self.network.no_sync() if waits else nullcontext():
            with self.autocast():
                cost, answer = run_pass(p, data, before)
                loss: Any = sum(term.weight * term.value for term in cost.terms.values())
                loss = ranks.with_every_output(loss, self.plain) if p.final else loss
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for name, term in cost.terms.items():
            log[name] = term.value.detach()
            if name != "supervised":
                log[f"{name}_weight"] = term.weight
                log[f"{name}_weighted"] = term.weight * term.value.detach()
        log.update(cost.logged)
        return loss.detach(), answer

    def _finite(self, total: Tensor) -> bool:
        return bool(ranks.true_everywhere(torch.isfinite(total)))

    def _optimize(self) -> bool:
        """Step all optimizers, or return False: a gradient is not finite, and no loss scale handles it."""
        if self.distributed:
            ranks.average_gradients(self.method.parameters())
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        for module in (self.network, *self.method.children()):  # each on its own: a joint norm would couple them
            parameters = list(module.parameters())
            if parameters:
                norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
                if self.scaler is None and not torch.isfinite(norm):
                    return False
        for optimizer in self.optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        return True

    def _skip(self, batch: Mapping[str, Any]) -> None:
        """Leave weights as they are; stop with the case ids when it does not pass."""
        self.method.learned.forget()
        self.skipped_in_a_row += 1
        cases = f"labelled {', '.join(batch['keys'])}; unlabelled {', '.join(batch.get('unlabeled_keys', ['none']))}"
        self.warn(f"WARNING: loss or gradient not finite, step {self.number} skipped. Patches from {cases}")
        if self.skipped_in_a_row >= SKIPS_TO_STOP:
            raise DivergedError(
                f"loss or gradient not finite in {SKIPS_TO_STOP} steps in a row, last with patches from {cases}. Look "
                "at these images, or lower the learning rate, e.g. _lr0p001 in the trainer name."
            )


def run_pass(p: Pass, batch: Batch, before: Any = None) -> tuple[Cost, Any]:
    """Return the cost of a pass by names of the log, and the teacher's answer; `before` is that of the last pass."""
    answer = p.ask(p, batch, before)
    outputs = p.view.restored(p.pair.student(p.view.student))
    cost = p.cost(p, outputs, answer, batch)
    if not cost.terms:
        raise TypeError(f"{p.cost} gives a pass of the student no term")
    start, end = p.view.name, p.pair.ending
    terms = {f"{start}{name}{end}": Term(p.view.share * weight, value) for name, (weight, value) in cost.terms.items()}
    return Cost(terms, {f"{start}{name}{end}": value for name, value in cost.logged.items()}), answer


def full_resolution(outputs: Outputs) -> Tensor:
    """Return the output at the patch's own resolution, shape (B, C, *S), with or without deep supervision."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@torch.no_grad()
def average_(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move each weight of the teacher to `decay * teacher + (1 - decay) * student`, and copy the buffers.

    Both are plain networks of one architecture; `decay` is in [0, 1], and 0 makes an exact copy.

    Raises
    ------
    ValueError
        If the decay is out of range or the shapes differ.

    References
    ----------
    Tarvainen and Valpola, NeurIPS 2017. Buffers are copied, not averaged.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}.")
    weights = list(zip(teacher.parameters(), student.parameters(), strict=True))
    buffers = list(zip(teacher.buffers(), student.buffers(), strict=True))
    for mine, its in (*weights, *buffers):
        if mine.shape != its.shape:  # copying alone would let shapes broadcast
            raise ValueError(f"teacher and student differ: {tuple(mine.shape)} against {tuple(its.shape)}.")
    if decay:
        torch._foreach_lerp_([mine for mine, _ in weights], [its for _, its in weights], 1 - decay)
        weights = []
    for mine, its in (*weights, *buffers):  # with decay 0 this also heals a weight that is not finite
        mine.copy_(its)


@torch.no_grad()
def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the share of voxels, in [0, 1], where both networks choose the same class; logits (B, C, *S)."""
    return (student_logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
