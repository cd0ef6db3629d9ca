import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.errors import ConfigError, DataError, UserError
from nnunetv2_dycon.self_training import running
from nnunetv2_dycon.self_training.lengths import share_epochs, trainer_of_length
from nnunetv2_dycon.self_training.steps import self_train
from tests.datasets import environment, no_pools

NAME = "Dataset901_Tiny"
ROUNDS = ("Dataset911_Tiny_fold0_self1", "Dataset912_Tiny_fold0_self2")
CASES = ("u_00", "u_01", "u_02")


# ---- lengths and names ---------------------------------------------------------------------------------------


@given(total=st.integers(1, 5000), rounds=st.integers(1, 4))
def test_the_trainings_together_have_the_total_and_are_nearly_alike(total, rounds):
    if total <= rounds:
        with pytest.raises(ConfigError, match="--epochs"):
            share_epochs([total], rounds)
        return
    each = share_epochs([total], rounds)
    assert len(each) == rounds + 1
    assert sum(each) == total
    assert len(set(each[:-1])) == 1
    assert 0 <= each[-1] - each[0] <= rounds


def test_epochs_may_be_given_for_each_training():
    assert share_epochs([30, 70], 1) == (30, 70)


@pytest.mark.parametrize(("epochs", "rounds"), [([1, 2, 3], 1), ([10, 20], 2), ([10, 0], 1), ([10], 0)])
def test_epochs_that_do_not_fit_the_rounds_are_refused(epochs, rounds):
    with pytest.raises(ConfigError, match=r"--epochs|--as"):
        share_epochs(epochs, rounds)


@pytest.mark.parametrize(
    ("trainer", "epochs", "name"),
    [
        ("nnUNetTrainer", 1000, "nnUNetTrainer"),
        ("nnUNetTrainer", 500, "nnUNetTrainer_500epochs"),
        ("nnUNetTrainer", 1, "nnUNetTrainer_1epoch"),
        ("nnUNetTrainerLabeledOnly", 333, "nnUNetTrainerLabeledOnly_epochs333"),
        ("nnUNetTrainerLabeledOnly_iters5_seed0", 7, "nnUNetTrainerLabeledOnly_iters5_seed0_epochs7"),
    ],
)
def test_a_training_has_the_trainer_of_its_length(trainer, epochs, name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_dycon.trainers.names import trainer_class

    assert trainer_of_length(trainer, epochs) == name
    if "LabeledOnly" in name:
        assert trainer_class(name).settings.epochs == epochs
    else:
        found = recursive_find_trainer_class_by_name(name)
        stock = (epochs == 1000 and found.__name__ == "nnUNetTrainer") or found.__name__.endswith(f"{epochs}epochs")
        assert stock or epochs == 1


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("nnUNetTrainer", "no trainer of 333 epochs.*nnUNetTrainerLabeledOnly"),
        ("nnUNetTrainerDyCON", "nnUNetTrainerLabeledOnly"),
        ("nnUNetTrainer_50epochs", "give nnUNetTrainer"),
        ("nnUNetTrainerLabeledOnly_epochs5", "leave epochs out"),
        ("nnUNetTrainerLabeledOnly_itres5", "nearest is 'iters'|iters"),
    ],
)
def test_other_trainers_are_refused(trainer, said):
    with pytest.raises(ConfigError, match=said):
        trainer_of_length(trainer, 333)


# ---- a whole run, with stand-ins for nnU-Net's commands -------------------------------------------------------


class Killed(BaseException):
    pass


def checkpoint(path, text):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(zipfile.ZipInfo("weights"), text)  # without the time of writing


