"""The stock commands as a user types them, on a tiny data set: train, continue, validate, predict, export."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits

pytestmark = pytest.mark.slow

TRAINER = "nnUNetTrainerDyCON_epochs2_iters30_valiters1_save1_lr0p03"  # enough steps to see foreground
FAST = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cycle")
    names = make_dataset(root)
    write_splits(root, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=root)
    return root


def run(root: Path, *command: object, ok: bool = True, **variables: str) -> str:
    """Run a command as in a new shell that exported nnU-Net's three folders; returns all it printed."""
    words = [str(word) for word in command]
    words[0] = str(BIN / words[0]) if (BIN / words[0]).exists() else words[0]
    done = subprocess.run(
        words, env={**os.environ, **environment(root), **FAST, **variables}, capture_output=True, text=True, cwd=root
    )
    assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """Folder of the trained fold, after a training with loader processes."""
    run(data, "nnUNetv2_train", 901, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu", "--npz", nnUNet_n_proc_DA="2")
    return data / "nnUNet_results" / "Dataset901_Tiny" / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"


def test_a_training_leaves_what_stock_leaves_and_the_series(trained: Path) -> None:
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "ssl_progress.png", "ssl_history.csv"):
        assert (trained / name).stat().st_size > 0
    assert not (trained / "checkpoint_latest.pth").exists()
    for folder in ("validation", "teacher/validation"):
        assert (trained / folder / "summary.json").exists()
        assert (trained / folder / "l_03.npz").exists()


