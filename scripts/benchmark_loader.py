"""Cost of the loader of labelled and unlabelled patches against two loaders of stock nnU-Net, in one run.

The data set must be planned and preprocessed, unlabelled images included, as for a training on a CPU:

    python scripts/benchmark_loader.py -d 501 -c 3d_fullres

All three draw the same patches with the same augmentations, in turn; time is the CPU seconds of one thread. The ratio
is the median over batches. The last line says how many loader processes a GPU needs: the seconds of a batch over those
of a step.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from nnunetv2_dycon.data.loader import MixedLoader
from nnunetv2_dycon.randomness import RandomStream, seed_everything


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-d", required=True, help="id or name of the data set")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-f", default="all", help="fold")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("--batches", type=int, default=30, help="measured batches")
    return parser.parse_args()


def stock_of(loader: Any) -> Any:
    """Return nnU-Net's loader as it is without this package: its own data set, and names in a list."""
    plain = copy.copy(loader)
    plain._data = loader._data.stock
    plain.indices = list(loader.indices)
    return plain


def seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(mixed: MixedLoader, batches: int) -> list[tuple[float, float, float]]:
    """Return the seconds of a labelled, an unlabelled and a mixed batch of the same patches, for several batches."""
    labeled, unlabeled = stock_of(mixed.labeled), stock_of(mixed.unlabeled.inner)
    found = []
    for number in range(batches + 1):
        seed_everything(2 * number)
        of_labeled = seconds(labeled.generate_train_batch)
        seed_everything(2 * number + 1)
        of_unlabeled = seconds(unlabeled.generate_train_batch)
        seed_everything(2 * number)
        mixed.unlabeled.stream = RandomStream(2 * number + 1)
        with mixed.unlabeled.stream.active():
            pass  # it is seeded when it is used first
        found.append((of_labeled, of_unlabeled, seconds(mixed.generate_train_batch)))
    return found[1:]


def main() -> None:
    """Print the medians and their ratio."""
    from nnunetv2.run.run_training import get_trainer_from_args

    args = arguments()
    torch.set_num_threads(1)
    os.environ["nnUNet_n_proc_DA"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder
        fold = args.f if args.f == "all" else int(args.f)
        trainer = get_trainer_from_args(
            args.d, args.c, fold, "nnUNetTrainerMeanTeacher", args.p, device=torch.device("cpu")
        )
        trainer.on_train_start()
        found = measure(trainer.dataloader_train.data_loader, args.batches)
    patch = " x ".join(map(str, trainer.configuration_manager.patch_size))
    labeled, unlabeled, both = (statistics.median(times) for times in zip(*found, strict=True))
    ratio = statistics.median(mixed / (one + other) for one, other, mixed in found)
    print(f"patch {patch}, {trainer.batch_size} labelled and as many unlabelled, {len(found)} batches")
    print(f"stock: labelled {labeled:.3f} s, unlabelled {unlabeled:.3f} s; both in one loader {both:.3f} s")
    print(f"one loader / sum of two stock loaders: {ratio:.3f}")
    print(f"a GPU with steps of T s needs {statistics.mean(row[2] for row in found):.2f} / T loader processes")


if __name__ == "__main__":
    main()
