"""The glue between nnU-Net's trainer and the step: optimisers, scores, series, models, processes."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_dycon._register import TRAINING
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.randomness import global_states
from nnunetv2_dycon.trainers import engine, loaders
from nnunetv2_dycon.trainers.cases import find_unlabeled
from nnunetv2_dycon.trainers.loaders import unlabeled_patches
from nnunetv2_dycon.trainers.state import restore, restore_random_states, state_of
from tests.training import begin, named, poison, run_epochs, same, seed_all


@pytest.mark.parametrize("method", ["nnUNetTrainerDyCON", "nnUNetTrainerCPS"])
def test_both_optimizers_follow_nnunets_learning_rate(trainer, method: str) -> None:
    t = trainer(named(method, "epochs4_iters1_valiters1_lr0p02"))
    t.on_train_start()
    rates = []
    for _ in range(3):
        run_epochs(t, 1)
        rates.append([group["lr"] for optimizer in t.step.optimizers for group in optimizer.param_groups])
    assert t.step.optimizers == [t.optimizer, t.method_optimizer]
    for epoch, found in enumerate(rates):
        assert found == pytest.approx([0.02 * (1 - epoch / 4) ** 0.9] * 2)


def test_pseudo_dice_of_student_and_teacher_come_from_their_own_counts(trainer) -> None:
    t = trainer(named("nnUNetTrainerDyCON"))
    counts = [  # of two batches: two classes each
        {"tp_hard": [3, 0], "fp_hard": [1, 2], "fn_hard": [0, 0]},
        {"tp_hard": [5, 1], "fp_hard": [0, 1], "fn_hard": [7, 4]},
    ]
    teachers = [
        {"tp_hard": [2, 0], "fp_hard": [5, 0], "fn_hard": [1, 0]},
        {"tp_hard": [6, 0], "fp_hard": [0, 0], "fn_hard": [10, 0]},
    ]
    outputs = [
        {"loss": np.array(1.0), **arrays(mine), **{f"teacher_{k}": v for k, v in arrays(its).items()}}
        for mine, its in zip(counts, teachers, strict=True)
    ]
    t.on_validation_epoch_end(outputs)
    assert t.epoch_row["dice_student_class1"] == pytest.approx(2 * 8 / (2 * 8 + 1 + 7))
    assert t.epoch_row["dice_student_class2"] == pytest.approx(2 * 1 / (2 * 1 + 3 + 4))
    assert t.epoch_row["dice_teacher_class1"] == pytest.approx(2 * 8 / (2 * 8 + 5 + 11))
    assert np.isnan(t.epoch_row["dice_teacher_class2"])  # in no patch and never predicted


def arrays(counts: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: np.array(values, np.float32) for name, values in counts.items()}


def test_the_series_are_means_over_the_steps_of_each_epoch(trainer) -> None:
    t = trainer(named("nnUNetTrainerDyCON", "epochs4_iters3_valiters1_rampup0p5_delay0_learned0"))
    t.on_train_start()
    logs, clear = [], t.on_train_epoch_end
    t.on_train_epoch_end = lambda outputs: logs.append([dict(log) for log in t.step.log]) or clear(outputs)
    run_epochs(t, 1)
    poison(t.method, 1)
    run_epochs(t, 1)
    with open(Path(t.output_folder, "ssl_history.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [0, 1]
    assert [len(steps) for steps in logs] == [3, 3]
    for row, steps_of_epoch in zip(rows, logs, strict=True):
        for name in {name for log in steps_of_epoch for name in log} - {"skipped_steps"}:
            values = np.array([float(log.get(name, np.nan)) for log in steps_of_epoch])
            wanted = values[np.isfinite(values)].mean()
            assert float(row[name]) == pytest.approx(wanted, rel=1e-6), name
        assert {"supervised", "uncl", "uncl_weighted", "fecl_labeled", "ramp", "beta", "classes_learned"} < set(row)
    assert len({log["ramp"] for steps_of_epoch in logs for log in steps_of_epoch}) == 6
    assert float(rows[0]["ramp"]) == pytest.approx(np.exp(-5 * (1 - np.arange(3) / 6) ** 2).mean())
    assert [float(row["skipped_steps"]) for row in rows] == [0, 1]  # this one is counted


@pytest.mark.parametrize("method", ["nnUNetTrainerDyCON", "nnUNetTrainerCPS"])
def test_the_second_optimizer_is_set_as_nnunets_and_has_all_that_learns(trainer, method: str) -> None:
    t = begin(trainer(named(method)))
    assert t.method_optimizer.defaults == t.optimizer.defaults
    (group,) = t.method_optimizer.param_groups
    learns = {id(p) for p in t.method.parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == learns
    assert learns.isdisjoint(id(p) for p in t.network.parameters())


def test_every_process_gets_the_first_ones_weights_of_all_that_the_method_adds(trainer, monkeypatch) -> None:
    shared: list[int] = []
    monkeypatch.setattr(engine, "share_weights", lambda tensors: shared.extend(t.data_ptr() for t in tensors))
    t = begin(trainer(named("nnUNetTrainerDyCON")))
    assert set(shared) == {value.data_ptr() for value in t.method.state_dict().values()}


def test_the_teacher_is_scored_by_its_own_predictions(trainer) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON")))
    teacher = t.method.teacher.network
    with torch.no_grad():
        teacher.decoder.seg_layers[-1].bias[1] = 1e4  # sees class 1 everywhere
    batch = next(t.dataloader_val)
    target = batch["target"][0].clone()
    with torch.no_grad():
        output = t.validation_step(batch)
    there = np.array([int((target == k).sum()) for k in (1, 2)])
    assert output["teacher_tp_hard"].tolist() == [there[0], 0]
    assert output["teacher_fp_hard"].tolist() == [target.numel() - there[0], 0]
    assert output["teacher_fn_hard"].tolist() == [0, there[1]]
    assert (output["tp_hard"] + output["fn_hard"]).tolist() == there.tolist()
    assert output["fp_hard"][0] < output["teacher_fp_hard"][0]
    assert t.network is not teacher
    assert not teacher.decoder.deep_supervision  # left as it was


def test_the_second_network_trains_on_after_it_was_scored(trainer) -> None:
    t = begin(trainer(named("nnUNetTrainerCPS")))
    second = t.method.teacher.network
    with torch.no_grad():
        t.on_validation_epoch_start()
        t.validation_step(next(t.dataloader_val))
    assert second.training
    assert second.decoder.deep_supervision


def test_a_number_that_comes_later_has_a_value_for_every_epoch(trainer) -> None:
    t = trainer(named("nnUNetTrainerBCP", "epochs3_iters1_valiters1_pretrain0p3_paste0_learned0"))
    t.on_train_start()
    run_epochs(t, 3)
    store = t.logger.local_logger.my_fantastic_logging
    missing = {name: [math.isnan(value) for value in store[f"ssl_{name}"]] for name in ("paste_labeled", "pseudo")}
    assert missing == {"paste_labeled": [False, True, True], "pseudo": [True, False, False]}
    with open(Path(t.output_folder, "ssl_history.csv"), newline="") as file:
        assert [row["pseudo"] == "" for row in csv.DictReader(file)] == [True, False, False]


@pytest.mark.parametrize(("method", "models"), [("LabeledOnly", ["teacher"]), ("CPS", ["teacher", "mean"])])
def test_the_final_validation_is_of_every_model_in_a_folder_of_its_own(trainer, monkeypatch, method, models) -> None:
    t = begin(trainer(named(f"nnUNetTrainer{method}")))
    done = []

    def stock(self, save_probabilities: bool = False) -> None:
        done.append((self.network, self.output_folder, self.output_folder_base, save_probabilities))
        if len(done) == 1 + len(models):
            raise KeyboardInterrupt

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", stock)
    folder, base, student = t.output_folder, t.output_folder_base, t.network
    with pytest.raises(KeyboardInterrupt):
        t.perform_actual_validation(True)
    assert [where for _, *where in done] == [
        [folder, base, True],
        *([str(Path(folder, name))] * 2 + [True] for name in models),
    ]
    assert done[0][0] is student
    assert done[1][0] is t.method.teacher.network
    assert (t.output_folder, t.output_folder_base, t.network) == (folder, base, student)  # even after an error
    if "mean" in models:
        assert list(done[2][0].networks) == [unwrap(student), t.method.teacher.network]


def test_processes_of_the_final_validation_of_every_model_end_with_the_training(trainer, monkeypatch) -> None:
    t = trainer(named("nnUNetTrainerMeanTeacher"))
    t.initialize()
    seen = []
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: seen.append(os.environ.get(TRAINING)))
    t.perform_actual_validation()
    assert seen == [str(os.getpid())] * 2
    assert TRAINING not in os.environ


@pytest.mark.parametrize(("wanted", "sizes"), [(3, [2, 1]), (1, [1, None]), (0, [2, 2])])
def test_processes_share_the_unlabelled_patches_of_a_step(trainer, monkeypatch, wanted: int, sizes: list) -> None:
    t = begin(trainer(f"nnUNetTrainerMeanTeacher_epochs1_unlabeledbatch{wanted}"))
    monkeypatch.setattr(loaders, "world_size", lambda: 2)
    labeled = t.dataloader_train.data_loader.labeled
    for rank, size in enumerate(sizes):
        t.local_rank = rank
        if size is None:
            with pytest.raises(ConfigError, match=f"unlabeledbatch{wanted} leaves no unlabelled patch"):
                unlabeled_patches(t, labeled)
        else:
            assert unlabeled_patches(t, labeled).inner.batch_size == size


def test_processes_that_go_on_draw_apart_from_each_other_and_from_their_start(trainer) -> None:
    drawn = []
    t = begin(trainer(named("nnUNetTrainerMeanTeacher", "epochs2_iters2_seed4")))
    states = state_of(t)["random"]
    for rank, number in ((0, 3), (1, 3), (2, 3), (1, 4)):
        t.local_rank, t.step.number = rank, number
        restore_random_states(t, states)
        drawn.append(torch.rand(4, generator=t.step.generator).tolist())
    assert len({tuple(numbers) for numbers in drawn}) == 4
    t.local_rank = 0
    restore_random_states(t, states)
    assert torch.rand(4, generator=t.step.generator).tolist() == drawn[0]  # the first one as it was left


@pytest.mark.parametrize("change", [lambda state: state.update(extra=torch.zeros(1)), lambda state: state.popitem()])
def test_a_checkpoint_with_other_modules_is_refused(trainer, change) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON")))
    state = state_of(t)
    restore(t, state)
    change(state["method"])
    with pytest.raises(ConfigError, match=r"is of another method: (extra|teacher_head\..*) \.\.\."):
        restore(t, state)


def test_the_control_without_a_seed_leaves_the_random_states_to_stock(trainer) -> None:
    """Loaders that are made move the states as stock's do; with unlabelled patches they are as before."""
    ends = []
    for name in ("nnUNetTrainer", named("nnUNetTrainerLabeledOnly"), named("nnUNetTrainerMeanTeacher")):
        seed_all(5)
        t = trainer(name)
        t.initialize()
        if name != "nnUNetTrainer":
            t.unlabeled = find_unlabeled(t, 1)
        before = global_states()
        t.get_dataloaders()
        ends.append((before, global_states()))
    assert same(ends[0], ends[1])
    assert not same(*ends[1])
    assert same(*ends[2])
