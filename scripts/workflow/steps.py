"""Stages of the workflow that no single command does; each sees on disk what is done, so that a killed one goes on.

Run by the Snakefile in the environment of the trainings: python steps.py raw|reduce|train|predict|summary ...
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from nnunetv2_dycon.conversion.dataset import COMMAND_FILE
from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.folders import environment_folder
from nnunetv2_dycon.locks import locked
from scripts import case_tables

COLUMNS = ("dataset", "run", "weights", "dice", "hd95_mm", "hd95_penalized_mm", "missed", "false_alarms", "cases")


def raw(folder: str, labeled: str, draw: str, command: Sequence[str]) -> None:
    """Run the command that writes a raw data set, unless the data set is there by the same command.

    The command is noted in the data set. One that was written by hand is taken over where its draw is the same.

    Raises
    ------
    DataError
        If there is a data set by another command, or with another draw, or the command writes one of another name.
    """
    target = environment_folder("nnUNet_raw") / folder
    note, text = target / COMMAND_FILE, json.dumps({"command": list(command)})
    if not target.exists():
        _run(command)
        if not target.is_dir():
            written = ", ".join(path.name for path in target.parent.glob(f"{folder.split('_')[0]}_*")) or "nothing"
            raise DataError(
                f"{shlex.join(command)} wrote {written} in place of {folder}: give the data set its name in "
                "datasets: of the configuration"
            )
        note.write_text(text)
    if note.is_file():
        if note.read_text() != text:
            raise DataError(
                f"{target} was written by another command ({note}) than the configuration's, {shlex.join(command)}; "
                "take another first id, or delete it with its preprocessed data and results"
            )
        return
    print(f"{target} was not written by this workflow: of its cases only number and draw are compared", flush=True)
    try:
        request = json.loads((target / "conversion.json").read_text())["request"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{target} was not written by this workflow; take another first id in the configuration"
        ) from error
    if draw == "published":
        seeds = [None]
    else:
        seeds = [None, int(draw)] if labeled == "all" else [int(draw)]
    if str(request.get("labeled")) != labeled or request.get("labeled_seed") not in seeds:
        raise DataError(f"{target} has other labelled cases ({request}); take another first id, or delete it")


def reduce(folder: str, plans: str, configuration: str, name: str, wanted: dict[str, Any]) -> None:
    """Add a configuration with a smaller network, patch or batch to the plans; its preprocessed data are the parent's.

    Raises
    ------
    DataError
        If the plans have no such parent.
    """
    path = environment_folder("nnUNet_preprocessed") / folder / f"{plans}.json"
    content = json.loads(path.read_text())
    if configuration not in content["configurations"]:
        known = ", ".join(content["configurations"])
        raise DataError(f"{path} has no configuration {configuration}, only {known}; correct the configuration")
    parent = content["configurations"][configuration]
    smaller: dict[str, Any] = {"inherits_from": configuration}
    if "patch" in wanted:
        axes, patch = len(parent["patch_size"]), wanted["patch"]
        smaller["patch_size"] = patch if isinstance(patch, list) else [patch] * axes
        if len(smaller["patch_size"]) != axes:
            raise DataError(f"reduce: patch is {patch}, but {configuration} has {axes} axes; give {axes} numbers")
    if "batch" in wanted:
        smaller["batch_size"] = wanted["batch"]
    if "features" in wanted:
        smaller["architecture"] = _smaller_network(parent["architecture"], wanted["features"], wanted.get("stages"))
    content["configurations"][name] = smaller
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=4))
    part.replace(path)


def _smaller_network(network: dict[str, Any], features: int, stages: int | None) -> dict[str, Any]:
    """Keep the first stages, with features that double from one to the next."""
    planned = network["arch_kwargs"]
    stages = min(stages or planned["n_stages"], planned["n_stages"])
    kwargs = {key: value[:stages] if isinstance(value, list) else value for key, value in planned.items()}
    kwargs |= {"n_stages": stages, "features_per_stage": [features * 2**stage for stage in range(stages)]}
    kwargs["n_conv_per_stage_decoder"] = planned["n_conv_per_stage_decoder"][: stages - 1]
    return {**network, "arch_kwargs": kwargs}


def train(training: Path, lock: Path, device: str, threads: int, loaders: int, command: Sequence[str]) -> None:
    """Train, or go on from the last checkpoint, until `checkpoint_final.pth` is there.

    The lock makes a second start wait for a training that outlived its workflow, in place of writing over it.

    Raises
    ------
    DataError
        If there is a training with other plans than the data set has now, or a command of the user ended well without
        the checkpoint.
    """
    _check_plans(training)
    final = training / "checkpoint_final.pth"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with locked(lock, f"{training}: another process trains it; waiting for that", wait=True):
        if final.is_file():
            print(f"{final} is there: nothing to train", flush=True)
            return
        variables = {"nnUNet_n_proc_DA": str(loaders)}
        if device == "cpu":
            variables["nnUNet_compile"] = "f"  # its compiler takes longer than it saves in short runs
            variables["OMP_NUM_THREADS"] = str(threads)  # our trainers keep to it
        if command:
            _run(command, variables)
            if not final.is_file():
                raise DataError(f"the command ended without {final}; correct training: in the configuration")
            return
        os.environ.update(variables)
        _train_with_nnunet(training, device, threads)


def _check_plans(training: Path) -> None:
    """Refuse to go on with, or to take over, a training whose data set was planned otherwise since."""
    from nnunetv2_dycon.evaluation.facts import plans_digest

    trained = training.parent / "plans.json"
    if not trained.is_file():
        return
    _, plans, configuration = training.parent.name.split("__")
    planned = environment_folder("nnUNet_preprocessed") / training.parent.parent.name / f"{plans}.json"
    if not planned.is_file():
        return
    digests = [plans_digest(json.loads(path.read_text()), configuration) for path in (trained, planned)]
    if digests[0] != digests[1]:
        raise DataError(
            f"{training.parent} was trained with other plans than {planned} holds now; delete that folder to train "
            "again, or plan under another name (-overwrite_plans_name)"
        )


def _train_with_nnunet(training: Path, device: str, threads: int) -> None:
    """Do what nnUNetv2_train --c does, on the given number of threads, and without a final validation.

    That command takes every core of the machine for each training on a CPU, and predicts the validation cases in the
    end, which here are training cases; only test cases measure.
    """
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    dataset, name, fold = training.parts[-3:]
    trainer, plans, configuration = name.split("__")
    number = fold.removeprefix("fold_")
    torch.set_num_threads(threads if device == "cpu" else 1)
    torch.backends.cudnn.benchmark = device == "cuda"
    run = get_trainer_from_args(
        dataset,
        configuration,
        number if number == "all" else int(number),
        trainer,
        plans,
        continue_training=True,
        device=torch.device(device),
    )
    maybe_load_checkpoint(run, True, False)
    run.run_training()


def predict(training: Path, images: Path, weights: str, device: str, mirroring: bool) -> None:
    """Predict the test cases where `compare` looks for them; whole or not at all.

    Predictions of another state of the checkpoint are replaced.

    Raises
    ------
    DataError
        If the training is not finished, has no such weights, or the prediction fails.
    """
    from nnunetv2_dycon.evaluation.facts import RUN_FILE
    from nnunetv2_dycon.evaluation.predict import predict as predict_run
    from nnunetv2_dycon.evaluation.runs import Place, find_runs

    stale = training / "test" / f"checkpoint_final_{weights}{'' if mirroring else '_nomirror'}"
    if (stale / RUN_FILE).is_file():
        shutil.rmtree(stale)
    (run,) = find_runs(str(training), Place(training.parts[-3]), (weights,), mirroring)
    predict_run(run, images, mirroring=mirroring, device=device)


def summary(scores: Path, output: Path) -> None:
    """Write one row for every scored run as results.csv, their means as results.md, and each case as dice.csv.

    Parameters
    ----------
    scores : Path
        Folder with DATASET/RUN_WEIGHTS/scores.json and scores.csv.
    output : Path
        Folder for the three files.
    """
    rows = []
    paths = sorted(scores.glob("*/*/scores.json"))
    for path in paths:
        content = json.loads(path.read_text())
        means, classes = content["mean_over_classes"], content["classes"].values()
        run, _, weights = path.parent.name.rpartition("_")
        status = [sum(one["status"][key] for one in classes) for key in ("missed", "false_alarm")]
        distances = means["hd95_mm"]["mean"], means["hd95_mm"]["penalized_mean"]
        cases = max(one["n"] for one in classes)
        rows.append((path.parents[1].name, run, weights, means["dice"]["mean"], *distances, *status, cases))
    with open(output / "results.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    (output / "results.md").write_text(summary_table(rows), encoding="utf-8")
    case_tables.write(output / "dice.csv", *case_tables.of_folders(path.parent for path in paths))


def summary_table(rows: Sequence[tuple[Any, ...]]) -> str:
    """Return a Markdown table: mean and standard deviation over the seeds and draws of each method."""
    groups: dict[tuple[str, str, str], list[tuple[Any, ...]]] = {}
    for dataset, run, weights, *values in rows:
        name = dataset.split("_", 1)[1].rsplit("_draw", 1)[0]
        groups.setdefault((name, run.rsplit("_seed", 1)[0], weights), []).append(tuple(values))
    lines = ["| data set | method | weights | runs | Dice (%) | HD95 (mm) | missed |", "|---" * 7 + "|"]
    for names, runs in groups.items():
        dice = _spread([100 * run[0] for run in runs if run[0] is not None])
        distance = _spread([run[2] for run in runs if run[2] is not None])
        lines.append(f"| {' | '.join(names)} | {len(runs)} | {dice} | {distance} | {sum(run[3] for run in runs)} |")
    note = (
        "Test cases: mean over cases, then classes, then runs; ± standard deviation over runs (seeds and labelled "
        "draws). HD95 counts a missed structure and a false alarm as the image's diagonal."
    )
    return "\n".join([*lines, "", note, ""])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _run(command: Sequence[str], variables: Mapping[str, str] = MappingProxyType({})) -> None:
    done = subprocess.run(command, env={**os.environ, **variables}, check=False)
    if done.returncode:
        raise DataError(f"{' '.join(command)} ended with {done.returncode}; see above")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a stage; what follows `--` is a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    rest = {"nargs": argparse.REMAINDER, "help": "a command"}
    for stage, options in {
        "raw": ("--folder", "--labeled", "--draw"),
        "reduce": ("--folder", "-p", "-c", "--name", "--reduce"),
        "train": ("--training", "--lock"),
        "predict": ("--training", "--images", "--weights", "-device"),
        "summary": ("--scores", "--output"),
    }.items():
        of_stage = stages.add_parser(stage)
        for option in options:
            of_stage.add_argument(option, required=True)
        if stage == "predict":
            of_stage.add_argument("--disable_tta", action="store_true")
        if stage == "train":
            of_stage.add_argument("-device", default="cuda")
            of_stage.add_argument("--threads", type=int, default=1)
            of_stage.add_argument("--loaders", type=int, default=0)
        if stage in ("raw", "train"):
            of_stage.add_argument("command", **rest)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; 2 where the user can mend what is wrong."""
    given = parse(sys.argv[1:] if argv is None else argv)
    command = [word for at, word in enumerate(getattr(given, "command", ())) if at or word != "--"]
    try:
        results = environment_folder("nnUNet_results")
        if given.stage == "raw":
            raw(given.folder, given.labeled, given.draw, command)
        elif given.stage == "reduce":
            reduce(given.folder, given.p, given.c, given.name, json.loads(given.reduce))
        elif given.stage == "train":
            train(results / given.training, Path(given.lock), given.device, given.threads, given.loaders, command)
        elif given.stage == "predict":
            images = environment_folder("nnUNet_raw") / given.images
            predict(results / given.training, images, given.weights, given.device, not given.disable_tta)
        else:
            summary(Path(given.scores), Path(given.output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
