"""Folders for tests of the converters, and a shelf of the collections that were made."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.converting import MADE
from tests.datasets import environment


@pytest.fixture(scope="module", autouse=True)
def _shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make each collection once per module."""
    MADE[""] = (tmp_path_factory.mktemp("collections"), {})
    yield
    MADE.clear()


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in environment(tmp_path / "nn unet ä").items():
        Path(folder).mkdir(parents=True)
        monkeypatch.setenv(name, folder)
    return tmp_path / "nn unet ä" / "nnUNet_raw"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "download of Zoë"  # a blank and a letter beyond ASCII
    folder.mkdir()
    return folder
