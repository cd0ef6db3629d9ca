"""The training step with small networks and made-up batches, against sums and schedules written out here."""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon.errors import DivergedError
from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dycon import DyCON, DyCONSettings
from nnunetv2_dycon.methods.dycon_cps import DyCONCPS, DyCONCPSSettings
from nnunetv2_dycon.methods.labeled_only import LabeledOnly
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_dycon.methods.settings import TeacherSettings
from nnunetv2_dycon.methods.uamt import UAMT, UAMTSettings
from nnunetv2_dycon.networks import SecondNetwork, Teacher
from nnunetv2_dycon.options import Schedule
from nnunetv2_dycon.step import CLIP_NORM, Batch, Cost, Method, Term
from nnunetv2_dycon.views import View
from tests.passes import costs_of
from tests.recipes import CLASSES, Net, UNet, seeded
from tests.steps import METHODS, SMALL, UNSURE, copied, cross_entropy, equal, loader_batch, made, spoiled

# --- schedules


def dycon_numbers(t: float, rampup: float, delay: float, beta: tuple[float, float]) -> tuple[float, float]:
    """Return ramp and beta after the fraction `t` of the training."""
    ramp = 0.0 if t < delay else math.exp(-5 * (1 - min(1.0, t / rampup)) ** 2)
    return ramp, beta[0] * (beta[1] / beta[0]) ** t


@pytest.mark.parametrize(("epochs", "iters"), [(1, 40), (8, 5)])
def test_scheduled_numbers_follow_the_step_and_not_the_epoch(epochs: int, iters: int) -> None:
    settings = DyCONSettings(
        epochs=epochs, iters=iters, view="weak", wfecl=0.0, wuncl=2.0, rampup=0.5, delay=0.1, beta=Schedule(0.8, 0.2)
    )
    step = made(DyCON, settings, Net())
    for number in range(40):
        step(loader_batch())
        ramp, beta = dycon_numbers(number / 40, 0.5, 0.1, (0.8, 0.2))
        log = step.log[-1]
        assert log["ramp"] == pytest.approx(ramp, rel=1e-12)
        assert log["beta"] == pytest.approx(beta, rel=1e-12)
        assert log.get("uncl_weight", 0.0) == pytest.approx(2.0 * ramp, rel=1e-12)
    assert len({log["beta"] for log in step.log}) == 40  # no stairs
    assert ["uncl_weight" in log for log in step.log] == [False] * 4 + [True] * 36  # no pass without a weight
    assert sum(0 < log.get("uncl_weight", 0.0) < 2 for log in step.log) == 16  # it acts while it rises, steps 4 to 19
    assert step.number == 40


def test_uamts_threshold_and_bcps_start_follow_the_step_too() -> None:
    uamt = made(UAMT, UAMTSettings(epochs=1, iters=20, samples=1), Net())
    bcp = made(BCP, BCPSettings(epochs=1, iters=20, view="bcp", pretrain=0.3, paste=0.0), Net())
    for number in range(20):
        uamt(loader_batch())
        bcp(loader_batch())
        threshold = 0.75 + 0.25 * math.exp(-5 * (1 - number / 20) ** 2)
        assert uamt.log[-1]["threshold"] == pytest.approx(threshold, rel=1e-12)
        assert ("in_pseudo" in bcp.log[-1]) == (number >= 6) != ("paste_labeled" in bcp.log[-1])


def test_a_training_that_goes_on_takes_up_its_schedules_and_stays_at_their_end() -> None:
    step = made(DyCON, DyCONSettings(**SMALL, view="weak", wfecl=0.0, rampup=0.5, delay=0.1), Net())
    for number, t in ((7, 7 / 40), (40, 1.0), (41, 1.0), (1000, 1.0)):
        step.number = number
        step(loader_batch())
        assert (step.log[-1]["ramp"], step.log[-1]["beta"]) == pytest.approx(dycon_numbers(t, 0.5, 0.1, (0.5, 0.05)))
        assert step.number == number + 1


