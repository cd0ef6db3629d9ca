"""Terms of DyCON and DyCONCPS on fixed tensors, against recipes written out slowly."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.voxels import entropy_weight, uncl
from nnunetv2_dycon.methods.bcp import BCP
from nnunetv2_dycon.methods.cps import CPS
from nnunetv2_dycon.methods.dycon import DyCON, DyCONSettings
from nnunetv2_dycon.methods.dycon_bcp import DyCONBCP, DyCONBCPSettings
from nnunetv2_dycon.methods.dycon_cps import DyCONCPS, DyCONCPSSettings
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher
from nnunetv2_dycon.options import Schedule
from nnunetv2_dycon.step import DataInfo, Method
from nnunetv2_dycon.trainers.names import trainer_class
from nnunetv2_dycon.views import noisy
from tests import oracles
from tests.oracles import relative_error
from tests.passes import costs_of
from tests.recipes import CLASSES, SPACE, Recorder, UNet, all_learned, batch, images, made, seeded


def eq1(logits: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Both parts of Eq. 1 by the slow loops, beta per unit of H / ln C."""
    return oracles.uncl(logits, target, beta=beta / math.log(CLASSES), entropy="dual", guarded=False)


def same_gradient(one: Tensor, other: Tensor, student: nn.Module, name: str) -> None:
    gradients = (
        torch.autograd.grad(value, list(student.parameters()), retain_graph=True, allow_unused=True)
        for value in (one, other)
    )
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or relative_error(ours, theirs) <= 1e-4, name


@pytest.mark.parametrize("t", [0.2, 1.0])
def test_dycon_is_eq_1_and_fecl_without_any_option(t: float) -> None:
    student = UNet(0)
    settings = trainer_class("nnUNetTrainerDyCON").settings
    assert settings == DyCONSettings()
    method = all_learned(DyCON(settings, DataInfo(CLASSES), seed=3))
    method.build(student)
    method.teacher.network.load_state_dict({name: 3 * value for name, value in UNet(1).state_dict().items()})
    with torch.no_grad():
        method.teacher_head.network.project.bias.add_(1.0)  # the teacher has a head of its own
    data = batch()
    seen = noisy(data.x_u, seeded(6))  # by the teacher alone
    target = method.teacher.network(seen).detach()
    rows = torch.tensor(oracles.probability_labels(target.softmax(1).numpy(), SPACE, settings.gate, settings.rule))
    assert 0.1 < (rows >= 0).double().mean() < 1
    first, last = costs_of(method, student, data, t)
    found = {**first().terms, **last().terms}

    def contrast(x: Tensor, of_teacher: Tensor, labels: Tensor) -> Tensor:
        z = method.head(student.encoder(x)[0])
        taught = method.teacher_head.network(method.teacher.network.encoder(of_teacher)[0])
        weight = oracles.patch_weights(student(x).detach(), SPACE)
        return oracles.fecl(z, labels, taught, weight, tau=settings.tau, gamma=settings.gamma, topk=settings.topk)

    ramp = math.exp(-5 * (1 - min(1, t / settings.rampup)) ** 2)
    beta = settings.beta.start * (settings.beta.end / settings.beta.start) ** t
    consistency, entropy = eq1(student(data.x_u), target, beta)
    wanted = {
        "uncl": (settings.wuncl * ramp, consistency),
        "uncl_entropy": (settings.wuncl * ramp, entropy),
        "fecl_unlabeled": (settings.wfecl * ramp / 2, contrast(data.x_u, seen, rows)),
        "fecl_labeled": (settings.wfecl * ramp / 2, contrast(data.x_l, data.x_l, data.y_l.flatten(1))),
        "supervised": (1.0, data.supervised(student(data.x_l))),
    }
    assert found.keys() == wanted.keys()
    for name, (weight, value) in wanted.items():
        assert found[name].weight == pytest.approx(weight), name
        assert relative_error(found[name].value, value) <= 1e-5, name
        same_gradient(found[name].value, value, student, name)


FRAMEWORKS = [
    (CPS, DyCONCPS, {"view": "weak", "w": 3.0}),
    (CPS, DyCONCPS, {"view": "cutmix"}),
    (BCP, DyCONBCP, {"w": 0.75, "alpha": 0.25, "pretrain": 0.0}),
    (BCP, DyCONBCP, {"truth": "both"}),
]


@pytest.mark.parametrize(("alone", "with_dycon", "settings"), FRAMEWORKS)
def test_with_its_losses_neutral_dycon_is_the_framework_alone(alone, with_dycon, settings) -> None:
    """UnCL's weight is 1 for beta 0, and FeCL has weight 0."""
    found = []
    for kind, extra in ((alone, {}), (with_dycon, {"wfecl": 0.0, "beta": Schedule(1e-3)})):
        student = UNet(0)
        method = all_learned(kind(kind.settings_type(**settings, **extra), DataInfo(CLASSES), seed=3))
        method.build(student)
        method.teacher.network.load_state_dict(UNet(1).state_dict())
        found.append({name: term for one in costs_of(method, student, batch()) for name, term in one().terms.items()})
    plain, dycons = found
    assert plain.keys() == dycons.keys()
    for name, (weight, value) in plain.items():
        assert dycons[name].weight == weight
        assert relative_error(dycons[name].value, value) <= 1e-3, name


