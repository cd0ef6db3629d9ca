"""Loader processes: errors reach the training, and nothing is left behind when it ends."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.data_loader import DataLoader

from nnunetv2_dycon._register import TRAINING
from nnunetv2_dycon.data.processes import (
    LoaderProcesses,
    _death,
    ending_with_this_process,
    share,
    shared_bytes,
    tensors_of,
)
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.randomness import global_states
from nnunetv2_dycon.shared_memory import REMEDY, file_shortage, memory_shortage, waiting_batches
from nnunetv2_dycon.trainers import loaders
from nnunetv2_dycon.trainers.loaders import pool_sizes
from tests.processes import left_after, running, with_shared_memory
from tests.training import begin, named, same

# batchgenerators' thread that collects results ends so when its workers are stopped
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
ROOT = Path(__file__).parents[2]
MB = 1024**2


class Numbered(DataLoader):
    """Batches of one number each, from 0; at `last` it does something else."""

    def __init__(self, last: int = 10**9, then: object = None) -> None:
        super().__init__(None, 1, 1, None, True, False, True)
        self.transforms, self.number, self.last, self.then = None, 0, last, then

    def generate_train_batch(self) -> dict[str, torch.Tensor]:
        if self.number == self.last:
            self.then()
        self.number += 1
        return {"data": torch.full((4,), self.number - 1)}


@pytest.fixture
def pool() -> Iterator[list[LoaderProcesses]]:
    pools: list[LoaderProcesses] = []
    yield pools
    for one in pools:
        one._finish()


def refuse() -> None:
    raise DataError("case 'x' cannot be read")


def children() -> set[int]:
    return running(child.pid for child in multiprocessing.active_children())


def test_an_error_of_the_user_in_a_loader_process_is_raised_in_the_training(pool, capfd) -> None:
    before = children()
    pool.append(LoaderProcesses(Numbered(3, refuse), 2, 2, None, pin_memory=False))
    numbers = []
    with pytest.raises(DataError, match=r"^case 'x' cannot be read$"):
        numbers.extend(int(batch["data"][0]) for batch in pool[0])
    assert set(numbers) <= {0, 1, 2}  # what was whole was used
    assert children() == before
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "was killed, most likely for lack of memory; train on with --c, with nnUNet_n_proc_DA=1 in"),
        (signal.SIGUSR1, "was ended by SIGUSR1; train on with --c"),
    ],
)
def test_a_loader_process_that_is_killed_ends_the_training_with_one_line(pool, number: int, said: str) -> None:
    pool.append(LoaderProcesses(Numbered(), 2, 2, None, pin_memory=False))
    next(pool[0])
    os.kill(pool[0]._processes[1].pid, number)
    with pytest.raises(DataError, match=said) as caught:
        for _ in pool[0]:
            pass
    assert "\n" not in str(caught.value)


def test_processes_that_the_pool_itself_ends_are_not_killed_ones(pool) -> None:
    pool.append(LoaderProcesses(Numbered(), 2, 2, None, pin_memory=False))
    next(pool[0])
    pool[0]._processes[1].terminate()
    with pytest.raises(RuntimeError, match="no longer alive"):
        for _ in pool[0]:
            pass


def test_a_process_that_writes_to_memory_that_is_not_there_lacks_shared_memory() -> None:
    assert "no memory in /dev/shm; give a container more (docker run --shm-size=8g)" in _death("SIGBUS", 2)


def test_any_other_error_stays_what_it_is(pool, capfd) -> None:
    pool.append(LoaderProcesses(Numbered(1, lambda: 1 / 0), 2, 2, None, pin_memory=False))
    with pytest.raises(RuntimeError, match="no longer alive"):
        for _ in pool[0]:
            pass
    assert "ZeroDivisionError" in "".join(capfd.readouterr())


def full(*_: object) -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\nmore")


def test_a_loader_process_without_shared_memory_ends_the_training(pool, monkeypatch, capfd) -> None:
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    pool.append(LoaderProcesses(Numbered(), 2, 2, None, pin_memory=False))
    with pytest.raises(
        DataError, match=r"no shared memory for a batch of 4 kB, .* free in /dev/shm.*--shm-size"
    ) as caught:
        next(pool[0])
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "".join(capfd.readouterr()).count("shared memory") < 5  # and not for ever


def test_batches_are_in_shared_memory_before_they_are_queued() -> None:
    batch = {"data": torch.zeros(3), "target": [torch.ones(2), torch.zeros(2)], "keys": np.array(["a"])}
    share(batch)
    assert [tensor.is_shared() for tensor in (batch["data"], *batch["target"])] == [True] * 3
    assert len(list(tensors_of(batch))) == 3


def test_a_batch_takes_whole_pages_for_every_tensor() -> None:
    batch = {"data": torch.zeros(2, 1, 32, 32, 32), "target": [torch.zeros(2049, dtype=torch.int16), torch.zeros(1)]}
    assert shared_bytes(batch) == 2 * 32**3 * 4 + 8192 + 4096


# free bytes, needed bytes, what is said of them
@pytest.mark.parametrize(
    ("free", "needed", "said"),
    [
        (64 * MB, 64 * MB, None),
        (64 * MB - 1, 64 * MB, "64 MB of shared memory are free in /dev/shm, 64 MB are needed"),
        (0, 3 * MB, "0 kB of shared memory are free in /dev/shm, 3 MB are needed"),
        (64 * MB, 1536 * MB, "64 MB of shared memory are free in /dev/shm, 1.5 GB are needed"),
        (None, 10**15, None),  # no limit of its own
    ],
)
def test_too_little_shared_memory_is_a_line_with_both_remedies(free, needed, said) -> None:
    found = memory_shortage(free, needed)
    if said is None:
        assert found is None
    else:
        assert found.startswith(said)
        assert "docker run --shm-size=8g" in found
        assert "nnUNet_n_proc_DA=0 in front of nnUNetv2_train (for trainings alone: " in found


def test_too_few_open_files_are_a_line(monkeypatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    assert file_shortage(192) is None
    assert file_shortage(193) == "256 files may be open, 257 are needed; type: ulimit -n 4096"
    assert file_shortage(10**4).endswith("ulimit -n 10064")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, -1))
    assert file_shortage(10**6) is None


def tensors_and_bytes(batch: dict) -> tuple[int, int]:
    return len(list(tensors_of(batch))), shared_bytes(batch)


@pytest.mark.parametrize(("ranks", "device"), [(1, "cpu"), (2, "cpu"), (1, "cuda")])
def test_a_training_asks_for_room_for_all_batches_that_may_wait(trainer, monkeypatch, ranks: int, device: str) -> None:
    """Both pools, every tensor of the planned batch with its targets of all resolutions, and every process of it."""
    alone = begin(trainer(named("nnUNetTrainerMeanTeacher")))
    train, val = next(alone.dataloader_train), next(alone.dataloader_val)
    asked: list[int] = []
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    monkeypatch.setattr(loaders, "world_size", lambda: ranks)
    monkeypatch.setattr(loaders, "memory_shortage", lambda free, needed: asked.append(needed) or "little memory")
    t = trainer(named("nnUNetTrainerMeanTeacher"))
    t.initialize()
    t.unlabeled, t.device = alone.unlabeled, torch.device(device)
    before = children()
    with pytest.raises(DataError, match="nnUNet_n_proc_DA=2: little memory"):
        t.get_dataloaders()
    assert children() == before  # none was started
    wait = [waiting_batches(*size, pinned=device == "cuda") for size in ((2, 6), (1, 3))]
    assert asked == [ranks * (wait[0] * shared_bytes(train) + wait[1] * shared_bytes(val))]
    monkeypatch.setattr(loaders, "memory_shortage", lambda *_: None)
    monkeypatch.setattr(loaders, "file_shortage", lambda files: asked.append(files) or "few files")
    with pytest.raises(DataError, match="few files"):
        t.get_dataloaders()
    assert asked[1] == wait[0] * len(list(tensors_of(train))) + wait[1] * len(list(tensors_of(val)))


def test_loader_processes_leave_the_random_states_of_the_training_alone(trainer, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    t = trainer(named("nnUNetTrainerLabeledOnly"))
    t.initialize()
    before = global_states()
    for pool in t.get_dataloaders():
        pool._finish()
    assert same(before, global_states())


def test_a_negative_number_of_processes_is_refused(trainer, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "-1")
    with pytest.raises(ConfigError, match=r"nnUNet_n_proc_DA is -1.*type: export nnUNet_n_proc_DA=4"):
        trainer(named("nnUNetTrainerMeanTeacher")).on_train_start()


@pytest.mark.parametrize("processes", [1, 2, 7, 12, 40])
def test_pools_have_the_sizes_of_nnunets(trainer, monkeypatch, processes: int) -> None:
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock

    made = []

    class Pool:
        def __init__(self, data_loader, transform, num_processes, num_cached, **_) -> None:
            made.append((num_processes, num_cached))

        def __next__(self) -> None: ...

    monkeypatch.setattr(stock, "NonDetMultiThreadedAugmenter", Pool)
    monkeypatch.setattr(stock, "get_allowed_n_proc_DA", lambda: processes)
    t = trainer("nnUNetTrainer")
    t.initialize()
    t.get_dataloaders()
    assert tuple(made) == pool_sizes(processes)


def test_a_case_that_goes_in_mid_training_is_named_by_the_processes_too(trainer, tiny, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny / "nnUNet_preprocessed", tmp_path / "nnUNet_preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "nnUNet_preprocessed"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    t = begin(trainer(named("nnUNetTrainerMeanTeacher")))
    folder = Path(t.preprocessed_dataset_folder)
    (folder / "l_01.b2nd").unlink()
    try:
        with pytest.raises(DataError, match=r"l_01: the prepared case cannot be read .*nnUNetv2_preprocess -d 901"):
            for _ in t.dataloader_train:
                pass
    finally:
        t.dataloader_train._finish()
        t.dataloader_val._finish()


KILLED = """
    import multiprocessing, os, sys, time, torch
    from batchgenerators.dataloading.data_loader import DataLoader
    from nnunetv2_dycon.data.processes import LoaderProcesses

    class Zeros(DataLoader):
        def __init__(self):
            super().__init__(None, 1, 1, None, True, False, True)
            self.transforms = None

        def generate_train_batch(self):
            return {"data": torch.zeros(1000)}

    if __name__ == "__main__":
        multiprocessing.set_start_method(sys.argv[1])
        pools = [LoaderProcesses(Zeros(), 2, 2, None, pin_memory=False) for _ in range(2)]
        for pool in pools:
            next(pool)
        time.sleep(1)  # the queues are full now
        if sys.argv[1] == "fork" and not (other := os.fork()):
            time.sleep(600)  # holds the processes' pipes to the training, as any process that it starts may
        print(other if sys.argv[1] == "fork" else 0)
        print(*(process.pid for pool in pools for process in pool._processes), flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_loader_processes_end_when_their_training_is_killed(tmp_path: Path, method: str) -> None:
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), method]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as training:
        other = int(training.stdout.readline())
        processes = {int(word) for word in training.stdout.readline().split()}
        assert len(running(processes)) == 4
        training.kill()
    left = left_after(processes, 10)
    if other:
        os.kill(other, signal.SIGKILL)
    assert not left


