"""What a method is: its batch, its terms, its teacher, its view. A method is one small file over this one.

Shapes: `(B, C, *S)` is batch, channel or class, space (2D or 3D).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.consistency import region_ce_dice
from nnunetv2_dycon.networks import Outputs, Teacher, full_resolution
from nnunetv2_dycon.options import Settings, option
from nnunetv2_dycon.schedules import ema_decay, gaussian_ramp
from nnunetv2_dycon.views import BOX_SIDE, PASSES, View, make_view, random_box


class Term(NamedTuple):
    """One summand of the loss: `weight * value` enters the total, both are logged."""

    weight: float
    value: Tensor


class Group(NamedTuple):
    """What one student pass yields: the terms to add up, and figures that are only logged."""

    terms: Mapping[str, Term]
    stats: Mapping[str, Tensor] = {}

    def named(self, start: str = "", end: str = "", share: float = 1.0) -> "Group":
        """Return the group with something before or after each name, and a share of each weight."""
        terms = {f"{start}{name}{end}": Term(share * term.weight, term.value) for name, term in self.terms.items()}
        return Group(terms, {f"{start}{name}{end}": value for name, value in self.stats.items()})


Pass = Callable[[], Group]  # one student pass, run when called


@dataclass(frozen=True)
class Task:
    """What a method may know of the data set.

    Attributes
    ----------
    classes : int
        Number of network outputs, background included.
    ignore_label : int or None
        Label value of voxels that count for nothing.
    seed : int
        Start of every random draw that belongs to the method.
    """

    classes: int
    ignore_label: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """One step's patches on the device. There is no field for labels of unlabelled patches.

    Attributes
    ----------
    x_l : Tensor, shape (B_l, C, *S)
        Labelled patches.
    y_l : Tensor, shape (B_l, 1, *S), integer
        Their labels at full resolution.
    x_u : Tensor, shape (B_u, C, *S), or None
        Unlabelled patches; None for a method that uses none.
    supervised : callable
        nnU-Net's own loss of the student's output for `x_l` (with deep supervision if it is on).
    t : float
        Fraction of the training done, in [0, 1].
    generator : torch.Generator
        Source of every random draw of a step, on the device of the patches.
    """

    x_l: Tensor
    y_l: Tensor
    x_u: Tensor | None
    supervised: Callable[[Outputs], Tensor]
    t: float
    generator: torch.Generator = field(repr=False)


@dataclass(frozen=True)
class TeacherSettings(Settings):
    """Options of every method that keeps an averaged copy of the student."""

    ema: float | None = option(
        None,
        low=0.0,
        high=0.99999,
        none_text="0p999, at most 1 - 10/steps",
        help="EMA decay of the teacher, approached as 1 - 1/(step + 1)",
    )
    paste: float = option(
        0.0, low=0.0, high=1000.0, help="weight of a loss on labelled patches with a box from another labelled patch"
    )


@dataclass(frozen=True)
class ViewSettings(Settings):
    """Options of every method that compares two looks at an unlabelled patch; further bases come after this one."""

    ramp: float = option(0.4, low=0.0, high=1.0, help="fraction of the training over which unlabelled terms rise")
    delay: float = option(0.02, low=0.0, high=1.0, help="fraction of the training before unlabelled terms begin")
    view: str = option("noise", choices=tuple(PASSES), help="what differs between student and teacher input")

    @property
    def rampup(self) -> float:
        """Fraction of the training at which the unlabelled terms have their full weight."""
        return self.ramp


class Method(nn.Module):
    """Base of all methods: the EMA teacher and the supervised term; a subclass adds its unlabelled terms.

    The engine calls `build` once (before the student is compiled or wrapped for the first pass), `start` when
    training begins, and in each step every callable of `groups`, one after the other, each followed by its own
    backward pass so that only one graph is alive. The group that uses every head of the student comes last
    (distributed training needs that). Parameters of the method that require a gradient are optimised like the
    student's.

    `teacher` is what gives the student its targets: the average, or a second network. Its weights have the student's
    names and a key of their own in the checkpoint, and it is scored beside the student.
    """

    settings_type: ClassVar[type[Settings]] = TeacherSettings
    uses_unlabeled: ClassVar[bool] = True

    def __init__(self, settings: Settings, task: Task) -> None:
        super().__init__()
        self.settings = settings
        self.task = task

    def build(self, student: nn.Module) -> None:
        """Make the teacher and other modules for a plain (not compiled, not distributed) student network."""
        self.teacher = Teacher(student)

    def start(self, student: nn.Module) -> None:
        """Begin training: the teacher equals the student, also after pretrained weights were loaded."""
        self.teacher.sync(student)

    def models(self, student: nn.Module) -> dict[str, nn.Module]:
        """Return what can predict beside the plain student; final validation scores each in a sub-folder."""
        return {"teacher": self.teacher.network}

    def groups(self, student: nn.Module, batch: Batch) -> tuple[Pass, ...]:
        """Return the student passes of one step, in order."""
        return (
            *self.unlabeled(student, batch),
            *self.pastes(student, batch),
            partial(self.labeled, student, batch),
        )

    def pastes(self, student: nn.Module, batch: Batch) -> tuple[Pass, ...]:
        """Return the pass of pasted labelled patches, where option `paste` asks for one."""
        return (partial(self.paste_labeled, student, batch, self.settings.paste),) if self.settings.paste else ()

    def paste_labeled(
        self, student: nn.Module, batch: Batch, weight: float, side: tuple[float, float] = BOX_SIDE
    ) -> Group:
        """Return the loss of labelled patches with a box from the next labelled patch, images and labels alike.

        Raises
        ------
        ConfigError
            If there is one labelled patch only, which would be pasted into itself.
        """
        if len(batch.x_l) < 2:
            raise ConfigError(
                "Pastes among labelled patches need two of them, but a process has only one: use a trainer name with "
                "batch2 or more per process, or none of them (for BCP _pretrain0, else without paste)."
            )
        box = random_box(batch.x_l.shape, batch.x_l.device, batch.generator, side)
        logits = full_resolution(student(torch.where(box, batch.x_l.roll(-1, 0), batch.x_l)))
        truth = torch.where(box, batch.y_l.roll(-1, 0), batch.y_l)
        return Group({"paste_labeled": Term(weight, region_ce_dice(logits, truth, self.known(truth)))})

    def known(self, truth: Tensor) -> Tensor:
        """Return where labels (B, 1, *S) are annotated."""
        known = truth >= 0
        return known if self.task.ignore_label is None else known & (truth != self.task.ignore_label)

    def unlabeled(self, student: nn.Module, batch: Batch) -> tuple[Pass, ...]:
        """Return the passes of the unlabelled patches; a method that uses none has none."""
        if self.uses_unlabeled:
            raise TypeError(f"{type(self).__name__} uses unlabelled patches but defines no passes for them")
        return ()

    def labeled(self, student: nn.Module, batch: Batch) -> Group:
        """Return the terms of the labelled patches; the base has nnU-Net's own loss alone."""
        return Group({"supervised": Term(1.0, batch.supervised(student(batch.x_l)))})

    def figures(self, t: float) -> dict[str, float]:
        """Return the scheduled numbers (ramp, beta) at fraction `t` of the training, for the log."""
        return {}

    def decay(self, step: int) -> float:
        """Return the EMA decay at optimiser step `step`, counted from 0.

        Without option `ema` the teacher averages over 1,000 steps, and over a tenth of a training that is shorter
        than ten times that: a teacher that lags behind half of the training teaches what the student has outgrown.
        """
        chosen = self.settings.ema
        if chosen is None:
            chosen = max(0.0, min(0.999, 1 - 10 / (self.settings.epochs * self.settings.iters)))
        return ema_decay(step, chosen)

    def after_step(self, student: nn.Module, step: int) -> None:
        """Move the teacher towards the plain student after optimiser step `step` (counted from 0)."""
        self.teacher.update(student, self.decay(step))


