"""An exported model is stock nnU-Net's, with the weights that were asked for, and whole or absent."""

from pathlib import Path

import pytest
import torch

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.export import export_model
from tests.madeup_runs import DATASET, make_dataset, make_training

TRAINER = "nnUNetTrainerDyCON"


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch) -> list[Path]:
    """Folders of folds 0 and 1 with student weights 10 and 11 and teacher weights 20 and 21."""
    make_dataset(tmp_path, monkeypatch)
    results = str(tmp_path / "nnUNet_results")
    monkeypatch.setattr("nnunetv2.utilities.file_path_utilities.nnUNet_results", results)  # read at its import
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


def test_a_file_that_is_missing_is_named_and_nothing_is_written(trainings: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fold_2/checkpoint_final\.pth does not exist; train it first: .* 2 -tr"):
        export_model(DATASET, TRAINER, folds=(0, 2), output=tmp_path / "model")
    (trainings[0].parent / "plans.json").unlink()
    with pytest.raises(DataError, match=r"3d_fullres has no plans\.json; restore"):
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
