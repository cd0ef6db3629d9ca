"""A training that is killed at any moment goes on as if it had not been."""

from pathlib import Path

import pytest

from tests.datasets import make_dataset, plan_and_preprocess, write_splits
from tests.killing import Training, kill_often

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    names = make_dataset(folder)
    write_splits(folder, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=folder)
    return folder


def test_a_training_killed_in_each_phase_ends_in_the_checkpoints_of_one_that_was_not(root: Path) -> None:
    training = Training(root, "nnUNetTrainerDyCON_epochs4_iters2_valiters1_save1_seed80")
    found = kill_often(training, kills=4, seed=0)
    assert {kill.phase for kill in found} == {"training", "checkpoint", "validation"}
