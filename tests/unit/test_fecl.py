import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from nnunetv2_dycon.losses.patches import fecl
from tests import oracles
from tests.oracles import relative_error


def unit(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def batch(images=3, n=11, d=5, classes=3, seed=0, dtype=torch.float32):
    """Embeddings, labels from -1 to classes - 1, teacher embeddings and weights."""
    generator = torch.Generator().manual_seed(seed + 100)
    labels = torch.randint(-1, classes, (images, n), generator=generator)
    weight = 1 + 1.7 * torch.rand(images, n, generator=generator, dtype=torch.float64)
    z, teacher = unit(images, n, d, seed=seed, dtype=dtype), unit(images, n, d, seed=seed + 1, dtype=dtype)
    return z.requires_grad_(), labels, teacher, weight.to(dtype)


def compare(z, labels, teacher, weight, *, block=4, rounding=1e-5, **how):
    """Check value and gradient against the oracle."""
    value = fecl(z, labels, teacher=teacher, weight=weight, block=block, **how)
    (gradient,) = torch.autograd.grad(3.0 * value, z)
    copy = z.detach().double().requires_grad_()
    wanted = oracles.fecl(copy, labels, teacher, weight, **how)
    (wanted_gradient,) = torch.autograd.grad(3.0 * wanted, copy)
    assert relative_error(value.detach(), wanted.detach()) <= 1e-5
    assert gradient.dtype == z.dtype
    assert relative_error(gradient, wanted_gradient) <= rounding


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8, 2.0])
@pytest.mark.parametrize("topk", [0, 1, 3, 16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_values_and_gradients_are_those_of_the_equations(gamma, topk, weighted, classes):
    z, labels, teacher, weight = batch(classes=classes)
    compare(z, labels, teacher, weight if weighted else None, tau=0.6, gamma=gamma, topk=topk)


def test_without_a_teacher_only_the_students_negatives_count():
    z, labels, _, weight = batch()
    compare(z, labels, None, weight, tau=0.3, gamma=0.8, topk=16)


def test_fourteen_classes_with_lone_patches_are_as_in_the_equations():
    z, labels, teacher, weight = batch(images=2, n=24, classes=14)
    compare(z, labels, teacher, weight, tau=0.6, gamma=0.5, topk=4)


def test_a_sharp_temperature_neither_overflows_nor_deviates():
    z, labels, teacher, weight = batch()
    compare(z, labels, teacher, weight, tau=0.02, gamma=0.5, topk=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_computed_wide_and_rounded_once(dtype):
    z, labels, teacher, weight = batch(dtype=dtype)
    rounding = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    compare(z, labels, teacher, weight, tau=0.6, gamma=0.5, topk=3, rounding=rounding)


def test_gradcheck_passes_where_the_focal_factors_are_constant():
    z, labels, teacher, weight = batch(images=2, n=7, dtype=torch.float64)
    how = {"teacher": teacher, "weight": weight, "gamma": 0.0, "topk": 2, "block": 2}
    assert torch.autograd.gradcheck(lambda x: fecl(x, labels, **how), z)


@pytest.mark.parametrize("labels", [[[-1, -1, -1]], [[1, 1, 1]], [[0, 1, 2]], [[0, -1, -1]], [[0, 1, -1]]])
def test_without_an_anchor_the_loss_is_a_zero_joined_to_the_graph(labels):
    z = unit(1, 3, 4).requires_grad_()
    value = fecl(z, torch.tensor(labels), teacher=unit(1, 3, 4, seed=1))
    assert value.item() == 0
    value.backward()
    assert torch.count_nonzero(z.grad) == 0


@pytest.mark.parametrize("n", [0, 1])
def test_no_patch_and_one_patch_give_zero(n):
    z = unit(2, n, 4).requires_grad_()
    value = fecl(z, torch.zeros(2, n, dtype=torch.int64), teacher=unit(2, n, 4))
    value.backward()
    assert value.item() == 0
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("tau", [0.01, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_collapsed_and_opposite_embeddings_stay_finite(gamma, tau, dtype):
    one = unit(1, 1, 8)
    for z in (one.repeat(1, 6, 1), torch.cat([one.repeat(1, 3, 1), -one.repeat(1, 3, 1)], 1)):
        for labels in ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1]):
            x = z.to(dtype).requires_grad_()
            value = fecl(x, torch.tensor([labels]), teacher=z.to(dtype), tau=tau, gamma=gamma)
            value.backward()
            assert value.isfinite()
            assert x.grad.isfinite().all()


def test_images_without_an_anchor_do_not_dilute_the_others():
    z, labels, teacher, _ = batch(images=1)
    alone = fecl(z, labels, teacher=teacher)
    both = fecl(torch.cat([z, z]), torch.cat([labels, torch.zeros_like(labels)]), teacher=torch.cat([teacher] * 2))
    assert both.item() == pytest.approx(alone.item(), rel=1e-6)


def test_images_count_alike_whatever_their_number_of_anchors():
    z, labels, _, _ = batch(images=2)
    labels[1, 5:] = -1
    single = [fecl(z[b : b + 1], labels[b : b + 1]).item() for b in (0, 1)]
    assert fecl(z, labels).item() == pytest.approx(sum(single) / 2, rel=1e-6)


def test_unused_patches_and_anchors_of_weight_zero_take_no_part():
    z, labels, teacher, weight = batch(images=1)
    value = fecl(z, labels, teacher=teacher, weight=weight)
    (gradient,) = torch.autograd.grad(value, z)
    unused = labels[0] < 0
    assert 0 < unused.sum() < len(unused)
    assert torch.count_nonzero(gradient[0, unused]) == 0
    kept = [x[:, ~unused] for x in (z, labels, teacher, weight)]
    assert fecl(kept[0], kept[1], teacher=kept[2], weight=kept[3]).item() == pytest.approx(value.item(), rel=1e-6)
    assert fecl(z, labels, teacher=teacher, weight=torch.zeros_like(weight)).item() == 0


def test_gamma_weighs_the_negatives_too():
    z = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]])  # the positive pair is opposite: its factor is 1
    labels = torch.tensor([[0, 0, 1]])
    assert fecl(z, labels, gamma=2.0).item() != pytest.approx(fecl(z, labels, gamma=0.0).item(), rel=1e-2)


