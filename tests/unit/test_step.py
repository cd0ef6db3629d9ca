"""The step with toy networks: no data set, no nnU-Net."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon import ranks
from nnunetv2_dycon.errors import DivergedError
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dycon import DyCON, DyCONSettings
from nnunetv2_dycon.methods.labeled_only import LabeledOnly
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_dycon.methods.settings import TeacherSettings
from nnunetv2_dycon.options import Settings
from nnunetv2_dycon.schedules import exponential, gaussian_ramp
from nnunetv2_dycon.step import CLIP_NORM, DataInfo, Method, Step, full_resolution
from nnunetv2_dycon.views import View
from tests.unit.test_recipes import CLASSES, SPACE, Net, UNet, images, seeded


def loader_batch(seed: int = 0, *, labeled: int = 2, unlabeled: int = 2) -> dict:
    """What nnU-Net's loader and ours give."""
    return {
        "data": images(seed, labeled),
        "target": torch.randint(0, CLASSES, (labeled, 1, *SPACE), generator=seeded(seed)),
        "keys": [f"l_{i}" for i in range(labeled)],
        "unlabeled": images(seed + 100, unlabeled),
        "unlabeled_keys": [f"u_{i}" for i in range(unlabeled)],
    }


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(full_resolution(outputs), target[:, 0])


def made(
    kind: type[Method], settings: Settings, network: nn.Module, *, loss=cross_entropy, lr: float = 0.1, **how
) -> Step:
    """Return the step of a method on a toy network, with plain gradient descent."""
    method = kind(settings, DataInfo(CLASSES), seed=3)
    method.build(network)
    optimizers = [torch.optim.SGD(network.parameters(), lr)]
    own = [p for p in method.parameters() if p.requires_grad]
    if own:
        optimizers.append(torch.optim.SGD(own, lr))
    how = {"device": torch.device("cpu"), "generator": seeded(6), **how}
    return Step(network, method, optimizers, loss, **how)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize(("epochs", "iters"), [(1, 8), (4, 2)])
def test_scheduled_numbers_follow_the_step_and_not_the_epoch(epochs: int, iters: int) -> None:
    settings = DyCONSettings(epochs=epochs, iters=iters, rampup=0.5, delay=0.2, view="noise", wfecl=0.0)
    step = made(DyCON, settings, Net())
    for number in range(8):
        step(loader_batch(number))
    for number, log in enumerate(step.log):
        ramp = gaussian_ramp(number / 8, rampup=0.5, delay=0.2)
        assert log["ramp"] == ramp
        assert log["beta"] == exponential(number / 8, 0.5, 0.05)
        assert log["uncl_weight"] == 0.5 * ramp
        assert log["uncl_weighted"].item() == pytest.approx(0.5 * ramp * log["uncl"].item())
    assert step.log[0]["ramp"] == 0 < step.log[2]["ramp"] < step.log[3]["ramp"] < step.log[4]["ramp"] == 1
    assert step.number == 8


def test_schedules_stay_at_their_end_beyond_the_training() -> None:
    step = made(DyCON, DyCONSettings(epochs=1, iters=2, view="noise", wfecl=0.0), Net())
    step.number = 10**6
    step(loader_batch())
    assert (step.log[0]["ramp"], step.log[0]["beta"]) == (1.0, pytest.approx(0.05))


def test_gradients_of_all_passes_add_up() -> None:
    settings = MeanTeacherSettings(view="bcp", w=0.7, rampup=0.0, delay=0.0, paste=0.3)
    step = made(MeanTeacher, settings, Net(), lr=0.0)
    step(loader_batch())
    found = gradients(step.network)
    step.generator.set_state(seeded(6).get_state())
    step.network.zero_grad()
    again = made(MeanTeacher, settings, step.network)
    again.method.teacher = step.method.teacher
    data = again.moved(loader_batch())
    total, answer = torch.zeros(()), None
    for p in again.method.passes(step.network, data):  # one graph of all
        answer = p.ask(p, data, answer)
        cost = p.cost(p, step.network(p.view.student), answer, data)
        total = total + sum(p.view.share * term.weight * term.value for term in cost.terms.values())
    total.backward()
    assert len(step.log[0]) > 8
    for ours, wanted in zip(found, gradients(step.network), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_a_step_begins_without_the_gradients_of_the_one_before() -> None:
    found = []
    for number in (1, 2):
        step = made(CPS, CPSSettings(rampup=0.0, delay=0.0), Net(), lr=0.0)
        for _ in range(number):
            step(loader_batch())
        found.append([*gradients(step.network), *gradients(step.method.teacher)])
    assert len(found[0]) == 4
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("kind", "settings", "network"),
    [
        (LabeledOnly, TeacherSettings(), Net()),
        (DyCON, DyCONSettings(stage=0, gate=0.0, wfecl=100.0, rampup=0.0, delay=0.0), UNet()),
        (CPS, CPSSettings(w=100.0, rampup=0.0, delay=0.0), Net()),
    ],
    ids=["student", "head", "second network"],
)
def test_each_module_is_clipped_on_its_own(kind: type[Method], settings: Settings, network: nn.Module) -> None:
    step = made(kind, settings, network, loss=lambda outputs, target: 1e4 * cross_entropy(outputs, target), lr=0.0)
    if kind is DyCON:  # a head whose gradient is too long
        with torch.no_grad():
            step.method.head.project.weight.mul_(1e-4)
            step.method.head.project.bias.mul_(1e-4)
    step(loader_batch())
    modules = [step.network, *(m for m in step.method.children() if gradients(m))]
    assert len(modules) == (1 if kind is LabeledOnly else 2)
    for module in modules:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(module)))
        assert norm == pytest.approx(CLIP_NORM, rel=1e-4)


