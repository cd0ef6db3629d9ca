import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_dycon.losses import voxels
from nnunetv2_dycon.losses.voxels import entropy_weight, uncl
from tests import oracles
from tests.oracles import relative_error

FORMS = {form: partial(uncl, form=form) for form in ("literal", "guarded")}
CHOICES = ("dual", "teacher", "student")
SPACES = ((3, 4), (2, 3, 2))


def logits(*shape, seed=0, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-80, 80).to(dtype)


def pair(*shape, seed=0, **how):
    return logits(*shape, seed=seed, **how).requires_grad_(), logits(*shape, seed=seed + 1, **how)


def expected(student, teacher, form, beta, entropy="dual", mix=(0.7, -1.3)):
    """Both parts and the gradient of a weighted sum of them, by the oracle."""
    copy = student.detach().double().requires_grad_()
    parts = oracles.uncl(copy, teacher, beta=beta, entropy=entropy, guarded=form == "guarded")
    (mix[0] * parts[0] + mix[1] * parts[1]).backward()
    return torch.stack([p.detach() for p in parts]), copy.grad


def measured(student, teacher, form, beta, entropy="dual", mix=(0.7, -1.3)):
    """The same by the code."""
    parts = FORMS[form](student, teacher, beta=beta, entropy=entropy)
    (gradient,) = torch.autograd.grad(mix[0] * parts.consistency + mix[1] * parts.entropy, student)
    return torch.stack([p.detach() for p in parts]), gradient


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entropy", CHOICES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("classes", [2, 3, 14])
def test_values_and_gradients_are_those_of_the_equations(form, entropy, space, classes):
    for beta, scale in [(0.0, 2.0), (0.5, 2.0), (5.0, 0.5)]:
        student, teacher = pair(2, classes, *space, scale=scale)
        values, gradient = measured(student, teacher, form, beta, entropy)
        wanted, wanted_gradient = expected(student, teacher, form, beta, entropy)
        for value, reference in zip(values, wanted, strict=True):
            assert relative_error(value, reference) <= 1e-5
        assert relative_error(gradient, wanted_gradient) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [0, 1])
def test_each_part_has_a_gradient_of_its_own(form, part):
    student, teacher = pair(1, 3, 3, 3)
    mix = (1.0 - part, float(part))
    _, gradient = measured(student, teacher, form, 1.0, mix=mix)
    assert relative_error(gradient, expected(student, teacher, form, 1.0, mix=mix)[1]) <= 1e-5
    (alone,) = torch.autograd.grad(FORMS[form](student, teacher, beta=1.0)[part], student)
    assert torch.equal(alone, gradient)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturated_logits_agree_with_the_equations(form, classes, dtype):
    student, teacher = pair(2, classes, 3, 4, scale=60.0, dtype=dtype)
    values, gradient = measured(student, teacher, form, 2.0)
    wanted, wanted_gradient = expected(student, teacher, form, 2.0)
    assert values.dtype == torch.float32
    assert relative_error(values[0], wanted[0]) <= 1e-5
    assert abs(values[1] - wanted[1]) <= 1e-5 * max(1e-3, wanted[1].item())
    assert gradient.dtype == dtype
    # Saturated voxels have tiny slopes, differences of numbers near 1: one rounding of such a number, over all voxels.
    rounding = torch.finfo(torch.float32).eps / student[:, 0].numel()
    relative = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    deviation = (gradient.double() - wanted_gradient).abs().max()
    assert deviation <= relative * wanted_gradient.abs().max() + rounding


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [5.0, 200.0])
def test_no_finite_logits_give_nan_or_inf(form, dtype, beta):
    corners = torch.tensor(list(itertools.product([-80.0, 0.0, 80.0], repeat=3)), dtype=dtype).T
    grid = torch.stack(torch.meshgrid(torch.arange(27), torch.arange(27), indexing="ij")).flatten(1)
    student = corners[None, :, grid[0]].clone().requires_grad_()
    values, gradient = measured(student, corners[None, :, grid[1]], form, beta)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_high_entropy_of_many_classes_in_float16_stays_finite(form):
    student = torch.zeros(1, 14, 4, 4, dtype=torch.float16, requires_grad=True)
    values, gradient = measured(student, logits(1, 14, 4, 4, dtype=torch.float16), form, 5.0)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_class_that_nobody_predicts_changes_nothing_beside_the_normalisation(form):
    student, teacher = pair(1, 3, 3, 3)
    absent = torch.full((1, 1, 3, 3), -80.0)
    student = torch.cat([student.detach(), absent], 1).requires_grad_()
    teacher = torch.cat([teacher, absent], 1)
    values, gradient = measured(student, teacher, form, 1.0)
    wanted, wanted_gradient = expected(student, teacher, form, 1.0)
    assert relative_error(values, wanted) <= 1e-5
    assert relative_error(gradient, wanted_gradient) <= 1e-5
    assert gradient[:, 3].abs().max() < 1e-30


