"""Losses between a student and a teacher voxel by voxel: UnCL, and cross-entropy plus Dice.

Shapes: B batch, C class, S space (two or three axes). Entropies are in nats. Between forward and backward the losses
keep their inputs alone, and they work through blocks of voxels, so that their memory is the gradient itself.

References
----------
UnCL: DyCON (Assefa et al., CVPR 2025), supplement, Eqs. 1 to 10.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Form = Literal["literal", "guarded"]
Entropy = Literal["dual", "teacher", "student"]
Focus = Literal["confident", "uncertain"]

# How often each entropy counts in UnCL; a single one counts twice, so that the scale of the loss stays.
_COUNTS: dict[str, tuple[int, int]] = {"dual": (1, 1), "teacher": (0, 2), "student": (2, 0)}
# Voxels added to both sides of the Dice quotient. One voxel, and not a tiny number, because soft targets are never
# exactly 0: without it a class that neither network sees would be compared in its last digits.
_DICE_SMOOTH = 1.0
# Numbers (classes times voxels) of a block: its temporaries stay in a CPU's cache, and the cost of a call is hidden.
_CPU_BLOCK = 1 << 17
# Elsewhere each operation is a launch that costs microseconds whatever its size, so blocks are a share of the whole.
_BLOCKS_PER_BATCH = 32


class UnCL(NamedTuple):
    """The two parts of UnCL, each a scalar tensor."""

    consistency: Tensor
    entropy: Tensor


def uncl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    form: Form = "literal",
    entropy: Entropy = "dual",
    focus: Focus = "confident",
) -> UnCL:
    """Uncertainty-aware consistency in its two forms.

    Form "literal" is Eq. 1, the sum of `mean_i[ |p_s - p_t|^2 / (exp(beta H_s) + exp(beta H_t)) ]` and
    `beta mean_i[ H_s + H_t ]`; its gradient is Eq. 10 with the squared norm and flows through H_s in the denominator
    too. From beta of about 1 upwards the entropy part pushes a wrong student away from a certain teacher.

    Form "guarded" does not. With H' = H / ln C its parts are `mean_i[ w |p_s - p_t|^2 ]`, `w = 2 / (exp(beta H'_s) +
    exp(beta H'_t))` detached, and `mean_i[ H'_s 1(argmax p_s = argmax p_t) ]`, which the caller weighs. The scale of
    the loss does not depend on beta or C, since w is in (0, 1].

    Parameters
    ----------
    student_logits, teacher_logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays). No gradient reaches the teacher.
    beta : float
        Entropy scale, >= 0: per nat (literal) or per unit of normalised entropy (guarded).
    form : {"literal", "guarded"}
        Which of the two.
    entropy : {"dual", "teacher", "student"}
        Whose entropy counts; a single H replaces both, so that the scale stays (supplement, Table 1). The entropy
        part of the guarded form is always the student's.
    focus : {"confident", "uncertain"}
        Voxels that weigh most: with "uncertain" 1 - H' replaces H' in w. The literal form has "confident" alone.

    Returns
    -------
    UnCL
        Two scalars in float32 (float64 for float64 logits).

    Raises
    ------
    ValueError
        If the shapes differ, there are fewer than 2 classes, or an argument is out of range.

    Examples
    --------
    Student (1/2, 1/2), teacher (3/4, 1/4), beta 1: the squared norm is 1/8, exp(H_s) = 2, exp(H_t) = 4 / 3^(3/4)
    = 1.7548, so the consistency is 0.125 / 3.7548 and the entropy ln 2 + 0.5623.

    >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1)
    >>> [round(part.item(), 4) for part in uncl(student, teacher, beta=1.0)]
    [0.0333, 1.2555]

    Guarded, teacher (1, 0): H'_s = 1, H'_t = 0, so w = 2 / (e + 1), and the squared norm is 1/2. Both have the first
    class as argmax (of equal classes the first counts), so the entropy part is 1.

    >>> teacher = torch.tensor([80.0, -80.0]).view(1, 2, 1, 1)
    >>> [round(part.item(), 4) for part in uncl(student, teacher, beta=1.0, form="guarded")]
    [0.2689, 1.0]
    """
    if (form, focus) not in (("literal", "confident"), ("guarded", "confident"), ("guarded", "uncertain")):
        raise ValueError(f"form {form!r} with focus {focus!r}: choose literal with confident, or guarded with either.")
    weigh = _weighing(student_logits, teacher_logits, beta, entropy, focus, normalized=form == "guarded")
    block = partial(_guarded_sums if form == "guarded" else _literal_sums, weigh=weigh)
    sums = _BlockSums.apply(student_logits, teacher_logits.detach(), block)
    classes = student_logits.shape[1]
    consistency, entropies = sums / (student_logits.numel() // classes)
    entropies = entropies * (beta if form == "literal" else 1 / math.log(classes))
    return UnCL(*(part.to(widen(student_logits[:0]).dtype) for part in (consistency, entropies)))


@torch.no_grad()
def entropy_weight(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    entropy: Entropy = "dual",
    focus: Focus = "confident",
) -> Tensor:
    """Weight w of the guarded form for each voxel, detached.

    Parameters
    ----------
    student_logits, teacher_logits, beta, entropy, focus
        As in the guarded form of `uncl`, errors included.

    Returns
    -------
    Tensor, shape (B, *S)
        1 where the chosen networks are certain, exp(-beta) where they know nothing; the reverse for "uncertain".

    Examples
    --------
    A uniform student (H' = 1) and a certain teacher (H' = 0): 2 / (e + 1).

    >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([80.0, -80.0]).view(1, 2, 1, 1)
    >>> round(entropy_weight(student, teacher, beta=1.0).item(), 4)
    0.5379
    """
    weigh = _weighing(student_logits, teacher_logits, beta, entropy, focus, normalized=True)
    with full_precision(student_logits):
        out = widen(student_logits).new_empty(student_logits.shape[:1] + student_logits.shape[2:]).unsqueeze(1)
        for _, s, t, w in voxel_blocks(student_logits, teacher_logits, out):
            torch.mul(weigh.inverse(_entropy(s), _entropy(t)), 2.0, out=w[0])
    return out.squeeze(1)


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted classes at each voxel, in nats, from 0 to ln C, detached.

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
        out = widen(logits[:0]).new_empty(logits.shape[:1] + logits.shape[2:]).unsqueeze(1)
        for _, block, part in voxel_blocks(logits, out):
            part[0] = _entropy(block)
        return out.squeeze(1)


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


def region_ce_dice(
    logits: Tensor, labels: Tensor, region: Tensor, share: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """`soft_ce_dice` against hard labels as means over a region; 0 where the region is empty.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays).
    labels : Tensor, shape (B, 1, *S), integer
        Classes from 0 to C - 1 inside the region, anything outside.
    region : Tensor, shape (B, 1, *S), bool
        Voxels that count.
    share : Tensor, scalar, optional
        Share of the voxels that the mean is over; that of the region by default.
    weight : Tensor, shape (B, *S), optional
        Weight of each voxel of the region, detached; the mean is over the region, whatever its weights sum to.

    Returns
    -------
    Tensor, scalar
    """
    with torch.no_grad():
        classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
        one_hot = (labels == classes).float()
        of_region = region[:, 0].float()
        of_region = of_region / (of_region.mean() if share is None else share).clamp_min(1e-12)
        weight = of_region if weight is None else weight * of_region
    return soft_ce_dice(logits, one_hot, weight)


class HardTargets(NamedTuple):
    """Hard labels as one-hot numbers (B, C, *S), and 1 for a voxel that counts, else 0, as (B, *S); both float32."""

    one_hot: Tensor
    weight: Tensor


@torch.no_grad()
def hard_targets(logits: Tensor, gate: float = 0.0) -> HardTargets:
    """Return the most probable class of each voxel and whether its probability reaches the gate.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        The teacher's; any floating dtype.
    gate : float
        Smallest probability of the class, in [0, 1]; 0 keeps every voxel. It is that of FixMatch (Sohn et al.,
        NeurIPS 2020) and UniMatch (Yang et al., CVPR 2023).

    Examples
    --------
    >>> hard_targets(torch.tensor([0.0, 3.0]).view(1, 2, 1, 1), gate=0.96).one_hot.flatten().tolist()
    [0.0, 1.0]
    >>> hard_targets(torch.tensor([0.0, 3.0]).view(1, 2, 1, 1), gate=0.96).weight.item()     # 1 / (1 + e^-3) = 0.953
    0.0
    """
    with full_precision(logits):
        confidence, label = torch.softmax(widen(logits), 1).max(1, keepdim=True)
        one_hot = torch.zeros(logits.shape, dtype=confidence.dtype, device=logits.device).scatter_(1, label, 1.0)
        return HardTargets(one_hot, (confidence >= gate).to(confidence.dtype).squeeze(1))


class _Weighing(NamedTuple):
    """How UnCL weighs a voxel: exponent per nat, how often each entropy counts, classes C, and the focus."""

    rate: float
    student: int
    teacher: int
    classes: int
    uncertain: bool

    def inverse(self, h_s: Tensor, h_t: Tensor) -> Tensor:
        """Return one over the denominator for entropies (v,), which stays a logarithm, so that no beta overflows."""
        if self.uncertain:
            h_s, h_t = math.log(self.classes) - h_s, math.log(self.classes) - h_t
        # an entropy that does not count is log 0
        exponent_s = h_s * self.rate + (math.log(self.student) if self.student else -math.inf)
        exponent_t = h_t * self.rate + (math.log(self.teacher) if self.teacher else -math.inf)
        return (-torch.logaddexp(exponent_s, exponent_t)).exp()


def _weighing(
    student: Tensor, teacher: Tensor, beta: float, entropy: Entropy, focus: Focus, *, normalized: bool
) -> _Weighing:
    """Return the weighing for logits (B, C, *S), or raise ValueError."""
    check_pair(student, teacher)
    if entropy not in _COUNTS:
        raise ValueError(f"entropy {entropy!r}: choose dual, teacher or student.")
    if focus not in ("confident", "uncertain"):
        raise ValueError(f"focus {focus!r}: choose confident or uncertain.")
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta {beta}: give a finite number of at least 0.")
    rate = beta / math.log(student.shape[1]) if normalized else beta
    return _Weighing(rate, *_COUNTS[entropy], student.shape[1], focus == "uncertain")


def _literal_sums(s: Tensor, t: Tensor, weigh: _Weighing) -> Tensor:
    """Return both sums of the literal form over a block (C, v), for beta = 1 in front of the entropies."""
    h_s, h_t, square = _entropies_and_square(s, t)
    return torch.stack([(square * weigh.inverse(h_s, h_t)).sum(), (weigh.student * h_s + weigh.teacher * h_t).sum()])


def _guarded_sums(s: Tensor, t: Tensor, weigh: _Weighing) -> Tensor:
    """Return both sums of the guarded form over a block (C, v), the entropies in nats."""
    h_s, h_t, square = _entropies_and_square(s, t)
    w = 2.0 * weigh.inverse(h_s.detach(), h_t)
    # max is several times faster than argmax across rows on a CPU; both take the first of equal classes.
    agree = s.max(0).indices == t.max(0).indices
    return torch.stack([(square * w).sum(), (h_s * agree).sum()])


def _entropies_and_square(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both entropies and the squared norm of the difference of probabilities at a block (C, v), each (v,)."""
    log_p, log_q = (torch.log_softmax(widen(x), 0) for x in (s, t))
    p, q = log_p.exp(), log_q.exp()
    # Probabilities sum to 1, so the gradient of H through log p is 0; without it none is lost in rounding.
    return -(p * log_p.detach()).sum(0), -(q * log_q).sum(0), (p - q).square().sum(0)


class _BlockSums(torch.autograd.Function):
    """Sums of a function of blocks, two numbers each; backward runs each block again with autograd."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.function = function
        sums = wide_zeros(student, 2)
        with full_precision(student):
            for _, s, t in voxel_blocks(student, teacher):
                sums += function(s, t)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        with full_precision(student), torch.enable_grad():
            for _, s, t, out in voxel_blocks(student, teacher, gradient):
                # Wide before the gradient is taken: the factors in g (loss weight, loss scale, one over the voxels)
                # enter before the cast to the dtype of the logits, where 1 / voxels alone could be 0.
                s = widen(s.detach()).requires_grad_()
                sums = ctx.function(s, t)
                out.detach().copy_(torch.autograd.grad(sums, s, g.to(sums.dtype))[0])
        return gradient, None, None


class _CrossEntropyDice(torch.autograd.Function):
    """`soft_ce_dice` for logits and probabilities (B, C, *S) and a weight (B, *S) or None."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, q: Tensor, weight: Tensor | None) -> Tensor:
        batch, classes = student.shape[:2]
        cross, product, squares = (wide_zeros(student, batch, classes) for _ in range(3))
        with full_precision(student):
            for b, s, t, w in voxel_blocks(student, q, as_channel(weight)):
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
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        student, q, weight, top, bottom = ctx.saved_tensors
        # Slope of the Dice part at a voxel: w (of_q q + of_p p), with one factor for each image and class.
        factors = top.new_zeros(2, *student.shape[:2])
        factors[0, :, 1:] = -2.0 / bottom / top.numel()
        factors[1, :, 1:] = 2.0 * top / bottom.square() / top.numel()
        of_q, of_p = factors.to(widen(student[:0]).dtype)[..., None]
        per_voxel = student.shape[1] / student.numel()
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        with full_precision(student):
            for b, s, t, w, out in voxel_blocks(student, q, as_channel(weight), gradient):
                p, t = torch.softmax(widen(s), 0), widen(t)
                slope = through_softmax(p, of_q[b] * t + of_p[b] * p)
                slope += per_voxel * (p * t.sum(0) - t)
                out.copy_(slope.mul_(g if w is None else g * w))
        return gradient, None, None


def through_softmax(p: Tensor, slope: Tensor) -> Tensor:
    """Turn a slope by probabilities (C, v) into one by logits."""
    return p * (slope - (p * slope).sum(0))


def as_channel(weight: Tensor | None) -> Tensor | None:
    """Return a weight (B, *S) as a map (B, 1, *S), wide: a gradient times float16 weights would be float16."""
    return None if weight is None else widen(weight).unsqueeze(1)


def _entropy(block: Tensor) -> Tensor:
    """Entropy (v,) at a block (C, v), in nats."""
    log_p = torch.log_softmax(widen(block), 0)
    return -(log_p.exp() * log_p).sum(0)


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which autocast leaves the operations on the device of `x` alone."""
    return torch.autocast(x.device.type, enabled=False)


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def wide_zeros(x: Tensor, *shape: int) -> Tensor:
    """Zeros on the device of `x` to add block sums into: float64, or float32 on mps, which has no float64."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.zeros(shape, dtype=dtype, device=x.device)


def check_pair(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> None:
    """Raise ValueError unless student and teacher are (B, C, *S) with C >= 2, alike, and weight is (B, *S)."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape.")
    if student.ndim < 3 or student.shape[1] < 2:
        raise ValueError(f"expected (B, C, *S) with at least 2 classes, got {tuple(student.shape)}.")
    if weight is not None and weight.shape != student.shape[:1] + student.shape[2:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit the voxels of {tuple(student.shape)}.")


def voxel_blocks(first: Tensor, *others: Tensor | None) -> Iterator[tuple]:
    """Yield `(b, block, ...)`: image index and, for each map (B, C_i, *S), its block (C_i, voxels) of that image.

    Blocks are views for contiguous maps, so results can be written into them; a map of another layout is copied,
    one image at a time. A map that is None yields None. The block size follows the first map.
    """
    numbers = _CPU_BLOCK if first.device.type == "cpu" else max(_CPU_BLOCK, first.numel() // _BLOCKS_PER_BATCH)
    size = max(1, numbers // first.shape[1])
    for b in range(first.shape[0]):
        flat = [None if x is None else x[b].flatten(1) for x in (first, *others)]
        for start in range(0, first[b, 0].numel(), size):
            yield (b, *(None if x is None else x[:, start : start + size] for x in flat))
