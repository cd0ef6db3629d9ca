"""Self-training: what is refused, and that it is refused before the first training."""

import errno
import io
import json
import shutil
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunetv2_dycon.errors import ConfigError, DataError, UserError
from nnunetv2_dycon.self_training import steps
from nnunetv2_dycon.self_training.steps import self_train
from tests.rounds import NAME, ROUNDS, Commands, Killed, checkpoint, first_fold, raw, start


@pytest.mark.parametrize("options", [{"repeat": 2}, {"epochs": (500, 250)}, {"keep_empty": True}])
def test_other_settings_need_other_ids(monkeypatch, root, options):
    start(monkeypatch, root, commands=Commands(root, empty=("u_02",)))
    with pytest.raises(DataError, match=r"with other settings \(.* now .*\); type --as another id than 911") as caught:
        start(monkeypatch, root, commands=Refusing(), **options)
    assert "\n" not in str(caught.value)


class Refusing:
    def __call__(self, words, *_, **__):
        raise AssertionError(f"{words[0]} was started")


@pytest.mark.parametrize("kill_at", [0, 1])
def test_an_id_is_taken_before_the_first_training(monkeypatch, root, kill_at):
    with pytest.raises(Killed):
        start(monkeypatch, root, commands=Commands(root, kill_at))
    for options, said in (
        ({"epochs": (250, 250)}, r"nnUNetTrainer_500epochs.*, now .*nnUNetTrainer_250epochs"),
        ({"rounds": 2}, r"rounds \[911\], now \[911, 912\]"),
        ({"fold": "all"}, r"--as 911 belongs to .*/Dataset911_Tiny_fold0_self1; choose a free id: --as 912$"),
    ):
        with pytest.raises(DataError, match=said):
            start(monkeypatch, root, commands=Refusing(), **options)
    start(monkeypatch, root)


def test_an_id_that_another_self_training_took_a_moment_ago_is_refused(monkeypatch, root):
    take = steps.take_ids

    def late(trainings):
        (root / "nnUNet_results" / "Dataset911_Tiny_foldall_self1").mkdir()
        take(trainings)

    monkeypatch.setattr(steps, "take_ids", late)
    with pytest.raises(
        DataError, match=r"--as 911 belongs to .*/Dataset911_Tiny_foldall_self1; choose a free id: --as 912$"
    ):
        start(monkeypatch, root, commands=Refusing())
    assert not (root / "nnUNet_results" / ROUNDS[0]).exists()


def test_a_round_whose_first_training_is_gone_is_not_trained_for_in_vain(monkeypatch, root):
    start(monkeypatch, root)
    shutil.rmtree(first_fold(root))
    with pytest.raises(
        DataError, match=r"checkpoint_final.pth is gone; type --as another id than 911, or delete"
    ) as caught:
        start(monkeypatch, root, commands=Refusing())
    for left in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert str(root / left / ROUNDS[0]) in str(caught.value)
        shutil.rmtree(root / left / ROUNDS[0])
    start(monkeypatch, root)


def test_pseudo_labels_of_another_checkpoint_are_refused(monkeypatch, root):
    start(monkeypatch, root)
    checkpoint(first_fold(root) / "checkpoint_final.pth", "trained again")
    with pytest.raises(DataError, match="predicted by another state"):
        start(monkeypatch, root)


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_records_of_another_form_are_one_line(monkeypatch, root, content):
    start(monkeypatch, root)
    record = first_fold(root) / "pseudo_labels.json"
    (claim,) = (root / "nnUNet_results").glob("*/self_train.json")
    for path, said in ((claim, "self_train.json is "), (record, "predicted by another state|made with other")):
        before = path.read_text()
        path.write_text(content)
        if content == "{}" or path == claim:
            with pytest.raises(DataError, match=said):
                start(monkeypatch, root)
        else:
            start(monkeypatch, root)  # it is as if it were not there: counted again
        path.write_text(before)


