"""The step on the networks and patches that nnU-Net plans: anisotropic, 2d, residual, without deep supervision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.benchmark_steps import operations
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


@pytest.mark.parametrize("method", ["DyCON", "DyCONCPS", "DyCONGAMagicNet", "DHC"])
@pytest.mark.parametrize("change", [residual, anisotropic])
def test_planned_variants_train(tiny: Path, change, method: str) -> None:
    t = begin(make_trainer(f"nnUNetTrainer{method}_epochs1_iters2", plans=change(plans_of(tiny))))
    assert all(abs(step["loss"]) < 100 for step in steps(t, 2))
    t.validation_step(next(t.dataloader_val))


@pytest.mark.parametrize("method", ["DyCON", "DyCONCPS", "DyCONGAMagicNet", "DHC_ga"])
def test_without_deep_supervision(tiny: Path, method: str) -> None:
    t = make_trainer(f"nnUNetTrainer{method}_epochs1_iters2")
    t.enable_deep_supervision = False
    begin(t)
    assert all(abs(step["loss"]) < 100 for step in steps(t, 2))
    t.validation_step(next(t.dataloader_val))


@pytest.mark.parametrize(
    "method",
    [
        *(f"DyCON_view{view}" for view in ("noise", "intensity", "cutmix", "copy_paste", "bcp_intensity")),
        "BCP_pretrain0",
        "CPS",
    ],
)
def test_2d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    make_dataset(tmp_path, labeled=2, unlabeled=2, test=0)
    plan_and_preprocess(root=tmp_path, configurations=("2d",))
    t = make_trainer(f"nnUNetTrainer{method}_epochs1_iters1", configuration="2d", fold="all")
    done = steps(begin(t), 1)
    assert done[0]["unlabeled"].ndim == 4


def in_full(trainer: Any) -> None:
    """Let the next steps be those with every class learnt and every term at its full weight."""
    trainer.step.number = 10**6
    trainer.method.learned.counts[:, 0] = 1e6


# Student passes (forward and backward) and passes without a gradient of a step, as docs/costs.md counts them.
PASSES = {
    "LabeledOnly": (1, 0),
    "LabeledOnly_paste0p5": (2, 0),
    "MeanTeacher": (2, 1),
    "PseudoLabel": (2, 1),
    "UAMT_samples3": (2, 4),
    "BCP": (3, 1),
    "BCP_paste0": (2, 1),
    "CPS": (4, 2),
    "DyCON_wfecl0": (2, 1),
    "DyCON_wfecl0_viewbcp": (3, 1),
    "BCP_truthmixes": (1, 1),
    "BCP_viewbcp_truthmixes": (2, 1),
    "BCP_viewbcp_truthboth": (4, 1),
    "DyCONBCP_wfecl0": (3, 1),
    "MagicNet": (5, 1),
    "MagicNet_nowithin": (3, 1),
    "MagicNet_noacross": (4, 1),
    "DHC": (4, 4),
}


@pytest.mark.parametrize("method", PASSES)
def test_a_step_costs_the_passes_of_its_recipe(tiny: Path, method: str) -> None:
    """Floating-point operations counted by torch; within 3 %, since only stock's pass has all output heads."""
    stock, t = (begin(make_trainer(name)) for name in ("nnUNetTrainer", f"nnUNetTrainer{method}_epochs1"))
    in_full(t)
    trained, asked = PASSES[method]
    step = operations(lambda: stock.train_step(next(stock.dataloader_train)))
    with torch.no_grad():
        images = next(stock.dataloader_train)["data"]
        answer = operations(lambda: stock.network(images))
    made = operations(lambda: t.train_step(next(t.dataloader_train)))
    assert made == pytest.approx(trained * step + asked * answer, rel=0.03)


# Largest memory of a step as a share of stock's.
MEMORY = {
    **dict.fromkeys(("LabeledOnly", "MeanTeacher", "DyCON", "PseudoLabel", "UAMT", "BCP", "CPS", "DyCONCPS"), 1.35),
    **dict.fromkeys(("LabeledOnly_ga", "DHC", "CPS_ga"), 1.35),
    **dict.fromkeys(("MagicNet", "GAMagicNet", "DyCONGAMagicNet"), 2.35),  # labelled and unlabelled patches at a time
}


@pytest.mark.parametrize("method", MEMORY)
def test_memory_of_a_step_stays_near_stock(tiny: Path, method: str) -> None:
    """Exact allocator peaks of a second step, same plan, as many unlabelled patches as labelled ones."""
    plans = plans_of(tiny)
    entry = plans["configurations"]["3d_fullres"]
    entry["patch_size"] = [32, 32, 32]
    entry["architecture"]["arch_kwargs"]["features_per_stage"] = [16, 32, 64]
    peaks = []
    for name in ("nnUNetTrainer", f"nnUNetTrainer{method}_epochs1"):
        t = begin(make_trainer(name, plans=plans))
        if name != "nnUNetTrainer":
            in_full(t)
        batches = [next(t.dataloader_train) for _ in range(2)]
        t.train_step(batches[0])
        peaks.append(peak_bytes(lambda t=t, batch=batches[1]: t.train_step(batch)))
    assert peaks[1] <= MEMORY[method] * peaks[0]
