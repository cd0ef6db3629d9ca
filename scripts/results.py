"""Arms x seeds on one data set: train, predict the test cases with student and EMA, print the table of docs/results.md.

Cost: the trainings, two at a time with one thread each, and about a minute a training for the predictions. It leaves
nnU-Net's results folders and --out with the predictions and results.json. nnU-Net's three folders must be exported
and the data set planned, with `imagesTs` and `labelsTs`. Called again it goes on: what is finished is not done again.

    python scripts/results.py -d 604 -c 3d_small --options epochs20_iters50_valiters4_save5 --seeds 0 1 2 --out results
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nnunetv2_dycon.precision import cpu_has_bf16

ARMS = ("nnUNetTrainerLabeledOnly", "nnUNetTrainerMeanTeacher", "nnUNetTrainerDyCON")
TRAIN = """
import sys, torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
dataset, configuration, trainer = sys.argv[1:]
torch.set_num_threads(1)
run = get_trainer_from_args(dataset, configuration, 0, trainer, continue_training=True, device=torch.device("cpu"))
maybe_load_checkpoint(run, True, False)
run.run_training()
"""


def call(log: Path, *command: object) -> None:
    """Run one command, single-threaded; its output goes to a log file."""
    environment = {**os.environ, "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    program = Path(sys.executable).parent / words[0]
    words[0] = str(program) if program.exists() else words[0]
    with open(log, "a") as file:
        subprocess.run(words, check=True, env=environment, stdout=file, stderr=subprocess.STDOUT)


def measure(trainer: str, arguments: argparse.Namespace, raw: Path, results: Path) -> dict[str, dict]:
    """Train one arm with one seed and score the test cases; returns nnU-Net's summary of student and teacher."""
    out, log = arguments.out, arguments.out / "logs" / f"{trainer}.log"
    fold = results / f"{trainer}__nnUNetPlans__{arguments.c}" / "fold_0"
    if not (fold / "checkpoint_final.pth").exists():
        call(log, sys.executable, "-c", TRAIN, arguments.d, arguments.c, trainer)
    found = {}
    for weights in ("student", "teacher"):
        model, predicted = out / "models" / f"{trainer}_{weights}", out / "predictions" / f"{trainer}_{weights}"
        if not (predicted / "summary.json").exists():
            names = ("-d", arguments.d, "-tr", trainer, "-c", arguments.c, "-f", 0, "--weights", weights)
            if not model.exists():
                call(log, "nnUNetv2_dycon", "export", *names, "-o", model)
            quick = ("-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta")
            folders = ("-i", raw / "imagesTs", "-o", predicted, "-m", model, "-f", 0)
            call(log, "nnUNetv2_predict_from_modelfolder", *folders, *quick)
            files = ("-djfile", raw / "dataset.json", "-pfile", model / "plans.json", "-np", 1)
            call(log, "nnUNetv2_evaluate_folder", raw / "labelsTs", predicted, *files)
        found[weights] = json.loads((predicted / "summary.json").read_text())
    return found


def dice(summary: dict, label: str) -> float:
    """Mean Dice of one label over the cases whose truth holds it."""
    values = [c["metrics"][label]["Dice"] for c in summary["metric_per_case"] if c["metrics"][label]["n_ref"] > 0]
    return statistics.fmean(values)


def table(found: dict[str, dict[int, dict[str, dict]]], labels: dict[str, str]) -> str:
    """Return Markdown rows: arm and weights, Dice of each structure as `mean (seed by seed)`, mean of structures."""
    lines = [f"| arm | weights | {' | '.join(labels.values())} | mean of structures, by seed | mean ± sd over seeds |"]
    lines.append("|---" * (4 + len(labels)) + "|")
    for arm, seeds in found.items():
        for weights in ("student", "teacher"):
            scores = {seed: {k: dice(s[weights], k) for k in labels} for seed, s in sorted(seeds.items())}
            means = [statistics.fmean(s.values()) for s in scores.values()]
            by_label = " | ".join(" / ".join(f"{s[k]:.3f}" for s in scores.values()) for k in labels)
            spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
            name = {"student": "student", "teacher": "EMA"}[weights]
            by_seed = " / ".join(f"{m:.3f}" for m in means)
            lines.append(f"| {arm} | {name} | {by_label} | {by_seed} | **{statistics.fmean(means):.3f}**{spread} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all arms and seeds, two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, type=int, help="dataset id")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="trainer names, options of a method included")
    parser.add_argument("--options", required=True, help="options of every arm, for example epochs20_iters50_save5")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="seeds of every arm")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for predictions and results.json")
    arguments = parser.parse_args()
    dataset = next(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{arguments.d:03d}_*"))
    results = Path(os.environ["nnUNet_results"], dataset.name)
    tail = "_bf16" if cpu_has_bf16() else ""
    jobs = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms]
    names = [f"{arm}_{arguments.options}_seed{seed}{tail}" for arm, seed in jobs]
    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(lambda name: measure(name, arguments, dataset, results), names))
    found: dict[str, dict[int, dict[str, dict]]] = {}
    for (arm, seed), summary in zip(jobs, summaries, strict=True):
        found.setdefault(arm, {})[seed] = summary
    values = json.loads((dataset / "dataset.json").read_text())["labels"]
    labels = {str(value): name for name, value in values.items() if value}
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1))
    print(table(found, labels))


if __name__ == "__main__":
    main()
