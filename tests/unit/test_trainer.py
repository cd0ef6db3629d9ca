"""The engine against stock nnU-Net and against itself; every method by parametrisation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_dycon.errors import ConfigError, DataError, DivergedError
from nnunetv2_dycon.export import export_model
from nnunetv2_dycon.networks import unwrap
from tests.passes import costs_of
from tests.recipes import all_learned
from tests.training import (
    AVERAGING,
    CO_TRAINING,
    METHODS,
    USING_UNLABELED,
    begin,
    named,
    poison,
    run_epochs,
    same,
    seed_all,
    steps,
    weights,
)


def test_control_equals_stock_bit_for_bit_over_two_epochs(trainer) -> None:
    runs = []
    for name in ("nnUNetTrainer", named("nnUNetTrainerLabeledOnly", "epochs1000")):
        seed_all(7)
        t = begin(trainer(name))
        losses = [step["loss"] for step in steps(t, 10)]
        with torch.no_grad():
            t.on_validation_epoch_start()
            t.validation_step(next(t.dataloader_val))
            t.network.train()
        losses += [step["loss"] for step in steps(t, 5)]
        runs.append((losses, weights(t), t.optimizer.state_dict()["state"]))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0], runs[1])


def test_arms_with_the_same_seed_see_the_same_labeled_patches(trainer) -> None:
    seen = []
    for method in METHODS:
        t = begin(trainer(named(method, "epochs2_iters2_seed3")))
        seen.append([{k: step[k] for k in ("data", "target", "keys")} for step in steps(t, 3)])
    assert all(same(seen[0], other) for other in seen[1:])
    assert seen[0][0]["keys"].tolist() != seen[0][1]["keys"].tolist() or not same(seen[0][0], seen[0][1])


# Terms with a weight in a step, those of all passes together.
TERMS = {
    "nnUNetTrainerMeanTeacher": 2,
    "nnUNetTrainerDyCON": 5,
    "nnUNetTrainerDyCONBCP": 5,
    "nnUNetTrainerDyCONPaper": 7,
    "nnUNetTrainerDyCON_viewcutmix_lossguarded_lambdah0p1": 5,
    "nnUNetTrainerDyCON_viewbcp_lossce_dice_learned0": 8,
    "nnUNetTrainerMeanTeacher_viewintensity_lossce_dice": 2,
    "nnUNetTrainerDyCON_feclonlabeled_lossguarded_focusuncertain": 3,
    "nnUNetTrainerPseudoLabel": 2,
    "nnUNetTrainerUAMT_viewcutmix": 2,
    "nnUNetTrainerBCP": 3,
    "nnUNetTrainerBCP_truthmixes": 2,
    "nnUNetTrainerCPS": 4,
    "nnUNetTrainerCPS_viewcopy_paste": 4,
    "nnUNetTrainerDyCONCPS": 8,
    "nnUNetTrainerDyCONCPS_onall_lossguarded": 12,
    "nnUNetTrainerMagicNet": 5,
    "nnUNetTrainerGAMagicNet": 5,
    "nnUNetTrainerDyCONMagicNet": 7,
    "nnUNetTrainerMagicNet_noacross_noblend": 4,
    "nnUNetTrainerDHC": 6,
}


@pytest.mark.parametrize("method", USING_UNLABELED)
def test_every_term_moves_the_student(trainer, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    seed_all(0)
    gated = "DyCON" in method or "PseudoLabel" in method  # nothing passes the gate of a teacher that knows nothing
    t = begin(trainer(named(method, "epochs1_iters1_gate0" if gated else "epochs1_iters1")))
    steps(t, 1)
    t.step.number = 10**6  # schedules at their end: full weight
    all_learned(t.method)
    steps(t, 1)
    with torch.no_grad():
        for parameter in t.method.teacher.network.parameters():  # a teacher that differs from the student
            parameter.mul_(1.1)

    def two_classes(probabilities: torch.Tensor, grid: tuple[int, ...], **_: object) -> torch.Tensor:
        """Patches of two classes, which a teacher that knows nothing need not see."""
        return (torch.arange(np.prod(grid)) % 2).expand(len(probabilities), -1)

    monkeypatch.setattr("nnunetv2_dycon.methods.dycon.labels_from_probabilities", two_classes)
    weighted = []
    for cost in costs_of(t.method, t.network, t.step.moved(next(t.dataloader_train))):
        for name, term in cost().terms.items():
            if term.weight == 0:  # the entropy part of guarded UnCL has weight lambda
                continue
            weighted.append(name)
            learner, other = t.network, t.method.teacher.network
            if name.endswith("_second"):
                learner, other = other, learner
            learner.zero_grad()
            other.zero_grad()
            term.value.backward(retain_graph=True)
            norms = [p.grad.norm() for p in learner.parameters() if p.grad is not None]
            assert all(p.grad is None for p in other.parameters()), name
            assert sum(norms) > 0, name
            assert all(torch.isfinite(norm) for norm in norms)
    assert len(weighted) == TERMS[method], weighted


@pytest.mark.parametrize("length", ["epochs100", "epochs9999"])
@pytest.mark.parametrize("method", AVERAGING)
def test_teacher_follows_the_closed_form_and_never_has_a_gradient(trainer, method: str, length: str) -> None:
    seed_all(1)
    t = begin(trainer(named(method, f"{length}_iters2")))
    expected = {k: v.clone().double() for k, v in unwrap(t.network).state_dict().items()}
    ema = {"epochs100": 0.95, "epochs9999": 0.999}[length] if t.settings.ema is None else t.settings.ema
    for step in range(25):
        steps(t, 1)
        decay = min(1 - 1 / (step + 1), ema)
        for k, v in unwrap(t.network).state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v.double()
    teacher = t.method.teacher.network
    for k, v in teacher.state_dict().items():
        torch.testing.assert_close(v.double(), expected[k], rtol=1e-5, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in t.method.teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize(
    "method",
    [
        "DyCON_wuncl0_wfecl0",
        "DyCON_viewbcp_lossce_dice_wuncl0_wpasted0_wfecl0",
        "DyCONBCP_w0_wfecl0",
        "MeanTeacher_w0",
        "PseudoLabel_w0",
        "UAMT_w0",
        "BCP_w0",
        "CPS_w0",
        "DyCONCPS_w0_wfecl0",
        "DyCONCPS_lossliteral_w0_wuncl0_wfecl0",
        "MagicNet_w0_wcubes0_wlocation0",
        "DyCONMagicNet_w0_wcubes0_wlocation0_wfecl0",
    ],
)
def test_zero_weights_reduce_a_method_to_the_control(trainer, method: str) -> None:
    end = []
    for name in ("LabeledOnly", method):
        t = begin(trainer(named(f"nnUNetTrainer{name}", "epochs2_iters2_seed5")))
        t.step.number = 2
        steps(t, 3)
        end.append(weights(t))
    assert same(end[0], end[1])


@pytest.mark.parametrize("method", CO_TRAINING)
def test_the_second_network_has_a_start_of_its_own_and_learns(trainer, method: str) -> None:
    t = begin(trainer(named(method, "epochs2_iters2_seed5")))
    student, second = weights(t), {k: v.clone() for k, v in t.method.teacher.network.state_dict().items()}
    drawn = [k for k, v in student.items() if v.std() > 0]
    assert len(drawn) > 5
    assert [k for k in drawn if torch.equal(student[k], second[k])] == []
    for k in drawn:
        if student[k].numel() > 100:  # of the same kind: nnU-Net's initialisation
            assert second[k].std().item() == pytest.approx(student[k].std().item(), rel=0.35)
    again = begin(trainer(named(method, "epochs2_iters2_seed5")))
    assert same(second, dict(again.method.teacher.network.state_dict()))
    steps(t, 1)
    moved = t.method.teacher.network.state_dict()
    unmoved = [k for k in drawn if torch.equal(moved[k], second[k])]
    assert unmoved == [k for k in drawn if torch.equal(weights(t)[k], student[k])]  # the coarsest head has weight 0


def test_the_mean_of_both_networks_is_what_stock_predicts_with_them_as_folds(trainer, tmp_path: Path) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    t = begin(trainer(named("nnUNetTrainerCPS")))
    steps(t, 1)
    models = t.method.models(unwrap(t.network))
    t.save_checkpoint(str(Path(t.output_folder, "checkpoint_final.pth")))
    exported = export_model(901, named("nnUNetTrainerCPS"), weights="mean", output=tmp_path / "model")
    image = torch.randn(1, 20, 18, 24)
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_gaussian=False, use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(exported), (0, 1), "checkpoint_final.pth")
    stock = predictor.predict_logits_from_preprocessed_data(image)
    with t._as_network(models["mean"]):
        t.set_deep_supervision_enabled(False)
        predictor.network = t.network
        ours = predictor.predict_sliding_window_return_logits(image)
    torch.testing.assert_close(ours.float(), stock.float(), rtol=1e-2, atol=1e-3)  # stock adds up in float16
    assert not t.network.training or models["teacher"].decoder.deep_supervision  # all left as it was


def test_teacher_starts_from_pretrained_weights(trainer, tmp_path: Path) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    source = begin(trainer(named("nnUNetTrainerDyCON")))
    steps(source, 1)
    path = tmp_path / "checkpoint.pth"
    source.save_checkpoint(str(path))
    t = trainer(named("nnUNetTrainerDyCON"))
    t.initialize()
    load_pretrained_weights(t.network, str(path))
    begin(t)
    assert same(t.method.teacher.network.state_dict(), weights(t))
    body = "encoder.stages.0.0.convs.0.conv.weight"
    assert same(weights(t)[body], weights(source)[body])


def test_a_loss_that_is_not_finite_skips_the_step_and_is_counted(trainer, capsys) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON_delay0_learned0")))
    poison(t.method, 2)
    before = weights(t), {k: v.clone() for k, v in t.method.state_dict().items()}
    steps(t, 2)
    assert same(before, (weights(t), dict(t.method.state_dict())))
    assert "u_0" in capsys.readouterr().out  # the case ids
    steps(t, 1)
    assert not same(before[0], weights(t))
    assert [f["skipped_steps"] for f in t.step.log] == [1.0, 1.0, 0.0]


def test_training_stops_with_the_case_ids_when_the_loss_stays_not_finite(trainer) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON_delay0_learned0")))
    poison(t.method, 100)
    with pytest.raises(DivergedError, match=r"labelled l_0.*unlabelled u_0.*_lr0p001"):
        steps(t, 10)


def test_batch_options_set_the_numbers_of_patches(trainer) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON_batch1_unlabeledbatch3")))
    done = steps(t, 1)[0]
    assert len(done["data"]) == 1
    assert len(done["unlabeled"]) == 3
    assert len(done["unlabeled_keys"]) == 3
    assert t.probabilistic_oversampling
    plans = json.loads(Path(t.output_folder_base, "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["batch_size"] == 2


def test_nomirror_takes_mirroring_out_of_training_and_prediction(trainer) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON_nomirror")))
    assert t.inference_allowed_mirroring_axes is None
    assert "MirrorTransform" not in str(t.dataloader_train.data_loader.transforms)


def test_bf16_trains_and_keeps_losses_in_float32(trainer) -> None:
    from nnunetv2_dycon.precision import cpu_has_bf16

    if not cpu_has_bf16():
        with pytest.raises(ConfigError, match="leave _bf16 out"):
            begin(trainer(named("nnUNetTrainerDyCON_bf16")))
        return
    t = begin(trainer(named("nnUNetTrainerDyCON_bf16")))
    assert np.isfinite(steps(t, 2)[-1]["loss"])
    assert all(f.dtype == torch.float32 for f in t.step.log[-1].values() if torch.is_tensor(f))
    t.validation_step(next(t.dataloader_val))


def test_bf16_gives_nnunets_loss_float32_outputs(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunetv2_dycon.precision.cpu_has_bf16", lambda: True)  # torch emulates it, slowly
    t, stock_loss, seen = trainer(named("nnUNetTrainerDyCON_bf16")), nnUNetTrainer._build_loss, []

    def build_loss(self):
        loss = stock_loss(self)

        def noted(outputs, target):
            seen.extend(output.dtype for output in outputs)
            seen.append(torch.is_autocast_enabled("cpu"))
            return loss(outputs, target)

        return noted

    monkeypatch.setattr(nnUNetTrainer, "_build_loss", build_loss)
    begin(t)
    t.network.register_forward_hook(lambda module, inputs, outputs: seen.append(("network", outputs[0].dtype)))
    steps(t, 1)
    assert ("network", torch.bfloat16) in seen
    assert set(seen) == {("network", torch.bfloat16), torch.float32, False}


def test_the_step_has_nnunets_loss_scaler(trainer) -> None:
    t = trainer(named("nnUNetTrainerDyCON"))
    t.grad_scaler = object()  # on CUDA stock makes one
    t.initialize()
    assert t.step.scaler is t.grad_scaler


@pytest.mark.parametrize("method", ["nnUNetTrainerDyCON", "nnUNetTrainerDyCONCPS"])
def test_compiled_student_gives_the_same_losses(trainer, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    runs, compile_ = [], torch.compile
    for compiled in (False, True):
        seed_all(4)
        t = trainer(named(method))
        if compiled:
            monkeypatch.setattr(type(t), "_do_i_compile", lambda self: True)
            monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend="aot_eager"))
        begin(t)
        runs.append([step["loss"] for step in steps(t, 2)])
        assert hasattr(t.network, "_orig_mod") == compiled
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


@pytest.fixture
def unprepared(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Preprocessed folder of a copy of the tiny data set, without its unlabelled images."""
    preprocessed = tmp_path / "nnUNet_preprocessed"
    shutil.copytree(tiny / "nnUNet_preprocessed", preprocessed, ignore=shutil.ignore_patterns("*_unlabeled*"))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    return preprocessed / "Dataset901_Tiny"


