"""Plain consistency losses between a student and a teacher, and the entropy of a prediction.

Shapes: B batch, C class, S space (two or three axes). As in `uncl`, the losses keep only their inputs for backward
and work through blocks of voxels.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nnunetv2_dycon.losses.voxels import check_pair, full_precision, voxel_blocks, wide_zeros, widen

# Voxels added to both sides of the Dice quotient. One voxel, and not a tiny number, because soft targets are never
# exactly 0: without it a class that neither network sees would be compared in its last digits.
_DICE_SMOOTH = 1.0


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted classes at each voxel, in nats, from 0 to ln C; differentiable.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays).

    Returns
    -------
    Tensor, shape (B, *S)

    Examples
    --------
    >>> entropy(torch.zeros(1, 2, 1, 1))     # ln 2
    tensor([[[0.6931]]])
    """
    with full_precision(logits):
        if torch.is_grad_enabled() and logits.requires_grad:
            return _entropy(logits, 1)
        out = widen(logits[:0]).new_empty(logits.shape[:1] + logits.shape[2:]).unsqueeze(1)
        for _, block, part in voxel_blocks(logits, out):
            part[0] = _entropy(block, 0)
        return out.squeeze(1)


def mse(student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over voxels of `w |p_s - p_t|^2`, the sum over classes of squared probability differences.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays). No gradient reaches the teacher.
    weight : Tensor, shape (B, *S), optional
        Weight of each voxel, detached; the mean is over all voxels, whatever their weights sum to.

    Returns
    -------
    Tensor, scalar

    Raises
    ------
    ValueError
        If the shapes do not fit or there are fewer than 2 classes.

    Examples
    --------
    Probabilities (1/2, 1/2) and (3/4, 1/4): 1/16 + 1/16.

    >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1)
    >>> round(mse(student, teacher).item(), 4), round(mse(student, teacher, torch.full((1, 1, 1), 0.5)).item(), 4)
    (0.125, 0.0625)
    """
    check_pair(student_logits, teacher_logits, weight)
    return _Square.apply(student_logits, teacher_logits.detach(), None if weight is None else weight.detach())


def soft_ce_dice(student_logits: Tensor, teacher_probabilities: Tensor, weight: Tensor | None = None) -> Tensor:
    """Soft cross-entropy plus one minus soft Dice, both against the teacher's probabilities q.

    Cross-entropy is `mean_i[ -w sum_c q log p ]`, the mean over all voxels. Dice is `(2 sum_i w p q + 1) /
    (sum_i w p^2 + sum_i w q^2 + 1)` for each image and foreground class (all but class 0), then the mean of those.
    Squares in the denominator, so that p = q is its maximum for soft q too (with plain sums p would be driven to
    0 or 1); the 1 is one voxel, so that a class seen by neither network costs nothing.

    Parameters
    ----------
    student_logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays).
    teacher_probabilities : Tensor, shape (B, C, *S)
        Sum to 1 over C; one-hot (hard labels) is allowed. No gradient flows into them.
    weight : Tensor, shape (B, *S), optional
        Weight of each voxel, detached; it stands in the sums of both parts.

    Returns
    -------
    Tensor, scalar

    Raises
    ------
    ValueError
        If the shapes do not fit or there are fewer than 2 classes.

    Examples
    --------
    One voxel, p = (1/2, 1/2), q = (0, 1): cross-entropy ln 2; Dice of class 1 (2 / 2 + 1) / (1 / 4 + 1 + 1) = 8 / 9.

    >>> q = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    >>> round(soft_ce_dice(torch.zeros(1, 2, 1, 1), q).item(), 4)     # 0.6931 + 1 / 9
    0.8043
    """
    check_pair(student_logits, teacher_probabilities, weight)
    weight = None if weight is None else weight.detach()
    return _CrossEntropyDice.apply(student_logits, teacher_probabilities.detach(), weight)


def region_ce_dice(logits: Tensor, labels: Tensor, region: Tensor) -> Tensor:
    """`soft_ce_dice` against hard labels as means over a region; 0 where the region is empty.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays).
    labels : Tensor, shape (B, 1, *S), integer
        Classes from 0 to C - 1 inside the region, anything outside.
    region : Tensor, shape (B, 1, *S), bool
        Voxels that count.

    Returns
    -------
    Tensor, scalar
    """
    with torch.no_grad():
        classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
        one_hot = (labels == classes).float()
        weight = region[:, 0].float()
        weight = weight / weight.mean().clamp_min(1e-12)
    return soft_ce_dice(logits, one_hot, weight)


class _Square(torch.autograd.Function):
    """`mse` for logits (B, C, *S) and a weight (B, *S) or None."""

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(student, teacher, weight)
        total = wide_zeros(student)
        with full_precision(student):
            for _, s, t, w in voxel_blocks(student, teacher, _channel(weight)):
                square = (torch.softmax(widen(s), 0) - torch.softmax(widen(t), 0)).square_().sum(0)
                total += (square if w is None else square * w[0]).sum()
        return (total * (student.shape[1] / student.numel())).to(widen(student[:0]).dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, None, None]:
        student, teacher, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        g = g * (2.0 * student.shape[1] / student.numel())
        with full_precision(student):
            for _, s, t, w, out in voxel_blocks(student, teacher, _channel(weight), gradient):
                p = torch.softmax(widen(s), 0)
                slope = p - torch.softmax(widen(t), 0)
                out.copy_(_through_softmax(p, slope.mul_(g if w is None else g * w[0])))
        return gradient, None, None


class _CrossEntropyDice(torch.autograd.Function):
    """`soft_ce_dice` for logits and probabilities (B, C, *S) and a weight (B, *S) or None."""

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, q: Tensor, weight: Tensor | None) -> Tensor:
        batch, classes = student.shape[:2]
        cross, product, squares = (wide_zeros(student, batch, classes) for _ in range(3))
        with full_precision(student):
            for b, s, t, w in voxel_blocks(student, q, _channel(weight)):
                log_p, t = torch.log_softmax(widen(s), 0), widen(t)
                p, t_w = log_p.exp(), t if w is None else t * w
                cross[b] -= (t_w * log_p).sum(1)
                product[b] += (t_w * p).sum(1)
                squares[b] += (t_w * t).sum(1) + (p * (p if w is None else p * w)).sum(1)
        top, bottom = 2.0 * product[:, 1:] + _DICE_SMOOTH, squares[:, 1:] + _DICE_SMOOTH
        ctx.save_for_backward(student, q, weight, top, bottom)
        value = cross.sum() * (classes / student.numel()) + (1.0 - top / bottom).mean()
        return value.to(widen(student[:0]).dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, None, None]:
        student, q, weight, top, bottom = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        # Slope of the Dice part at a voxel: w (of_q q + of_p p), with one factor for each image and class.
        factors = top.new_zeros(2, *student.shape[:2])
        factors[0, :, 1:] = -2.0 / bottom / top.numel()
        factors[1, :, 1:] = 2.0 * top / bottom.square() / top.numel()
        of_q, of_p = factors.to(widen(student[:0]).dtype)[..., None]
        per_voxel = student.shape[1] / student.numel()
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        with full_precision(student):
            for b, s, t, w, out in voxel_blocks(student, q, _channel(weight), gradient):
                p, t = torch.softmax(widen(s), 0), widen(t)
                slope = _through_softmax(p, of_q[b] * t + of_p[b] * p)
                slope += per_voxel * (p * t.sum(0) - t)
                out.copy_(slope.mul_(g if w is None else g * w))
        return gradient, None, None


def _through_softmax(p: Tensor, slope: Tensor) -> Tensor:
    """Turn a slope by probabilities (C, v) into one by logits."""
    return p * (slope - (p * slope).sum(0))


def _channel(weight: Tensor | None) -> Tensor | None:
    """Return a weight (B, *S) as a map (B, 1, *S), wide: a gradient times float16 weights would be float16."""
    return None if weight is None else widen(weight).unsqueeze(1)


def _entropy(logits: Tensor, dim: int) -> Tensor:
    """Entropy along axis `dim`, in nats."""
    log_p = torch.log_softmax(widen(logits), dim)
    return -(log_p.exp() * log_p).sum(dim)
