"""What recipes make of a teacher's output: hard labels, and which voxels to trust.

Shapes: B batch, C class, S space (two or three axes). Everything here is a constant of the step: no gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nnunetv2_dycon.losses.consistency import entropy
from nnunetv2_dycon.losses.voxels import full_precision, widen


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
        Smallest probability of the class, in [0, 1]; 0 keeps every voxel.

    References
    ----------
    The gate is that of FixMatch (Sohn et al., NeurIPS 2020) and UniMatch (Yang et al., CVPR 2023).

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


@torch.no_grad()
def certain_voxels(logits: Tensor, threshold: float) -> Tensor:
    """Return 1 for a voxel whose entropy is below `threshold` times the largest, ln C, else 0.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; the logarithm of a mean probability will do.
    threshold : float
        Share of ln C, at least 0.

    Returns
    -------
    Tensor, shape (B, *S), float32

    References
    ----------
    UA-MT (Yu et al., MICCAI 2019), there with ln 2 for two classes.

    Examples
    --------
    Probabilities (3/4, 1/4): entropy 0.562 = 0.811 ln 2.

    >>> logits = torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1)
    >>> certain_voxels(logits, 0.80).item(), certain_voxels(logits, 0.82).item()
    (0.0, 1.0)
    """
    h = entropy(logits)
    return (h < threshold * math.log(logits.shape[1])).to(h.dtype)
