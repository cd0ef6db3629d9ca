"""The global random states of Python, numpy and torch: read, set, seeded, and kept apart in streams."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def global_states() -> dict[str, Any]:
    """Return the random states of Python, numpy and torch on the CPU, as plain numbers and tensors.

    CUDA is left out: a forked loader process must not touch it, and loaders draw nothing there.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }


def set_global_states(states: dict[str, Any]) -> None:
    """Restore what `global_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*parts: int) -> int:
    """Return a seed below 2**32 that follows from whole numbers; neighbours have nothing in common (unlike sums)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def process_seed(seed: int, rank: int, step: int) -> int:
    """Return the seed of one process of a training that starts, or goes on, at `step`: `seed` for the very first.

    Parameters
    ----------
    seed : int
        Seed of the training.
    rank : int
        Number of the process.
    step : int
        Step at which it starts or goes on.
    """
    return seed if rank == step == 0 else derived_seed(seed, rank, step)


def seed_from_here(salt: str) -> int:
    """Return a seed that follows from the global random states and `salt` without drawing from them."""
    digest = zlib.crc32(salt.encode())
    digest = zlib.crc32(np.random.get_state()[1].tobytes(), digest)
    digest = zlib.crc32(str(np.random.get_state()[2]).encode(), digest)
    return zlib.crc32(torch.get_rng_state().numpy().tobytes(), digest)


def part_from_other_workers() -> None:
    """Make torch's and Python's states in a loader process follow from numpy's.

    Forked workers start with numpy states of their own but with one and the same torch state.
    """
    seed = seed_from_here("worker")
    random.seed(seed)
    torch.manual_seed(seed)


class RandomStream:
    """Random states apart from the global ones, swapped in by `with stream.active():`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.states: dict[str, Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make every global draw inside come from this stream."""
        outside = global_states()
        try:
            if self.states is None:
                seed_everything(self.seed)
            else:
                set_global_states(self.states)
            yield
            self.states = global_states()
        finally:
            set_global_states(outside)
