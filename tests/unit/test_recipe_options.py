"""What a method hands to its losses: options that are not at their defaults, against the slow reference values."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon.losses.patches import covered_share
from nnunetv2_dycon.losses.voxels import entropy_weight, hard_targets, soft_ce_dice
from nnunetv2_dycon.methods import dycon as dycon_module
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dycon import DyCON, DyCONSettings
from nnunetv2_dycon.methods.dycon_cps import DyCONCPS, DyCONCPSSettings
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_dycon.methods.pseudo_label import PseudoLabelSettings
from nnunetv2_dycon.methods.uamt import UAMT, UAMTSettings
from nnunetv2_dycon.networks import ProjectionHead
from nnunetv2_dycon.options import Schedule
from nnunetv2_dycon.step import DataInfo, Method, agreement
from tests import oracles
from tests.oracles import relative_error
from tests.passes import costs_of
from tests.recipes import CLASSES, SPACE, Decoder, Net, UNet, all_learned, batch, check, made, seeded

GRID = (2, 2, 3)
IGNORED = CLASSES


class Encoder(nn.Module):
    """Two stages, the second on `GRID`."""

    strides = ((1, 1, 1), (2, 2, 2))
    output_channels = (6, 5)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 5, 3, stride=2, padding=1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stages[0](x)
        return [fine, self.stages[1](fine)]


class CoarseUNet(UNet):
    """A patch of FeCL has several voxels."""

    def __init__(self, seed: int = 0) -> None:
        nn.Module.__init__(self)
        self.encoder, self.decoder = Encoder(), Decoder()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=seeded(seed)))


def dycon(student: nn.Module, **settings) -> DyCON:
    """Return DyCON with a teacher of weights of its own."""
    method = all_learned(DyCON(DyCONSettings(rampup=0.0, delay=0.0, **settings), DataInfo(CLASSES, IGNORED), seed=7))
    method.build(student)
    method.teacher.network.load_state_dict(type(student)(1).state_dict())
    return method


@pytest.mark.parametrize("rule", ["majority", "any_foreground"])
def test_fecl_takes_every_option_of_its_name(rule: str) -> None:
    student = CoarseUNet()
    method = dycon(
        student, view="weak", stage=1, anchors=0, gate=0.72, rule=rule, tau=0.3, gamma=2.0, topk=2, wfecl=0.7
    )
    labels = torch.zeros(2, 1, *SPACE, dtype=torch.long)
    labels[:, :, :, 2:] = 1
    labels[:, :, 0, 0, 4] = 2  # a lesion smaller than its patch
    labels[0, 0, 0, 0, 0] = IGNORED
    data = replace(batch(labels=labels), supervised=lambda outputs: outputs.mean())
    first, last = costs_of(method, student, data)
    target = method.teacher.network(data.x_u)
    rows = {
        "fecl_unlabeled": oracles.probability_labels(target.softmax(1).numpy(), GRID, 0.72, rule),
        "fecl_labeled": oracles.target_labels(labels.numpy(), GRID, CLASSES, IGNORED, rule),
    }
    found = {"fecl_unlabeled": first(), "fecl_labeled": last()}
    for name, x in (("fecl_unlabeled", data.x_u), ("fecl_labeled", data.x_l)):
        marked = torch.tensor(rows[name])
        assert (marked < 0).any()
        assert (marked >= 0).any()
        z = method.head(student.encoder(x)[1])
        taught = method.teacher_head.network(method.teacher.network.encoder(x)[1])
        weight = oracles.patch_weights(student(x).detach(), GRID)
        wanted = oracles.fecl(z, marked, taught, weight, tau=0.3, gamma=2.0, topk=2)
        assert wanted.item() > 0
        assert relative_error(found[name].terms[name].value, wanted) <= 1e-5
        assert found[name].terms[name].weight == pytest.approx(0.35)
    kept = torch.tensor(rows["fecl_unlabeled"])
    assert found["fecl_unlabeled"].logged["patches_kept"].item() == pytest.approx((kept >= 0).float().mean().item())
    first, last = costs_of(method, student, data)
    first()
    again = last().logged  # of the second step alone
    marked = [torch.tensor(rows[name]) for name in rows]
    for c in (1, 2):
        wanted = sum(int((row == c).sum()) for row in marked)
        assert found["fecl_labeled"].logged[f"anchors_{c}"].item() == again[f"anchors_{c}"].item() == wanted
        share = covered_share(labels, marked[1], GRID, CLASSES)[c].item()
        assert found["fecl_labeled"].logged[f"covered_{c}"].item() == pytest.approx(share)
    foreground = (kept > 0).float().mean().item()
    assert found["fecl_unlabeled"].logged["foreground_patches"].item() == pytest.approx(foreground)


def test_fecl_compares_as_many_patches_as_option_anchors_says(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, fecl = [], dycon_module.fecl
    monkeypatch.setattr(dycon_module, "fecl", lambda z, *a, **k: shapes.append(z.shape[:2]) or fecl(z, *a, **k))
    student = UNet()
    for one in costs_of(dycon(student, view="weak", anchors=11), student, batch()):
        one()
    assert shapes == [(2, 11)] * 2


def test_the_head_starts_from_the_seed_of_the_training() -> None:
    wanted = ProjectionHead(6, seed=7)
    assert torch.equal(dycon(UNet()).head.expand.weight, wanted.expand.weight)


@pytest.mark.parametrize("focus", ["confident", "uncertain"])
@pytest.mark.parametrize("entropy", ["dual", "teacher"])
def test_uncl_on_cross_entropy_takes_focus_and_entropy(focus: str, entropy: str) -> None:
    student = UNet()
    method = dycon(student, view="weak", loss="ce_dice", wfecl=0.0, focus=focus, entropy=entropy, beta=Schedule(1.5))
    data = batch()
    found = costs_of(method, student, data)[0]().terms["uncl"]
    target, logits = method.teacher.network(data.x_u), student(data.x_u)
    weight = entropy_weight(logits, target, beta=1.5, entropy=entropy, focus=focus)
    assert relative_error(found.value, soft_ce_dice(logits, hard_targets(target).one_hot, weight)) <= 1e-6


@pytest.mark.parametrize(("view", "noised"), [("noise", True), ("weak", False)])
def test_uncl_on_all_patches_shows_the_teacher_the_labelled_ones_as_the_view_does(view: str, noised: bool) -> None:
    student = UNet()
    method = dycon(student, view=view, on="all", loss="literal")
    seen: list[Tensor] = []
    method.teacher.network.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    data = batch()
    for one in costs_of(method, student, data):
        one()
    for x, patches in zip(seen, (data.x_u, data.x_l), strict=True):
        difference = (x - patches).abs()
        assert bool(difference.max() > 0) == noised
        assert difference.max() <= 0.2 + 1e-6


@pytest.mark.parametrize("loss", ["mse", "ce_dice"])
def test_mean_teacher_learns_the_probabilities_of_its_average(loss: str) -> None:
    method, student = made(MeanTeacher, MeanTeacherSettings(view="weak", loss=loss, w=3.0))
    data = batch()
    target = method.teacher.network(data.x_u)

    def recipe(net: Net) -> Tensor:
        logits = net(data.x_u.double())
        return (
            oracles.mse(logits, target, None)
            if loss == "mse"
            else oracles.soft_ce_dice(logits, target.softmax(1), None)
        )

    first, last = costs_of(method, student, data)
    found = check(first, "consistency", student, recipe)
    assert found.terms["consistency"].weight == 3.0
    alike = (student(data.x_u).argmax(1) == target.argmax(1)).float().mean().item()
    assert 0 < alike < 1
    assert found.logged["agreement"].item() == pytest.approx(alike)
    assert set(last().terms) == {"supervised"}


@pytest.mark.parametrize(
    "kind", [MeanTeacherSettings, PseudoLabelSettings, UAMTSettings, CPSSettings, DyCONCPSSettings, DyCONSettings]
)
def test_unlabelled_terms_begin_after_the_delay_and_are_full_at_the_end_of_the_ramp(kind: type) -> None:
    ramp = kind(rampup=0.25, delay=0.1).schedules()["ramp"]
    assert [ramp(t) for t in (0.0, 0.099, 0.25, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert ramp(0.2) == pytest.approx(math.exp(-5 * 0.2**2))


def test_agreement_is_the_share_of_voxels_with_the_same_class() -> None:
    one = torch.tensor([[[[2.0, 0.0, 1.0, 5.0]], [[1.0, 3.0, 0.0, 4.0]]]])
    other = torch.tensor([[[[9.0, 0.0, 0.0, 1.0]], [[0.0, 9.0, 1.0, 0.0]]]])
    assert agreement(one, other).item() == 0.75
    assert agreement(one, one).item() == 1.0


def test_a_probability_that_is_the_gate_passes_it() -> None:
    logits = torch.zeros(1, 2, 1, 1)
    assert hard_targets(logits, gate=0.5).weight.item() == 1.0
    assert hard_targets(logits, gate=math.nextafter(0.5, 1) + 1e-6).weight.item() == 0.0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (CPS, CPSSettings(view="copy_paste")),
        (DyCONCPS, DyCONCPSSettings(stage=0, view="weak", on="all", loss="guarded")),
        (DyCONCPS, DyCONCPSSettings(stage=0, view="bcp")),
        (UAMT, UAMTSettings()),
    ],
)
def test_no_answer_of_a_teacher_keeps_a_graph(kind: type[Method], settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """In co-training the teacher is a network that learns, too."""
    student = UNet()
    method = kind(settings, DataInfo(CLASSES))
    method.build(student)
    graphs = []
    for network in {student, method.teacher.network}:
        network.encoder.register_forward_hook(lambda module, inputs, output: graphs.append(output[0].requires_grad))
    answers = []
    for name in ("unlabeled_terms", "labeled_terms"):
        terms = getattr(method, name)
        monkeypatch.setattr(method, name, lambda p, o, a, b, terms=terms: answers.append(a) or terms(p, o, a, b))
    passes = [one() for one in costs_of(method, student, batch())]
    assert sum(graphs) == len(passes) == len(answers)  # the student's passes alone
    held = [t for answer in answers if answer is not None for t in answer if isinstance(t, Tensor)]
    assert held
    assert not any(t.requires_grad for t in held)
