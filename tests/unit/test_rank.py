"""Scores of unlabelled cases by hand, their order, and a ranking that goes on where it stopped."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_dycon.annotation import rank as module
from nnunetv2_dycon.annotation.rank import rank
from nnunetv2_dycon.annotation.scores import OneSays, dual_entropy, farthest_first, score_case
from nnunetv2_dycon.errors import ConfigError, DataError, SplitError
from nnunetv2_dycon.inference import full_size, on_image_grid, predict, prepare, write_map
from nnunetv2_dycon.locks import locked
from nnunetv2_dycon.losses.voxels import entropy
from nnunetv2_dycon.trained import open_trained
from tests.trained import NAME, write_training

LN3 = math.log(3)


def test_scores_of_a_case_by_hand() -> None:
    """Four voxels of 0.5 ml: the student sees class 1 twice, the teacher once; class 2 is seen by neither."""
    student = OneSays(np.array([1, 1, 0, 0]), np.array([0, LN3, 0, 0], np.float32), np.array([2.0, 1.5, 0.5]))
    teacher = OneSays(np.array([1, 0, 0, 0]), np.array([0, LN3, LN3, 0], np.float32), np.array([3.0, 1.0, 0.0]))
    scores = score_case(student, teacher, {1: "a", 2: "b"}, 0.5)
    # dual entropy 0, 1, 1/2, 0 over an expected foreground of (2 + 1) / 2 voxels
    assert scores.entropy == pytest.approx(1.5 / 1.5)
    assert scores.entropy_image == pytest.approx(1.5 / 4)
    assert scores.disagreement == pytest.approx(1 - 2 / 3)
    assert scores.expected_ml == pytest.approx(0.75)
    assert scores.segmented
    assert scores.classes["a"] == pytest.approx((0.5, 1 - 2 / 3, 0.625))
    assert scores.classes["b"].expected_ml == pytest.approx(0.125)
    assert math.isnan(scores.classes["b"].entropy)
    assert math.isnan(scores.classes["b"].disagreement)


def test_a_case_without_foreground_counts_as_one_voxel_of_it() -> None:
    nothing = OneSays(np.zeros(4, int), np.full(4, math.log(2) / 2, np.float32), np.array([3.9, 0.1]))
    scores = score_case(nothing, nothing, {1: "a"}, 1.0)
    assert (scores.segmented, scores.disagreement) == (False, 0.0)
    assert scores.entropy == pytest.approx(2.0)


def test_farthest_first_leaves_no_two_of_a_kind() -> None:
    rng = np.random.default_rng(0)
    groups = rng.normal(0, 100, (5, 8))
    points = np.repeat(groups, 6, axis=0) + rng.normal(0, 1, (30, 8))
    chosen = farthest_first(points, 7, 5)
    assert chosen[0] == 7
    assert {at // 6 for at in chosen} == set(range(5))
    assert sorted(farthest_first(points, 0, 99)) == list(range(30))


@pytest.fixture
def fold(tiny: Path) -> Path:
    return write_training()


def table(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "ranking.csv").open()))


def test_unlabelled_cases_are_ordered_with_drafts_and_a_sheet(tiny: Path, fold: Path) -> None:
    done = rank(901, NAME, device="cpu", mirroring=False)
    rows = table(fold / "rank")
    assert [row["case"] for row in rows] == list(done.cases)
    assert sorted(done.cases) == ["u_00", "u_01", "u_02"]
    values = [float(row["entropy"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 3
    for case in done.cases:
        draft = sitk.ReadImage(str(fold / "rank" / "drafts" / f"{case}.nii.gz"))
        image = sitk.ReadImage(str(tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn" / f"{case}_0000.nii.gz"))
        assert draft.GetSize() == image.GetSize()
        assert draft.GetDirection() == pytest.approx(image.GetDirection())
        assert draft.GetOrigin() == pytest.approx(image.GetOrigin())
    assert {path.name for path in (fold / "rank").glob("contact*")} == {"contact_sheet_1.png", "contact_sheet_1.svg"}


def test_entropy_and_draft_are_those_of_the_losses_and_of_the_weights_that_predict(tiny: Path, fold: Path) -> None:
    trained = open_trained(fold / "checkpoint_final.pth")
    files = [tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn" / "u_01_0000.nii.gz"]
    found = []
    for weights in ("student", "teacher"):
        predictor = trained.predictor(weights, torch.device("cpu"), mirroring=False)
        image = prepare(trained, files)
        logits = on_image_grid(trained, predictor.predict_logits_from_preprocessed_data(image.data), image.properties)
        said = predict(trained, predictor, image)
        expected = full_size(trained, entropy(logits[None])[0].numpy(), image.properties)
        np.testing.assert_array_equal(said.entropy, expected)
        np.testing.assert_array_equal(
            said.labels > 0, full_size(trained, logits.argmax(0).numpy(), image.properties) > 0
        )
        assert said.entropy.shape == image.shown.shape
        assert said.expected.sum() == pytest.approx(image.shown.size, rel=1e-5)
        found.append(said)
    assert np.abs(found[0].entropy - found[1].entropy).max() > 1e-3
    dual = dual_entropy(found[0].entropy, found[1].entropy, 3)
    rank(901, NAME, device="cpu", mirroring=False)
    (row,) = (row for row in table(fold / "rank") if row["case"] == "u_01")
    assert float(row["entropy_image"]) == pytest.approx(float(dual.mean()), rel=1e-4)


def test_a_map_lies_on_its_image(tiny: Path, fold: Path, tmp_path: Path) -> None:
    trained = open_trained(fold / "checkpoint_final.pth")
    for case in ("u_00", "u_01"):
        path = tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesUn" / f"{case}_0000.nii.gz"
        image = prepare(trained, [path])
        write_map(tmp_path / "map.nii.gz", image.shown, image.properties)
        one, other = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "map.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(other))
        for part in ("Spacing", "Origin", "Direction"):
            assert getattr(one, f"Get{part}")() == pytest.approx(getattr(other, f"Get{part}")(), abs=1e-5)


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int = 99) -> list[str]:
    """Record which cases are predicted; a run ends at the case after so many, as if interrupted."""
    inner, seen = module._predicted, []

    def predicted(work, case, likeness):
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(case)
        return inner(work, case, likeness)

    monkeypatch.setattr(module, "_predicted", predicted)
    return seen


def test_a_stopped_ranking_goes_on_and_ends_as_one_that_was_not(fold: Path, tmp_path: Path, monkeypatch) -> None:
    rank(901, NAME, device="cpu", mirroring=False, output=tmp_path / "whole")
    with monkeypatch.context() as patched:
        counted(patched, stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            rank(901, NAME, device="cpu", mirroring=False, output=tmp_path / "stopped")
    seen = counted(monkeypatch)
    rank(901, NAME, device="cpu", mirroring=False, output=tmp_path / "stopped")
    assert seen == ["u_01", "u_02"]
    assert (tmp_path / "stopped" / "ranking.csv").read_bytes() == (tmp_path / "whole" / "ranking.csv").read_bytes()
    assert rank(901, NAME, device="cpu", mirroring=False, output=tmp_path / "stopped").cases
    assert len(seen) == 2


def test_a_case_is_predicted_again_if_checkpoint_image_or_record_changed(
    tiny: Path, fold: Path, tmp_path: Path, monkeypatch
) -> None:
    output = tmp_path / "out"
    rank(901, NAME, device="cpu", mirroring=False, output=output)
    seen = counted(monkeypatch)
    (output / "cases" / "u_00.json").write_text("{")
    (output / "drafts" / "u_02.nii.gz").unlink()
    rank(901, NAME, device="cpu", mirroring=False, output=output)
    assert seen == ["u_00", "u_02"]
    rank(901, NAME, device="cpu", mirroring=True, output=output)
    assert len(seen) == 5
    write_training(sharp=5.0)
    rank(901, NAME, device="cpu", mirroring=True, output=output)
    assert len(seen) == 8


def test_more_cases_than_fit_on_a_page_have_further_pages(fold: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "COLUMNS", 1)
    monkeypatch.setattr(module, "ROWS", 2)
    rank(901, NAME, device="cpu", mirroring=False)
    assert len(list((fold / "rank").glob("contact_sheet_*.png"))) == 2
    mine = fold / "rank" / "contact_sheet_of_mine.png"
    mine.touch()
    rank(901, NAME, device="cpu", mirroring=False, number=1)
    assert [path.name for path in (fold / "rank").glob("contact_sheet_[0-9]*.png")] == ["contact_sheet_1.png"]
    assert mine.exists()


def test_a_choice_of_unlike_cases_begins_with_the_first(fold: Path) -> None:
    plain = rank(901, NAME, device="cpu", mirroring=False).cases
    diverse = rank(901, NAME, device="cpu", mirroring=False, diverse=True, number=2).cases
    assert diverse[0] == plain[0]
    assert sorted(diverse) == sorted(plain)


@pytest.mark.parametrize("by", ["disagreement", "expected_ml"])
def test_other_orders(fold: Path, by: str) -> None:
    rank(901, NAME, device="cpu", mirroring=False, by=by)
    values = [float(row[by]) for row in table(fold / "rank")]
    assert values == sorted(values, reverse=True)


def test_what_cannot_be_ranked_is_one_line(tiny: Path, fold: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="-n 0: give at least 1"):
        rank(901, NAME, number=0)
    with pytest.raises(ConfigError, match="-device tpu: type cuda, cpu or mps"):
        rank(901, NAME, device="tpu")
    (fold / "rank").mkdir()
    with locked(fold / "rank", ""), pytest.raises(DataError, match="another rank is writing there"):
        rank(901, NAME, device="cpu")
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    del checkpoint["ssl"]
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    with pytest.raises(DataError, match="holds no teacher"):
        rank(901, NAME, device="cpu")
    checkpoint["network_weights"].popitem()
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    with pytest.raises(DataError, match="weights of another network than the plans next to it"):
        open_trained(fold / "checkpoint_final.pth").network("student")


def test_regions_have_no_entropy_of_classes(fold: Path) -> None:
    content = json.loads((fold.parent / "dataset.json").read_text())
    content |= {"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1, 2]}
    (fold.parent / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="trained on regions"):
        rank(901, NAME, device="cpu")


def test_an_empty_folder_of_unlabelled_images_is_named(fold: Path, monkeypatch) -> None:
    roles = module.raw_cases

    def without(*arguments):
        found = roles(*arguments)
        object.__setattr__(found.roles, "unlabeled", ())
        return found

    monkeypatch.setattr(module, "raw_cases", without)
    with pytest.raises((DataError, SplitError), match="imagesUn holds no image"):
        rank(901, NAME, device="cpu")