# --- gradients


@pytest.mark.parametrize("name", METHODS)
def test_one_step_follows_the_gradient_of_all_terms_together(name: str) -> None:
    kind, settings = METHODS[name]
    lr, half = 0.01, settings.steps // 2
    step = made(kind, settings, UNet(), lr=lr)
    step.number = half
    other = made(kind, settings, UNet())  # the same, for the sum of all terms and its gradient
    batch = Batch(**{**vars(other.moved(loader_batch())), "generator": seeded(6)})
    total = sum(
        term.weight * term.value
        for cost in costs_of(other.method, other.plain, batch, 0.5)
        for term in cost().terms.values()
    )
    total.backward()
    modules = [other.plain, *other.method.children()]
    expected = {}
    for module in modules:
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in module.parameters() if p.grad is not None))
        for parameter in module.parameters():
            if parameter.grad is not None:
                expected[parameter] = parameter - lr * parameter.grad * min(1.0, CLIP_NORM / (norm + 1e-6))
    assert step(loader_batch())["loss"] == pytest.approx(total.item(), rel=1e-5)
    learners = [step.plain, *(child for child in step.method.children() if not isinstance(child, Teacher))]
    moved = [p for module in learners for p in module.parameters()]
    assert len(moved) == len(expected)
    for parameter, before in zip(moved, expected, strict=True):
        torch.testing.assert_close(parameter, expected[before], rtol=1e-4, atol=1e-6)
        assert not torch.equal(parameter, before)


class Parts(Method[TeacherSettings]):
    """A second network and a head next to the student, each with a term of its own and a scale of its gradient."""

    settings_type = TeacherSettings
    scales: dict[str, float]

    def build(self, student: nn.Module) -> None:
        self.teacher = SecondNetwork(student, seed=1)
        self.head = nn.Conv3d(1, 1, 1)

    def passes(self, student: nn.Module, batch: Batch) -> Iterator[Any]:
        (pair,) = self.pairs(student)
        yield self.labeled_pass(pair, batch)

    def labeled_terms(self, p: Any, outputs: Tensor, answer: Any, batch: Batch) -> Cost:
        second, head = self.teacher.network(batch.x_l), self.head(batch.x_l)
        values = {"network": outputs.square().mean(), "second": second.square().mean(), "head": head.square().mean()}
        return Cost({name: Term(self.scales[name], value) for name, value in values.items()})

    def after_step(self, student: nn.Module, number: int) -> None:
        """Leave the second network where its optimiser brought it."""


@pytest.mark.parametrize("large", ["network", "second", "head"])
def test_each_module_is_clipped_on_its_own(large: str) -> None:
    step = made(Parts, TeacherSettings(**SMALL), Net(), lr=1.0)
    step.method.scales = {"network": 0.01, "second": 0.01, "head": 0.01, large: 1e4}
    x = loader_batch()["data"]
    modules = {"network": step.plain, "second": step.method.teacher.network, "head": step.method.head}
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
    gradients = {
        name: torch.autograd.grad(step.method.scales[name] * module(x).square().mean(), list(module.parameters()))
        for name, module in modules.items()
    }
    step(loader_batch())
    for name, module in modules.items():
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients[name]))
        assert (norm > 100) == (name == large)
        share = 12 / norm if name == large else 1.0
        for old, new, gradient in zip(before[name], module.parameters(), gradients[name], strict=True):
            torch.testing.assert_close(old - new, share * gradient, rtol=1e-3, atol=1e-5)