def test_every_optimizer_steps_and_the_teacher_follows_the_student_of_after_the_step() -> None:
    network = UNet()
    step = made(DyCON, DyCONSettings(stage=0, gate=0.0, rampup=0.0, delay=0.0, ema=0.5, epochs=1, iters=9), network)
    step.number = 4  # decay min(1 - 1/5, 0.5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    head = {k: v.clone() for k, v in step.method.head.state_dict().items()}
    step(loader_batch())
    assert all(not torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert any(not torch.equal(v, head[k]) for k, v in step.method.head.state_dict().items())
    for k, v in step.method.teacher.network.state_dict().items():
        torch.testing.assert_close(v, (before[k] + network.state_dict()[k]) / 2)
    for k, v in step.method.teacher_head.network.state_dict().items():
        torch.testing.assert_close(v, (head[k] + step.method.head.state_dict()[k]) / 2)


def test_a_loss_that_is_not_finite_moves_nothing_is_counted_and_stops_after_five() -> None:
    said: list[str] = []
    network = Net()
    step = made(MeanTeacher, MeanTeacherSettings(), network, loss=lambda o, t: o.sum() * math.nan, warn=said.append)
    before = [p.clone() for p in network.parameters()]
    for _ in range(4):
        step(loader_batch())
    assert [log["skipped_steps"] for log in step.log] == [1.0] * 4
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert said[0] == "WARNING: loss not finite, step 0 skipped. Patches from labelled l_0, l_1; unlabelled u_0, u_1"
    step.loss = cross_entropy
    step(loader_batch())  # the count begins anew
    assert step.log[-1]["skipped_steps"] == 0.0
    step.loss = lambda o, t: o.sum() * math.inf
    for _ in range(4):
        step(loader_batch())
    with pytest.raises(DivergedError, match="5 steps in a row, last with patches from labelled l_0"):
        step(loader_batch())


def test_gradients_are_exchanged_in_the_final_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under DistributedDataParallel, whose `no_sync` holds for the forward pass too."""
    network, seen, waiting = Net(), [], []

    @contextmanager
    def no_sync():
        waiting.append(True)
        yield
        waiting.pop()

    network.no_sync = no_sync
    network.register_forward_hook(lambda *_: seen.append(bool(waiting)))
    network.conv.weight.register_hook(lambda _: seen.append(bool(waiting)))
    averaged: list[int] = []
    monkeypatch.setattr(ranks, "average_gradients", lambda parameters: averaged.append(len(list(parameters))))
    step = made(MeanTeacher, MeanTeacherSettings(view="bcp", paste=0.5), network)
    step.distributed = True
    step(loader_batch())
    assert seen == [True, True] * 3 + [False, False]  # forward and backward of both mixes, the pastes, the labelled
    assert averaged == [len(list(step.method.parameters()))]


def test_one_rank_whose_loss_is_not_finite_skips_the_step_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    step = made(LabeledOnly, TeacherSettings(), Net())
    step.distributed = True
    step.network.no_sync = None
    monkeypatch.setattr(ranks, "true_everywhere", lambda finite: finite & False)
    before = [p.clone() for p in step.network.parameters()]
    step(loader_batch())
    assert step.log[0]["skipped_steps"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, step.network.parameters(), strict=True))


class FakeScaler:
    """Multiplies the loss by 8 and notes who asks for what."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def scale(self, loss: Tensor) -> Tensor:
        self.calls.append("scale")
        return 8 * loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("unscale")
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= 8

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("step")
        optimizer.step()

    def update(self) -> None:
        self.calls.append("update")


def test_a_loss_scaler_changes_nothing_but_the_range_of_gradients() -> None:
    ends = []
    for scaler in (None, FakeScaler()):
        step = made(CPS, CPSSettings(rampup=0.0, delay=0.0), Net(), scaler=scaler)
        step(loader_batch())
        ends.append([p.clone() for m in (step.network, step.method) for p in m.parameters()])
    assert scaler.calls == ["scale"] * 4 + ["unscale"] * 2 + ["step"] * 2 + ["update"]
    for plain, scaled in zip(*ends, strict=True):
        torch.testing.assert_close(plain, scaled)


def test_forward_passes_and_terms_run_in_the_autocast_context_and_backward_passes_do_not() -> None:
    inside: list[bool] = []
    seen: list[tuple[str, bool]] = []

    @contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    network = Net()
    network.register_forward_hook(lambda *_: seen.append(("student", bool(inside))))
    step = made(MeanTeacher, MeanTeacherSettings(), network, autocast=context)
    step.method.teacher.network.register_forward_hook(lambda *_: seen.append(("teacher", bool(inside))))
    network.conv.weight.register_hook(lambda _: seen.append(("backward", bool(inside))))
    step(loader_batch())
    one = [("student", True), ("backward", False)]
    assert seen == [("teacher", True), *one, *one]


class Turned(LabeledOnly):
    """The labelled patches upside down for the network, and its outputs turned back."""

    def labeled_pass(self, pair, batch):
        view = View(batch.x_l.flip(2), restore=lambda x: x.flip(2))
        return super().labeled_pass(pair, batch)._replace(view=view)


def test_outputs_are_restored_before_they_are_compared_with_labels() -> None:
    network = nn.Conv3d(1, CLASSES, 1)
    first, second = ({k: v.clone() for k, v in network.state_dict().items()} for _ in range(2))
    losses = []
    for kind, start in ((LabeledOnly, first), (Turned, second)):
        network.load_state_dict(start)
        losses.append(made(kind, TeacherSettings(), network)(loader_batch())["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # a pointwise network sees no difference


def test_the_shares_of_views_and_the_endings_of_pairs_are_in_the_log() -> None:
    step = made(CPS, CPSSettings(view="bcp", w=3.0, rampup=0.0, delay=0.0), Net())
    step(loader_batch())
    weights = {name: value for name, value in step.log[0].items() if name.endswith("_weight")}
    halves = dict.fromkeys(["in_cps_weight", "out_cps_weight", "in_cps_second_weight", "out_cps_second_weight"], 1.5)
    assert weights == {**halves, "supervised_second_weight": 1.0}
    assert {"in_agreement", "out_agreement_second", "supervised", "supervised_second"} <= set(step.log[0])


@pytest.mark.parametrize(("labeled", "unlabeled"), [(1, 3), (3, 1)])
def test_fecl_of_each_half_weighs_as_its_share_of_the_patches(labeled: int, unlabeled: int) -> None:
    settings = DyCONSettings(
        stage=0, gate=0.0, wfecl=0.4, rampup=0.0, delay=0.0, view="noise", on="all", loss="guarded"
    )
    step = made(DyCON, settings, UNet())
    step(loader_batch(labeled=labeled, unlabeled=unlabeled))
    log = step.log[0]
    assert log["fecl_unlabeled_weight"] == pytest.approx(0.4 * unlabeled / 4)
    assert log["fecl_labeled_weight"] == pytest.approx(0.4 * labeled / 4)
    assert log["uncl_weight"] == pytest.approx(0.5 * unlabeled / 4)
    assert log["uncl_labeled_weight"] == pytest.approx(0.5 * labeled / 4)


def test_a_batch_has_no_unlabelled_patches_for_a_method_that_uses_none() -> None:
    assert len(made(LabeledOnly, TeacherSettings(), Net()).moved(loader_batch()).x_u) == 0
    assert len(made(MeanTeacher, MeanTeacherSettings(), Net()).moved(loader_batch()).x_u) == 2


def test_the_total_is_the_sum_of_all_weighted_terms() -> None:
    step = made(CPS, CPSSettings(w=2.0, rampup=0.0, delay=0.0), Net())
    loss = step(loader_batch())["loss"].item()
    log = step.log[0]
    terms = sum(v.item() for k, v in log.items() if k.endswith("_weighted")) + log["supervised"].item()
    assert loss == pytest.approx(terms, rel=1e-6)


def test_the_hook_of_region_losses_changes_them_everywhere() -> None:
    """Pastes, mixes and what a view of DyCON pasted: one hook."""
    from nnunetv2_dycon.methods.bcp import BCP, BCPSettings

    ramped = {"rampup": 0.0, "delay": 0.0}
    for kind, settings, number in (
        (LabeledOnly, TeacherSettings(paste=1.0), 1),
        (BCP, BCPSettings(pretrain=0.0), 4),
        (BCP, BCPSettings(pretrain=1.0), 1),
        (DyCON, DyCONSettings(wfecl=0.0, **ramped), 2),
    ):
        step = made(kind, settings, Net())
        asked = []
        step.method.region_loss = lambda logits, labels, region, asked=asked: asked.append(1) or logits.sum() * 0
        step(loader_batch())
        assert len(asked) == number