def test_teacher_and_weight_get_no_gradient():
    z, labels, teacher, weight = batch()
    teacher.requires_grad_()
    weight.requires_grad_()
    fecl(z, labels, teacher=teacher, weight=weight).backward()
    assert z.grad is not None
    assert teacher.grad is None
    assert weight.grad is None
    assert not fecl(z.detach(), labels, teacher=teacher, weight=weight).requires_grad
    with torch.no_grad():
        assert not fecl(z, labels).requires_grad


def test_block_size_and_autocast_do_not_matter():
    z, labels, teacher, weight = batch(n=30)
    results = []
    for block in (1, 7, 256):
        with torch.autocast("cpu", torch.bfloat16, enabled=block == 7):
            value = fecl(z, labels, teacher=teacher, weight=weight, block=block)
        results.append((value.detach(), torch.autograd.grad(value, z)[0]))
    for value, gradient in results[1:]:
        assert relative_error(value, results[0][0]) <= 1e-6
        assert relative_error(gradient, results[0][1]) <= 1e-5


@pytest.mark.parametrize(
    ("with_teacher", "gamma", "foreground"), [(False, 0.5, 20), (False, 2.0, 4), (True, 0.5, 4), (True, 2.0, 20)]
)
def test_nearly_collapsed_embeddings_separate(with_teacher, gamma, foreground):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(40) < foreground).long()[None]
    raw = torch.randn(1, 1, 16, generator=generator) + 0.12 * torch.randn(1, 40, 16, generator=generator)
    raw.requires_grad_()
    assert (normalize(raw, dim=-1) @ normalize(raw, dim=-1).mT).mean() > 0.97
    optimizer = torch.optim.Adam([raw], lr=0.01)
    for _ in range(600):
        z = normalize(raw, dim=-1)
        optimizer.zero_grad()
        fecl(z, labels, teacher=z.detach() if with_teacher else None, gamma=gamma).backward()
        optimizer.step()
    z = normalize(raw.detach(), dim=-1)[0]
    cosine, same = z @ z.T, labels[0, :, None] == labels
    assert cosine[same & ~torch.eye(40, dtype=torch.bool)].mean() - cosine[~same].mean() > 0.5


def test_what_does_not_fit_is_named():
    z, labels, teacher, weight = batch()
    with pytest.raises(ValueError, match=r"\(3, 11, 5\) and labels \(3, 10\)"):
        fecl(z, labels[:, 1:])
    with pytest.raises(ValueError, match=r"\(3, 11, 5\) and teacher \(3, 11, 4\)"):
        fecl(z, labels, teacher=teacher[..., 1:])
    with pytest.raises(ValueError, match=r"weight \(2, 11\)"):
        fecl(z, labels, weight=weight[1:])
    for wrong in ({"tau": 0.0}, {"gamma": -1.0}, {"topk": -1}, {"block": 0}, {"tau": math.nan}):
        with pytest.raises(ValueError, match="expected tau > 0"):
            fecl(z, labels, **wrong)


@settings(max_examples=25, deadline=None)
@given(gamma=st.sampled_from([0.0, 0.5, 2.0]), topk=st.integers(0, 4), seed=st.integers(0, 10**6))
def test_order_of_patches_images_and_classes_does_not_matter(gamma, topk, seed):
    z, labels, teacher, weight = batch(seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    value = fecl(z, labels, teacher=teacher, weight=weight, gamma=gamma, topk=topk).item()
    for axis in (0, 1):
        order = torch.randperm(z.shape[axis], generator=generator)
        moved = [x.index_select(axis, order) for x in (z, labels, teacher, weight)]
        there = fecl(moved[0], moved[1], teacher=moved[2], weight=moved[3], gamma=gamma, topk=topk)
        assert there.item() == pytest.approx(value, rel=1e-9)
    names = torch.tensor([2, 0, 1, -1])  # the last is reached by label -1
    renamed = fecl(z, names[labels], teacher=teacher, weight=weight, gamma=gamma, topk=topk)
    assert renamed.item() == pytest.approx(value, rel=1e-9)
