"""Exact allocator peaks of forward plus backward, the gradient included."""

import pytest
import torch
from torch.nn.functional import normalize

from nnunetv2_dycon.losses.class_weighted import class_weighted
from nnunetv2_dycon.losses.gradient_aware import gradient_aware
from nnunetv2_dycon.losses.mse import mse
from nnunetv2_dycon.losses.patches import fecl
from nnunetv2_dycon.losses.voxels import entropy, entropy_weight, soft_ce_dice, uncl
from tests.memory import peak_bytes

MIB = 2**20
LOSSES = {
    "literal": lambda s, t: sum(uncl(s, t, beta=0.5)),
    "guarded": lambda s, t: sum(uncl(s, t, beta=0.5, form="guarded")),
    "mse": mse,
    "ce_dice": soft_ce_dice,
    "gradient aware": lambda s, labels: sum(gradient_aware(s, labels)),
    "gradient aware, largest": lambda s, labels: sum(gradient_aware(s, labels, keep=0.1)),
    "class weighted": lambda s, labels: sum(class_weighted(s, labels, torch.ones(s.shape[1]))),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_peak_counts_temporaries_and_what_was_freed():
    x = torch.zeros(MIB // 4)
    for fn, expected in [
        (lambda: x + 1, MIB),
        (lambda: (x + 1) + (x + 2), 3 * MIB),
        (lambda: (x + 1).sum() + (x + 2).sum(), MIB),
    ]:
        assert peak_bytes(fn) == pytest.approx(expected, abs=64)  # a few bytes for the constants


@pytest.mark.parametrize("loss", LOSSES)
def test_voxel_losses_take_at_most_one_and_a_half_times_the_student_logits(loss):
    student, teacher = normal(2, 14, 96, 96, 96).requires_grad_(), normal(2, 14, 96, 96, 96, seed=1)
    size = student.numel() * 4
    if loss.startswith(("gradient", "class")):
        teacher = teacher.argmax(1, keepdim=True)
    peak = peak_bytes(lambda: LOSSES[loss](student, teacher).backward())
    assert student.grad is not None
    assert size <= peak <= 1.5 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_not_copied_to_float32(dtype):
    student = normal(2, 14, 64, 96, 96).to(dtype).requires_grad_()
    teacher = student.detach().clone()
    peak = peak_bytes(lambda: LOSSES["literal"](student, teacher).backward())
    assert peak <= 1.5 * student.numel() * 2


def test_voxel_maps_without_gradient_take_little_more_than_themselves():
    student, teacher = normal(2, 14, 64, 64, 64), normal(2, 14, 64, 64, 64, seed=1)
    voxels = 4 * student.numel() / 14
    for fn in (lambda: entropy(student), lambda: entropy_weight(student, teacher, beta=1.0)):
        assert peak_bytes(fn) <= voxels + 12 * MIB


def fecl_peak(n):
    z, teacher = (normalize(normal(4, n, 256, seed=s), dim=-1) for s in (0, 1))
    labels = (torch.arange(n) % 10 == 0).long().repeat(4, 1)
    z.requires_grad_()
    return peak_bytes(lambda: fecl(z, labels, teacher=teacher, topk=16).backward())


def test_fecl_grows_linearly_and_stays_below_200_mib():
    half, whole = fecl_peak(2048), fecl_peak(4096)
    assert whole <= 200 * MIB
    assert whole < 2.5 * half
