"""Self-training that continues: after kills, by hand, through nnU-Net's own commands."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import nibabel as nib
import numpy as np
import pytest

from nnunetv2_dycon import parallel
from nnunetv2_dycon.checkpoint import read_checkpoint
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.self_training import running
from tests.datasets import environment
from tests.processes import children_of, kill_alone, left_in, started_by
from tests.rounds import (
    CASES,
    NAME,
    ROUNDS,
    Commands,
    Killed,
    checkpoint,
    copy_data,
    first_fold,
    raw,
    send,
    start,
    tree,
)
from tests.training import same

# ---- going on ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean_tree(tiny_data, tmp_path_factory):
    """What a run of two rounds leaves that nothing interrupts."""
    root = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as monkeypatch:
        copy_data(tiny_data, root, monkeypatch)
        start(monkeypatch, root, rounds=2)
        return tree(root)


@pytest.mark.parametrize("kill_at", range(9))
def test_a_run_that_is_killed_in_any_command_ends_as_one_that_is_not(monkeypatch, clean_tree, root, kill_at):
    with pytest.raises(Killed):
        start(monkeypatch, root, rounds=2, commands=Commands(root, kill_at))
    _, again = start(monkeypatch, root, rounds=2)
    assert len(again.seen) == 9 - kill_at  # nothing is done twice
    assert tree(root) == clean_tree
    _, third = start(monkeypatch, root, rounds=2)
    assert third.seen == []


@pytest.mark.parametrize(
    ("whole", "cut", "flag"),
    [
        ((), (), None),
        (("latest",), (), "--c"),
        (("best",), (), "--c"),
        (("final",), (), "--val"),
        (("best",), ("latest",), "--c"),
        (("latest",), ("final",), "--c"),
        ((), ("latest",), None),
    ],
)
def test_a_training_goes_on_from_what_is_whole(monkeypatch, root, whole, cut, flag):
    fold = first_fold(root)
    for name in whole:
        checkpoint(fold / f"checkpoint_{name}.pth", "x")
    for name in cut:
        (fold / f"checkpoint_{name}.pth").write_bytes(b"PK\x03\x04 cut")
    _, commands = start(monkeypatch, root)
    flags = [word for word in commands.seen[0] if word.startswith("--")]
    assert flags == ([flag] if flag else [])
    for name in cut:
        assert (fold / f"checkpoint_{name}.pth.cut").is_file()


def test_predictions_that_another_machine_made_are_taken(monkeypatch, root):
    commands = Commands(root)
    with pytest.raises(Killed):
        start(monkeypatch, root, commands=Commands(root, kill_at=1))
    shutil.rmtree(first_fold(root) / "pseudo_labels")
    commands.killed = False
    images, output = raw(root, NAME) / "imagesUn", first_fold(root) / "pseudo_labels"
    commands.predict(["nnUNetv2_predict", "-i", str(images), "-o", str(output)])
    _, again = start(monkeypatch, root)
    assert "nnUNetv2_predict" not in [words[0] for words in again.seen]


@pytest.mark.parametrize("gone", ["nnUNetPlans_3d_fullres/u_01.pkl", "gt_segmentations/u_01.nii.gz"])
def test_a_preprocessed_case_that_is_gone_is_made_again(monkeypatch, root, gone):
    start(monkeypatch, root)
    (root / "nnUNet_preprocessed" / ROUNDS[0] / gone).unlink()
    _, again = start(monkeypatch, root)
    assert [words[0] for words in again.seen] == ["nnUNetv2_preprocess"]


def test_images_that_came_later_are_not_passed_over(monkeypatch, root):
    start(monkeypatch, root)
    images = raw(root, NAME) / "imagesUn"
    shutil.copyfile(images / "u_00_0000.nii.gz", images / "u_03_0000.nii.gz")
    with pytest.raises(DataError, match="made with other settings or pseudo-labels"):
        start(monkeypatch, root)
    assert (first_fold(root) / "pseudo_labels/u_03.nii.gz").is_file()


@pytest.mark.parametrize(("training", "value"), [(True, "0"), (False, None)])
def test_commands_but_for_training_do_not_get_a_number_of_0_processes(monkeypatch, root, training, value):
    calls = []

    def stand_in(words, **options):
        calls.append((words, options))
        return 3

    monkeypatch.setattr(parallel, "run_command", stand_in)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with pytest.raises(DataError, match=r"nnUNetv2_x ended with code 3.*nnUNetv2_x -d 'a b'"):
        running.call(["nnUNetv2_x", "-d", "a b"], 7, training=training)
    ((words, options),) = calls
    assert words[-4:] == ["7", "nnUNetv2_x", "-d", "a b"]
    assert options["env"].get("nnUNet_n_proc_DA") == value
    assert options["pass_fds"] == (7,)


@pytest.mark.parametrize(
    ("free", "said"),
    [(1e12, "is above. Mend it"), (3e7, r"the disk may be full: free are 0.03 GB in nnUNet_results\. ")],
)
def test_a_command_that_fails_says_where_the_disk_is_full(monkeypatch, root, free, said):
    def usage(path):
        return types.SimpleNamespace(free=free if path.name == "nnUNet_results" else 1e12)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(parallel, "run_command", lambda words, **_: 1)
    with pytest.raises(DataError, match=said):
        running.call(["nnUNetv2_train"], 7)


def test_a_command_whose_output_nobody_reads_ends_the_run_as_such(monkeypatch, root):
    script = "import sys; from nnunetv2_dycon.self_training import running; running._COMMAND"
    code = f"{script}; exec(running._COMMAND.replace('command.load()', '(lambda: print(1) or sys.stdout.flush())'))"
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-c", code, "", "nnUNetv2_train"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    monkeypatch.setattr(parallel, "run_command", lambda words, **_: 141)
    with pytest.raises(BrokenPipeError):
        running.call(["nnUNetv2_train"], 7)


STARTING = """
import multiprocessing, os, signal, time
from nnunetv2_dycon.self_training import running

