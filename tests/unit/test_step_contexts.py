"""The training step in a distributed training, with a loss scale and under autocast."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_dycon import step as step_module
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from tests.recipes import Net, UNet
from tests.steps import METHODS, SMALL, copied, cross_entropy, equal, loader_batch, made, spoiled


class Distributed(DistributedDataParallel):
    """Stands in for a wrapped network: notes what runs without an exchange of gradients."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.events: list[tuple[str, bool]] = []
        self.waiting, self.waits = False, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.module(x)
        self.events.append(("forward", self.waiting))
        out.register_hook(lambda gradient: self.events.append(("backward", self.waiting)))
        return out

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        assert not self.waiting
        self.waits += 1
        self.waiting = True
        yield
        self.waiting = False


@pytest.mark.parametrize(
    ("name", "passes", "of_others"),
    [
        ("LabeledOnly", 2, 0),
        ("MeanTeacher", 4, 0),
        ("BCP", 4, 0),
        ("BCP patches", 3, 0),
        ("BCP mixes", 1, 0),
        ("CPS", 2, 2),
        ("DyCONCPS", 3, 3),
    ],
)
def test_gradients_are_exchanged_in_the_final_pass_alone(name: str, passes: int, of_others: int, monkeypatch) -> None:
    kind, settings = METHODS[name]
    asked, averaged = [], []
    monkeypatch.setattr(step_module.ranks, "true_everywhere", lambda value: asked.append(value) or value)
    monkeypatch.setattr(step_module.ranks, "average_gradients", lambda tensors: averaged.extend(tensors))
    student = UNet()
    network = Distributed(student)
    step = made(kind, settings, student, network=network)
    assert step.plain is student
    assert step.distributed
    step.number = settings.steps // 2  # unlabelled terms have a weight
    step(loader_batch())
    waits = [True] * (passes - 1) + [False]
    assert network.events == [(what, wait) for wait in waits for what in ("forward", "backward")]
    assert network.waits == passes + of_others - 1
    assert len(asked) == 1
    assert {id(p) for p in averaged} == {id(p) for p in step.method.parameters()}


def test_a_step_that_another_process_skips_is_skipped_here(monkeypatch) -> None:
    monkeypatch.setattr(step_module.ranks, "true_everywhere", lambda value: torch.tensor(False))
    student = Net()
    step = made(MeanTeacher, MeanTeacherSettings(**SMALL), student, network=Distributed(student))
    before = copied(student)
    step(loader_batch())
    assert step.log[0]["skipped_steps"] == 1.0
    assert equal(before, copied(student))


@pytest.mark.parametrize("name", ["LabeledOnly", "UAMT", "BCP", "DyCON", "DyCONCPS"])
def test_means_over_a_part_of_the_patches_divide_by_that_of_all_processes(name: str, monkeypatch) -> None:
    kind, settings = METHODS[name]
    totals = []
    for factor in (1.0, 2.0):  # the others have three times as much
        monkeypatch.setattr(step_module.ranks, "mean_everywhere", lambda value, factor=factor: factor * value)
        step = made(kind, settings, UNet())
        step.number = len(step.schedules["ramp"]) - 1 if "ramp" in step.schedules else 0
        step(loader_batch())
        totals.append(step.log[0])
    # UnCL of DyCON is on the voxels that are not pasted, its guarded form is on all
    parts = re.compile(rf"fecl|paste|^(in|out)_(labeled|pseudo{'|uncl' * (name == 'DyCON')})$|^consistency$")
    terms = [key for key in totals[0] if parts.search(key) and f"{key}_weight" in totals[0]]
    assert terms
    for key in terms:
        assert float(totals[1][key]) < float(totals[0][key]), key
    assert float(totals[0]["supervised"]) == float(totals[1]["supervised"])


# --- precision


class Scaler:
    """A loss scale of 8 that notes its calls."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def scale(self, loss: Tensor) -> Tensor:
        self.events.append("scale")
        return 8 * loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.events.append("unscale")
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            p.grad /= 8

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.events.append("step")
        optimizer.step()

    def update(self) -> None:
        self.events.append("update")


def test_the_loss_is_scaled_for_backward_and_gradients_are_unscaled_before_they_are_clipped(monkeypatch) -> None:
    events: list[str] = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a: events.append("clip") or clip(*a))
    ends = []
    for scaler in (None, Scaler(events)):
        step = made(CPS, CPSSettings(**SMALL, rampup=0.0, delay=0.0), Net(), scaler=scaler)
        events.clear()
        loss = step(loader_batch())["loss"]
        ends.append((loss, copied(step.plain), copied(step.method)))
    assert events == ["scale"] * 4 + ["unscale"] * 2 + ["clip"] * 2 + ["step"] * 2 + ["update"]
    assert ends[0][0] == ends[1][0]
    assert equal(ends[0][1], ends[1][1])  # 8 is a power of two
    assert equal(ends[0][2], ends[1][2])
    events.clear()
    step(spoiled(loader_batch()))
    assert set(events) == {"scale"}


def test_passes_run_under_autocast_and_backward_does_not() -> None:
    entered, student = Counter(), Net()

    @contextmanager
    def autocast() -> Iterator[None]:
        entered["passes"] += 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    seen: list[tuple[str, bool, torch.dtype]] = []

    def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen.append(("forward", torch.is_autocast_enabled("cpu"), output.dtype))
        output.register_hook(lambda g: seen.append(("backward", torch.is_autocast_enabled("cpu"), g.dtype)))

    student.conv.register_forward_hook(note)

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        return cross_entropy(outputs.float(), target)

    step = made(MeanTeacher, MeanTeacherSettings(**SMALL, delay=0.0), student, autocast=autocast, loss=loss)
    teacher: list[torch.dtype] = []
    step.method.teacher.network.register_forward_hook(lambda module, inputs, output: teacher.append(output.dtype))
    step(loader_batch())
    assert entered["passes"] == 2
    assert seen == [("forward", True, torch.bfloat16), ("backward", False, torch.bfloat16)] * 2
    assert teacher == [torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["MeanTeacher", "CPS"])
def test_a_real_loss_scale_that_overflows_leaves_the_networks_alone_and_falls(name: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    kind, settings = METHODS[name]
    step = made(kind, settings, Net(), scaler=scaler, autocast=lambda: torch.autocast("cpu", dtype=torch.float16))
    before = copied(step.plain), copied(step.method)
    for parameter in (*step.plain.parameters(), *step.method.parameters()):
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * torch.inf)
    step.number = settings.steps // 2
    step(loader_batch())
    assert equal(before[0], copied(step.plain))
    counted = "learned.counts"  # of answers, whatever the weights did with them
    kept, after = ({k: v for k, v in state.items() if k != counted} for state in (before[1], copied(step.method)))
    assert equal(kept, after)
    assert scaler.get_scale() == 2.0**19
    assert step.number == settings.steps // 2 + 1
    assert step.log[0]["skipped_steps"] == 0.0  # the scale's own matter: the loss is finite
