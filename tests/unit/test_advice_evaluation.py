"""Messages of `evaluate` and `compare` print what a new user has to type, and it works when it is typed."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nnunetv2_dycon import commands
from nnunetv2_dycon.errors import DataError, WriteError
from nnunetv2_dycon.evaluation import predict as module
from nnunetv2_dycon.evaluation.runs import Place, find_runs
from tests.madeup_runs import DATASET, make_dataset, make_predictions, make_training

DYCON, CONTROL = "nnUNetTrainerDyCON_epochs4", "nnUNetTrainerLabeledOnly_epochs4"
RESULTS = f"nnUNet_results/{DATASET}"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_dataset(tmp_path, monkeypatch)
    monkeypatch.setattr("nnunetv2_dycon.command_lines.device_flag", lambda: ("-device", "cpu"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(*runs: str, options: str = "") -> list[str]:
    return ["compare", "-d", "501", "-o", "report", "-np", "1", *shlex.split(options), "--runs", *runs]


def said(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """Return the one line that a command ends with."""
    capsys.readouterr()
    assert commands.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def trained(root: Path, name: str, **options: object) -> Path:
    folder = make_training(root, name, **options)
    make_predictions(folder / "test" / "checkpoint_final_student", 1)
    return folder


def to_2d(root: Path) -> None:
    folder = trained(root, DYCON)
    folder.parent.rename(folder.parent.with_name(f"{DYCON}__nnUNetPlans__2d"))


def only_latest(root: Path) -> None:
    make_training(root, DYCON, checkpoint="checkpoint_latest.pth", done=2)


def never_begun(root: Path) -> None:
    (make_training(root, DYCON) / "checkpoint_final.pth").unlink()


def other_plans(root: Path) -> None:
    only_latest(root)
    folder = root / RESULTS / f"{DYCON}__nnUNetPlans__3d_fullres"
    folder.rename(folder.with_name(f"{DYCON}__nnUNetResEncUNetMPlans__3d_fullres"))


TRAIN = f"nnUNetv2_train 501 3d_fullres 0 -tr {DYCON} -device cpu"  # where there is no GPU
# What is there, what is typed, and how the message ends.
COMPARE: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "a training that goes on": (only_latest, compare(DYCON), f"; type: {TRAIN} --c"),
    "a training cut short": (lambda r: make_training(r, DYCON, done=3), compare(DYCON), f"; type: {TRAIN} --c"),
    "a training of other plans": (
        other_plans,
        compare(DYCON, options="-p nnUNetResEncUNetMPlans"),
        f"; type: {TRAIN.replace(' -device', ' -p nnUNetResEncUNetMPlans -device')} --c",
    ),
    "a training that never began": (never_begun, compare(DYCON), f"(it has no checkpoint); type: {TRAIN}"),
    "another fold": (lambda r: make_training(r, DYCON, fold=1), compare(DYCON), "; there is fold_1: type -f 1"),
    "a misspelt checkpoint": (
        lambda r: make_training(r, DYCON),
        compare(DYCON, options="-chk checkpoint_fnal.pth"),
        "has no checkpoint_fnal.pth, only checkpoint_final.pth; correct -chk",
    ),
    "a method that is not trained": (
        lambda r: make_training(r, "nnUNetTrainerCPS_epochs4"),
        compare("nnUNetTrainerBCP_epochs4"),
        "; there is nnUNetTrainerCPS_epochs4; train it: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerBCP_epochs4 "
        "-device cpu",
    ),
    "a method inside another": (
        lambda r: make_training(r, "nnUNetTrainerDyCONCPS_epochs4"),
        compare(DYCON),
        f"; there is nnUNetTrainerDyCONCPS_epochs4; train it: {TRAIN}",
    ),
    "a misspelt method": (
        lambda r: make_training(r, DYCON),
        compare("nnUNetTrainerDyCNO_epochs4"),
        f"; the nearest there is {DYCON}",
    ),
    "a misspelt option": (
        lambda r: [make_training(r, DYCON), make_training(r, CONTROL)],
        compare("nnUNetTrainerDyCON_epoch4"),
        f"; the nearest there is {DYCON}",
    ),
    "another configuration": (to_2d, compare(DYCON), f"; there is {DYCON}__nnUNetPlans__2d: type -c 2d"),
    "the name of a folder": (
        lambda r: make_training(r, DYCON),
        compare(f"{DYCON}__nnUNetPlans__3d_fullres"),
        f"; give the name of the trainer: --runs {DYCON}",
    ),
    "the name of a folder of another configuration": (
        to_2d,
        compare(f"{DYCON}__nnUNetPlans__2d"),
        f"; give the name of the trainer: --runs {DYCON} -c 2d",
    ),
    "nothing trained": (
        lambda _: None,
        compare(DYCON),
        f"; nothing is trained there with -p nnUNetPlans -c 3d_fullres; train it: {TRAIN}",
    ),
    "a pattern": (
        lambda r: make_training(r, DYCON),
        compare("nnUNetTrainerCPS*"),
        f"; there is {DYCON}; give one of its trainers, or a folder",
    ),
    "no predictions": (
        lambda r: [make_training(r, DYCON), trained(r, CONTROL)],
        compare(DYCON, CONTROL),
        f"; type --predict, or where they are: --runs {DYCON}=FOLDER",
    ),
    "no test cases": (
        lambda r: shutil.rmtree(r / "nnUNet_raw" / DATASET / "labelsTs"),
        compare(DYCON),
        "as data set ID: nnUNetv2_dycon split -d 501 --as ID --labeled all --test 0.2",
    ),
    "a baseline that is no run": (
        lambda r: [trained(r, DYCON), trained(r, CONTROL)],
        compare(DYCON, CONTROL, options="--baseline nnUNetTrainer"),
        f"--baseline nnUNetTrainer names none of the runs; give one of {DYCON}, {CONTROL}",
    ),
    "one run": (
        lambda r: trained(r, DYCON),
        compare(DYCON),
        "--runs names one method only (seeds of it, or one run); give at least two, or --upper",
    ),
    "an output that is a file": (
        lambda r: (r / "report").touch(),
        compare(DYCON),
        "report exists and is not a report; give -o another folder",
    ),
    "the folder of a training as predictions": (
        lambda r: [trained(r, DYCON), make_predictions(r / "a")],
        compare(f"{RESULTS}/{DYCON}__nnUNetPlans__3d_fullres/fold_0/test", "a"),
        "test/checkpoint_final_student does; give that folder",
    ),
}


@pytest.mark.parametrize(("there", "typed", "end"), COMPARE.values(), ids=COMPARE)
def test_compare_says_what_to_type(root, capsys, there, typed, end) -> None:
    there(root)
    text = said(capsys, typed)
    assert text.endswith(end)
    assert not re.search(r"\b(DATASET|TRAINER|CONFIGURATION)\b", text)
    assert not (root / "report").is_dir()


def test_the_training_command_is_one_that_nnunet_understands(root, capsys, monkeypatch) -> None:
    from nnunetv2.run import run_training

    only_latest(root)
    command = said(capsys, compare(DYCON)).split("type: ")[1]
    calls: list = []
    monkeypatch.setattr(run_training, "run_training", lambda *arguments, **_: calls.append(arguments))
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda _: None)
    run_training.run_training_entry()
    ((dataset, configuration, fold, trainer, plans, _, _, _, resume, *_),) = calls
    assert (dataset, configuration, fold, trainer, plans) == ("501", "3d_fullres", "0", DYCON, "nnUNetPlans")
    assert resume is True


def test_a_training_of_another_place_is_not_to_be_continued_here(root, capsys, tmp_path) -> None:
    only_latest(root)
    away = shutil.copytree(root / RESULTS, tmp_path / "copied" / DATASET)
    folder = away / f"{DYCON}__nnUNetPlans__3d_fullres"
    assert said(capsys, compare(str(folder))).endswith("; finish it where it was trained")


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_results"])
def test_a_variable_that_is_not_set_is_named(root, capsys, monkeypatch, variable) -> None:
    make_training(root, DYCON)
    monkeypatch.delenv(variable)
    assert f"{variable} is not set; type: export {variable}=/path/to/{variable}" in said(capsys, compare(DYCON))


# ---- evaluate --------------------------------------------------------------------------------------------------


def labels(root: Path) -> Path:
    return root / "nnUNet_raw" / DATASET / "labelsTs"


def evaluate(*words: object) -> list[str]:
    return ["evaluate", *map(str, words), "-np", "1"]


def typed_in(text: str) -> list[str]:
    return shlex.split(re.search(r"type: nnUNetv2_dycon (.*?)(?:, or give|$)", text)[1])


@pytest.mark.parametrize("marked", [True, False], ids=["marks of nnU-Net", "label maps alone"])
def test_folders_in_the_wrong_order_are_refused_with_the_right_one(root, capsys, marked) -> None:
    predicted = make_predictions(root / "my predictions", 1)
    if not marked:
        (predicted / "plans.json").unlink()
    before = sorted(labels(root).iterdir())
    typed = typed_in(said(capsys, evaluate(predicted, labels(root))))
    assert sorted(labels(root).iterdir()) == before
    assert typed == ["evaluate", str(labels(root)), str(predicted)]
    assert commands.main([*typed, "-np", "1"]) == 0
    assert (predicted / "scores.csv").is_file()
    assert sorted(labels(root).iterdir()) == before


def test_true_labels_by_another_person_are_scored_elsewhere(root, capsys) -> None:
    other = make_predictions(root / "by another", 1)
    (other / "plans.json").unlink()
    assert "or give -o another folder if the order is meant" in said(capsys, evaluate(other, labels(root)))
    dataset = root / "nnUNet_raw" / DATASET / "dataset.json"
    assert commands.main(evaluate(other, labels(root), "-o", root / "out", "-djfile", dataset)) == 0
    assert (root / "out" / "scores.csv").is_file()


def test_two_folders_of_predictions_may_be_scored_against_each_other(root) -> None:
    one, other = make_predictions(root / "one"), make_predictions(root / "two", 1)
    assert commands.main(evaluate(one, other, "-djfile", root / "nnUNet_raw" / DATASET / "dataset.json")) == 0


def test_a_folder_above_the_label_maps_is_led_to_them(root, capsys) -> None:
    make_predictions(root / "fold_0" / "validation")
    text = said(capsys, evaluate(labels(root), root / "fold_0"))
    assert text.endswith(f"but {root / 'fold_0/validation'} does; give that folder")


def test_a_path_that_began_with_an_unset_variable_is_recognized(root, capsys, monkeypatch) -> None:
    predicted = make_predictions(root / "a")
    shutil.copy(root / "nnUNet_raw" / DATASET / "dataset.json", predicted)
    typed = evaluate(f"/{DATASET}/labelsTs", predicted)
    assert said(capsys, typed).endswith("/labelsTs is not a folder; give the folder with the label maps")
    monkeypatch.delenv("nnUNet_raw")
    assert said(capsys, typed).endswith("since nnUNet_raw is not set; type: export nnUNet_raw=FOLDER")


# ---- predictions by nnU-Net's commands -------------------------------------------------------------------------


@pytest.fixture
def runs(root: Path) -> list:
    make_training(root, DYCON)
    return find_runs(DYCON, Place(DATASET), ("student", "teacher"), True)


def failed(run, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        module.predict(run, root / "test images", mirroring=True, device="cpu")
    return str(caught.value)


def test_a_failed_prediction_says_the_command_that_shows_more(root, runs, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PREDICT", "sys.exit('no memory')")
    model = root / RESULTS / f"{DYCON}__nnUNetPlans__3d_fullres"
    text = failed(runs[0], root)
    assert "(no memory); to see all that it prints, type: " in text
    typed = ["nnUNetv2_predict_from_modelfolder", "-i", str(root / "test images"), "-o", str(runs[0].predictions)]
    typed += ["-m", str(model), "-chk", "checkpoint_final.pth", "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    assert shlex.split(text.split("type: ")[1]) == typed


def test_the_command_of_a_teacher_exports_first(root, runs, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PREDICT", "sys.exit('no memory')")
    monkeypatch.setattr(module, "_EXPORT", "pass")
    first, second = failed(runs[1], root).split("type: ")[1].split(" && ")
    export = f"nnUNetv2_dycon export -d {DATASET} -tr {DYCON} -c 3d_fullres -p nnUNetPlans -f 0"
    assert first == f"{export} -chk checkpoint_final.pth --weights teacher -o ./model"
    assert " -m ./model " in second
    monkeypatch.setattr(module, "_EXPORT", "sys.exit('bad')")
    monkeypatch.setenv("nnUNet_results", "elsewhere")
    assert failed(runs[1], root).endswith(f"type: nnUNet_results={root / 'nnUNet_results'} {first}")


def test_a_full_disk_under_a_prediction_is_said_as_that(root, runs, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PREDICT", "sys.exit('OSError: [Errno 28] No space left on device: x')")
    with pytest.raises(WriteError, match=r"cannot write .*checkpoint_final_student: No space left on device"):
        module.predict(runs[0], root, mirroring=True, device="cpu")
    assert not list((runs[0].training / "test").iterdir())


def test_a_prediction_ends_with_the_command_that_wanted_it(root, runs, tmp_path) -> None:
    """The process and those that it started; nobody would wait for them."""
    note = tmp_path / "children"
    child = f"""
import os, subprocess
other = subprocess.Popen(["sleep", "60"])
open({str(note)!r}, "w").write(f"{{os.getpid()}} {{other.pid}}")
other.wait()
"""
    script = f"from nnunetv2_dycon.evaluation import predict as m; m._call({child!r}, ['x'], None, m._ByHand({{}}))"
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (note.is_file() and note.read_text()):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [Path("/proc", pid) for pid in note.read_text().split()]
    for _ in range(100):
        left = [path for path in left if path.is_dir() and "Z" not in (path / "stat").read_text().split()[2]]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"{left} still run")
