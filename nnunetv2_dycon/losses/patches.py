"""FeCL, the focal entropy-aware contrast of DyCON, and the patches that it contrasts.

A patch is one cell of a feature map with spatial size `grid`; it stands for the voxels that adaptive average pooling
puts into the cell. Patches are numbered in the order of the flattened map. Shapes: B image, C class, S space (two or
three axes), n = product of grid, d embedding. Similarities exist only for a block of rows at a time, and the gradient
is written in closed form, so that memory grows with n and not with its square.

References
----------
DyCON (Assefa et al., CVPR 2025); docs/method.md has the choices where the paper leaves the formula open.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d, softplus

from nnunetv2_dycon.losses.voxels import entropy, full_precision, wide_zeros, widen

Rule = Literal["majority", "any_foreground"]

# Smallest share of a patch that makes it a lesion patch under the rule any_foreground.
_LESION_SHARE = 0.1


class Anchors(NamedTuple):
    """Chosen patches: their numbers (B, m) and labels (B, m), both int64."""

    numbers: Tensor
    labels: Tensor


@torch.no_grad()
def labels_from_truth(
    truth: Tensor,
    grid: Sequence[int],
    *,
    num_classes: int,
    ignore_label: int | None = None,
    rule: Rule = "majority",
) -> Tensor:
    """Class of each patch by true labels, -1 where it has none.

    A patch with a single voxel of the ignore label or of a negative label gets -1. Otherwise, with f_c the share of
    class c in the patch, rule `majority` gives the largest class if f_c >= 1/2 (of two equal ones the smaller
    number). Rule `any_foreground` is for lesions smaller than a patch: the largest foreground class if its f_c >
    0.1, background if there is no foreground voxel at all, else -1.

    Parameters
    ----------
    truth : Tensor, shape (B, 1, *S)
        Class numbers, of any integer or floating dtype.
    grid : sequence of int
        Spatial size of the feature map, as many axes as S.
    num_classes : int
        C, without the ignore label.
    ignore_label : int, optional
        Label of voxels that nobody annotated.
    rule : {"majority", "any_foreground"}
        How shares become a class.

    Returns
    -------
    Tensor, shape (B, n), int64

    Raises
    ------
    ValueError
        If truth is not (B, 1, *S), the grid does not fit it, or the rule is unknown.

    Examples
    --------
    >>> truth = torch.tensor([[[[1, 1, 0, 0], [1, 0, 0, -1]]]])     # two patches: 3/4 class 1; one unknown voxel
    >>> labels_from_truth(truth, (1, 2), num_classes=2)
    tensor([[ 1, -1]])
    """
    if truth.ndim < 3 or truth.shape[1] != 1:
        raise ValueError(f"truth {tuple(truth.shape)}: expected (B, 1, *S).")
    _check_grid(truth, grid, rule)
    unknown = truth < 0
    if ignore_label is not None:
        unknown |= truth == ignore_label
    # One class after the other: a one-hot tensor of all would be the largest tensor of the step.
    shares = torch.cat([_pool(truth == c, grid) for c in range(num_classes)], 1)
    return _classes(shares, rule).masked_fill_(_pool(unknown, grid)[:, 0] > 0, -1)


@torch.no_grad()
def covered_share(truth: Tensor, labels: Tensor, grid: Sequence[int], num_classes: int) -> Tensor:
    """Share of each class's voxels that lie in patches of this class: what is not lost by giving patches one class.

    Parameters
    ----------
    truth : Tensor, shape (B, 1, *S)
        Class numbers, of any integer or floating dtype; those outside 0 to C - 1 do not count.
    labels : Tensor, shape (B, n), int64
        Class of each patch, -1 where it has none.
    grid : sequence of int
        Spatial size of the feature map, a divisor of S along each axis.
    num_classes : int
        C.

    Returns
    -------
    Tensor, shape (C,)
        In [0, 1]; nan for a class without a voxel.

    Examples
    --------
    >>> truth = torch.tensor([[[[1, 1, 0, 0], [1, 0, 0, 1]]]])     # two patches of four voxels, of classes 1 and 0
    >>> covered_share(truth, torch.tensor([[1, 0]]), (1, 2), 3)
    tensor([0.7500, 0.7500,    nan])
    """
    _check_grid(truth, grid, "majority")
    of_patch = labels.view(len(labels), 1, *grid).float()
    at_voxel = torch.nn.functional.interpolate(of_patch, size=truth.shape[2:]).long()
    truth = truth.long()
    known = (truth >= 0) & (truth < num_classes)
    of_class = torch.bincount(truth[known], minlength=num_classes)
    covered = torch.bincount(truth[known & (at_voxel == truth)], minlength=num_classes)
    return covered / of_class


@torch.no_grad()
def labels_from_probabilities(
    probabilities: Tensor,
    grid: Sequence[int],
    *,
    gate: float = 0.8,
    rule: Rule = "majority",
    taught: Tensor | None = None,
) -> Tensor:
    """Class of each patch by a teacher's probabilities, -1 where it has none or the teacher is not sure.

    The rules are those of `labels_from_truth`. With `majority` the shares are mean probabilities. With
    `any_foreground` they are shares of the voxels' most probable class, since a mean probability is never exactly 0
    and no patch would be background.

    Parameters
    ----------
    probabilities : Tensor, shape (B, C, *S)
        Sum to 1 over C.
    grid : sequence of int
        Spatial size of the feature map, as many axes as S.
    gate : float
        Mean over the voxels of the largest probability below which a patch gets -1, in [0, 1].
    rule : {"majority", "any_foreground"}
        How shares become a class.
    taught : Tensor, shape (B, 1, *S), bool, optional
        Voxels whose class may be taught; a patch with a single other voxel gets -1.

    Returns
    -------
    Tensor, shape (B, n), int64

    Raises
    ------
    ValueError
        If the grid does not fit or the rule is unknown.

    Examples
    --------
    >>> p = torch.tensor([[[[0.1, 0.2, 0.4]], [[0.9, 0.8, 0.6]]]])     # three patches of one voxel
    >>> labels_from_probabilities(p, (1, 3), gate=0.8)
    tensor([[ 1,  1, -1]])
    """
    _check_grid(probabilities, grid, rule)
    largest, winner = probabilities.max(1, keepdim=True)
    if rule == "majority":
        shares = torch.cat([_pool(channel, grid) for channel in probabilities.split(1, 1)], 1)
    else:
        shares = torch.cat([_pool(winner == c, grid) for c in range(probabilities.shape[1])], 1)
    labels = _classes(shares, rule).masked_fill_(_pool(largest, grid)[:, 0] < gate, -1)
    return labels if taught is None else labels.masked_fill_(_pool(~taught, grid)[:, 0] > 0, -1)


@torch.no_grad()
def patch_weight(logits: Tensor, grid: Sequence[int]) -> Tensor:
    """Weight `exp(mean entropy / ln C)` of each patch, from 1 (sure) to e (knows nothing), detached.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; computed in float32 (float64 stays).
    grid : sequence of int
        Spatial size of the feature map, as many axes as S.

    Returns
    -------
    Tensor, shape (B, n)

    Raises
    ------
    ValueError
        If the grid does not fit.

    Examples
    --------
    >>> patch_weight(torch.tensor([[[[0.0, 80.0]], [[0.0, -80.0]]]]), (1, 2))
    tensor([[2.7183, 1.0000]])
    """
    _check_grid(logits, grid, "majority")
    pooled = _pool(entropy(logits).unsqueeze(1), grid)[:, 0]
    return pooled.div_(math.log(logits.shape[1])).exp_()


@torch.no_grad()
def sample_anchors(labels: Tensor, max_anchors: int, generator: torch.Generator | None = None) -> Anchors:
    """Choose at most `max_anchors` patches of each image, as evenly over its classes as their sizes allow.

    m = min(max_anchors, n) patches are drawn from each image without repetition. Classes take turns, so a small
    class is taken whole before a large one gets more. An image with fewer than m labelled patches fills up with
    unused ones: their label stays -1, so that `fecl` leaves them out and no patch counts twice.

    Parameters
    ----------
    labels : Tensor, shape (B, n), int64
        Class of each patch, -1 for not used.
    max_anchors : int
        Largest number, >= 0; 0 takes all patches in order.
    generator : torch.Generator, optional
        Source of randomness, on any device.

    Returns
    -------
    Anchors
        Patch numbers (B, m), different within an image, and `labels` at these patches.

    Raises
    ------
    ValueError
        If labels are not (B, n) or max_anchors is negative.

    Examples
    --------
    >>> sample_anchors(torch.tensor([[0, 0, 0, 0, 1, -1]]), 2, torch.Generator().manual_seed(0)).labels.sort().values
    tensor([[0, 1]])
    """
    if labels.ndim != 2 or max_anchors < 0:
        raise ValueError(f"labels {tuple(labels.shape)}, max_anchors {max_anchors}: expected (B, n) and at least 0.")
    count = labels.shape[1]
    if max_anchors == 0:
        return Anchors(torch.arange(count, device=labels.device).expand_as(labels), labels)
    device = labels.device if generator is None else generator.device
    shuffled = torch.rand(labels.shape, generator=generator, device=device).argsort(1).to(labels.device)
    drawn = labels.gather(1, shuffled)
    # The turn of a patch is the number of patches of its class that were drawn before it; unused ones come last.
    turn = torch.full_like(drawn, count)
    for c in drawn.unique():
        if c >= 0:
            mine = drawn == c
            turn = torch.where(mine, mine.cumsum(1), turn)
    first = turn.argsort(stable=True)[:, :max_anchors]
    return Anchors(shuffled.gather(1, first), drawn.gather(1, first))


def fecl(
    z: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor | None = None,
    weight: Tensor | None = None,
    tau: float = 0.6,
    gamma: float = 0.5,
    topk: int = 16,
    block: int = 256,
) -> Tensor:
    """Contrast that draws patches of one class together and pushes those of other classes away.

    For patch i with c_ij = z_i . z_j, s = c / tau, s~ = (1 + c) / 2, positives P (same label, without i) and
    negatives N (another label) of the same image::

        log D_i = logsumexp( { s_iq + gamma log s~_iq : q in N },
                             { log sum_q s~_iq^gamma + LSE_topK(z_i . t_q / tau) - log min(K, |N|) } )
        l_i     = 1/|P| sum_k (1 - s~_ik)^gamma softplus(log D_i - s_ik)

    where t are the teacher's embeddings and the second set is there only with a teacher and K > 0. The loss of an
    image is `sum_i u_i l_i / sum_i u_i` over its anchors, the patches with a positive, a negative and u_i > 0. The
    result is the mean over the images that have an anchor; the others do not enter it, so that an image of a single
    class does not dilute the rest. Without any anchor the result is a zero that is joined to the graph of z.
    The focal factors are constants: with a gradient through them "all embeddings equal" is a minimum that attracts.

    Parameters
    ----------
    z : Tensor, shape (B, n, d)
        Student embeddings of unit norm; computed in float32 (float64 stays). The only input that gets a gradient.
    labels : Tensor, shape (B, n), int64
        Class of each patch, -1 for a patch that is not used.
    teacher : Tensor, shape (B, n, d), optional
        Teacher embeddings of the same patches, unit norm.
    weight : Tensor, shape (B, n), optional
        Weights u >= 0 of the anchors; 1 without it.
    tau : float
        Temperature, > 0.
    gamma : float
        Focal exponent, >= 0.
    topk : int
        Number K of hardest teacher negatives, >= 0; 0 leaves the teacher out.
    block : int
        Rows of similarities that exist at a time; changes memory, not the value.

    Returns
    -------
    Tensor, scalar

    Raises
    ------
    ValueError
        If shapes do not fit each other or a number is out of range.

    Examples
    --------
    Two patches of class 0 at right angles and one of class 1 opposite to the first; gamma 0, tau 1. Anchors are the
    first two: s is 0 between them; log D is -1 for the first (c = -1) and 0 for the second (c = 0), so the losses
    are softplus(-1) = 0.3133 and softplus(0) = 0.6931.

    >>> z = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    >>> round(fecl(z, torch.tensor([[0, 0, 1]]), tau=1.0, gamma=0.0).item(), 4)
    0.5032
    """
    settings = _Settings(tau, gamma, topk, block)
    _check_embeddings(z, labels, teacher, weight, settings)
    teacher = None if teacher is None or topk == 0 else teacher.detach()
    weight = None if weight is None else weight.detach()
    with_gradient = torch.is_grad_enabled() and z.requires_grad
    return _FeCL.apply(z, labels, teacher, weight, settings, with_gradient)


class _Settings(NamedTuple):
    """Constants of the loss."""

    tau: float
    gamma: float
    topk: int
    block: int


class _Image(NamedTuple):
    """The used patches of one image: embeddings (n, d), labels (n,), teacher (n, d) or None, numbers of pairs (n,)."""

    z: Tensor
    labels: Tensor
    teacher: Tensor | None
    positives: Tensor
    negatives: Tensor


class _FeCL(torch.autograd.Function):
    """The loss of a batch; the gradient is computed with the value and kept, z-sized, for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        labels: Tensor,
        teacher: Tensor | None,
        weight: Tensor | None,
        settings: _Settings,
        with_gradient: bool,
    ) -> Tensor:
        total, images = wide_zeros(z), 0
        gradient = torch.zeros(z.shape, dtype=widen(z[:0]).dtype, device=z.device) if with_gradient else None
        with full_precision(z):
            for b in range(z.shape[0]):
                used = (labels[b] >= 0).nonzero()[:, 0]
                image = _image(z[b, used], labels[b, used], None if teacher is None else teacher[b, used])
                u = torch.ones_like(image.z[:, 0]) if weight is None else weight[b, used].to(image.z.dtype)
                anchors = ((image.positives > 0) & (image.negatives > 0) & (u > 0)).nonzero()[:, 0]
                if len(anchors) == 0:
                    continue
                images += 1
                slope = None if gradient is None else torch.zeros_like(image.z)
                share = u / u[anchors].sum()
                for rows in anchors.split(settings.block):
                    total += _rows(image, rows, share[rows], settings, slope)
                if gradient is not None and slope is not None:
                    gradient[b, used] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(max(images, 1)))
            ctx.dtype = z.dtype
        return (total / max(images, 1)).to(widen(z[:0]).dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * g).to(ctx.dtype), None, None, None, None, None


