"""Before a training begins: the device, the threads, the folders of trainings."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_dycon.command_lines import Model, device_flag, train_command
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.trainers import start
from nnunetv2_dycon.trainers.results import set_aside
from tests.training import named

MODEL = Model("nnUNetTrainerDyCON", "nnUNetPlans", "3d_fullres")


@pytest.mark.parametrize(
    ("value", "threads"),
    [("1", 1), ("2", 2), ("3", 3), ("8", 3), ("2,1", 2), (" 2 ", 2), ("", 3), (None, 3)],
)
def test_omp_num_threads_limits_what_nnunets_command_has_set(
    monkeypatch: pytest.MonkeyPatch, value: str | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        start.limit_threads(torch.device("cuda"))
        assert torch.get_num_threads() == 3
        start.limit_threads(torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", ["0", "all", "-1", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(ConfigError, match=r"OMP_NUM_THREADS is '.*'; type: export OMP_NUM_THREADS=1, or more"):
        start.limit_threads(torch.device("cpu"))


def test_a_trainer_that_nnunets_command_makes_keeps_to_it(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets all cores before it makes the trainer."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        trainer(named("nnUNetTrainerLabeledOnly"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cuda", "mps", "flag"), [(True, False, ()), (False, False, ("-device", "cpu")), (False, True, ("-device", "mps"))]
)
def test_commands_name_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, flag) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device_flag() == flag


def test_a_command_has_what_nnunet_cannot_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunetv2_dycon.command_lines.device_flag", lambda: ())
    assert train_command(501, MODEL, 0, "--c") == "nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerDyCON --c"
    assert train_command(501, MODEL._replace(plans="Mine"), "all") == (
        "nnUNetv2_train 501 3d_fullres all -tr nnUNetTrainerDyCON -p Mine"
    )


def test_a_folder_that_was_set_aside_is_no_fold_for_nnunet(tmp_path: Path) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    model = tmp_path / "my results" / "model"
    for number in range(3):
        fold = model / "fold_0"
        fold.mkdir(parents=True)
        (fold / "checkpoint_final.pth").write_text(str(number))
        if number < 2:
            subprocess.run(set_aside(fold), shell=True, check=True)
    assert nnUNetPredictor.auto_detect_available_folds(str(model), "checkpoint_final.pth") == [0]
    kept = {path.name: (path / "checkpoint_final.pth").read_text() for path in model.iterdir()}
    assert kept == {"fold_0": "2", "old_fold_0": "0", "old2_fold_0": "1"}


LOCK = """
import os, sys
from pathlib import Path
from nnunetv2_dycon.trainers import lock
lock.lock_training(Path(sys.argv[1]))
os.kept = lock._held  # so that it is there longer than our modules
"""


def test_a_training_ends_without_a_word_about_its_lock(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOCK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
