"""What cannot be trained ends in one line that says what to type."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nnunetv2_dycon.errors import ConfigError, DataError, UserError
from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits
from tests.training import begin, make_trainer, steps


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def tiny_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make and plan a data set of one kind, with nnU-Net's folders set."""

    def make(**kind: Any) -> Path:
        for name, folder in environment(tmp_path).items():
            monkeypatch.setenv(name, folder)
        make_dataset(tmp_path, labeled=2, unlabeled=2, **kind)
        return plan_and_preprocess(root=tmp_path)

    return make


def test_region_based_labels(tiny_variant) -> None:
    tiny_variant(regions=True)
    with pytest.raises(ConfigError) as error:
        begin(make_trainer("nnUNetTrainerDyCON_epochs1", fold="all"))
    assert "regions_class_order" in one_line(error)
    assert "-tr nnUNetTrainerLabeledOnly" in one_line(error)


def test_regions_cannot_be_pasted(tiny_variant) -> None:
    tiny_variant(regions=True)
    with pytest.raises(ConfigError) as error:
        begin(make_trainer("nnUNetTrainerLabeledOnly_paste0p5_epochs1_iters1", fold="all"))
    assert "option paste" in one_line(error)


def test_the_control_trains_regions_as_stock_does(tiny_variant) -> None:
    tiny_variant(regions=True)
    t = begin(make_trainer("nnUNetTrainerLabeledOnly_epochs1_iters1", fold="all"))
    steps(t, 1)
    t.validation_step(next(t.dataloader_val))


@pytest.mark.parametrize("method", ["nnUNetTrainerDyCON", "nnUNetTrainerDyCON_viewcopy_paste"])
def test_ignore_label_trains_and_validates(tiny_variant, method: str) -> None:
    tiny_variant(ignore=True)
    t = begin(make_trainer(f"{method}_epochs1_iters2_valiters1", fold="all"))
    done = steps(t, 2)
    assert all(abs(step["loss"]) < 100 for step in done)
    output = t.validation_step(next(t.dataloader_val))
    # with equal weights the teacher's counts equal the student's: the ignore label is masked for both
    t.method.start(t.network)
    output = t.validation_step(next(t.dataloader_val))
    assert (output["tp_hard"] == output["teacher_tp_hard"]).all()
    assert (output["fp_hard"] == output["teacher_fp_hard"]).all()


def test_several_channels_train(tiny_variant) -> None:
    tiny_variant(channels=2)
    steps(begin(make_trainer("nnUNetTrainerDyCON_epochs1_iters1", fold="all")), 1)


def changed_plans(folder: Path, **entries: Any) -> dict[str, Any]:
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans = copy.deepcopy(plans)
    plans["configurations"]["3d_fullres"].update(entries)
    return plans


def test_cascade(tiny: Path) -> None:
    folder = tiny / "nnUNet_preprocessed" / "Dataset901_Tiny"
    plans = changed_plans(folder)
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    with pytest.raises(ConfigError) as error:
        begin(make_trainer("nnUNetTrainerDyCON", plans=plans, configuration="3d_cascade_fullres"))
    assert "cascade" in one_line(error)
    assert "3d_fullres" in one_line(error)


