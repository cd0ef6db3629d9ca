"""Cubes: a patch cut along its axes into boxes of one size, exchanged between patches, and put back.

Shapes: `(B, C, *S)` is batch, channel, space (two or three axes). `cubes` has the number of cubes along each axis, n is
their product. The cubes of a patch are numbered as its voxels are, the last axis fastest.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from nnunetv2_dycon.errors import ConfigError


def partition(x: Tensor, cubes: Sequence[int]) -> Tensor:
    """Return the cubes (B n, C, *side) of patches (B, C, *S), those of a patch one after the other.

    Raises
    ------
    ValueError
        If an axis is not a whole number of cubes.

    Examples
    --------
    >>> partition(torch.arange(8).view(1, 1, 2, 4), (1, 2)).flatten(1).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    axes, space = len(cubes), tuple(x.shape[2:])
    if len(space) != axes or any(s % c for s, c in zip(space, cubes, strict=True)):
        raise ValueError(f"{tuple(cubes)} cubes do not fit patches of {space} voxels.")
    sizes = [size for s, c in zip(space, cubes, strict=True) for size in (c, s // c)]
    order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]  # patch, cubes, channel, voxels of a cube
    pieces = x.reshape(len(x), x.shape[1], *sizes).permute(order)
    return pieces.reshape(len(x) * math.prod(cubes), x.shape[1], *sizes[1::2])


def recover(pieces: Tensor, cubes: Sequence[int]) -> Tensor:
    """Return the patches (B, C, *S) of cubes (B n, C, *side): the inverse of `partition`.

    Raises
    ------
    ValueError
        If there are no whole patches, or another number of axes.
    """
    axes, side = len(cubes), tuple(pieces.shape[2:])
    if len(side) != axes or len(pieces) % math.prod(cubes):
        raise ValueError(f"{tuple(pieces.shape)} are not whole patches of {tuple(cubes)} cubes.")
    count, channels = len(pieces) // math.prod(cubes), pieces.shape[1]
    order = [0, 1 + axes, *(axis for a in range(axes) for axis in (1 + a, 2 + axes + a))]
    whole = pieces.reshape(count, *cubes, channels, *side).permute(order)
    return whole.reshape(count, channels, *(c * s for c, s in zip(cubes, side, strict=True)))


def draw_exchange(patches: int, number: int, device: torch.device, generator: Generator) -> Tensor:
    """Return which patch each cube comes from (B, n): at each of the n places a random permutation of the B patches.

    Parameters
    ----------
    patches, number : int
        B and n.
    device : torch.device
        That of the generator.
    generator : Generator
        Source of the draws.
    """
    return torch.rand((patches, number), generator=generator, device=device).argsort(0)


def exchange(x: Tensor, origin: Tensor, cubes: Sequence[int]) -> Tensor:
    """Return patches whose cube k is that of patch `origin[b, k]` at the same place.

    Parameters
    ----------
    x : Tensor, shape (B, C, *S)
        Patches, or outputs of any resolution that the cubes divide.
    origin : Tensor, shape (B, n)
        At each place a permutation of the patches; `origin.argsort(0)` undoes the exchange.
    cubes : sequence of int
        Cubes along each axis.

    Examples
    --------
    >>> x = torch.tensor([[0, 1], [10, 11]]).view(2, 1, 1, 2)
    >>> exchange(x, torch.tensor([[0, 1], [1, 0]]), (1, 2)).flatten(1).tolist()
    [[0, 11], [10, 1]]
    """
    number = origin.shape[1]
    pieces = partition(x, cubes)
    pieces = pieces.view(len(x), number, *pieces.shape[1:])[origin, torch.arange(number, device=x.device)]
    return recover(pieces.flatten(0, 1), cubes)


def fitting_cubes(patch: Sequence[int], stride: Sequence[int], wanted: int) -> tuple[int, ...]:
    """Return how many cubes a patch is cut into along each axis: `wanted`, or 1 where that does not fit the network.

    The side of a cube is a multiple of the network's total stride, so that every feature map is cut where the patch is.
    A cube alone has more than one voxel at the bottleneck, without which instance norm raises: where it had one, the
    first axis that would be cut stays whole.

    Parameters
    ----------
    patch, stride : sequence of int
        Voxels of the patch, and of the patch for one at the bottleneck, along each axis.
    wanted : int
        Cubes per axis, at least 2.

    Raises
    ------
    ConfigError
        If no axis can be cut.

    Examples
    --------
    >>> fitting_cubes((128, 128, 7), (32, 32, 1), 2)
    (2, 2, 1)
    """
    cubes = [wanted if size % (wanted * step) == 0 else 1 for size, step in zip(patch, stride, strict=True)]
    if math.prod(size // (c * step) for size, c, step in zip(patch, cubes, stride, strict=True)) == 1:
        cubes[next((axis for axis, c in enumerate(cubes) if c > 1), 0)] = 1
    if max(cubes) == 1:
        size, steps = (" x ".join(map(str, numbers)) for numbers in (patch, stride))
        raise ConfigError(
            f"option cubes{wanted}: a patch of {size} voxels is not {wanted} cubes along any axis for a network of "
            f"total stride {steps} (a side is a multiple of the stride, a cube more than one voxel at the bottleneck): "
            "type another number, or _noacross_nowithin for no cubes."
        )
    return tuple(cubes)