def start():
    for how in ("fork", "spawn"):
        multiprocessing.get_context(how).Process(target=time.sleep, args=(600,)).start()
    print("started", flush=True)
    signal.pause()

if __name__ == "__main__":
    exec(running._COMMAND.replace("command.load()", "start"))
"""


def test_what_a_killed_command_started_ends_with_it(tmp_path):
    (tmp_path / "starting.py").write_text(STARTING)
    words = [sys.executable, str(tmp_path / "starting.py"), "", "nnUNetv2_predict"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "started\n"
        assert len(children_of(process.pid)) >= 2
        sessions = kill_alone(process.pid)
    assert not left_in(sessions)


FORKING = """
import os, sys
from nnunetv2_dycon.self_training import running

lock = int(sys.argv[1])

def is_open():
    try:
        return bool(os.fstat(lock))
    except OSError:
        return False

def start():
    child = os.fork()
    if not child:
        os._exit(is_open())
    print(is_open(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

exec(running._COMMAND.replace("command.load()", "start"))
"""


def test_a_command_holds_the_lock_and_what_it_forks_does_not(tmp_path):
    lock = os.open(tmp_path, os.O_RDONLY)
    words = [sys.executable, "-c", FORKING, str(lock), "nnUNetv2_train"]
    done = subprocess.run(words, pass_fds=(lock,), capture_output=True, text=True, check=True)
    os.close(lock)
    assert done.stdout == "True 0\n"


def test_a_dry_run_writes_nothing_and_says_what_is_done(monkeypatch, root, caplog):
    caplog.set_level(logging.INFO)
    before = tree(root)
    _, commands = start(monkeypatch, root, dry_run=True)
    assert commands.seen == []
    assert tree(root) == before
    assert caplog.text.count("to do: ") == 6
    start(monkeypatch, root)
    caplog.clear()
    start(monkeypatch, root, dry_run=True)
    assert "to do" not in caplog.text


def test_two_runs_do_not_work_at_once(monkeypatch, root):
    class Twice(Commands):
        def train(self, words):
            with pytest.raises(DataError, match="is working on"):
                start(monkeypatch, root)
            monkeypatch.setattr(running, "call", self)
            super().train(words)

    _, commands = start(monkeypatch, root, commands=Twice(root))
    assert len(commands.seen) == 5


# ---- through nnU-Net's commands ------------------------------------------------------------------------------


def launch(root, *more):
    script = "from nnunetv2_dycon.commands import main; raise SystemExit(main())"
    words = ["self_train", "-d", "901", "--as", "911", "--epochs", "3", "5", "-np", "1", "-device", "cpu"]
    words += ["-tr", "nnUNetTrainerLabeledOnly_iters10_valiters1_lr0p03_save1_seed3", *more]
    with open(root / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", script, *words],
            # a text is waited for: in a buffer it would be seen when the training has long gone on, or ended
            env={**os.environ, **environment(root), "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(root, process, text, seconds=900):
    until = time.monotonic() + seconds
    while text not in (root / "log.txt").read_text(errors="replace"):
        assert process.poll() is None, (root / "log.txt").read_text(errors="replace")[-3000:]
        assert time.monotonic() < until, text
        time.sleep(0.02)


def final_checkpoint(root):
    (path,) = (root / "nnUNet_results" / ROUNDS[0]).glob("*/fold_0/checkpoint_final.pth")
    return read_checkpoint(path)


def whole_names(root):
    """What a run leaves, hidden files too, but for the logs: each run has its own."""
    paths = (str(path.relative_to(root)) for path in root.rglob("*"))
    return sorted(path for path in paths if "training_log" not in path and path != "log.txt")


STAGES = ("Epoch 1", "Predicting u_01", "Preprocessing cases", "This split has 6 training", "Epoch 3")


@pytest.mark.slow
def test_real_commands_killed_at_every_stage_end_in_the_weights_of_a_clean_run(root, tmp_path_factory):
    """The run and the command that it started are killed, alone: the command's processes must end by themselves."""
    clean = tmp_path_factory.mktemp("clean")
    shutil.copytree(root, clean, dirs_exist_ok=True)
    process = launch(clean)
    assert process.wait() == 0, (clean / "log.txt").read_text(errors="replace")[-3000:]

    draw = random.Random(7)
    for text in STAGES:
        (root / "log.txt").write_text("")
        process = launch(root)
        wait_for(root, process, text)
        time.sleep(draw.uniform(0, 0.3))
        commands = started_by(process.pid)
        if text == "This split has 6 training":
            send(commands, signal.SIGSTOP)  # or the short training could end before the second run looks
            process.kill()  # it alone: the training lives, and keeps others out
            process.wait()
            second = launch(root)
            assert second.wait() == 2
            assert "is working on" in (root / "log.txt").read_text(errors="replace")
        sessions = kill_alone(process.pid, *commands)
        process.wait()
        assert not left_in(sessions), text
    process = launch(root)
    assert process.wait() == 0, (root / "log.txt").read_text(errors="replace")[-3000:]

    ours, theirs = final_checkpoint(root), final_checkpoint(clean)
    assert ours["_best_ema"] == theirs["_best_ema"]
    assert same(ours["network_weights"], theirs["network_weights"])
    assert whole_names(root) == whole_names(clean)
    for case in CASES:
        one, other = (nib.load(raw(where) / f"labelsTr/{case}.nii.gz") for where in (root, clean))
        assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
        assert np.asarray(one.dataobj).any()
