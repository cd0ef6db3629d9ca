"""Connected pieces of a class: where a structure is one piece, all but the largest piece of an answer are mistakes."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from nnunetv2_dycon import ranks
from nnunetv2_dycon.views import HARD_LOGIT

# A class is one piece if at most this share of its true voxels lies in other pieces: a thin part of a ring breaks at
# the border of some patches, and augmentation cuts off single voxels.
_STRAY = 0.01


class OnePiece(nn.Module):
    """Which classes are one piece in the labelled patches, by the truth of all patches seen so far.

    The counts (voxels outside the largest piece of their class in a patch, and all voxels, of each class) are those of
    all processes, and belong to the checkpoint. Patches count, not whole cases: a structure that the border of a patch
    often cuts in two is not one piece.

    Parameters
    ----------
    classes : int
        C, background included.
    """

    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, classes))

    @torch.no_grad()
    def see(self, labels: Tensor) -> None:
        """Count the true labels (B, 1, *S) of labelled patches; labels that are not a class do not count."""
        patches = labels[:, 0].cpu().numpy()
        classes = self.counts.shape[1]
        seen = np.zeros((2, classes))
        for patch in patches:
            inside = (patch > 0) & (patch < classes)
            for row, voxels in zip(seen, (strays(patch, range(1, classes)), inside), strict=True):
                row += np.bincount(patch[voxels].astype(np.int64), minlength=classes)
        now = torch.from_numpy(seen).to(self.counts)
        self.counts += ranks.mean_everywhere(now) * ranks.world_size()

    @property
    def classes(self) -> list[int]:
        """The foreground classes that are one piece; one that was not seen is not."""
        stray, voxels = self.counts
        return ((voxels > 0) & (stray <= _STRAY * voxels)).nonzero()[:, 0].tolist()


@torch.no_grad()
def largest_pieces(logits: Tensor, classes: list[int] | None = None) -> Tensor:
    """Return logits that are sure of background wherever a voxel is not in the largest piece of its class.

    A voxel's class is the most probable one. Voxels of a class touch by faces, edges or corners. The pieces are found
    on the CPU, so a device waits for it.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *S)
        Any floating dtype; class 0 is the background.
    classes : list of int, optional
        The classes that keep their largest piece alone; all of the foreground by default.

    Returns
    -------
    Tensor, shape (B, C, *S)
        Detached, of the same dtype.

    References
    ----------
    BCP (Bai et al., CVPR 2023) keeps the largest piece of its pseudo-labels.
    """
    said = logits.argmax(1).cpu().numpy()
    chosen = range(1, logits.shape[1]) if classes is None else classes
    stray = torch.from_numpy(np.stack([strays(labels, chosen) for labels in said])).to(logits.device)
    background = torch.full_like(logits[:1], -HARD_LOGIT)
    background[:, 0] = HARD_LOGIT
    return torch.where(stray[:, None], background, logits)


def strays(labels: NDArray, classes: range | list[int]) -> NDArray[np.bool_]:
    """Return which voxels of a label map (*S) are of one of the classes and not in its largest piece.

    Of equally large pieces the first one counts as the largest.
    """
    found = np.zeros(labels.shape, bool)
    touching = ndimage.generate_binary_structure(labels.ndim, labels.ndim)
    # Each class is searched in its bounding box alone: a patch has many voxels, an organ few of them.
    boxes = ndimage.find_objects(labels.astype(np.int32), max_label=max(classes, default=0))
    for c in classes:
        box = boxes[c - 1]
        if box is None:
            continue
        pieces, number = ndimage.label(labels[box] == c, touching)
        if number > 1:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            found[box] |= (pieces > 0) & (pieces != sizes.argmax())
    return found
