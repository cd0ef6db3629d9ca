"""MagicNet's and DHC's terms on fixed tensors, with small networks, against their recipes written out slowly."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.losses.voxels import entropy_weight
from nnunetv2_dycon.methods.dhc import DHC, DHCSettings
from nnunetv2_dycon.methods.dycon_magicnet import DyCONMagicNet
from nnunetv2_dycon.methods.magicnet import MagicNet, MagicNetSettings
from nnunetv2_dycon.options import Schedule
from nnunetv2_dycon.step import DataInfo
from tests import oracles
from tests.oracles import relative_error
from tests.passes import costs_of
from tests.recipes import CLASSES, SPACE, Net, Recorder, UNet, all_learned, batch, check
from tests.steps import loader_batch
from tests.steps import made as step_of

CUBES = (1, 2, 1)  # what a patch of 3 x 4 x 5 voxels can be cut into
PLACES = oracles.cube_places(SPACE, CUBES)
PLAIN = {"view": "weak", "rampup": 0.0, "delay": 0.0}


def magicnet(kind: type = MagicNet, **settings) -> tuple[MagicNet, UNet]:
    """Return the method with all classes learnt and a teacher of its own weights, and its student."""
    student = UNet()
    settings = kind.settings_type(**{**PLAIN, **settings})
    method = all_learned(kind(settings, DataInfo(CLASSES, patch=SPACE), seed=3))
    method.build(student)
    method.teacher.network.load_state_dict(UNet(1).state_dict())
    return method, student


def at(b: int, place: tuple) -> tuple:
    return (b, slice(None), *place)


def alone(network: nn.Module, x: Tensor) -> Tensor:
    """Outputs for each cube on its own, put where the cube was."""
    out = torch.zeros(len(x), CLASSES, *SPACE, dtype=x.dtype)
    for b in range(len(x)):
        for place in PLACES:
            out[at(b, place)] = network(x[at(b, place)][None])[0]
    return out


def origins(seen: Tensor, x: Tensor) -> dict[tuple[int, int], int]:
    """Of each cube (patch, place) that was seen the patch that it came from."""
    found = {}
    for b in range(len(seen)):
        for k, place in enumerate(PLACES):
            (found[b, k],) = (i for i in range(len(x)) if torch.equal(seen[at(b, place)], x[at(i, place)]))
    for k in range(len(PLACES)):
        assert sorted(found[b, k] for b in range(len(seen))) == list(range(len(x)))
    return found


def put_back(outputs: Tensor, found: dict[tuple[int, int], int]) -> Tensor:
    back = torch.zeros_like(outputs)
    for (b, k), origin in found.items():
        back[at(origin, PLACES[k])] = outputs[at(b, PLACES[k])]
    return back


def supervised(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels[:, 0].long())


def test_cubes_alone_learn_their_labels_and_their_place() -> None:
    method, student = magicnet(wcubes=0.7, wlocation=0.2)
    data = batch()
    assert method.cubes == CUBES
    assert method.describe() == "cubes 1 x 2 x 1"
    within, _, last = costs_of(method, student, data)
    found = check(within, "within", student, lambda net: supervised(alone(net, data.x_l.double()), data.y_l))
    assert {name: term.weight for name, term in found.terms.items()} == {"within": 0.7, "location": 0.2}
    layer, total, right = method.location.layer, 0.0, 0
    for x in torch.cat([data.x_l, data.x_u]):
        for k, place in enumerate(PLACES):
            features = student.encoder(x[(slice(None), *place)][None])[-1][0]
            logits = layer.weight @ torch.stack([channel.mean() for channel in features]) + layer.bias
            total, right = total + cross_entropy(logits[None], torch.tensor([k])), right + int(logits.argmax() == k)
    assert relative_error(found.terms["location"].value, total / 8) <= 1e-5
    assert found.logged["cubes_placed"].item() == right / 8
    for ours, theirs in zip(
        *(
            torch.autograd.grad(v, [layer.weight, *student.encoder.parameters()], retain_graph=True)
            for v in (found.terms["location"].value, total / 8)
        ),
        strict=True,
    ):
        assert relative_error(ours, theirs) <= 1e-3
    assert set(last().terms) == {"supervised"}


@pytest.mark.parametrize("blend", [True, False])
def test_exchanged_cubes_are_put_back_before_they_are_compared(blend: bool) -> None:
    method, student = magicnet(w=0.3, wcubes=0.7, noblend=not blend)
    data, recorder = batch(), Recorder(student)
    sizes = torch.tensor([0.9, 0.06, 0.04])
    method.recent[:2] = torch.stack([sizes * 1.2, sizes * 0.8])
    within, across, _ = costs_of(method, recorder, data)
    within()
    found = across()
    both = torch.cat([data.x_l, data.x_u])
    exchanged = origins(recorder.seen, both)
    assert any(origin != b for (b, _), origin in exchanged.items())
    recipe = lambda net: supervised(put_back(net(recorder.seen.double()), exchanged)[:2], data.y_l)  # noqa: E731
    check(lambda: found, "across", student, recipe)

    target = method.teacher.network(data.x_u).double()
    if blend:
        cubes = alone(student, data.x_u).detach().double()
        share = (sizes / 0.9)[target.argmax(1, keepdim=True)]
        mixed = (1 - share) * target + share * cubes
        assert 0.02 < (mixed.argmax(1) != target.argmax(1)).float().mean() < 0.98
        target = mixed
    one_hot = nn.functional.one_hot(target.argmax(1), CLASSES).movedim(-1, 1)
    recipe = lambda net: oracles.soft_ce_dice(put_back(net(recorder.seen.double()), exchanged)[2:], one_hot, None)  # noqa: E731
    check(lambda: found, "pseudo", student, recipe)
    assert {name: term.weight for name, term in found.terms.items()} == {"across": 0.7, "pseudo": 0.3}

    before = method.recent.clone()
    method.after_step(student, 0)
    assert torch.equal(method.recent[1:], before[:-1])
    counts = torch.bincount(target.argmax(1).flatten(), minlength=CLASSES) / target[:, 0].numel()
    torch.testing.assert_close(method.recent[0], counts)


def test_the_first_pseudo_labels_are_the_teachers() -> None:
    method, student = magicnet()
    data = batch()
    within, across, _ = costs_of(method, student, data)
    within()
    across()
    method.after_step(student, 0)
    said = method.teacher.network(data.x_u)  # moved by the step, but a weight of 0 keeps it at the student
    assert method.recent[0].sum().item() == pytest.approx(1.0)
    assert said.shape[1] == CLASSES
    target = UNet(1)(data.x_u).argmax(1)
    torch.testing.assert_close(method.recent[0], torch.bincount(target.flatten(), minlength=CLASSES) / target.numel())


def test_each_part_can_be_left_out() -> None:
    passes = {
        (): [{"within", "location"}, {"across", "pseudo"}, {"supervised"}],
        ("noblend",): [{"within", "location"}, {"across", "pseudo"}, {"supervised"}],
        ("nowithin",): [{"across", "pseudo"}, {"supervised"}],
        ("noacross",): [{"within", "location"}, {"pseudo"}, {"supervised"}],
        ("noacross", "nowithin"): [{"pseudo"}, {"supervised"}],
    }
    for left_out, names in passes.items():
        method, student = magicnet(**dict.fromkeys(left_out, True))
        assert [set(one().terms) for one in costs_of(method, student, batch())] == names
        assert (method.location is None) == ("nowithin" in left_out)
    method, student = magicnet(wlocation=0.0, paste=0.5)
    names = [set(one().terms) for one in costs_of(method, student, batch())]
    assert names == [{"within"}, {"across", "pseudo"}, {"paste_labeled"}, {"supervised"}]
    assert not [name for name in method.state_dict() if name.startswith("location")]


def test_without_exchange_the_blended_labels_are_learnt_on_the_patch() -> None:
    method, student = magicnet(noacross=True)
    method.recent[0] = torch.tensor([0.9, 0.06, 0.04])
    data = batch()
    within, plain, _ = costs_of(method, student, data)
    within()
    target = method.teacher.network(data.x_u)
    share = torch.tensor([1.0, 0.06 / 0.9, 0.04 / 0.9])[target.argmax(1, keepdim=True)]
    labels = ((1 - share) * target + share * alone(student, data.x_u).detach()).argmax(1)
    one_hot = nn.functional.one_hot(labels, CLASSES).movedim(-1, 1)
    check(plain, "pseudo", student, lambda net: oracles.soft_ce_dice(net(data.x_u.double()), one_hot, None))


def test_the_teacher_sees_the_noised_patch_and_the_student_the_exchanged_clean_one() -> None:
    method, student = magicnet(view="noise")
    data, recorder, seen = batch(), Recorder(student), []
    method.teacher.network.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for one in costs_of(method, recorder, data)[:2]:
        one()
    origins(recorder.seen, torch.cat([data.x_l, data.x_u]))
    (noised,) = seen
    assert 0 < (noised - data.x_u).abs().max() <= 0.2 + 1e-6


def test_classes_that_are_not_learnt_are_not_taught() -> None:
    method, student = magicnet()
    method.learned.counts.zero_()
    within, across, _ = costs_of(method, student, batch())
    within()
    found = across()
    slopes = torch.autograd.grad(found.terms["pseudo"].value, list(student.parameters()), retain_graph=True)
    assert not any(slope.any() for slope in slopes)
    assert found.terms["across"].value > 0


def test_cubes_that_do_not_fit_and_networks_without_strides_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"option cubes7: .* type another number"):
        magicnet(cubes=7)
    with pytest.raises(ConfigError, match=r"Net has no encoder\.stages that tell its stride"):
        MagicNet(MagicNetSettings(), DataInfo(CLASSES, patch=SPACE)).build(Net())
    method = MagicNet(MagicNetSettings(noacross=True, nowithin=True), DataInfo(CLASSES, patch=SPACE))
    method.build(Net())
    assert method.describe() == "no cubes"


def test_dycon_weighs_the_blended_labels_and_contrasts_features_that_were_put_back() -> None:
    method, student = magicnet(
        DyCONMagicNet, stage=0, anchors=0, gate=0.0, noblend=True, beta=Schedule(1.5), gamma=0.5, topk=2, w=0.3
    )
    data, recorder = batch(), Recorder(student)
    within, across, last = costs_of(method, recorder, data)
    within()
    found = across()
    exchanged = origins(recorder.seen, torch.cat([data.x_l, data.x_u]))
    target = method.teacher.network(data.x_u)
    logits = put_back(student(recorder.seen), exchanged)[2:]
    weight = entropy_weight(logits, target, beta=1.5)
    one_hot = nn.functional.one_hot(target.argmax(1), CLASSES).movedim(-1, 1)
    recipe = lambda net: oracles.soft_ce_dice(put_back(net(recorder.seen.double()), exchanged)[2:], one_hot, weight)  # noqa: E731
    check(lambda: found, "pseudo", student, recipe)
    features = put_back(student.encoder(recorder.seen)[0], exchanged)[2:]
    z = method.head(features)
    labels = torch.tensor(oracles.probability_labels(target.softmax(1).detach().numpy(), SPACE, 0.0, "majority"))
    taught = method.teacher_head.network(method.teacher.network.encoder(data.x_u)[0])
    of_patches = oracles.patch_weights(logits.detach(), SPACE)
    wanted = oracles.fecl(z, labels, taught, of_patches, tau=0.6, gamma=0.5, topk=2)
    assert relative_error(found.terms["fecl_unlabeled"].value, wanted) <= 1e-5
    assert set(found.terms) == {"across", "pseudo", "fecl_unlabeled"}
    assert set(last().terms) == {"supervised", "fecl_labeled"}


# ---------------------------------------------------------------------------------------------------------- DHC


def dhc(**settings) -> tuple[DHC, Net]:
    student = Net()
    method = all_learned(DHC(DHCSettings(rampup=0.0, delay=0.0, **settings), DataInfo(CLASSES), seed=3))
    method.build(student)
    method.teacher.network.load_state_dict({k: v / 2 for k, v in Net(1).state_dict().items()})
    method.shares.copy_(torch.tensor([0.9, 0.09, 0.01]))
    method.learning.copy_(torch.tensor([0.2, 0.01, 0.3]))
    method.unlearning.copy_(torch.tensor([0.01, 0.02, 0.001]))
    method.error.copy_(torch.tensor([0.1, 0.7, 0.4]))
    return method, student


@pytest.mark.parametrize("ga", [False, True])
def test_each_network_weighs_classes_in_its_own_way(ga: bool) -> None:
    method, student = dhc(w=0.2, ga=ga, gahardest=0.1 if ga else 1.0)
    data, second = batch(), method.teacher.network
    easy = [
        ((u + 1e-8) / (v + 1e-8)) ** 0.2 * e for u, v, e in ((0.01, 0.2, 0.1), (0.02, 0.01, 0.7), (0.001, 0.3, 0.4))
    ]
    factors = {"": [3 * v / max(easy) for v in easy], "_second": oracles.rarity([0.9, 0.09, 0.01])}
    assert factors["_second"][0] == 0
    for ending, values in factors.items():
        torch.testing.assert_close(method.class_weight(ending), torch.tensor(values))

    def loss(logits: Tensor, labels: Tensor, ending: str, keep: float, cross: bool) -> Tensor:
        if ga:
            dice = oracles.gadice(logits, labels, None, factors=factors[ending])
            return dice + oracles.gace(logits, labels, None, keep=keep, factors=factors[ending])
        dice, ce = oracles.class_weighted(logits, labels, factors[ending], None)
        return ce if cross else dice + ce

    answers = {
        x: {n: net(getattr(data, x)).detach() for n, net in (("", student), ("_second", second))}
        for x in ("x_u", "x_l")
    }
    groups = costs_of(method, student, data)
    for group, ending, network, x in (
        (groups[0], "", student, "x_u"),
        (groups[1], "_second", second, "x_u"),
        (groups[2], "_second", second, "x_l"),
        (groups[3], "", student, "x_l"),
    ):
        other = answers[x]["" if ending else "_second"].argmax(1, keepdim=True)
        images, name = getattr(data, x).double(), "cps" if x == "x_u" else "cps_labeled"
        recipe = lambda net, x=images, y=other, e=ending: loss(net(x), y, e, 1.0, True)  # noqa: E731
        found = check(group, f"{name}{ending}", network, recipe)
        assert found.terms[f"{name}{ending}"].weight == pytest.approx(0.1)
        if x == "x_l":
            recipe = lambda net, x=images, e=ending: loss(net(x), data.y_l, e, 0.1, False)  # noqa: E731
            assert check(lambda found=found: found, f"supervised{ending}", network, recipe)
            assert found.terms[f"supervised{ending}"].weight == 1.0


def test_neither_network_teaches_the_other_a_class_that_is_not_learnt() -> None:
    method, student = dhc()
    method.learned.counts.zero_()
    groups = costs_of(method, student, batch())
    second = method.teacher.network
    names = ("cps", "cps_second", "cps_labeled_second", "cps_labeled")
    for group, name, network in zip(groups, names, (student, second, second, student), strict=True):
        value = group().terms[name].value
        assert not any(slope.any() for slope in torch.autograd.grad(value, list(network.parameters())))


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_class_weights_follow_dice_and_shares_over_steps(delay: float) -> None:
    """Shares are those of the labels first, then of the second network's labels; against both written out."""
    settings = DHCSettings(epochs=1, iters=20, rampup=0.0, delay=delay)
    step = step_of(DHC, settings, Net(), lr=0.05)
    difficulty, shares = oracles.Difficulty(CLASSES), None
    assert step.method.class_weight("").tolist() == step.method.class_weight("_second").tolist() == [CLASSES] * CLASSES
    for number in range(12):
        loaded = loader_batch(number)
        if number % 3 == 1:
            loaded["target"][loaded["target"] == 2] = 1
        moved = step.moved(loaded)
        said = step.method.teacher.network(moved.x_u).argmax(1)
        labels = moved.y_l if number / 20 < delay or number == 0 else said
        now = np.bincount(labels.flatten().numpy(), minlength=CLASSES) / labels.numel()
        shares = now if shares is None else 0.99 * shares + 0.01 * now
        difficulty.see(step.plain(moved.x_l).argmax(1).numpy(), moved.y_l[:, 0].numpy())
        step(loaded)
        torch.testing.assert_close(step.method.shares.double(), torch.tensor(shares), rtol=1e-5, atol=1e-7)
        wanted = torch.tensor(difficulty.weights)
        torch.testing.assert_close(step.method.class_weight("").double(), wanted, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(
            step.method.class_weight("_second").double(),
            torch.tensor(oracles.rarity(shares.tolist()), dtype=torch.float64),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_class_that_nobody_shows_keeps_its_difficulty_and_does_not_outweigh_all_others() -> None:
    method, student = dhc()
    before = [value.clone() for value in (method.dice, method.learning, method.unlearning, method.error)]
    data = batch(labels=torch.zeros(2, 1, *SPACE, dtype=torch.long))
    logits = torch.zeros(2, CLASSES, *SPACE)
    logits[:, 0] = 5
    last = costs_of(method, student, data)[-1]
    last()
    method._counts = torch.tensor([[10.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    method._said = torch.tensor([1.0, 0.0, 0.0])
    method.after_step(student, 0)
    for value, old in zip((method.dice, method.learning, method.unlearning, method.error), before, strict=True):
        assert torch.equal(value[1:], old[1:])
        assert value[0] != old[0]
    method.shares.copy_(torch.tensor([0.99, 0.01, 0.0]))
    assert method.class_weight("_second")[1] > 0.3 * CLASSES * 0.9
