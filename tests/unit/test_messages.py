"""Commands of nnU-Net as a new user mistypes them: the line that answers, and what it says to type."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nnunetv2.run.run_training as stock
import pytest
import torch

from nnunetv2_dycon.trainers import engine, messages
from nnunetv2_dycon.trainers.messages import explain
from tests.training import run_epochs

TRAINER = "nnUNetTrainerMeanTeacher_epochs2_iters1_valiters1_save1_seed70"
LATEST, BEST, FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"
Typed = Callable[..., str | None]


@pytest.fixture
def typed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Type a training; returns the line in which it ends, or None if it trains or validates."""
    monkeypatch.setattr(stock.torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(engine.nnUNetTrainerSSL, "perform_actual_validation", lambda *_: None)
    train = engine.nnUNetTrainerSSL.run_training

    def training(self: engine.nnUNetTrainerSSL) -> None:
        train(self)
        os.makedirs(os.path.join(self.output_folder, "validation"), exist_ok=True)
        Path(self.output_folder, "validation", "summary.json").write_text("{}")

    monkeypatch.setattr(engine.nnUNetTrainerSSL, "run_training", training)

    def type_it(*words: str, device: str = "cpu") -> str | None:
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", *words, *(("-device", device) if device else ())])
        try:
            stock.run_training_entry()
        except Exception as error:
            return explain(error) or repr(error)
        return None

    return type_it


def fold_folder(trainer: str = TRAINER) -> Path:
    return Path(os.environ["nnUNet_results"], "Dataset901_Tiny", f"{trainer}__nnUNetPlans__3d_fullres", "fold_0")


GOOD = {"dataset": "901", "configuration": "3d_fullres", "fold": "0", "-tr": TRAINER}


def words(**changed: str) -> list[str]:
    given = {**GOOD, **changed}
    plain = [given.pop(name) for name in ("dataset", "configuration", "fold")]
    return [*plain, *(word for pair in given.items() for word in pair)]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"dataset": "999"}, "there is no data set 999; there are Dataset901_Tiny in nnUNet_raw="),
        ({"dataset": "Dataset901_Tyni"}, "there is no data set Dataset901_Tyni; there are Dataset901_Tiny in"),
        ({"dataset": "Tiny"}, "must either be an integer or a valid dataset name"),
        ({"configuration": "3d_fulres"}, "3d_fulres not found in plans. Available configurations: .*'3d_fullres'"),
        ({"configuration": "2d"}, "type: nnUNetv2_preprocess -d 901 -c 2d$"),
        ({"-p": "nnUNetPlanz"}, "nnUNetPlanz.json does not exist; the plans there are nnUNetPlans: give -p one of"),
        ({"-tr": TRAINER.replace("Mean", "Maen")}, f"there is no trainer .*: type -tr {TRAINER}$"),
        ({"-tr": TRAINER.replace("Mean", "mean")}, f"there is no trainer .*: type {TRAINER}$"),
        ({"-tr": TRAINER.replace("epochs2", "epoch2")}, "unknown option 'epoch2' .* the nearest is epochs"),
        ({"-pretrained_weights": "none.pth"}, "none.pth cannot .*No such file.*; give -pre.* another file$"),
        ({"-pretrained_weights": __file__}, "not a file of torch.*; give -pretrained_weights another file$"),
    ],
)
def test_a_mistyped_word_is_answered_with_what_there_is(typed: Typed, mistake: dict[str, str], said: str) -> None:
    line = typed(*words(**mistake))
    assert re.search(said, line), line
    assert "\n" not in line
    right = re.search(r"type (?:-tr )?(nnUNetTrainer\S+)$", line)
    if right:
        assert right[1] == TRAINER
    assert not fold_folder().exists() or "-pretrained_weights" in mistake


def test_a_data_set_that_was_not_planned_is_answered_with_the_command_that_plans_it(typed: Typed, tiny: Path) -> None:
    raw = tiny / "nnUNet_raw" / "Dataset902_Raw"
    raw.mkdir()
    try:
        assert typed(*words(dataset="902")).endswith("json does not exist; type: nnUNetv2_plan_and_preprocess -d 902")
    finally:
        raw.rmdir()


def test_weights_of_another_network_are_named_without_their_numbers(typed: Typed, trainer, tmp_path: Path) -> None:
    t = trainer(TRAINER)
    t.initialize()
    weights = t.network.state_dict()
    for change, key in ((lambda w: w[:1], "encoder.stages.0.0.convs.0.conv.weight"), (lambda w: None, "")):
        changed = {name: change(weight) for name, weight in weights.items()}
        if not key:
            changed = {}
        torch.save({"network_weights": changed}, tmp_path / "weights.pth")
        line = typed(*words(**{"-pretrained_weights": str(tmp_path / "weights.pth")}))
        assert line.startswith(f"the network in {tmp_path / 'weights.pth'} is not the one that is trained (encoder.")
        assert len(line) < 300
        assert key in line
    torch.save(weights, tmp_path / "weights.pth")
    line = typed(*words(**{"-pretrained_weights": str(tmp_path / "weights.pth")}))
    assert "(it has no network_weights); give -pretrained_weights another file" in line