@pytest.mark.parametrize("flags", [("--c",), ("--val", "--val_best")])
def test_continuing_a_finished_training_and_validating_again(
    data: Path, trained: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folders = [trained / "validation", trained / "teacher" / "validation"]
    before = [(folder / "summary.json").read_text() for folder in folders]
    kept = [Path(shutil.move(folder, tmp_path / folder.parent.name)) for folder in folders]
    run(data, "nnUNetv2_train", 901, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu", *flags)
    assert all((folder / "summary.json").exists() for folder in folders)
    if "--val_best" not in flags:
        assert before == [(folder / "summary.json").read_text() for folder in folders]
    # other tests look at the segmentations of the final checkpoint, and the best one may be another
    for folder, old in zip(folders, kept, strict=True):
        shutil.rmtree(folder)
        shutil.move(old, folder)


def predictions(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(nib.load(p).dataobj) for p in sorted(folder.glob("*.nii.gz"))}


def without_this_package(folder: Path) -> Path:
    """Make a folder of links to every installed package but this one, for PYTHONPATH of a bare interpreter."""
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "dycon" not in entry.name.lower() and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    return packages


def test_predictions_of_the_exports_are_those_of_our_class_without_this_package(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    images = data / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs"
    common = ("-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta")
    ours = tmp_path / "ours"
    run(
        data,
        "nnUNetv2_predict",
        "-d",
        901,
        "-c",
        "3d_fullres",
        "-f",
        0,
        "-tr",
        TRAINER,
        "-i",
        images,
        "-o",
        ours,
        *common,
    )

    packages = without_this_package(tmp_path)
    program = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as p; p()"
    found = {}
    for weights in ("student", "teacher"):
        model, output = tmp_path / f"model_{weights}", tmp_path / weights
        export = ("nnUNetv2_dycon", "export", "-d", 901, "-tr", TRAINER, "-f", 0, "-o", model, "--weights", weights)
        run(data, *export)
        alone = {"PYTHONPATH": str(packages), "PYTHONNOUSERSITE": "1", "nnUNet_extTrainer": ""}
        check = "import importlib.util as u; assert u.find_spec('nnunetv2_dycon') is None"
        bare = (sys.executable, "-S", "-c")
        run(data, *bare, check, **alone)
        run(data, *bare, program, "-i", images, "-o", output, "-m", model, "-f", 0, *common, **alone)
        found[weights] = predictions(output)
        assert "exists" in run(data, *export, ok=False)  # never over something that is there
    expected = predictions(ours)
    assert len(expected) == 2
    for name, array in expected.items():
        assert array.any()
        assert np.array_equal(array, found["student"][name])
    assert any(not np.array_equal(array, found["teacher"][name]) for name, array in expected.items())


def test_the_teacher_of_the_export_is_the_teacher_of_the_training(data: Path, trained: Path, tmp_path: Path) -> None:
    """Predicting the validation case with the export gives the segmentation that the final validation wrote."""
    model, case = tmp_path / "model", tmp_path / "case"
    case.mkdir()
    (case / "l_03_0000.nii.gz").symlink_to(data / "nnUNet_raw/Dataset901_Tiny/imagesTr/l_03_0000.nii.gz")
    run(data, "nnUNetv2_dycon", "export", "-d", 901, "-tr", TRAINER, "-f", 0, "-o", model)
    predict = ("nnUNetv2_predict_from_modelfolder", "-i", case, "-o", tmp_path / "out", "-m", model, "-f", 0)
    run(data, *predict, "-device", "cpu", "-npp", 1, "-nps", 1)
    expected = predictions(trained / "teacher" / "validation")["l_03.nii.gz"]
    assert np.array_equal(predictions(tmp_path / "out")["l_03.nii.gz"], expected)


def test_co_training_validates_and_predicts_with_both_networks_and_their_mean(data: Path, tmp_path: Path) -> None:
    trainer = "nnUNetTrainerCPS_epochs1_iters30_valiters1_lr0p03"
    run(data, "nnUNetv2_train", 901, "3d_fullres", 0, "-tr", trainer, "-device", "cpu")
    fold = data / "nnUNet_results" / "Dataset901_Tiny" / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"
    case = tmp_path / "case"
    case.mkdir()
    (case / "l_03_0000.nii.gz").symlink_to(data / "nnUNet_raw/Dataset901_Tiny/imagesTr/l_03_0000.nii.gz")
    seen = []
    for weights, folder, folds in (("student", ".", (0,)), ("teacher", "teacher", (0,)), ("mean", "mean", (0, 1))):
        model, output = tmp_path / f"model_{weights}", tmp_path / weights
        run(data, "nnUNetv2_dycon", "export", "-d", 901, "-tr", trainer, "-f", 0, "-o", model, "--weights", weights)
        predict = ("nnUNetv2_predict_from_modelfolder", "-i", case, "-o", output, "-m", model, "-f", *folds)
        run(data, *predict, "-device", "cpu", "-npp", 1, "-nps", 1)
        seen.append(predictions(output)["l_03.nii.gz"])
        expected = predictions(fold / folder / "validation")["l_03.nii.gz"]
        # The mean of sums in half precision is not the sum of means: a voxel between two classes may differ.
        assert (seen[-1] != expected).mean() <= (0.001 if weights == "mean" else 0)
    assert not np.array_equal(seen[0], seen[1])


def test_export_of_a_fold_that_was_not_trained_says_which_are(data: Path, trained: Path, tmp_path: Path) -> None:
    said = run(data, "nnUNetv2_dycon", "export", "-d", 901, "-tr", TRAINER, "-f", 3, "-o", tmp_path / "model", ok=False)
    assert said.strip().endswith("fold_3 holds no training; trained are -f 0; there are the folds 0 and all")
    assert not (tmp_path / "model").exists()


def test_a_finished_training_typed_again_ends_in_one_line_and_keeps_its_results(data: Path, trained: Path) -> None:
    before = (trained / "checkpoint_final.pth").read_bytes()
    command = ("nnUNetv2_train", 901, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu")
    lines = run(data, *command, ok=False, nnUNet_n_proc_DA="2").strip().splitlines()
    assert lines[-1].startswith("error: a finished training is there, which this one would overwrite: add --val")
    assert not any(line.startswith("Traceback") for line in lines)
    assert (trained / "checkpoint_final.pth").read_bytes() == before


def test_errors_of_trainings_end_in_our_line(data: Path) -> None:
    def last_line(trainer: str) -> str:
        said = run(data, "nnUNetv2_train", 901, "3d_fullres", 0, "-tr", trainer, "-device", "cpu", ok=False)
        return said.strip().splitlines()[-1]

    assert "betas" in last_line("nnUNetTrainerDyCON_betas1")
    assert "beta0p5" in last_line("nnUNetTrainerDyCON_beta0.5")


def test_stock_predictor_from_python_finds_our_class(data: Path, trained: Path) -> None:
    program = (
        "import torch, sys; from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as P;"
        "p = P(device=torch.device('cpu'), use_mirroring=False);"
        "p.initialize_from_trained_model_folder(sys.argv[1], (0,)); print('network', type(p.network).__name__)"
    )
    assert "network PlainConvUNet" in run(data, sys.executable, "-c", program, trained.parent)
