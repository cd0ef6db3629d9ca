"""Grad-CAM against a computation by hand, blended over an image, over the course of a training."""

import builtins
import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from nnunetv2_dycon.command_lines import Model
from nnunetv2_dycon.errors import ConfigError, DataError, UserError
from nnunetv2_dycon.pictures.gradcam import (
    class_score,
    gradcam_of_image,
    gradcam_of_patch,
    layer_name,
    plot_gradcam,
)
from nnunetv2_dycon.trained import course_of, open_trained
from nnunetv2_dycon.trainers.snapshots import snapshot_name, snapshots_of
from tests.trained import NAME, write_training


class Tiny(nn.Module):
    """Two channels c_k = max(0, a_k x), then logits b_jk c_k: one voxel at a time."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        conv = nn.Conv3d if axes == 3 else nn.Conv2d
        self.first = nn.Sequential(conv(1, 2, 1, bias=False), nn.ReLU())
        self.second = conv(2, 3, 1, bias=False)
        with torch.no_grad():
            self.first[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, *[1] * axes))
            self.second.weight.copy_(torch.tensor([[0.0, 1], [2, -1], [-1, 0.5]]).view(3, 2, *[1] * axes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_grad_cam_is_that_of_a_computation_by_hand(shape: tuple[int, ...], position: int) -> None:
    """The voxels' weights sum to 1 and each logit depends on its own voxel, so the mean gradient is b_jk / voxels."""
    network = Tiny(len(shape))
    x = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    found = gradcam_of_patch(network, x, "first", position).numpy()
    a, b = [1.0, -2.0], [[0.0, 1], [2, -1], [-1, 0.5]][position]
    channels = [np.maximum(0, a[k] * x.numpy()[:, 0]) for k in range(2)]
    expected = np.maximum(0, sum(b[k] / np.prod(shape) * channels[k] for k in range(2)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_grad_cam_of_nnunets_network_is_that_of_autograd(tiny: Path) -> None:
    trained = open_trained(write_training() / "checkpoint_final.pth")
    network = trained.network("student")
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    kept = []
    layer = network.get_submodule("decoder.stages.0")
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    (gradient,) = torch.autograd.grad(class_score(network(x), 2).sum(), kept[0])
    handle.remove()
    cam = (gradient.mean((2, 3, 4), keepdim=True) * kept[0]).sum(1, keepdim=True).clamp_min(0)
    expected = nn.functional.interpolate(cam, (16, 16, 16), mode="trilinear")[:, 0]
    found = gradcam_of_patch(network, x, "decoder.stages.0", 2)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-9)
    assert float(found.max()) > 0


def test_the_score_of_a_class_is_its_mean_logit_by_probability() -> None:
    logits = torch.tensor([[[0.0, 0.0], [1.0, 3.0]]])[..., None]
    p = torch.sigmoid(torch.tensor([1.0, 3.0]))
    assert float(class_score(logits, 1)) == pytest.approx(float((p * torch.tensor([1.0, 3.0])).sum() / p.sum()))


def test_an_image_of_one_patch_has_the_map_of_the_patch_and_a_smaller_one_its_middle(tiny: Path) -> None:
    trained = open_trained(write_training() / "checkpoint_final.pth")
    predictor = trained.predictor("student", torch.device("cpu"))
    data = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = gradcam_of_patch(predictor.network, data[None], "decoder.stages.0", 1)
    found = gradcam_of_image(predictor, data, "decoder.stages.0", [1, 2])
    assert found.shape == (2, 16, 16, 16)
    torch.testing.assert_close(found[0], whole[0])
    small = data[:, :13, :, 2:]
    padded = torch.zeros_like(data)
    padded[:, 1:14, :, 1:15] = small
    of_small = gradcam_of_image(predictor, small, "decoder.stages.0", [1])
    expected = gradcam_of_patch(predictor.network, padded[None], "decoder.stages.0", 1)[0][1:14, :, 1:15]
    torch.testing.assert_close(of_small[0], expected)
    assert gradcam_of_image(predictor, torch.cat([data, data], 2), "decoder.stages.0", [1]).shape == (1, 16, 32, 16)


def test_the_course_of_a_training_has_a_map_for_each_class_and_checkpoint(tiny: Path) -> None:
    fold = write_training(snapshots=(2, 4))
    drawn = plot_gradcam(901, NAME, "t_01", device="cpu")
    rows = list(csv.DictReader((fold / "pictures" / "t_01_gradcam.csv").open()))
    assert [(row["epochs"], row["class"]) for row in rows] == [
        (epoch, name) for epoch in ("2", "4") for name in ("class1", "class2")
    ]
    assert {row["layer"] for row in rows} == {"decoder.stages.0"}  # of two stages
    image = sitk.ReadImage(str(tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs" / "t_01_0000.nii.gz"))
    maps = [path for path in drawn.files if path.name.endswith(".nii.gz")]
    assert len(maps) == 4
    for path in maps:
        one = sitk.ReadImage(str(path))
        assert one.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-6)
        values = sitk.GetArrayFromImage(one)
        assert values.min() >= 0
        assert values.max() == pytest.approx(1.0)
    label = sitk.GetArrayFromImage(
        sitk.ReadImage(str(tiny / "nnUNet_raw" / "Dataset901_Tiny" / "labelsTs" / "t_01.nii.gz"))
    )
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(maps[0])))
    assert float(rows[0]["share of the map in the true structure"]) == pytest.approx(
        values[label == 1].sum() / values.sum(), rel=1e-4
    )


