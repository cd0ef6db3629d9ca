"""The engine against stock nnU-Net and against itself; every method by parametrisation."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_dycon.checkpoint import KEY, read_checkpoint
from nnunetv2_dycon.errors import ConfigError, DataError, DivergedError
from nnunetv2_dycon.export import export_model
from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.step import Term
from tests.passes import costs_of
from tests.training import begin, same, seed_all, steps

SHORT = "epochs6_iters2_valiters1_save3"
AVERAGING = (
    "nnUNetTrainerLabeledOnly",
    "nnUNetTrainerMeanTeacher",
    "nnUNetTrainerDyCON",
    "nnUNetTrainerDyCONPaper",
    "nnUNetTrainerDyCON_viewcutmix_lossguarded_lambdah0p1",
    "nnUNetTrainerDyCON_viewnoise_lossliteral",
    "nnUNetTrainerMeanTeacher_viewintensity_lossce_dice",
    "nnUNetTrainerDyCON_feclonlabeled_lossguarded_focusuncertain",
    "nnUNetTrainerPseudoLabel",
    "nnUNetTrainerUAMT_viewcutmix",
    "nnUNetTrainerBCP",
)
CO_TRAINING = ("nnUNetTrainerCPS", "nnUNetTrainerCPS_viewcopy_paste", "nnUNetTrainerDyCONCPS_onall_lossguarded")
METHODS = (*AVERAGING, *CO_TRAINING)
USING_UNLABELED = METHODS[1:]


def named(method: str, options: str = SHORT) -> str:
    return f"{method}_{options}"


def weights(trainer) -> dict:
    return {k: v.clone() for k, v in unwrap(trainer.network).state_dict().items()}


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
    "nnUNetTrainerDyCON": 8,
    "nnUNetTrainerDyCONPaper": 7,
    "nnUNetTrainerDyCON_viewcutmix_lossguarded_lambdah0p1": 5,
    "nnUNetTrainerDyCON_viewnoise_lossliteral": 5,
    "nnUNetTrainerMeanTeacher_viewintensity_lossce_dice": 2,
    "nnUNetTrainerDyCON_feclonlabeled_lossguarded_focusuncertain": 6,
    "nnUNetTrainerPseudoLabel": 2,
    "nnUNetTrainerUAMT_viewcutmix": 2,
    "nnUNetTrainerBCP": 5,
    "nnUNetTrainerCPS": 4,
    "nnUNetTrainerCPS_viewcopy_paste": 4,
    "nnUNetTrainerDyCONCPS_onall_lossguarded": 12,
}


@pytest.mark.parametrize("method", USING_UNLABELED)
def test_every_term_moves_the_student(trainer, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    seed_all(0)
    gated = "DyCON" in method or "PseudoLabel" in method  # nothing passes the gate of a teacher that knows nothing
    t = begin(trainer(named(method, "epochs1_iters1_gate0" if gated else "epochs1_iters1")))
    steps(t, 1)
    t.step.number = 10**6  # schedules at their end: full weight
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
        "DyCON_wuncl0_wpasted0_wfecl0",
        "MeanTeacher_w0",
        "PseudoLabel_w0",
        "UAMT_w0",
        "BCP_w0",
        "CPS_w0",
        "DyCONCPS_w0_wuncl0_wfecl0",
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


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=pytest.mark.slow if "_" in method else ()) for method in METHODS],  # 6 seconds each
)
def test_three_and_three_epochs_equal_six(trainer, method: str, tmp_path: Path) -> None:
    seed_all(2)
    whole = trainer(named(method))
    whole.run_training()
    folder = Path(whole.output_folder)
    final = read_checkpoint(folder / "checkpoint_final.pth")
    shutil.rmtree(folder)

    seed_all(2)
    first = trainer(named(method))
    first.on_train_start()
    run_epochs(first, 3)
    del first
    seed_all(99)  # a new process has other random states
    second = trainer(named(method), resume=True)
    second.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    second.run_training()
    again = read_checkpoint(folder / "checkpoint_final.pth")

    assert same(final["network_weights"], again["network_weights"])
    assert same(final["optimizer_state"], again["optimizer_state"])
    for key in ("teacher", "method", "optimizer", "history", "step", "random"):
        assert same(final[KEY][key], again[KEY][key]), key
    assert len(again[KEY]["history"]) == 6
    rows = (folder / "ssl_history.csv").read_text().splitlines()
    assert len(rows) == 7
    assert (folder / "ssl_progress.png").stat().st_size > 0


def test_an_older_checkpoint_goes_on_bit_for_bit_and_one_of_other_settings_is_refused(trainer, tmp_path) -> None:
    """A checkpoint without option `paste` and with former names goes on as it began."""
    name = named("nnUNetTrainerDyCON", "epochs6_iters2_valiters1_save3_seed2")
    first = trainer(name)
    first.on_train_start()
    run_epochs(first, 3)
    latest = Path(first.output_folder, "checkpoint_latest.pth")
    older = torch.load(latest, weights_only=False)
    settings = older[KEY]["settings"]
    assert settings.pop("paste") == 0.0
    settings["ramp"], settings["labels"] = settings.pop("rampup"), settings.pop("target")
    assert settings.pop("loss") == "ce_dice"
    settings.update(target=None, uncl=None)
    torch.save(older, tmp_path / "older.pth")

    ends = []
    for content in (str(latest), str(tmp_path / "older.pth"), older):  # nnU-Net loads a file or what it holds
        t = trainer(name, resume=True)
        t.load_checkpoint(content)
        begin(t)
        steps(t, 2)
        ends.append([weights(t), dict(t.method.state_dict()), t.step.number])
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
    assert ends[0][2] == 8

    settings.update(uncl="guarded")
    torch.save(older, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="loss is ce_dice, there guarded"):
        trainer(name, resume=True).load_checkpoint(str(tmp_path / "other.pth"))
    settings.update(uncl=None, unheard=1)
    torch.save(older, tmp_path / "unknown.pth")
    with pytest.raises(ConfigError, match="unheard is None, there 1"):
        trainer(name, resume=True).load_checkpoint(str(tmp_path / "unknown.pth"))


def run_epochs(trainer, number: int) -> None:
    """The body of nnU-Net's run_training for some epochs, as if it were killed afterwards."""
    for _ in range(number):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end(
            [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
        )
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val)) for _ in range(1)])
        trainer.on_epoch_end()


