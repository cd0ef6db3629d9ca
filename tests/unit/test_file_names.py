"""Files and folders that nobody would read are named, and hidden files are never cases."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.conversion.split import split
from nnunetv2_dycon.data.file_names import hidden_cases, unlabeled_name_problems
from nnunetv2_dycon.data.manifest import unlabeled_status
from nnunetv2_dycon.data.roles import read_roles
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import list_visible
from nnunetv2_dycon.self_training.experiment import read_experiment
from tests.datasets import environment, make_dataset, plan_and_preprocess

NAME = "Dataset004_Tiny"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names")
    make_dataset(root, dataset_id=4, labeled=4, unlabeled=2, test=1, shape=(16, 16, 16))
    plan_and_preprocess(4, root=root)
    return root


@pytest.fixture
def raw(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    return tmp_path / "nnUNet_raw" / NAME


def failed() -> dict[str, str]:
    return {one.name: one.text for one in check(4, processes=1) if not one.ok and one.name != "next"}


def experiment() -> Any:
    return read_experiment(4, "3d_fullres", 0, "nnUNetPlans", 1, False, "cpu", 1)


# ---- hidden files ------------------------------------------------------------------------------------------

HIDDEN = ("._{}", ".{}", "..{}")


@pytest.mark.parametrize("form", HIDDEN)
def test_hidden_files_are_never_cases(raw: Path, form: str) -> None:
    roles = read_roles(raw, json.loads((raw / "dataset.json").read_text()))
    split(4, 604, 2, test=1, processes=1)
    for folder in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs"):
        for path in list((raw / folder).iterdir()):
            (raw / folder / form.format(path.name)).write_bytes(b"\x00\x05\x16\x07")
    (raw / ".cache").mkdir()
    shutil.copy(raw / "imagesUn/u_00_0000.nii.gz", raw / ".cache/x_0000.nii.gz")
    assert read_roles(raw, json.loads((raw / "dataset.json").read_text())) == roles
    assert split(4, 604, 2, test=1, processes=1).state == "up to date"
    (folder,) = preprocess_unlabeled(4, processes=1)
    assert {path.name[:4] for path in folder.iterdir()} == {"u_00", "u_01"}
    assert unlabeled_status(4).unlabeled == ("u_00", "u_01")


def test_hidden_files_that_nnunet_would_take_for_cases_are_named_with_a_command_that_works(raw: Path) -> None:
    for folder in ("imagesTr", "imagesUn", "imagesTs", "labelsTr"):
        (raw / folder / "._l_00_0000.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    (raw / "imagesUn/.DS_Store").write_bytes(b"\x00")
    text = failed()["file names"]
    assert text.count("is hidden, but nnU-Net takes it for a case") == 3
    with pytest.raises(DataError, match=r"\._l_00_0000\.nii\.gz is hidden"):
        experiment()
    command = text.split("delete it: ")[1].split(" | ")[0]
    assert os.system(command) == 0
    assert failed() == {}
    experiment()


def test_a_hidden_file_of_another_kind_is_named_without_a_command_that_would_miss_it(raw: Path) -> None:
    (raw / "imagesTr/.old_0000.nii.gz").touch()
    (problem,) = hidden_cases(raw, {"file_ending": ".nii.gz"})
    assert problem == f"{raw}/imagesTr/.old_0000.nii.gz is hidden, but nnU-Net takes it for a case; delete it"


def test_hidden_prepared_cases_stop_a_training_that_would_take_them_for_cases(tiny: Path) -> None:
    from tests.training import begin, make_trainer

    path = tiny / "nnUNet_preprocessed/Dataset901_Tiny/nnUNetPlans_3d_fullres/._l_00.b2nd"
    path.touch()
    try:
        with pytest.raises(DataError, match=r"holds \._l_00, hidden files .*; delete them: find .* -delete"):
            begin(make_trainer("nnUNetTrainerLabeledOnly_epochs1"))
    finally:
        path.unlink()


def test_visible_files_are_listed_in_order_without_folders_and_broken_links_are_not_passed_over(tmp_path: Path) -> None:
    assert list_visible(tmp_path / "none") == []
    for name in ("b.nii", "a.nii", ".c.nii", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "e.nii").symlink_to(tmp_path / "gone")
    assert [path.name for path in list_visible(tmp_path)] == ["a.nii", "b.nii", "d.txt", "e.nii"]
    assert [path.name for path in list_visible(tmp_path, ".nii")] == ["a.nii", "b.nii", "e.nii"]


# ---- files and folders that nobody reads -------------------------------------------------------------------


def moved(source: str, target: str) -> Callable[[Path], None]:
    def move(raw: Path) -> None:
        (raw / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(raw / source, raw / target)

    return move


UNREAD = {  # what is there, and what is said of it
    "a folder in imagesUn": (
        moved("imagesUn/u_00_0000.nii.gz", "imagesUn/more/new_0000.nii.gz"),
        "imagesUn/more is a folder, whose images are not read; move them up",
    ),
    "a deeper one": (
        moved("imagesUn/u_00_0000.nii.gz", "imagesUn/site/b/new_0000.nii.gz"),
        "imagesUn/site is a folder, whose images are not read",
    ),
    **{
        name: (
            moved("imagesUn/u_00_0000.nii.gz", f"{name}/new_0000.nii.gz"),
            f"{NAME}/{name} holds images but is not read; move them to ",
        )
        for name in ("imagesUnlabeled", "imagesun", "imagesUN", "ImagesUn", "images_un", "unlabelled", "imagesUl", "Un")
    },
    "imagests": (
        moved("imagesTs/t_00_0000.nii.gz", "imagests/new_0000.nii.gz"),
        "imagests holds images but is not read",
    ),
    "another ending": (moved("imagesUn/u_00_0000.nii.gz", "imagesUn/new_0000.nii"), "does not end in .nii.gz"),
}


@pytest.mark.parametrize("what", UNREAD)
def test_unlabelled_images_that_would_be_passed_over_are_named_before_a_training(raw: Path, what: str) -> None:
    make, words = UNREAD[what]
    make(raw)
    assert words in failed()["unlabelled"]
    for function in (lambda: preprocess_unlabeled(4, processes=1), lambda: unlabeled_status(4)):
        with pytest.raises(DataError, match=words.replace(".", r"\.")):
            function()


@pytest.mark.parametrize("name", ["imagesVa", "old", "masks", "imagesUn/.ipynb_checkpoints", "labelsUnlabeled"])
def test_other_folders_are_no_mistake(raw: Path, name: str) -> None:
    moved("imagesTr/l_00_0000.nii.gz", f"{name}/new_0000.nii.gz")(raw)
    (raw / "imagesUn/empty").mkdir()
    (raw / "imagesUn/notes").mkdir()
    (raw / "imagesUn/notes/readme.txt").touch()
    assert failed() == {}
    roles, content = read_roles(raw, content := json.loads((raw / "dataset.json").read_text())), content
    assert unlabeled_name_problems(raw, roles, content) == []
    (found,) = (one for one in check(4, processes=1) if one.name == "file names")
    assert found.text == ("all are read" if "/" in name else f"all are read, but for the folders {name}")


@pytest.mark.parametrize(
    ("make", "finding", "words"),
    [
        (moved("imagesTr/l_00_0000.nii.gz", "imagesTr/b/l_09_0000.nii.gz"), "file names", "imagesTr/b is a folder"),
        (moved("imagesTs/t_00_0000.nii.gz", "imagesTs/b/t_09_0000.nii.gz"), "file names", "imagesTs/b is a folder"),
        (moved("imagesTr/l_00_0000.nii.gz", "imagesTr/l_09_0000.nii"), "file names", "does not end in .nii.gz"),
        (moved("imagesTr/l_00_0000.nii.gz", "imagesTs/t.nii.gz"), "file names", "t.nii.gz has no channel number"),
        (moved("labelsTr/l_00.nii.gz", "labelsTr/l_09.nii.gz"), "labels", "without an image: "),
        (moved("labelsTr/l_00.nii.gz", "labelsTs/t_09.nii.gz"), "labels", "labelsTs/t_09.nii.gz; add the images"),
    ],
)
def test_other_images_and_labels_that_would_be_passed_over_are_named(
    raw: Path, make: Callable[[Path], None], finding: str, words: str
) -> None:
    make(raw)
    assert words in failed()[finding]


def test_a_labelled_case_whose_name_nnunet_takes_for_a_mask_is_named(raw: Path) -> None:
    (raw / "imagesTr/l_00_0000.nii.gz").rename(raw / "imagesTr/l_seg_0000.nii.gz")
    (raw / "labelsTr/l_00.nii.gz").rename(raw / "labelsTr/l_seg.nii.gz")
    assert "nnU-Net takes names in _seg for masks" in failed()["file names"]


@pytest.mark.parametrize("name", ["a\\b", "two\nlines", "tab\there"])
@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn", "imagesTs"])
def test_a_file_whose_name_no_case_can_have_is_one_line(raw: Path, folder: str, name: str) -> None:
    shutil.copy(raw / "imagesTs/t_00_0000.nii.gz", raw / folder / f"{name}_0000.nii.gz")
    with pytest.raises(DataError, match="names a case"):
        split(4, 604, 1, processes=1)
    (found,) = check(4, processes=1)
    assert not found.ok
    assert "\n" not in found.text
