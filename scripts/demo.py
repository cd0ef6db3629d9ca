"""The demo: labelled-only against DyCON, from generated images to a report with test scores and pictures.

Cost: at most 15 minutes on two CPU cores (one core and about 1.5 GB for each training), and 100 MB in the folder
--out: the three folders of nnU-Net, logs, and report/ with report.html, as `nnUNetv2_dycon compare` writes it. Called
again it goes on where it stopped. scripts/demo.sh installs what it needs and then runs it.

Both trainings see the same labelled patches in the same number of steps, on a network and a patch that are smaller
than nnU-Net plans (configuration 3d_demo). One seed and a few minutes show that everything works; they do not rank
methods.
"""

import argparse
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.exit_codes import exit_code
from nnunetv2_dycon.files import read_json, write_json
from nnunetv2_dycon.precision import cpu_has_bf16

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_task04 import make_hippocampus

CONFIGURATION = "3d_demo"
PATCH, FEATURES, BATCH = 32, 16, 2
BEAT_SECONDS = 10
ARMS = {"labelled only": "nnUNetTrainerLabeledOnly", "DyCON": "nnUNetTrainerDyCON"}
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "report")  # of --out

# `nnUNetv2_train -device cpu` would take every core for each of the two trainings, which is much slower, and would
# end with a mirrored validation, here on the training cases. These are its own steps, without those two.
TRAIN = """
import sys, torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
dataset, configuration, trainer, device, threads, resume = sys.argv[1:]
torch.set_num_threads(int(threads))
run = get_trainer_from_args(dataset, configuration, 0, trainer, continue_training=bool(int(resume)),
                            device=torch.device(device))
maybe_load_checkpoint(run, bool(int(resume)), False)
run.run_training()
"""


class StepError(Exception):
    """A step that failed, with what to read."""


# ---- running and remembering steps ---------------------------------------------------------------------------


