"""Trainings of two processes over gloo on the CPU, as nnU-Net starts them for two GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nnunetv2_dycon.networks import unwrap
from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits
from tests.distributed import RANKS, by_halves, joined, patches, run_ranks, trainer_of
from tests.training import METHODS, at_once, begin, same

pytestmark = pytest.mark.slow

BOXES = "nnUNetTrainerDyCON_viewcopy_paste"  # of many sizes
LEARNING = "nnUNetTrainerBCP_truthmixes_learned0p1"  # what is learnt is counted over all processes
RUNS = [(at_once(name), deep) for name in (*METHODS, BOXES, LEARNING) for deep in (True, False)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a data set whose unlabelled images are prepared."""
    folder = tmp_path_factory.mktemp("ranks")
    names = make_dataset(folder)
    write_splits(folder, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=folder)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment(folder).items():
            patch.setenv(variable, value)
        from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled

        preprocess_unlabeled(901, processes=1)
    return folder


@pytest.fixture
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with nnU-Net's folders set."""
    for variable, value in environment(root).items():
        monkeypatch.setenv(variable, value)
    return root


# ---- the same on all ranks -----------------------------------------------------------------------------------


def states(trainer: Any) -> dict[str, Any]:
    """Everything that a step changes, where it must be the same on all ranks."""
    optimizers = [trainer.optimizer, trainer.method_optimizer]
    return {
        "student": unwrap(trainer.network).state_dict(),
        "method": trainer.method.state_dict(),
        "optimizers": [None if one is None else one.state_dict()["state"] for one in optimizers],
        "steps": (trainer.step.number, trainer.step.skipped_in_a_row),
    }


def twenty_steps(rank: int) -> dict[str, Any]:
    """Train each method with the loaders' own patches, without a seed: ranks start apart."""
    left = {}
    for name, deep in RUNS:
        trainer = begin(trainer_of(f"{name}_epochs1_iters20_valiters1_batch4", deep_supervision=deep))
        first = next(trainer.dataloader_train)
        assert len(first["data"]) == 2
        for number in range(20):
            trainer.train_step(next(trainer.dataloader_train) if number else first)
        trainer.on_train_epoch_end([{"loss": torch.zeros(1).numpy()}])
        left[name, deep] = {**states(trainer), "row": trainer.epoch_row, "patches": first["data"].clone()}
    return left


def test_ranks_hold_the_same_to_the_bit_after_twenty_steps_of_any_method(root: Path) -> None:
    one, other = run_ranks(twenty_steps, root)
    for run in RUNS:
        apart = [key for key in one[run] if not same(one[run][key], other[run][key])]
        assert apart == ["patches"], run
        assert one[run]["steps"] == (20, 0), run


# Each rank keeps the tenth of its own voxels that GACE takes with labels, which is not the tenth of all.
ALIKE = [run for run in RUNS if "GA" not in run[0]]


def three_steps(rank: int | None) -> dict[str, Any]:
    """Train each method on given patches: a rank on its own, or one process (None) on those of all ranks."""
    left = {}
    for name, deep in ALIKE:
        trainer = trainer_of(f"{name}_epochs1_iters3_valiters1_seed1_lr0p1_batch4", deep_supervision=deep)
        trainer.initialize()
        with torch.no_grad():  # sure enough for gates and thresholds
            for network in (unwrap(trainer.network), trainer.method.teacher.network):
                for parameter in network.decoder.seg_layers.parameters():
                    parameter.mul_(4)
        begin(trainer)
        draws = [torch.Generator().manual_seed(7 + r) for r in range(RANKS)]
        trainer.step.generator = tuple(draws) if rank is None else draws[rank]
        if rank is None and deep:
            trainer.loss.weight_factors = (1 / (1 + 1e-6), 1e-6 / (1 + 1e-6))  # nnU-Net's where there are ranks
            trainer.step.weights = trainer.loss.weight_factors
        losses = []
        for number in range(3):
            each = [patches(number, r, deep_supervision=deep) for r in range(RANKS)]
            losses.append(float(trainer.train_step(joined(each) if rank is None else each[rank])["loss"]))
        left[name, deep] = {**states(trainer), "losses": losses}
    return left


def test_two_processes_are_one_with_the_double_batch(here: Path) -> None:
    one, other = run_ranks(three_steps, here)
    with by_halves():
        double = three_steps(None)
    for run in ALIKE:
        mean = [(a + b) / 2 for a, b in zip(one[run]["losses"], other[run]["losses"], strict=True)]
        # DHC's Dice has one voxel of smoothing in each process
        assert mean == pytest.approx(double[run]["losses"], rel=1e-4, abs=1e-4), run
        for part in ("student", "method"):
            for name, wanted in double[run][part].items():
                # Without deep supervision nothing uses the coarser outputs; where there are ranks they decay.
                if run[1] or "seg_layers.0" not in name:
                    torch.testing.assert_close(one[run][part][name], wanted, atol=1e-4, rtol=0, msg=f"{run} {name}")
    moved = {run: double[run]["losses"][0] - double[run]["losses"][2] for run in ALIKE}
    assert min(moved.values()) > 1e-2


