"""Copy-paste: where true labels are taught, and when the labelled patches as they are have no pass of their own."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.dycon_bcp import DyCONBCP, DyCONBCPSettings
from nnunetv2_dycon.step import Batch, run_pass
from tests.recipes import CLASSES, Net, UNet, batch, made
from tests.steps import SMALL, loader_batch, spoiled
from tests.steps import made as made_step


class Coarse(nn.Module):
    """A network with three outputs, the second of half the resolution, the last, which has no weight, not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> list[Tensor]:
        finest = self.net(x)
        return [finest, nn.functional.avg_pool3d(finest, 2) * 1.5, finest[..., :1, :1, :1] * torch.nan]


def pasting() -> Batch:
    """Patches of a step that mixes."""
    return replace(batch(), now={"ramp": 1.0})


def slow_loss(logits: Tensor, labels: Tensor, region: Tensor) -> float:
    """Cross-entropy plus one minus Dice over a region, voxel by voxel."""
    cross, voxels, dice = 0.0, 0, []
    for b in range(len(logits)):
        places = region[b, 0].nonzero().tolist()
        voxels += region[b].numel()
        p = {tuple(v): torch.softmax(logits[b][(slice(None), *v)].double(), 0).tolist() for v in places}
        y = {v: int(labels[b, 0][v]) for v in p}
        cross += sum(-math.log(p[v][y[v]]) for v in p)
        for c in range(1, CLASSES):
            scale = region.numel() / region.sum().item()  # a mean over the region, with the smoothing of whole patches
            product = scale * sum(p[v][c] for v in p if y[v] == c)
            squares = scale * sum(p[v][c] ** 2 + (y[v] == c) for v in p)
            dice.append((2 * product + 1) / (squares + 1))
    return cross / region.sum().item() + 1 - sum(dice) / len(dice)