@pytest.mark.parametrize("method", ["nnUNetTrainerDyCON", "nnUNetTrainerCPS"])
def test_both_optimizers_follow_nnunets_learning_rate(trainer, method: str) -> None:
    t = begin(trainer(named(method)))
    seen = []
    for _ in range(3):
        seen.append([group["lr"] for one in t.step.optimizers for group in one.param_groups])
        run_epochs(t, 1)
    assert [lrs[0] for lrs in seen] == pytest.approx([0.01 * (1 - epoch / 6) ** 0.9 for epoch in (0, 0, 1)])
    assert all(len(lrs) == 2 and lrs[0] == lrs[1] for lrs in seen)


def test_the_history_has_the_means_of_the_steps_and_the_number_of_skipped_ones(trainer) -> None:
    t = trainer(named("nnUNetTrainerDyCON", "epochs4_iters4_valiters1"))
    t.on_train_start()
    logs = []
    for epoch in range(2):
        t.on_epoch_start()
        t.on_train_epoch_start()
        outputs = [t.train_step(next(t.dataloader_train)) for _ in range(3)]
        if epoch == 1:
            poison(t.method, 1)
            outputs.append(t.train_step(next(t.dataloader_train)))
        logs.append([{name: float(value) for name, value in log.items()} for log in t.step.log])
        assert len(logs[-1]) == len(outputs)  # of this epoch alone
        t.on_train_epoch_end(outputs)
        with torch.no_grad():
            t.on_validation_epoch_start()
            t.on_validation_epoch_end([t.validation_step(next(t.dataloader_val))])
        t.on_epoch_end()
    with open(Path(t.output_folder, "ssl_history.csv"), newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert [row["skipped_steps"] for row in rows] == [0, 1]
    for row, steps_of in zip(rows, logs, strict=True):
        for name in (
            "supervised",
            "ramp",
            "beta",
            "in_uncl",
            "out_uncl_weighted",
            "in_agreement",
            "fecl_labeled_weight",
        ):
            finite = [log[name] for log in steps_of if np.isfinite(log[name])]
            assert len(finite) >= 3
            assert row[name] == pytest.approx(np.mean(finite), rel=1e-6), name


def test_student_and_teacher_have_their_own_dice_in_the_history(trainer) -> None:
    t = trainer(named("nnUNetTrainerDyCON"))
    t.on_train_start()
    t.on_epoch_start()
    counts = {"tp_hard": [[6, 1], [2, 2]], "fp_hard": [[1, 2], [1, 0]], "fn_hard": [[3, 4], [0, 3]]}
    of_teacher = {"tp_hard": [[5, 0], [5, 0]], "fp_hard": [[4, 0], [2, 0]], "fn_hard": [[3, 0], [1, 0]]}
    outputs = [
        {"loss": np.float32(0.5)}
        | {name: np.array(values[i]) for name, values in counts.items()}
        | {f"teacher_{name}": np.array(values[i]) for name, values in of_teacher.items()}
        for i in range(2)
    ]
    t.on_validation_epoch_end(outputs)
    found = {name: t.epoch_row[f"dice_{name}"] for name in ("student_class1", "student_class2", "teacher_class1")}
    wanted = {
        "student_class1": 16 / (16 + 2 + 3),
        "student_class2": 6 / (6 + 2 + 7),
        "teacher_class1": 20 / (20 + 6 + 4),
    }
    assert found == pytest.approx(wanted)
    assert np.isnan(t.epoch_row["dice_teacher_class2"])  # in no patch, for the teacher


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_loads_strictly_into_the_plain_network_and_without_unpickling(
    trainer, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    t = begin(trainer(named(method)))
    steps(t, 1)
    path = Path(t.output_folder, "checkpoint_latest.pth")
    t.save_checkpoint(str(path))
    checkpoint = read_checkpoint(path)
    assert "unpickled" not in caplog.text
    cases = checkpoint[KEY]["cases"]
    assert cases["labeled"] == sorted(t.dataloader_train.data_loader.labeled._data.identifiers)
    assert bool(cases["unlabeled"]) == t.method_type.uses_unlabeled
    stock = begin(trainer("nnUNetTrainer"))
    for weights_of in (checkpoint["network_weights"], checkpoint[KEY]["teacher"]):
        stock.network.load_state_dict(weights_of, strict=True)
    stock.load_checkpoint(str(path))  # nnU-Net's own resume
    assert same(stock.optimizer.state_dict()["state"], t.optimizer.state_dict()["state"])


def test_checkpoint_is_whole_or_the_previous_one(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON")))
    path = Path(t.output_folder, "checkpoint_latest.pth")
    t.save_checkpoint(str(path))
    before = path.read_bytes()
    steps(t, 1)  # so that a half-written file would differ

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunetv2_dycon.files.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        t.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.glob(".*")] == []


def test_what_a_killed_training_left_goes_when_it_starts_again(trainer) -> None:
    t = trainer(named("nnUNetTrainerDyCON"))
    t.initialize()
    folder = Path(t.output_folder)
    left, kept = folder / ".0123abcd.part.checkpoint_latest.pth", folder / ".mine.pth"
    left.touch()
    kept.touch()
    begin(t)
    assert not left.exists()
    assert kept.exists()


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


def test_other_settings_are_refused_when_continuing(trainer, tmp_path: Path) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON")))
    path = tmp_path / "checkpoint.pth"
    t.save_checkpoint(str(path))
    with pytest.raises(ConfigError, match=r"gamma is 0\.5, there 0\.8"):
        trainer(named("nnUNetTrainerDyCON_gamma0p5")).load_checkpoint(str(path))


def test_checkpoint_of_another_trainer_starts_the_teacher_from_the_student(trainer, tmp_path: Path, capsys) -> None:
    stock = begin(trainer("nnUNetTrainer"))
    path = tmp_path / "checkpoint.pth"
    stock.save_checkpoint(str(path))
    t = trainer(named("nnUNetTrainerDyCON"))
    t.load_checkpoint(str(path))
    assert "teacher and all that the method adds start anew" in capsys.readouterr().out
    begin(t)
    assert same(t.method.teacher.network.state_dict(), weights(stock))
    assert t.step.number == t.current_epoch * 2 == 2  # the epoch is over; its schedules go on


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


def poison(method, number: int) -> None:
    """Make the last pass of the unlabelled patches not finite for some steps."""
    inner, left = method.unlabeled_terms, [2 * number]  # DyCON's view has two passes

    def spoiled(*arguments):
        cost = inner(*arguments)
        left[0] -= 1
        if left[0] < 0 or left[0] % 2:
            return cost
        return cost._replace(terms={k: Term(1.0, term.value * float("nan")) for k, term in cost.terms.items()})

    method.unlabeled_terms = spoiled


def test_a_loss_that_is_not_finite_skips_the_step_and_is_counted(trainer, capsys) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON")))
    poison(t.method, 2)
    before = weights(t), {k: v.clone() for k, v in t.method.state_dict().items()}
    steps(t, 2)
    assert same(before, (weights(t), dict(t.method.state_dict())))
    assert "u_0" in capsys.readouterr().out  # the case ids
    steps(t, 1)
    assert not same(before[0], weights(t))
    assert [f["skipped_steps"] for f in t.step.log] == [1.0, 1.0, 0.0]


def test_training_stops_with_the_case_ids_when_the_loss_stays_not_finite(trainer) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON")))
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
    ("before", "ramp", "said"),
    [
        (0.6, 0.0, True),  # learnt and lost
        (0.0, 0.9, True),  # not learnt, and the teacher teaches
        (0.0, 0.2, False),  # early: the student has time to find it
    ],
)
def test_a_class_that_the_teacher_does_not_show_is_said_in_the_log(trainer, capsys, before, ramp, said) -> None:
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
    t.on_epoch_end()
    assert ("the teacher does not show class 'class2'" in capsys.readouterr().out) == said


def test_disabled_checkpointing_trains_without_a_file(trainer) -> None:
    t = trainer(named("nnUNetTrainerDyCON", "epochs1_iters1_valiters1"))
    t.disable_checkpointing = True
    t.run_training()
    assert not list(Path(t.output_folder).glob("*.pth"))
    assert Path(t.output_folder, "ssl_history.csv").exists()