def test_with_its_losses_neutral_dycon_is_mean_teacher_but_for_half_a_weight() -> None:
    """The denominator of Eq. 1 is 2 for beta 0."""
    found = []
    for kind, settings in (
        (MeanTeacher, MeanTeacher.settings_type(w=2.0)),
        (DyCON, DyCONSettings(wuncl=4.0, wfecl=0.0, beta=Schedule(1e-3))),
    ):
        student = UNet(0)
        method = all_learned(kind(settings, DataInfo(CLASSES), seed=3))
        method.build(student)
        method.teacher.network.load_state_dict(UNet(1).state_dict())
        found.append({name: term for one in costs_of(method, student, batch()) for name, term in one().terms.items()})
    plain, dycons = found
    assert dycons.keys() == {"uncl", "uncl_entropy", "supervised"}
    entropy = dycons["uncl_entropy"]
    assert entropy.weight * entropy.value < 1e-2
    weighted = dycons["uncl"].weight * dycons["uncl"].value
    assert relative_error(weighted, plain["consistency"].weight * plain["consistency"].value) <= 1e-3
    assert torch.equal(dycons["supervised"].value, plain["supervised"].value)
    assert DyCONSettings().wuncl == 2 * MeanTeacher.settings_type().w


@pytest.mark.parametrize("ending", ["", "_second"])
def test_dycon_in_co_training_weighs_the_others_labels_and_contrasts_both_networks(ending: str) -> None:
    student = UNet(0)
    settings = DyCONCPSSettings(beta=Schedule(0.7), wfecl=0.5, w=3.0, topk=5, anchors=0, gate=0.0, stage=0, view="weak")
    method = all_learned(DyCONCPS(settings, DataInfo(CLASSES), seed=3))
    method.build(student)
    second = method.teacher.network
    second.load_state_dict(UNet(1).state_dict())
    data, share = batch(), 0.5
    network, teacher = (student, second) if ending == "" else (second, student)
    found = {name: term for one in costs_of(method, student, data) for name, term in one().terms.items()}
    logits, target = network(data.x_u), teacher(data.x_u).detach()
    weight = oracles.entropy_weights(logits, target, beta=0.7, entropy="dual")
    hard = (target == target.amax(1, keepdim=True)).double()
    rows = torch.tensor(oracles.probability_labels(target.softmax(1).numpy(), SPACE, 0.0, "majority"))

    def contrast(x: Tensor, labels: Tensor) -> Tensor:
        z, of_teacher = (method.head(one.encoder(x)[0]) for one in (network, teacher))
        of_patches = oracles.patch_weights(network(x).detach(), SPACE)
        return oracles.fecl(z, labels, of_teacher, of_patches, tau=0.6, gamma=0.8, topk=5)

    wanted = {
        "cps": (3.0, oracles.soft_ce_dice(logits, hard, weight)),
        "fecl_unlabeled": (0.5 * share, contrast(data.x_u, rows)),
        "fecl_labeled": (0.5 * share, contrast(data.x_l, data.y_l.flatten(1))),
        "supervised": (1.0, data.supervised(network(data.x_l))),
    }
    assert len(found) == 2 * len(wanted)
    for name, (of_term, value) in wanted.items():
        term = found[f"{name}{ending}"]
        assert term.weight == of_term
        assert relative_error(term.value, value) <= 1e-5, name
        assert torch.autograd.grad(term.value, network.encoder.stages[0].weight, retain_graph=True)[0].any()
        unused = torch.autograd.grad(term.value, list(teacher.parameters()), retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in unused)


@pytest.mark.parametrize("truth", ["patches", "mixes"])
def test_dycon_in_copy_paste_weighs_the_teachers_labels(truth: str) -> None:
    student = UNet(0)
    settings = DyCONBCPSettings(view="copy_paste_in", truth=truth, beta=Schedule(0.7), wfecl=0.0, w=0.8, alpha=0.25)
    method = all_learned(DyCONBCP(settings, DataInfo(CLASSES), seed=3))
    method.build(student)
    method.teacher.network.load_state_dict({name: 3 * value for name, value in UNet(1).state_dict().items()})
    data, recorder = batch(), Recorder(student)
    found = costs_of(method, recorder, data)[0]().terms["pseudo"]
    logits, target = student(recorder.seen), method.teacher.network(data.x_u).detach()
    unlabeled = (recorder.seen == data.x_u)[:, 0]
    weight = oracles.entropy_weights(logits.detach(), target, beta=0.7, entropy="dual")
    assert weight[unlabeled].std() > 0.05  # or it would not matter where it goes
    assert found.weight == pytest.approx(0.8 * 0.25)
    wanted = oracles.region_loss(logits, target.argmax(1), unlabeled, weight)
    assert relative_error(found.value, wanted) <= 1e-5
    same_gradient(found.value, wanted, student, "pseudo")


