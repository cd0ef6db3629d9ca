"""Checkpoint files: what is asked for is there, or one line says what is missing."""

from pathlib import Path

import pytest
import torch

from nnunetv2_dycon.checkpoint import read_checkpoint, write_checkpoint
from nnunetv2_dycon.errors import DataError


def test_a_checkpoint_has_the_keys_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"network_weights": {"w": torch.ones(2)}, "epoch": 3}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert read_checkpoint(path, "network_weights", "epoch")["epoch"] == 3
    with pytest.raises(DataError, match=r"checkpoint\.pth cannot be read as a checkpoint \(it has no trainer_name\)"):
        read_checkpoint(path, "epoch", "trainer_name")


def test_a_file_without_keys_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(3, path)
    with pytest.raises(DataError, match="cannot be read as a checkpoint"):
        read_checkpoint(path, "epoch")
