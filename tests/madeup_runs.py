"""Small made-up trainings and predictions on disk, in the form that nnU-Net and the trainers leave them."""

import json
from pathlib import Path

import nibabel
import numpy as np
import torch

from nnunetv2_dycon.evaluation.facts import Facts
from nnunetv2_dycon.evaluation.runs import Run

DATASET = "Dataset501_Made"
CASES = tuple(f"test_{i:02d}" for i in range(10))
LABELED, VALIDATION = ("train_0", "train_1", "train_2"), ("val_0",)
SHAPE = (16, 14, 12)
PLANS = {
    "dataset_name": DATASET,
    "configurations": {
        "3d_fullres": {"batch_size": 2, "patch_size": [16, 16, 16]},
        "3d_half": {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8]},
    },
    "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
}


def make_dataset(root: Path, monkeypatch) -> Path:
    """Set nnU-Net's three folders below `root` and write test cases with two structures; returns the raw folder."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name / DATASET).mkdir(parents=True)
        monkeypatch.setenv(name, str(root / name))
    raw = root / "nnUNet_raw" / DATASET
    write_splits(root, [{"train": list(LABELED), "val": list(VALIDATION)}])
    (raw / "dataset.json").write_text(json.dumps(dataset_json()))
    rng = np.random.default_rng(1)
    for case in CASES:
        truth = make_truth(case)
        write_volume(raw / "labelsTs" / f"{case}.nii.gz", truth)
        write_volume(raw / "imagesTs" / f"{case}_0000.nii.gz", (truth + rng.normal(0, 0.3, SHAPE)).astype(np.float32))
    return raw


def dataset_json() -> dict:
    labels = {"background": 0, "left": 1, "right": 2}
    return {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz"}


def write_splits(root: Path, folds: list) -> None:
    (root / "nnUNet_preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(folds))


def make_truth(case: str) -> np.ndarray:
    """Return two boxes whose place depends on the case."""
    at = 2 + CASES.index(case) % 3
    truth = np.zeros(SHAPE, np.uint8)
    truth[at : at + 6, 3:9, 2:8] = 1
    truth[at + 6 : at + 10, 3:9, 2:8] = 2
    return truth


def write_volume(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 2.0, 1.0])), path)


def make_predictions(folder: Path, shift: int = 0, cases: tuple = CASES, probabilities: bool = False) -> Path:
    """Write the truth moved by voxels; a larger shift is a worse prediction."""
    for number, case in enumerate(cases):
        predicted = np.roll(make_truth(case), shift + (number % 2 if shift else 0), axis=1)
        write_volume(folder / f"{case}.nii.gz", predicted)
        if probabilities:
            soft = np.stack([0.1 + 0.7 * (label == predicted.T) for label in range(3)]).astype(np.float32)
            np.savez(folder / f"{case}.npz", probabilities=soft)
    (folder / "plans.json").write_text(json.dumps(PLANS))
    return folder


def make_training(
    root: Path,
    trainer: str,
    *,
    ours: bool = True,
    seed: int | None = 0,
    epochs: int = 4,
    done: int = 4,
    fold: int = 0,
    plans: dict = PLANS,
    unlabeled: str = "no",
    checkpoint: str = "checkpoint_final.pth",
) -> Path:
    """Write a training of `epochs` epochs of 5 steps, of which `done` are done; returns the fold's folder."""
    folder = root / "nnUNet_results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres" / f"fold_{fold}"
    folder.mkdir(parents=True)
    (folder.parent / "plans.json").write_text(json.dumps(plans))
    (folder.parent / "dataset.json").write_text(json.dumps(dataset_json()))
    debug = {"num_epochs": str(epochs), "num_iterations_per_epoch": "5", "torch_version": "2.0", "device": "cpu"}
    (folder / "debug.json").write_text(json.dumps(debug))
    log = f"This split has {len(LABELED)} training and {len(VALIDATION)} validation cases.\n"
    if ours:
        log += f"nnunetv2_dycon 0.1.0: DyCON, {unlabeled} unlabelled images, settings {{}}\n"
        rows = "epoch,dice_teacher_left,dice_teacher_right\n" + "".join(f"{e},0.{e},0.{e + 2}\n" for e in range(done))
        (folder / "ssl_history.csv").write_text(rows)
    (folder / "training_log_2025_1_1_00_00_00.txt").write_text(log)
    settings = {"epochs": epochs, "iters": 5, "batch": 0, "seed": seed}
    ssl = {"version": "0.1.0", "nnunetv2_version": "2.8.1", "settings": settings, "step": 5 * done, "teacher": {}}
    starts = [10.0 * e for e in range(done)]
    state = {
        "network_weights": {"w": torch.zeros(1) + len(trainer)},
        "current_epoch": done,
        "init_args": {"configuration": "3d_fullres"},
        "trainer_name": trainer,
        "logging": {
            "train_losses": [np.float64(-0.1 * e) for e in range(done)],
            "val_losses": [-0.1 * e for e in range(done)],
            "mean_fg_dice": [0.2 * e for e in range(done)],
            "epoch_start_timestamps": starts,
            "epoch_end_timestamps": [start + 2.0 + e for e, start in enumerate(starts)],
        },
        **({"ssl": ssl} if ours else {}),
    }
    torch.save(state, folder / checkpoint)
    if checkpoint == "checkpoint_best.pth":
        torch.save(state, folder / "checkpoint_final.pth")
    return folder


def a_run(name: str, folder: str = "", *, upper: bool = False, **facts) -> Run:
    """Return a run with all facts that can be refused, `facts` in their place."""
    known = {
        "trainer": name,
        "dataset": DATASET,
        "fold": "0",
        "labeled": LABELED,
        "labeled_count": 3,
        "unlabeled": 0,
        "validation": VALIDATION,
        "checkpoint": "checkpoint_final.pth",
        "weights": "student",
        "mirroring": True,
        "plans": "aaaaaaaa",
    }
    predictions = Path(folder or f"predictions_of_{name}_{facts.get('seed')}")
    return Run(name, Facts(**{**known, **facts}), predictions, upper=upper)
