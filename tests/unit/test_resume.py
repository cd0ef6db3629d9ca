"""What a training starts from: the newest whole checkpoint, and pretrained weights that run no code."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch import nn

from nnunetv2_dycon.checkpoint import KEY, TRUST, read_checkpoint, write_checkpoint
from nnunetv2_dycon.errors import ConfigError, DamagedError, DataError
from nnunetv2_dycon.options import Settings
from nnunetv2_dycon.trainers import resume
from nnunetv2_dycon.trainers.messages import explain
from tests.training import begin, named, run_epochs, same, steps
from tests.unit.test_checkpoint import Touch

LATEST, BEST, FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"


def entries(epoch: int) -> dict[str, Any]:
    return dict.fromkeys(resume.NEEDED) | {"network_weights": {"weight": torch.ones(1, 2)}, "current_epoch": epoch}


class AnyTraining(SimpleNamespace):
    """As much of a training as is asked which checkpoint it takes."""

    def __init__(self, folder: Path, *, continues: bool = True) -> None:
        super().__init__(
            output_folder=str(folder),
            output_folder_base=str(folder.parent),
            continues=continues,
            restored=None,
            was_initialized=True,
            network=nn.Linear(2, 1, bias=False),
            settings=Settings(),
            plans_manager=SimpleNamespace(plans_name="nnUNetPlans"),
            said=[],
        )

    def print_to_log_file(self, text: str) -> None:
        self.said.append(text)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(1).numpy().tobytes()) + 1] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "is damaged": flip,
    "central directory": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "it is empty": lambda path: path.write_bytes(b""),
    "not a file of torch": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
    "it has no optimizer_state": lambda path: torch.save({"network_weights": {}}, path),
}


@pytest.mark.parametrize("reason", DAMAGES)
@pytest.mark.parametrize("broken", [LATEST, FINAL])
def test_the_newest_whole_checkpoint_takes_the_place_of_a_damaged_one(tmp_path: Path, reason: str, broken: str) -> None:
    epochs = {FINAL: 9, LATEST: 7, BEST: 4}
    for name, epoch in epochs.items():
        write_checkpoint(entries(epoch), tmp_path / name)
    DAMAGES[reason](tmp_path / broken)
    t = AnyTraining(tmp_path)
    path, _ = resume.choose_checkpoint(t, tmp_path / broken)
    epochs.pop(broken)
    newest = max(epochs, key=epochs.__getitem__)
    assert path.name == newest
    (said,) = t.said
    assert reason in said
    assert said.startswith(f"WARNING: {tmp_path / broken} cannot be read as a checkpoint (")
    assert said.endswith(f"). Going on from {newest}, at epoch {epochs[newest]}.")


def test_the_best_checkpoint_is_taken_only_if_it_is_whole(tmp_path: Path) -> None:
    for name in (LATEST, BEST):
        write_checkpoint(entries(3), tmp_path / name)
        flip(tmp_path / name)
    said = (
        rf"latest\.pth cannot .* and there is no whole one next to it; restore it, or train anew: mv {tmp_path} .*/old_"
    )
    with pytest.raises(DataError, match=said):
        resume.choose_checkpoint(AnyTraining(tmp_path), tmp_path / LATEST)


def test_only_a_training_that_continues_takes_another_checkpoint(tmp_path: Path) -> None:
    """--val and --val_best are about the checkpoint that they name."""
    for name in (FINAL, BEST):
        write_checkpoint(entries(3), tmp_path / name)
    flip(tmp_path / FINAL)
    trained = AnyTraining(tmp_path)
    trained.restored = {}
    for t in (AnyTraining(tmp_path, continues=False), trained):
        with pytest.raises(DamagedError, match="restore it, or train again with --c"):
            resume.choose_checkpoint(t, tmp_path / FINAL)
    with pytest.raises(DamagedError):
        resume.choose_checkpoint(AnyTraining(tmp_path / "elsewhere"), tmp_path / FINAL)


def test_a_checkpoint_that_is_whole_but_cannot_be_read_now_is_no_reason_for_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one would soon replace it."""
    for name in (LATEST, BEST):
        write_checkpoint(entries(3), tmp_path / name)
    torch.save(entries(3) | {"x": Touch(tmp_path / "ran")}, tmp_path / LATEST)
    with pytest.raises(DataError, match="was not opened"):
        resume.choose_checkpoint(AnyTraining(tmp_path), tmp_path / LATEST)
    assert not (tmp_path / "ran").exists()

    def refuse(path: Path) -> None:
        if path.name == LATEST:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("nnunetv2_dycon.checkpoint._check_sums", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        resume.choose_checkpoint(AnyTraining(tmp_path), tmp_path / LATEST)


def test_a_network_that_is_planned_otherwise_now_is_said(tmp_path: Path) -> None:
    content = entries(3) | {"network_weights": {"weight": torch.ones(1, 3)}}
    write_checkpoint(content, tmp_path / LATEST)
    said = r"another network than nnUNetPlans plans now \(weight: \(1, 3\), planned \(1, 2\)\); restore .*plans\.json"
    with pytest.raises(ConfigError, match=said):
        resume.choose_checkpoint(AnyTraining(tmp_path), tmp_path / LATEST)
    content["network_weights"] = {"module.weight": torch.ones(1, 2)}  # of nn.DataParallel: nnU-Net takes it
    write_checkpoint(content, tmp_path / LATEST)
    assert resume.choose_checkpoint(AnyTraining(tmp_path), tmp_path / LATEST) == (tmp_path / LATEST, None)


def test_a_training_whose_latest_checkpoint_is_damaged_ends_as_one_that_was_never_stopped(trainer, capsys) -> None:
    name = named("nnUNetTrainerMeanTeacher", "epochs4_iters1_valiters1_save2_seed60")
    whole = trainer(name)
    whole.run_training()
    folder = Path(whole.output_folder)
    final = read_checkpoint(folder / FINAL)
    shutil.rmtree(folder)
    first = trainer(name)
    first.on_train_start()
    run_epochs(first, 2)
    (folder / LATEST).write_bytes((folder / LATEST).read_bytes()[:-1])
    second = trainer(name, resume=True)
    maybe_load_checkpoint(second, True, False)
    assert "Going on from checkpoint_best.pth, at epoch" in capsys.readouterr().out
    assert second.current_epoch == read_checkpoint(folder / BEST)["current_epoch"]
    second.run_training()
    again = read_checkpoint(folder / FINAL)
    for key in ("network_weights", "optimizer_state", "_best_ema"):
        assert same(final[key], again[key]), key
    for key in ("teacher", "method", "optimizer", "history", "step", "random"):
        assert same(final[KEY][key], again[KEY][key]), key


# ---- pretrained weights --------------------------------------------------------------------------------------


def load_pretrained(trainer: Any, path: Path) -> Any:
    """Do what nnU-Net's command does with -pretrained_weights."""
    t = trainer(named("nnUNetTrainerDyCON", "epochs1_iters1_valiters1"))
    maybe_load_checkpoint(t, False, False, str(path))
    return t


def test_pretrained_weights_of_nnunet_and_of_ours_are_loaded(trainer, tmp_path: Path, capsys) -> None:
    for name in ("nnUNetTrainer", named("nnUNetTrainerMeanTeacher")):
        t = begin(trainer(name))
        t.num_iterations_per_epoch = t.num_val_iterations_per_epoch = 1
        run_epochs(t, 1)  # its log then has numpy scalars
        t.save_checkpoint(str(tmp_path / "weights.pth"))
        loaded = load_pretrained(trainer, tmp_path / "weights.pth")
        key = "encoder.stages.0.0.convs.0.conv.weight"
        assert same(loaded.network.state_dict()[key], t.network.state_dict()[key])
        capsys.readouterr()
    begin(loaded)
    steps(loaded, 1)


def test_code_in_pretrained_weights_does_not_run_unless_it_is_trusted(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    stock = begin(trainer("nnUNetTrainer"))
    stock.save_checkpoint(str(tmp_path / "weights.pth"))
    content = read_checkpoint(tmp_path / "weights.pth")
    torch.save({**content, "x": Touch(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(Exception, match="Weights only load failed") as caught:
        load_pretrained(trainer, tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()
    line = explain(caught.value)
    assert line.startswith(f"{tmp_path / 'weights.pth'} was not opened: to read its posix.mkdir")
    assert line.endswith(f"type: export {TRUST}=1")
    monkeypatch.setenv(TRUST, "1")
    load_pretrained(trainer, tmp_path / "weights.pth")
    assert (tmp_path / "ran").exists()
    capsys.readouterr()


def test_reading_is_restricted_from_initialisation_to_the_start_alone(trainer, tmp_path: Path) -> None:
    def refused() -> bool:
        torch.save({"x": tmp_path}, tmp_path / "any.pth")
        try:
            torch.load(tmp_path / "any.pth", weights_only=False)
        except Exception:
            return True
        return False

    t = trainer(named("nnUNetTrainerDyCON", "epochs1_iters1_valiters1"))
    assert not refused()
    t.initialize()
    assert refused()
    begin(t)
    assert not refused()
    t.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    other = trainer(named("nnUNetTrainerDyCON", "epochs1_iters1_valiters1"))
    other.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert not refused()