@pytest.mark.parametrize("form", FORMS)
def test_equal_student_and_teacher_have_no_consistency_loss_and_no_pull(form):
    student, _ = pair(2, 3, 4, 4)
    values, gradient = measured(student, student.detach().clone(), form, 1.0, mix=(1.0, 0.0))
    assert values[0] == 0
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("entropy", CHOICES)
@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0])
def test_gradcheck_passes_for_both_parts_of_the_literal_form(entropy, beta):
    student, teacher = pair(2, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: FORMS["literal"](x, teacher, beta=beta, entropy=entropy), student)


def test_gradcheck_passes_for_the_guarded_form_where_its_weight_is_constant():
    student, teacher = pair(2, 4, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: FORMS["guarded"](x, teacher, beta=0.0), student)
    assert torch.autograd.gradcheck(lambda x: FORMS["guarded"](x, teacher, beta=2.0, entropy="teacher"), student)


@pytest.mark.parametrize("classes", [2, 4, 14])
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_the_gradient_of_the_literal_sum_is_equation_10(classes, beta):
    student, teacher = pair(2, classes, 3, 2, dtype=torch.float64)
    _, gradient = measured(student, teacher, "literal", beta, mix=(1.0, 1.0))
    wanted = oracles.uncl_gradient_eq10(student.detach(), teacher, beta=beta)
    assert relative_error(gradient, wanted) <= 1e-12
    single = measured(student.detach().float().requires_grad_(), teacher.float(), "literal", beta, mix=(1.0, 1.0))[1]
    assert relative_error(single, wanted) <= 1e-5


def binary(p):
    return torch.tensor([math.log(1 - p), math.log(p)]).view(1, 2, 1, 1)


def push(form, student, teacher, beta, mix=(1.0, 1.0)):
    """Direction in which descent moves each student logit."""
    return -measured(student.clone().requires_grad_(), teacher, form, beta, mix=mix)[1]


def test_literal_uncl_pushes_a_wrong_student_away_from_a_sure_teacher():
    assert push("literal", binary(0.3), binary(0.99), 2.0)[0, 1] < 0
    assert push("literal", binary(0.3), binary(0.99), 0.5)[0, 1] > 0
    assert push("guarded", binary(0.3), binary(0.99), 2.0, mix=(1.0, 0.5))[0, 1] > 0


