"""Each method's terms on fixed tensors, with small networks, against its recipe written out slowly."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.voxels import entropy_weight, uncl
from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dycon import DyCON, DyCONSettings
from nnunetv2_dycon.methods.dycon_cps import DyCONCPS, DyCONCPSSettings
from nnunetv2_dycon.methods.labeled_only import LabeledOnly
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_dycon.methods.pseudo_label import PseudoLabel, PseudoLabelSettings
from nnunetv2_dycon.methods.uamt import UAMT, UAMTSettings
from nnunetv2_dycon.networks import SecondNetwork
from nnunetv2_dycon.options import Schedule
from nnunetv2_dycon.step import Batch, Cost, DataInfo, Method
from nnunetv2_dycon.views import noisy
from tests import oracles
from tests.oracles import relative_error
from tests.passes import costs_of

CLASSES = 3
SPACE = (3, 4, 5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, number: int = 2) -> Tensor:
    return torch.randn(number, 1, *SPACE, generator=seeded(seed))


class Net(nn.Module):
    """A network that is unsure enough for every recipe to have something to choose."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, CLASSES, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def made(method: type[Method], settings) -> tuple[Method, Net]:
    """Return the method, built, and its student; the teacher has weights of its own."""
    student = Net()
    built = method(settings, DataInfo(CLASSES), seed=3)
    built.build(student)
    built.teacher.network.load_state_dict({k: v / 2 for k, v in Net(1).state_dict().items()})
    return built, student


def batch(*, labels: Tensor | None = None) -> Batch:
    if labels is None:
        labels = torch.randint(0, CLASSES, (2, 1, *SPACE), generator=seeded(5))
    return Batch(
        x_l=images(3),
        y_l=labels,
        x_u=images(4),
        supervised=lambda outputs: nn.functional.cross_entropy(outputs, labels[:, 0].long(), ignore_index=-1),
        now={},
        generator=seeded(6),
    )


def check(group: Callable[[], Cost], name: str, network: nn.Module, recipe: Callable[[nn.Module], Tensor]) -> Cost:
    """Compare value and gradient of one term with the recipe, a function of a copy of the network in float64."""
    found = group()
    term = found.terms[name]
    gradients = torch.autograd.grad(term.value, list(network.parameters()), retain_graph=True)
    copy = type(network)().double()
    copy.load_state_dict(network.state_dict())
    wanted = recipe(copy)
    wanted_gradients = torch.autograd.grad(wanted, list(copy.parameters()))
    assert wanted.item() > 0
    assert relative_error(term.value, wanted) <= 1e-5
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    return found


@pytest.mark.parametrize("gate", [0.0, 0.9])
def test_pseudo_labels_are_the_teachers_where_it_is_sure(gate: float) -> None:
    method, student = made(PseudoLabel, PseudoLabelSettings(view="weak", gate=gate, w=2.0))
    data = batch()
    target = method.teacher.network(data.x_u)
    first, last = costs_of(method, student, data)
    recipe = lambda net: oracles.pseudo_label(net(data.x_u.double()), target, gate)[0]  # noqa: E731
    found = check(first, "pseudo", student, recipe)
    kept = oracles.pseudo_label(target, target, gate)[1]
    assert found.logged["voxels_kept"].item() == pytest.approx(kept)
    assert 0.1 < kept < 0.9 if gate else kept == 1
    assert found.terms["pseudo"].weight == 2.0
    assert set(last().terms) == {"supervised"}


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_uamt_learns_where_the_noised_teacher_agrees_with_itself(t: float) -> None:
    method, student = made(UAMT, UAMTSettings(view="noise", samples=3, rampup=0.0))
    data = batch()
    generator = seeded(6)  # as the method's: one noise for the target, then one for each sample
    target, *samples = (method.teacher.network(noisy(data.x_u, generator)) for _ in range(4))
    first, last = costs_of(method, student, data, t)
    r = math.exp(-5 * (1 - t) ** 2)
    recipe = lambda net: oracles.uamt(net(data.x_u.double()), target, samples, r)[0]  # noqa: E731
    found = check(first, "consistency", student, recipe)
    kept = oracles.uamt(target, target, samples, r)[1]
    assert found.logged["voxels_kept"].item() == pytest.approx(kept)
    assert 0.1 < kept < 0.9 if t < 1 else kept > 0.9
    assert set(last().terms) == {"supervised"}


