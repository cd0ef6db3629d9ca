"""A copy of the tiny data set for each test."""

import pytest

from tests.rounds import copy_data


@pytest.fixture
def root(tiny_data, tmp_path, monkeypatch):
    """Folder with a copy of the tiny data set, planned and preprocessed, for tests that add data sets to it."""
    copy_data(tiny_data, tmp_path, monkeypatch)
    return tmp_path