class Commands:
    """Do on disk what nnU-Net's commands would do, quickly; `kill_at` stops the one of that number half-way."""

    def __init__(self, root: Path, kill_at: int | None = None, empty: tuple[str, ...] = ()) -> None:
        self.root, self.kill_at, self.empty = root, kill_at, empty
        self.seen: list[list[str]] = []

    def __call__(self, words, lock, *, training=False):
        assert lock is not None
        assert training == (words[0] == "nnUNetv2_train")
        self.seen.append(list(words))
        self.killed = self.kill_at == len(self.seen) - 1
        getattr(self, words[0].removeprefix("nnUNetv2_"))(words)
        if self.killed:
            raise Killed

    def option(self, words, flag):
        return words[words.index(flag) + 1]

    def fold(self, number, words, fold):
        (data,) = (self.root / "nnUNet_raw").glob(f"Dataset{number}_*")
        model = f"{self.option(words, '-tr')}__{self.option(words, '-p')}__3d_fullres"
        return self.root / "nnUNet_results" / data.name / model / f"fold_{fold}"

    def train(self, words):
        fold = self.fold(words[1], words, words[3])
        fold.mkdir(parents=True, exist_ok=True)
        if self.killed:
            (fold / "checkpoint_latest.pth").write_bytes(b"PK\x03\x04 cut short")
            return
        checkpoint(fold / "checkpoint_final.pth", f"{words[1]} {words[3]}")
        (fold / "validation").mkdir(exist_ok=True)
        (fold / "validation" / "summary.json").write_text("{}")

    def predict(self, words):
        images, output = Path(self.option(words, "-i")), Path(self.option(words, "-o"))
        output.mkdir(exist_ok=True)
        (output / "plans.json").write_text("{}")
        for path in sorted(images.iterdir()):
            case = path.name.removesuffix("_0000.nii.gz")
            target = output / f"{case}.nii.gz"
            if "--continue_prediction" in words and target.exists():
                continue
            image = nib.load(path)
            label = np.zeros(image.shape, np.uint8)
            if case not in self.empty:
                label[4:12, 4:12, 4:12] = 1
                label[6:9, 6:9, 6:9] = 2 if case == "u_00" else 1
            nib.save(nib.Nifti1Image(label, image.affine), target)
            if self.killed and case == "u_01":
                target.write_bytes(target.read_bytes()[:-40])
                return

    def move_plans_between_datasets(self, words):
        from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
            move_plans_between_datasets,
        )

        source, target, plans = (self.option(words, flag) for flag in ("-s", "-t", "-sp"))
        with no_pools():
            move_plans_between_datasets(int(source), int(target), plans)
        if self.killed:
            (path,) = (self.root / "nnUNet_preprocessed").glob(f"Dataset{target}_*/{plans}.json")
            path.write_text(path.read_text()[:50])

    def preprocess(self, words):
        (raw,) = (self.root / "nnUNet_raw").glob(f"Dataset{self.option(words, '-d')}_*")
        folder = self.root / "nnUNet_preprocessed" / raw.name
        data = folder / f"{self.option(words, '-plans_name')}_{self.option(words, '-c')}"
        shutil.rmtree(data, ignore_errors=True)
        for place in (data, folder / "gt_segmentations"):
            place.mkdir(exist_ok=True)
        for number, label in enumerate(sorted((raw / "labelsTr").iterdir())):
            if self.killed and number == 2:
                return
            (data / label.name.replace(".nii.gz", ".pkl")).write_text("x")
            shutil.copyfile(label, folder / "gt_segmentations" / label.name)


@pytest.fixture
def root(tiny_data, tmp_path, monkeypatch):
    """Folder with a copy of the tiny data set, planned and preprocessed, for tests that add data sets to it."""
    copy_data(tiny_data, tmp_path, monkeypatch)
    return tmp_path


def copy_data(tiny_data, root, monkeypatch):
    for name, folder in environment(root).items():
        shutil.copytree(tiny_data / name, folder, dirs_exist_ok=True)
        monkeypatch.setenv(name, folder)


def start(monkeypatch, root, rounds=1, commands=None, **options):
    commands = commands or Commands(root)
    monkeypatch.setattr(running, "call", commands)
    options = {"trainer": "nnUNetTrainer", "epochs": (500,) * (rounds + 1), "device": "cpu", "processes": 1} | options
    result = self_train(options.pop("dataset_id", 901), (911, 912)[:rounds], **options)
    return result, commands


def raw(root, name=ROUNDS[0]):
    return root / "nnUNet_raw" / name


def names(folder):
    return sorted(path.name.removesuffix(".nii.gz").removesuffix("_0000") for path in folder.iterdir())


def recorded(root, name=ROUNDS[0]):
    return json.loads((raw(root, name) / "conversion.json").read_text())["self_train"]


def splits(root, name=ROUNDS[0]):
    return json.loads((root / "nnUNet_preprocessed" / name / "splits_final.json").read_text())


def tree(root):
    skip = ("pseudo_labels.json", ".cut", "checkpoint_latest.pth")
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(skip))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


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
    assert splits(root, name) == [{"train": [*cases, *CASES], "val": cases}]


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


def first_fold(root):
    fold = root / "nnUNet_results" / NAME / "nnUNetTrainer_500epochs__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True, exist_ok=True)
    return fold


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
def test_commands_but_for_training_do_not_get_a_number_of_0_processes(monkeypatch, training, value):
    calls = []

    def stand_in(words, **options):
        calls.append((words, options))
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(subprocess, "run", stand_in)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with pytest.raises(DataError, match=r"nnUNetv2_x ended with code 3.*nnUNetv2_x -d 'a b'"):
        running.call(["nnUNetv2_x", "-d", "a b"], 7, training=training)
    ((words, options),) = calls
    assert words[-4:] == ["7", "nnUNetv2_x", "-d", "a b"]
    assert options["env"].get("nnUNet_n_proc_DA") == value
    assert options["pass_fds"] == (7,)


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


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"repeat": 2}, {"epochs": (500, 250)}, {"keep_empty": True}])
def test_other_settings_need_other_ids(monkeypatch, root, options):
    start(monkeypatch, root, commands=Commands(root, empty=("u_02",)))
    with pytest.raises(DataError, match=r"made with other settings.*--as other ids"):
        start(monkeypatch, root, commands=Commands(root, empty=("u_02",)), **options)


