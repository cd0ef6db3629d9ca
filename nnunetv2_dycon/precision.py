"""Which devices multiply in bfloat16, and what stays in float32."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nnunetv2_dycon.errors import ConfigError


def require_bf16(device: torch.device) -> None:
    """Raise ConfigError if the device has no bf16 arithmetic; it would be emulated, slower than float32."""
    fits = {"cuda": torch.cuda.is_bf16_supported, "cpu": cpu_has_bf16}.get(device.type, lambda: False)
    if not fits():
        raise ConfigError(f"this {device.type} has no bf16 arithmetic: leave _bf16 out of the trainer name.")


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bf16 (avx512_bf16 or amx_bf16 in /proc/cpuinfo)."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def in_float32(loss: Callable[[Any, Any], Tensor], device: torch.device) -> Callable[[Any, Any], Tensor]:
    """Return a loss that is computed in float32 also under autocast, for one output (B, C, *S) or a list of them.

    Parameters
    ----------
    loss : callable
        Takes outputs and target.
    device : torch.device
        Where it is computed.
    """

    def wide(outputs: Any, target: Any) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # a loss in bf16 keeps three digits
            single = isinstance(outputs, Tensor)
            return loss(outputs.float() if single else [output.float() for output in outputs], target)

    return wide


def autocast_of(device: torch.device, *, bf16: bool) -> Callable[[], AbstractContextManager]:
    """Return what makes the context of a forward pass: nnU-Net's on CUDA, bfloat16 where it is asked for."""
    if bf16:
        return _bf16_on_cpu if device.type == "cpu" else partial(torch.autocast, device.type, dtype=torch.bfloat16)
    return partial(torch.autocast, "cuda") if device.type == "cuda" else nullcontext


@contextmanager
def _bf16_on_cpu() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16), _ShallowConvolutionsInFloat32():
        yield


class _ShallowConvolutionsInFloat32(TorchFunctionMode):
    """Computes in float32 what oneDNN gets wrong in bfloat16 (seen in torch 2.14.1).

    Where the kernel is deeper than the input, as in the bottleneck of a small patch, the gradient of the weights of a
    3D convolution has memory in it that nothing was written to.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.conv3d or args[0].shape[-3] >= args[1].shape[-3]:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*(arg.float() if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
