"""Dice and cross-entropy with a weight for each class.

References
----------
DHC (Wang et al., MICCAI 2023), which takes Dice over all images together, without squares and without background.
"""

import torch
from torch import Tensor

from nnunetv2_dycon.losses.hard_labels import ClassSums, ClassTerms, DiceCE, Everywhere, loss_by_class, same

# Voxels added to both sides of the Dice quotient.
_SMOOTH = 1.0


def class_weighted(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor,
    *,
    ignore_label: int | None = None,
    weight: Tensor | None = None,
    everywhere: Everywhere = same,
) -> DiceCE:
    """Class-weighted Dice and cross-entropy against hard labels.

    With v_c the weight of class c: Dice is the mean over foreground classes of `v_c (1 - (2 sum p y + 1) /
    (sum p + sum y + 1))`, sums over all images; cross-entropy is `sum_i v_i CE_i / sum_i v_i`, v_i the weight of
    voxel i's label, and 0 where no voxel has a weight.

    Parameters
    ----------
    logits, labels, ignore_label, weight, everywhere
        As in `hard_labels.loss_by_class`, errors included.
    class_weight : Tensor, shape (C,)
        Weights >= 0, detached.

    Returns
    -------
    DiceCE
        Two scalars in float32 (float64 for float64 logits).

    Examples
    --------
    Two voxels, one of each class, p = (1/2, 1/2), weights (0, 2): Dice 2 (1 - 2 / 3), cross-entropy that of class 1.

    >>> parts = class_weighted(torch.zeros(1, 2, 1, 2), torch.tensor([[[[0, 1]]]]), torch.tensor([0.0, 2.0]))
    >>> [round(part.item(), 4) for part in parts]
    [0.6667, 0.6931]
    """

    def rule(sums: ClassSums) -> ClassTerms:
        v = class_weight.detach().to(sums.truth)
        foreground = torch.ones_like(v)
        foreground[0] = 0.0
        mean = v * foreground / (len(v) - 1)
        top, bottom = 2.0 * sums.product + _SMOOTH, sums.predicted + sums.truth + _SMOOTH
        total = (v * sums.kept).sum()
        of_ce = v / torch.where(total > 0, total, 1.0)
        return ClassTerms(
            dice=mean * (1.0 - top / bottom),
            ce=of_ce * sums.cross,
            of_label=-2.0 * mean / bottom,
            of_p=torch.zeros_like(v),
            of_one=mean * top / bottom.square(),
            of_ce=of_ce,
        )

    return loss_by_class(logits, labels, rule, ignore_label=ignore_label, weight=weight, everywhere=everywhere)
