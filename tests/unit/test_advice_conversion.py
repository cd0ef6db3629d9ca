"""What a message says to type does what it promises, for someone who types it as it stands."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_dycon import parallel
from nnunetv2_dycon.commands import main
from tests import collections
from tests.datasets import environment, make_dataset


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "default_processes", lambda: 1)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "a place of Zoë's"  # a blank, an apostrophe and a letter beyond ASCII
    for name, folder in environment(root).items():
        monkeypatch.setenv(name, folder)
    make_dataset(root, dataset_id=4, labeled=4, unlabeled=2, test=1, shape=(8, 8, 8))
    return root


@pytest.fixture
def raw(place: Path) -> Path:
    return place / "nnUNet_raw/Dataset004_Tiny"


def said(capsys: Any, *words: str) -> tuple[int, str]:
    """Type a command of ours; returns its exit code and its last line."""
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    lines = (captured.err or captured.out).strip().splitlines()
    if code:
        assert len(captured.err.strip().splitlines()) <= 1, captured.err
    return code, lines[-1]


SPLIT = ("split", "-d", "4", "--as", "604", "--labeled", "2")


def of_another(raw: Path) -> None:
    make_dataset(raw.parents[1], dataset_id=604, labeled=1, unlabeled=0, test=0, shape=(4, 4, 4))


def another_name(raw: Path) -> None:
    (raw.parents[1] / "nnUNet_results/Dataset604_Liver").mkdir(parents=True)


def made(raw: Path) -> None:
    assert main([*SPLIT[:-1], "1"]) == 0


def made_and_added_to(raw: Path) -> None:
    made(raw)
    (raw.with_name("Dataset604_Tiny") / "imagesUn/mine_0000.nii.gz").touch()


def made_and_broken(raw: Path) -> None:
    assert main(SPLIT) == 0
    next((raw.with_name("Dataset604_Tiny") / "imagesTr").iterdir()).unlink()


def made_broken_and_added_to(raw: Path) -> None:
    made_and_broken(raw)
    (raw.with_name("Dataset604_Tiny") / "imagesUn/mine_0000.nii.gz").touch()


def made_and_changed(raw: Path) -> None:
    assert main(SPLIT) == 0
    os.utime(raw / "labelsTr/l_00.nii.gz", ns=(1, 1))
    os.utime(raw / "imagesTs/t_00_0000.nii.gz", ns=(1, 1))


def nothing(raw: Path) -> None: ...


CHANGED_OPTIONS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    # the situation, what is typed, what the message is about: its advice is an option that is put in place or added
    "id of another data set": (of_another, SPLIT, "was not written by this command"),
    "overwrite a data set of another": (of_another, (*SPLIT, "--overwrite"), "was not written by this command"),
    "id with another name": (another_name, SPLIT, "nnUNet_results/Dataset604_Liver; choose a free id"),
    "another split": (made, SPLIT, "exists; type the command again with --overwrite"),
    "another split with a file of the user": (made_and_added_to, SPLIT, "was added later and would be lost"),
    "the same, to overwrite": (made_and_added_to, (*SPLIT, "--overwrite"), "was added later and would be lost"),
    "a file is gone": (made_and_broken, SPLIT, "is gone; type the command again with --overwrite"),
    "the same with a file of the user": (made_broken_and_added_to, SPLIT, "was added later and would be lost"),
    "sources changed": (made_and_changed, SPLIT, "were changed after"),
    "id beyond": (nothing, ("split", "-d", "4", "--as", "1000", "--labeled", "2"), "a number from 1 to 999"),
    "all cases for the test": (nothing, (*SPLIT, "--test", "4"), "--test 4 leaves no case to train on"),
    "nearly all cases for the test": (
        nothing,
        (*SPLIT[:-1], "1", "--test", "0.9"),
        "--test 0.9 leaves no case to train",
    ),
    "more than there are": (nothing, (*SPLIT[:-1], "5"), "means 5 of 4 training cases"),
    "labelled in two ways": (nothing, (*SPLIT[:-1], "1.0"), "may mean one case or all of them"),
    "no process": (nothing, (*SPLIT, "-np", "0"), "must be at least 1"),
}


@pytest.mark.parametrize("situation", CHANGED_OPTIONS)
def test_the_option_that_is_advised_works(raw: Path, capsys: Any, situation: str) -> None:
    prepare, words, about = CHANGED_OPTIONS[situation]
    prepare(raw)
    code, line = said(capsys, *words)
    assert code == 2
    assert about in line
    for option, value in advised(line, words):
        again = [word for word in words if word != option] if value is None else list(words)
        if value is not None:
            again[again.index(option) + 1] = value
        code, line = said(capsys, *again, *([option] if value is None else []))
        assert (code, line.split(":")[0]) == (0, "next"), line
        return
    pytest.fail(f"no advice in {line}")


def advised(line: str, words: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Options in a message, with a value to put in the place of that typed, or without one."""
    if "with --overwrite" in line:
        return [("--overwrite", None)]
    number = re.search(r"(?:choose a free id: (--as) |type (--test) |; give |type |be at least )([0-9]+)", line)
    assert number, line
    asked = re.match(r"error: (--?[a-z]+) ", line)
    option = number[1] or number[2] or (asked[1] if asked else "")
    return [(option, number[3])] if option in words else []