def test_pseudo_labels_of_another_checkpoint_are_refused(monkeypatch, root):
    start(monkeypatch, root)
    checkpoint(first_fold(root) / "checkpoint_final.pth", "trained again")
    with pytest.raises(DataError, match="predicted by another state"):
        start(monkeypatch, root)


def test_a_data_set_that_was_planned_again_is_refused(monkeypatch, root):
    start(monkeypatch, root)
    path = root / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["batch_size"] = 7
    path.write_text(json.dumps(plans))
    with pytest.raises(DataError, match="planned again"):
        start(monkeypatch, root)


def test_what_an_earlier_data_set_of_the_id_left_is_refused(monkeypatch, root):
    start(monkeypatch, root)
    shutil.rmtree(raw(root))
    with pytest.raises(DataError, match="earlier data set of this id"):
        start(monkeypatch, root)


def test_a_command_that_predicts_too_little_is_told(monkeypatch, root):
    class Lazy(Commands):
        def predict(self, words):
            super().predict(words)
            (Path(self.option(words, "-o")) / "u_02.nii.gz").unlink()

    with pytest.raises(DataError, match=r"u_02.nii.gz was not predicted \(1 such"):
        start(monkeypatch, root, commands=Lazy(root))
    assert not raw(root).exists()


def edit_splits(root, **fold):
    for folder in ("nnUNet_preprocessed", "nnUNet_raw"):
        (root / folder / NAME / "splits_final.json").write_text(json.dumps([fold]))


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
        (None, {"fold": 3}, "-f 3"),
        (drop_splits, {"fold": 7}, "-f 7: there will be folds 0 to"),
        (None, {"processes": 0}, "-np 0"),
        (None, {"fold": "best"}, "-f best"),
        (None, {"configuration": "3d_none"}, "-c 3d_none"),
        (None, {"repeat": 0}, "--repeat 0"),
        (None, {"repeat": "most"}, "--repeat most"),
        (None, {"dataset_id": 77}, "-d 77"),
        (None, {"plans": "Other"}, "Other.json"),
        (None, {"trainer": "nnUNetTrainerDyCON"}, "nnUNetTrainerLabeledOnly"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(monkeypatch, root, prepare, options, said):
    if prepare:
        prepare(root)
    with pytest.raises(UserError, match=said) as caught:
        start(monkeypatch, root, **options)
    assert "\n" not in str(caught.value)
    assert not raw(root).exists()
    assert not list((root / "nnUNet_results").rglob("*.pth"))  # no training before it is said


@pytest.mark.parametrize("ids", [(901,), (911, 911), ()])
def test_ids_of_rounds_are_their_own(root, ids):
    with pytest.raises(ConfigError, match="--as"):
        self_train(901, ids, epochs=(250,) * (len(ids) + 1))


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


def wait_for(root, process, text, seconds=120):
    until = time.monotonic() + seconds
    while text not in (root / "log.txt").read_text(errors="replace"):
        assert process.poll() is None, (root / "log.txt").read_text(errors="replace")[-3000:]
        assert time.monotonic() < until, text
        time.sleep(0.02)


def weights(root):
    import torch

    (path,) = (root / "nnUNet_results" / ROUNDS[0]).glob("*/fold_0/checkpoint_final.pth")
    return torch.load(path, weights_only=False, map_location="cpu")["network_weights"]


@pytest.mark.slow
def test_real_commands_killed_at_every_stage_end_in_the_weights_of_a_clean_run(root, tmp_path_factory):
    clean = tmp_path_factory.mktemp("clean")
    shutil.copytree(root, clean, dirs_exist_ok=True)
    process = launch(clean)
    assert process.wait() == 0, (clean / "log.txt").read_text(errors="replace")[-3000:]

    for text in ("Epoch 1", "Predicting u_01", "Preprocessing cases", "This split has 6 training", "Epoch 3"):
        (root / "log.txt").write_text("")
        process = launch(root)
        wait_for(root, process, text)
        if text == "This split has 6 training":
            os.killpg(process.pid, signal.SIGSTOP)  # or the short training could end before the second command looks
            os.kill(process.pid, signal.SIGKILL)  # it alone: the training lives, and keeps others out
            process.wait()
            second = launch(root)
            assert second.wait() == 2
            assert "at work" in (root / "log.txt").read_text(errors="replace")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = launch(root)
    assert process.wait() == 0, (root / "log.txt").read_text(errors="replace")[-3000:]

    ours, theirs = weights(root), weights(clean)
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[key] == theirs[key]).all()) for key in ours)
    for case in CASES:
        one, other = (nib.load(raw(where) / f"labelsTr/{case}.nii.gz") for where in (root, clean))
        assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
        assert np.asarray(one.dataobj).any()