FAILED = """
    import atexit, time
    atexit.register(time.sleep, 0.5)  # runs last: the pools' threads have time to see that their processes are gone
    import torch
    from batchgenerators.dataloading.data_loader import DataLoader
    from nnunetv2_dycon.data.processes import LoaderProcesses

    class Zeros(DataLoader):
        def __init__(self):
            super().__init__(None, 1, 1, None, True, False, True)
            self.transforms = None

        def generate_train_batch(self):
            return {"data": torch.zeros(1000)}

    if __name__ == "__main__":
        pools = [LoaderProcesses(Zeros(), 2, 2, None, pin_memory=False) for _ in range(2)]
        for pool in pools:
            next(pool)
        raise ValueError("why the training ends")
"""


def test_the_error_that_ends_a_training_is_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(FAILED))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "ValueError: why the training ends"


FULL = """
    import torch
    from batchgenerators.dataloading.data_loader import DataLoader
    from nnunetv2_dycon.data.processes import LoaderProcesses

    class Zeros(DataLoader):
        def __init__(self):
            super().__init__(None, 1, 1, None, True, False, True)
            self.transforms = None

        def generate_train_batch(self):
            return {"data": torch.zeros(100_000)}

    if __name__ == "__main__":
        pool = LoaderProcesses(Zeros(), 2, 4, None, pin_memory=False)
        kept = [batch for batch in pool]
"""


@pytest.mark.slow
def test_a_full_shared_memory_ends_a_training_with_one_line(tmp_path: Path) -> None:
    words = with_shared_memory("2m")
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(FULL))
    done = subprocess.run(
        [*words, sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 1
    assert re.search(r"DataError: no shared memory for a batch of 392 kB, \d+ kB are free in /dev/shm", done.stderr)
    assert done.stderr.strip().splitlines()[-1].endswith(REMEDY)
    assert done.stderr.count("No space left") == 1


def test_processes_follow_until_the_outermost_block_ends() -> None:
    assert TRAINING not in os.environ
    with ending_with_this_process():
        with pytest.raises(KeyError, match="inside"), ending_with_this_process():
            raise KeyError("inside")
        assert os.environ[TRAINING] == str(os.getpid())
    assert TRAINING not in os.environ
