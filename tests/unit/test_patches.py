import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_dycon.losses.patches import (
    covered_share,
    fecl,
    labels_from_probabilities,
    labels_from_truth,
    patch_weight,
    sample_anchors,
)
from tests import oracles

# Spatial size and grid: whole cells, cells of unequal size that overlap, one cell for everything, one for each voxel.
PLACES = [
    ((8, 6), (4, 3)),
    ((7, 5), (3, 2)),
    ((4, 6, 4), (2, 3, 1)),
    ((5, 7, 4), (2, 3, 3)),
    ((3, 4), (1, 1)),
    ((3, 4), (3, 4)),
]
RULES = ("majority", "any_foreground")


def blobs(space, classes, seed, low=0):
    """Labels (2, 1, *S) that hang together, so that patches of one class occur."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(low, classes, (2, 1, *(-(-s // 3) for s in space)))
    for axis in range(len(space)):
        coarse = coarse.repeat(3, axis + 2)
    noise = generator.integers(low, classes, (2, 1, *space))
    cut = coarse[(..., *(slice(s) for s in space))]
    return np.where(generator.random(cut.shape) < 0.1, noise, cut)


@pytest.mark.parametrize(("space", "grid"), PLACES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("classes", [2, 3, 14])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32])
def test_target_labels_are_those_of_the_voxels_of_each_cell(space, grid, rule, classes, dtype):
    target = blobs(space, classes, seed=classes)
    labels = labels_from_truth(torch.tensor(target, dtype=dtype), grid, num_classes=classes, rule=rule)
    assert labels.dtype == torch.int64
    assert labels.tolist() == oracles.target_labels(target, grid, classes, None, rule)


@pytest.mark.parametrize(("space", "grid"), PLACES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ignore", [None, 3])
def test_one_unknown_voxel_drops_its_patch(space, grid, rule, ignore):
    target = blobs(space, 3, seed=1)
    target[0].flat[5] = -1
    target[1].flat[2] = 3 if ignore else 0
    labels = labels_from_truth(torch.tensor(target), grid, num_classes=3, ignore_label=ignore, rule=rule)
    assert labels.tolist() == oracles.target_labels(target, grid, 3, ignore, rule)
    assert (labels == -1).any()


def test_exactly_half_is_a_majority_and_a_tie_goes_to_the_smaller_class():
    target = torch.tensor([[[[2, 1, 2, 0, 1, 2]]]])
    assert labels_from_truth(target, (1, 3), num_classes=3).tolist() == [[1, 0, 1]]
    third = torch.tensor([[[[0, 1, 2]]]])
    assert labels_from_truth(third, (1, 1), num_classes=3).tolist() == [[-1]]


def test_a_lesion_of_more_than_a_tenth_makes_a_lesion_patch_and_a_smaller_one_no_background():
    target = torch.zeros(1, 1, 1, 48, dtype=torch.int64)
    target[..., :2], target[..., 16] = 1, 1  # of 16 voxels: two, one, none
    assert labels_from_truth(target, (1, 3), num_classes=2, rule="any_foreground").tolist() == [[1, -1, 0]]
    assert labels_from_truth(target, (1, 3), num_classes=2).tolist() == [[0, 0, 0]]


def probabilities(space, classes, seed, scale=4.0):
    sharp = torch.tensor(blobs(space, classes, seed))
    onehot = torch.zeros(2, classes, *space).scatter_(1, sharp, 1.0)
    noise = torch.randn(onehot.shape, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(scale * onehot + noise, 1)


@pytest.mark.parametrize(("space", "grid"), PLACES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("classes", [2, 3, 14])
@pytest.mark.parametrize("gate", [0.0, 0.8])
def test_teacher_labels_are_those_of_the_probabilities_of_each_cell(space, grid, rule, classes, gate):
    p = probabilities(space, classes, seed=classes)
    labels = labels_from_probabilities(p, grid, gate=gate, rule=rule)
    assert labels.dtype == torch.int64
    assert labels.tolist() == oracles.probability_labels(p.numpy(), grid, gate, rule)


def test_the_gate_is_the_mean_of_the_largest_probability():
    p = torch.tensor([[[[0.5, 1.0]], [[0.5, 0.0]]]])
    assert labels_from_probabilities(p, (1, 1), gate=0.75).tolist() == [[0]]
    assert labels_from_probabilities(p, (1, 1), gate=0.76).tolist() == [[-1]]


def test_an_unsure_teacher_labels_no_patch_and_sure_one_labels_all():
    p = probabilities((8, 8), 3, seed=0)
    assert (labels_from_probabilities(torch.full_like(p, 1 / 3), (4, 4)) == -1).all()
    sure = torch.zeros_like(p)
    sure[:, 2] = 1
    for rule in RULES:
        assert (labels_from_probabilities(sure, (4, 4), rule=rule) == 2).all()


def test_soft_background_is_background_under_the_lesion_rule_too():
    p = torch.tensor([0.95, 0.05]).view(1, 2, 1, 1).repeat(1, 1, 4, 4)
    assert (labels_from_probabilities(p, (2, 2), rule="any_foreground") == 0).all()


def test_half_precision_probabilities_and_autocast_give_the_same_labels():
    p = probabilities((8, 6), 3, seed=2)
    wanted = labels_from_probabilities(p, (4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(labels_from_probabilities(p, (4, 3)), wanted)
    assert torch.equal(labels_from_probabilities(p.half(), (4, 3)), labels_from_probabilities(p.half().float(), (4, 3)))


@pytest.mark.parametrize(("space", "grid"), PLACES)
@pytest.mark.parametrize("classes", [2, 3, 14])
def test_patch_weights_are_those_of_the_mean_entropy(space, grid, classes):
    logits = 2 * torch.randn(2, classes, *space, generator=torch.Generator().manual_seed(0))
    weight = patch_weight(logits.requires_grad_(), grid)
    assert not weight.requires_grad
    assert oracles.relative_error(weight, oracles.patch_weights(logits.detach(), grid)) <= 1e-5


def test_patch_weights_go_from_one_to_e_for_any_finite_logits():
    sure = torch.tensor([80.0, -80.0, -80.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
    assert patch_weight(sure, (1, 1)).item() == 1.0
    assert patch_weight(torch.zeros(1, 14, 4, 4), (1, 1)).item() == pytest.approx(math.e, rel=1e-6)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, grid: labels_from_truth(x, grid, num_classes=2), (1, 1, 4, 4)),
        (labels_from_probabilities, (1, 2, 4, 4)),
        (patch_weight, (1, 2, 4, 4)),
    ],
)
@pytest.mark.parametrize("grid", [(2,), (2, 2, 2), (5, 2), (0, 2)])
def test_a_grid_that_does_not_fit_is_named(function, shape, grid):
    with pytest.raises(ValueError, match=r"grid .* does not fit the voxels \(4, 4\)"):
        function(torch.zeros(shape), grid)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"truth \(1, 4, 4\)"):
        labels_from_truth(torch.zeros(1, 4, 4), (2, 2), num_classes=2)
    with pytest.raises(ValueError, match="rule 'mode'"):
        labels_from_truth(torch.zeros(1, 1, 4, 4), (2, 2), num_classes=2, rule="mode")
    with pytest.raises(ValueError, match="max_anchors -1"):
        sample_anchors(torch.zeros(1, 4, dtype=torch.int64), -1)


def counts(labels):
    return {c: int((labels == c).sum()) for c in labels.unique().tolist()}


def test_anchors_are_balanced_and_a_small_class_is_taken_whole():
    labels = torch.tensor([[0] * 60 + [1] * 30 + [2] * 5 + [-1] * 5])
    generator = torch.Generator().manual_seed(0)
    assert counts(sample_anchors(labels, 15, generator).labels) == {0: 5, 1: 5, 2: 5}
    assert counts(sample_anchors(labels, 35, generator).labels) == {0: 15, 1: 15, 2: 5}
    assert counts(sample_anchors(labels, 80, generator).labels) == {0: 45, 1: 30, 2: 5}


def test_every_patch_of_a_class_is_drawn_equally_often():
    labels = torch.tensor([[0] * 8 + [1] * 2]).repeat(4000, 1)
    index = sample_anchors(labels, 4, torch.Generator().manual_seed(0)).numbers
    share = torch.bincount(index.flatten(), minlength=10) / 4000
    assert (share[:8] - 0.25).abs().max() < 0.04  # 2 of 8; five standard deviations
    assert (share[8:] == 1).all()


def test_missing_patches_are_filled_with_unused_ones_that_do_not_enter_the_loss():
    labels = torch.tensor([[0, -1, 1, -1, 0, -1], [0, 1, 0, 1, 0, 1]])
    z = torch.nn.functional.normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    index, chosen = sample_anchors(labels, 5, torch.Generator().manual_seed(0))
    assert counts(chosen[0]) == {-1: 2, 0: 2, 1: 1}
    rows = z.gather(1, index[..., None].expand(-1, -1, 4))
    assert fecl(rows[:1], chosen[:1]).item() == pytest.approx(fecl(z[:1], labels[:1]).item(), rel=1e-6)


def test_zero_anchors_means_all_in_order():
    labels = torch.tensor([[0, -1, 2], [1, 1, -1]])
    index, chosen = sample_anchors(labels, 0)
    assert index.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert torch.equal(chosen, labels)


def test_the_generator_decides_the_draw():
    labels = torch.zeros(1, 100, dtype=torch.int64)
    first, again, other = (sample_anchors(labels, 10, torch.Generator().manual_seed(s)).numbers for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), wanted=st.integers(1, 40), classes=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_anchors_differ_carry_their_labels_and_leave_no_class_short(n, wanted, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, (2, n), generator=generator)
    index, chosen = sample_anchors(labels, wanted, generator)
    assert index.shape == chosen.shape == (2, min(wanted, n))
    assert torch.equal(labels.gather(1, index), chosen)
    for row, drawn, all_labels in zip(index, chosen, labels, strict=True):
        assert len(set(row.tolist())) == len(row)
        have, drawn = counts(all_labels[all_labels >= 0]), counts(drawn)
        assert drawn.pop(-1, 0) == max(0, len(row) - sum(have.values()))
        most = max(drawn.values(), default=0)
        assert all(drawn.get(c, 0) >= min(have[c], most - 1) for c in have)


@pytest.mark.parametrize("space", [(6, 8), (4, 6, 6)])
def test_the_covered_share_of_a_class_is_that_of_its_voxels_in_its_own_patches(space: tuple[int, ...]) -> None:
    grid, classes = tuple(s // 2 for s in space), 4
    generator = torch.Generator().manual_seed(4)
    truth = torch.randint(-1, classes + 1, (2, 1, *space), generator=generator)
    truth[truth == 3] = 0  # a class without a voxel; 4 stands for the ignore label
    labels = torch.randint(-1, classes, (2, math.prod(grid)), generator=generator)
    found = covered_share(truth, labels, grid, classes).tolist()
    for c in range(classes):
        inside = total = 0
        for b in range(2):
            for k, cell in enumerate(oracles.cells(space, grid)):
                number = int((truth[b, 0][cell] == c).sum())
                total, inside = total + number, inside + (number if labels[b, k] == c else 0)
        assert math.isnan(found[c]) if total == 0 else found[c] == pytest.approx(inside / total)
