"""Cost of one training step of every trainer against stock nnU-Net: floating-point operations, time and memory.

The data set must be planned and preprocessed, unlabelled images included, as for a training on a CPU:

    nnUNet_n_proc_DA=0 python scripts/benchmark_steps.py -d 501 -c 3d_fullres

torch counts the operations: convolutions and matrix products, forward and backward. Time is the median CPU seconds of
one thread after a first step; the trainers take turns. Memory is the exact peak of torch's allocator within a step,
without weights and optimiser state. All are measured at the end of a training, when every term acts.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.memory
from nnunetv2_dycon.trainers.names import TRAINERS
from tests.memory import peak_bytes


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-d", required=True, help="id or name of the data set")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-tr", nargs="+", help="trainers in addition to stock, with options (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    return parser.parse_args()


def begin(name: str, args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """Return a trainer at the end of its training, and its batches."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(args.d, args.c, "all", name, args.p, device=torch.device("cpu"))
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.step = 10**6  # stock does not read it
    return trainer, [next(trainer.dataloader_train) for _ in range(args.steps + 1)]


def seconds(trainer: Any, batch: dict[str, Any]) -> float:
    """Return the CPU seconds of one step."""
    start = time.process_time()
    trainer.train_step(batch)
    return time.process_time() - start


def operations(fn: Callable[[], object]) -> int:
    """Return the floating-point operations of a call of `fn`."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def main() -> None:
    """Print one row for each trainer, as ratios to stock."""
    args = arguments()
    torch.set_num_threads(1)
    names = ["nnUNetTrainer", *(args.tr or TRAINERS)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder
        begun = {name: begin(name, args) for name in names}
        for trainer, batches in begun.values():
            trainer.train_step(batches[0])
        times = {name: [] for name in names}
        for k in range(1, args.steps + 1):
            for name, (trainer, batches) in begun.items():
                times[name].append(seconds(trainer, batches[k]))
        rows = {
            name: (
                operations(lambda t=trainer, b=batches[1]: t.train_step(b)),
                statistics.median(times[name]),
                peak_bytes(lambda t=trainer, b=batches[1]: t.train_step(b)),
            )
            for name, (trainer, batches) in begun.items()
        }
    stock = rows["nnUNetTrainer"]
    print("| trainer | operations | time | memory | time of a step (s) | peak (MiB) |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        ratios = " | ".join(f"{value / base:.2f}" for value, base in zip(row, stock, strict=True))
        print(f"| {name} | {ratios} | {row[1]:.3f} | {row[2] / 2**20:.0f} |")


if __name__ == "__main__":
    main()
