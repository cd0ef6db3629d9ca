"""The losses around a checkpoint: their centre, the directions, and that nothing is left changed."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.errors import UserError
from nnunetv2_dycon.locks import locked
from nnunetv2_dycon.pictures import landscape
from nnunetv2_dycon.pictures.directions import moved_weights, random_direction
from nnunetv2_dycon.pictures.fixed_batch import fixed_patches
from nnunetv2_dycon.pictures.landscape import Losses, plot_landscape
from nnunetv2_dycon.trained import open_trained
from tests.trained import write_training

NAME = "nnUNetTrainerDyCON_epochs4_iters2_valiters1_seed3_snapshots2_viewweak_learned0"
CPU = torch.device("cpu")


@pytest.fixture
def fold(tiny: Path) -> Path:
    preprocess_unlabeled(901, processes=1)
    fold = write_training(NAME)
    path = fold / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["ssl"]["cases"] = {
        "labeled": ["l_00", "l_01", "l_02"],
        "validation": ["l_03"],
        "unlabeled": ["u_00", "u_01"],
    }
    torch.save(content, path)
    return fold


def test_the_losses_are_those_of_the_checkpoint_by_hand(fold: Path) -> None:
    trained = open_trained(fold / "checkpoint_final.pth")
    losses = Losses(trained, 1, 0, CPU)
    found = losses()
    (patches,) = losses.patches
    student, teacher = trained.network("student"), trained.network("teacher")
    with torch.no_grad():
        p, q = (torch.softmax(network(patches.x_u).double(), 1) for network in (student, teacher))
        logits = student(patches.x_l).double()
    # Eq. 1 with beta per unit of H / ln C, at the start of the training; half of the patches are unlabelled
    beta = losses.method.settings.beta.start / math.log(3)
    h = [-(one * one.log()).sum(1) for one in (p, q)]
    consistency = ((p - q).square().sum(1) / ((beta * h[0]).exp() + (beta * h[1]).exp())).mean()
    uncl = losses.method.settings.wuncl * (consistency + beta * (h[0] + h[1]).mean())
    assert found["UnCL"] == pytest.approx(float(uncl), rel=1e-4)
    # cross-entropy, and one minus the mean Dice of foreground classes in the batch or in each patch
    one_hot = nn.functional.one_hot(patches.y_l[:, 0].long(), 3).movedim(-1, 1).double()
    probabilities = torch.softmax(logits, 1)
    cross = -(one_hot * torch.log_softmax(logits, 1)).sum(1).mean()
    axes = (0, 2, 3, 4) if trained.configuration.batch_dice else (2, 3, 4)
    both = (probabilities * one_hot).sum(axes)
    dice = (2 * both + 1e-5) / (probabilities.sum(axes) + one_hot.sum(axes) + 1e-5).clamp_min(1e-8)
    assert found["supervised"] == pytest.approx(float(cross - dice[..., 1:].mean()), rel=1e-4)
    assert found["FeCL"] > 0
    assert found["total"] == pytest.approx(found["UnCL"] + found["FeCL"] + found["supervised"])
    assert losses() == found  # nothing of a call is left


def test_each_filter_of_a_direction_has_the_norm_of_the_networks_filter(tiny: Path) -> None:
    network = nn.Sequential(nn.Conv3d(2, 5, 3), nn.InstanceNorm3d(5, affine=True), nn.ConvTranspose3d(5, 4, 2))
    direction = random_direction(network, torch.Generator().manual_seed(0))
    assert sorted(direction) == ["0.weight", "2.weight"]
    for k in range(5):
        assert direction["0.weight"][k].norm() == pytest.approx(network[0].weight[k].norm().item(), rel=1e-5)
    for k in range(4):  # filters of a transposed convolution are along its second axis
        assert direction["2.weight"][:, k].norm() == pytest.approx(network[2].weight[:, k].norm().item(), rel=1e-5)
    other = random_direction(network, torch.Generator().manual_seed(1))
    a, b = (torch.cat([d[name].flatten() for name in sorted(d)]) for d in (direction, other))
    assert abs(float(nn.functional.cosine_similarity(a, b, dim=0))) < 0.2


def test_weights_are_restored_also_after_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 1, 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    directions = [random_direction(network, torch.Generator().manual_seed(seed)) for seed in (0, 1)]

    def move_and_fail() -> None:
        with moved_weights(network, directions) as move:
            move(0.3, -0.7)
            expected = before["0.weight"] + 0.3 * directions[0]["0.weight"] - 0.7 * directions[1]["0.weight"]
            torch.testing.assert_close(network[0].weight.detach(), expected)
            move(0.0, 0.0)
            assert torch.equal(network[0].weight, before["0.weight"])
            move(1.0, 1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move_and_fail()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "landscape.csv").open()))


def test_the_centre_of_the_surface_is_the_loss_of_the_checkpoint(fold: Path) -> None:
    drawn = plot_landscape(901, NAME, size=3, radius=0.5, device="cpu")
    assert [path.name for path in drawn.files] == ["landscape.png", "landscape.svg", "landscape.csv"]
    rows = table(fold / "pictures")
    assert len(rows) == 9
    (centre,) = (row for row in rows if row["first direction"] == row["second direction"] == "0")
    expected = Losses(open_trained(fold / "checkpoint_final.pth"), 1, 0, CPU)()
    for name in ("UnCL", "FeCL", "supervised", "total"):
        assert float(centre[name]) == pytest.approx(expected[name], rel=1e-5)
    assert len({row["total"] for row in rows}) == 9
    # a corner, with the network moved by hand
    losses = Losses(open_trained(fold / "checkpoint_final.pth"), 1, 0, CPU)
    draws = torch.Generator().manual_seed(0)
    directions = [random_direction(losses.student, draws) for _ in range(2)]
    with torch.no_grad():
        for name, weight in losses.student.named_parameters():
            if name in directions[0]:
                weight += -0.5 * directions[0][name] + 0.5 * directions[1][name]
    (corner,) = (row for row in rows if (row["first direction"], row["second direction"]) == ("-0.5", "0.5"))
    assert float(corner["total"]) == pytest.approx(losses()["total"], rel=1e-4)


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(fold: Path, tmp_path: Path, monkeypatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    plot_landscape(901, NAME, size=3, device="cpu", output=whole)
    inner, calls = Losses.__call__, []

    def counted(self):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return inner(self)

    with monkeypatch.context() as patched:
        patched.setattr(landscape.Losses, "__call__", counted)
        with pytest.raises(KeyboardInterrupt):
            plot_landscape(901, NAME, size=3, device="cpu", output=stopped)
    assert len(json.loads((stopped / "landscape_epoch0001.json").read_text())["points"]) == 4
    calls.clear()
    monkeypatch.setattr(landscape.Losses, "__call__", lambda self: calls.append(1) or inner(self))
    plot_landscape(901, NAME, size=3, device="cpu", output=stopped)
    assert len(calls) == 5
    assert (stopped / "landscape.csv").read_bytes() == (whole / "landscape.csv").read_bytes()
    plot_landscape(901, NAME, size=3, device="cpu", output=stopped)
    assert len(calls) == 5
    (stopped / "landscape_epoch0001.json").write_text("{")
    plot_landscape(901, NAME, size=3, device="cpu", output=stopped, seed=1)
    assert len(calls) == 14
    assert (stopped / "landscape.csv").read_bytes() != (whole / "landscape.csv").read_bytes()


def test_patches_are_the_same_each_time_and_labels_are_of_labelled_cases(fold: Path) -> None:
    trained = open_trained(fold / "checkpoint_final.pth")
    one, other = (fixed_patches(trained, 3, 2, np.random.default_rng(5)) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    assert one.x_l.shape == (3, 1, 16, 16, 16)
    assert one.y_l.shape == (3, 1, 16, 16, 16)
    assert one.x_u.shape == (2, 1, 16, 16, 16)
    assert all((patch > 0).any() for patch in one.y_l)
    assert int(one.y_l.min()) >= 0
    assert not torch.equal(one.x_l, fixed_patches(trained, 3, 2, np.random.default_rng(6)).x_l)
    assert fixed_patches(trained, 1, 0, np.random.default_rng(0)).x_u.shape[0] == 0


def test_what_cannot_be_drawn_is_one_line(fold: Path, tmp_path: Path, monkeypatch) -> None:
    for options, said in (
        ({"size": 4}, "--size 4: give an odd number"),
        ({"radius": 0.0}, "give a radius above 0"),
        ({"checkpoints": ["x.pth"]}, r"has no x\.pth; give --checkpoints some of: checkpoint_final\.pth"),
    ):
        with pytest.raises(UserError, match=said):
            plot_landscape(901, NAME, device="cpu", **options)
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", ""), pytest.raises(UserError, match="another picture is being made there"):
        plot_landscape(901, NAME, device="cpu", output=tmp_path / "out")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    with pytest.raises(UserError, match=r"does not exist; type: nnUNetv2_p.*rocess -d 901 -c 3d_fullres"):
        plot_landscape(901, NAME, device="cpu", output=tmp_path / "out", size=3)
    content = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    del content["ssl"]
    torch.save(content, fold / "checkpoint_final.pth")
    with pytest.raises(UserError, match="was not trained by this package"):
        plot_landscape(901, NAME, device="cpu")
