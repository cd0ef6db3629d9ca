"""GADice and GACE, the gradient-aware losses for classes of very different size.

With Dice a class that is absent from a batch pushes its probabilities down with a strength that depends on nothing
but one over them; with cross-entropy a small class moves the network by its share of the voxels. Here an absent class
has a bounded push, and a class counts by the root of its share.

References
----------
Qi, Wu and Chan, ECCV 2024; where the paper leaves a formula open it is that of the released code.
"""

import torch
from torch import Tensor

from nnunetv2_dycon.losses.hard_labels import ClassSums, ClassTerms, DiceCE, Everywhere, loss_by_class, same

# Added to quotients, as in the released code: smaller than any single voxel.
_TINY = 1e-10


def gradient_aware(
    logits: Tensor,
    labels: Tensor,
    *,
    keep: float = 1.0,
    ignore_label: int | None = None,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    everywhere: Everywhere = same,
) -> DiceCE:
    """GADice and GACE against hard labels.

    GADice is the mean over all classes, background included, of `1 - 2 sum p y / (sum p^2 + sum y)` for a class that
    occurs in the labels, else of `sum q p`, where `q = p / sum (1 - y)` is constant: its value is the mean of p^2,
    its gradient half of that mean's. Sums are over the voxels of all images together.

    GACE is `sum_c sum_{i in c} CE_i / sqrt(n_c K)` over the K voxels of largest cross-entropy, n_c of which have label
    c: the mean cross-entropy of each class times the root of its share.

    Parameters
    ----------
    logits, labels, keep, ignore_label, weight, everywhere
        As in `hard_labels.loss_by_class`, errors included. The paper keeps a share of 0.1 with true labels and all
        voxels with pseudo-labels.
    class_weight : Tensor, shape (C,), optional
        Factor of each class's summand in both parts, detached; 1 without it.

    Returns
    -------
    DiceCE
        Two scalars in float32 (float64 for float64 logits).

    Examples
    --------
    Two voxels of class 0 with p = (1/2, 1/2). Class 0: 1 - 2 / (1/2 + 2) = 0.2; class 1 is absent: 1/4. The mean
    cross-entropy is ln 2, and the share of class 0 is 1.

    >>> parts = gradient_aware(torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 1, 2))
    >>> [round(part.item(), 4) for part in parts]
    [0.225, 0.6931]
    """

    def rule(sums: ClassSums) -> ClassTerms:
        one = torch.ones_like(sums.truth) if class_weight is None else class_weight.detach().to(sums.truth)
        mean = one / len(one)
        present = sums.truth > 0
        top, bottom = 2.0 * sums.product + _TINY, sums.squares + sums.truth + _TINY
        others = (sums.truth.sum() - sums.truth).clamp_min(_TINY)
        scale = (sums.kept * sums.kept.sum()).sqrt() + _TINY
        return ClassTerms(
            dice=mean * torch.where(present, 1.0 - top / bottom, sums.squares / others),
            ce=one * sums.cross / scale,
            of_label=mean * torch.where(present, -2.0 / bottom, 0.0),
            of_p=mean * torch.where(present, 2.0 * top / bottom.square(), 1.0 / others),
            of_one=torch.zeros_like(mean),
            of_ce=one / scale,
        )

    return loss_by_class(
        logits, labels, rule, keep=keep, ignore_label=ignore_label, weight=weight, everywhere=everywhere
    )
