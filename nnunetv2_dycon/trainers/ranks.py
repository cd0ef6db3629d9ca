"""What the processes of a distributed training agree on; each function returns its input where there is only one."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnunetv2_dycon.trainers.history import Row, epoch_means


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_weights(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes, for modules that DistributedDataParallel does not know.

    A second network's coarsest output may have weight 0 in nnU-Net's loss, and then no gradient in any process.
    """
    if world_size() > 1:
        for gradient in (p.grad for p in parameters if p.grad is not None):
            dist.all_reduce(gradient)
            gradient /= world_size()


def finite_everywhere(total: Tensor) -> bool:
    """Return whether a loss is finite in every process."""
    finite = torch.isfinite(total).float()
    if world_size() > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def mean_row(row: Row) -> Row:
    """Return the mean of each figure over processes."""
    return row if world_size() == 1 else epoch_means(_gathered(row))


def sum_counts(counts: np.ndarray) -> np.ndarray:
    """Return the sum of arrays over processes."""
    return counts if world_size() == 1 else np.sum(_gathered(counts), 0)


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
