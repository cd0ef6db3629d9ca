"""Watch a long training with loader processes: does anything grow? By hand, on Linux, for hours if it shall tell much.

The data set must be planned and preprocessed; the results go to a temporary folder:

    nnUNet_n_proc_DA=2 python scripts/soak.py -d 501 -c 3d_fullres --minutes 120 -o soak.csv

Each row of the CSV is one look at the training and all processes that it started: memory (proportional set size, so
that what is shared counts once), shared memory of batches, open files, processes. The last lines compare the first and
the last third of the time after the warm-up. Ends with 1 if something grew, or if a process outlived the training. The
training is killed in the end.
"""

import argparse
import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.processes
from tests.processes import children_of, left_after

# What may come on top from the first to the last third: a share, and a number for what is counted in ones.
GROWTH, SLACK = 0.03, {"memory_main_mb": 8, "memory_loaders_mb": 8, "shared_mb": 1, "open_files": 2, "processes": 0}


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-d", required=True, help="id or name of the data set")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("-tr", default="nnUNetTrainerDyCON_epochs100000_save5", help="trainer, with options")
    parser.add_argument("-device", default="cpu", help="cuda, cpu or mps")
    parser.add_argument("--minutes", type=float, default=120, help="how long")
    parser.add_argument("--warm_up", type=float, default=10, help="minutes that do not count")
    parser.add_argument("--every", type=float, default=10, help="seconds from one look to the next")
    parser.add_argument("-o", default="soak.csv", help="CSV to write")
    return parser.parse_args()


def look(main: int) -> dict[str, float]:
    """Return what a training and its processes use now."""
    loaders = children_of(main)
    files, shared = 0, {}
    for process in (main, *loaders):
        for handle in _listed(f"/proc/{process}/fd"):
            files += 1
            try:
                if os.readlink(handle).startswith("/dev/shm/torch_"):
                    found = os.stat(handle)
                    shared[found.st_ino] = found.st_size
            except OSError:
                continue  # closed meanwhile
    return {
        "memory_main_mb": _memory(main),
        "memory_loaders_mb": sum(map(_memory, loaders)),
        "shared_mb": sum(shared.values()) / 1024**2,
        "open_files": files,
        "processes": 1 + len(loaders),
    }


def _listed(folder: str) -> list[str]:
    try:
        return [os.path.join(folder, name) for name in os.listdir(folder)]
    except OSError:
        return []


def _memory(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def watch(training: subprocess.Popen, args: argparse.Namespace) -> list[dict[str, float]]:
    """Look at a training until its time is over; returns one row per look, which the CSV has too."""
    rows, start = [], time.monotonic()
    with open(args.o, "w", newline="") as file:
        while time.monotonic() - start < 60 * args.minutes and training.poll() is None:
            time.sleep(args.every)
            rows.append({"minutes": (time.monotonic() - start) / 60} | look(training.pid))
            writer = csv.DictWriter(file, list(rows[0]))
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow({name: f"{value:.2f}" for name, value in rows[-1].items()})
            file.flush()
    return rows


def grew(rows: list[dict[str, float]], warm_up: float) -> bool:
    """Print the medians of the first and the last third after the warm-up; returns whether anything grew."""
    rows = [row for row in rows if row["minutes"] >= warm_up]
    third, found = len(rows) // 3, False
    if not third:
        print("too short to tell")
        return True
    for name, slack in SLACK.items():
        first, last = (statistics.median(row[name] for row in part) for part in (rows[:third], rows[-third:]))
        more = last > first * (1 + GROWTH) + slack
        print(f"{name:<18} {first:9.1f} {last:9.1f}  {'GREW' if more else 'flat'}")
        found = found or more
    return found


def main() -> int:
    """Run the training, watch it, kill it, and look for what it left."""
    args = arguments()
    results = tempfile.mkdtemp()
    with open(Path(results, "training.log"), "w") as log:
        command = ["nnUNetv2_train", args.d, args.c, args.f, "-tr", args.tr, "-device", args.device]
        environment = {**os.environ, "nnUNet_results": results}
        training = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    rows = watch(training, args)
    if training.poll() is not None:
        print(f"the training ended by itself; its log is in {results}")
        return 1
    loaders = children_of(training.pid)
    training.send_signal(signal.SIGKILL)
    training.wait()
    left = left_after(loaders, 10)
    epochs = Path(results, "training.log").read_text().count("Epoch time")
    print(f"{rows[-1]['minutes']:.0f} minutes, {epochs} epochs, {len(loaders)} loader processes")
    failed = grew(rows, args.warm_up)
    print(f"10 s after SIGKILL: {len(left)} processes left")
    shutil.rmtree(results)
    return int(failed or bool(left))


if __name__ == "__main__":
    sys.exit(main())
