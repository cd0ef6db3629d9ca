"""Cost of one training step of every trainer against stock nnU-Net: seconds, memory and floating-point operations.

On any machine, with a GPU or without, on generated images that are planned and prepared first (minutes, once):

    python scripts/benchmark_steps.py

or on a data set that is planned and prepared, unlabelled images included:

    python scripts/benchmark_steps.py -d 501 -c 3d_fullres

On a GPU: seconds from the start of a step until the GPU has finished it, median after steps that compile, warm up and
choose algorithms; memory is the largest amount that torch had allocated in a step, everything included; trainers run
one after the other. On a CPU: process time of one thread; the trainers take turns; memory is what a step allocates
beyond weights and optimiser state. torch counts the operations, convolutions and matrix products, forward and backward,
where the network is not compiled. All is measured as at the end of a training, when every class is learnt and every
term acts.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.memory
from nnunetv2_dycon.trainers.names import TRAINERS
from tests.memory import peak_bytes

GENERATED = "998"
SHAPES = {"cuda": ("128", "160", "128"), "cpu": ("32", "40", "32")}
WARM_UP = {"cuda": 5, "cpu": 1}
_MANY = 1e12  # voxels right, next to which the mistakes of a network that knows nothing do not count


class Cost(NamedTuple):
    """What a step costs: seconds, bytes, and operations where they were counted."""

    seconds: float
    memory: int
    operations: int | None


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-d", help="id or name of the data set (default: generated images)")
    parser.add_argument("-c", default="3d_fullres", help="configuration (default: 3d_fullres)")
    parser.add_argument("-p", default="nnUNetPlans", help="plans (default: nnUNetPlans)")
    parser.add_argument("-tr", nargs="+", help="trainers in addition to stock, with options (default: all)")
    parser.add_argument("-device", choices=("cuda", "cpu"), help="default: cuda if there is a device")
    parser.add_argument("--shape", nargs=3, help="voxels of the generated images along each axis")
    parser.add_argument("--steps", type=int, default=5, help="measured steps (default: 5)")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def generate(folder: Path, shape: Sequence[str]) -> None:
    """Write, plan and prepare a generated data set in nnU-Net's folders below `folder`, and point nnU-Net there."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()
        os.environ[name] = str(folder / name)
    size = ["-n", "8", "--labeled", "4", "--labeled_scanner", "all", "--test", "1", "--shape", *shape]
    for words in (
        ["nnUNetv2_dycon", "phantom", "-d", GENERATED, *size],
        ["nnUNetv2_plan_and_preprocess", "-d", GENERATED, "-c", "3d_fullres", "-npfp", "2", "-np", "2"],
        ["nnUNetv2_dycon", "preprocess_unlabeled", "-d", GENERATED],
    ):
        program = Path(sys.executable).with_name(words[0])
        environment = os.environ | {"nnUNet_n_proc_DA": "1"}  # with 0 nnU-Net's planning crashes
        done = subprocess.run([program, *words[1:]], env=environment, stdout=sys.stderr, check=False)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(words)} ended with code {done.returncode}; see above")


def begin(name: str, args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """Return a trainer at the end of its training, and its batches."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(args.d, args.c, "all", name, args.p, device=torch.device(args.device))
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    if hasattr(trainer, "method"):
        trainer.step.number = trainer.method.settings.steps
        # With nothing learnt unlabelled terms have no weight, and copy-paste does not even mix.
        trainer.method.learned.counts[:, 0] = _MANY
    return trainer, [next(trainer.dataloader_train) for _ in range(args.steps + WARM_UP[args.device])]


def seconds(trainer: Any, batch: dict[str, Any]) -> float:
    """Return the seconds of one step: of the wall clock on a GPU, else of the processor."""
    if trainer.device.type != "cuda":
        start = time.process_time()
        trainer.train_step(batch)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.train_step(batch)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(trainer: Any, batch: dict[str, Any]) -> int:
    """Return the largest number of bytes in a step: all that is on a GPU, else what the step allocates."""
    if trainer.device.type != "cuda":
        return peak_bytes(lambda: trainer.train_step(batch))
    torch.cuda.reset_peak_memory_stats()
    trainer.train_step(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def operations(fn: Callable[[], object]) -> int:
    """Return the floating-point operations of a call of `fn`."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def measure(names: Sequence[str], args: argparse.Namespace) -> dict[str, Cost]:
    """Return the cost of a step of trainers that take turns."""
    begun = {name: begin(name, args) for name in names}
    warm = WARM_UP[args.device]
    for trainer, batches in begun.values():
        for batch in batches[:warm]:
            trainer.train_step(batch)
    times: dict[str, list[float]] = {name: [] for name in names}
    for k in range(warm, warm + args.steps):
        for name, (trainer, batches) in begun.items():
            times[name].append(seconds(trainer, batches[k]))
    costs = {}
    for name, (trainer, batches) in begun.items():
        compiled = hasattr(trainer.network, "_orig_mod")  # the counter does not look into what is compiled
        counted = None if compiled else operations(lambda t=trainer, b=batches[warm]: t.train_step(b))
        costs[name] = Cost(statistics.median(times[name]), memory(trainer, batches[warm]), counted)
    return costs


def table(costs: dict[str, Cost]) -> str:
    """Return a row for each trainer, with ratios to the first."""
    lines = ["| trainer | operations | time | memory | time of a step (s) | peak (MiB) |", "|---|---|---|---|---|---|"]
    stock = next(iter(costs.values()))
    for name, cost in costs.items():
        counted = "-" if cost.operations is None else f"{cost.operations / stock.operations:.2f}"
        ratios = f"{cost.seconds / stock.seconds:.2f} | {cost.memory / stock.memory:.2f}"
        lines.append(f"| {name} | {counted} | {ratios} | {cost.seconds:.3f} | {cost.memory / 2**20:.0f} |")
    return "\n".join(lines)


def where(args: argparse.Namespace) -> str:
    """Return what it was measured on."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "one thread of a processor"
    data = "generated images" if args.d == GENERATED else f"data set {args.d}"
    return f"{device}, torch {torch.__version__}, {args.c} of {data}, median of {args.steps} steps"


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row for each trainer."""
    args = arguments(argv)
    torch.set_num_threads(1)
    names = ["nnUNetTrainer", *(args.tr or TRAINERS)]
    with tempfile.TemporaryDirectory() as folder:
        if args.d is None:
            args.d = GENERATED
            generate(Path(folder), args.shape or SHAPES[args.device])
        os.environ |= {"nnUNet_n_proc_DA": "0"}
        os.environ["nnUNet_results"] = tempfile.mkdtemp(dir=folder)
        costs: dict[str, Cost] = {}
        for group in [[name] for name in names] if args.device == "cuda" else [names]:
            costs |= measure(group, args)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(f"{where(args)}\n\n{table(costs)}")


if __name__ == "__main__":
    main()