def test_a_dry_run_does_not_send_the_user_to_a_data_set_that_is_not_there(raw: Path, capsys: Any) -> None:
    assert said(capsys, *SPLIT, "--dry_run") == (0, "next: the same command without --dry_run")
    code, line = said(capsys, *SPLIT)
    assert (code, line) == (0, "next: nnUNetv2_dycon check -d 604")
    code, line = said(capsys, *line.removeprefix("next: ").split()[1:])
    assert code == 0
    assert line.endswith("nnUNetv2_plan_and_preprocess -d 604 -c 3d_fullres --verify_dataset_integrity")


# ---- commands of other programs ----------------------------------------------------------------------------


def typed(line: str) -> str:
    """The command in a message, up to the next advice."""
    return re.split(r", or|; then|\)|$", line.split("type: ")[1])[0].strip()


def test_a_variable_that_is_not_set_can_be_set_as_it_says(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    value = os.environ["nnUNet_raw"]
    for words in (SPLIT, ("check", "-d", "4"), ("convert", "LA", str(place), "--labeled", "8")):
        if words[0] == "convert":
            collections.la_h5(place / "download")
        monkeypatch.delenv("nnUNet_raw")
        code, line = said(capsys, *words)
        assert (code, typed(line)) == (2, "export nnUNet_raw=/path/to/nnUNet_raw")
        assert "several" not in line
        monkeypatch.setenv("nnUNet_raw", value)
        assert said(capsys, *words)[0] == 0


def test_a_folder_that_is_not_there_is_made_as_it_says(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(place / "new one"))
    code, line = said(capsys, "check", "-d", "4")
    assert code == 2
    assert os.system(typed(line)) == 0
    code, line = said(capsys, "check", "-d", "4")
    assert line == f"error: -d 4: no data set has this id; {place / 'new one'} has none; correct the id, or nnUNet_raw"


def test_split_files_that_differ_are_made_the_same_as_it_says(place: Path, raw: Path, capsys: Any) -> None:
    used = place / "nnUNet_preprocessed/Dataset004_Tiny/splits_final.json"
    used.parent.mkdir()
    used.write_text(json.dumps([{"train": ["l_00"], "val": ["l_01"]}]))
    (raw / "splits_final.json").write_text(json.dumps([{"train": ["l_01"], "val": ["l_00"]}]))
    main(["check", "-d", "4"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "splits_final.json" in line)
    assert os.system(typed(line).replace(" (this replaces the second", "")) == 0
    assert used.read_bytes() == (raw / "splits_final.json").read_bytes()
    assert main(["check", "-d", "4"]) == 0


@pytest.mark.parametrize(
    ("make", "asked"), [(collections.la_h5, "BTCV"), (collections.btcv, "LA"), (collections.brats, "LA")]
)
def test_the_converter_that_fits_is_advised_with_a_command_that_works(
    place: Path, make: Any, asked: str, capsys: Any
) -> None:
    make(place / "a download")
    code, line = said(capsys, "convert", asked, str(place / "a download"), "--labeled", "4")
    assert code == 2
    code, line = said(capsys, *shlex.split(line.split("type: ")[1])[1:])
    assert code == 0, line


def test_a_data_set_of_nnunet_is_to_be_split_with_a_command_that_works(raw: Path, capsys: Any) -> None:
    code, line = said(capsys, "convert", "LA", str(raw), "--labeled", "8")
    assert code == 2
    code, line = said(capsys, *shlex.split(line.split("type: ")[1].replace("--labeled 0.1", "--labeled 0.3"))[1:])
    assert (code, line) == (0, "next: nnUNetv2_dycon check -d 5")


@pytest.mark.parametrize("what", ["no training case", "no label", "no label of the drawn"])
def test_without_a_labelled_case_it_is_said_what_is_missing(raw: Path, capsys: Any, what: str, tmp_path: Path) -> None:
    if what == "no training case":
        shutil.rmtree(raw / "imagesTr")
    for path in list((raw / "labelsTr").iterdir()):
        if what != "no label of the drawn" or path.name == "l_00.nii.gz":
            path.unlink()
    (tmp_path / "wanted.txt").write_text("l_00")
    _, line = said(capsys, *SPLIT[:-1], str(tmp_path / "wanted.txt"))
    assert " 0 labelled cases" not in line
    assert {
        "no training case": "has no training cases; put them into imagesTr and labelsTr",
        "no label": "no training case of split of Dataset004_Tiny is there with its label; add images and labels",
        "no label of the drawn": "none of the 1 labelled cases",
    }[what] in line


def test_a_number_that_no_subject_fits_into_gets_one_that_does(raw: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "subjects.json").write_text(json.dumps({f"l_{i:02d}": f"s{i // 2}" for i in range(4)}))
    words = (*SPLIT[:-1], "1", "--groups", str(tmp_path / "subjects.json"))
    code, line = said(capsys, *words)
    assert (code, line) == (2, "error: --labeled 1: each subject has 2 or more scans; type --labeled 2")
    assert said(capsys, *words[:6], "2", *words[7:])[0] == 0


def test_a_protocol_with_several_numbers_is_read_as_it_says(raw: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "a protocol.json"
    path.write_text(json.dumps({"labeled": {"1": ["l_00"], "2": ["l_00", "l_01"]}, "train": ["l_00", "l_01", "l_02"]}))
    _, line = said(capsys, *SPLIT[:-1], str(path))
    assert said(capsys, *SPLIT[:-2], *shlex.split(line.split("example: ")[1]))[0] == 0


@pytest.mark.parametrize("value", ["abc", "1.5", "all", "none.txt"])
def test_an_option_is_not_advised_what_it_does_not_take(raw: Path, capsys: Any, value: str) -> None:
    code, line = said(capsys, *SPLIT, "--test", value)
    assert code == 2
    assert "a file" not in line
    assert ", all" not in line
