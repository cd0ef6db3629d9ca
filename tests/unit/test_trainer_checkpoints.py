"""Checkpoints of every method: what they hold, who may continue, and what a killed training leaves."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from nnunetv2_dycon.checkpoint import KEY, read_checkpoint
from nnunetv2_dycon.errors import ConfigError, DataError, WriteError
from tests.training import METHODS, begin, named, run_epochs, same, seed_all, steps, weights
from tests.unit.test_checkpoint import Touch


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
    """The default of before goes on as it began, under the name that has its options now."""
    name = named("nnUNetTrainerDyCON_viewbcp_lossce_dice_wuncl0p5_learned0", "epochs6_iters2_valiters1_save3_seed2")
    first = trainer(name)
    first.on_train_start()
    run_epochs(first, 3)
    latest = Path(first.output_folder, "checkpoint_latest.pth")
    older = torch.load(latest, weights_only=False)
    settings = older[KEY]["settings"]
    assert settings.pop("paste") == 0.0
    assert settings.pop("learned") == 0.0
    assert not settings.pop("nats")
    assert settings.pop("rampup") == 0.4
    settings["ramp"], settings["labels"] = None, settings.pop("target")
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


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_loads_strictly_into_the_plain_network_and_runs_no_code(trainer, method: str) -> None:
    t = begin(trainer(named(method)))
    steps(t, 1)
    path = Path(t.output_folder, "checkpoint_latest.pth")
    t.save_checkpoint(str(path))
    checkpoint = read_checkpoint(path)
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
    assert [file.name for file in path.parent.glob(".*.part.*")] == []


def test_a_full_disk_says_how_the_training_goes_on(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    t = begin(trainer(named("nnUNetTrainerDyCON")))
    t.history.add(0, {"ramp": 0.0})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nnunetv2_dycon.files.os.fsync", full)
    folder = Path(t.output_folder)
    writers = {"checkpoint_latest.pth": t.save_checkpoint, "a.csv": t.history.write_csv, "a.png": t.history.plot}
    for name, write in writers.items():
        with pytest.raises(
            WriteError, match=r"MB are free\); make room, then type the same command with --c$"
        ) as caught:
            write(folder / name)
        assert str(caught.value).startswith(f"cannot write {folder / name}: ")
        assert not (folder / name).exists()


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


def test_disabled_checkpointing_trains_without_a_file(trainer) -> None:
    t = trainer(named("nnUNetTrainerDyCON", "epochs1_iters1_valiters1"))
    t.disable_checkpointing = True
    t.run_training()
    assert not list(Path(t.output_folder).glob("*.pth"))
    assert Path(t.output_folder, "ssl_history.csv").exists()


def test_a_checkpoint_of_stock_nnunet_is_read_and_one_with_code_stops_before_it_runs(trainer, tmp_path: Path) -> None:
    stock = begin(trainer("nnUNetTrainer"))
    stock.num_iterations_per_epoch = stock.num_val_iterations_per_epoch = 1
    run_epochs(stock, 1)  # its log then has numpy scalars
    path = tmp_path / "checkpoint.pth"
    stock.save_checkpoint(str(path))
    content = read_checkpoint(path, "network_weights", "logging", "optimizer_state")
    assert len(content["logging"]["train_losses"]) == 1
    torch.save({**content, "x": Touch(tmp_path / "ran")}, path)
    with pytest.raises(DataError, match="was not opened"):
        trainer(named("nnUNetTrainerDyCON"), resume=True).load_checkpoint(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_worse_epoch_does_not_replace_the_best_checkpoint_after_a_stop(
    trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net's latest checkpoint has the best value of the epoch before."""
    dice = iter([0.2, 0.5, 0.9, 0.1])  # averaged by nnU-Net: 0.2, 0.23, 0.297, 0.2773
    name = named("nnUNetTrainerMeanTeacher", "epochs6_iters1_valiters1_save3_seed50")
    first, second = trainer(name), trainer(name, resume=True)

    def measured(t):
        def end(outputs: list[dict]) -> None:
            value = next(dice)
            for entry, number in (
                ("mean_fg_dice", value),
                ("dice_per_class_or_region", [value] * 2),
                ("val_losses", 1.0),
            ):
                t.logger.log(entry, number, t.current_epoch)

        monkeypatch.setattr(t, "on_validation_epoch_end", end)

    measured(first)
    first.on_train_start()
    run_epochs(first, 3)
    folder = Path(first.output_folder)
    best = (folder / "checkpoint_best.pth").read_bytes()
    measured(second)
    second.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert second._best_ema == first._best_ema == pytest.approx(0.9 * (0.9 * 0.2 + 0.1 * 0.5) + 0.1 * 0.9)
    second.on_train_start()
    run_epochs(second, 1)
    assert (folder / "checkpoint_best.pth").read_bytes() == best
