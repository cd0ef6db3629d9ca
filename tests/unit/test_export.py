"""An exported model is stock nnU-Net's, with the weights that were asked for, and whole or absent."""

import re
from pathlib import Path

import pytest
import torch

from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.export import export_model
from tests.madeup_runs import DATASET, LABELED, VALIDATION, make_dataset, make_training, write_splits
from tests.small_disk import run_on_small_disk

TRAINER = "nnUNetTrainerDyCON"


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch) -> list[Path]:
    """Folders of folds 0 and 1 with student weights 10 and 11 and teacher weights 20 and 21."""
    make_dataset(tmp_path, monkeypatch)
    monkeypatch.setattr("nnunetv2_dycon.command_lines.device_flag", lambda: ("-device", "cpu"))
    folders = [make_training(tmp_path, TRAINER, fold=fold) for fold in (0, 1)]
    for fold, folder in enumerate(folders):
        state = torch.load(folder / "checkpoint_final.pth", weights_only=False)
        state["network_weights"] = {"w": torch.tensor(10.0 + fold)}
        state["ssl"]["teacher"] = {"w": torch.tensor(20.0 + fold)}
        state["inference_allowed_mirroring_axes"] = (0, 2)
        torch.save(state, folder / "checkpoint_final.pth")
    return folders


def weights(model: Path) -> dict[str, float]:
    paths = sorted(model.glob("fold_*/checkpoint_final.pth"))
    return {path.parent.name: torch.load(path, weights_only=False)["network_weights"]["w"].item() for path in paths}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("student", {"fold_0": 10, "fold_1": 11}),
        ("teacher", {"fold_0": 20, "fold_1": 21}),
        ("mean", {"fold_0": 10, "fold_1": 11, "fold_2": 20, "fold_3": 21}),
    ],
)
def test_the_folds_have_the_weights_asked_for(trainings: list[Path], tmp_path: Path, kind, expected) -> None:
    model = export_model(DATASET, TRAINER, folds=(0, 1), weights=kind, output=tmp_path / "model")
    assert weights(model) == expected
    assert sorted(path.name for path in model.iterdir()) == sorted([*expected, "dataset.json", "plans.json"])
    for name in ("dataset.json", "plans.json"):
        assert (model / name).read_bytes() == (trainings[0].parent / name).read_bytes()


def test_the_checkpoint_is_stock_nnunets_and_for_prediction_alone(trainings: list[Path], tmp_path: Path) -> None:
    model = export_model(DATASET, TRAINER, output=tmp_path / "model")
    assert torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False) == {
        "network_weights": {"w": torch.tensor(20.0)},
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "device": torch.device("cpu")},
        "inference_allowed_mirroring_axes": (0, 2),
    }


