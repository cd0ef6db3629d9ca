"""A command that is killed at any moment and typed again leaves what it leaves otherwise, and nothing else."""

import hashlib
import shutil
from pathlib import Path

import pytest

from nnunetv2_dycon.conversion.protocols import PUBLISHED, read_protocol
from tests import collections, madeup_runs, prepared
from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits
from tests.killing import Command, Training, kill_and_type_again

pytestmark = pytest.mark.slow


def tree(root: Path) -> dict[str, str]:
    """Hash of every file below a folder, hidden ones too; None for a folder."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """Where the files are made that a command begins with, with the three folders."""
    for folder in environment(tmp_path / "template").values():
        Path(folder).mkdir(parents=True)
    return tmp_path / "template"


def test_a_preparation(template: Path, tmp_path: Path) -> None:
    make_dataset(template, unlabeled=6)
    plan_and_preprocess(root=template)
    words = ("preprocess_unlabeled", "-d", "901", "-np", "2")
    command = Command(template, tmp_path / "data", words, "nnUNet_preprocessed/*/.*_unlabeled.lock")

    def content(root: Path) -> tuple:
        return sorted(tree(root)), prepared.tree(prepared.Place(root))

    kill_and_type_again(command, content, seed=1)


def test_a_conversion(template: Path, tmp_path: Path) -> None:
    cases = read_protocol(PUBLISHED / "la_80_20.json", str)
    collections.la_h5(template / "LA", [*cases.train[:6], *cases.test[:2]], shape=(120, 110, 80))
    words = ("convert", "LA", "LA", "--labeled", "3", "-np", "2")
    kill_and_type_again(Command(template, tmp_path / "data", words, "nnUNet_raw/.*.converting"), tree, seed=2)


def test_a_split(template: Path, tmp_path: Path) -> None:
    make_dataset(template, labeled=60, unlabeled=60, shape=(8, 8, 8))
    words = ("split", "-d", "901", "--as", "902", "--labeled", "0.2", "--test", "0.2", "-np", "1")
    kill_and_type_again(Command(template, tmp_path / "data", words, "nnUNet_raw/.*.converting"), tree, seed=3)


def test_a_comparison_that_replaces_a_report(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in environment(template).values():
        Path(folder).rmdir()
    madeup_runs.make_dataset(template, monkeypatch)
    for name, shift in (("a", 0), ("b", 1)):
        madeup_runs.make_predictions(template / name, shift)
    (template / "report").mkdir()
    (template / "report" / "report.html").write_text("the previous one")
    words = ("compare", "-d", "501", "--runs", "a", "b", "-o", "report", "-np", "2", "--overwrite")
    kill_and_type_again(Command(template, tmp_path / "data", words, ".*.part.report"), tree, seed=4)


def test_a_comparison_that_predicts(template: Path, tmp_path: Path) -> None:
    names = make_dataset(template)
    write_splits(template, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=template)
    training = Training(template, "nnUNetTrainerDyCON_epochs1_iters1_valiters1_seed0")
    training.finish()
    shutil.copytree(template / "nnUNet_raw" / names.dataset / "labelsTs", template / "other")
    words = ("compare", "-d", "901", "--runs", "other", training.trainer, "--weights", "teacher", "-o", "report")
    words += ("--predict", "--disable_tta", "-np", "1", "-device", "cpu")
    command = Command(template, tmp_path / "data", words, "nnUNet_results/*/*/*/test/.*.part.*")

    def content(root: Path) -> dict[str, str]:
        noted = "predict_from_raw_data_args.json"  # has the hidden folder's name
        return {name: digest for name, digest in tree(root).items() if not name.endswith(noted)}

    kill_and_type_again(command, content, seed=5)
