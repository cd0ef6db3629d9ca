"""What processes agree on; the second process is stood in for."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnunetv2_dycon import ranks


class TwoProcesses:
    """torch.distributed where the other process answers with what it was given, one value a call."""

    ReduceOp = dist.ReduceOp

    def __init__(self, answers: Iterable[Any]) -> None:
        self.answers = iter(answers)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        joined = {dist.ReduceOp.SUM: torch.add, dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.MAX: torch.maximum}[op]
        tensor.copy_(joined(tensor, next(self.answers)))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        assert source == 0
        tensor.copy_(next(self.answers))

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        values[:] = [value, next(self.answers)]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch):
    return lambda *answers: monkeypatch.setattr(ranks, "dist", TwoProcesses(answers))


def test_gradients_become_their_mean_and_missing_ones_stay_missing(other) -> None:
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[1.0, 4.0]])
    other(torch.tensor([[3.0, 8.0]]))
    ranks.average_gradients(layer.parameters())
    assert layer.weight.grad.tolist() == [[2.0, 6.0]]
    assert layer.bias.grad is None


@pytest.mark.parametrize(("here", "there"), [(True, True), (True, False), (False, True), (False, False)])
def test_true_everywhere_is_true_in_both(other, here: bool, there: bool) -> None:
    other(torch.tensor(float(there)))
    assert bool(ranks.true_everywhere(torch.tensor(here))) == (here and there)


def test_a_mean_is_over_both_and_has_no_gradient(other) -> None:
    here = torch.tensor(0.25, requires_grad=True)
    other(torch.tensor(0.75))
    mean = ranks.mean_everywhere(here)
    assert mean.item() == 0.5
    assert not mean.requires_grad
    assert here.item() == 0.25


@pytest.mark.parametrize("deep", [True, False])
def test_outputs_that_are_not_computed_get_a_gradient_of_zero(other, deep: bool) -> None:
    network = nn.Module()
    network.decoder = nn.Module()
    network.decoder.deep_supervision = deep
    network.decoder.seg_layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    other()
    weight = torch.ones(1, requires_grad=True)
    ranks.with_every_output(2 * weight.sum(), network).backward()
    assert weight.grad.item() == 2.0
    gradients = [[p.grad for p in layer.parameters()] for layer in network.decoder.seg_layers]
    assert gradients[2] == [None, None]  # of the finest, which is computed
    for gradient in (*gradients[0], *gradients[1]):
        assert gradient is None if deep else not gradient.any()


def test_networks_without_a_decoder_are_left_alone(other) -> None:
    other()
    assert ranks.with_every_output(torch.ones(()), nn.Linear(1, 1)).item() == 1.0


def test_weights_are_the_first_ones(other) -> None:
    tensors = [torch.zeros(2), nn.Parameter(torch.zeros(1))]
    other(torch.tensor([1.0, 2.0]), torch.tensor([3.0]))
    ranks.share_weights(tensors)
    assert [t.tolist() for t in tensors] == [[1.0, 2.0], [3.0]]


def test_values_are_gathered_in_the_order_of_ranks(other) -> None:
    other({"a": 2})
    assert ranks.gathered({"a": 1}) == [{"a": 1}, {"a": 2}]
    other()
    assert ranks.world_size() == 2


def test_one_process_is_left_alone() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.ones(1, 2)
    ranks.average_gradients(layer.parameters())
    ranks.share_weights(layer.state_dict().values())
    assert layer.weight.grad.tolist() == [[1.0, 1.0]]
    assert bool(ranks.true_everywhere(torch.tensor(True)))
    assert not ranks.true_everywhere(torch.tensor(False))
    assert ranks.gathered(5) == [5]
    value = torch.ones(2)
    assert ranks.mean_everywhere(value) is value
    assert ranks.with_every_output(value, None) is value
    assert ranks.world_size() == 1
