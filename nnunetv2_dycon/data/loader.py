"""One loader, one pool of workers: labelled patches as stock draws them, unlabelled ones next to them.

nnU-Net's loader and transforms draw from the global random states of Python, numpy and torch. A second source that
did the same would shift the labelled patches; each further source therefore has random states of its own.
"""

import os
from typing import Any

import numpy as np
from batchgenerators.dataloading.data_loader import DataLoader
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_dycon.data.checked_cases import CheckedCases
from nnunetv2_dycon.randomness import RandomStream, part_from_other_workers, seed_from_here


class IsolatedLoader(DataLoader):
    """A loader whose draws leave the global random states as they were."""

    def __init__(self, inner: nnUNetDataLoader, seed: int) -> None:
        super().__init__(None, inner.batch_size, 1, None, True, False, True)
        self.inner = inner
        self.stream = RandomStream(seed)
        self.transforms = inner.transforms  # nnU-Net writes them into debug.json
        self.home = os.getpid()

    def generate_train_batch(self) -> dict[str, Any]:
        """Return a batch of the inner loader."""
        if os.getpid() != self.home:
            self.home = os.getpid()
            self.stream = RandomStream(seed_from_here("worker"))
        with self.stream.active():
            return self.inner.generate_train_batch()


class MixedLoader(DataLoader):
    """Labelled patches as stock, and unlabelled ones under `unlabeled` and `unlabeled_keys`.

    Parameters
    ----------
    labeled : nnUNetDataLoader
        Stock's loader, drawing from the global random states as stock does.
    unlabeled : IsolatedLoader or None
        Its targets are dropped here: nothing downstream can see them.
    """

    def __init__(self, labeled: nnUNetDataLoader, unlabeled: IsolatedLoader | None) -> None:
        super().__init__(None, labeled.batch_size, 1, None, True, False, True)
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.transforms = labeled.transforms  # nnU-Net writes them into debug.json
        self.home = os.getpid()

    def generate_train_batch(self) -> dict[str, Any]:
        """Return `data`, `target`, `keys` of the labelled half and `unlabeled`, `unlabeled_keys`."""
        if os.getpid() != self.home:
            self.home = os.getpid()
            part_from_other_workers()
        batch = self.labeled.generate_train_batch()
        if self.unlabeled is not None:
            extra = self.unlabeled.generate_train_batch()
            batch["unlabeled"], batch["unlabeled_keys"] = extra["data"], extra["keys"]
        return batch


def unlabeled_loader(
    labeled: nnUNetDataLoader,
    dataset: CheckedCases,
    batch_size: int,
    seed: int,
    label_manager: LabelManager,
) -> IsolatedLoader:
    """Return a loader of `batch_size` unlabelled patches at uniform positions, with the labelled half's transforms.

    Parameters
    ----------
    labeled : nnUNetDataLoader
        Loader of the labelled half, whose sizes and transforms are taken.
    dataset : CheckedCases
        The prepared unlabelled cases.
    batch_size : int
        Unlabelled patches per batch.
    seed : int
        Start of its random states.
    label_manager : LabelManager
        nnU-Net's.
    """
    leading = int(labeled.patch_size_was_2d)  # a 2d loader holds its sizes with a leading 1
    inner = nnUNetDataLoader(
        dataset,
        batch_size,
        list(labeled.patch_size)[leading:],
        list(labeled.final_patch_size)[leading:],
        label_manager,
        oversample_foreground_percent=0.0,
        transforms=labeled.transforms,
    )
    inner.indices = np.array(inner.indices)  # otherwise numpy makes an array of all names for each draw
    inner.has_ignore = False  # otherwise nnU-Net looks for positions among annotated voxels, and there are none
    return IsolatedLoader(inner, seed)
