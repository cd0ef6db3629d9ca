"""A whole run with stand-ins for nnU-Net's commands."""

import json
import logging
import shlex
import shutil
from collections import Counter

import numpy as np
import pytest

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.self_training import running
from nnunetv2_dycon.self_training.steps import self_train
from tests.datasets import no_pools
from tests.rounds import (
    CASES,
    NAME,
    ROUNDS,
    Commands,
    names,
    raw,
    recorded,
    splits,
    start,
)


def test_a_round_is_labelled_validation_and_pseudo_labelled_cases(monkeypatch, root):
    result, commands = start(monkeypatch, root)
    assert [words[0].removeprefix("nnUNetv2_") for words in commands.seen] == [
        *("train", "predict", "move_plans_between_datasets", "preprocess", "train")
    ]
    assert commands.option(commands.seen[1], "-i") == str(raw(root, NAME) / "imagesUn")
    new, old = raw(root), raw(root, NAME)
    fold = root / "nnUNet_results" / NAME / "nnUNetTrainer_500epochs__nnUNetPlans__3d_fullres" / "fold_0"
    for place in ("imagesTr", "labelsTr"):
        assert names(new / place) == ["l_00", "l_01", "l_02", "l_03", *CASES]
    assert names(new / "imagesUn") == []
    assert names(new / "imagesTs") == names(new / "labelsTs") == ["t_00", "t_01"]
    for case in CASES:
        assert (new / f"imagesTr/{case}_0000.nii.gz").samefile(old / f"imagesUn/{case}_0000.nii.gz")
        assert (new / f"labelsTr/{case}.nii.gz").samefile(fold / f"pseudo_labels/{case}.nii.gz")
    for case in ("l_00", "l_03"):
        assert (new / f"labelsTr/{case}.nii.gz").samefile(old / f"labelsTr/{case}.nii.gz")
    assert splits(root) == [{"train": ["l_00", "l_01", "l_02", *CASES], "val": ["l_03"]}]
    content = json.loads((root / "nnUNet_preprocessed" / ROUNDS[0] / "dataset.json").read_text())
    assert content["numTraining"] == 7
    assert content["labels"] == json.loads((old / "dataset.json").read_text())["labels"]
    assert result.parent.parent.name == ROUNDS[0]
    assert (result / "checkpoint_final.pth").is_file()


