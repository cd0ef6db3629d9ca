"""What the voxel losses share: precision, and a walk over blocks of voxels.

Shapes: B batch, C class, S space (two or three axes).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers (classes times voxels) that a block holds: small enough that the temporaries of a loss stay in a CPU's cache
# (and out of the memory peak), large enough that the cost of a call does not show.
_CPU_BLOCK = 1 << 17
# Elsewhere each operation is a launch that costs microseconds whatever its size, so blocks are a share of the whole.
_BLOCKS_PER_BATCH = 32


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which autocast leaves the operations on the device of `x` alone."""
    return torch.autocast(x.device.type, enabled=False)


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def wide_zeros(x: Tensor, *shape: int) -> Tensor:
    """Zeros on the device of `x` to add block sums into: float64, or float32 on mps, which has no float64."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.zeros(shape, dtype=dtype, device=x.device)


def check_pair(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> None:
    """Raise ValueError unless student and teacher are (B, C, *S) with C >= 2, alike, and weight is (B, *S)."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape.")
    if student.ndim < 3 or student.shape[1] < 2:
        raise ValueError(f"expected (B, C, *S) with at least 2 classes, got {tuple(student.shape)}.")
    if weight is not None and weight.shape != student.shape[:1] + student.shape[2:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit the voxels of {tuple(student.shape)}.")


def voxel_blocks(*maps: Tensor | None) -> Iterator[tuple]:
    """Yield `(b, block, ...)`: image index and, for each map (B, C_i, *S), its block (C_i, voxels) of that image.

    Blocks are views for contiguous maps, so results can be written into them; a map of another layout is copied,
    one image at a time. A map that is None yields None. The block size follows the first map.
    """
    first = maps[0]
    numbers = _CPU_BLOCK if first.device.type == "cpu" else max(_CPU_BLOCK, first.numel() // _BLOCKS_PER_BATCH)
    size = max(1, numbers // first.shape[1])
    for b in range(first.shape[0]):
        flat = [None if x is None else x[b].flatten(1) for x in maps]
        for start in range(0, flat[0].shape[1], size):
            yield (b, *(None if x is None else x[:, start : start + size] for x in flat))
