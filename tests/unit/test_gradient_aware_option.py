"""Option `ga`: where the gradient-aware losses stand in for Dice and cross-entropy, against slow values."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.voxels import entropy_weight, hard_targets
from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dycon import DyCON, DyCONSettings
from nnunetv2_dycon.methods.dycon_cps import DyCONCPS, DyCONCPSSettings
from nnunetv2_dycon.methods.labeled_only import LabeledOnly
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_dycon.methods.pseudo_label import PseudoLabel, PseudoLabelSettings
from nnunetv2_dycon.methods.settings import TeacherSettings
from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.options import Schedule, parse
from nnunetv2_dycon.step import Batch, DataInfo, Method
from tests import oracles
from tests.oracles import relative_error
from tests.passes import costs_of
from tests.recipes import CLASSES, Recorder, UNet, all_learned, batch, check, made
from tests.training import begin, named, steps

ONCE = {"rampup": 0.0, "delay": 0.0}


def with_levels() -> Batch:
    """A batch whose labels are the only level of the loss."""
    data = batch()
    return replace(data, levels=((1.0, data.y_l),))


def wanted(logits: Tensor, labels: Tensor, keep: float, weight: Tensor | None = None) -> Tensor:
    """Both losses for labels (B, *S)."""
    labels = labels[:, None]
    return oracles.gadice(logits, labels, weight) + oracles.gace(logits, labels, weight, keep=keep)


@pytest.mark.parametrize(("options", "keep"), [({}, 1.0), ({"gahardest": 0.1}, 0.1)])
def test_the_control_takes_all_voxels_or_the_hardest_and_pastes_likewise(options: dict, keep: float) -> None:
    method, student = made(LabeledOnly, TeacherSettings(ga=True, paste=0.5, **options))
    recorder, data = Recorder(student), with_levels()
    paste, last = costs_of(method, recorder, data)
    found = paste()
    truth = torch.where(recorder.seen == data.x_l, data.y_l, data.y_l.roll(-1, 0))[:, 0]
    check(lambda: found, "paste_labeled", student, lambda net: wanted(net(recorder.seen.double()), truth, keep))
    check(last, "supervised", student, lambda net: wanted(net(data.x_l.double()), data.y_l[:, 0], keep))


def test_every_level_of_deep_supervision_has_the_weight_of_nnunet() -> None:
    method, _ = made(LabeledOnly, TeacherSettings(ga=True, gahardest=0.1))
    data = batch()
    fine = torch.randn(2, CLASSES, *data.y_l.shape[2:], dtype=torch.float64, requires_grad=True)
    coarse, labels = fine[..., ::2].detach(), data.y_l[..., ::2]
    data = replace(data, levels=((0.75, data.y_l), (0.25, labels), (0.0, labels[..., :1])))
    value = method.supervised_loss([fine, coarse, coarse[..., :1] * torch.nan], data)  # weight 0 asks for no loss
    reference = 0.75 * wanted(fine, data.y_l[:, 0], 0.1) + 0.25 * wanted(coarse, labels[:, 0], 0.1)
    assert relative_error(value, reference) <= 1e-12


@pytest.mark.parametrize("gate", [0.0, 0.9])
def test_pseudo_labels_take_all_voxels_and_the_gate_acts(gate: float) -> None:
    method, student = made(PseudoLabel, PseudoLabelSettings(view="weak", gate=gate, ga=True, gahardest=0.1, **ONCE))
    data = with_levels()
    hard = hard_targets(method.teacher.network(data.x_u), gate)
    labels = hard.one_hot.argmax(1)
    first, _ = costs_of(method, student, data)
    check(first, "pseudo", student, lambda net: wanted(net(data.x_u.double()), labels, 1.0, hard.weight))


def test_co_training_takes_all_voxels_with_the_weight_of_uncl() -> None:
    data = with_levels()
    for kind, settings in (
        (CPS, CPSSettings(ga=True, gahardest=0.1, **ONCE)),
        (DyCONCPS, DyCONCPSSettings(ga=True, gahardest=0.1, wfecl=0.0, view="weak", beta=Schedule(1.5), **ONCE)),
    ):
        student = UNet()
        method = all_learned(kind(settings, DataInfo(CLASSES), seed=3))
        method.build(student)
        method.teacher.network.load_state_dict(UNet(1).state_dict())
        target = method.teacher.network(data.x_u).detach()
        weight = None
        if kind is DyCONCPS:
            weight = entropy_weight(student(data.x_u).detach(), target, beta=1.5)
        first, _, second_labeled, _ = costs_of(method, student, data)
        recipe = lambda net, t=target, w=weight: wanted(net(data.x_u.double()), t.argmax(1), 1.0, w)  # noqa: E731
        check(first, "cps", student, recipe)
        second = method.teacher.network
        recipe = lambda net: wanted(net(data.x_l.double()), data.y_l[:, 0], 0.1)  # noqa: E731
        check(second_labeled, "supervised_second", second, recipe)


def test_mixes_take_a_tenth_of_the_labelled_region_and_all_of_the_pseudo_labelled_one() -> None:
    method, student = made(BCP, BCPSettings(view="bcp", truth="both", ga=True, gahardest=0.1))
    data, recorder = with_levels(), Recorder(student)
    guess = method.teacher.network(data.x_u).argmax(1)
    found = costs_of(method, recorder, data)[0]()
    unlabeled = (recorder.seen == data.x_u)[:, 0]
    for term, keep, region in (("in_labeled", 0.1, ~unlabeled), ("in_pseudo", 1.0, unlabeled)):
        partner = torch.stack(
            [
                data.y_l[next(j for j in (0, 1) if torch.equal(image[0][r], data.x_l[j, 0][r])), 0]
                for image, r in zip(recorder.seen, ~unlabeled, strict=True)
            ]
        )
        labels = (guess if keep == 1.0 else partner).masked_fill(~region, -1)
        recipe = lambda net, y=labels, k=keep: wanted(net(recorder.seen.double()), y, k)  # noqa: E731
        check(lambda: found, term, student, recipe)


def test_uncl_on_hard_labels_takes_them_and_on_probabilities_stays() -> None:
    values = {}
    for ga in (True, False):
        for target in ("hard", "soft"):
            student = UNet()
            settings = DyCONSettings(loss="ce_dice", target=target, wfecl=0.0, view="weak", ga=ga, **ONCE)
            method = all_learned(DyCON(settings, DataInfo(CLASSES), seed=7))
            method.build(student)
            method.teacher.network.load_state_dict(UNet(1).state_dict())
            values[ga, target] = costs_of(method, student, with_levels())[0]().terms["uncl"].value.item()
    assert values[True, "soft"] == values[False, "soft"]
    assert values[True, "hard"] != values[False, "hard"]


@pytest.mark.parametrize("method", [LabeledOnly, MeanTeacher])
def test_region_based_labels_are_refused_in_one_line(method: type[Method]) -> None:
    with pytest.raises(ConfigError, match=r"option ga: region-based labels .*; leave it out"):
        method(method.settings_type(ga=True), DataInfo(3, regions=True))


def test_squares_have_no_labels_to_count() -> None:
    settings = {"view": "weak", **ONCE}
    (one, student), (other, _) = (made(MeanTeacher, MeanTeacherSettings(ga=ga, **settings)) for ga in (True, False))
    values = [costs_of(m, student, with_levels())[0]().terms["consistency"].value.item() for m in (one, other)]
    assert values[0] == values[1]


@pytest.mark.parametrize(("deep", "options", "keep"), [(True, "_gahardest0p1", 0.1), (True, "", 1.0), (False, "", 1.0)])
def test_a_training_of_the_control_has_these_losses_at_each_output(
    trainer, deep: bool, options: str, keep: float
) -> None:
    t = trainer(named(f"nnUNetTrainerLabeledOnly_ga{options}_seed1"))
    t.enable_deep_supervision = deep
    begin(t)
    seen: list = []
    t.network.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    step = steps(t, 1)[0]
    outputs, targets = (x if deep else [x] for x in (seen[0], step["target"]))
    weights = t.loss.weight_factors if deep else [1.0]
    assert len(outputs) == len(targets) == len(weights)
    assert not deep or len(weights) > 1
    from nnunetv2_dycon.losses.gradient_aware import gradient_aware

    total = sum(w * sum(gradient_aware(o, y, keep=keep)) for w, o, y in zip(weights, outputs, targets, strict=True))
    assert step["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert isinstance(unwrap(t.network), nn.Module)


def test_the_hardest_voxels_are_an_option_of_ga_alone() -> None:
    with pytest.raises(ConfigError, match=r"option gahardest: .*; add _ga"):
        parse("_gahardest0p1", TeacherSettings)


@pytest.mark.parametrize(("ga", "expected"), [(True, 0.1), (False, 1.0)])
def test_a_checkpoint_of_before_the_option_took_a_tenth(ga: bool, expected: float) -> None:
    stored = asdict(TeacherSettings(ga=ga))
    del stored["gahardest"]
    assert TeacherSettings.translated(stored)["gahardest"] == expected
    assert TeacherSettings.translated(stored | {"gahardest": 0.5})["gahardest"] == 0.5