@pytest.mark.parametrize("classes", [2, 4, 14])
@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_guarded_uncl_never_pushes_a_wrong_student_away_from_a_sure_teacher(classes, beta):
    student = logits(1, classes, 4000, 1, seed=3)
    right = torch.randint(classes, (4000,), generator=torch.Generator().manual_seed(4))
    teacher = torch.full((classes, 4000), math.log(0.01 / (classes - 1)))
    teacher[right, torch.arange(4000)] = math.log(0.99)
    wrong = student[0, :, :, 0].argmax(0) != right
    moved = push("guarded", student, teacher[None, :, :, None], beta, mix=(1.0, 0.5))[0, :, :, 0]
    toward = moved[right, torch.arange(4000)][wrong]
    assert wrong.sum() > 1000
    assert (toward >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_gets_no_gradient(form):
    student, teacher = pair(1, 2, 3, 3)
    teacher.requires_grad_()
    sum(FORMS[form](student, teacher, beta=1.0)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not FORMS[form](student.detach(), teacher, beta=1.0).consistency.requires_grad


def test_the_teacher_entropy_weight_carries_no_gradient_of_its_own():
    student, teacher = pair(1, 3, 3, 3)
    _, gradient = measured(student, teacher, "literal", 2.0, "teacher", mix=(0.0, 1.0))
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_is_refused(form):
    student, teacher = pair(1, 2, 2, 2)
    weight = torch.ones((), requires_grad=True)
    loss = weight * FORMS[form](student, teacher, beta=1.0).consistency
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_float16_gradients_take_the_loss_scale_before_they_are_rounded():
    student, teacher = pair(1, 2, 1024, 512, dtype=torch.float16)
    _, gradient = measured(student, teacher, "literal", 0.5, mix=(65536.0, 65536.0))
    wide = measured(student.detach().float().requires_grad_(), teacher.float(), "literal", 0.5, mix=(65536.0, 65536.0))
    assert relative_error(gradient, wide[1]) <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("form", FORMS)
def test_autocast_around_the_loss_changes_no_bit(form):
    student, teacher = pair(2, 3, 4, 4)
    plain = measured(student, teacher, form, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = measured(student, teacher, form, 1.0)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


@pytest.mark.parametrize("form", FORMS)
def test_block_size_and_memory_layout_do_not_matter(form, monkeypatch):
    student, teacher = pair(2, 3, 3, 4, 5)
    values, gradient = measured(student, teacher, form, 1.0)
    monkeypatch.setattr(voxels, "_CPU_BLOCK", 21)
    for layout in (
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
        lambda x: x.repeat_interleave(2, 4)[..., ::2],
    ):
        there = measured(layout(student.detach()).requires_grad_(), layout(teacher), form, 1.0)
        assert relative_error(there[0], values) <= 1e-6
        assert relative_error(there[1], gradient) <= 1e-6


@pytest.mark.parametrize("entropy", CHOICES)
@pytest.mark.parametrize("classes", [2, 3, 14])
def test_the_weight_is_the_guarded_one_and_detached(entropy, classes):
    student, teacher = pair(2, classes, 3, 4)
    weight = entropy_weight(student, teacher, beta=2.0, entropy=entropy)
    assert not weight.requires_grad
    for b, _, x, y in oracles.voxels(student):
        h_s, h_t = (
            oracles.entropy_of(oracles.log_probabilities(z[b, :, x, y].detach())) / math.log(classes)
            for z in (student, teacher)
        )
        first, second = {"dual": (h_s, h_t), "teacher": (h_t, h_t), "student": (h_s, h_s)}[entropy]
        assert weight[b, x, y].item() == pytest.approx(2 / (math.exp(2 * first) + math.exp(2 * second)), rel=1e-5)


def test_the_weight_is_one_where_both_are_sure_and_falls_to_exp_minus_beta():
    sure = torch.tensor([80.0, -80.0]).view(1, 2, 1, 1)
    assert entropy_weight(sure, -sure, beta=3.0).item() == 1.0
    assert entropy_weight(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), beta=3.0).item() == pytest.approx(
        math.exp(-3)
    )


@pytest.mark.parametrize("function", [*FORMS.values(), entropy_weight])
def test_bad_arguments_are_named(function):
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and teacher \(1, 2, 4, 5\)"):
        function(x, torch.zeros(1, 2, 4, 5), beta=1.0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        function(x[:, :1], x[:, :1], beta=1.0)
    with pytest.raises(ValueError, match="beta -1"):
        function(x, x, beta=-1.0)
    with pytest.raises(ValueError, match="'both'"):
        function(x, x, beta=1.0, entropy="both")


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    entropy=st.sampled_from(CHOICES),
    classes=st.integers(2, 5),
    beta=st.floats(0, 5),
    seed=st.integers(0, 10**6),
)
def test_order_of_voxels_images_and_classes_does_not_matter(form, entropy, classes, beta, seed):
    student, teacher = (logits(3, classes, 4, 5, seed=seed + k, dtype=torch.float64) for k in (0, 1))
    generator = torch.Generator().manual_seed(seed)
    value = torch.stack(FORMS[form](student, teacher, beta=beta, entropy=entropy))
    assert (value >= 0).all()
    for axis in range(4):
        order = torch.randperm(student.shape[axis], generator=generator)
        moved = (x.index_select(axis, order) for x in (student, teacher))
        assert torch.allclose(torch.stack(FORMS[form](*moved, beta=beta, entropy=entropy)), value, rtol=1e-9)
