"""Terms of DyCON and DyCONCPS on fixed tensors, against recipes written out slowly."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.voxels import entropy_weight, uncl
from nnunetv2_dycon.methods.dycon import DyCON, DyCONSettings
from nnunetv2_dycon.methods.dycon_cps import DyCONCPS, DyCONCPSSettings
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher
from nnunetv2_dycon.options import Schedule
from nnunetv2_dycon.step import DataInfo, Method
from tests import oracles
from tests.oracles import relative_error
from tests.passes import costs_of
from tests.recipes import CLASSES, SPACE, Recorder, UNet, all_learned, batch, images, made, seeded


def contrast(method: DyCONCPS | DyCON, network: UNet, teacher: UNet, x: Tensor, labels: Tensor) -> Tensor:
    """FeCL of a pair by the slow loops, with the method's own head."""
    z, of_teacher = (method.head(one.encoder(x)[0]) for one in (network, teacher))
    weight = oracles.patch_weights(network(x).detach(), SPACE)
    return oracles.fecl(z, labels, of_teacher, weight, tau=0.6, gamma=0.8, topk=5)


def test_dycon_in_co_training_takes_each_network_as_the_others_teacher() -> None:
    student = UNet(0)
    settings = DyCONCPSSettings(
        loss="literal",
        beta=Schedule(0.7),
        wuncl=2.0,
        wfecl=0.5,
        w=3.0,
        topk=5,
        anchors=0,
        gate=0.0,
        stage=0,
        view="weak",
    )
    method = all_learned(DyCONCPS(settings, DataInfo(CLASSES), seed=3))
    method.build(student)
    second = method.teacher.network
    second.load_state_dict(UNet(1).state_dict())
    data, share = batch(), 0.5
    groups = costs_of(method, student, data)
    for (at, at_labeled), ending, network, teacher in (
        ((0, 3), "", student, second),
        ((1, 2), "_second", second, student),
    ):
        terms = groups[at]().terms
        target = teacher(data.x_u).detach()
        consistency, entropy = oracles.uncl(network(data.x_u), target, beta=0.7, entropy="dual", guarded=False)
        rows = torch.tensor(oracles.probability_labels(target.softmax(1).numpy(), SPACE, 0.0, "majority"))
        truth = data.y_l.flatten(1)
        wanted = {
            "uncl": (2.0, consistency),
            "uncl_entropy": (2.0, entropy),
            "cps": (3.0, oracles.pseudo_label(network(data.x_u), target, 0.0)[0]),
            "fecl_unlabeled": (0.5 * share, contrast(method, network, teacher, data.x_u, rows)),
        }
        assert set(terms) == {f"{name}{ending}" for name in wanted}
        found = {**terms, **groups[at_labeled]().terms}
        wanted["fecl_labeled"] = (0.5 * share, contrast(method, network, teacher, data.x_l, truth))
        wanted["supervised"] = (1.0, data.supervised(network(data.x_l)))
        assert set(found) == {f"{name}{ending}" for name in wanted}
        for name, (weight, value) in wanted.items():
            term = found[f"{name}{ending}"]
            assert term.weight == weight
            assert relative_error(term.value, value) <= 1e-5, name
            assert torch.autograd.grad(term.value, network.encoder.stages[0].weight, retain_graph=True)[0].any()
            unused = torch.autograd.grad(term.value, list(teacher.parameters()), retain_graph=True, allow_unused=True)
            assert all(gradient is None for gradient in unused)


def dycon(student: nn.Module, **settings) -> DyCON:
    method = all_learned(DyCON(DyCONSettings(anchors=0, gate=0.0, stage=0, **settings), DataInfo(CLASSES)))
    method.build(student)
    return method


