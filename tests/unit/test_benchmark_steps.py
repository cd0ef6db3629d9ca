"""The benchmark of steps: what it says, and how it measures on a GPU, which is stood in for."""

import types

import pytest
import torch

from scripts import benchmark_steps as benchmark
from scripts.benchmark_steps import Cost


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("nnUNet_results", "nnUNet_n_proc_DA"):  # the benchmark sets them, as the process is its own
        monkeypatch.setenv(variable, "0")


class Gpu:
    """torch.cuda, with notes of what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name, value in {
            "synchronize": None,
            "reset_peak_memory_stats": None,
            "empty_cache": None,
            "max_memory_allocated": 7,
            "get_device_name": "Some GPU",
            "is_available": True,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: self.calls.append(name) or value)

    def trainer(self) -> types.SimpleNamespace:
        device = torch.device("cuda")
        step = lambda batch: self.calls.append("step")  # noqa: E731
        return types.SimpleNamespace(device=device, train_step=step, network=torch.nn.Linear(1, 1))


def test_time_on_a_gpu_is_until_it_has_finished_the_step(monkeypatch) -> None:
    gpu = Gpu(monkeypatch)
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: gpu.calls.append("clock") or next(clock))
    assert benchmark.seconds(gpu.trainer(), {}) == 2.5
    assert gpu.calls == ["synchronize", "clock", "step", "synchronize", "clock"]


def test_memory_on_a_gpu_is_the_peak_of_a_step(monkeypatch) -> None:
    gpu = Gpu(monkeypatch)
    assert benchmark.memory(gpu.trainer(), {}) == 7
    assert gpu.calls == ["reset_peak_memory_stats", "step", "synchronize", "max_memory_allocated"]


def test_every_class_counts_as_learnt_so_that_copy_paste_mixes(trainer, monkeypatch) -> None:
    begun = trainer("nnUNetTrainerBCP_epochs1_iters1")
    monkeypatch.setattr("nnunetv2.run.run_training.get_trainer_from_args", lambda *_, **__: begun)
    args = types.SimpleNamespace(d="1", c="3d_fullres", p="nnUNetPlans", device="cpu", steps=1)
    made, batches = benchmark.begin("nnUNetTrainerBCP", args)
    assert len(batches) == 2
    for batch in batches:
        made.train_step(batch)
        assert made.method.learned.share == 1
        assert {"supervised", "pseudo"} <= set(made.step.log[-1])


def test_trainers_run_one_after_the_other_on_a_gpu_and_take_turns_on_a_cpu(monkeypatch, capsys) -> None:
    Gpu(monkeypatch)
    groups: list[list[str]] = []

    def measure(names, args):
        groups.append(list(names))
        return {name: Cost(1.0, 2**20, None if args.device == "cuda" else 4) for name in names}

    monkeypatch.setattr(benchmark, "measure", measure)
    benchmark.main(["-d", "501", "-tr", "nnUNetTrainerDyCON"])
    assert groups == [["nnUNetTrainer"], ["nnUNetTrainerDyCON"]]
    assert "Some GPU" in (printed := capsys.readouterr().out)
    assert "3d_fullres of data set 501" in printed
    groups.clear()
    benchmark.main(["-d", "501", "-device", "cpu", "-tr", "nnUNetTrainerDyCON"])
    assert groups == [["nnUNetTrainer", "nnUNetTrainerDyCON"]]
    assert "| nnUNetTrainerDyCON | 1.00 | 1.00 | 1.00 | 1.000 | 1 |" in capsys.readouterr().out


def test_without_a_data_set_one_is_generated_in_a_folder_that_is_gone_afterwards(monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr(benchmark, "generate", lambda folder, shape: seen.append((folder, folder.is_dir(), shape)))
    monkeypatch.setattr(benchmark, "measure", lambda names, args: {name: Cost(1.0, 1, None) for name in names})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark.main([])
    ((folder, there, shape),) = seen
    assert there
    assert shape == benchmark.SHAPES["cpu"]
    assert not folder.exists()
    assert "generated images" in capsys.readouterr().out


def test_ratios_are_to_stock_and_operations_that_were_not_counted_are_a_dash() -> None:
    rows = benchmark.table({"nnUNetTrainer": Cost(0.5, 2**20, 10), "X": Cost(1.0, 3 * 2**20, None)}).splitlines()
    assert rows[2] == "| nnUNetTrainer | 1.00 | 1.00 | 1.00 | 0.500 | 1 |"
    assert rows[3] == "| X | - | 2.00 | 3.00 | 1.000 | 3 |"
