"""Classes, weights and choice of the patches that FeCL contrasts.

A patch is one cell of a feature map with spatial size `grid`; it stands for the voxels that adaptive average pooling
puts into the cell. Patches are numbered in the order of the flattened map. Shapes: B image, C class, S space (two or
three axes), n = product of grid.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from nnunetv2_dycon.losses.consistency import entropy
from nnunetv2_dycon.losses.voxels import widen

Rule = Literal["majority", "any_foreground"]

# Smallest share of a patch that makes it a lesion patch under the rule any_foreground.
_LESION_SHARE = 0.1


class Anchors(NamedTuple):
    """Chosen patches: their numbers (B, m) and labels (B, m), both int64."""

    index: Tensor
    labels: Tensor


@torch.no_grad()
def labels_from_target(
    target: Tensor,
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
    target : Tensor, shape (B, 1, *S)
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
        If target is not (B, 1, *S), the grid does not fit it, or the rule is unknown.

    Examples
    --------
    >>> target = torch.tensor([[[[1, 1, 0, 0], [1, 0, 0, -1]]]])     # two patches: 3/4 class 1; one unknown voxel
    >>> labels_from_target(target, (1, 2), num_classes=2)
    tensor([[ 1, -1]])
    """
    if target.ndim < 3 or target.shape[1] != 1:
        raise ValueError(f"target {tuple(target.shape)}: expected (B, 1, *S).")
    _check(target, grid, rule)
    unknown = target < 0
    if ignore_label is not None:
        unknown |= target == ignore_label
    # One class after the other: a one-hot tensor of all would be the largest tensor of the step.
    shares = torch.cat([_pool(target == c, grid) for c in range(num_classes)], 1)
    return _classes(shares, rule).masked_fill_(_pool(unknown, grid)[:, 0] > 0, -1)


@torch.no_grad()
def labels_from_probabilities(
    probabilities: Tensor, grid: Sequence[int], *, gate: float = 0.8, rule: Rule = "majority"
) -> Tensor:
    """Class of each patch by a teacher's probabilities, -1 where it has none or the teacher is not sure.

    The rules are those of `labels_from_target`. With `majority` the shares are mean probabilities. With
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
    _check(probabilities, grid, rule)
    largest, winner = probabilities.max(1, keepdim=True)
    if rule == "majority":
        shares = torch.cat([_pool(channel, grid) for channel in probabilities.split(1, 1)], 1)
    else:
        shares = torch.cat([_pool(winner == c, grid) for c in range(probabilities.shape[1])], 1)
    return _classes(shares, rule).masked_fill_(_pool(largest, grid)[:, 0] < gate, -1)


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
    _check(logits, grid, "majority")
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


def _pool(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Return the means over the cells of maps (B, 1, *S) as (B, 1, n), in float32 (float64 stays)."""
    pool = adaptive_avg_pool2d if x.ndim == 4 else adaptive_avg_pool3d
    return pool(widen(x), tuple(grid)).flatten(2)


def _classes(shares: Tensor, rule: Rule) -> Tensor:
    """Return the class (B, n) that a rule gives to class shares (B, C, n), -1 for none."""
    if rule == "majority":
        share, label = shares.max(1)
        return label.masked_fill_(share < 0.5, -1)
    share, label = shares[:, 1:].max(1)
    label = torch.where(share > _LESION_SHARE, label + 1, -1)
    return label.masked_fill_((shares[:, 1:] == 0).all(1), 0)


def _check(maps: Tensor, grid: Sequence[int], rule: str) -> None:
    """Raise ValueError unless the grid fits maps (B, C, *S) and the rule exists."""
    space, grid = tuple(maps.shape[2:]), tuple(grid)
    if not (len(grid) == len(space) in (2, 3) and all(1 <= g <= s for g, s in zip(grid, space, strict=True))):
        raise ValueError(f"grid {grid} does not fit the voxels {space}.")
    if rule not in ("majority", "any_foreground"):
        raise ValueError(f"rule {rule!r}: choose majority or any_foreground.")
