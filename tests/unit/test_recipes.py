"""Each method's terms on fixed tensors, with small networks, against its recipe written out slowly."""

import math

import pytest
import torch
from torch import nn

from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.cps import CPS, CPSSettings
from nnunetv2_dycon.methods.dycon import DyCON
from nnunetv2_dycon.methods.labeled_only import LabeledOnly
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_dycon.methods.pseudo_label import PseudoLabel, PseudoLabelSettings
from nnunetv2_dycon.methods.uamt import UAMT, UAMTSettings
from nnunetv2_dycon.networks import SecondNetwork
from nnunetv2_dycon.step import Method
from nnunetv2_dycon.views import noisy
from tests import oracles
from tests.passes import costs_of
from tests.recipes import (
    CLASSES,
    SPACE,
    Recorder,
    batch,
    boxes_of,
    check,
    made,
    seeded,
)


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


def test_bcp_pastes_both_ways_and_each_region_has_its_own_mean() -> None:
    method, student = made(BCP, BCPSettings(view="bcp", truth="both", pretrain=0.2, w=0.5, alpha=0.25, paste=0.0))
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
    method, student = made(BCP, BCPSettings(view="bcp"))
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
    extra = {DyCON: {"wfecl": 0}, BCP: {"truth": "both"}}.get(method, {})
    built, student = made(method, method.settings_type(paste=0.25, **extra))
    plain, _ = made(method, method.settings_type(paste=0.0, **extra))
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
