"""Losses against hard labels that are made of sums by class: their common forward and backward.

Such a loss has a Dice part and a cross-entropy part. Both depend on the logits through a few sums for each class, so
a loss is a rule that turns these sums into its values and slopes; going through the voxels is the same for all.

Shapes: B batch, C class, S space (two or three axes). As in `voxels`, memory is the gradient itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunetv2_dycon.losses.voxels import as_channel, full_precision, through_softmax, voxel_blocks, wide_zeros, widen


class ClassSums(NamedTuple):
    """Sums over the voxels that count, each (C,): p probabilities, y one-hot labels, w voxel weights.

    `product` is of w p y, `squares` of w p^2, `predicted` of w p, `truth` of w y; over the voxels whose cross-entropy
    is kept, `cross` is the sum of w y CE and `kept` their number.
    """

    product: Tensor
    squares: Tensor
    predicted: Tensor
    truth: Tensor
    cross: Tensor
    kept: Tensor


class ClassTerms(NamedTuple):
    """What a rule makes of the sums, each (C,): summands of both parts, and their slopes.

    The slope of the Dice part by a probability is `of_label y + of_p p + of_one`, that of the cross-entropy part by
    the cross-entropy of a kept voxel is `of_ce` of its class.
    """

    dice: Tensor
    ce: Tensor
    of_label: Tensor
    of_p: Tensor
    of_one: Tensor
    of_ce: Tensor


class DiceCE(NamedTuple):
    """The two parts of a loss, each a scalar tensor."""

    dice: Tensor
    ce: Tensor


Rule = Callable[[ClassSums], ClassTerms]
Everywhere = Callable[[Tensor], Tensor]


class _How(NamedTuple):
    rule: Rule
    keep: float
    ignore_label: int | None
    everywhere: Everywhere


def same(sums: Tensor) -> Tensor:
    """Return the sums: with one process they are those of all."""
    return sums


def loss_by_class(
    logits: Tensor,
    labels: Tensor,
    rule: Rule,
    *,
    keep: float = 1.0,
    ignore_label: int | None = None,
    weight: Tensor | None = None,
    everywhere: Everywhere = same,
) -> DiceCE:
    """Return both parts of the loss that a rule describes.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays).
    labels : Tensor, shape (B, 1, *S)
        Class numbers of any dtype. A voxel below 0 or of the ignore label does not count.
    rule : callable
        Turns `ClassSums` into `ClassTerms`.
    keep : float
        Share of the voxels that count whose cross-entropy is kept, in (0, 1]: those where it is largest, at least one.
        Of equal ones the first in memory are kept, so that their number is exact.
    ignore_label : int, optional
        Label of voxels that nobody annotated.
    weight : Tensor, shape (B, *S), optional
        Weight of each voxel, detached. It stands in every sum but `kept`: a mean stays one over the voxels that
        count, whatever their weights sum to.
    everywhere : callable
        Turns sums of one process into their mean over processes. The average of the gradients of all processes is
        then that of one process with all voxels; each process keeps the largest of its own.

    Raises
    ------
    ValueError
        If shapes do not fit, there are fewer than 2 classes, or keep is out of range.
    """
    if logits.ndim < 3 or logits.shape[1] < 2:
        raise ValueError(f"expected (B, C, *S) with at least 2 classes, got {tuple(logits.shape)}.")
    if labels.shape != (len(logits), 1, *logits.shape[2:]):
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: expected (B, 1, *S).")
    if weight is not None and weight.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit the voxels of {tuple(logits.shape)}.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep}: give a share above 0, at most 1.")
    weight = None if weight is None else weight.detach().to(widen(logits[:0]).dtype)
    return DiceCE(*_ByClass.apply(logits, labels, weight, _How(rule, keep, ignore_label, everywhere)))


class _ByClass(torch.autograd.Function):
    """The parts of a loss, two numbers, for logits (B, C, *S), labels (B, 1, *S) and a weight (B, *S) or None."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weight: Tensor | None, how: _How) -> Tensor:
        classes = logits.shape[1]
        dice, ce = wide_zeros(logits, 4, classes), wide_zeros(logits, 2, classes)
        cross = widen(logits[:0]).new_empty(labels.shape)
        with full_precision(logits):
            for _, x, y, w, out in voxel_blocks(logits, labels, as_channel(weight), cross):
                log_p = torch.log_softmax(widen(x), 0)
                hot, counted = _one_hot(y, how.ignore_label, log_p)
                p, weights = log_p.exp(), counted if w is None else counted * w[0]
                of_voxel = p * weights
                dice += torch.stack([(hot * of_voxel).sum(1), (of_voxel * p).sum(1), of_voxel.sum(1), hot @ weights])
                # -1 is less than any cross-entropy, so that a voxel that does not count is never among the largest
                out[0] = ((hot * log_p).sum(0) * -weights).masked_fill_(counted == 0, -1.0)
            kept = largest(cross, how.keep)
            for _, x, y, value, one in voxel_blocks(logits, labels, cross, kept):
                hot, _ = _one_hot(y, how.ignore_label, widen(x[:, :0]))
                chosen = one[0].to(hot.dtype)
                ce += torch.stack([hot @ (chosen * value[0]), hot @ chosen])
        terms = how.rule(ClassSums(*how.everywhere(torch.cat([dice, ce]))))
        ctx.save_for_backward(logits, labels, weight, kept, *terms[2:])
        ctx.ignore_label = how.ignore_label
        return torch.stack([terms.dice.sum(), terms.ce.sum()]).to(cross.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, weight, kept, *slopes = ctx.saved_tensors
        of_label, of_p, of_one, of_ce = torch.stack(slopes).to(widen(logits[:0]).dtype)[..., None]
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        with full_precision(logits):
            for _, x, y, w, one, out in voxel_blocks(logits, labels, as_channel(weight), kept, gradient):
                p = torch.softmax(widen(x), 0)
                hot, counted = _one_hot(y, ctx.ignore_label, p)
                slope = through_softmax(p, of_label * hot + of_p * p + of_one).mul_(g[0])
                slope += (p - hot).mul_((of_ce * hot).sum(0) * one[0] * g[1])
                out.copy_(slope.mul_(counted if w is None else counted * w[0]))
        return gradient, None, None, None


def _one_hot(labels: Tensor, ignore_label: int | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return one-hot labels (C, v), and 1 for a voxel (v,) that counts, else 0, of a block (1, v), typed as `like`."""
    label = labels.long()
    counted = label >= 0
    if ignore_label is not None:
        counted = counted & (label != ignore_label)
    number = counted.to(like.dtype)
    hot = torch.zeros((like.shape[0], label.shape[1]), dtype=like.dtype, device=like.device)
    return hot.scatter_(0, label.masked_fill(~counted, 0), number), number[0]


@torch.no_grad()
def largest(values: Tensor, share: float) -> Tensor:
    """Return where a share of the values that are not negative is largest, a mask of their shape.

    Parameters
    ----------
    values : Tensor
        Numbers; those below 0 do not count.
    share : float
        In (0, 1]. With K values that are not negative, `max(1, floor(share K))` are chosen, and none if K is 0.

    Examples
    --------
    >>> largest(torch.tensor([3.0, -1.0, 5.0, 3.0, 1.0]), 0.5).tolist()     # two of four; of equal ones the first
    [True, False, True, False, False]
    """
    counted = values >= 0
    if share == 1:
        return counted
    number = int(counted.sum())
    if number == 0:
        return counted
    number = max(1, int(number * share))
    least = values.flatten().kthvalue(values.numel() - number + 1).values
    above, equal = values > least, values == least
    room = number - above.sum()
    return above | (equal & (equal.flatten().cumsum(0, dtype=torch.int32).view_as(equal) <= room))
