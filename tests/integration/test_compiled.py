"""Every method with a compiled student, as on CUDA, against the same steps without; the backend needs no GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from nnunetv2_dycon.networks import FeatureTap, unwrap
from tests.training import METHODS, at_once, begin, seed_all, steps

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "flat"])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_student_takes_the_steps_of_one_that_is_not(
    trainer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, method: str, deep: bool
) -> None:
    compile_, keep, runs = torch.compile, FeatureTap._keep, []
    fired: list[int] = []
    monkeypatch.setattr(FeatureTap, "_keep", lambda tap, *a: fired.append(id(tap)) or keep(tap, *a))
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="aot_eager"))
    for compiled in (False, True):
        torch._dynamo.reset()
        fired.clear()
        seed_all(4)
        t = trainer(f"{at_once(method)}_epochs1_iters3_valiters1")
        t.enable_deep_supervision = deep
        monkeypatch.setattr(type(t), "_do_i_compile", lambda self, compiled=compiled: compiled)
        begin(t)
        assert hasattr(t.network, "_orig_mod") == compiled
        losses = [step["loss"] for step in steps(t, 3)]
        rows = [{name: float(value) for name, value in row.items()} for row in t.step.log]
        runs.append((losses, rows, unwrap(t.network).state_dict(), t.method.state_dict(), len(fired)))
    torch._dynamo.reset()
    (losses, rows, student, others, hooks), (losses_c, rows_c, student_c, others_c, hooks_c) = runs
    assert losses_c == pytest.approx(losses, abs=1e-5, rel=1e-5)
    for row, row_c in zip(rows, rows_c, strict=True):
        assert row_c == pytest.approx(row, abs=1e-5, rel=1e-5)
    for plain, compiled_too in ((student, student_c), (others, others_c)):
        for name, wanted in plain.items():
            torch.testing.assert_close(compiled_too[name], wanted, atol=1e-5, rtol=0, msg=name)
    assert hooks_c == hooks
    assert bool(hooks) == ("DyCON" in method or "MagicNet" in method)  # FeCL, and cubes that tell their place