class ViewMethod(Method):
    """Base of the methods with `ViewSettings`: the ramp of their unlabelled terms, and one pass for each view.

    A subclass says in `compare` what one view costs.
    """

    def ramp(self, batch: Batch) -> float:
        """Return the factor r(t) in [0, 1] of all unlabelled terms."""
        return gaussian_ramp(batch.t, rampup=self.settings.rampup, delay=self.settings.delay)

    def figures(self, t: float) -> dict[str, float]:
        """Return the ramp at fraction `t` of the training, for the log."""
        return {"ramp": gaussian_ramp(t, rampup=self.settings.rampup, delay=self.settings.delay)}

    def unlabeled(self, student: nn.Module, batch: Batch) -> tuple[Pass, ...]:
        """Return one pass for each view; the teacher is asked once for each of its inputs."""
        return passes(self.views(batch), partial(self.compare, student, cache(self.teacher), batch))

    def compare(self, student: nn.Module, teacher: Callable[[Tensor], Tensor], batch: Batch, view: View) -> Group:
        """Return the terms of one view; `teacher` gives the logits (B, C, *S) of its images (B, C, *S)."""
        raise TypeError(f"{type(self).__name__} is a method on views but does not say what one costs")

    def views(self, batch: Batch) -> dict[str, Callable[[], View]]:
        """Return what makes the views of option `view`, each when it is first asked for, as in `views.PASSES`."""
        names = PASSES[self.settings.view]
        return {start: cache(partial(self.view, name, batch)) for start, name in names.items()}

    def view(self, name: str, batch: Batch) -> View:
        """Return the student's and the teacher's input for the unlabelled patches."""
        return make_view(
            name,
            batch.x_u,
            x_labeled=batch.x_l,
            target=batch.y_l,
            ignore_label=self.task.ignore_label,
            generator=batch.generator,
        )


def passes(views: Mapping[str, Callable[[], View]], compare: Callable[[View], Group]) -> tuple[Pass, ...]:
    """Return a student pass for each view; all have equal shares of the terms' weights."""

    def one(start: str, view: Callable[[], View]) -> Group:
        return compare(view()).named(start, share=1 / len(views))

    return tuple(partial(one, start, view) for start, view in views.items())


@torch.no_grad()
def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the share of voxels, in [0, 1], where both networks choose the same class."""
    return (student_logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