def dycon(student: nn.Module, **settings) -> DyCON:
    method = all_learned(DyCON(DyCONSettings(anchors=0, gate=0.0, stage=0, **settings), DataInfo(CLASSES)))
    method.build(student)
    return method


HALF = {"fecl_unlabeled": 0.15, "fecl_labeled": 0.15}


@pytest.mark.parametrize(
    ("switches", "terms"),
    [
        ({}, {"uncl": 8.0, "uncl_entropy": 8.0, **HALF}),
        ({"view": "bcp"}, {"uncl": 8.0, "uncl_entropy": 8.0, "pasted": 1.0, **HALF}),
        ({"wfecl": 0.0, "wuncl": 0.5}, {"uncl": 0.5, "uncl_entropy": 0.5}),
        ({"loss": "ce_dice", "view": "bcp", "wfecl": 0.0, "wpasted": 0.25}, {"uncl": 8.0, "pasted": 0.25}),
        ({"wuncl": 0.0, "view": "bcp"}, {"pasted": 1.0, **HALF}),
        ({"wuncl": 0.0, "feclon": "labeled", "view": "bcp", "wpasted": 0.0}, {"fecl_labeled": 0.3}),
        ({"loss": "guarded", "feclon": "labeled", "view": "cutmix"}, {"uncl": 8.0, "fecl_labeled": 0.3}),
        (
            {"loss": "guarded", "lambdah": 0.5, "wfecl": 0.0, "view": "copy_paste"},
            {"uncl": 8.0, "uncl_entropy": 4.0, "pasted": 1.0},
        ),
        ({"loss": "ce_dice", "wfecl": 0.0, "focus": "uncertain", "view": "intensity"}, {"uncl": 8.0}),
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


@pytest.mark.parametrize(("nats", "unit"), [(False, math.log(CLASSES)), (True, 1.0)])
def test_beta_of_eq_1_counts_units_of_ln_c_unless_the_name_says_nats(nats: bool, unit: float) -> None:
    student = UNet()
    method = dycon(student, view="weak", wfecl=0.0, nats=nats, beta=Schedule(0.9))
    method.teacher.network.load_state_dict(UNet(1).state_dict())
    data = batch()
    found = costs_of(method, student, data)[0]().terms
    target = method.teacher.network(data.x_u)
    parts = oracles.uncl(student(data.x_u), target, beta=0.9 / unit, entropy="dual", guarded=False)
    for name, value in zip(("uncl", "uncl_entropy"), parts, strict=True):
        assert relative_error(found[name].value, value) <= 1e-5


@pytest.mark.parametrize("loss", ["literal", "guarded", "ce_dice"])
def test_co_training_can_have_uncl_as_a_term_of_its_own(loss: str) -> None:
    """As before UnCL was a weight: then the framework's term has none."""
    student = UNet()
    settings = DyCONCPSSettings(loss=loss, wuncl=2.0, w=3.0, wfecl=0.0, view="weak")
    method = all_learned(DyCONCPS(settings, DataInfo(CLASSES), seed=3))
    method.build(student)
    data = batch()
    found = costs_of(method, student, data)[0]().terms
    target = method.teacher.network(data.x_u).detach()
    plain = oracles.pseudo_label(student(data.x_u), target, 0.0)[0]
    assert relative_error(found["cps"].value, plain) <= 1e-5
    assert found["uncl"].weight == 2.0
    assert found["cps"].weight == 3.0


@pytest.mark.parametrize("wrong", [{"wuncl": 2.0}, {"on": "all"}, {"target": "hard"}])
def test_options_of_a_separate_uncl_are_refused_where_it_is_a_weight(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="lossown"):
        DyCONBCPSettings(**wrong)


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("kind", [DyCON, DyCONCPS])
def test_each_half_of_a_batch_has_the_share_of_its_patches(kind: type[Method], labeled: int, unlabeled: int) -> None:
    """The mean over both halves is the mean over all patches, also where one half is larger."""
    labels = torch.randint(0, CLASSES, (labeled, 1, *SPACE), generator=seeded(5))
    data = replace(batch(labels=labels), x_l=images(3, labeled), x_u=images(4, unlabeled))
    one, other = labeled / (labeled + unlabeled), unlabeled / (labeled + unlabeled)
    for settings, wanted in (
        (
            {"on": "all", "loss": "ce_dice"},
            {"uncl": 2 * other, "uncl_labeled": 2 * one, "fecl_unlabeled": other, "fecl_labeled": one},
        ),
        ({"loss": "ce_dice"}, {"uncl": 2.0, "fecl_unlabeled": other, "fecl_labeled": one}),
        ({"loss": "ce_dice", "feclon": "labeled"}, {"uncl": 2.0, "fecl_labeled": 1.0}),
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
        student,
        view="bcp",
        loss="ce_dice",
        wuncl=0.5,
        wfecl=0.5,
        topk=5,
        entropy=entropy,
        target=kind,
        beta=Schedule(0.7),
        rampup=0.0,
        delay=0.3,
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
