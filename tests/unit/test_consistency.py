import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_dycon.losses import voxels
from nnunetv2_dycon.losses.mse import mse
from nnunetv2_dycon.losses.voxels import entropy, entropy_weight, soft_ce_dice, uncl
from tests import oracles
from tests.oracles import relative_error

LOSSES = {"mse": mse, "ce_dice": soft_ce_dice}
ORACLES = {"mse": oracles.mse, "ce_dice": oracles.soft_ce_dice}


def normal(*shape, seed=0, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-80, 80).to(dtype)


def inputs(loss, *shape, seed=0, **how):
    """Student logits, the teacher in the form the loss wants, and voxel weights."""
    teacher = normal(*shape, seed=seed + 1, **how)
    weight = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(seed + 2))
    student = normal(*shape, seed=seed, **how).requires_grad_()
    return student, torch.softmax(teacher, 1) if loss == "ce_dice" else teacher, weight.to(student.dtype)


def with_gradient(function, student, *others):
    value = function(student, *others)
    return value.detach(), torch.autograd.grad(3.0 * value, student)[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("space", [(3, 4), (2, 3, 2)])
@pytest.mark.parametrize("classes", [2, 3, 14])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_are_those_of_the_equations(loss, space, classes, weighted):
    # Where every voxel is saturated, the gradient is a difference of probabilities that float32 rounds to 1: what is
    # left is compared with the rounding of a probability.
    for scale, floor in [(1.0, 0.0), (60.0, torch.finfo(torch.float32).eps)]:
        student, teacher, weight = inputs(loss, 2, classes, *space, scale=scale)
        weight = weight if weighted else None
        value, gradient = with_gradient(LOSSES[loss], student, teacher, weight)
        copy = student.detach().double().requires_grad_()
        wanted, wanted_gradient = with_gradient(ORACLES[loss], copy, teacher, weight)
        assert relative_error(value, wanted) <= 1e-5
        deviation = (gradient - wanted_gradient).abs().max()
        assert deviation <= max(1e-5 * wanted_gradient.abs().max(), floor)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_passes(loss, weighted):
    student, teacher, weight = inputs(loss, 2, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: LOSSES[loss](x, teacher, weight if weighted else None), student)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_wide_and_rounded_once(loss, dtype):
    student, teacher, weight = inputs(loss, 1, 3, 512, 512, dtype=dtype)
    scaled = [
        torch.autograd.grad(65536.0 * LOSSES[loss](x, teacher.to(x.dtype), weight.to(x.dtype)), x)[0]
        for x in (student, student.detach().float().requires_grad_())
    ]
    assert scaled[0].dtype == dtype
    assert relative_error(scaled[0], scaled[1]) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_predictions_are_the_minimum(loss):
    student, _, _ = inputs(loss, 2, 3, 4, 4)
    same = torch.softmax(student.detach(), 1) if loss == "ce_dice" else student.detach().clone()
    _, gradient = with_gradient(LOSSES[loss], student, same)
    assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_and_the_weight_get_no_gradient(loss):
    student, teacher, weight = inputs(loss, 1, 2, 3, 3)
    teacher.requires_grad_()
    weight.requires_grad_()
    LOSSES[loss](student, teacher, weight).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert weight.grad is None
    assert not LOSSES[loss](student.detach(), teacher, weight).requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_a_voxel_of_weight_zero_does_not_matter(loss):
    student, teacher, weight = inputs(loss, 1, 3, 3, 3)
    weight[0, 1, 1] = 0
    value, gradient = with_gradient(LOSSES[loss], student, teacher, weight)
    other = teacher.clone()
    other[0, :, 1, 1] = other[0, :, 1, 1].roll(1)
    assert LOSSES[loss](student, other, weight).item() == value.item()
    assert torch.count_nonzero(gradient[0, :, 1, 1]) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_layout_and_autocast_do_not_matter(loss, monkeypatch):
    student, teacher, weight = inputs(loss, 2, 3, 3, 4, 5)
    value, gradient = with_gradient(LOSSES[loss], student, teacher, weight)
    monkeypatch.setattr(voxels, "_CPU_BLOCK", 21)
    layout = student.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        there = with_gradient(LOSSES[loss], layout, teacher, weight)
    assert relative_error(there[0], value) <= 1e-6
    assert relative_error(there[1], gradient) <= 1e-6


def test_a_foreground_class_that_neither_sees_costs_nothing():
    student = torch.tensor([20.0, -20.0, -20.0]).view(1, 3, 1, 1).repeat(1, 1, 3, 3)
    assert soft_ce_dice(student, torch.softmax(student, 1)).item() == pytest.approx(0, abs=1e-6)


def test_hard_labels_that_the_student_misses_cost_a_whole_dice():
    q = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).repeat(1, 1, 100, 100)
    student = torch.tensor([40.0, -40.0]).view(1, 2, 1, 1).repeat(1, 1, 100, 100)
    assert soft_ce_dice(student, q).item() == pytest.approx(80 + 1, abs=1e-3)


def test_mse_with_the_entropy_weight_is_the_guarded_consistency():
    student, teacher, _ = inputs("mse", 2, 3, 4, 4)
    weight = entropy_weight(student, teacher, beta=2.0)
    value, gradient = with_gradient(mse, student, teacher, weight)
    guarded = uncl(student, teacher, beta=2.0, form="guarded").consistency
    assert value.item() == pytest.approx(guarded.item(), rel=1e-6)
    assert relative_error(gradient, torch.autograd.grad(3.0 * guarded, student)[0]) <= 1e-6


@pytest.mark.parametrize("classes", [2, 3, 14])
def test_entropy_is_that_of_the_equation_and_detached(classes):
    x = normal(2, classes, 2, 3, scale=5.0).requires_grad_()
    h = entropy(x)
    reference = [oracles.entropy_of(oracles.log_probabilities(x[at].detach())) for at in oracles.voxels(x)]
    assert h.shape == (2, 2, 3)
    assert relative_error(h.detach().flatten(), torch.stack(reference)) <= 1e-5
    assert not h.requires_grad


def test_entropy_goes_from_nothing_to_ln_c_in_every_precision():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert entropy(torch.zeros(1, 14, 2, 2, dtype=dtype)).max().item() == pytest.approx(math.log(14), rel=1e-6)
        sure = torch.tensor([80.0, -80.0], dtype=dtype).view(1, 2, 1, 1)
        assert entropy(sure).item() == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_do_not_fit_are_named(loss):
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and teacher \(1, 3, 4, 4\)"):
        LOSSES[loss](x, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"weight \(1, 1, 4, 4\)"):
        LOSSES[loss](x, x, torch.ones(1, 1, 4, 4))


@settings(max_examples=30, deadline=None)
@given(loss=st.sampled_from(sorted(LOSSES)), classes=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_order_of_voxels_images_and_foreground_classes_does_not_matter(loss, classes, seed):
    student, teacher, weight = inputs(loss, 3, classes, 4, 5, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    value = LOSSES[loss](student, teacher, weight).item()
    assert value >= 0
    for axis in range(4):
        order = torch.randperm(student.shape[axis], generator=generator)
        if axis == 1:
            order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(classes - 1, generator=generator)])
        moved = [x.index_select(axis, order) for x in (student, teacher)]
        w = weight if axis == 1 else weight.index_select(max(axis - 1, 0), order)
        assert LOSSES[loss](*moved, w).item() == pytest.approx(value, rel=1e-9)