def _image(z: Tensor, labels: Tensor, teacher: Tensor | None) -> _Image:
    """Return the used patches in full precision with the number of positives and negatives of each."""
    alike = torch.bincount(labels)[labels]
    return _Image(widen(z), labels, None if teacher is None else widen(teacher), alike - 1, len(labels) - alike)


def _rows(image: _Image, rows: Tensor, share: Tensor, settings: _Settings, slope: Tensor | None) -> Tensor:
    """Return the summed loss of the anchors `rows` (m,) with weights `share` (m,); add its gradient to slope (n, d)."""
    z, tau = image.z, settings.tau
    c = z[rows] @ z.T
    other = image.labels[rows, None] != image.labels
    positive = ~other
    positive.scatter_(1, rows[:, None], False)
    # A cosine of exactly -1 would give log 0; the smallest normal number keeps 0 * log 0 out of gamma = 0.
    closeness = c.add(1.0).div_(2.0).clamp_(torch.finfo(c.dtype).tiny, 1.0)
    log_focal = closeness.log().mul_(settings.gamma)
    focal = closeness.neg_().add_(1.0).pow_(settings.gamma).mul_(positive)
    s = c.div_(tau)
    negative = (s + log_focal).masked_fill_(~other, -math.inf)
    log_d = negative.logsumexp(1)
    if image.teacher is not None:
        hard = (z[rows] @ image.teacher.T).div_(tau).masked_fill_(~other, -math.inf)
        hard, hard_at = hard.topk(min(settings.topk, hard.shape[1]), 1)
        kept = image.negatives[rows].clamp(max=settings.topk).to(z.dtype)
        mass = log_focal.masked_fill_(~other, -math.inf).logsumexp(1)
        log_taught = mass + hard.logsumexp(1) - kept.log()
        log_d = torch.logaddexp(log_d, log_taught)
    margin = log_d[:, None] - s
    focal *= (share / image.positives[rows])[:, None]
    value = (focal * softplus(margin)).sum()
    if slope is None:
        return value
    pull = focal.mul_(margin.sigmoid_())
    push = pull.sum(1)
    by_s = negative.sub_(log_d[:, None]).exp_().mul_(push[:, None]).sub_(pull).div_(tau)
    slope.addmm_(by_s.T, z[rows])
    by_rows = by_s @ z
    if image.teacher is not None:
        factor = hard.softmax(1) * (push * (log_taught - log_d).exp() / tau)[:, None]
        by_rows += torch.einsum("mk,mkd->md", factor, image.teacher[hard_at])
    slope.index_add_(0, rows, by_rows)
    return value


