"""Predictions of student and teacher by nnU-Net's own commands, and the report on them, on a tiny data set."""

import os
import subprocess
import sys

import numpy as np
import pytest

from nnunetv2_dycon.evaluation.compare import compare
from nnunetv2_dycon.evaluation.label_files import read_label_map, read_labels
from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits

pytestmark = pytest.mark.slow

TRAINERS = (
    "nnUNetTrainerLabeledOnly_epochs1_iters2_valiters1_seed0",
    "nnUNetTrainerDyCON_epochs1_iters2_valiters1_seed0",
)
FAST = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}


def test_missing_predictions_are_made_and_equal_those_of_nnunets_command(tmp_path, monkeypatch):
    names = make_dataset(tmp_path)
    write_splits(tmp_path, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=tmp_path)
    for name, value in {**environment(tmp_path), **FAST}.items():
        monkeypatch.setenv(name, value)
    train = "from nnunetv2.run.run_training import run_training_entry as go; go()"
    for trainer in TRAINERS:
        words = ["901", "3d_fullres", "0", "-tr", trainer, "-device", "cpu"]
        subprocess.run([sys.executable, "-c", train, *words], check=True, env=os.environ, capture_output=True)
    options = {"predict": True, "mirroring": False, "weights": ("student", "teacher"), "save_probabilities": True}
    page = compare(901, TRAINERS, output=tmp_path / "report", processes=1, device="cpu", **options)
    text = (page.parent / "report.md").read_text()
    assert "4 methods in 4 runs on 2 test cases" in text
    assert "| LabeledOnly (student) | 3 | 0 | 1 |" in text
    assert "| DyCON (teacher) | 3 | 3 | 1 |" in text
    assert (page.parent / "figures" / "calibration.png").is_file()

    raw = tmp_path / "nnUNet_raw" / names.dataset
    stock = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as go; go()"
    words = ["-d", "901", "-i", str(raw / "imagesTs"), "-o", str(tmp_path / "stock"), "-tr", TRAINERS[1]]
    words += ["-c", "3d_fullres", "-f", "0", "--disable_tta", "-device", "cpu", "-npp", "1", "-nps", "1"]
    subprocess.run([sys.executable, "-c", stock, *words], check=True, env=os.environ, capture_output=True)
    fold = tmp_path / "nnUNet_results" / names.dataset / f"{TRAINERS[1]}__nnUNetPlans__3d_fullres" / "fold_0"
    labels = read_labels(raw / "dataset.json", raw / "labelsTs")
    for case in names.test:
        ours, theirs = (
            read_label_map(folder / f"{case}.nii.gz", labels, truth=False).labels
            for folder in (fold / "test" / "checkpoint_final_student_nomirror", tmp_path / "stock")
        )
        assert np.array_equal(ours, theirs)
