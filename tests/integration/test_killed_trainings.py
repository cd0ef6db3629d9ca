"""A training that is killed at any moment goes on as if it had not been."""

from pathlib import Path

import pytest

from tests.datasets import make_dataset, plan_and_preprocess, write_splits
from tests.killing import KILLS, Training, kill_often

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    names = make_dataset(folder)
    write_splits(folder, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=folder)
    return folder


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_training_killed_in_each_phase_ends_in_the_checkpoints_of_one_that_was_not(root: Path, loaders: int) -> None:
    training = Training(root, f"nnUNetTrainerDyCON_epochs4_iters2_valiters1_save1_seed8{loaders}", loaders)
    found = kill_often(training, KILLS, seed=loaders)
    assert {kill.phase for kill in found} == {"training", "checkpoint", "validation"}
