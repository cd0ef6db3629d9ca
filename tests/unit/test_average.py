"""The average that moves a teacher, on networks as nnU-Net plans them."""

import copy

import pytest
import torch
from torch import nn

from nnunetv2_dycon.networks import ProjectionHead, Teacher, unwrap
from nnunetv2_dycon.step import average_
from tests.unit.test_networks import build, image, shake


def test_teacher_follows_the_closed_form_over_seven_steps():
    student = build()
    teacher = Teacher(student)
    decays = [0.0, 0.5, 0.9, 0.99, 0.3, 1.0, 0.75]
    seen = [[p.double().clone() for p in student.parameters()]]
    for step, decay in enumerate(decays):
        shake(student, step)
        seen.append([p.double().clone() for p in student.parameters()])
        average_(teacher.network, student, decay)
    # theta_T = sum_j (1 - a_j) prod_{l > j} a_l theta_j, the start counting with prod a_l
    factors = [1.0] + [1 - a for a in decays]
    for j in range(len(factors)):
        for later in decays[j:]:
            factors[j] *= later
    assert sum(factors) == pytest.approx(1)
    for i, mine in enumerate(teacher.network.parameters()):
        wanted = sum(f * theta[i] for f, theta in zip(factors, seen, strict=True))
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-6, atol=1e-6)


def test_decay_zero_copies_to_the_bit_even_over_weights_that_are_not_finite():
    student = build()
    teacher = Teacher(student)
    shake(student, 1)
    with torch.no_grad():
        next(teacher.network.parameters()).fill_(float("inf"))
    average_(teacher.network, student, 0.0)
    for mine, its in zip(teacher.network.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_decay_one_leaves_the_weights():
    student = build()
    teacher = Teacher(student)
    before = copy.deepcopy(teacher.network.state_dict())
    shake(student, 1)
    average_(teacher.network, student, 1.0)
    for key, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_buffers_are_copied_not_averaged(decay):
    student = build(norm="batch")
    teacher = Teacher(student)
    student.train()(image())
    shake(student, 3)
    average_(teacher.network, student, decay)
    buffers = list(student.buffers())
    assert any(b.dtype == torch.long and b > 0 for b in buffers)
    for mine, its in zip(teacher.network.buffers(), buffers, strict=True):
        assert torch.equal(mine, its)


def test_decay_zero_copies_weights_and_buffers():
    student = build(norm="batch")
    teacher = Teacher(student)
    shake(student, 3)
    average_(teacher.network, unwrap(torch.compile(student, backend="eager")), 0.0)
    for key, value in student.state_dict().items():
        assert torch.equal(teacher.network.state_dict()[key], value), key


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_out_of_range_is_an_error(decay):
    student = build()
    with pytest.raises(ValueError, match="decay must be in"):
        average_(Teacher(student).network, student, decay)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_student_of_other_shapes_is_an_error(decay):
    with pytest.raises(ValueError, match="teacher and student differ"):
        average_(Teacher(nn.Linear(4, 4)).network, nn.Linear(1, 4), decay)
    with pytest.raises(ValueError, match="zip"):
        average_(Teacher(nn.Linear(4, 4)).network, nn.Linear(4, 4, bias=False), decay)


def test_teacher_of_a_head_follows_it_by_the_same_average():
    head = ProjectionHead(4)
    mean = Teacher(head)
    before = head.expand.weight.detach().clone()
    shake(head, 1)
    average_(mean.network, head, 0.75)
    torch.testing.assert_close(mean.network.expand.weight, 0.75 * before + 0.25 * head.expand.weight.detach())
    assert not mean.network(torch.randn(1, 4, 2, 2)).requires_grad
