"""Where nothing more can be written, a command ends with one line, and nothing is half-written or lost."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nnunetv2_dycon import commands
from nnunetv2_dycon.evaluation import predict as predicting
from nnunetv2_dycon.evaluation.runs import Place, find_runs
from tests.madeup_runs import DATASET, make_dataset, make_predictions, make_training

resource = pytest.importorskip("resource")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_dataset(tmp_path, monkeypatch)
    for name, shift in (("a", 0), ("b", 1)):
        make_predictions(tmp_path / name, shift)
    return tmp_path


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Let the system refuse every file above a size; to a writer this is what a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(capsys: pytest.CaptureFixture, arguments: list) -> str:
    """Return the one line of a command that could not write."""
    capsys.readouterr()
    assert commands.main([str(word) for word in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "Traceback" in line] == []
    assert lines[-1].startswith("error: cannot write ")
    return lines[-1]


def evaluate(root: Path, *options: object) -> list:
    truth, dataset = (root / "nnUNet_raw" / DATASET / name for name in ("labelsTs", "dataset.json"))
    return ["evaluate", truth, root / "a", "-djfile", dataset, "-np", "1", *options]


def compare(root: Path, *options: object) -> list:
    return ["compare", "-d", "501", "-o", root / "report", "-np", "1", "--runs", root / "a", root / "b", *options]


@pytest.mark.parametrize("size", [0, 1500, 3000])
@pytest.mark.parametrize("again", [False, True], ids=["new", "replaced"])
def test_scores_are_all_written_or_none(root, capsys, size, again) -> None:
    if again:
        assert commands.main([str(word) for word in evaluate(root)]) == 0
        for name in ("scores.csv", "scores.json", "summary.json"):
            (root / "a" / name).write_text(f"old {name}")
    before = content(root)
    with at_most(size):
        text = refused(capsys, evaluate(root))
    assert f"cannot write {root / 'a'}/s" in text
    assert content(root) == before


@pytest.mark.parametrize("size", [0, 60_000])
def test_a_report_is_whole_or_absent(root, capsys, size) -> None:
    before = content(root)
    with at_most(size):
        text = refused(capsys, compare(root))
    assert "report" in text
    assert content(root) == before


def test_a_report_that_cannot_be_replaced_stays(root, capsys) -> None:
    (root / "report").mkdir()
    (root / "report/report.html").write_text("old")
    before = content(root)
    with at_most(3000):
        refused(capsys, compare(root, "--overwrite"))
    assert content(root) == before


@pytest.mark.parametrize("where", ["a file", "below a file", "read-only"])
@pytest.mark.parametrize("verb", [evaluate, compare])
def test_a_place_that_cannot_be_written_is_said_before_the_work(root, capsys, monkeypatch, verb, where) -> None:
    monkeypatch.setattr("nnunetv2_dycon.evaluation.scores.read_label_map", lambda *_, **__: pytest.fail("read"))
    (root / "file").touch()
    output = root / ("file" if where == "a file" and verb is evaluate else "file/x")
    if where == "read-only":
        output = root / "new" / "x"
        made = Path.mkdir

        def refuse(path: Path, *arguments: object, **options: object) -> None:  # root may write everywhere
            if path in (output, output.parent):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            made(path, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", refuse)
    before = content(root)
    text = refused(capsys, [*verb(root), "-o", output])
    below = "Not a directory" if verb is evaluate else "it is a file"  # a report needs the folder above it
    assert {"a file": "it is a file", "below a file": below, "read-only": "Permission denied"}[where] in text
    assert content(root) == before


def test_a_folder_in_the_place_of_a_table_is_named_and_nothing_is_replaced(root, capsys) -> None:
    (root / "a/scores.csv").mkdir()
    (root / "a/summary.json").write_text("old")
    before = content(root)
    assert "scores.csv in it is a folder" in refused(capsys, evaluate(root))
    assert content(root) == before


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_a_prediction_that_finds_no_room_is_named_by_its_folder(root, capsys, monkeypatch, weights) -> None:
    folder = make_training(root, "nnUNetTrainerDyCON_seed0")
    (run,) = find_runs("nnUNetTrainerDyCON_seed0", Place(DATASET), (weights,), True)
    full = (
        "import os; os.makedirs(sys.argv[sys.argv.index('-o') + 1], exist_ok=True); raise OSError(28, os.strerror(28))"
    )
    monkeypatch.setattr(predicting, "_PREDICT" if weights == "student" else "_EXPORT", full)
    arguments = [*compare(root)[:-2], root / "a", "nnUNetTrainerDyCON_seed0", "--predict", "--weights", weights]
    assert f"cannot write {run.predictions}: No space left" in refused(capsys, [*arguments, "-device", "cpu"])
    assert not list((folder / "test").iterdir())
    shutil.rmtree(folder / "test")
    (folder / "test").touch()
    assert str(folder / "test") in refused(capsys, [*arguments, "-device", "cpu"])
