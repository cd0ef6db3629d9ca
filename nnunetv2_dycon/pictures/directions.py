"""Random directions in the space of a network's weights, each filter as long as the network's own.

References
----------
Li, Xu, Taylor, Studer, Goldstein, Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

Direction = Mapping[str, Tensor]


def random_direction(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a random direction of which each filter has the norm of the network's own filter.

    Biases and the weights of norms, which have one axis, do not move: the networks would be the same at another scale.

    Parameters
    ----------
    network : nn.Module
        A plain network; its device is that of the direction.
    generator : torch.Generator
        On the CPU, so that the direction does not depend on the device.

    Returns
    -------
    dict of str to Tensor
        By names of parameters, for those that move.
    """
    transposed = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, _ConvTransposeNd)}
    direction = {}
    for name, weight in network.named_parameters():
        if weight.ndim < 2:
            continue
        step = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
        axis = 1 if name in transposed else 0
        direction[name] = step * (filter_norms(weight.detach(), axis) / filter_norms(step, axis).clamp_min(1e-12))
    return direction


def filter_norms(weight: Tensor, axis: int) -> Tensor:
    """Return the norm of each filter along `axis`, in a shape that multiplies the weight."""
    others = [other for other in range(weight.ndim) if other != axis]
    return weight.square().sum(others, keepdim=True).sqrt()


@contextmanager
def moved_weights(network: nn.Module, directions: Sequence[Direction]) -> Iterator["Mover"]:
    """Give a function object that moves the network; on leaving, also by an error, its weights are what they were.

    Parameters
    ----------
    network : nn.Module
        A plain network.
    directions : sequence of mapping
        As `random_direction` returns them.
    """
    parameters = dict(network.named_parameters())
    before = {name: parameters[name].detach().clone() for direction in directions for name in direction}
    try:
        yield Mover(parameters, before, directions)
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                parameters[name].copy_(weight)


class Mover:
    """Puts the network at a point of the plane that the directions span."""

    def __init__(
        self, parameters: Mapping[str, Tensor], before: Mapping[str, Tensor], directions: Sequence[Direction]
    ) -> None:
        self._parameters, self._before, self._directions = parameters, before, directions

    @torch.no_grad()
    def __call__(self, *at: float) -> None:
        """Move to the weights plus `at[i]` times direction i; zeros give exactly the weights."""
        for name, weight in self._before.items():
            parameter = self._parameters[name].copy_(weight)
            for share, direction in zip(at, self._directions, strict=True):
                if share and name in direction:
                    parameter.add_(direction[name], alpha=share)