def test_training_prepares_missing_unlabeled_images_and_says_so(trainer, unprepared: Path, capsys) -> None:
    begin(trainer(named("nnUNetTrainerDyCON")))
    said = capsys.readouterr().out
    assert "Preparing them now" in said
    assert "nnUNetv2_dycon preprocess_unlabeled -d 901 -c 3d_fullres" in said
    assert (unprepared / "nnUNetPlans_3d_fullres_unlabeled" / "u_00.pkl").is_file()


def test_distributed_training_stops_with_the_command_instead(trainer, unprepared: Path) -> None:
    t = trainer(named("nnUNetTrainerDyCON"))
    t.is_ddp = True
    with pytest.raises(DataError, match="type: nnUNetv2_dycon preprocess_unlabeled -d 901 -c 3d_fullres"):
        t.on_train_start()
    assert not list(unprepared.glob("*_unlabeled*"))


@pytest.mark.parametrize(
    ("before", "ramp", "learned", "said"),
    [
        (0.6, 0.0, True, True),  # shown and lost
        (0.0, 0.9, True, True),  # not shown, and the teacher teaches
        (0.0, 0.2, True, False),  # early: the student has time to find it
        (0.6, 0.9, False, False),  # no unlabelled term speaks of the class
    ],
)
def test_a_class_that_the_teacher_does_not_show_is_said_in_the_log(
    trainer, capsys, before, ramp, learned, said
) -> None:
    t = trainer(named("nnUNetTrainerDyCON"))
    t.on_train_start()
    run_epochs(t, 1)
    t.history.rows[0]["dice_teacher_class2"] = before
    capsys.readouterr()
    t.on_epoch_start()
    t.on_train_epoch_start()
    t.on_train_epoch_end([t.train_step(next(t.dataloader_train))])
    with torch.no_grad():
        t.on_validation_epoch_start()
        output = t.validation_step(next(t.dataloader_val))
        output["teacher_tp_hard"] = np.zeros_like(output["teacher_tp_hard"])
        t.on_validation_epoch_end([output])
    t.epoch_row["ramp"] = ramp
    t.method.learned.counts[:, 0] = torch.tensor([9.0, 9.0, 9.0 if learned else 0.0])
    t.method.learned.counts[:, 1:] = torch.tensor([1.0, 1.0, 1.0])
    t.on_epoch_end()
    log = capsys.readouterr().out
    assert ("the teacher does not show class 'class2'" in log) == said
    waits = "do not teach it: class2 (1 of 2 classes; Dice on labelled patches below 0.8)"
    assert (waits in log) == (not learned)