def test_uamt_asks_the_noised_teacher_once_for_both_mixes_of_a_view() -> None:
    method, student = made(UAMT, UAMTSettings(view="bcp", samples=3, rampup=0.0))
    asked = []
    method.teacher.network.register_forward_hook(lambda module, inputs, output: asked.append(inputs[0]))
    for one in costs_of(method, student, batch()):
        one()
    assert len(asked) == 1 + 3  # the target, which both mixes share, and each sample


def test_uamt_without_a_certain_voxel_is_a_zero_on_the_graph() -> None:
    method, student = made(UAMT, UAMTSettings(rampup=0.0))
    for parameter in method.teacher.network.parameters():
        parameter.zero_()  # every class alike: no voxel is below ln C
    found = costs_of(method, student, batch())[0]().terms["consistency"].value
    found.backward()
    assert found.item() == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in student.parameters())


class Recorder(nn.Module):
    """A network that remembers its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.network(x)


def boxes_of(seen: Tensor, inside: Tensor, outside: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Find for each image its box of 2 x 3 x 3 voxels, which image the box came from and which the rest."""
    boxes, origins = [], []
    for image in seen:
        ((box, i, o),) = (
            (box, i, o)
            for i, o in itertools.product(range(len(inside)), range(len(outside)))
            if (box := image[0] == inside[i, 0]).sum() == 2 * 3 * 3 and torch.equal(image[0, ~box], outside[o, 0, ~box])
        )
        assert all(int(axis) in (2, 3) for axis in box.nonzero().amax(0) - box.nonzero().amin(0) + 1)
        boxes.append(box)
        origins.append((i, o))
    return boxes, origins


def test_bcp_pastes_both_ways_and_each_region_has_its_own_mean() -> None:
    method, student = made(BCP, BCPSettings(pretrain=0.2, w=0.5, alpha=0.25))
    data = batch()
    labels = data.y_l
    pseudo = method.teacher.network(data.x_u).argmax(1)
    recorder = Recorder(student)
    *mixes, last = costs_of(method, recorder, data, 0.2)
    for group, name in zip(mixes, ("in", "out"), strict=True):
        found = group()
        inside, outside = (data.x_u, data.x_l) if name == "in" else (data.x_l, data.x_u)
        boxes, origins = boxes_of(recorder.seen, inside, outside)
        box = torch.stack(boxes)
        true = labels[[(o if name == "in" else i) for i, o in origins], 0]
        guess = pseudo[[(i if name == "in" else o) for i, o in origins]]
        assert {i for i, _ in origins} == {o for _, o in origins} == {0, 1}
        region = box if name == "in" else ~box
        for term, target, where in (
            (f"{name}_labeled", true, ~region),
            (f"{name}_pseudo", guess, region),
        ):
            recipe = lambda net, target=target, where=where: oracles.region_loss(  # noqa: E731
                net(recorder.seen.double()), target, where
            )
            check(lambda found=found: found, term, student, recipe)
        assert found.terms[f"{name}_labeled"].weight == 0.5
        assert found.terms[f"{name}_pseudo"].weight == 0.125
    assert set(last().terms) == {"supervised"}


def test_bcp_pastes_nothing_that_is_not_annotated() -> None:
    method, student = made(BCP, BCPSettings())
    labels = torch.randint(0, CLASSES, (2, 1, *SPACE), generator=seeded(5))
    labels[:, 0, 1] = -1  # a whole slice
    data = batch(labels=labels)
    pseudo = method.teacher.network(data.x_u).argmax(1)
    recorder = Recorder(student)
    for group, name in zip(costs_of(method, recorder, data), ("in", "out"), strict=False):
        found = group()
        unlabeled = recorder.seen == data.x_u
        assert bool(unlabeled[:, 0, 1].all())
        assert not bool(unlabeled.all())
        recipe = lambda net, where=unlabeled: oracles.region_loss(net(recorder.seen.double()), pseudo, where[:, 0])  # noqa: E731
        check(lambda found=found: found, f"{name}_pseudo", student, recipe)