def test_every_optimizer_steps_at_its_own_rate_and_nothing_of_the_last_step_stays() -> None:
    """Two steps equal two gradients taken by themselves."""
    step = made(Parts, TeacherSettings(**SMALL), Net())
    step.method.scales = {"network": 0.1, "second": 0.2, "head": 0.3}
    first, second = step.optimizers
    first.param_groups[0]["lr"], second.param_groups[0]["lr"] = 0.5, 0.25
    modules = {"network": step.plain, "second": step.method.teacher.network, "head": step.method.head}
    own = deepcopy(modules)
    for number in range(2):
        x = loader_batch(number)["data"]
        for name, module in own.items():
            value, weights = step.method.scales[name] * module(x).square().mean(), list(module.parameters())
            for weight, gradient in zip(weights, torch.autograd.grad(value, weights), strict=True):
                weight.data -= (0.5 if name == "network" else 0.25) * gradient
        step(loader_batch(number))
    for name, module in modules.items():
        for mine, wanted in zip(module.parameters(), own[name].parameters(), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


# --- the teacher


def test_the_teacher_moves_after_the_optimizer_and_towards_the_new_student() -> None:
    settings = DyCONSettings(**SMALL, **UNSURE, ema=0.6, rampup=0.0, delay=0.0)
    step = made(DyCON, settings, UNet())
    pairs = ((step.method.teacher.network, step.plain), (step.method.teacher_head.network, step.method.head))
    seen = []
    step.method.teacher.network.decoder.register_forward_hook(
        lambda module, inputs, output: seen.append(copied(step.method.teacher.network))
    )
    for number in range(4):
        old = [copied(teacher) for teacher, _ in pairs]
        seen.clear()
        step(loader_batch(number))
        assert all(equal(weights, old[0]) for weights in seen)  # it taught with the weights that it had
        assert seen
        decay = min(1 - 1 / (number + 1), 0.6)
        for (teacher, student), before in zip(pairs, old, strict=True):
            for name, weight in teacher.state_dict().items():
                wanted = decay * before[name] + (1 - decay) * student.state_dict()[name]
                torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-7)
                assert not torch.equal(weight, before[name])


# --- steps that are skipped


@pytest.mark.parametrize("kind", [DyCON, DyCONCPS])
def test_a_skipped_step_changes_nothing_and_is_counted(kind: type[Method]) -> None:
    said: list[str] = []
    settings = kind.settings_type(**SMALL, **UNSURE, view="weak")
    step = made(kind, settings, UNet(), warn=said.append)
    for group in (group for optimizer in step.optimizers for group in optimizer.param_groups):
        group["momentum"] = 0.9
    step(loader_batch())
    kept = copied(step.plain), copied(step.method), [deepcopy(o.state_dict()) for o in step.optimizers]
    for _ in range(2):
        assert math.isnan(step(spoiled(loader_batch()))["loss"])
    assert equal(kept[0], copied(step.plain))
    assert equal(kept[1], copied(step.method))
    for before, optimizer in zip(kept[2], step.optimizers, strict=True):
        now = optimizer.state_dict()["state"]
        assert all(torch.equal(now[i]["momentum_buffer"], before["state"][i]["momentum_buffer"]) for i in now)
    step(loader_batch())
    assert not equal(kept[0], copied(step.plain))
    assert all(bool(value.isfinite().all()) for value in copied(step.plain).values())  # no gradient of them stayed
    assert [log["skipped_steps"] for log in step.log] == [0.0, 1.0, 1.0, 0.0]
    assert step.number == 4
    lines = [line.split(". ")[0] for line in said]
    assert lines == [f"WARNING: loss or gradient not finite, step {n} skipped" for n in (1, 2)]
    assert all("labelled l_0, l_1; unlabelled u_0, u_1" in line for line in said)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_finite_loss_and_another_gradient_changes_nothing(number: int, value: float) -> None:
    step = made(DyCONCPS, DyCONCPSSettings(**SMALL, **UNSURE, view="weak"), UNet(), warn=lambda line: None)
    step(loader_batch())
    kept = copied(step.plain), copied(step.method)
    module = (step.plain, step.method)[number]
    hook = next(p for p in module.parameters() if p.requires_grad).register_hook(lambda g: g * value)
    assert math.isfinite(step(loader_batch())["loss"])
    hook.remove()
    assert equal(kept[0], copied(step.plain))
    assert equal(kept[1], copied(step.method))
    assert step.log[-1]["skipped_steps"] == 1.0
    step(loader_batch())
    assert not equal(kept[0], copied(step.plain))