def test_labelled_regions_of_mixes_are_learnt_at_each_output() -> None:
    method, _ = made(BCP, BCPSettings(view="bcp", truth="mixes", w=0.5))
    network, data = Coarse(), pasting()
    data = replace(data, levels=((0.75, data.y_l), (0.25, data.y_l[..., ::2, ::2, ::2]), (0.0, data.y_l)))
    given = list(method.passes(network, data))
    assert [(p.view.name, p.final) for p in given] == [("in_", False), ("out_", True)]
    for p in given:
        cost, _ = run_pass(p, data)
        term = cost.terms[f"{p.view.name}labeled"]
        assert term.weight == 0.5  # of each of the two, and both are whole
        finest, coarse, _ = network(p.view.student)
        labels, pasted = p.view.truth, p.view.pasted
        for axis, size in enumerate(coarse.shape[2:], 2):  # the voxels at whole multiples of the step
            at = torch.tensor([i * labels.shape[axis] // size for i in range(size)])
            labels, pasted = labels.index_select(axis, at), pasted.index_select(axis, at)
        wanted = 0.75 * slow_loss(finest, p.view.truth, p.view.pasted) + 0.25 * slow_loss(coarse, labels, pasted)
        assert term.value.item() == pytest.approx(wanted, rel=1e-5)


def test_true_labels_of_mixes_count_as_learnt_or_not() -> None:
    method, student = made(BCP, BCPSettings(view="bcp", truth="mixes"))
    data = pasting()
    counts = torch.zeros(3, CLASSES)
    for p in method.passes(student, data):
        run_pass(p, data)
        said, truth, pasted = student(p.view.student).argmax(1), p.view.truth[:, 0], p.view.pasted[:, 0]
        for c in range(CLASSES):
            for row, where in enumerate(
                ((said == c) & (truth == c), (said == c) & (truth != c), (said != c) & (truth == c))
            ):
                counts[row, c] += (where & pasted).sum()
    before = method.learned.counts[0].clone()
    method.learned.update()
    assert torch.allclose(method.learned.counts[0], 0.98 * before + 0.02 * counts)


@pytest.mark.parametrize("kind", [(BCP, BCPSettings), (DyCONBCP, DyCONBCPSettings)])
def test_the_labelled_patches_stay_until_every_class_is_learnt(kind) -> None:
    step = made_step(kind[0], kind[1](**SMALL, truth="mixes"), UNet())
    step.method.learned.counts[:, 0, -1] = 0.3
    step.method.learned.counts[:, 1, -1] = 2.0
    step(loader_batch())
    assert {"supervised", "pseudo"} <= step.log[0].keys()
    step.method.learned.counts[:, 1, -1] = 0.0
    step.method.learned.counts[:, 0, -1] = 1e6
    step(loader_batch())
    assert "supervised" not in step.log[1]
    assert "labeled" in step.log[1]


@pytest.mark.parametrize("truth", ["patches", "mixes", "both"])
@pytest.mark.parametrize("kind", [(BCP, BCPSettings, {}), (DyCONBCP, DyCONBCPSettings, {"wfecl": 0.0})])
def test_where_true_labels_are_taught(kind, truth: str) -> None:
    """Pasted voxels have a gradient with `mixes` and `both` alone, and when all classes are learnt."""
    method, student = made(kind[0], kind[1](view="bcp", truth=truth, paste=0.0, **kind[2]))
    data = replace(pasting(), now={"ramp": 1.0, "beta": 0.1})
    for dice, learned in ((0.3, False), (1.0, True)):
        method.learned.counts[:, 0, -1], method.learned.counts[:, 1, -1] = dice, 2 * (1 - dice)
        *mixes, last = method.passes(student, data)
        mixed_only = learned and truth == "mixes"
        if mixed_only:
            mixes.append(last)
        assert [p.view.name for p in mixes] == ["in_", "out_"]
        assert last.view.name == ("out_" if mixed_only else "")
        assert last.final
        on_pasted = learned and truth != "patches"
        for p in mixes:
            outputs = student(p.view.student).detach().requires_grad_()
            terms = p.cost(p, outputs, p.ask(p, data, None), data).terms
            assert set(terms) == ({"pseudo", "labeled"} if on_pasted else {"pseudo"})
            sum(weight * value for weight, value in terms.values()).backward()
            taught = outputs.grad.abs().sum(1, keepdim=True) > 0
            assert taught[p.view.pasted].any() == on_pasted
            assert taught[~p.view.pasted].any()


def test_a_skipped_step_leaves_nothing_that_the_next_one_counts() -> None:
    steps = [made_step(BCP, BCPSettings(**SMALL, truth="mixes"), UNet()) for _ in range(2)]
    steps[0](spoiled(loader_batch()))
    for step in steps:
        step.generator.manual_seed(1)
        step(loader_batch(seed=1))
    assert torch.equal(steps[0].method.learned.counts, steps[1].method.learned.counts)


@pytest.mark.parametrize(
    ("view", "names"),
    [*((f"copy_paste_{way}", [""]) for way in ("in", "out", "either")), ("bcp", ["in_", "out_"])],
)
def test_one_mix_in_place_of_two_has_the_whole_weight(view: str, names: list[str]) -> None:
    method, student = made(BCP, BCPSettings(view=view, w=0.5, truth="both", paste=0.0))
    data = pasting()
    given = list(method.passes(student, data))
    assert [p.view.name for p in given] == [*names, ""]  # the labelled patches last
    assert {run_pass(p, data)[0].terms[f"{p.view.name}labeled"].weight for p in given[:-1]} == {0.5}


@pytest.mark.parametrize(("learned", "pastes"), [(0.3, True), (1.0, False)])
def test_pastes_among_labelled_patches_leave_with_them(learned: float, pastes: bool) -> None:
    step = made_step(BCP, BCPSettings(**SMALL, truth="mixes"), UNet())
    step.method.learned.counts[:, 0, -1], step.method.learned.counts[:, 1, -1] = learned, 2 * (1 - learned)
    step(loader_batch())
    assert ("paste_labeled" in step.log[0]) == ("supervised" in step.log[0]) == pastes