def test_bcp_begins_with_pastes_among_labelled_patches() -> None:
    method, student = made(BCP, BCPSettings(pretrain=0.2, w=0.5))
    data = batch()
    recorder = Recorder(student)
    first, last = costs_of(method, recorder, data, 0.19)
    found = first()
    boxes, origins = boxes_of(recorder.seen, data.x_l, data.x_l)
    assert all(i != o for i, o in origins)
    truth = torch.stack(
        [torch.where(box, data.y_l[i, 0], data.y_l[o, 0]) for box, (i, o) in zip(boxes, origins, strict=True)]
    )
    recipe = lambda net: oracles.region_loss(net(recorder.seen.double()), truth, truth >= 0)  # noqa: E731
    check(lambda: found, "paste_labeled", student, recipe)
    assert set(found.terms) == {"paste_labeled"}
    assert set(last().terms) == {"supervised"}


@pytest.mark.parametrize("method", [LabeledOnly, MeanTeacher, PseudoLabel, UAMT, BCP, DyCON])
def test_option_paste_adds_pastes_among_labelled_patches_to_any_teacher_method(method: type[Method]) -> None:
    extra = {"wfecl": 0} if method is DyCON else {}
    built, student = made(method, method.settings_type(paste=0.25, **extra))
    plain, _ = made(method, method.settings_type(**extra))
    labels = torch.randint(0, CLASSES, (2, 1, *SPACE), generator=seeded(5))
    labels[0, 0, 1, :2] = -1  # not annotated
    data = batch(labels=labels)
    recorder = Recorder(student)
    groups = costs_of(built, recorder, data)
    assert len(groups) == len(costs_of(plain, student, data)) + 1
    found = groups[-2]()
    pasted = recorder.seen == data.x_l.roll(-1, 0)
    assert torch.equal(recorder.seen, torch.where(pasted, data.x_l.roll(-1, 0), data.x_l))
    assert all(0 < int(box.sum()) < box.numel() for box in pasted)
    truth = torch.where(pasted, labels.roll(-1, 0), labels)[:, 0]
    recipe = lambda net: oracles.region_loss(net(recorder.seen.double()), truth, truth >= 0)  # noqa: E731
    check(lambda: found, "paste_labeled", student, recipe)
    assert found.terms["paste_labeled"].weight == 0.25
    assert set(found.terms) == {"paste_labeled"}
    assert "supervised" in groups[-1]().terms


def test_a_method_that_does_not_say_what_its_unlabelled_patches_cost_is_an_error() -> None:
    method, student = made(Method, MeanTeacherSettings())
    first, _ = costs_of(method, student, batch())
    with pytest.raises(TypeError, match="gives a pass of the student no term"):
        first()


def test_cps_crosses_the_hard_labels_of_two_networks() -> None:
    method, student = made(CPS, CPSSettings(w=2.0))
    data, second = batch(), method.teacher.network
    answers = [network(data.x_u).detach() for network in (student, second)]
    groups = costs_of(method, student, data)
    assert len(groups) == 4
    for group, name, network, target in (
        (groups[0], "cps", student, answers[1]),
        (groups[1], "cps_second", second, answers[0]),
    ):
        recipe = lambda net, target=target: oracles.pseudo_label(net(data.x_u.double()), target, 0.0)[0]  # noqa: E731
        assert check(group, name, network, recipe).terms[name].weight == 2.0
    for group, name, network in ((groups[2], "supervised_second", second), (groups[3], "supervised", student)):
        (found,) = group().terms.items()
        assert found[0] == name
        assert found[1].value == data.supervised(network(data.x_l))


class Encoder(nn.Module):
    strides = ((1, 1, 1),)
    output_channels = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv3d(1, 6, 3, padding=1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stages[0](x)]


class Decoder(nn.Module):
    deep_supervision = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(6, CLASSES, 1)

    def forward(self, skips: list[Tensor]) -> Tensor:
        return self.conv(skips[0])


class UNet(nn.Module):
    """Encoder and decoder of one stage: every voxel is a patch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


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
    method = DyCONCPS(settings, DataInfo(CLASSES), seed=3)
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
    method = DyCON(DyCONSettings(anchors=0, gate=0.0, stage=0, **settings), DataInfo(CLASSES))
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


def test_a_second_network_draws_its_weights_apart_from_everything_else() -> None:
    torch.manual_seed(11)
    student = nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Conv3d(4, CLASSES, 1))
    before = torch.get_rng_state()
    first, again, other = (SecondNetwork(student, seed=seed).network for seed in (11, 11, 12))
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        if weight.std() > 0:
            assert not torch.equal(weight, student.state_dict()[name])
            assert not torch.equal(weight, other.state_dict()[name])
    assert all(parameter.requires_grad for parameter in first.parameters())


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