def test_a_case_without_a_label_is_outlined_as_predicted(tiny: Path) -> None:
    fold = write_training()
    plot_gradcam(901, NAME, "u_00", labels=["class2"], layer="encoder.stages.1", weights="teacher", device="cpu")
    (row,) = csv.DictReader((fold / "pictures" / "u_00_gradcam.csv").open())
    assert "share of the map in the predicted structure" in row
    assert (row["class"], row["layer"]) == ("class2", "encoder.stages.1")


def test_snapshots_have_names_in_order_and_the_last_is_always_shown(tiny: Path) -> None:
    fold = write_training(snapshots=(2, 4, 10, 12, 20_000))
    assert snapshots_of(fold) == [snapshot_name(e) for e in (2, 4, 10, 12, 20_000)]
    model = Model(NAME, "nnUNetPlans", "3d_fullres")
    assert [m.epochs for m in course_of(901, model, 0, most=3)][-1] == 20_000
    assert [m.epochs for m in course_of(901, model, 0, ["snapshot_epoch0010.pth", "snapshot_epoch0002.pth"])] == [2, 10]
    assert snapshot_name(2) not in {path.name for path in fold.glob("checkpoint_*")}


def test_a_layer_a_class_or_a_checkpoint_that_is_not_there_is_answered_with_the_list(tiny: Path) -> None:
    fold = write_training(snapshots=(2,))
    for options, said in (
        ({"layer": "decoder.stage.1"}, r"no such module; its stages are encoder\.stages\.0, .*decoder\.stages\.1$"),
        ({"labels": ["liver"]}, "--labels liver: the classes are class1, class2"),
        ({"checkpoints": ["snapshot_epoch0003.pth"]}, r"some of: snapshot_epoch0002\.pth, checkpoint_final\.pth"),
        ({"case": "t_1"}, "has no case 't_1'; the nearest names are t_"),
        ({"fold": 2}, "fold_2 holds no training"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            plot_gradcam(901, NAME, device="cpu", **options)
        assert "\n" not in str(caught.value)
    assert not (fold / "pictures").exists()


def test_the_default_layer_is_the_last_but_one_stage_of_the_decoder() -> None:
    network = nn.Module()
    for part, stages in (("encoder", 4), ("decoder", 3)):
        module = nn.Module()
        module.stages = nn.ModuleList(nn.Identity() for _ in range(stages))
        setattr(network, part, module)
    assert layer_name(network, None) == "decoder.stages.1"
    assert layer_name(network, "encoder.stages.3") == "encoder.stages.3"


def test_without_captum_it_says_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = builtins.__import__

    def without(name: str, *arguments, **keywords):
        if name.startswith("captum"):
            raise ImportError(name)
        return inner(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs captum; type: pip install 'nnunetv2-dycon\[pictures\]'"):
        plot_gradcam(901, NAME)


def test_a_data_set_without_test_and_unlabelled_cases_needs_a_name(tiny: Path, monkeypatch) -> None:
    from nnunetv2_dycon.pictures import gradcam

    write_training()
    inner = gradcam.raw_cases

    def without(*arguments):
        found = inner(*arguments)
        for role in ("test", "unlabeled"):
            object.__setattr__(found.roles, role, ())
        return found

    monkeypatch.setattr(gradcam, "raw_cases", without)
    with pytest.raises(DataError, match="neither test cases nor unlabelled ones; name a case"):
        plot_gradcam(901, NAME, device="cpu")
