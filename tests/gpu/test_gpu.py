"""What only a GPU can show. Written without one: never run by us; see docs/exactness.md, Limits."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_dycon.networks import FeatureTap, unwrap
from tests.datasets import environment
from tests.distributed import RANKS, run_ranks
from tests.integration.test_distributed import RUNS, root, twenty_steps  # noqa: F401  # one is a fixture
from tests.training import METHODS, at_once, begin, run_epochs, same, seed_all, steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} CUDA devices for NCCL")
SHORT = "epochs1_iters6_valiters1"


@pytest.fixture
def on_gpu(trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a trainer of the tiny data set on the GPU, not compiled; cuDNN and torch choose what repeats exactly."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return lambda name, **how: trainer(name, device="cuda", **how)


# ---- mixed precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_mixed_precision(on_gpu, method: str) -> None:
    t = begin(on_gpu(f"{at_once(method)}_{SHORT}"))
    assert t.grad_scaler is t.step.scaler is not None
    before = {name: value.clone() for name, value in unwrap(t.network).state_dict().items()}
    done = steps(t, 6)
    assert all(torch.isfinite(torch.tensor(step["loss"])) for step in done)
    assert not same(before, unwrap(t.network).state_dict())
    assert {p.dtype for network in (t.network, t.method) for p in network.parameters()} == {torch.float32}
    for row in t.step.log:
        assert row["skipped_steps"] == 0.0
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in row.values())


@pytest.mark.parametrize("method", ["nnUNetTrainerDyCON", "nnUNetTrainerDyCONCPS"])
def test_a_step_whose_scaled_gradients_overflow_changes_no_weight_and_lowers_the_scale(on_gpu, method: str) -> None:
    t = begin(on_gpu(f"{at_once(method)}_{SHORT}"))
    steps(t, 1)
    t.grad_scaler.update(2.0**127)
    parts = unwrap(t.network), t.method
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    steps(t, 1)
    assert same(before[0], unwrap(t.network).state_dict())
    if "CPS" in method:  # a head computes in float32 and steps by itself
        second = {name: value for name, value in t.method.state_dict().items() if name.startswith("teacher.")}
        assert same({name: before[1][name] for name in second}, second)
    assert t.grad_scaler.get_scale() < 2.0**127
    assert (t.step.number, t.step.log[-1]["skipped_steps"]) == (2, 0.0)
    t.grad_scaler.update(2.0**10)
    steps(t, 1)
    assert not same(before[0], unwrap(t.network).state_dict())


def test_a_loss_that_is_not_finite_is_skipped_on_a_gpu_too(on_gpu) -> None:
    t = begin(on_gpu(f"{at_once('nnUNetTrainerDyCON')}_{SHORT}"))
    before = {name: value.clone() for name, value in unwrap(t.network).state_dict().items()}
    batch = next(t.dataloader_train)
    t.train_step({**batch, "unlabeled": batch["unlabeled"] * float("nan")})
    assert t.step.log[-1]["skipped_steps"] == 1.0
    assert same(before, unwrap(t.network).state_dict())


def test_bf16_uses_no_loss_scale_and_trains(on_gpu) -> None:
    if not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    t = begin(on_gpu(f"{at_once('nnUNetTrainerDyCON')}_{SHORT}_bf16"))
    assert all(torch.isfinite(torch.tensor(step["loss"])) for step in steps(t, 3))


def test_a_step_on_a_gpu_is_near_that_on_the_cpu(trainer, on_gpu) -> None:
    losses = []
    for make in (trainer, on_gpu):
        seed_all(3)
        t = begin(make(f"nnUNetTrainerMeanTeacher_viewweak_rampup0_delay0_{SHORT}_seed1"))
        losses.append([step["loss"] for step in steps(t, 3)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # float16


# ---- memory and random numbers of the device -----------------------------------------------------------------


def test_patches_of_loader_processes_come_in_pinned_memory(on_gpu, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    t = begin(on_gpu(f"nnUNetTrainerDyCON_{SHORT}"))
    batch = next(t.dataloader_train)
    tensors = [batch["data"], batch["unlabeled"], *batch["target"]]
    assert all(tensor.is_pinned() for tensor in tensors)
    t.train_step(batch)
    for loader in (t.dataloader_train, t.dataloader_val):
        loader._finish()


def test_views_are_drawn_on_the_gpu_and_repeat_with_the_seed(on_gpu) -> None:
    runs = []
    for _ in range(2):
        t = begin(on_gpu(f"{at_once('nnUNetTrainerDyCON')}_{SHORT}_seed5"))
        assert t.step.generator.device.type == "cuda"
        steps(t, 2)
        runs.append((t.step.generator.get_state(), t.step.log[0]["supervised"].item()))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-3)


def test_a_stopped_training_goes_on_with_the_random_states_of_the_gpu(on_gpu, tmp_path: Path) -> None:
    name = f"{at_once('nnUNetTrainerDyCON')}_epochs2_iters2_valiters1_save1_seed5"
    t = begin(on_gpu(name))
    run_epochs(t, 1)
    t.save_checkpoint(str(tmp_path / "c.pth"))
    wanted = torch.rand(8, device="cuda", generator=t.step.generator), torch.rand(8, device="cuda")
    again = on_gpu(name, resume=True)
    again.load_checkpoint(str(tmp_path / "c.pth"))
    again.on_train_start()
    got = torch.rand(8, device="cuda", generator=again.step.generator), torch.rand(8, device="cuda")
    assert same(wanted, got)
    assert again.grad_scaler.get_scale() == t.grad_scaler.get_scale()


# ---- the compiler, several GPUs, whole commands --------------------------------------------------------------


@pytest.mark.parametrize("method", ["nnUNetTrainerDyCON", "nnUNetTrainerDyCONCPS", "nnUNetTrainerBCP"])
def test_a_student_compiled_by_inductor_takes_nearly_the_same_steps_and_its_hooks_fire(
    on_gpu, monkeypatch, method: str
) -> None:
    fired, keep, runs = [], FeatureTap._keep, []
    monkeypatch.setattr(FeatureTap, "_keep", lambda tap, *a: fired.append(1) or keep(tap, *a))
    for compiled in (False, True):
        torch._dynamo.reset()
        fired.clear()
        seed_all(4)
        monkeypatch.setenv("nnUNet_compile", "t" if compiled else "f")
        t = begin(on_gpu(f"{at_once(method)}_{SHORT}"))
        assert hasattr(t.network, "_orig_mod") == compiled
        runs.append(([step["loss"] for step in steps(t, 3)], len(fired)))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=0.02)
    assert runs[1][1] == runs[0][1]
    assert bool(runs[0][1]) == ("DyCON" in method)


@needs_two
def test_ranks_hold_the_same_to_the_bit_over_nccl(root: Path) -> None:  # noqa: F811
    one, other = run_ranks(twenty_steps, root, backend="nccl")
    for run in RUNS:
        one_run, other_run = ({k: _on_cpu(v) for k, v in each[run].items()} for each in (one, other))
        assert [key for key in one_run if not same(one_run[key], other_run[key])] == ["patches"], run


def _on_cpu(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value


@needs_two
def test_nnunets_own_command_trains_on_two_gpus(root: Path) -> None:  # noqa: F811
    done = train(root, "nnUNetTrainerDyCON_epochs2_iters2_valiters1_batch4", "-num_gpus", "2")
    assert done.returncode == 0, done.stdout[-3000:]
    (fold,) = (root / "nnUNet_results").glob("*/nnUNetTrainerDyCON_epochs2_iters2_*/fold_0")
    assert (fold / "checkpoint_final.pth").is_file()
    assert (fold / "teacher" / "validation" / "summary.json").is_file()


def test_nnunets_own_commands_train_and_predict_on_a_gpu(root: Path, tmp_path: Path) -> None:  # noqa: F811
    name = "nnUNetTrainerDyCON_epochs2_iters3_valiters1"
    done = train(root, name)
    assert done.returncode == 0, done.stdout[-3000:]
    images = root / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs"
    words = ["nnUNetv2_predict", "-d", "901", "-c", "3d_fullres", "-f", "0", "-tr", name, "-i", str(images)]
    done = run(root, [*words, "-o", str(tmp_path)])
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(list(tmp_path.glob("*.nii.gz"))) == 2


def test_the_benchmark_prints_seconds_and_memory_of_this_gpu() -> None:
    script = Path(__file__).parents[2] / "scripts" / "benchmark_steps.py"
    words = [sys.executable, str(script), "--shape", "48", "56", "48", "--steps", "2", "-tr", "nnUNetTrainerDyCON"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.cuda.get_device_name() in done.stdout
    row = done.stdout.strip().splitlines()[-1].split("|")
    assert row[1].strip() == "nnUNetTrainerDyCON"
    assert float(row[5]) > 0
    assert float(row[6]) > 0


def train(folder: Path, name: str, *more: str) -> subprocess.CompletedProcess:
    return run(folder, ["nnUNetv2_train", "901", "3d_fullres", "0", "-tr", name, *more])


def run(folder: Path, words: list[str]) -> subprocess.CompletedProcess:
    program = str(Path(sys.executable).with_name(words[0]))
    variables = {**os.environ, **environment(folder), "nnUNet_n_proc_DA": "2"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run([program, *words[1:]], env=variables, text=True, check=False, **streams)