def test_a_data_set_that_was_planned_again_is_refused(monkeypatch, root):
    start(monkeypatch, root)
    path = root / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["batch_size"] = 7
    path.write_text(json.dumps(plans))
    with pytest.raises(DataError, match=r"plans of .* differ from those of .* in configurations: restore the plans"):
        start(monkeypatch, root)


def test_what_an_earlier_data_set_of_the_id_left_is_refused(monkeypatch, root):
    start(monkeypatch, root)
    shutil.rmtree(raw(root))
    for left in ("nnUNet_results", "nnUNet_preprocessed"):
        with pytest.raises(DataError, match=rf"{left}/Dataset911.* is from an earlier data set of this id; type"):
            start(monkeypatch, root)
        shutil.rmtree(root / left / ROUNDS[0])
    start(monkeypatch, root)


def test_a_command_that_predicts_too_little_is_told(monkeypatch, root):
    class Lazy(Commands):
        def predict(self, words):
            super().predict(words)
            (Path(self.option(words, "-o")) / "u_02.nii.gz").unlink()

    with pytest.raises(DataError, match=r"u_02.nii.gz was not predicted \(1 such"):
        start(monkeypatch, root, commands=Lazy(root))
    assert not raw(root).exists()


def edit_splits(root, *folders, **fold):
    drop_splits(root)
    for folder in folders or ("nnUNet_preprocessed", "nnUNet_raw"):
        (root / folder / NAME / "splits_final.json").write_text(json.dumps([fold]))


def edit_plans(root, **entries):
    path = root / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def prepared(root, name):
    return root / "nnUNet_preprocessed" / NAME / "nnUNetPlans_3d_fullres" / name


def replace(path, text):
    path.write_text(text)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def fill(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine), path)


def move(folder, name, other):
    (folder / name).rename(folder / other)


