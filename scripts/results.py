"""Arms x seeds on one data set: train, score the test cases with student and EMA, print the table of docs/results.md.

Cost: the trainings, two at a time with one thread each, and about a minute a training for the test cases. It leaves
nnU-Net's results folders, and --out with models, predictions and scores. nnU-Net's three folders must be exported and
the data set planned, with `imagesTs` and `labelsTs`. Called again it goes on: what is finished is not done again.

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
from typing import Any

import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_dycon.export import export_model
from nnunetv2_dycon.precision import cpu_has_bf16

ARMS = ("nnUNetTrainerLabeledOnly", "nnUNetTrainerMeanTeacher", "nnUNetTrainerDyCON")
WEIGHTS = {"student": "student", "teacher": "EMA"}
# `nnUNetv2_train -device cpu` takes every core for each training and ends with a mirrored validation; this does not.
TRAIN = """
import sys, torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
dataset, configuration, trainer = sys.argv[1:]
torch.set_num_threads(1)
run = get_trainer_from_args(dataset, configuration, 0, trainer, continue_training=True, device=torch.device("cpu"))
maybe_load_checkpoint(run, True, False)
run.run_training()
"""
Scores = dict[str, dict[str, float]]  # case -> label -> Dice, where the truth holds the label


def train(trainer: str, arguments: argparse.Namespace, results: Path) -> None:
    """Train one arm with one seed in a process of its own, or go on with it, if it is not finished."""
    if (results / f"{trainer}__nnUNetPlans__{arguments.c}" / "fold_0" / "checkpoint_final.pth").exists():
        return
    environment = {**os.environ, "nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"}
    log = arguments.out / "logs" / f"{trainer}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", TRAIN, str(arguments.d), arguments.c, trainer]
    with open(log, "a") as file:
        subprocess.run(command, check=True, env=environment, stdout=file, stderr=subprocess.STDOUT)


def score(trainer: str, weights: str, arguments: argparse.Namespace, raw: Path) -> Scores:
    """Predict the test cases with the final weights of student or teacher, and score them with nnU-Net's own Dice."""
    name = f"{trainer}_{weights}"
    file = arguments.out / "scores" / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    model, predicted = arguments.out / "models" / name, arguments.out / "predictions" / name
    if not model.exists():
        export_model(arguments.d, trainer, arguments.c, weights=weights, output=model)
    predicted.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    predictor.predict_from_files_sequential(str(raw / "imagesTs"), str(predicted))
    labels = list(label_names(raw))
    scores: Scores = {}
    for truth in sorted((raw / "labelsTs").iterdir()):
        pair = (str(truth), str(predicted / truth.name))
        found = compute_metrics(*pair, SimpleITKIO(), [int(label) for label in labels])["metrics"]
        scores[truth.name] = {k: found[int(k)]["Dice"] for k in labels if found[int(k)]["n_ref"] > 0}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(scores, indent=1))
    part.replace(file)
    return scores


def label_names(raw: Path) -> dict[str, str]:
    """Foreground label numbers and names."""
    labels = json.loads((raw / "dataset.json").read_text())["labels"]
    return {str(value): name for name, value in labels.items() if value}


def table(found: dict[str, dict[str, dict[int, Scores]]], labels: dict[str, str]) -> str:
    """Return Markdown rows for arm -> weights -> seed -> scores: Dice of each structure seed by seed, and the mean."""
    lines = [f"| arm | weights | {' | '.join(labels.values())} | mean of structures | mean ± sd over seeds |"]
    lines.append("|---" * (4 + len(labels)) + "|")
    for arm, by_weights in found.items():
        for weights, seeds in by_weights.items():
            means = [
                {k: statistics.fmean(case[k] for case in scores.values() if k in case) for k in labels}
                for _, scores in sorted(seeds.items())
            ]
            overall = [statistics.fmean(mean.values()) for mean in means]
            cells = [" / ".join(f"{mean[k]:.3f}" for mean in means) for k in labels]
            cells.append(" / ".join(f"{value:.3f}" for value in overall))
            spread = f" ± {statistics.stdev(overall):.3f}" if len(overall) > 1 else ""
            row: list[Any] = [arm, WEIGHTS[weights], *cells, f"{statistics.fmean(overall):.3f}{spread}"]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all arms and seeds, trainings two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, type=int, help="dataset id")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="trainer names, options of a method included")
    parser.add_argument("--options", required=True, help="options of every arm, for example epochs20_iters50_save5")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="seeds of every arm")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for predictions and scores")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    raw = next(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{arguments.d:03d}_*"))
    results = Path(os.environ["nnUNet_results"], raw.name)
    tail = "_bf16" if cpu_has_bf16() else ""
    names = {
        (arm, seed): f"{arm}_{arguments.options}_seed{seed}{tail}" for seed in arguments.seeds for arm in arguments.arms
    }
    with ThreadPoolExecutor(2) as pool:
        for finished in [pool.submit(train, name, arguments, results) for name in names.values()]:
            finished.result()
    found = {
        arm: {w: {s: score(names[arm, s], w, arguments, raw) for s in arguments.seeds} for w in WEIGHTS}
        for arm in arguments.arms
    }
    print(table(found, label_names(raw)))


if __name__ == "__main__":
    main()