class Demo:
    """One output folder: where everything lies, and which steps are done."""

    def __init__(self, out: Path, dataset: str, threads: int, device: str) -> None:
        self.out, self.dataset, self.threads, self.device = out, dataset, threads, device
        self.id = str(int(dataset[7:10]))
        self.raw, self.preprocessed, self.results = (
            out / name / dataset for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        )
        self.plans = self.preprocessed / "nnUNetPlans.json"
        self.state = out / "steps.json"
        self.seconds: dict[str, float] = read_json(self.state) if self.state.exists() else {}
        self.running: list[subprocess.Popen] = []
        self.lock = threading.Lock()
        self.current = ""
        self.start = time.monotonic()
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "logs"):
            (out / name).mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Print one line with the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        with self.lock:  # two arms speak
            print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)

    @contextmanager
    def step(self, name: str) -> Iterator[bool]:
        """True if the step is still to be done; what ends without an error is remembered with its time."""
        if name in self.seconds:
            self.say(f"{name}: done before")
            yield False
            return
        began, self.current = time.monotonic(), name
        yield True
        with self.lock:
            self.seconds[name] = round(time.monotonic() - began, 1)
            write_json(self.state, self.seconds)
        self.say(f"{name}: {self.seconds[name]:.0f} s")

    def run(self, log: str, *command: str, processes: int = 1, loaders: int = 1) -> None:
        """Run one command to its end; its output goes to logs/LOG.log."""
        environment = os.environ | {
            "nnUNet_raw": str(self.raw.parent),
            "nnUNet_preprocessed": str(self.preprocessed.parent),
            "nnUNet_results": str(self.results.parent),
            "nnUNet_def_n_proc": str(processes),
            "nnUNet_n_proc_DA": str(loaders),
            "nnUNet_compile": "f",  # takes longer than it saves in so short a run
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "MPLBACKEND": "agg",
        }
        path = self.out / "logs" / f"{log}.log"
        with open(path, "a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            with self.lock:
                self.running.append(process)
            if process.wait():
                tail = "".join(f"    {line}\n" for line in path.read_text(errors="replace").splitlines()[-12:])
                raise StepError(f"{Path(command[0]).name} failed; the end of {path}:\n{tail}")

    def command(self, log: str, name: str, *arguments: str | Path, processes: int = 1) -> None:
        """Run a command of nnU-Net or of this package, shown as one would type it."""
        program = Path(sys.executable).parent / name
        if not program.exists():
            raise DataError(f"{program} is missing: type scripts/demo.sh, which installs it.")
        self.say(" ".join(["$", name, *map(str, arguments)]))
        self.run(log, str(program), *map(str, arguments), processes=processes)

    @contextmanager
    def heartbeat(self, progress: Callable[[], str]) -> Iterator[None]:
        """Print a line of progress every few seconds while something runs."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT_SECONDS):
                self.say(f"  {progress()}")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def stop(self) -> None:
        """End what still runs of the processes started here."""
        for process in self.running:
            if process.poll() is None:
                process.terminate()


# ---- data ----------------------------------------------------------------------------------------------------


def make_phantom(demo: Demo, labeled: int) -> None:
    """Raw data set of generated cases: labelled, 36 or so unlabelled, 20 test cases."""
    demo.command("phantom", "nnUNetv2_dycon", "phantom", "-d", demo.id, "--labeled", str(labeled), "--overwrite")


def add_configuration(demo: Demo) -> None:
    """Add the small configuration; its preprocessed data are those of 3d_fullres, so nothing is made twice."""
    plans = read_json(demo.plans)
    full = plans["configurations"]["3d_fullres"]
    network = full["architecture"]
    stages = min(4, network["arch_kwargs"]["n_stages"])
    kwargs = {k: v[:stages] if isinstance(v, list) else v for k, v in network["arch_kwargs"].items()}
    kwargs["n_stages"], kwargs["features_per_stage"] = stages, [FEATURES * 2**i for i in range(stages)]
    kwargs["n_conv_per_stage_decoder"] = kwargs["n_conv_per_stage_decoder"][: stages - 1]
    plans["configurations"][CONFIGURATION] = {
        "inherits_from": "3d_fullres",
        "patch_size": [PATCH] * 3,
        "batch_size": BATCH,
        "architecture": {**network, "arch_kwargs": kwargs},
    }
    write_json(demo.plans, plans)
    demo.say(
        f"configuration {CONFIGURATION}: patch {PATCH}^3 (planned {full['patch_size']}), features "
        f"{kwargs['features_per_stage']} (planned {network['arch_kwargs']['features_per_stage']}), batch {BATCH}"
    )


def prepare(demo: Demo, task04: Path | None, labeled: int) -> None:
    """Everything before training."""
    with demo.step("data") as todo:
        if todo:
            make_hippocampus(demo.raw, task04, labeled) if task04 else make_phantom(demo, labeled)
    with demo.step("plan and preprocess") as todo:
        if todo:
            shutil.rmtree(demo.preprocessed, ignore_errors=True)
            options = ("-d", demo.id, "-c", "3d_fullres", "-npfp", "2", "-np", "2", "--verify_dataset_integrity")
            demo.command("plan", "nnUNetv2_plan_and_preprocess", *options)
            add_configuration(demo)
    with demo.step("preprocess unlabelled") as todo:
        if todo:
            options = ("-d", demo.id, "-c", CONFIGURATION, "-np", "1")
            demo.command("unlabeled", "nnUNetv2_dycon", "preprocess_unlabeled", *options)


# ---- one arm -------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """One training."""

    demo: Demo
    title: str
    trainer: str
    epochs: int
    stage: str = "waiting"

    @property
    def fold(self) -> Path:
        """Folder of the training."""
        return self.demo.results / f"{self.trainer}__nnUNetPlans__{CONFIGURATION}" / "fold_0"

    def run(self) -> None:
        """Train to the end, from the checkpoint that is there if any is."""
        demo, log = self.demo, self.title.replace(" ", "_")
        with demo.step(f"train {self.title}") as todo:
            if todo:
                self.stage = "training"
                where = f"{demo.id} {CONFIGURATION} 0 -tr {self.trainer} -device {demo.device}"
                demo.say(f"training on {demo.threads} thread(s) as by: nnUNetv2_train {where}")
                resume = str(int(any(self.fold.glob("checkpoint_*.pth"))))
                options = (demo.id, CONFIGURATION, self.trainer, demo.device, str(demo.threads), resume)
                demo.run(f"{log}_train", sys.executable, "-c", TRAIN, *options, loaders=0)
        self.stage = "done"

    def _log(self) -> str:
        logs = sorted(self.fold.glob("training_log_*.txt"))
        return logs[-1].read_text(errors="replace") if logs else ""

    def progress(self) -> str:
        """One short phrase: the current stage and its progress."""
        if self.stage != "training":
            return f"{self.title}: {self.stage}"
        text = self._log()
        epochs, losses = re.findall(r": Epoch (\d+)", text), re.findall(r"train_loss (\S+)", text)
        dices = re.findall(r"Pseudo dice \[(?:np\.float32\()?([\d.]+|nan)", text)
        if not epochs:
            return f"{self.title}: starting"
        phrase = f"{self.title}: epoch {int(epochs[-1]) + 1}/{self.epochs}"
        return phrase + (f", loss {losses[-1]}, training Dice {dices[-1]}" if losses and dices else "")

    def seconds_left(self, now: datetime) -> float | None:
        """Seconds until this training ends at the pace of its present start; None before its first epoch has ended."""
        if self.stage == "done":
            return 0.0
        begun = re.findall(r"^(\S+ \S+): Epoch (\d+)", self._log(), re.MULTILINE)
        if self.stage != "training" or len(begun) < 2:
            return None
        (first, one), (last, other) = begun[0], begun[-1]
        since = datetime.fromisoformat(last)
        epoch = (since - datetime.fromisoformat(first)).total_seconds() / (int(other) - int(one))
        return max(0.0, (self.epochs - int(other)) * epoch - (now - since).total_seconds())


def training_progress(arms: list[Arm], now: datetime) -> str:
    """What both trainings do, and when the slower one ends."""
    left = [arm.seconds_left(now) for arm in arms]
    known = [seconds for seconds in left if seconds is not None]
    when = f" | {in_minutes(max(known))} of training left" if len(known) == len(left) else ""
    return " | ".join(arm.progress() for arm in arms) + when


def in_minutes(seconds: float) -> str:
    """Return a time that is an estimate: whole minutes, rounded up."""
    minutes = math.ceil(seconds / 60)
    return f"about {minutes} minute{'s' * (minutes != 1)}"


# ---- results -------------------------------------------------------------------------------------------------


def compare(demo: Demo, arms: list[Arm]) -> Path:
    """Predict the test cases with student and teacher of both trainings, score and draw; returns the report."""
    report = demo.out / "report"
    with demo.step("compare") as todo:
        if todo:
            options = ("-d", demo.id, "-c", CONFIGURATION, "--runs", *(arm.trainer for arm in arms))
            options += ("--weights", "student", "teacher", "--predict", "--disable_tta", "-device", demo.device)
            demo.command("compare", "nnUNetv2_dycon", "compare", *options, "-np", "2", "-o", report, "--overwrite")
    return report


def comparison_progress(demo: Demo) -> str:
    """What the comparison did last, by its log; it is the last step."""
    log = demo.out / "logs" / "compare.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    scored = [line for line in lines if re.match(r"\d+ of \d+: ", line)]
    return f"scoring the test cases, {scored[-1].split(',')[0]}" if scored else "predicting the test cases; then scores"


def first_table(report: Path) -> str:
    """The first table of the report, as text."""
    lines = (report / "report.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next((number for number, line in enumerate(lines[start:], start) if not line.startswith("|")), len(lines))
    return "\n".join(lines[start:end])


# ---- all of it -----------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    parser.add_argument("--task04", type=Path, help="the Decathlon's Task04_Hippocampus, folder or .tar: real scans")
    parser.add_argument("--labeled", type=int, help="labelled cases (default: 4, hippocampus 10)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs, of --iters steps each (default: 20)")
    parser.add_argument("--iters", type=int, help="steps per epoch (default: 40; 20 on a CPU without bf16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of both trainings (default: 0)")
    return parser.parse_args()


def same_options(out: Path, options: dict) -> None:
    """A folder holds one demo and nothing that a demo could replace; other options need another folder."""
    path = out / "options.json"
    foreign = [name for name in FOLDERS if (out / name).exists()]
    if foreign and not path.exists():
        raise DataError(f"{out} holds {foreign[0]}, which no demo made: give another --out.")
    if path.exists() and read_json(path) != options:
        raise DataError(f"{out} holds a demo with other options: give another --out, or delete it. It has {path}.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, options)


def hardware() -> tuple[str, int, bool]:
    """Device, CPU threads for each of two trainings, and whether the processor should compute in bf16."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = torch.cuda.is_available()
    return "cuda" if gpu else "cpu", max(1, cores // 2), not gpu and cpu_has_bf16()


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse what would mean no case or no step."""
    for name in ("labeled", "epochs", "iters"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give 1 or more.")


def run(arguments: argparse.Namespace) -> None:
    """All steps, then the report."""
    check_numbers(arguments)
    task04, labeled = arguments.task04, arguments.labeled or (10 if arguments.task04 else 4)
    if task04 and not task04.exists():
        raise DataError(f"--task04 {task04} does not exist: give the folder Task04_Hippocampus or its .tar.")
    device, threads, bf16 = hardware()
    iters = arguments.iters or (40 if bf16 or device == "cuda" else 20)
    options = {"task04": str(task04.resolve()) if task04 else None, "labeled": labeled, "epochs": arguments.epochs}
    options |= {"iters": iters, "seed": arguments.seed, "bf16": bf16}
    out = arguments.out.resolve()
    same_options(out, options)
    demo = Demo(out, "Dataset504_Hippocampus" if task04 else "Dataset501_Phantom", threads, device)
    suffix = f"_epochs{arguments.epochs}_iters{iters}_valiters2_save5_seed{arguments.seed}{'_bf16' * bf16}"
    arms = [Arm(demo, title, name + suffix, arguments.epochs) for title, name in ARMS.items()]
    demo.say(f"everything goes to {out}; {device}, {threads} thread(s) a training, {'bf16' if bf16 else 'float32'}")
    demo.say("about 15 minutes in all on two idle CPU cores; stopped with Ctrl-C, the same command goes on")
    try:
        with demo.heartbeat(lambda: f"{demo.current} ..."):
            prepare(demo, task04, labeled)
        with demo.heartbeat(lambda: training_progress(arms, datetime.now())), ThreadPoolExecutor(2) as pool:
            try:
                for future in as_completed([pool.submit(arm.run) for arm in arms]):
                    future.result()
            except BaseException:
                demo.stop()  # the other arm too, or the pool would wait for its end
                raise
        with demo.heartbeat(lambda: comparison_progress(demo)):
            report = compare(demo, arms)
    finally:
        demo.stop()
    minutes = ", ".join(f"{arm.title} {demo.seconds[f'train {arm.title}'] / 60:.1f} min" for arm in arms)
    print(
        f"\n{first_table(report)}\n\nTraining: {minutes}. One seed, a few minutes of training: this shows that it runs"
    )
    print("and ranks no methods.\n")
    print(what_next(report))


def what_next(report: Path) -> str:
    """What a user would do now, typed in a new terminal."""
    active = Path(sys.prefix, "bin", "activate")
    source = f"  source {shlex.quote(str(active))}\n" if active.exists() else ""
    return (
        f"Next:\n  open {shlex.quote(str(report / 'report.html'))} in a browser\n"
        "With images of your own, as README.md says under 'Use it on your data':\n"
        f"{source}  nnUNetv2_dycon doctor"
    )


def main() -> int:
    """Run the demo; 0 if all went well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the trainings end too
    return exit_code(_main)


def _main() -> int:
    try:
        run(parse_arguments())
    except StepError as error:
        print(f"error: {error}\nMend it and start the same command again: finished steps are kept.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
