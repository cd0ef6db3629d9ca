"""Teach only what has been learnt: which classes the labelled patches have taught, and targets without the others.

A teacher that has not learnt a class gives its voxels another label. A student that learns these labels never learns
the class. So an unlabelled term speaks of the learnt classes alone: each means "this class or one that is not learnt".

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
        counts = class_counts(logits, labels, self.ignore_label).to(self.counts.dtype)
        self._seen[student] = counts + self._seen.get(student, 0)

    def forget(self) -> None:
        """Forget what was seen in a step that does not count."""
        self._seen = {}

    def update(self) -> None:
        """Take over what was seen in a step, once it is sure that the step counts."""
        for student, now in self._seen.items():
            everywhere = ranks.mean_everywhere(now) * ranks.world_size()
            self.counts[student].mul_(_DECAY).add_(everywhere, alpha=1 - _DECAY)
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

    @property
    def share(self) -> float:
        """The share of the foreground classes that are learnt."""
        return 1.0 if self.threshold == 0 else float(self.learned[1:].float().mean())


@torch.no_grad()
def class_counts(logits: Tensor, labels: Tensor, ignore_label: int | None = None) -> Tensor:
    """Return the true positive, false positive and false negative voxels (3, C) of each class, float32.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        What a network says.
    labels : Tensor, shape (B, 1, *S), integer
        The truth; voxels below 0 or of the ignore label do not count.
    ignore_label : int, optional
        Label of voxels that nobody annotated.
    """
    classes = logits.shape[1]
    truth, said = labels[:, 0].long(), logits.argmax(1)
    annotated = truth >= 0
    if ignore_label is not None:
        annotated &= truth != ignore_label
    pairs = (truth * classes + said)[annotated]
    table = torch.bincount(pairs, minlength=classes**2).view(classes, classes).float()
    right = table.diagonal()
    return torch.stack([right, table.sum(0) - right, table.sum(1) - right])


class Taught(NamedTuple):
    """Logits of student and teacher (B, C, *S) on the learnt classes, and the voxels (B, 1, *S) taught; None: all."""

    student: Tensor
    teacher: Tensor
    voxels: Tensor | None = None


def teach_learned(student: Tensor, teacher: Tensor, learned: Tensor, known: Tensor | None = None) -> Taught:
    """Leave the classes that are not learnt out of what a student is compared with.

    Both networks choose among the learnt classes alone. The probability of all others goes to the class that the
    teacher finds most probable, which then means "this class or one that is not learnt": as in training with labels of
    some organs only. So a student that sees a class where its teacher does not know it pays nothing. A voxel to which
    the teacher gives a class that is not learnt is not taught: both are sure of background there, which costs nothing.

    Parameters
    ----------
    student, teacher : Tensor, shape (B, C, *S)
        Logits in the same frame, of any floating dtype. No gradient reaches the teacher, and none lowers the student's
        logit of a class that is not learnt.
    learned : Tensor, shape (C,), bool
        The learnt classes.
    known : Tensor, shape (B, 1, *S), bool, optional
        Voxels with a true label, where nothing is left out.

    Returns
    -------
    Taught

    References
    ----------
    The marginal loss of partially labelled data: Shi et al., Medical Image Analysis 2021; Fidon et al., MICCAI 2021.
    """
    with torch.no_grad():
        top = teacher.argmax(1, keepdim=True)
        taught = learned[top]
        merge = _Merge(~learned.view(-1, *[1] * (student.ndim - 2)), top, taught, known)
        target = merge(teacher)
    return Taught(_Merged.apply(student, merge), target, taught if known is None else taught | known)


class _Merge(NamedTuple):
    """Which classes (C, 1, ...) are left out, and of each voxel (B, 1, *S) the class that takes them in, or none."""

    out: Tensor
    top: Tensor
    taught: Tensor
    known: Tensor | None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return logits (B, C, *S) on the learnt classes, those of sure background where a voxel is not taught."""
        background = torch.full_like(self.out, _LEFT_OUT, dtype=logits.dtype)
        background[0] = 0.0
        merged = self._of_top(logits).to(logits.dtype)
        chosen = logits.masked_fill(self.out, _LEFT_OUT).scatter(1, self.top, merged)
        # What is not finite stays so, or the step would count, and its gradient with it.
        chosen = torch.where(self.taught, chosen, background + 0.0 * logits)
        return chosen if self.known is None else torch.where(self.known, logits, chosen)

    def gradient(self, logits: Tensor, g: Tensor) -> Tensor:
        """Return the gradient of the logits from that of the merged ones, without what lowers a class left out."""
        with full_precision(g):
            wide = widen(g)
            of_top = wide.gather(1, self.top)
            share = (widen(logits) - self._of_top(logits)).exp()  # of a class in the merged probability
            of_out = (share * of_top).clamp_max(0.0)
            of_learned = wide.scatter(1, self.top, of_top * share.gather(1, self.top))
            both = torch.where(self.taught, torch.where(self.out, of_out, of_learned), 0.0).to(g.dtype)
        return both if self.known is None else torch.where(self.known, g, both)

    def _of_top(self, logits: Tensor) -> Tensor:
        """Return the merged logit (B, 1, *S): the logarithm of the sum over the class and all that are left out."""
        wide = widen(logits)
        return torch.logaddexp(
            wide.gather(1, self.top), wide.masked_fill(~self.out, -torch.inf).logsumexp(1, keepdim=True)
        )


class _Merged(torch.autograd.Function):
    """The student's merged logits, with a gradient that lowers no class left out."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, merge: _Merge) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.merge = merge
        return merge(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return ctx.merge.gradient(logits, g), None
