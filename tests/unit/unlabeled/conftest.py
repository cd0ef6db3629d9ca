"""A copy of the tiny data set for each test, and the cases that it prepares."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_dycon.data import unlabeled
from tests.datasets import environment, make_dataset, plan_and_preprocess
from tests.prepared import ID, Place


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    make_dataset(root, dataset_id=ID)
    plan_and_preprocess(ID, root=root)
    return root


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return Place(tmp_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cases that are prepared, in order."""
    cases: list[str] = []
    original = unlabeled.prepare_case

    def record(task: Any) -> str | None:
        cases.append(task.case)
        return original(task)

    monkeypatch.setattr(unlabeled, "prepare_case", record)
    return cases
