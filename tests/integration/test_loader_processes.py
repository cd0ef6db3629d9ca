"""Trainings with loader processes: killed, without shared memory, with cases that go, with very many cases."""

import gc
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nnunetv2_dycon.data import unlabeled
from nnunetv2_dycon.data.manifest import unlabeled_folder
from nnunetv2_dycon.data.prepared_files import SUFFIXES, describe
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from scripts import benchmark_loader
from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits
from tests.processes import children_of, left_after, with_shared_memory
from tests.training import begin, make_trainer

pytestmark = pytest.mark.slow

TRAIN = str(Path(sys.executable).with_name("nnUNetv2_train"))
FAST = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "1"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loaders")
    names = make_dataset(root)
    write_splits(root, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=root)
    return root


@pytest.fixture
def data(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "data"))


@contextmanager
def training(root: Path, options: str, *before: str, flags: tuple[str, ...] = ()) -> Iterator[subprocess.Popen]:
    """A training by command that runs; what it says goes into `root/log`."""
    command = [*before, TRAIN, "901", "3d_fullres", "0", "-tr", f"nnUNetTrainerMeanTeacher_{options}", "-device", "cpu"]
    with open(root / "log", "w") as log:
        started = subprocess.Popen(
            [*command, *flags], stdout=log, stderr=log, env={**os.environ, **environment(root), **FAST}
        )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def wait_for(text: str, root: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while text not in (root / "log").read_text():
        assert process.poll() is None, (root / "log").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def last_line(root: Path) -> str:
    """The line in which a training ended that could not go on."""
    line = (root / "log").read_text().strip().splitlines()[-1]
    assert line.startswith("error: "), line
    return line


def test_a_killed_training_leaves_no_loader_process_and_goes_on(data: Path) -> None:
    options = "epochs3_iters30_valiters1_save1"
    with training(data, options) as killed:
        wait_for("Epoch 1", data, killed)
        loaders = children_of(killed.pid)
    assert len(loaders) == 3  # two for training, one for validation
    assert not left_after(loaders, 10)
    with training(data, options, flags=("--c",)) as again:
        assert again.wait(200) == 0
    assert "Epoch 0" not in (data / "log").read_text()
    assert "Epoch 2" in (data / "log").read_text()


def test_a_training_without_enough_shared_memory_does_not_begin(data: Path) -> None:
    with training(data, "epochs1_iters2_valiters1", *with_shared_memory("1m")) as refused:
        assert refused.wait(100) == 1
    assert re.search(r"error: nnUNet_n_proc_DA=2: \d+ [kM]B of shared memory are free in /dev/shm, ", last_line(data))
    assert "docker run --shm-size=8g" in last_line(data)
    assert "nnUNet_n_proc_DA=0 in front of nnUNetv2_train" in last_line(data)
    assert "Epoch 0" not in (data / "log").read_text()


def test_a_training_that_just_fits_runs_to_its_end(data: Path) -> None:
    """What is asked for is what is used, and not much more."""
    with training(data, "epochs1_iters60_valiters20", *with_shared_memory("2m")) as runs:
        assert runs.wait(200) == 0


@pytest.mark.parametrize("name", ["l_01_seg.b2nd", "u_01.b2nd"])
def test_a_case_that_goes_in_mid_training_is_the_last_line(data: Path, name: str) -> None:
    (folder,) = (data / "nnUNet_preprocessed").glob("Dataset901*")
    with training(data, "epochs9_iters30_valiters1") as stops:
        wait_for("Epoch 1", data, stops)
        loaders = children_of(stops.pid)
        (path,) = folder.glob(f"nnUNetPlans_3d_fullres*/{name}")
        path.unlink()
        assert stops.wait(100) == 1
    mend = {
        "l": "type: nnUNetv2_preprocess -d 901 -c 3d_fullres (",
        "u": "type: nnUNetv2_dycon preprocess_unlabeled -d 901 -c 3d_fullres --again u_01 (",
    }
    assert f"/{name[:4]}: the prepared case cannot be read (" in last_line(data)
    assert mend[name[0]] in last_line(data)
    assert not left_after(loaders, 10)


def test_one_loader_costs_no_more_than_two_of_stock(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(data).items():
        monkeypatch.setenv(name, value)
    t = begin(make_trainer("nnUNetTrainerMeanTeacher_epochs1_iters1"))
    times = benchmark_loader.measure(t.dataloader_train.data_loader, 100)
    assert statistics.median(mixed / (labeled + unlabeled) for labeled, unlabeled, mixed in times) <= 1.05


def make_many(root: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a data set whose unlabelled cases are one file under many names, prepared."""
    names = make_dataset(root, unlabeled=1)
    write_splits(root, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    folder = plan_and_preprocess(root=root)
    images = root / "nnUNet_raw" / names.dataset / "imagesUn"
    for index in range(1, number):
        os.link(images / "u_00_0000.nii.gz", images / f"u_{index:05d}_0000.nii.gz")
    for name, value in environment(root).items():
        monkeypatch.setenv(name, value)
    prepared, _ = unlabeled_folder(folder, "nnUNetPlans_3d_fullres")
    original = unlabeled.prepare_case

    def prepare(task):
        if task.case == "u_00":
            return original(task)
        for suffix in SUFFIXES:
            os.link(prepared / f"u_00{suffix}", prepared / f"{task.case}{suffix}")
        return describe(prepared, task.case)

    with monkeypatch.context() as patch:
        patch.setattr(unlabeled, "prepare_case", prepare)
        preprocess_unlabeled(901, processes=1)


def test_ten_thousand_unlabelled_cases_cost_two_seconds_and_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    seconds, memory = [], []
    gc.collect()
    gc.freeze()  # what earlier tests left is not searched for rubbish again
    for number in (10, 10_000):
        make_many(tmp_path / str(number), number, monkeypatch)
        start = time.process_time()
        preprocess_unlabeled(901, processes=1)
        assert time.process_time() - start < 2  # nothing to do; with all imports at most 5
        took = []
        for repeat in range(4):  # the first one imports; the fastest counts, for the others may have had to wait
            t = make_trainer(f"nnUNetTrainerMeanTeacher_epochs1_iters1_seed{repeat}")
            start = time.process_time()
            begin(t)
            t.train_step(next(t.dataloader_train))
            took.append(time.process_time() - start)
            loaders = [process.pid for process in t.dataloader_train._processes]
            own = max(unique_megabytes(process) for process in loaders)
            t.dataloader_train._finish()
            t.dataloader_val._finish()
        seconds.append(min(took))
        memory.append(own)
    assert seconds[1] - seconds[0] < 2
    assert memory[1] - memory[0] < 20
    gc.unfreeze()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 1024**2  # kB


def unique_megabytes(process: int) -> float:
    """Memory of a process that it shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
