"""Small machines, no accelerator: one thread, no loader processes; and one tiny data set for all trainer tests."""

import os

for variable, value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "nnUNet_n_proc_DA": "0",
    "nnUNet_def_n_proc": "1",
    "nnUNet_compile": "f",
}.items():
    os.environ[variable] = value  # before torch and nnunetv2 are imported anywhere

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits
from tests.training import make_trainer

settings.register_profile("busy", deadline=None, derandomize=True)  # time limits flake where others compute too
settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _files_are_read_as_before() -> Iterator[None]:
    """A trainer that was initialised and never trained leaves torch's reading restricted in this process."""
    yield
    resume = sys.modules.get("nnunetv2_dycon.trainers.resume")
    if resume:
        resume.end_guard()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a planned and preprocessed data set: fold 0 trains on three cases, validates on one."""
    root = tmp_path_factory.mktemp("tiny")
    names = make_dataset(root)
    write_splits(root, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=root)
    return root


@pytest.fixture
def tiny(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny data set with nnU-Net's folders set and results of its own."""
    for name, folder in environment(tiny_data).items():
        monkeypatch.setenv(name, folder)
    results = tmp_path / "nnUNet_results"
    results.mkdir()
    monkeypatch.setenv("nnUNet_results", str(results))
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *_: None)  # seconds an epoch, and stock's own
    return tiny_data


@pytest.fixture
def trainer(tiny: Path) -> Callable[..., Any]:
    """Make a trainer of the tiny data set by name."""
    return make_trainer