def _check_embeddings(
    z: Tensor, labels: Tensor, teacher: Tensor | None, weight: Tensor | None, settings: _Settings
) -> None:
    """Raise ValueError for shapes that do not fit and numbers out of range."""
    if z.ndim != 3 or labels.shape != z.shape[:2]:
        raise ValueError(
            f"embeddings {tuple(z.shape)} and labels {tuple(labels.shape)}: expected (B, n, d) and (B, n)."
        )
    if teacher is not None and teacher.shape != z.shape:
        raise ValueError(f"student {tuple(z.shape)} and teacher {tuple(teacher.shape)} differ in shape.")
    if weight is not None and weight.shape != labels.shape:
        raise ValueError(f"weight {tuple(weight.shape)} and labels {tuple(labels.shape)} differ in shape.")
    if not (settings.tau > 0 and settings.gamma >= 0 and settings.topk >= 0 and settings.block >= 1):
        raise ValueError(f"{settings}: expected tau > 0, gamma >= 0, topk >= 0 and block >= 1.")


def _pool(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Return the means over the cells of maps (B, 1, *S) as (B, 1, n), in float32 (float64 stays)."""
    pool: Any = adaptive_avg_pool2d if x.ndim == 4 else adaptive_avg_pool3d
    return pool(widen(x), tuple(grid)).flatten(2)


def _classes(shares: Tensor, rule: Rule) -> Tensor:
    """Return the class (B, n) that a rule gives to class shares (B, C, n), -1 for none."""
    if rule == "majority":
        share, label = shares.max(1)
        return label.masked_fill_(share < 0.5, -1)
    share, label = shares[:, 1:].max(1)
    label = torch.where(share > _LESION_SHARE, label + 1, -1)
    return label.masked_fill_((shares[:, 1:] == 0).all(1), 0)


def _check_grid(maps: Tensor, grid: Sequence[int], rule: str) -> None:
    """Raise ValueError unless the grid fits maps (B, C, *S) and the rule exists."""
    space, grid = tuple(maps.shape[2:]), tuple(grid)
    if not (len(grid) == len(space) in (2, 3) and all(1 <= g <= s for g, s in zip(grid, space, strict=True))):
        raise ValueError(f"grid {grid} does not fit the voxels {space}.")
    if rule not in ("majority", "any_foreground"):
        raise ValueError(f"rule {rule!r}: choose majority or any_foreground.")
