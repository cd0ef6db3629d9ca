"""Teach only what has been learnt: which classes the labelled patches have taught, and targets without the others.

A teacher that has not learnt a class gives its voxels another label. A student that learns these labels never learns
the class. So an unlabelled term speaks of the learnt classes alone, and leaves the probability of the others as it is.

Shapes: B batch, C class, S space (two or three axes).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunetv2_dycon import ranks
from nnunetv2_dycon.losses.voxels import full_precision, widen

# Share of the old counts that a step keeps: they are those of some 50 steps.
_DECAY = 0.98
# Logit of a class that is left out; its probability is exactly 0, also in float16.
_LEFT_OUT = -1e4


class LearnedClasses(nn.Module):
    """The hard Dice of each class on recent labelled patches, and which classes count as learnt by it.

    The counts (true positive, false positive and false negative voxels of each student and class, averaged over steps
    with a decay of 0.98) are those of all processes, and belong to the checkpoint. A class is learnt while the Dice of
    every student is at least `threshold`; one that the labelled patches have not shown is not.

    Parameters
    ----------
    classes : int
        C, background included.
    threshold : float
        Smallest Dice of a learnt class, in [0, 1]; with 0 every class counts from the start.
    students : int
        Number of networks that learn.
    ignore_label : int, optional
        Label of voxels that nobody annotated.
    """

    counts: Tensor

    def __init__(self, classes: int, threshold: float, students: int = 1, ignore_label: int | None = None) -> None:
        super().__init__()
        self.threshold, self.ignore_label = threshold, ignore_label
        # Without a threshold nothing is counted, and a checkpoint is as it was before there was one.
        self.register_buffer("counts", torch.zeros(students, 3, classes), persistent=threshold > 0)
        self._seen: dict[int, Tensor] = {}

    @torch.no_grad()
    def see(self, student: int, logits: Tensor, labels: Tensor) -> None:
        """Count a student's answer for the labelled patches of this step; `update` takes it over.

        Parameters
        ----------
        student : int
            Number of the student.
        logits : Tensor, shape (B, C, *S)
            What it says.
        labels : Tensor, shape (B, 1, *S), integer
            The truth; voxels below 0 or of the ignore label do not count.
        """
        if self.threshold == 0:
            return
        classes = logits.shape[1]
        truth, said = labels[:, 0].long(), logits.argmax(1)
        annotated = truth >= 0
        if self.ignore_label is not None:
            annotated &= truth != self.ignore_label
        pairs = (truth * classes + said)[annotated]
        table = torch.bincount(pairs, minlength=classes**2).view(classes, classes).to(self.counts.dtype)
        right = table.diagonal()
        self._seen[student] = torch.stack([right, table.sum(0) - right, table.sum(1) - right])

    def update(self) -> None:
        """Take over what was seen in a step, once it is sure that the step counts."""
        for student, now in self._seen.items():
            self.counts[student].mul_(_DECAY).add_(ranks.mean_everywhere(now), alpha=1 - _DECAY)
        self._seen = {}

    @property
    def dice(self) -> Tensor:
        """The Dice of each student and class (students, C), 0 for a class that neither truth nor student shows."""
        right, wrong, missed = self.counts.unbind(1)
        return 2 * right / (2 * right + wrong + missed).clamp_min(torch.finfo(right.dtype).tiny)

    @property
    def learned(self) -> Tensor:
        """Whether each class is learnt, (C,) bool."""
        return (self.dice >= self.threshold).all(0)


class Taught(NamedTuple):
    """Logits of student and teacher (B, C, *S) on the learnt classes, and the voxels (B, 1, *S) taught; None: all."""

    student: Tensor
    teacher: Tensor
    voxels: Tensor | None = None


def teach_learned(student: Tensor, teacher: Tensor, learned: Tensor, known: Tensor | None = None) -> Taught:
    """Leave the classes that are not learnt out of what a student is compared with.

    Both networks then choose among the learnt classes alone. A voxel to which the teacher gives a class that is not
    learnt is not taught: both are sure of background there, so that it costs nothing. The gradient moves the student's
    probability among learnt classes only: that of every other class stays as it is, to first order.

    Parameters
    ----------
    student, teacher : Tensor, shape (B, C, *S)
        Logits in the same frame, of any floating dtype. No gradient reaches the teacher.
    learned : Tensor, shape (C,), bool
        The learnt classes.
    known : Tensor, shape (B, 1, *S), bool, optional
        Voxels with a true label, where nothing is left out.

    Returns
    -------
    Taught
    """
    with torch.no_grad():
        out = ~learned.view(-1, *[1] * (student.ndim - 2))
        taught = learned[teacher.argmax(1, keepdim=True)]
        target = _chosen(teacher, out, taught, known)
    return Taught(_Hold.apply(student, out, taught, known), target, taught if known is None else taught | known)


def _chosen(logits: Tensor, out: Tensor, taught: Tensor, known: Tensor | None) -> Tensor:
    """Return logits without the classes `out`, those of sure background where a voxel is not taught."""
    background = torch.full_like(out, _LEFT_OUT, dtype=logits.dtype)
    background[0] = 0.0
    chosen = torch.where(taught, logits.masked_fill(out, _LEFT_OUT), background)
    return chosen if known is None else torch.where(known, logits, chosen)


class _Hold(torch.autograd.Function):
    """The student's logits without some classes, with a gradient that holds the probability of these."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, out: Tensor, taught: Tensor, known: Tensor | None) -> Tensor:
        chosen = _chosen(logits, out, taught, known)
        ctx.save_for_backward(chosen, out, taught, known)
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        chosen, out, taught, known = ctx.saved_tensors
        with full_precision(g):
            # With this mean taken off, sum p g is 0 over the classes, which is the slope of every held probability.
            wide = widen(g)
            mean = (torch.softmax(widen(chosen), 1) * wide).sum(1, keepdim=True)
            held = torch.where(taught & ~out, wide - mean, 0.0).to(g.dtype)
        return held if known is None else torch.where(known, g, held), None, None, None