@pytest.mark.parametrize(
    ("switches", "terms"),
    [
        ({}, {"uncl": 0.5, "pasted": 1.0, "fecl_unlabeled": 0.15, "fecl_labeled": 0.15}),
        (
            {"loss": "literal"},
            {"uncl": 0.5, "uncl_entropy": 0.5, "pasted": 1.0, "fecl_unlabeled": 0.15, "fecl_labeled": 0.15},
        ),
        ({"loss": "literal", "wfecl": 0.0}, {"uncl": 0.5, "uncl_entropy": 0.5, "pasted": 1.0}),
        ({"wfecl": 0.0, "wpasted": 0.25}, {"uncl": 0.5, "pasted": 0.25}),
        ({"wuncl": 0.0}, {"pasted": 1.0, "fecl_unlabeled": 0.15, "fecl_labeled": 0.15}),
        ({"wuncl": 0.0, "feclon": "labeled", "wpasted": 0.0}, {"fecl_labeled": 0.3}),
        ({"feclon": "labeled", "view": "cutmix"}, {"uncl": 0.5, "fecl_labeled": 0.3}),
        ({"loss": "guarded", "feclon": "labeled", "view": "noise"}, {"uncl": 0.5, "fecl_labeled": 0.3}),
        (
            {"loss": "guarded", "lambdah": 0.5, "wfecl": 0.0, "view": "copy_paste"},
            {"uncl": 0.5, "uncl_entropy": 0.25, "pasted": 1.0},
        ),
        ({"loss": "ce_dice", "wfecl": 0.0, "focus": "uncertain", "view": "intensity"}, {"uncl": 0.5}),
    ],
)
def test_switches_of_dycon_leave_the_terms_that_they_name(switches: dict, terms: dict[str, float]) -> None:
    """Weights of both directions together, where the view has two."""
    student = UNet()
    found: dict[str, float] = {}
    for group in costs_of(dycon(student, **switches), student, batch()):
        for name, term in group().terms.items():
            name = name.removeprefix("in_").removeprefix("out_")
            if term.weight:
                found[name] = found.get(name, 0.0) + term.weight
    assert found == {"supervised": 1.0, **terms}


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("kind", [DyCON, DyCONCPS])
def test_each_half_of_a_batch_has_the_share_of_its_patches(kind: type[Method], labeled: int, unlabeled: int) -> None:
    """The mean over both halves is the mean over all patches, also where one half is larger."""
    labels = torch.randint(0, CLASSES, (labeled, 1, *SPACE), generator=seeded(5))
    data = replace(batch(labels=labels), x_l=images(3, labeled), x_u=images(4, unlabeled))
    one, other = labeled / (labeled + unlabeled), unlabeled / (labeled + unlabeled)
    for settings, wanted in (
        ({"on": "all"}, {"uncl": 2 * other, "uncl_labeled": 2 * one, "fecl_unlabeled": other, "fecl_labeled": one}),
        ({}, {"uncl": 2.0, "fecl_unlabeled": other, "fecl_labeled": one}),
        ({"feclon": "labeled"}, {"uncl": 2.0, "fecl_labeled": 1.0}),
    ):
        student = UNet()
        own = {"anchors": 0, "gate": 0.0, "stage": 0, "view": "weak", "wuncl": 2.0, "wfecl": 1.0, "rampup": 0.0}
        method = kind(kind.settings_type(**own, **settings), DataInfo(CLASSES))
        method.build(student)
        found = {name: term.weight for one in costs_of(method, student, data) for name, term in one().terms.items()}
        for ending in ("", "_second") if kind is DyCONCPS else ("",):
            dycons = {name: found[f"{name}{ending}"] for name in wanted}
            assert dycons == pytest.approx(wanted)
        assert sum("fecl" in name or "uncl" in name for name in found) == len(wanted) * (1 + (kind is DyCONCPS))


