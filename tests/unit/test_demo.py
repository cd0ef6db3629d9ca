"""What the demo refuses before it writes or removes anything, and what it says of the time and of what is next."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunetv2_dycon.errors import ConfigError, DataError
from scripts import demo
from scripts.demo import Arm, Demo
from scripts.demo_task04 import task04_files
from tests.processes import hear_ctrl_c


def task04(folder: Path) -> Path:
    """Twenty-two tiny scans in the Decathlon's tree: eleven subjects."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
        for number in range(1, 23):
            volume = nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4))
            nib.save(volume, folder / part / f"hippocampus_{number:03d}.nii.gz")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    demo.run(demo.parse_arguments())


@pytest.fixture(autouse=True)
def _no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise AssertionError("the demo went on")

    monkeypatch.setattr(demo.Demo, "run", stop)


@pytest.mark.parametrize("name", ["nnUNet_raw/Dataset504_Hippocampus", "nnUNet_preprocessed", "report"])
def test_a_folder_with_data_of_somebody_is_refused_and_left_alone(tmp_path, monkeypatch, name) -> None:
    mine = tmp_path / "out" / name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("scans")
    with pytest.raises(DataError, match=f"holds {name.split('/')[0]}, which no demo made: give another --out"):
        run(monkeypatch, "--out", str(tmp_path / "out"), "--task04", str(task04(tmp_path / "Task04")))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]


def test_a_folder_of_the_same_demo_is_taken_and_one_of_another_refused(tmp_path) -> None:
    demo.same_options(tmp_path / "out", {"seed": 0})
    (tmp_path / "out/nnUNet_raw").mkdir()
    demo.same_options(tmp_path / "out", {"seed": 0})
    with pytest.raises(DataError, match="other options"):
        demo.same_options(tmp_path / "out", {"seed": 1})


def test_the_old_data_set_stays_until_the_new_one_is_whole(tmp_path) -> None:
    one = demo.Demo(tmp_path / "out", "Dataset504_Hippocampus", 1, "cpu")
    one.raw.mkdir()
    (one.raw / "old").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"--task04 .* has no imagesTr"):
        demo.make_hippocampus(one.raw, tmp_path / "empty", 2)
    assert (one.raw / "old").exists()
    demo.make_hippocampus(one.raw, task04(tmp_path / "Task04"), 2)
    assert not (one.raw / "old").exists()
    assert json.loads((one.raw / "dataset.json").read_text())["file_ending"] == ".nii.gz"


@pytest.mark.parametrize("option", ["--labeled", "--iters", "--epochs"])
def test_zero_is_refused_and_does_not_mean_the_default(tmp_path, monkeypatch, option) -> None:
    with pytest.raises(ConfigError, match=f"{option} 0: give 1 or more"):
        run(monkeypatch, "--out", str(tmp_path / "out"), option, "0")
    assert not (tmp_path / "out").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


EVIL = {
    "a way up": [member("Task04/../../../escaped")],
    "an absolute name": [member("{outside}/escaped")],
    "a link out": [member("Task04/door", tarfile.SYMTYPE, "{outside}"), member("Task04/door/escaped")],
    "a link to a file out": [member("Task04/mine", tarfile.SYMTYPE, "{outside}/mine"), member("Task04/mine")],
    "a hard link out": [member("Task04/mine", tarfile.LNKTYPE, "{outside}/mine"), member("Task04/mine")],
    "a device": [member("Task04/null", tarfile.CHRTYPE)],
}