def test_five_skipped_steps_in_a_row_stop_and_a_good_one_begins_the_count_anew() -> None:
    step = made(MeanTeacher, MeanTeacherSettings(**SMALL, view="weak"), Net())
    good, bad = loader_batch(), spoiled(loader_batch())
    for batch in (*[bad] * 4, good, *[bad] * 4):
        step(batch)
    with pytest.raises(DivergedError, match=r"in 5 steps in a row, last with patches from labelled l_0, l_1; unlabel"):
        step(bad)


def test_a_method_without_unlabelled_patches_names_its_labelled_ones() -> None:
    said: list[str] = []
    step = made(LabeledOnly, TeacherSettings(**SMALL), Net(), warn=said.append)
    batch = {name: value for name, value in loader_batch().items() if not name.startswith("unlabeled")}
    step({**batch, "data": batch["data"] * math.nan})
    assert said[0].endswith("labelled l_0, l_1; unlabelled none")


# --- names and shares


def test_a_pass_names_its_terms_and_two_views_share_the_weight() -> None:
    step = made(CPS, CPSSettings(**SMALL, view="bcp", w=3.0), Net())
    step.number = 20
    loss = step(loader_batch())["loss"]
    (log,) = step.log
    ways = [f"{way}_cps{ending}" for ending in ("", "_second") for way in ("in", "out")]
    terms = {"supervised", "supervised_second", *ways}
    weighted = {f"{name}{kind}" for name in terms - {"supervised"} for kind in ("_weight", "_weighted")}
    agreements = {name.replace("cps", "agreement") for name in ways}
    assert set(log) == {*terms, *weighted, *agreements, "ramp", "classes_learned", "skipped_steps"}
    for name in ways:
        assert log[f"{name}_weight"] == pytest.approx(0.5 * 3.0)
        assert log[f"{name}_weighted"] == pytest.approx(1.5 * log[name])
    assert log["supervised_second_weight"] == 1.0
    total = log["supervised"] + sum(log[f"{name}_weighted"] for name in terms - {"supervised"})
    assert loss == pytest.approx(total.item(), rel=1e-6)
    assert len({log[name].item() for name in terms}) == len(terms)
    assert not any(value.requires_grad for value in log.values() if isinstance(value, Tensor))  # no graph is kept


def test_both_networks_of_co_training_see_the_same_inputs() -> None:
    step = made(CPS, CPSSettings(**SMALL, view="bcp", delay=0.0), Net())
    seen: list[list[Tensor]] = [[], []]
    for network, inputs_of in zip((step.plain, step.method.teacher.network), seen, strict=True):
        network.register_forward_hook(
            lambda module, inputs, output, to=inputs_of: to.append(inputs[0]) if torch.is_grad_enabled() else None
        )
    step(loader_batch())
    assert [len(inputs) for inputs in seen] == [3, 3]  # two mixes, and the labelled patches
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    assert not torch.equal(seen[0][0], seen[0][1])


