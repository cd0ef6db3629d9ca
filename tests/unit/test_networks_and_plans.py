"""The step on the networks and patches that nnU-Net plans: anisotropic, 2d, residual, without deep supervision."""

import json
from pathlib import Path

import pytest

from tests.datasets import environment, make_dataset, plan_and_preprocess
from tests.memory import peak_bytes
from tests.training import begin, make_trainer, steps


def plans_of(tiny: Path) -> dict:
    return json.loads((tiny / "nnUNet_preprocessed" / "Dataset901_Tiny" / "nnUNetPlans.json").read_text())


def residual(plans: dict) -> dict:
    entry = plans["configurations"]["3d_fullres"]["architecture"]
    entry["network_class_name"] = entry["network_class_name"].replace("PlainConvUNet", "ResidualEncoderUNet")
    entry["arch_kwargs"]["n_blocks_per_stage"] = entry["arch_kwargs"].pop("n_conv_per_stage")
    return plans


def anisotropic(plans: dict) -> dict:
    entry = plans["configurations"]["3d_fullres"]
    entry["patch_size"] = [8, 32, 32]
    arch = entry["architecture"]["arch_kwargs"]
    arch["strides"] = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    arch["kernel_sizes"] = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    entry["pool_op_kernel_sizes"] = arch["strides"]
    return plans


@pytest.mark.parametrize("method", ["DyCON", "DyCONCPS"])
@pytest.mark.parametrize("change", [residual, anisotropic])
def test_planned_variants_train(tiny: Path, change, method: str) -> None:
    t = begin(make_trainer(f"nnUNetTrainer{method}_epochs1_iters2", plans=change(plans_of(tiny))))
    assert all(abs(step["loss"]) < 100 for step in steps(t, 2))
    t.validation_step(next(t.dataloader_val))


@pytest.mark.parametrize("method", ["DyCON", "DyCONCPS"])
def test_without_deep_supervision(tiny: Path, method: str) -> None:
    t = make_trainer(f"nnUNetTrainer{method}_epochs1_iters2")
    t.enable_deep_supervision = False
    begin(t)
    assert all(abs(step["loss"]) < 100 for step in steps(t, 2))
    t.validation_step(next(t.dataloader_val))


@pytest.mark.parametrize(
    "method",
    [*(f"DyCON_view{view}" for view in ("noise", "intensity", "cutmix", "copy_paste")), "BCP_pretrain0", "CPS"],
)
def test_2d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    make_dataset(tmp_path, labeled=2, unlabeled=2, test=0)
    plan_and_preprocess(root=tmp_path, configurations=("2d",))
    t = make_trainer(f"nnUNetTrainer{method}_epochs1_iters1", configuration="2d", fold="all")
    done = steps(begin(t), 1)
    assert done[0]["unlabeled"].ndim == 4


@pytest.mark.parametrize(
    "method", ["LabeledOnly", "MeanTeacher", "DyCON", "PseudoLabel", "UAMT", "BCP", "CPS", "DyCONCPS"]
)
def test_memory_of_a_step_stays_near_stock(tiny: Path, method: str) -> None:
    """Exact allocator peaks of a second step, same plan, as many unlabelled patches as labelled ones."""
    plans = plans_of(tiny)
    entry = plans["configurations"]["3d_fullres"]
    entry["patch_size"] = [32, 32, 32]
    entry["architecture"]["arch_kwargs"]["features_per_stage"] = [16, 32, 64]
    peaks = []
    for name in ("nnUNetTrainer", f"nnUNetTrainer{method}_epochs1"):
        t = begin(make_trainer(name, plans=plans))
        t.step = 10**6  # every term with its full weight
        batches = [next(t.dataloader_train) for _ in range(2)]
        t.train_step(batches[0])
        peaks.append(peak_bytes(lambda t=t, batch=batches[1]: t.train_step(batch)))
    assert peaks[1] <= 1.35 * peaks[0]
