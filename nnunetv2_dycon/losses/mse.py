"""Mean squared difference between the probabilities of a student and a teacher.

Shapes: B batch, C class, S space (two or three axes). As in `voxels`, the loss keeps its inputs alone for backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunetv2_dycon.losses.voxels import (
    as_channel,
    check_pair,
    full_precision,
    through_softmax,
    voxel_blocks,
    wide_zeros,
    widen,
)


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


class _Square(torch.autograd.Function):
    """`mse` for logits (B, C, *S) and a weight (B, *S) or None."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(student, teacher, weight)
        total = wide_zeros(student)
        with full_precision(student):
            for _, s, t, w in voxel_blocks(student, teacher, as_channel(weight)):
                square = (torch.softmax(widen(s), 0) - torch.softmax(widen(t), 0)).square_().sum(0)
                total += (square if w is None else square * w[0]).sum()
        return (total * (student.shape[1] / student.numel())).to(widen(student[:0]).dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, weight = ctx.saved_tensors
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        g = g * (2.0 * student.shape[1] / student.numel())
        with full_precision(student):
            for _, s, t, w, out in voxel_blocks(student, teacher, as_channel(weight), gradient):
                p = torch.softmax(widen(s), 0)
                slope = p - torch.softmax(widen(t), 0)
                out.copy_(through_softmax(p, slope.mul_(g if w is None else g * w[0])))
        return gradient, None, None