def test_a_batch_on_the_device_has_no_field_for_labels_of_unlabelled_patches() -> None:
    step = made(MeanTeacher, MeanTeacherSettings(**SMALL), Net(), loss=lambda outputs, target: (outputs, target))
    step.weights = (0.8, 0.2)
    loaded = loader_batch()
    coarse = loaded["target"][..., ::2]
    moved = step.moved({**loaded, "target": [loaded["target"], coarse], "unlabeled_target": loaded["target"]})
    assert set(vars(moved)) == {"x_l", "y_l", "x_u", "supervised", "now", "generator", "levels"}
    assert [(w, y.data_ptr()) for w, y in moved.levels] == [
        (0.8, loaded["target"].data_ptr()),
        (0.2, coarse.data_ptr()),
    ]
    assert torch.equal(moved.x_l, loaded["data"])
    assert torch.equal(moved.x_u, loaded["unlabeled"])
    assert torch.equal(moved.y_l, loaded["target"])  # the finest of deep supervision
    outputs, target = moved.supervised("outputs")
    assert (outputs, [len(t) for t in target]) == ("outputs", [2, 2])
    assert torch.equal(target[1], coarse)
    assert moved.generator is step.generator
    assert len(made(LabeledOnly, TeacherSettings(), Net()).moved(loaded).x_u) == 0


# --- the frame of a view


class Shuffled(MeanTeacher):
    """Mean teacher whose student sees the unlabelled patches in another order, turned round along an axis."""

    def views(self, batch: Batch) -> Iterator[View]:
        def there(x: Tensor) -> Tensor:
            return x.roll(1, 0).flip(-1)

        yield View(there(batch.x_u), batch.x_u, restore=lambda y: y.flip(-1).roll(-1, 0))


class Deep(nn.Module):
    """Two outputs, as with deep supervision; a kernel of one voxel, so that order and direction do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv3d(1, CLASSES, 1), nn.Conv3d(1, CLASSES, 1)
        for seed, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=seeded(seed))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.fine(x), self.coarse(x[..., ::2])]


@pytest.mark.parametrize("deep", [False, True])
def test_outputs_are_restored_before_they_cost_anything(deep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logs, frames = [], []
    for kind in (Shuffled, MeanTeacher):
        student = Deep() if deep else Net()
        if not deep:
            student.conv.weight.data[:] = student.conv.weight.mean((2, 3, 4), keepdim=True)  # alike in both directions
        step = made(kind, MeanTeacherSettings(**SMALL, view="weak", rampup=0.0, delay=0.0), student)
        if deep:
            step.loss = lambda outputs, target: cross_entropy(outputs[0], target)
        terms = step.method.unlabeled_terms

        def noted(p: Any, outputs: Any, answer: Any, batch: Batch, terms: Any = terms) -> Cost:
            frames.append(outputs)
            return terms(p, outputs, answer, batch)

        monkeypatch.setattr(step.method, "unlabeled_terms", noted)
        with torch.no_grad():
            step.method.teacher.network.load_state_dict({k: v / 2 for k, v in student.state_dict().items()})
        step(loader_batch())
        logs.append(step.log[0])
    assert logs[0]["consistency"].item() == pytest.approx(logs[1]["consistency"].item(), rel=1e-5)
    assert logs[1]["consistency"] > 0.01
    for restored, plain in zip(*frames, strict=True):
        torch.testing.assert_close(restored, plain, rtol=1e-4, atol=1e-5)


# --- what a method may replace


@pytest.mark.parametrize(
    ("kind", "settings", "regions"),
    [
        (LabeledOnly, TeacherSettings(**SMALL, paste=1.0), 1),
        (BCP, BCPSettings(**SMALL, view="bcp", truth="both"), 5),
        (BCP, BCPSettings(**SMALL, truth="mixes"), 2),
        (BCP, BCPSettings(**SMALL), 2),
        (BCP, BCPSettings(**SMALL, pretrain=1.0), 1),
        (DyCON, DyCONSettings(**SMALL, view="bcp", wfecl=0.0, rampup=0.0, delay=0.0), 2),
    ],
)
def test_the_hook_of_region_losses_changes_them_everywhere(
    kind: type[Method], settings: TeacherSettings, regions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = made(kind, settings, Net())
    asked = []
    monkeypatch.setattr(
        step.method, "region_loss", lambda logits, labels, region, *_, **__: asked.append(region) or logits.sum() * 0
    )
    step(loader_batch())
    assert len(asked) == regions
