"""What runs in bfloat16, and what does not."""

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon import precision
from nnunetv2_dycon.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("deep", [False, True])
def test_a_loss_in_float32_is_computed_without_autocast(deep: bool) -> None:
    seen = []

    def loss(outputs: Tensor | list[Tensor], target: str) -> Tensor:
        outputs = outputs if deep else [outputs]
        seen.append((target, [o.dtype for o in outputs], torch.is_autocast_enabled("cpu")))
        return sum(o.sum() for o in outputs)

    output = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = precision.in_float32(loss, CPU)([output, output] if deep else output, "target")
        assert torch.is_autocast_enabled("cpu")
    assert seen == [("target", [torch.float32] * (2 if deep else 1), False)]
    value.backward()
    assert output.grad.tolist() == [2.0 if deep else 1.0] * 2


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_forward_passes_on_a_cpu_are_in_bfloat16_where_it_is_asked_for(bf16: bool, dtype: torch.dtype) -> None:
    with precision.autocast_of(CPU, bf16=bf16)():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize(("kernel", "depth"), [(3, 1), (3, 2), (3, 3), (5, 3), (5, 4), (5, 5), ((1, 3, 3), 2)])
def test_gradients_in_bfloat16_hold_no_memory_that_nothing_was_written_to(
    kernel: int | tuple[int, int, int], depth: int
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv3d(16, 16, kernel, padding="same"), torch.randn(2, 16, depth, 5, 4)
    layer(x).sum().backward()
    expected = layer.weight.grad
    for _ in range(20):
        layer.weight.grad = None
        with precision.autocast_of(CPU, bf16=True)():
            y = layer(x)
        assert (y.dtype == torch.float32) == (depth < layer.kernel_size[0])
        rubbish = [torch.full((size,), 3e30) for size in (10**3, 10**4, 3 * 10**4, 10**5, 3 * 10**5)]
        del rubbish  # its memory is taken next
        y.float().sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected, rtol=0.02, atol=0.3)


def test_a_device_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    with pytest.raises(ConfigError, match="this cpu has no bf16 arithmetic: leave _bf16 out"):
        precision.require_bf16(CPU)
    with pytest.raises(ConfigError, match="this mps has no bf16"):
        precision.require_bf16(torch.device("mps"))
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    precision.require_bf16(CPU)