# ---- a step that one rank skips, and a stop ------------------------------------------------------------------

# Without a seed the ranks start apart; a first step that is skipped leaves what was not given to all as it was.
STOPPED = (
    ("nnUNetTrainerMeanTeacher_seed1", None),
    ("nnUNetTrainerDyCON_seed1", 1),
    ("nnUNetTrainerDyCONPaper", 0),
    ("nnUNetTrainerBCP_paste0_seed1", None),
    ("nnUNetTrainerCPS_seed1", 1),
    ("nnUNetTrainerDyCONCPS", 0),
    ("nnUNetTrainerDyCONGAMagicNet_seed1", 1),
    ("nnUNetTrainerDHC", 0),
)


def three_steps_and_a_stop(rank: int, root: str) -> dict[str, Any]:
    return {name: _stopped(rank, root, name, poisoned) for name, poisoned in STOPPED}


def _stopped(rank: int, root: str, name: str, poisoned: int | None) -> dict[str, Any]:
    full = f"{at_once(name)}_epochs2_iters3_valiters1"
    trainer = begin(trainer_of(full))
    keys = []
    for step in range(3):
        batch = next(trainer.dataloader_train)
        assert len(batch["data"]) == len(batch["unlabeled"]) == 1
        if step == poisoned and rank == 1:  # one rank's loss is not finite: both must skip
            batch["unlabeled"] = batch["unlabeled"] * float("nan")
        keys.append(batch["data"].clone())
        trainer.train_step(batch)
    trainer.on_train_epoch_end([{"loss": torch.zeros(1).numpy()}])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    left = {**states(trainer), "row": trainer.epoch_row, "patches": keys}
    trainer.save_checkpoint(f"{root}/{name}.pth")
    dist.barrier()  # the first rank has written it
    again = trainer_of(full, resume=True)
    again.load_checkpoint(f"{root}/{name}.pth")
    begin(again)
    left["resumed"] = unwrap(again.network).state_dict()
    left["next patches"] = [next(again.dataloader_train)["data"].clone() for _ in range(3)]
    left["next noise"] = torch.rand(8, generator=again.step.generator)
    return left


def test_ranks_skip_a_step_together_and_go_on_together_with_patches_of_their_own(root: Path) -> None:
    both = run_ranks(three_steps_and_a_stop, root, str(root))
    for name, poisoned in STOPPED:
        one, other = (each[name] for each in both)
        for part in ("student", "method", "row"):
            assert same(one[part], other[part]), name
        assert one["row"]["skipped_steps"] == float(poisoned is not None)
        assert not same(one["patches"], other["patches"])
        # after a stop: the same weights, and neither each other's patches nor the first ones
        assert same(one["resumed"], one["student"])
        assert same(other["resumed"], one["student"])
        assert not same(one["next patches"], other["next patches"])
        assert not same(one["next noise"], other["next noise"])
        assert not same(other["next patches"], other["patches"])


# ---- as nnU-Net starts it ------------------------------------------------------------------------------------

START = "from tests.distributed import run_nnunet; run_nnunet({name!r})"
NAME = "nnUNetTrainerDyCONCPS_epochs2_iters2_valiters1_save1_batch4"


def launch(root: Path, name: str = NAME, **variables: str) -> subprocess.Popen:
    variables = {**os.environ, **environment(root), "nnUNet_n_proc_DA": "0", **variables}
    script = [sys.executable, "-c", START.format(name=name)]
    folder = Path(__file__).parents[2]
    return subprocess.Popen(
        script, env=variables, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_whole_training_has_one_writer_for_each_file(root: Path) -> None:
    process = launch(root)
    printed, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, printed[-3000:]
    results = root / "nnUNet_results"
    (fold,) = results.glob(f"*/{NAME}__*/fold_0")
    assert (fold / "checkpoint_final.pth").is_file()
    for models in ("validation", "teacher/validation", "mean/validation"):
        assert (fold / models / "summary.json").is_file()
    lines = [line for line in (fold / "ssl_history.csv").read_text().splitlines() if line]
    assert len(lines) == 3
    first, second = ({*(results / f"written_{rank}.txt").read_text().splitlines()} for rank in range(RANKS))
    for written in ("checkpoint_final.pth", "ssl_history.csv", "ssl_progress.png", "progress.png", "debug.json"):
        assert any(path.endswith(f"/{written}") for path in first), written
    # nnU-Net itself writes these from each process, with the same content
    by_all = {str(fold.parent / f"{name}.json") for name in ("plans", "dataset", "dataset_fingerprint")}
    assert first & second == by_all
    assert all("/validation/" in path for path in second - by_all)  # each rank predicts cases of its own


def test_a_rank_that_fails_ends_the_training_with_its_message(root: Path) -> None:
    process = launch(root, f"{NAME}_lr0p02", FAILING_RANK="1")  # a training does not start over where one ended
    printed, _ = process.communicate(timeout=1800)
    assert process.returncode != 0
    assert re.search(r"DataError: case u_01 cannot be read; restore it", printed), printed[-3000:]
