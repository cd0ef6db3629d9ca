"""UnCL, the uncertainty-aware consistency of DyCON, in its literal and in a guarded form.

Shapes: B batch, C class, S space (two or three axes). Entropies are in nats. The losses keep nothing but the two
logits between forward and backward and work through blocks of voxels, so that their memory is the gradient itself.

References
----------
DyCON (Assefa et al., CVPR 2025), supplement, Eqs. 1 to 10.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nnunetv2_dycon.losses.voxels import check_pair, full_precision, voxel_blocks, wide_zeros, widen

Entropy = Literal["dual", "teacher", "student"]
Focus = Literal["confident", "uncertain"]

# How often student and teacher entropy stand in the denominator and in the entropy term: a single entropy is counted
# twice, so that the scale of the loss does not depend on the choice.
_COUNTS: dict[str, tuple[int, int]] = {"dual": (1, 1), "teacher": (0, 2), "student": (2, 0)}


class UnCL(NamedTuple):
    """The two parts of UnCL, each a scalar tensor."""

    consistency: Tensor
    entropy: Tensor


class _Form(NamedTuple):
    """One form of the loss: exponent per nat of entropy, the counts above, guarded or not, and its focus."""

    rate: float
    student: int
    teacher: int
    guarded: bool
    uncertain: bool


def uncl_literal(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, entropy: Entropy = "dual") -> UnCL:
    """UnCL as the supplement writes it: the sum of both parts is Eq. 1, the gradient Eq. 10.

    The parts are `mean_i[ |p_s - p_t|^2 / (exp(beta H_s) + exp(beta H_t)) ]` and `beta mean_i[ H_s + H_t ]`. The
    square is the squared norm (a sum over classes), and the gradient of the first part flows through H_s in the
    denominator too. From beta of about 1 upwards the entropy part pushes a student that is wrong further away from
    a teacher that is sure; `uncl_guarded` does not.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays). No gradient reaches the teacher.
    beta : float
        Entropy scale per nat, >= 0.
    entropy : {"dual", "teacher", "student"}
        Whose entropy counts; a single H stands for both: `2 exp(beta H)` and `2 beta H`.

    Returns
    -------
    UnCL
        Two scalars in float32 (float64 for float64 logits).

    Raises
    ------
    ValueError
        If the shapes differ, there are fewer than 2 classes, or beta or entropy is out of range.

    References
    ----------
    DyCON supplement, Eqs. 1 and 10, Table 1.

    Examples
    --------
    Student (1/2, 1/2), teacher (3/4, 1/4), beta 1: the squared norm is 1/8, exp(H_s) = 2, exp(H_t) = 4 / 3^(3/4)
    = 1.7548, so consistency is 0.125 / 3.7548 and entropy ln 2 + 0.5623.

    >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1)
    >>> [round(part.item(), 4) for part in uncl_literal(student, teacher, beta=1.0)]
    [0.0333, 1.2555]
    """
    return _apply(student_logits, teacher_logits, beta, entropy, guarded=False)


def uncl_guarded(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    entropy: Entropy = "dual",
    focus: Focus = "confident",
) -> UnCL:
    """UnCL whose weight is a constant of the voxel and whose entropy term acts only where both networks agree.

    With H' = H / ln C the parts are `mean_i[ w |p_s - p_t|^2 ]`, `w = 2 / (exp(beta H'_s) + exp(beta H'_t))`
    detached, and `mean_i[ H'_s 1(argmax p_s = argmax p_t) ]`, which the caller multiplies by its own weight. Since w
    is in (0, 1], the scale of the loss does not depend on beta or C. With focus "uncertain" 1 - H' stands for H'
    in w, which then is 1 where the networks know nothing and exp(-beta) where they are certain.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays). No gradient reaches the teacher.
    beta : float
        Entropy scale, >= 0, per unit of normalised entropy.
    entropy : {"dual", "teacher", "student"}
        Whose entropy weighs the voxels; the entropy part is always the student's.
    focus : {"confident", "uncertain"}
        Which voxels weigh most.

    Returns
    -------
    UnCL
        Two scalars in float32 (float64 for float64 logits).

    Raises
    ------
    ValueError
        If the shapes differ, there are fewer than 2 classes, or beta, entropy or focus is out of range.

    References
    ----------
    Departs from DyCON supplement, Eq. 1: detached weight, normalised entropy, entropy term kept to agreeing voxels.

    Examples
    --------
    Student (1/2, 1/2), teacher (1, 0), beta 1: H'_s = 1, H'_t = 0, so w = 2 / (e + 1) and the squared norm is 1/2.
    The first class is the argmax of both (of equal classes the first counts), so the entropy part is 1.

    >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([80.0, -80.0]).view(1, 2, 1, 1)
    >>> [round(part.item(), 4) for part in uncl_guarded(student, teacher, beta=1.0)]
    [0.2689, 1.0]
    """
    return _apply(student_logits, teacher_logits, beta, entropy, guarded=True, focus=focus)


@torch.no_grad()
def entropy_weight(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    entropy: Entropy = "dual",
    focus: Focus = "confident",
) -> Tensor:
    """Weight w of the guarded form for each voxel, detached, in (0, 1].

    Parameters
    ----------
    student_logits, teacher_logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays).
    beta : float
        Entropy scale, >= 0, per unit of normalised entropy.
    entropy : {"dual", "teacher", "student"}
        Whose entropy weighs the voxels.
    focus : {"confident", "uncertain"}
        Which voxels weigh most.

    Returns
    -------
    Tensor, shape (B, *S)
        1 where the chosen networks are certain, exp(-beta) where they know nothing; the reverse for "uncertain".

    Raises
    ------
    ValueError
        As `uncl_guarded`.

    Examples
    --------
    A uniform student (H' = 1) and a certain teacher (H' = 0): 2 / (e + 1).

    >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([80.0, -80.0]).view(1, 2, 1, 1)
    >>> round(entropy_weight(student, teacher, beta=1.0).item(), 4)
    0.5379
    """
    form = _form(student_logits, teacher_logits, beta, entropy, guarded=True, focus=focus)
    with full_precision(student_logits):
        out = widen(student_logits).new_empty(student_logits.shape[:1] + student_logits.shape[2:]).unsqueeze(1)
        for _, s, t, w in voxel_blocks(student_logits, teacher_logits, out):
            torch.mul(_Voxels(s, t, form).inverse, 2.0, out=w[0])
    return out.squeeze(1)


class _Voxels:
    """What both forms need at a block of voxels (C, v): probabilities, entropies and the denominator."""

    def __init__(self, s: Tensor, t: Tensor, form: _Form) -> None:
        log_q = torch.log_softmax(widen(t), 0)
        q = log_q.exp()
        self.h_t = -(q * log_q).sum(0)
        self.log_p = torch.log_softmax(widen(s), 0)
        self.p = self.log_p.exp()
        self.h_s = -(self.p * self.log_p).sum(0)
        self.difference = self.p - q
        self.square = self.difference.square().sum(0)
        # The denominator stays a logarithm, so that no beta overflows; an entropy that does not count is log 0.
        h_s, h_t = ((math.log(len(s)) - h if form.uncertain else h) for h in (self.h_s, self.h_t))
        exponent_s = h_s * form.rate + (math.log(form.student) if form.student else -math.inf)
        exponent_t = h_t * form.rate + (math.log(form.teacher) if form.teacher else -math.inf)
        log_denominator = torch.logaddexp(exponent_s, exponent_t)
        self.inverse = (-log_denominator).exp()
        self.student_share = (exponent_s - log_denominator).exp()


class _UnCL(torch.autograd.Function):
    """Both parts for logits (B, C, *S); backward computes the blocks again instead of keeping them."""

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, form: _Form) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(student, teacher)
        ctx.form = form
        sums = wide_zeros(student, 2)
        with full_precision(student):
            for _, s, t in voxel_blocks(student, teacher):
                x = _Voxels(s, t, form)
                sums[0] += (x.square * x.inverse).sum()
                if form.guarded:
                    sums[1] += (x.h_s * _agreement(s, t)).sum()
                else:
                    sums[1] += (form.student * x.h_s + form.teacher * x.h_t).sum()
        voxels = student.numel() // student.shape[1]
        consistency = sums[0] * (2.0 if form.guarded else 1.0) / voxels
        entropy = sums[1] * _entropy_factor(form, student.shape[1]) / voxels
        dtype = widen(student[:0]).dtype
        return consistency.to(dtype), entropy.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g_consistency: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, None, None]:
        student, teacher = ctx.saved_tensors
        form = ctx.form
        if not ctx.needs_input_grad[0]:
            return None, None, None
        voxels = student.numel() // student.shape[1]
        # The incoming gradients (loss weight, loss scale) enter before the cast to the dtype of the logits: in
        # float16 a bare 1 / voxels would be zero.
        g_consistency = g_consistency * ((2.0 if form.guarded else 1.0) / voxels)
        g_entropy = g_entropy * (_entropy_factor(form, student.shape[1]) / voxels)
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        with full_precision(student):
            for _, s, t, out in voxel_blocks(student, teacher, gradient):
                x = _Voxels(s, t, form)
                # dH_s / dlogits is -p (log p + H_s); `sharpening` collects the factors in front of p (log p + H_s).
                if form.guarded:
                    sharpening = -g_entropy * _agreement(s, t)
                else:
                    through_weight = x.square * x.inverse * x.student_share * form.rate
                    sharpening = g_consistency * through_weight - g_entropy * form.student
                toward = (2.0 * g_consistency) * x.inverse
                slope = x.difference - (x.p * x.difference).sum(0)
                slope.mul_(toward).add_((x.log_p + x.h_s).mul_(sharpening)).mul_(x.p)
                out.copy_(slope)
        return gradient, None, None


def _apply(
    student: Tensor, teacher: Tensor, beta: float, entropy: Entropy, *, guarded: bool, focus: Focus = "confident"
) -> UnCL:
    """Check the arguments and run the form."""
    form = _form(student, teacher, beta, entropy, guarded=guarded, focus=focus)
    return UnCL(*_UnCL.apply(student, teacher.detach(), form))


def _form(student: Tensor, teacher: Tensor, beta: float, entropy: Entropy, *, guarded: bool, focus: Focus) -> _Form:
    """Return the form for logits (B, C, *S), or raise ValueError."""
    check_pair(student, teacher)
    if entropy not in _COUNTS:
        raise ValueError(f"entropy {entropy!r}: choose dual, teacher or student.")
    if focus not in ("confident", "uncertain"):
        raise ValueError(f"focus {focus!r}: choose confident or uncertain.")
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta {beta}: give a finite number of at least 0.")
    rate = beta / math.log(student.shape[1]) if guarded else beta
    return _Form(rate, *_COUNTS[entropy], guarded, focus == "uncertain")


def _entropy_factor(form: _Form, classes: int) -> float:
    """Factor of the entropy sum: beta in the literal form, normalisation in the guarded one."""
    return 1.0 / math.log(classes) if form.guarded else form.rate


def _agreement(s: Tensor, t: Tensor) -> Tensor:
    """1 where the blocks s and t (C, v) have the same largest class, else 0."""
    # max is several times faster than argmax across rows on a CPU; both take the first of equal classes.
    return (s.max(0).indices == t.max(0).indices).to(widen(s[:0]).dtype)
