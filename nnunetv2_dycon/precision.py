"""Which devices multiply in bfloat16."""

from pathlib import Path

import torch

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