COMMAND = "nnUNetv2_train 501 3d_fullres {} -tr nnUNetTrainerDyCON -device cpu"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"folds": (0, 2)}, f"fold_2 holds no training; trained are -f 0 1; to train it, type: {COMMAND.format(2)}"),
        ({"folds": ("all",)}, f"fold_all holds .*; to train it, type: {COMMAND.format('all')}"),
        ({"folds": (7,)}, "fold_7 holds no training; trained are -f 0 1; there are the folds 0 to 2 and all"),
        ({"folds": ("x",)}, "fold_x holds no training; trained are -f 0 1; there are the folds 0 to 2 and all"),
        ({"checkpoint": "final.pth"}, "fold_0 has no final.pth; give -chk one that it has: checkpoint_final.pth"),
        (
            {"trainer": "nnUNetTrainerDyCOM"},
            f"{DATASET} has no nnUNetTrainerDyCOM__nnUNetPlans__3d_fullres; trained there, give one of them: "
            "-tr nnUNetTrainerDyCON -c 3d_fullres -p nnUNetPlans; -tr nnUNetTrainerBCP_epochs5 -c 3d_low -p Mine",
        ),
        (
            {"trainer": f"../{DATASET}/{TRAINER}"},
            f"{DATASET} has no ../{DATASET}/{TRAINER}__nnUNetPlans__3d_fullres; trained there, give one of them: -tr",
        ),
        (
            {"configuration": "3d_low"},
            "give one of them: -tr nnUNetTrainerDyCON -c 3d_fullres .*; -tr nnUNetTrainerBCP",
        ),
        (
            {"plans": "Mine", "configuration": "3d_low", "trainer": "BCP"},
            "of them: -tr nnUNetTrainerBCP_epochs5 .*; -tr",
        ),
        ({"dataset_id": 77}, f"there is no data set 77; .*nnUNet_results has trainings of {DATASET}; correct -d"),
        ({"dataset_id": "Dataset501_Maed"}, f"no data set Dataset501_Maed; .* trainings of {DATASET}; correct -d"),
        ({"dataset_id": "Made"}, f"no data set Made; .* trainings of {DATASET}; correct -d"),
        (
            {"dataset_id": 502},
            "nothing was trained on Dataset502_Raw; to train it, type: nnUNetv2_train 502 3d_fullres 0",
        ),
        (
            {"dataset_id": 502, "trainer": "nnUNetTrainerDyCom_epochs5"},
            "no trainer .*: type -tr nnUNetTrainerDyCON_epochs5",
        ),
        ({"dataset_id": 502, "trainer": "nnUNetTrainerDyCON_epoch5"}, "unknown option 'epoch5'.* nearest is epochs"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(
    trainings: list[Path], tmp_path: Path, typed: dict[str, object], said: str
) -> None:
    other = make_training(tmp_path, "nnUNetTrainerBCP_epochs5").parent
    other.rename(other.with_name("nnUNetTrainerBCP_epochs5__Mine__3d_low"))
    (tmp_path / "nnUNet_results" / DATASET / "nnUNetTrainerUAMT__nnUNetPlans__3d_fullres" / "fold_0").mkdir(
        parents=True
    )
    (tmp_path / "nnUNet_raw" / "Dataset502_Raw").mkdir()
    write_splits(tmp_path, [{"train": list(LABELED), "val": list(VALIDATION)}] * 3)
    with pytest.raises(UserError) as caught:
        export_model(**{"dataset_id": 501, "trainer": TRAINER, "output": tmp_path / "model", **typed})
    assert re.search(said, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_an_unfinished_training_is_answered_with_the_command_that_continues_it(
    trainings: list[Path], tmp_path: Path
) -> None:
    for name in ("best", "latest"):
        (trainings[0] / "checkpoint_final.pth").rename(trainings[0] / f"checkpoint_{name}.pth")
        with pytest.raises(DataError) as caught:
            export_model(DATASET, TRAINER, output=tmp_path / "model")
        command = f"nnUNetv2_train {DATASET} 3d_fullres 0 -tr {TRAINER} -device cpu --c"
        assert str(caught.value).endswith(f"its training is not finished; type: {command}")
        with pytest.raises(DataError, match=rf"no bset\.pth; give -chk one that it has: checkpoint_{name}\.pth$"):
            export_model(DATASET, TRAINER, output=tmp_path / "model", checkpoint="bset.pth")
        export_model(DATASET, TRAINER, output=tmp_path / f"model_{name}", checkpoint=f"checkpoint_{name}.pth")
        (trainings[0] / f"checkpoint_{name}.pth").rename(trainings[0] / "checkpoint_final.pth")


def test_a_machine_without_any_training_says_so(tmp_path: Path, monkeypatch) -> None:
    make_dataset(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"no data set 77; .*nnUNet_results has no trainings at all; correct -d"):
        export_model(77, TRAINER, output=tmp_path / "model")
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(DataError, match="nnUNet_results is not set; type: export nnUNet_results="):
        export_model(77, TRAINER, output=tmp_path / "model")


def test_a_model_without_its_plans_is_not_exported(trainings: list[Path], tmp_path: Path) -> None:
    (trainings[0].parent / "plans.json").unlink()
    with pytest.raises(DataError, match=r"3d_fullres has no plans\.json; restore"):
        export_model(DATASET, TRAINER, output=tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("content", ["", '{"labels": {', "[]"])
def test_a_model_with_a_damaged_file_is_not_exported(trainings: list[Path], tmp_path: Path, name, content) -> None:
    (trainings[0].parent / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name} (cannot be read|is not a JSON object).*; restore what nnUNetv2"):
        export_model(DATASET, TRAINER, output=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_error_in_the_second_fold_leaves_nothing_and_a_folder_that_exists_is_kept(
    trainings: list[Path], tmp_path: Path
) -> None:
    (trainings[1] / "checkpoint_final.pth").write_bytes(b"broken")
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match="cannot be read as a checkpoint"):
        export_model(DATASET, TRAINER, folds=(0, 1), output=tmp_path / "model")
    assert set(tmp_path.iterdir()) == before
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match="model exists; give -o a new folder"):
        export_model(DATASET, TRAINER, output=tmp_path / "model")


def test_a_training_without_a_teacher_has_a_student_to_export(trainings: list[Path], tmp_path: Path) -> None:
    state = torch.load(trainings[0] / "checkpoint_final.pth", weights_only=False)
    del state["ssl"]
    torch.save(state, trainings[0] / "checkpoint_final.pth")
    with pytest.raises(DataError, match=r"holds no teacher .*; use --weights student"):
        export_model(DATASET, TRAINER, output=tmp_path / "model")
    assert weights(export_model(DATASET, TRAINER, weights="student", output=tmp_path / "model")) == {"fold_0": 10}


FULL = """
import os, sys
from pathlib import Path
from nnunetv2_dycon.checkpoint import read_checkpoint, write_checkpoint
from nnunetv2_dycon.errors import WriteError
from nnunetv2_dycon.export import export_model
import torch

disk = Path(sys.argv[1])
weights = torch.zeros(300_000)
write_checkpoint({"epoch": 1, "w": weights}, disk / "checkpoint_latest.pth")
(disk / "ballast").write_bytes(bytes(2_000_000))
for write in (
    lambda: write_checkpoint({"epoch": 2, "w": weights}, disk / "checkpoint_latest.pth", "then type it again"),
    lambda: export_model(501, "nnUNetTrainerDyCON", output=disk / "model"),
):
    try:
        write()
    except WriteError as error:
        print(error)
print(read_checkpoint(disk / "checkpoint_latest.pth")["epoch"], sorted(os.listdir(disk)))
"""


@pytest.mark.slow
def test_a_full_disk_ends_checkpoint_and_export_in_one_line_each(trainings: list[Path], tmp_path: Path) -> None:
    state = torch.load(trainings[0] / "checkpoint_final.pth", weights_only=False)
    state["ssl"]["teacher"] = {"w": torch.zeros(300_000)}
    torch.save(state, trainings[0] / "checkpoint_final.pth")
    disk = tmp_path / "disk"
    said = run_on_small_disk(disk, 4, FULL, disk).splitlines()
    reason = r"No space left on device \((0\.9|1\.0) MB are free\); make room"
    assert re.fullmatch(rf"cannot write {disk}/checkpoint_latest\.pth: {reason}, then type it again", said[0]), said
    assert re.fullmatch(rf"cannot write {disk}/model: {reason}, or choose another folder", said[1]), said
    assert said[2:] == ["1 ['ballast', 'checkpoint_latest.pth']"]
