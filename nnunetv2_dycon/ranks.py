"""Exchange between the processes of a distributed training; with one process each function returns its input."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


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


def summed(value: Tensor) -> Tensor:
    """Return the sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def true_everywhere(value: Tensor) -> Tensor:
    """Return whether a boolean tensor is true in every process."""
    everywhere = value.float()
    if world_size() > 1:
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return everywhere > 0


def gathered(value: Any) -> list[Any]:
    """Return the value of every process, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