def drop_splits(root):
    for folder in ("nnUNet_preprocessed", "nnUNet_raw"):
        (root / folder / NAME / "splits_final.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("prepare", "options", "said"),
    [
        (lambda root: shutil.rmtree(raw(root, NAME) / "imagesUn"), {}, "imagesUn"),
        (lambda root: shutil.rmtree(root / "nnUNet_preprocessed" / NAME), {}, "nnUNetv2_plan_and_preprocess -d 901"),
        (
            lambda root: shutil.rmtree(root / "nnUNet_preprocessed" / NAME / "nnUNetPlans_3d_fullres"),
            {},
            "nnUNetv2_plan_and_preprocess -d 901",
        ),
        (lambda root: edit_splits(root, train=["l_00"], val=["l_01"], unlabeled=["l_02"]), {}, "nnUNetv2_dycon split"),
        (lambda root: edit_splits(root, train=["l_00", "x"], val=["l_01"]), {}, "'x'"),
        (None, {"fold": 3}, "has no fold 3; type -f 0"),
        (drop_splits, {"fold": 7}, "there is no fold 7: "),
        (None, {"processes": 0}, "-np 0"),
        (None, {"fold": "best"}, "-f best"),
        (None, {"configuration": "3d_none"}, "-c 3d_none"),
        (None, {"repeat": 0}, "--repeat 0"),
        (None, {"repeat": "most"}, "--repeat most"),
        (None, {"dataset_id": 77}, "-d 77"),
        (None, {"plans": "Other"}, "Other.json"),
        (None, {"trainer": "nnUNetTrainerDyCON"}, "nnUNetTrainerLabeledOnly"),
        (None, {"device": "gpu"}, "-device gpu: torch has no such device here; type -device .*cpu"),
        (lambda root: edit_plans(root, image_reader_writer="MyIO"), {}, "MyIO.*nnUNetv2_plan_and_preprocess -d 901"),
        (lambda root: replace(root / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json", "{}"), {}, "no configurations"),
        (lambda root: replace(root / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json", "[]"), {}, "no configurations"),
        (
            lambda root: replace(raw(root, NAME) / "dataset.json", "{}"),
            {},
            'dataset.json has no "labels"; add a number for each name',
        ),
        (lambda root: replace(raw(root, NAME) / "dataset.json", "[1"), {}, "dataset.json cannot be read"),
        # what only a later step would meet
        (lambda root: cut(raw(root, NAME) / "imagesUn/u_01_0000.nii.gz"), {}, "u_01_0000.nii.gz cannot be read"),
        (lambda root: cut(raw(root, NAME) / "imagesUn/u_01_0000.nii.gz"), {"dry_run": True}, "cannot be read"),
        (lambda root: fill(raw(root, NAME) / "imagesUn/u_02_0000.nii.gz"), {}, "u_02_0000.nii.gz has NaN or Inf"),
        (lambda root: move(raw(root, NAME), "imagesUn/u_00_0000.nii.gz", "imagesUn/u_00_0001.nii.gz"), {}, "_0001"),
        (lambda root: move(raw(root, NAME), "imagesUn/u_00_0000.nii.gz", "imagesUn/u_00_seg_0000.nii.gz"), {}, "_seg"),
        (lambda root: (raw(root, NAME) / "imagesUn/u_03_0000.nrrd").touch(), {}, "u_03_0000.nrrd does not end in"),
        (lambda root: (raw(root, NAME) / "labelsTr/l_03.nii.gz").unlink(), {}, "labelsTr/l_03.nii.gz is gone"),
        (lambda root: edit_splits(root, "nnUNet_raw", train=["l_00", "x"], val=["l_01"]), {}, "'x'"),
        (
            lambda root: prepared(root, "l_03.pkl").unlink(),
            {},
            "'l_03' is in .* alone; type: nnUNetv2_preprocess",
        ),
        (lambda root: (drop_splits(root), prepared(root, "l_09.pkl").touch()), {}, "'l_09' is in .* alone"),
        (lambda root: prepared(root, "l_09.pkl").touch(), {"fold": "all"}, "'l_09' is in .* alone"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_the_first_training(
    monkeypatch, root, prepare, options, said
):
    if prepare:
        prepare(root)
    with pytest.raises(UserError, match=said) as caught:
        start(monkeypatch, root, commands=Refusing(), **options)
    assert "\n" not in str(caught.value)
    assert not raw(root).exists()


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_a_folder_that_cannot_be_written_is_said_before_the_first_training(monkeypatch, root, variable):
    def read_only(dir):  # as in tempfile; root can write everywhere
        if dir.name == variable:
            raise OSError(errno.EROFS, "Read-only file system", str(dir))
        return io.BytesIO()

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(DataError, match=f"cannot write .*{variable}: Read-only file system; .* set {variable}"):
        start(monkeypatch, root, commands=Refusing())


def test_a_preprocessed_case_that_no_fold_lists_is_no_hindrance(monkeypatch, root):
    prepared(root, "l_09.pkl").touch()
    start(monkeypatch, root)


def test_images_are_tried_once(monkeypatch, root):
    with pytest.raises(Killed):
        start(monkeypatch, root, commands=Commands(root, kill_at=1))
    cut(raw(root, NAME) / "labelsTr/l_03.nii.gz")
    monkeypatch.setattr(steps, "try_images", None)
    start(monkeypatch, root)


@pytest.mark.parametrize("ids", [(901,), (911, 911), ()])
def test_ids_of_rounds_are_their_own(root, ids):
    with pytest.raises(ConfigError, match="--as"):
        self_train(901, ids, epochs=(250,) * (len(ids) + 1))


def test_a_command_that_ends_well_without_its_results_stops_the_run(monkeypatch, root):
    class Idle(Commands):
        def train(self, words):
            """Do nothing, as a training whose results go elsewhere."""

    with pytest.raises(DataError, match="train on the labelled cases: no error, but the results are missing"):
        start(monkeypatch, root, commands=(commands := Idle(root)))
    assert len(commands.seen) == 1
