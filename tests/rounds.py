"""Self-training on the tiny data set, with stand-ins for nnU-Net's commands."""

import json
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunetv2_dycon.self_training import running
from nnunetv2_dycon.self_training.steps import self_train
from tests.datasets import environment, no_pools

NAME = "Dataset901_Tiny"
ROUNDS = ("Dataset911_Tiny_fold0_self1", "Dataset912_Tiny_fold0_self2")
CASES = ("u_00", "u_01", "u_02")


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
        model = f"{self.option(words, '-tr')}__{self.option(words, '-p')}__{words[2]}"
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
        folder = self.root / "nnUNet_preprocessed" / NAME
        reader = recursive_find_reader_writer_by_name(
            json.loads((folder / "nnUNetPlans.json").read_text())["image_reader_writer"]
        )()
        ending = json.loads((folder / "dataset.json").read_text())["file_ending"]
        for path in sorted(images.glob(f"*{ending}")):
            case = path.name.removesuffix(f"_0000{ending}")
            target = output / f"{case}{ending}"
            if "--continue_prediction" in words and target.exists():
                continue
            image, properties = reader.read_images([str(path)])
            label = np.zeros(image.shape[1:], np.uint8)
            if case not in self.empty:
                label[..., 4:12, 4:12] = 1
                label[..., 6:9, 6:9] = 2 if case == "u_00" else 1
            reader.write_seg(label, str(target), properties)
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
            (data / f"{label.name.split('.')[0]}.pkl").write_text("x")
            shutil.copyfile(label, folder / "gt_segmentations" / label.name)


def copy_data(tiny_data, root, monkeypatch):
    for name, folder in environment(root).items():
        shutil.copytree(tiny_data / name, folder, dirs_exist_ok=True)
        monkeypatch.setenv(name, folder)


def start(monkeypatch, root, rounds=1, commands=None, **options):
    commands = commands or Commands(root)
    monkeypatch.setattr(running, "call", commands)
    options = {"trainer": "nnUNetTrainer", "epochs": (500,) * (rounds + 1), "device": "cpu", "processes": 1} | options
    result = self_train(options.pop("dataset_id", 901), (911, 912)[:rounds], **options)
    return result.folder, commands


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


def family(pid):
    """A process and all that it started, whatever their sessions; the process first."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def send(processes, number):
    for one in processes:
        with suppress(ProcessLookupError):
            os.kill(one, number)


def first_fold(root):
    fold = root / "nnUNet_results" / NAME / "nnUNetTrainer_500epochs__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True, exist_ok=True)
    return fold
