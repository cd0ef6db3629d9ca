"""Annotated cases become training cases wholly or not at all, and nothing of the user's is lost."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.annotation import annotate as module
from nnunetv2_dycon.annotation import journal
from nnunetv2_dycon.annotation.annotate import annotate
from nnunetv2_dycon.data.roles import read_roles
from nnunetv2_dycon.errors import ConfigError, DataError, UserError
from nnunetv2_dycon.locks import locked
from tests.datasets import environment, make_dataset, write_splits

DATASET = "Dataset901_Tiny"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw data set of 4 labelled, 3 unlabelled and 2 test cases; fold 0 trains on three and validates on one."""
    names = make_dataset(tmp_path, shape=(8, 10, 12))
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    write_splits(tmp_path, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    return tmp_path / "nnUNet_raw" / DATASET


def label_of(raw: Path, case: str, *, value: int = 1, ending: str = ".nii.gz", **header: tuple) -> Path:
    """Write a user's label map on the image of an unlabelled case; `header` changes its geometry."""
    image = sitk.ReadImage(str(raw / "imagesUn" / f"{case}_0000.nii.gz"))
    label = np.zeros(sitk.GetArrayFromImage(image).shape, np.uint8)
    label[2:5, 2:5, 2:5] = value
    out = sitk.GetImageFromArray(label)
    out.CopyInformation(image)
    for name, numbers in header.items():
        getattr(out, f"Set{name}")(numbers)
    path = raw.parents[1] / f"mine_{case}{ending}"
    sitk.WriteImage(out, str(path))
    return path


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_case_moves_with_its_label_and_joins_train_of_each_fold_alone(raw: Path) -> None:
    mine = label_of(raw, "u_01")
    image = (raw / "imagesUn" / "u_01_0000.nii.gz").read_bytes()
    shutil.copytree(raw, raw.parents[1] / "nnUNet_preprocessed" / DATASET, dirs_exist_ok=True)
    done = annotate(901, ["u_01", mine])
    assert done.cases == ("u_01",)
    content = json.loads((raw / "dataset.json").read_text())
    roles = read_roles(raw, content)
    assert (roles.labeled, roles.unlabeled) == (("l_00", "l_01", "l_02", "l_03", "u_01"), ("u_00", "u_02"))
    assert content["numTraining"] == 5
    assert (raw / "labelsTr" / "u_01.nii.gz").read_bytes() == mine.read_bytes()
    assert (raw / "imagesTr" / "u_01_0000.nii.gz").read_bytes() == image
    for folder in (raw, raw.parents[1] / "nnUNet_preprocessed" / DATASET):
        (fold,) = json.loads((folder / "splits_final.json").read_text())
        assert fold == {"train": ["l_00", "l_01", "l_02", "u_01"], "val": ["l_03"]}
    assert not (raw / ".annotate").exists()


def test_a_fold_that_validates_on_its_training_cases_says_so_from_then_on(raw: Path) -> None:
    cases = ["l_00", "l_01", "l_02", "l_03"]
    (raw / "splits_final.json").write_text(json.dumps([{"train": cases, "val": cases}]))
    annotate(901, ["u_00", label_of(raw, "u_00")])
    (fold,) = json.loads((raw / "splits_final.json").read_text())
    assert fold == {"train": [*cases, "u_00"], "val": cases, "overlap": True}


def test_a_data_set_that_names_its_cases_names_the_new_one(raw: Path) -> None:
    content = json.loads((raw / "dataset.json").read_text())
    content["dataset"] = {
        f"l_0{i}": {"images": [f"imagesTr/l_0{i}_0000.nii.gz"], "label": f"labelsTr/l_0{i}.nii.gz"} for i in range(4)
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    annotate(901, ["u_00", label_of(raw, "u_00")])
    changed = json.loads((raw / "dataset.json").read_text())
    assert changed["dataset"]["u_00"] == {"images": ["imagesTr/u_00_0000.nii.gz"], "label": "labelsTr/u_00.nii.gz"}
    assert read_roles(raw, changed).labeled[-1] == "u_00"


def test_it_says_which_configurations_are_to_be_preprocessed_again(raw: Path) -> None:
    preprocessed = raw.parents[1] / "nnUNet_preprocessed" / DATASET
    for name in ("nnUNetPlans", "Other"):
        entries = {"2d": {"data_identifier": f"{name}_2d"}, "3d_fullres": {"data_identifier": f"{name}_3d"}}
        (preprocessed / f"{name}_3d").mkdir(parents=True)
        (preprocessed / f"{name}.json").write_text(json.dumps({"configurations": entries}))
    done = annotate(901, ["u_00", label_of(raw, "u_00")])
    assert done.commands == (
        "nnUNetv2_preprocess -d 901 -plans_name Other -c 3d_fullres",
        "nnUNetv2_preprocess -d 901 -c 3d_fullres",
    )


BAD = [
    (lambda raw: ["u_09", label_of(raw, "u_00")], r"imagesUn has no case 'u_09'; the nearest names are u_0"),
    (lambda raw: ["l_00", label_of(raw, "u_00")], r"l_00 is labelled already: .*nnUNetv2_preprocess -d 901"),
    (lambda raw: ["t_00", label_of(raw, "u_00")], r"t_00 is a test case"),
    (lambda raw: ["u_00", raw / "no.nii.gz"], r"no\.nii\.gz is not a file; give the label map of u_00"),
    (lambda raw: ["u_00", label_of(raw, "u_00", ending=".nrrd")], r"does not end in \.nii\.gz"),
    (lambda raw: ["u_00", label_of(raw, "u_00", value=7)], r"mine_u_00\.nii\.gz holds the value 7, not a label"),
    (
        lambda raw: ["u_00", label_of(raw, "u_00", Spacing=(1.0, 1.0, 3.0))],
        r"does not lie on the image .*u_00_0000\.nii\.gz: spacing",
    ),
    (
        lambda raw: ["u_00", label_of(raw, "u_00", Origin=(0.0, 0.0, 0.0))],
        r"does not lie on the image .*u_00_0000\.nii\.gz: origin",
    ),
    (lambda raw: ["u_00", label_of(raw, "u_01")], r"does not lie on the image"),
    (lambda raw: ["u_00", label_of(raw, "u_00"), "u_01"], r"give each case and its label map"),
    (lambda raw: ["u_00", label_of(raw, "u_00"), "u_00", label_of(raw, "u_00")], r"u_00 is given twice"),
]


@pytest.mark.parametrize(("given", "said"), BAD)
def test_a_wrong_case_or_label_map_changes_nothing(raw: Path, given, said: str) -> None:
    good = label_of(raw, "u_02")
    pairs = given(raw)
    before = content_of(raw)
    with pytest.raises(UserError, match=said) as caught:
        annotate(901, [*pairs, "u_02", good] if len(pairs) % 2 == 0 else pairs)
    assert "\n" not in str(caught.value)
    assert content_of(raw) == before


def test_a_second_run_at_the_same_time_is_refused(raw: Path) -> None:
    with locked(raw, "busy"), pytest.raises(DataError, match="another annotate is at work there"):
        annotate(901, ["u_00", label_of(raw, "u_00")])


def _killed(step: int, raw: str, pairs: list) -> None:
    """Annotate in a process that ends at its `step`-th writing, as if killed."""
    count = [0]

    def counted(function):
        def wrapped(*arguments, **keywords):
            if count[0] == step:
                os._exit(9)
            count[0] += 1
            return function(*arguments, **keywords)

        return wrapped

    for name in ("_move", "write_text", "write_json", "sync"):
        setattr(journal, name, counted(getattr(journal, name)))
    annotate(901, pairs)


def test_a_run_killed_anywhere_is_undone_or_finished_by_the_next(raw: Path, tmp_path: Path) -> None:
    """The end is that of a run that was not killed, wherever it was killed."""
    pairs = ["u_00", str(label_of(raw, "u_00")), "u_02", str(label_of(raw, "u_02"))]
    shutil.copytree(raw, tmp_path / "before")
    annotate(901, pairs)
    whole = content_of(raw)
    context = multiprocessing.get_context("fork")
    outcomes = []
    for step in range(40):
        shutil.rmtree(raw)
        shutil.copytree(tmp_path / "before", raw)
        process = context.Process(target=_killed, args=(step, str(raw), pairs))
        process.start()
        process.join()
        outcomes.append(process.exitcode)
        everything = {*content_of(raw).values()}
        assert set(content_of(tmp_path / "before" / "imagesUn").values()) <= everything  # no image is lost
        if process.exitcode == 0:
            break
        annotate(901, pairs)
        assert content_of(raw) == whole, step
    assert outcomes[-1] == 0
    assert len(outcomes) > 12


def test_an_unfinished_run_is_finished_before_other_cases_are_added(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = label_of(raw, "u_00"), label_of(raw, "u_02")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_move", stop)
        with pytest.raises(KeyboardInterrupt):
            annotate(901, ["u_00", first])
    done = annotate(901, ["u_02", second])
    assert done.cases == ("u_00", "u_02")
    assert "an earlier run was finished: u_00" in str(done)
    assert read_roles(raw, json.loads((raw / "dataset.json").read_text())).unlabeled == ("u_01",)


def test_a_file_that_went_away_in_between_is_named(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, "carry_out", lambda folder: ())
        annotate(901, ["u_00", label_of(raw, "u_00")])
    (raw / "imagesUn" / "u_00_0000.nii.gz").rename(raw.parents[1] / "away.nii.gz")
    with pytest.raises(DataError, match=r"u_00_0000\.nii\.gz is gone, and .* is not there; restore one of them"):
        annotate(901, ["u_01", label_of(raw, "u_01")])
    (raw / ".annotate" / "journal.json").write_text("{}")
    with pytest.raises(DataError, match=r"journal\.json is not a journal of annotate"):
        annotate(901, ["u_01", label_of(raw, "u_01")])


MOVE = ["imagesUn/u_00_0000.nii.gz", "imagesTr/u_00_0000.nii.gz"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moves": [["../../../others/file", "imagesTr/x.nii.gz"]]}, "moves '../../../others/file' to"),
        ({"moves": [["{outside}/file", "imagesTr/x.nii.gz"]]}, "moves '/.*/others/file' to"),
        ({"moves": [["imagesUn/u_00_0000.nii.gz", "../x.nii.gz"]]}, r"to '\.\./x\.nii\.gz', which annotate does not"),
        ({"moves": [["dataset.json", "imagesTr/x.nii.gz"]]}, "moves 'dataset.json' to"),
        ({"moves": [["labelsTr/l_00.nii.gz", "imagesTr/x.nii.gz"]]}, "moves 'labelsTr/l_00.nii.gz' to"),
        ({"moves": [["imagesUn/..", "imagesTr/x"]]}, r"moves 'imagesUn/\.\.' to"),
        ({"moves": [MOVE], "texts": [["{outside}/file", "x"]]}, "writes '.*/others/file', which is not a file of this"),
        ({"moves": [MOVE], "texts": [["{raw}/imagesTr/l_00_0000.nii.gz", "x"]]}, "which is not a file of this"),
        ({"moves": [["", "imagesTr/x"]]}, "moves '' to"),
    ],
)
def test_a_journal_that_came_with_a_data_set_moves_and_writes_nothing_elsewhere(
    raw: Path, change: dict[str, list], said: str
) -> None:
    outside = raw.parents[1] / "others"
    outside.mkdir()
    (outside / "file").write_text("of others")
    text = json.dumps({"cases": ["u_00"], "moves": [], "texts": [], **change})
    (raw / ".annotate").mkdir()
    (raw / ".annotate" / "journal.json").write_text(text.replace("{outside}", str(outside)).replace("{raw}", str(raw)))
    mine, before = label_of(raw, "u_01"), content_of(raw.parents[1])
    with pytest.raises(DataError, match=said) as caught:
        annotate(901, ["u_01", mine])
    assert "\n" not in str(caught.value)
    assert content_of(raw.parents[1]) == {**before, str(mine.relative_to(raw.parents[1])): mine.read_bytes()}


def test_a_hidden_folder_that_annotate_did_not_make_is_left_alone(raw: Path) -> None:
    mine, elsewhere = label_of(raw, "u_00"), raw.parents[1] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "u_00.nii.gz").write_text("mine")
    for make in (lambda folder: shutil.copytree(elsewhere, folder), lambda folder: folder.symlink_to(elsewhere)):
        make(raw / ".annotate")
        with pytest.raises(DataError, match=r"\.annotate was not made by this command; move it away"):
            annotate(901, ["u_00", mine])
        assert (raw / ".annotate" / "u_00.nii.gz").read_text() == "mine"
        if not (raw / ".annotate").is_symlink():
            (raw / ".annotate").rename(raw.parents[1] / "away")
    (raw / ".annotate").unlink()
    assert annotate(901, ["u_00", mine]).cases == ("u_00",)


def test_without_a_split_file_it_says_that_folds_are_drawn(raw: Path) -> None:
    (raw / "splits_final.json").unlink()
    assert "there is no split file" in str(annotate(901, ["u_00", label_of(raw, "u_00")]))


def test_nothing_given_says_what_to_type(raw: Path) -> None:
    with pytest.raises(ConfigError, match="annotate -d ID CASE LABEL"):
        annotate(901, [])