@pytest.mark.parametrize("kind", EVIL)
def test_an_archive_writes_nothing_outside(tmp_path, monkeypatch, kind) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    path = tmp_path / "Task04.tar"
    with tarfile.open(path, "w") as archive:
        for info in EVIL[kind]:
            named = tarfile.TarInfo(info.name.format(outside=outside))
            named.type, named.size, named.linkname = info.type, info.size, info.linkname.format(outside=outside)
            archive.addfile(named, io.BytesIO(b"evil"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(DataError) as caught:
        run(monkeypatch, "--out", str(tmp_path / "out"), "--task04", str(path))
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "out/" not in str(p)} == before
    assert list(outside.iterdir()) == [outside / "mine"]


def test_files_that_are_no_cases_of_task04_are_passed_over(tmp_path) -> None:
    folder = task04(tmp_path / "Task04")
    for part in ("imagesTr", "labelsTr"):
        for name in ("._hippocampus_001.nii.gz", "hippocampus_abc.nii.gz"):
            (folder / part / name).touch()
    with task04_files(folder) as files:
        assert sorted(files) == [f"hippocampus_{number:03d}" for number in range(1, 23)]


# ---- time and what is next -----------------------------------------------------------------------------------

START = datetime(2026, 1, 1, 12)


def arm(tmp_path: Path, title: str, stage: str, *seconds: float, first: int = 0) -> Arm:
    """A training of ten epochs whose epochs began at these seconds."""
    one = Arm(Demo(tmp_path / "out", "Dataset501_Phantom", 1, "cpu"), title, f"nnUNetTrainer{title}", 10, stage)
    one.fold.mkdir(parents=True)
    lines = [f"{START + timedelta(seconds=at, microseconds=1)}: Epoch {first + n}\n" for n, at in enumerate(seconds)]
    (one.fold / "training_log_1.txt").write_text("".join(lines))
    return one


def test_the_time_left_is_that_of_the_slower_training_at_its_pace(tmp_path) -> None:
    arms = [arm(tmp_path, "A", "training", 0, 10, 20), arm(tmp_path, "B", "training", 0, 30)]
    now = START + timedelta(seconds=40)
    assert arms[0].seconds_left(now) == pytest.approx(8 * 10 - 20, abs=0.1)
    assert arms[1].seconds_left(now) == pytest.approx(9 * 30 - 10, abs=0.1)
    assert demo.training_progress(arms, now) == "A: epoch 3/10 | B: epoch 2/10 | about 5 minutes of training left"


def test_a_training_that_goes_on_is_timed_from_its_present_start(tmp_path) -> None:
    one = arm(tmp_path, "A", "training", 0, 60, first=7)
    assert one.seconds_left(START + timedelta(seconds=60)) == pytest.approx(2 * 60, abs=0.1)


@pytest.mark.parametrize(
    ("stage", "seconds", "left"), [("waiting", (), None), ("training", (0,), None), ("done", (), 0.0)]
)
def test_no_time_is_said_before_it_is_known(tmp_path, stage, seconds, left) -> None:
    one = arm(tmp_path, "A", stage, *seconds)
    assert one.seconds_left(START) == left
    assert ("left" in demo.training_progress([one], START)) == (left is not None)


def test_the_comparison_says_which_run_it_scores(tmp_path) -> None:
    one = Demo(tmp_path / "out", "Dataset501_Phantom", 1, "cpu")
    assert demo.comparison_progress(one) == "predicting the test cases; then scores"
    (one.out / "logs" / "compare.log").write_text("x\n1 of 4: A, /a\n2 of 4: B, /b\nmore\n")
    assert demo.comparison_progress(one) == "scoring the test cases, 2 of 4: B"


def test_what_is_next_can_be_typed_in_a_new_terminal(tmp_path, monkeypatch) -> None:
    activate = tmp_path / "my env" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "my env"))
    said = demo.what_next(tmp_path / "report")
    assert f"source '{activate}'\n" in said
    assert f"open {tmp_path}/report/report.html in a browser" in said
    title = "Use it on your data"
    assert title in said
    assert f"\n## {title}\n" in (Path(__file__).parents[2] / "README.md").read_text()
    activate.unlink()
    assert "source" not in demo.what_next(tmp_path / "report")


def test_ctrl_c_ends_the_demo_in_one_line(tmp_path) -> None:
    script = Path(demo.__file__)
    process = subprocess.Popen(
        [sys.executable, str(script), "--out", str(tmp_path / "out")],
        preexec_fn=hear_ctrl_c,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 900
    while not (tmp_path / "out" / "logs" / "phantom.log").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said) == (130, "stopped by Ctrl-C; to go on, type the same command again\n")
