"""Connected pieces of what a network says: for structures that are one piece, all but the largest are mistakes."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nnunetv2_dycon.views import HARD_LOGIT


@torch.no_grad()
def largest_pieces(logits: Tensor) -> Tensor:
    """Return logits that are sure of background wherever a voxel is not in the largest piece of its class.

    A voxel's class is the most probable one. Voxels of a class touch by faces, edges or corners. The pieces are found
    on the CPU, so a device waits for it.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; class 0 is the background.

    Returns
    -------
    Tensor, shape (B, C, *S)
        Detached, of the same dtype.

    References
    ----------
    BCP (Bai et al., CVPR 2023) keeps the largest piece of its pseudo-labels.
    """
    said = logits.argmax(1).cpu().numpy()
    stray = np.zeros(said.shape, bool)
    touching = ndimage.generate_binary_structure(said.ndim - 1, said.ndim - 1)
    for labels, strays in zip(said, stray, strict=True):
        for c in np.unique(labels[labels > 0]):
            pieces, number = ndimage.label(labels == c, touching)
            if number > 1:
                sizes = np.bincount(pieces.ravel())
                sizes[0] = 0
                strays |= (pieces > 0) & (pieces != sizes.argmax())
    background = torch.full_like(logits[:1], -HARD_LOGIT)
    background[:, 0] = HARD_LOGIT
    return torch.where(torch.from_numpy(stray).to(logits.device)[:, None], background, logits)