@pytest.mark.parametrize(
    ("entropy", "kind"), [("dual", "soft"), ("teacher", "soft"), ("student", "soft"), ("dual", "hard"), ("dual", None)]
)
def test_dycon_on_both_mixes_of_bcp(entropy: str, kind: str | None) -> None:
    """True labels where labelled voxels were pasted, UnCL as the mean over the rest, FeCL with the mixed target."""
    student = UNet(0)
    method = dycon(
        student, view="bcp", wfecl=0.5, topk=5, entropy=entropy, target=kind, beta=Schedule(0.7), rampup=0.0, delay=0.3
    )
    method.teacher.network.load_state_dict(UNet(1).state_dict())
    with torch.no_grad():
        method.teacher_head.network.project.bias.add_(1.0)  # the teacher has a head of its own
    labels = torch.randint(0, CLASSES, (2, 1, *SPACE), generator=seeded(5))
    labels[0, 0, 1, :2] = -1  # not annotated
    data = batch(labels=labels)
    answer = method.teacher.network(data.x_u).detach()
    recorder = Recorder(student)
    recorder.encoder = student.encoder
    *mixes, _ = costs_of(method, recorder, data)
    for group, way in zip(mixes, ("in", "out"), strict=True):
        found = group()
        x = recorder.seen
        pasted = (x != data.x_u)[:, 0]
        partner = [
            next(j for j in range(2) if torch.equal(x[i, 0, m], data.x_l[j, 0, m])) for i, m in enumerate(pasted)
        ]
        truth = labels[partner, 0]
        assert set(partner) == {0, 1}
        assert bool((truth[pasted] >= 0).all())
        assert (pasted.float().mean() > 0.5) == (way == "in")
        target = torch.where(pasted[:, None], torch.full_like(answer, -40.0), answer)
        for k in range(CLASSES):
            target[:, k][pasted & (truth == k)] = 40.0
        logits = student(x)
        unpasted_only = oracles.entropy_weights(logits, target, beta=0.7, entropy=entropy) * ~pasted
        q = (target == target.amax(1, keepdim=True)).double() if kind != "soft" else target.softmax(1)
        consistency = oracles.soft_ce_dice(logits, q, unpasted_only / (~pasted).double().mean())
        rows = torch.tensor(oracles.probability_labels(target.softmax(1).numpy(), SPACE, 0.0, "majority"))
        z, of_teacher = (
            method.head(student.encoder(x)[0]),
            method.teacher_head.network(method.teacher.network.encoder(x)[0]),
        )
        weight = oracles.patch_weights(logits.detach(), SPACE)
        wanted = {
            "uncl": (0.25, consistency),
            "pasted": (0.5, oracles.region_loss(logits, truth, pasted)),
            "fecl_unlabeled": (0.125, oracles.fecl(z, rows, of_teacher, weight, tau=0.6, gamma=0.8, topk=5)),
        }
        assert set(found.terms) == {f"{way}_{name}" for name in wanted}
        for name, (share, value) in wanted.items():
            term = found.terms[f"{way}_{name}"]
            assert term.weight == pytest.approx(share)
            assert relative_error(term.value, value) <= 1e-5, name
            gradients = (
                torch.autograd.grad(one, list(student.parameters()), retain_graph=True, allow_unused=True)
                for one in (term.value, value)
            )
            for ours, theirs in zip(*gradients, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or relative_error(ours, theirs) <= 1e-4, name
    for group in costs_of(method, recorder, batch(), 0.2)[:-1]:
        weights = {name.split("_", 1)[1]: term.weight for name, term in group().terms.items()}
        assert weights == {"uncl": 0.0, "pasted": 0.5, "fecl_unlabeled": 0.0}


def test_the_teacher_is_asked_once_for_both_mixes() -> None:
    method, student = made(MeanTeacher, MeanTeacher.settings_type(view="bcp", w=2.0, rampup=0.0))
    asked = []
    method.teacher.network.register_forward_hook(lambda module, inputs, output: asked.append(inputs[0]))
    data = batch()
    first, second, _ = costs_of(method, student, data)
    assert [{name: term.weight for name, term in group().terms.items()} for group in (first, second)] == [
        {"in_consistency": 1.0},
        {"out_consistency": 1.0},
    ]
    assert len(asked) == 1
    assert asked[0] is data.x_u


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("entropy", ["dual", "teacher", "student"])
def test_uncertain_focus_turns_the_weight_round(classes: int, entropy: str) -> None:
    student, teacher = (2.0 * torch.randn(2, classes, *SPACE, generator=seeded(seed)) for seed in (0, 1))
    student.requires_grad_()
    how = {"beta": 1.5, "entropy": entropy, "focus": "uncertain"}
    wanted = oracles.uncl(student, teacher, guarded=True, **how)
    for ours, theirs in zip(uncl(student, teacher, form="guarded", **how), wanted, strict=True):
        assert relative_error(ours, theirs) <= 1e-5
        gradients = (torch.autograd.grad(value, student, retain_graph=True)[0] for value in (ours, theirs))
        assert relative_error(*gradients) <= 1e-5
    sure, unsure = torch.tensor([40.0, -40.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    assert entropy_weight(unsure, unsure, beta=1.5, focus="uncertain").item() == pytest.approx(1.0)
    assert entropy_weight(sure, sure, beta=1.5, focus="uncertain").item() == pytest.approx(math.exp(-1.5))
    with pytest.raises(ValueError, match="choose confident or uncertain"):
        entropy_weight(sure, sure, beta=1.0, focus="both")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "literal", "focus": "uncertain"}, "focusuncertain: .* use _lossguarded"),
        ({"lambdah": 0.1}, "lambdah: guarded UnCL alone"),
        ({"loss": "literal", "lambdah": 0.1}, "lambdah: guarded UnCL alone"),
        ({"loss": "guarded", "target": "hard"}, "targethard: .* leave lossguarded out"),
        ({"loss": "literal", "target": "hard"}, "targethard: .* leave lossliteral out"),
    ],
)
@pytest.mark.parametrize("kind", [DyCONSettings, DyCONCPSSettings])
def test_options_of_uncl_that_contradict_each_other_are_refused(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


@pytest.mark.parametrize(("epochs", "full"), [(2, 160), (8, 640), (10, 800), (40, 800), (80, 1600), (1000, 20000)])
def test_dycon_has_its_full_weight_after_a_tenth_of_the_training_but_not_before_classes_can_appear(epochs, full):
    """Hard labels of a teacher that has no class yet teach its absence; at twice the weight a training lost one."""
    ramp_at = DyCONSettings(epochs=epochs, iters=200).schedules()["ramp"]
    ramp = [ramp_at(step / (epochs * 200)) for step in range(epochs * 200)]
    assert ramp.index(1.0) == full
    assert ramp[full // 4] == pytest.approx(math.exp(-5 * 0.75**2), rel=0.05)
    chosen = DyCONSettings(epochs=epochs, iters=200, rampup=0.25).schedules()["ramp"]
    assert chosen(0.25) == 1.0
    assert chosen(0.24) < 1.0