class NoStages(nn.Module):
    """A network without `encoder.stages`, as transformer trainers have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv3d(1, 3, 3, padding=1)
        self.decoder = nn.Identity()
        self.decoder.deep_supervision = False

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(("options", "fits"), [("", False), ("_wfecl0", True)])
def test_architecture_without_encoder_stages(tiny: Path, monkeypatch, options: str, fits: bool) -> None:
    t = make_trainer(f"nnUNetTrainerDyCON_epochs1_iters1{options}")
    t.enable_deep_supervision = False

    def build(plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision):
        return NoStages()

    monkeypatch.setattr(type(t), "build_network_architecture", staticmethod(build))
    if fits:
        steps(begin(t), 1)
        return
    with pytest.raises(ConfigError) as error:
        begin(t)
    assert "encoder.stages" in one_line(error)
    assert "_wfecl0" in one_line(error)


def test_stage_that_does_not_exist(tiny: Path) -> None:
    with pytest.raises(ConfigError) as error:
        begin(make_trainer("nnUNetTrainerDyCON_stage9"))
    assert "stage9" in one_line(error)
    assert "0 to 2" in one_line(error)


def test_no_unlabeled_images_at_all(tiny_variant, tmp_path: Path) -> None:
    tiny_variant()
    images = tmp_path / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn"
    images.rename(images.with_name("elsewhere"))
    with pytest.raises(DataError) as error:
        begin(make_trainer("nnUNetTrainerDyCON_epochs1", fold="all"))
    assert "imagesUn" in one_line(error)


def test_unlabeled_case_named_like_a_labeled_one(tiny_variant, tmp_path: Path) -> None:
    tiny_variant()
    images = tmp_path / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn"
    (images / "u_00_0000.nii.gz").rename(images / "l_00_0000.nii.gz")
    with pytest.raises(UserError) as error:
        begin(make_trainer("nnUNetTrainerDyCON_epochs1", fold="all"))
    assert "imagesUn" in one_line(error)
    assert "imagesTr" in one_line(error)


def test_changed_image_is_prepared_anew_at_the_start(tiny_variant, tmp_path: Path, capsys) -> None:
    import os

    tiny_variant()
    begin(make_trainer("nnUNetTrainerDyCON_epochs1", fold="all"))
    image = tmp_path / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn" / "u_00_0000.nii.gz"
    os.utime(image, (1, 1))
    capsys.readouterr()
    begin(make_trainer("nnUNetTrainerDyCON_epochs1", fold="all"))
    assert "Unlabelled images are stale" in capsys.readouterr().out


def test_cutmix_with_one_unlabeled_patch(tiny: Path) -> None:
    t = make_trainer("nnUNetTrainerDyCON_viewcutmix_intensity_unlabeledbatch1")
    with pytest.raises(ConfigError) as error:
        begin(t)  # before any step
    assert "unlabeledbatch2" in one_line(error)


@pytest.mark.parametrize("name", ["LabeledOnly_paste0p5", "BCP", "MeanTeacher_paste0p5"])
def test_pastes_among_labelled_patches_with_one_of_them(tiny: Path, name: str) -> None:
    t = make_trainer(f"nnUNetTrainer{name}_batch1")
    with pytest.raises(ConfigError) as error:
        begin(t)  # before any step
    assert "batch2" in one_line(error)
    assert "paste0" in one_line(error)


def test_pastes_at_the_start_with_one_labelled_patch(tiny: Path) -> None:
    t = begin(make_trainer("nnUNetTrainerBCP_pretrain0p2_paste0_batch1"))
    with pytest.raises(ConfigError) as error:
        steps(t, 1)
    assert "pretrain0" in one_line(error)


@pytest.mark.parametrize("variable", ["nnUNet_results", "nnUNet_preprocessed"])
def test_folders_that_are_not_set(tiny: Path, monkeypatch, variable: str) -> None:
    made = make_trainer("nnUNetTrainerDyCON")
    plans, dataset_json = {**made.plans_manager.plans, "continue_training": False}, made.dataset_json
    monkeypatch.delenv(variable)
    with pytest.raises(DataError) as error:
        type(made)(plans, "3d_fullres", 0, dataset_json, made.device)
    assert f"export {variable}=/path/to/{variable}" in one_line(error)


def test_results_folder_that_cannot_be_written(tiny: Path, monkeypatch) -> None:
    def refuse(path: str, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.makedirs", refuse)
    with pytest.raises(DataError) as error:
        make_trainer("nnUNetTrainerDyCON")
    assert "Permission denied" in one_line(error)
    assert "export nnUNet_results=" in one_line(error)


def test_a_name_in_two_roles_stops_the_control_too(tiny_variant, tmp_path: Path) -> None:
    tiny_variant()
    images = tmp_path / "nnUNet_raw" / "Dataset901_Tiny"
    (images / "imagesTs" / "t_00_0000.nii.gz").rename(images / "imagesTs" / "l_00_0000.nii.gz")
    with pytest.raises(UserError) as error:
        begin(make_trainer("nnUNetTrainerLabeledOnly_epochs1", fold="all"))
    assert "imagesTs" in one_line(error)


def test_a_split_file_put_into_the_raw_folder_after_planning_counts(tiny_variant, tmp_path: Path, capsys) -> None:
    folder = tiny_variant()
    write_splits(tmp_path, "Dataset901_Tiny", train=["l_00"], val=["l_00"], unlabeled=["l_01"])
    assert not (folder / "splits_final.json").exists()
    t = begin(make_trainer("nnUNetTrainerDyCON_epochs1"))
    assert t.unlabeled.names == ("u_00", "u_01", "l_01")
    assert list(t.dataloader_train.data_loader.labeled.indices) == ["l_00"]
    assert "planning saw" in capsys.readouterr().out


def test_fewer_cases_than_stock_has_folds(tiny_variant, capsys) -> None:
    folder = tiny_variant()
    t = begin(make_trainer("nnUNetTrainerDyCON_epochs1"))
    assert "too few for 5 folds" in capsys.readouterr().out
    assert json.loads((folder / "splits_final.json").read_text()) == [
        {"train": ["l_01"], "val": ["l_00"]},
        {"train": ["l_00"], "val": ["l_01"]},
    ]
    assert list(t.dataloader_train.data_loader.labeled.indices) == ["l_01"]
