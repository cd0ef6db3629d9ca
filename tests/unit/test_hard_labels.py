"""GADice, GACE and the class-weighted loss against slow values, and their properties."""

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck

from nnunetv2_dycon.losses.class_weighted import class_weighted
from nnunetv2_dycon.losses.gradient_aware import gradient_aware
from nnunetv2_dycon.losses.hard_labels import largest
from tests import oracles
from tests.oracles import relative_error
from tests.recipes import seeded

SPACE = (2, 3, 5)


def drawn(classes: int, seed: int = 1, space: tuple = SPACE, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(2, classes, *space, generator=seeded(seed), dtype=torch.float64)


def labels_up_to(highest: int, seed: int = 2, space: tuple = SPACE) -> Tensor:
    return torch.randint(0, highest, (2, 1, *space), generator=seeded(seed))


def weights(seed: int = 3, space: tuple = SPACE) -> Tensor:
    return torch.rand(2, *space, generator=seeded(seed), dtype=torch.float64)


# Name: classes, labels, weight, ignore label.
CASES = {
    "two classes": (2, labels_up_to(2), None, None),
    "five": (5, labels_up_to(5), None, None),
    "fourteen, nine of them absent": (14, labels_up_to(5), None, None),
    "twenty, one of them there": (20, labels_up_to(20).fill_(7), None, None),
    "weights": (5, labels_up_to(5), weights(), None),
    "weights of zero": (5, labels_up_to(5), weights() * (weights(4) > 0.5), None),
    "the ignore label": (5, labels_up_to(6), weights(), 5),
    "labels below zero": (5, labels_up_to(6) - 1, None, None),
    "labels as floating numbers": (5, labels_up_to(5).float(), None, None),
    "two axes": (5, labels_up_to(5, space=(4, 7)), weights(space=(4, 7)), None),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_gradient_aware_losses_equal_their_formulas(case: str, keep: float, dtype: torch.dtype) -> None:
    classes, labels, weight, ignore = CASES[case]
    logits = drawn(classes, space=labels.shape[2:]).to(dtype).requires_grad_()
    found = gradient_aware(logits, labels, keep=keep, weight=weight, ignore_label=ignore)
    wanted = (
        oracles.gadice(logits, labels, weight, ignore=ignore),
        oracles.gace(logits, labels, weight, keep=keep, ignore=ignore),
    )
    for part, value in zip(found, wanted, strict=True):
        assert part.dtype == dtype
        assert relative_error(part, value) <= (1e-12 if dtype == torch.float64 else 1e-5)
        (ours,), (theirs,) = (grad(x, logits, retain_graph=True) for x in (part, value))
        assert relative_error(ours, theirs) <= (1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("case", ["two classes", "five", "weights", "labels below zero"])
def test_class_weighted_loss_equals_its_formula(case: str) -> None:
    classes, labels, weight, _ = CASES[case]
    logits, factors = drawn(classes).requires_grad_(), [0.0, 2.0, 0.3, 1.0, 5.0][:classes]
    found = class_weighted(logits, labels, torch.tensor(factors), weight=weight)
    wanted = oracles.class_weighted(logits, labels, factors, weight)
    for part, value in zip(found, wanted, strict=True):
        assert relative_error(part, value) <= 1e-6  # the weights are float32
        (ours,), (theirs,) = (grad(x, logits, retain_graph=True) for x in (part, value))
        assert relative_error(ours, theirs) <= 1e-6


def test_class_weights_multiply_the_summands_of_gradient_aware_losses() -> None:
    logits, labels, factors = drawn(5).requires_grad_(), labels_up_to(4), [0.5, 2.0, 0.0, 1.0, 3.0]
    found = gradient_aware(logits, labels, keep=0.4, class_weight=torch.tensor(factors))
    wanted = (
        oracles.gadice(logits, labels, None, factors=factors),
        oracles.gace(logits, labels, None, keep=0.4, factors=factors),
    )
    for part, value in zip(found, wanted, strict=True):
        assert relative_error(part, value) <= 1e-12
        (ours,), (theirs,) = (grad(x, logits, retain_graph=True) for x in (part, value))
        assert relative_error(ours, theirs) <= 1e-12


def test_gradients_are_those_of_the_values_where_every_class_is_there() -> None:
    logits, labels = drawn(3, space=(2, 4)).requires_grad_(), labels_up_to(3, space=(2, 4))
    factors, weight = torch.tensor([0.2, 1.0, 2.0]).double(), weights(space=(2, 4))
    assert labels.unique().tolist() == [0, 1, 2]
    for keep in (1.0, 0.4):
        assert gradcheck(lambda x, keep=keep: tuple(gradient_aware(x, labels, keep=keep, weight=weight)), logits)
    assert gradcheck(lambda x: tuple(class_weighted(x, labels, factors, weight=weight)), logits)


def test_a_part_alone_has_its_own_gradient() -> None:
    """A method that takes the cross-entropy without Dice."""
    logits, labels = drawn(4).requires_grad_(), labels_up_to(4)
    (ours,) = grad(class_weighted(logits, labels, torch.ones(4)).ce, logits)
    (theirs,) = grad(torch.nn.functional.cross_entropy(logits, labels[:, 0]), logits)
    assert relative_error(ours, theirs) <= 1e-12


def test_an_absent_class_is_pushed_down_half_as_much_as_its_mean_square_would() -> None:
    logits, labels = drawn(4).requires_grad_(), torch.zeros(2, 1, *SPACE, dtype=torch.long)
    (ours,) = grad(gradient_aware(logits, labels).dice, logits)
    p = torch.softmax(logits, 1)
    half = p[:, 1:].square().sum() / p[:, 0].numel() / 2
    background = 1 - 2 * p[:, 0].sum() / (p[:, 0].square().sum() + p[:, 0].numel())
    (theirs,) = grad((half + background) / 4, logits)
    assert relative_error(ours, theirs) <= 1e-9


def test_a_class_counts_by_the_root_of_its_share_in_gace() -> None:
    """All voxels have the same cross-entropy, so that the loss is that times the sum of the roots."""
    labels = torch.zeros(1, 1, 10, 10, dtype=torch.long)
    labels[0, 0, 0, :4] = 1
    labels[0, 0, 1, 0] = 2
    value = gradient_aware(torch.zeros(1, 3, 10, 10, dtype=torch.float64), labels).ce
    assert value.item() == pytest.approx(torch.tensor(3.0).log().item() * (0.95**0.5 + 0.04**0.5 + 0.01**0.5))


@pytest.mark.parametrize("keep", [0.1, 0.25, 1.0])
def test_equal_cross_entropies_keep_the_exact_number_of_voxels(keep: float) -> None:
    """A network that says nothing: every voxel is tied."""
    logits, labels = torch.zeros(2, 3, 4, 5, dtype=torch.float64).requires_grad_(), labels_up_to(3, space=(4, 5))
    (slope,) = grad(gradient_aware(logits, labels, keep=keep).ce, logits)
    moved = slope.abs().sum(1).flatten() > 0
    assert moved.tolist() == [True] * int(40 * keep) + [False] * (40 - int(40 * keep))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_the_largest_are_those_that_sorting_finds(share: float) -> None:
    values = torch.randint(-2, 6, (3, 1, 4, 5), generator=seeded(5)).double()
    found = largest(values, share)
    counted = (values >= 0).sum().item()
    order = sorted(range(values.numel()), key=lambda i: -values.flatten()[i].item())
    wanted = set(order[: max(1, int(share * counted))])
    assert set(found.flatten().nonzero()[:, 0].tolist()) == wanted


def test_patches_without_any_label_cost_nothing() -> None:
    logits, nothing = drawn(3).requires_grad_(), torch.full((2, 1, *SPACE), -1)
    for keep in (0.1, 1.0):
        for part in (*gradient_aware(logits, nothing, keep=keep), *class_weighted(logits, nothing, torch.ones(3))):
            (slope,) = grad(part, logits, retain_graph=True)
            assert not slope.any()
        assert gradient_aware(logits, nothing, keep=keep).ce == 0
    assert class_weighted(logits, torch.zeros_like(nothing), torch.tensor([0.0, 1.0, 1.0])).ce == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = (40 * drawn(4).sign()).to(dtype).requires_grad_()
    for part in (
        *gradient_aware(logits, labels_up_to(3), keep=0.1),
        *class_weighted(logits, labels_up_to(3), torch.ones(4)),
    ):
        (slope,) = grad(part, logits, retain_graph=True)
        assert part.dtype == torch.float32
        assert bool(torch.isfinite(part))
        assert bool(torch.isfinite(slope).all())


def test_two_processes_follow_the_gradient_of_one_with_both_batches() -> None:
    """Each gets the mean of the sums; the average of their gradients is then that of all."""
    logits, labels = drawn(4).requires_grad_(), labels_up_to(3)
    labels[1] = labels[1].clamp(max=1)  # a class that one of them does not see
    whole = gradient_aware(logits, labels)
    (wanted,) = grad(sum(whole), logits)
    seen: list[Tensor] = []
    for half in (0, 1):
        gradient_aware(logits[half : half + 1], labels[half : half + 1], everywhere=lambda s: seen.append(s) or s)
    mean = (seen[0] + seen[1]) / 2
    halves = [
        gradient_aware(logits[half : half + 1], labels[half : half + 1], everywhere=lambda sums: mean)
        for half in (0, 1)
    ]
    (found,) = grad(sum(sum(parts) for parts in halves) / 2, logits)
    assert relative_error(found, wanted) <= 1e-9
    for one, other, both in zip(*halves, whole, strict=True):
        assert ((one + other) / 2).item() == pytest.approx(both.item())


@pytest.mark.parametrize(
    ("shape", "labels", "how", "said"),
    [
        ((2, 1, 4, 5), (2, 1, 4, 5), {}, "at least 2 classes"),
        ((2, 3, 4, 5), (2, 4, 5), {}, "do not fit logits"),
        ((2, 3, 4, 5), (2, 1, 4, 5), {"weight": torch.ones(2, 4)}, "does not fit the voxels"),
        ((2, 3, 4, 5), (2, 1, 4, 5), {"keep": 0.0}, "above 0"),
        ((2, 3, 4, 5), (2, 1, 4, 5), {"keep": 1.1}, "at most 1"),
    ],
)
def test_shapes_and_shares_that_do_not_fit_are_refused(shape: tuple, labels: tuple, how: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gradient_aware(torch.zeros(shape), torch.zeros(labels), **how)
