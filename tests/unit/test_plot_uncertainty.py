"""Entropy maps in the place of their images, and the error rate that goes with them."""

import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_dycon.errors import ConfigError, DataError, UserError
from nnunetv2_dycon.losses.voxels import uncl
from nnunetv2_dycon.pictures.uncertainty import Maps, Reliability, draw_maps, plot_uncertainty, reliability
from tests.trained import NAME, write_training

LN2 = math.log(2)


def maps_of(entropy: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None, spacing=(1.0, 1.0, 1.0)) -> Maps:
    return Maps("case", np.zeros(entropy.shape), {"student": entropy}, {"student": predicted}, truth, spacing)


def test_wrong_voxels_are_counted_by_entropy_without_those_to_ignore() -> None:
    entropy = np.array([0.0, 0.05, 0.55, 0.55, 1.0, 1.0]).reshape(1, 1, 6) * LN2
    predicted, truth = np.array([0, 1, 1, 1, 0, 1]), np.array([0, 1, 1, 0, 1, -1])
    counted = reliability(maps_of(entropy, predicted.reshape(1, 1, 6), truth.reshape(1, 1, 6)), LN2)["student"]
    voxels, wrong = counted.coarse()
    assert voxels.tolist() == [2, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert wrong.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert reliability(maps_of(entropy, predicted, None), LN2) == {}


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    at, wrong = rng.integers(0, 1000, 300), rng.random(300) < 0.3
    counted = Reliability(np.bincount(at, minlength=1000), np.bincount(at[wrong], minlength=1000))
    pairs = [1.0 * (w > r) + 0.5 * (w == r) for w in at[wrong] for r in at[~wrong]]
    assert counted.area() == pytest.approx(np.mean(pairs))
    assert math.isnan(Reliability(counted.voxels, 0 * counted.wrong).area())


@pytest.fixture
def fold(tiny: Path) -> Path:
    return write_training()


def test_maps_lie_on_their_image_and_dual_is_what_uncl_adds_to_the_loss(tiny: Path, fold: Path) -> None:
    drawn = plot_uncertainty(901, NAME, ["t_00", "u_01"], mirroring=False, device="cpu")
    out = fold / "pictures"
    for case, folder in (("t_00", "imagesTs"), ("u_01", "imagesUn")):
        image = sitk.ReadImage(str(tiny / "nnUNet_raw" / "Dataset901_Tiny" / folder / f"{case}_0000.nii.gz"))
        found = {n: sitk.ReadImage(str(out / f"{case}_entropy_{n}.nii.gz")) for n in ("student", "teacher", "dual")}
        for one in found.values():
            assert one.GetSize() == image.GetSize()
            for part in ("Spacing", "Origin", "Direction"):
                assert getattr(one, f"Get{part}")() == pytest.approx(getattr(image, f"Get{part}")(), abs=1e-5)
        values = {name: sitk.GetArrayFromImage(one) for name, one in found.items()}
        np.testing.assert_allclose(values["dual"], (values["student"] + values["teacher"]) / 2, atol=1e-6)
        assert 0 <= values["dual"].min() < values["dual"].max() <= math.log(3) + 1e-6
    # Eq. 1: the entropy part of UnCL is beta times the mean of both entropies' sum
    logits = torch.randn(2, 1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    part = uncl(logits[0], logits[1], beta=0.7).entropy
    p = torch.softmax(logits, 2)
    dual = -(p * p.log()).sum(2).mean(0)
    assert float(part) == pytest.approx(0.7 * 2 * float(dual.mean()), rel=1e-5)
    assert {path.name for path in drawn.files if path.suffix == ".csv"} == {"uncertainty.csv", "reliability.csv"}
    assert len(drawn.figures) == 3


def test_errors_are_known_of_cases_with_a_label_alone(tiny: Path, fold: Path) -> None:
    drawn = plot_uncertainty(901, NAME, ["u_00"], mirroring=False, device="cpu")
    assert not any(path.name.startswith("reliability") for path in drawn.files)
    assert len(drawn.figures[0].axes) == 3 * 4 + 1  # image and three maps in three slices, and the colour bar
    drawn = plot_uncertainty(901, NAME, ["t_01"], mirroring=False, device="cpu")
    assert len(drawn.figures[0].axes) == 3 * 5 + 1
    rows = list(csv.DictReader((fold / "pictures" / "reliability.csv").open()))
    assert sum(int(row["voxels"]) for row in rows) == 3 * 24**3
    (dual,) = (
        row for row in csv.DictReader((fold / "pictures" / "uncertainty.csv").open()) if row["entropy of"] == "dual"
    )
    wrong = [int(row["wrong voxels"]) for row in rows if row["entropy of"] == "dual"]
    assert sum(wrong) == int(dual["wrong voxels"]) > 0


def test_test_cases_are_the_default_and_a_training_without_teacher_has_one_map(tiny: Path, fold: Path) -> None:
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    del checkpoint["ssl"]
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    drawn = plot_uncertainty(901, NAME, number=1, mirroring=False, device="cpu")
    maps = [path.name for path in drawn.files if path.name.endswith(".nii.gz")]
    assert maps == ["t_00_entropy_student.nii.gz"]


def test_slices_are_where_the_structure_is_or_the_entropy_in_true_proportion() -> None:
    entropy, predicted = np.zeros((9, 4, 4)), np.zeros((9, 4, 4), int)
    entropy[6] = 0.3
    nothing = draw_maps(maps_of(entropy, predicted, None, (4.0, 2.0, 0.5)), LN2)
    assert [axis.get_ylabel() for axis in nothing.axes if axis.get_ylabel().startswith("slice")] == ["slice 6"]
    assert nothing.axes[0].get_aspect() == 4.0
    predicted[2:5, 1:3, 1:3] = 1
    there = draw_maps(maps_of(entropy, predicted, predicted), LN2)
    assert [axis.get_ylabel() for axis in there.axes if axis.get_ylabel().startswith("slice")] == [
        "slice 2",
        "slice 3",
        "slice 4",
    ]


def test_what_cannot_be_drawn_is_one_line(tiny: Path, fold: Path) -> None:
    for options, said in (
        ({"cases": ["t_09"]}, "has no case 't_09'; the nearest names are t_0"),
        ({"number": 0}, "-n 0: give at least 1"),
        ({"checkpoint": "checkpoint_lastest.pth"}, r"give -chk one that it has: checkpoint_final\.pth"),
        ({"fold": 3}, "fold_3 holds no training; trained are -f 0"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            plot_uncertainty(901, NAME, device="cpu", **options)
        assert "\n" not in str(caught.value)
    assert not (fold / "pictures").exists()
    with pytest.raises(ConfigError, match="-device mps: this machine has none"):
        plot_uncertainty(901, NAME, device="mps")


def test_plans_that_cannot_be_used_are_one_line(tiny: Path, fold: Path) -> None:
    """In every picture of a training and in rank, which open it alike."""
    path = fold.parent / "plans.json"
    whole = json.loads(path.read_text())
    lacking = copy.deepcopy(whole)
    del lacking["configurations"]["3d_fullres"]["patch_size"]
    for content, said in (
        ([], "is not a JSON object"),
        ({}, r"cannot be used \(KeyError: 'configurations'\)"),
        ({**whole, "configurations": {}}, "has no configuration 3d_fullres"),
        (lacking, r"cannot be used \(KeyError: 'patch_size'\)"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=rf"plans\.json {said}.*; restore what nnUNetv2_train wrote") as caught:
            plot_uncertainty(901, NAME, device="cpu")
        assert "\n" not in str(caught.value)


def test_a_damaged_image_is_named(tiny: Path, fold: Path, tmp_path: Path, monkeypatch) -> None:
    import shutil

    shutil.copytree(tiny / "nnUNet_raw", tmp_path / "raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    path = tmp_path / "raw" / "Dataset901_Tiny" / "imagesTs" / "t_00_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"t_00_0000\.nii\.gz"):
        plot_uncertainty(901, NAME, ["t_00"], device="cpu")
