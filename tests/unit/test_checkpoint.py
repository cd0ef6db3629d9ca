"""Checkpoint files: what is asked for is there, or one line says what is missing."""

import os
import pickle
import random
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_dycon.checkpoint import TRUST, read_checkpoint, reading_without_code, write_checkpoint
from nnunetv2_dycon.errors import DamagedError, DataError, WriteError
from tests.training import same


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


class Touch:
    """Unpickling it makes a file: code that a checkpoint brings."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "plain pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path, ran = tmp_path / "checkpoint.pth", tmp_path / "ran"
    content = {"epoch": 1, "x": Touch(ran)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    for value in (None, "", "0"):
        monkeypatch.delenv(TRUST, raising=False)
        if value is not None:
            monkeypatch.setenv(TRUST, value)
        with pytest.raises(
            DataError, match=rf"checkpoint\.pth was not opened: to read its .*export {TRUST}=1$"
        ) as caught:
            read_checkpoint(path, "epoch")
        assert "\n" not in str(caught.value)
        assert not ran.exists()
    assert ("posix.mkdir" in str(caught.value)) == (kind == "zip")


def test_a_user_may_trust_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    torch.save({"epoch": 1, "x": tmp_path}, tmp_path / "checkpoint.pth")
    monkeypatch.setenv(TRUST, "1")
    assert read_checkpoint(tmp_path / "checkpoint.pth", "epoch")["x"] == tmp_path
    assert f"unpickled in full, because {TRUST} is 1" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"\(it is empty\)"),
        (b"version https://git-lfs.github.com/spec/v1", r"\(it is not a file of torch\)"),
        (None, r"\(PytorchStreamReader failed reading zip archive: failed finding central directory\)"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_a_whole_reason(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=rf"cannot be read as a checkpoint {reason}; restore it"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "mend"),
    [("latest", "train again with --c"), ("final", "train again with --c"), ("best", "take another checkpoint")],
)
def test_a_damaged_checkpoint_says_what_replaces_it(tmp_path: Path, name: str, mend: str) -> None:
    """A finished training that continues writes its final checkpoint again, and not its best one."""
    path = tmp_path / f"checkpoint_{name}.pth"
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match=rf"\(it is empty\); restore it, or {mend}$"):
        read_checkpoint(path)
    with pytest.raises(DamagedError, match=r"\(it is empty\); give another$"):
        read_checkpoint(path, mend="give another")


def test_a_flipped_byte_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """torch itself reads a flipped weight without a word."""
    path, draw = tmp_path / "checkpoint.pth", random.Random(0)
    content = {"epoch": 3, "log": [np.float64(1.5)], "weights": {"w": torch.arange(50.0), "b": torch.ones(3)}}
    write_checkpoint(content, path)
    whole = path.read_bytes()
    weight = whole.index(np.float32(7).tobytes())
    refused = {}
    for place in {weight, *draw.sample(range(len(whole)), 600)}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(read_checkpoint(path), content), place
        except DamagedError as error:
            refused[place] = str(error)
    assert "/data/0 is damaged)" in refused[weight]
    assert len(refused) > 100
    assert not [text for text in refused.values() if "\n" in text or "()" in text]


def test_a_checkpoint_that_is_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    """torch calls some lengths of less than 70 kB an invalid argument of the system."""
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"w": torch.arange(50_000.0)}, path)
    whole = path.read_bytes()
    for length in (1, 100, *range(4000, len(whole), 8000), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"cannot be read as a checkpoint \((?!\[Errno)[^)]+\)"):
            read_checkpoint(path)


def test_a_part_that_is_marked_as_a_folder_is_damaged(tmp_path: Path) -> None:
    """torch leaves the memory of such a tensor as it was before."""
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"w": torch.arange(50.0)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = [(part, archive.read(part)) for part in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts:
            part.external_attr |= 0x10 * part.filename.endswith("/data/0")
            archive.writestr(part, content)
    with pytest.raises(DataError, match=r"/data/0 is damaged\)"):
        read_checkpoint(path)


def test_a_checkpoint_written_with_numpy_1_is_read(tmp_path: Path) -> None:
    """It has other names for numpy's functions; most published models are so old."""
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    content = {"logging": {"losses": [np.float64(1.5), np.float32(2)], "dice": np.arange(3.0)}, "w": torch.ones(2)}
    torch.save(content, new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for part in source.infolist():
            target.writestr(part, source.read(part).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert old.read_bytes() != new.read_bytes()
    assert same(read_checkpoint(old), content)


@pytest.mark.parametrize("before", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_nobody_in_the_process_runs_code_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str]
) -> None:
    harmless, path, ran = tmp_path / "harmless.pth", tmp_path / "checkpoint.pth", tmp_path / "ran"
    torch.save({"log": [np.float64(1.5)]}, harmless)
    torch.save({"x": Touch(ran)}, path)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    variables = dict(os.environ)
    with reading_without_code():
        assert torch.load(harmless, weights_only=False) == {"log": [1.5]}
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=False)
    assert not ran.exists()
    assert dict(os.environ) == variables
    monkeypatch.setenv(TRUST, "1")
    with reading_without_code():
        torch.load(path, weights_only=False)
    assert ran.exists()


def test_a_full_disk_is_one_line_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(
            WriteError, match=r"^cannot write .*checkpoint\.pth: File too large \([0-9.]+ MB are free\); make room"
        ) as caught:
            write_checkpoint({"epoch": 2, "w": torch.ones(10**6)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