def test_the_arms_have_the_same_plans(monkeypatch, root):
    start(monkeypatch, root, rounds=2)
    first = json.loads((root / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json").read_text())
    for name in ROUNDS:
        plans = json.loads((root / "nnUNet_preprocessed" / name / "nnUNetPlans.json").read_text())
        assert plans == {**first, "dataset_name": name}


def test_a_second_round_takes_the_pseudo_labels_of_the_first_ones_model(monkeypatch, root):
    _, commands = start(monkeypatch, root, rounds=2, epochs=(250, 250, 500))
    trainings = [words for words in commands.seen if words[0] == "nnUNetv2_train"]
    assert [words[1] for words in trainings] == ["901", "911", "912"]
    lengths = [commands.option(words, "-tr") for words in trainings]
    assert lengths == ["nnUNetTrainer_250epochs", "nnUNetTrainer_250epochs", "nnUNetTrainer_500epochs"]
    predictions = [words for words in commands.seen if words[0] == "nnUNetv2_predict"]
    assert [commands.option(words, "-d") for words in predictions] == ["901", "911"]
    assert {commands.option(words, "-i") for words in predictions} == {str(raw(root, NAME) / "imagesUn")}
    first = root / "nnUNet_results" / ROUNDS[0] / "nnUNetTrainer_250epochs__nnUNetPlans__3d_fullres/fold_0"
    label = raw(root, ROUNDS[1]) / "labelsTr/u_00.nii.gz"
    assert label.samefile(first / "pseudo_labels/u_00.nii.gz")
    facts = recorded(root, ROUNDS[1])
    assert (facts["round"], facts["epochs"], facts["total_epochs"]) == (2, [250, 250, 500], 1000)
    assert facts["teacher"]["dataset"] == ROUNDS[0]
    assert facts["labeled"] == ["l_00", "l_01", "l_02"]
    assert sorted(set(splits(root, ROUNDS[1])[0]["train"])) == ["l_00", "l_01", "l_02", *CASES]


def test_cases_that_the_fold_leaves_out_are_nowhere(monkeypatch, root):
    fold = [{"train": ["l_00"], "val": ["l_03"]}]
    (root / "nnUNet_preprocessed" / NAME / "splits_final.json").write_text(json.dumps(fold))
    start(monkeypatch, root)
    assert names(raw(root) / "labelsTr") == ["l_00", "l_03", *CASES]
    assert Counter(splits(root)[0]["train"]) == {"l_00": 3, **dict.fromkeys(CASES, 1)}


def test_with_fewer_cases_than_folds_of_nnunet_each_fold_validates_on_one(monkeypatch, root):
    for folder in ("nnUNet_preprocessed", "nnUNet_raw"):
        (root / folder / NAME / "splits_final.json").unlink()
    start(monkeypatch, root, fold=2)
    name = "Dataset911_Tiny_fold2_self1"
    assert splits(root, name) == [{"train": ["l_00", "l_01", "l_03", *CASES], "val": ["l_02"]}]


@pytest.mark.parametrize(("repeat", "times", "share"), [("half", 3, 0.5), (1, 1, 0.25), (9, 9, 0.75)])
def test_labelled_cases_are_listed_as_often_as_asked(monkeypatch, root, repeat, times, share):
    fold = [{"train": ["l_00"], "val": ["l_03"]}]
    (root / "nnUNet_preprocessed" / NAME / "splits_final.json").write_text(json.dumps(fold))
    start(monkeypatch, root, repeat=repeat)
    assert splits(root)[0]["train"] == ["l_00"] * times + list(CASES)
    assert recorded(root)["repeat"] == times
    assert recorded(root)["labeled_share_of_patches"] == share


def test_stock_draws_a_case_as_often_as_the_fold_lists_it(tiny):
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = tiny / "nnUNet_preprocessed" / NAME
    data = folder / "nnUNetPlans_3d_fullres"
    content = json.loads((folder / "dataset.json").read_text())
    manager = PlansManager(str(folder / "nnUNetPlans.json")).get_label_manager(content)
    dataset = infer_dataset_class(str(data))(str(data), ["l_00", "l_00", "l_00", "l_01"])
    loader = nnUNetDataLoader(dataset, 2, [16] * 3, [16] * 3, manager, 0.33)
    np.random.seed(0)
    drawn = Counter(str(key) for _ in range(1000) for key in loader.get_indices())
    assert set(drawn) == {"l_00", "l_01"}
    assert abs(drawn["l_00"] / 2000 - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    assert set(next(loader)["keys"]) <= {"l_00", "l_01"}


@pytest.mark.parametrize("keep", [False, True])
def test_empty_pseudo_labels_are_left_out_and_named_unless_wanted(monkeypatch, root, caplog, keep):
    caplog.set_level(logging.INFO)
    start(monkeypatch, root, commands=Commands(root, empty=("u_01",)), keep_empty=keep)
    assert ("u_01" in names(raw(root) / "imagesTr")) == keep
    assert ("u_01" in splits(root)[0]["train"]) == keep
    assert recorded(root)["empty"] == {"kept" if keep else "left_out": ["u_01"]}
    assert f"1 pseudo-labels are empty and {'kept' if keep else 'left out'}: u_01" in caplog.text
    assert "class1 is absent from 1 of 3 pseudo-labels" in caplog.text
    assert "class2 is absent from 2 of 3 pseudo-labels" in caplog.text


def test_pseudo_labels_that_are_all_empty_end_the_run(monkeypatch, root):
    with pytest.raises(DataError, match=r"all 3 pseudo-labels .* are empty"):
        start(monkeypatch, root, commands=Commands(root, empty=CASES))
    assert not raw(root).exists()


def test_fold_all_trains_and_validates_on_all_labelled_cases(monkeypatch, root):
    start(monkeypatch, root, fold="all")
    cases = ["l_00", "l_01", "l_02", "l_03"]
    name = "Dataset911_Tiny_foldall_self1"
    assert splits(root, name) == [{"train": [*cases, *CASES], "val": cases, "overlap": True}]


def test_the_log_has_commands_lengths_and_shares(monkeypatch, root, caplog):
    caplog.set_level(logging.INFO)
    start(monkeypatch, root)
    assert "500 + 500 = 1000 epochs" in caplog.text
    assert "3 labelled cases, each listed 1 times, and 3 pseudo-labelled; 50% of training patches" in caplog.text
    model = "-tr nnUNetTrainer_500epochs -p nnUNetPlans -device cpu"
    for line in (
        f"$ nnUNetv2_train 901 3d_fullres 0 {model}",
        f"$ nnUNetv2_predict -d 901 -c 3d_fullres -f 0 {model} -npp 1 -nps 1 -i {raw(root, NAME)}/imagesUn -o ",
        "&& nnUNetv2_move_plans_between_datasets -s 901 -t 911 -sp nnUNetPlans",
        "$ nnUNetv2_preprocess -d 911 -plans_name nnUNetPlans -c 3d_fullres -np 1",
        f"$ nnUNetv2_train 911 3d_fullres 0 {model}",
    ):
        assert line.removeprefix("$ ") in caplog.text


@pytest.mark.parametrize("tests", [True, False])
def test_what_is_next_predicts_the_test_cases_with_the_last_model(monkeypatch, root, tests):
    if not tests:
        shutil.rmtree(raw(root, NAME) / "imagesTs")
    monkeypatch.setattr(running, "call", Commands(root))
    options = {"epochs": (500, 500), "device": "cpu", "processes": 1}
    folder, then = self_train(901, [911], **options)
    words = shlex.split(then)
    assert words[:5] == ["nnUNetv2_predict", "-d", "911", "-c", "3d_fullres"]
    images = str(raw(root, NAME) / "imagesTs") if tests else "IMAGES"
    assert words[-4:] == ["-i", images, "-o", str(folder / "self_training")]
    assert words[words.index("-device") + 1] == "cpu"
    assert self_train(901, [911], dry_run=True, **options).then == "the same command without --dry_run"


def test_nnunet_preprocesses_and_loads_what_a_round_leaves(monkeypatch, root):
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    class Real(Commands):
        def preprocess(self, words):
            with no_pools():
                preprocess_dataset(911, "nnUNetPlans", ["3d_fullres"], [1], show_progress_bar=False)

    start(monkeypatch, root, commands=Real(root))
    from tests.training import make_trainer

    trainer = make_trainer("nnUNetTrainer", dataset=ROUNDS[0])
    train, val = trainer.do_split()
    assert set(train) == {"l_00", "l_01", "l_02", *CASES}
    assert val == ["l_03"]
    trainer.initialize()
    dataset, _ = trainer.get_tr_and_val_datasets()
    label = np.asarray(dataset.load_case("u_00")[1])
    assert set(np.unique(label)) - {-1} == {0, 1, 2}