@contextmanager
def changed(path: Path, content: str | None) -> Iterator[None]:
    """A file with another content, or none, for a while: the data set is that of all tests."""
    before = path.read_bytes()
    path.unlink() if content is None else path.write_text(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def without(path: Path, *keys: str) -> str:
    """The JSON of a file that lacks an entry."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return json.dumps(content)


PLAN = "type: nnUNetv2_plan_experiment -d 901$"
COPY = r"type: cp \S+/nnUNet_raw/Dataset901_Tiny/dataset.json \S+/nnUNet_preprocessed/Dataset901_Tiny/dataset.json$"
EXTRACT = "type: nnUNetv2_extract_fingerprint -d 901 --clean$"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nnUNetPlans.json", '{"plans_name": "nnU', rf"nnUNetPlans.json cannot be read \(not JSON: .*; {PLAN}"),
        ("nnUNetPlans.json", "", rf"nnUNetPlans.json cannot be read \(not JSON: .*; {PLAN}"),
        ("nnUNetPlans.json", "[]", rf"nnUNetPlans.json is not a JSON object; {PLAN}"),
        ("nnUNetPlans.json", "{}", r"None.json cannot be used \(KeyError: .*restore it, or plan again"),
        ("dataset.json", None, f"dataset.json does not exist; {COPY}"),
        ("dataset.json", "{", rf"dataset.json cannot be read \(not JSON: .*; {COPY}"),
        ("dataset.json", "[]", "dataset.json must be {...} with labels, channel_names and file_ending; mend it"),
        ("dataset.json", "{}", 'dataset.json has no "labels"; add '),
        ("dataset_fingerprint.json", None, rf"fingerprint.json cannot be read \(No such file.*\); {EXTRACT}"),
        ("dataset_fingerprint.json", '{"spacings": [', rf"fingerprint.json cannot be read \(not JSON: .*; {EXTRACT}"),
    ],
)
def test_a_file_of_the_planning_that_is_missing_or_broken_is_named_with_the_command_that_restores_it(
    typed: Typed, tiny: Path, name: str, content: str | None, said: str
) -> None:
    path = tiny / "nnUNet_preprocessed" / "Dataset901_Tiny" / name
    with changed(path, content):
        line = typed(*words())
    assert re.search(said, line), line
    assert "\n" not in line
    assert not list(Path(os.environ["nnUNet_results"]).rglob("*.pth"))


@pytest.mark.parametrize(
    "keys",
    [
        ("transpose_forward",),
        ("image_reader_writer",),
        ("configurations",),
        ("configurations", "3d_fullres", "batch_size"),
        ("configurations", "3d_fullres", "architecture", "arch_kwargs"),
        ("configurations", "3d_fullres", "resampling_fn_probabilities"),
    ],
)
def test_plans_that_lack_an_entry_are_named_before_anything_is_written(
    typed: Typed, tiny: Path, keys: tuple[str, ...]
) -> None:
    path = tiny / "nnUNet_preprocessed" / "Dataset901_Tiny" / "nnUNetPlans.json"
    with changed(path, without(path, *keys)):
        line = typed(*words())
    assert re.search(rf"^{path} cannot be used \(KeyError: '{keys[-1]}'\); {PLAN}", line), line
    assert not any(Path(os.environ["nnUNet_results"]).iterdir())


def test_a_data_set_without_its_raw_one_is_told_to_restore_dataset_json(typed: Typed, tiny: Path, monkeypatch) -> None:
    monkeypatch.delenv("nnUNet_raw")
    path = tiny / "nnUNet_preprocessed" / "Dataset901_Tiny" / "dataset.json"
    with changed(path, None):
        assert typed(*words(dataset="Dataset901_Tiny")) == f"{path} does not exist; restore it"


def contents(folder: Path) -> dict[str, bytes]:
    skip = ("training_log", ".training.lock")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[:12] not in skip}


def test_what_was_trained_is_never_started_over_unasked(typed: Typed, trainer, capsys) -> None:
    """A stopped and a finished training, typed again; each line is then followed to the letter."""
    typed_again = words()
    t = trainer(TRAINER)
    t.on_train_start()
    run_epochs(t, 1)
    del t
    folder = fold_folder()
    before = contents(folder)
    line = typed(*typed_again)
    said = (
        "a stopped training is there, which this one would overwrite: add --c to continue it; or, to train anew, first"
    )
    assert line.startswith(f"{said} type: mv {folder} ")
    weights = ["-pretrained_weights", str(folder / BEST)]
    assert typed(*typed_again, *weights) == typed(*typed_again, "--disable_checkpointing") == line
    assert contents(folder) == before

    said = typed(*typed_again, "--val")
    assert said == "--val is for a finished training, and this one is not; type the same command with --c in its place"
    assert typed(*typed_again, "--c") is None
    finished = contents(folder)
    assert set(finished) >= {FINAL, BEST}
    line = typed(*typed_again)
    said = "a finished training is there, which this one would overwrite: add --val to validate it again; or, to"
    assert line.startswith(f"{said} train anew, first type: mv {folder} ")
    assert contents(folder) == finished
    assert typed(*typed_again, "--val") is None
    assert typed(*typed_again, "--c") is None

    for number, aside in enumerate(("old_fold_0", "old2_fold_0")):
        command = line.partition("first type: ")[2]
        subprocess.run(command, shell=True, check=True)
        assert FINAL in contents(folder.with_name(aside))
        assert typed(*typed_again) is None
        assert FINAL in contents(folder)
        line = typed(*typed_again)
        assert number or "old2_fold_0" in line
    capsys.readouterr()


def test_results_of_a_training_without_checkpoints_are_kept_too(typed: Typed) -> None:
    assert typed(*words(), "--disable_checkpointing") is None
    assert not list(fold_folder().glob("*.pth"))
    line = typed(*words(), "--disable_checkpointing")
    assert line.startswith(
        "a finished training is there, which this one would overwrite: to train anew, first type: mv "
    )
    assert typed(*words(), "--c") == line


def test_a_training_to_continue_that_is_there_in_another_order_is_named(typed: Typed, trainer, capsys) -> None:
    assert typed(*words(), "--c") is None  # nothing there: as nnU-Net, a new training
    assert "has no checkpoint to continue from: a new training begins" in capsys.readouterr().out
    name, *options = TRAINER.split("_")
    other = "_".join([name, *reversed(options)])
    line = typed(*words(**{"-tr": other}), "--c")
    assert (
        line == f"{fold_folder(other)} has no checkpoint to continue from; the same training is there as -tr {TRAINER}"
    )
    assert typed(*words(**{"-tr": f"{other}_lr0p02"}), "--c") is None
    former = fold_folder(f"{name}_former1")  # a name that today has no meaning
    shutil.copytree(fold_folder(), former)
    shutil.rmtree(fold_folder())
    shutil.rmtree(fold_folder(f"{other}_lr0p02"))
    assert typed(*words(**{"-tr": other}), "--c") is None


def test_a_command_for_a_gpu_that_is_not_there_says_what_to_add(typed: Typed, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(stock.torch, "set_num_interop_threads", lambda number: None)
    line = typed(*words(), device="")
    assert line == f"torch {torch.__version__} finds no CUDA device here; add to the command: -device cpu"


def test_a_full_disk_under_files_of_nnunet_is_one_line_with_its_free_space(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "progress.png"))
    line = explain(error)
    assert line.startswith(f"cannot write {tmp_path}/progress.png: No space left on device (")
    assert line.endswith(" MB are free); make room, then type the same command with --c")


@pytest.mark.parametrize("error", [ValueError("any"), KeyError("any"), FileNotFoundError(2, "No such file", "/a/b")])
def test_an_error_that_nobody_foresaw_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None


PROGRAM = """
import atexit, sys, threading
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.trainers.messages import end_in_one_line
sys.excepthook = lambda kind, error, traceback: print("before:", error)
print("what a training printed")
before = sys.excepthook
end_in_one_line()
end_in_one_line()
assert sys.excepthook.args == (before,)
try:
    raise KeyError("unforeseen")
except KeyError:
    sys.excepthook(*sys.exc_info())
ends = threading.Event()
def loader():
    ends.wait()
    raise RuntimeError("workers are gone")
thread = threading.Thread(target=loader, daemon=True)
thread.start()
atexit.register(lambda: (ends.set(), thread.join()))
raise {error}
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("DataError('mend it')", "error: mend it"),
        ("KeyboardInterrupt", "stopped by Ctrl-C; to go on, type the same command with --c"),
    ],
)
def test_a_program_ends_in_the_line_alone_below_all_that_it_printed(error: str, line: str) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{error}", error)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=buffered,
    )
    assert done.stdout == f"what a training printed\nbefore: 'unforeseen'\n{line}\n"
    assert done.returncode  # after Ctrl-C 1 with stock nnU-Net too: its imports make it that


def test_nnunets_search_for_trainers_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_dycon import _register

    monkeypatch.setenv(_register.VARIABLE, _register.FOLDER)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    recursive_find_trainer_class_by_name(TRAINER)
    assert sys.excepthook.func is messages._show
