"""Two trainings of one name and fold: the second one stops with a line that names the first."""

import multiprocessing
import os
import re
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.trainers import lock
from nnunetv2_dycon.trainers.lock import lock_training
from tests.training import begin, named, steps


def hold(folder: Path, pipe: Connection) -> None:
    lock_training(folder)
    pipe.send(os.getpid())
    pipe.recv()


@pytest.fixture
def other(tmp_path: Path):
    """Let another process train in a folder; returns its id, and ends with the test."""
    context, running = multiprocessing.get_context("spawn"), []

    def start(folder: Path) -> tuple[int, multiprocessing.Process]:
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(folder, theirs))
        process.start()
        running.append((process, ours))
        assert ours.poll(60)
        return ours.recv(), process

    yield start
    for process, pipe in running:
        if process.is_alive():
            pipe.send("end")
        process.join(10)
        assert not process.is_alive()


def test_the_second_training_names_the_first_and_changes_nothing(trainer, other) -> None:
    t = trainer(named("nnUNetTrainerMeanTeacher", "epochs2_iters1_valiters1_seed40"))
    folder = Path(t.output_folder)
    process, _ = other(folder)
    (folder / ".12345678.part.checkpoint_latest.pth").write_bytes(b"of the first one")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    said = (
        rf"{re.escape(t.output_folder)}: process {process} on {re.escape(socket.gethostname())}, since 20.* trains here"
    )
    with pytest.raises(DataError, match=said) as caught:
        t.on_train_start()
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_validation_next_to_a_training_is_refused_too(trainer, other) -> None:
    t = trainer(named("nnUNetTrainerMeanTeacher", "epochs2_iters1_valiters1_seed40"))
    process, _ = other(Path(t.output_folder))
    with pytest.raises(DataError, match=f"process {process} on .* trains here"):
        t.perform_actual_validation()
    assert not Path(t.output_folder, "validation").exists()


def test_a_killed_training_leaves_no_lock(tmp_path: Path, other) -> None:
    _, process = other(tmp_path)
    process.kill()
    process.join()
    lock_training(tmp_path)
    assert str(os.getpid()) in (tmp_path / lock._LOCK).read_text()


def test_other_processes_of_a_distributed_training_do_not_lock(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr("nnunetv2_dycon.trainers.engine.lock_training", asked.append)
    t = trainer(named("nnUNetTrainerMeanTeacher", "epochs2_iters1_valiters1_seed41"))
    begin(t)
    assert asked == [Path(t.output_folder)]
    t.local_rank = 1
    t.on_train_start()
    assert len(asked) == 1


def test_a_process_may_train_again_where_it_trained(trainer) -> None:
    for _ in range(2):
        t = begin(trainer(named("nnUNetTrainerMeanTeacher", "epochs2_iters1_valiters1_seed42")))
        steps(t, 1)
