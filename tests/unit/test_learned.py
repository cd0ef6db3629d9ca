"""Classes that the labelled patches have not taught yet: who they are, and that unlabelled terms leave them alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnunetv2_dycon.learned import LearnedClasses, class_counts, teach_learned
from nnunetv2_dycon.losses.gradient_aware import gradient_aware
from nnunetv2_dycon.losses.mse import mse
from nnunetv2_dycon.losses.voxels import hard_targets, region_ce_dice, soft_ce_dice, uncl
from nnunetv2_dycon.methods.bcp import BCP, BCPSettings
from nnunetv2_dycon.methods.cps import CPS
from nnunetv2_dycon.methods.dycon import DyCON
from nnunetv2_dycon.methods.labeled_only import LabeledOnly
from nnunetv2_dycon.methods.mean_teacher import MeanTeacher
from nnunetv2_dycon.methods.settings import TeacherSettings
from nnunetv2_dycon.step import Method
from tests.recipes import UNet, seeded
from tests.steps import METHODS, SMALL, copied, equal, loader_batch, made, spoiled

CLASSES = 5
LEARNED = torch.tensor([True, False, True, True, False])
SPACE = (3, 4, 5)


def drawn(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(2, CLASSES, *SPACE, generator=seeded(seed), dtype=torch.float64)


COSTS = {
    "squares": lambda s, t: mse(s, t),
    "cross-entropy and Dice, soft": lambda s, t: soft_ce_dice(s, torch.softmax(t, 1)),
    "cross-entropy and Dice, hard": lambda s, t: soft_ce_dice(s, hard_targets(t).one_hot),
    "gated": lambda s, t: soft_ce_dice(s, hard_targets(t, 0.6).one_hot, hard_targets(t, 0.6).weight),
    "region": lambda s, t: region_ce_dice(s, t.argmax(1, keepdim=True), torch.ones_like(s[:, :1], dtype=torch.bool)),
    "gradient aware": lambda s, t: sum(gradient_aware(s, t.argmax(1, keepdim=True))),
    "Eq. 1": lambda s, t: sum(uncl(s, t, beta=0.7)),
    "guarded": lambda s, t: sum(uncl(s, t, beta=0.7, form="guarded")),
}


@pytest.mark.parametrize("cost", COSTS)
def test_no_gradient_lowers_a_class_that_is_not_learnt(cost: str) -> None:
    student, teacher = drawn(1).requires_grad_(), drawn(2)
    taught = teach_learned(student, teacher, LEARNED)
    (slope,) = torch.autograd.grad(COSTS[cost](taught.student, taught.teacher), student)
    assert slope.abs().max() > 0
    assert slope[:, ~LEARNED].max() <= 0  # a step goes against the slope
    (plain,) = torch.autograd.grad(COSTS[cost](student, teacher), student)
    assert plain[:, ~LEARNED].max() > 1e-6  # which it does without


def test_a_network_that_has_never_shown_a_class_is_not_taught_that_it_is_absent() -> None:
    """The student finds a class that its teacher does not know: the teacher's class costs it nothing there."""
    teacher = torch.zeros(1, CLASSES, *SPACE, dtype=torch.float64)
    teacher[:, 2] = 4.0
    teacher[:, ~LEARNED] = -20.0
    student = torch.zeros_like(teacher)
    student[:, 1] = 7.0  # not learnt by the rule, and right
    student.requires_grad_()
    for cost in (COSTS[name] for name in ("cross-entropy and Dice, hard", "gated", "region")):
        taught = teach_learned(student, teacher, LEARNED)
        (slope,) = torch.autograd.grad(cost(taught.student, taught.teacher), student)
        (plain,) = torch.autograd.grad(cost(student, teacher), student)
        assert slope.abs().max() < 0.01 * plain.abs().max()


@pytest.mark.parametrize("cost", COSTS)
def test_voxels_of_a_teacher_class_that_is_not_learnt_teach_nothing(cost: str) -> None:
    student, teacher = drawn(1).requires_grad_(), drawn(2)
    taught = teach_learned(student, teacher, LEARNED)
    silent = ~LEARNED[teacher.argmax(1)]
    assert torch.equal(taught.voxels[:, 0], ~silent)
    assert 0.1 < silent.double().mean() < 0.9
    (slope,) = torch.autograd.grad(COSTS[cost](taught.student, taught.teacher), student)
    assert not slope.movedim(1, -1)[silent].any()
    assert slope.movedim(1, -1)[~silent].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_both_networks_choose_among_learnt_classes_and_the_teachers_class_takes_in_the_others(dtype) -> None:
    """Against probabilities added up voxel by voxel."""
    student, teacher = drawn(1).to(dtype), drawn(2).to(dtype)
    taught = teach_learned(student, teacher, LEARNED)
    assert taught.student.dtype == taught.teacher.dtype == dtype
    for logits, got in ((student, taught.student), (teacher, taught.teacher)):
        p, q = (torch.softmax(x.double(), 1).movedim(1, -1).reshape(-1, CLASSES) for x in (logits, got))
        for voxel, top in enumerate(teacher.argmax(1).flatten().tolist()):
            want = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
            if LEARNED[top]:
                want = torch.where(LEARNED, p[voxel], 0.0)
                want[top] += p[voxel, ~LEARNED].sum()
            assert torch.allclose(q[voxel], want, atol=1e-12 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("cost", COSTS)
def test_the_gradient_is_that_of_the_merged_logits_but_for_what_lowers_a_class_left_out(cost: str) -> None:
    """Against autograd of the sum written with where and logsumexp."""
    student, teacher = drawn(1).requires_grad_(), drawn(2)
    taught = teach_learned(student, teacher, LEARNED)
    (slope,) = torch.autograd.grad(COSTS[cost](taught.student, taught.teacher), student)

    top = torch.nn.functional.one_hot(teacher.argmax(1), CLASSES).movedim(-1, 1).bool()
    out = ~LEARNED.view(1, -1, 1, 1, 1)
    group = student.masked_fill(~(top | out), -torch.inf).logsumexp(1, keepdim=True)
    silent = ~LEARNED[teacher.argmax(1, keepdim=True)]
    background = torch.tensor([0.0, *[-1e4] * (CLASSES - 1)], dtype=torch.float64).view(1, -1, 1, 1, 1)
    merged = torch.where(silent, background, torch.where(top, group, torch.where(out, -1e4, student)))
    (exact,) = torch.autograd.grad(COSTS[cost](merged, taught.teacher), student)
    assert torch.allclose(slope[:, LEARNED], exact[:, LEARNED], rtol=1e-9, atol=1e-15)
    assert torch.allclose(slope[:, ~LEARNED], exact[:, ~LEARNED].clamp_max(0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("cost", COSTS)
def test_a_student_that_is_not_finite_shows_in_every_loss(cost: str) -> None:
    """Nothing is learnt, so that no voxel is taught; hidden, its gradient would end the training."""
    student, teacher = drawn(1).requires_grad_(), drawn(2)
    taught = teach_learned(student * torch.nan, teacher, torch.zeros(CLASSES, dtype=torch.bool))
    assert not torch.isfinite(COSTS[cost](taught.student, taught.teacher))


def test_voxels_with_a_true_label_teach_every_class() -> None:
    student, teacher = drawn(1).requires_grad_(), drawn(2)
    known = torch.rand(2, 1, *SPACE, generator=seeded(3)) < 0.5
    taught = teach_learned(student, teacher, LEARNED, known)
    (slope,) = torch.autograd.grad(mse(taught.student, taught.teacher), student)
    (plain,) = torch.autograd.grad(mse(student, teacher), student)
    assert torch.equal(slope.where(known, 0), plain.where(known, 0))
    assert bool(taught.voxels[known].all())
    assert slope[:, ~LEARNED].where(~known, 0).max() <= 0


def test_classes_are_learnt_by_the_dice_of_recent_labelled_patches() -> None:
    """Against the average of counts written out, over changing answers."""
    tracked = LearnedClasses(CLASSES, 0.4, students=2, ignore_label=7)
    counts = torch.zeros(2, 3, CLASSES)
    for step in range(60):
        truth = torch.randint(-1, CLASSES - 1, (2, 1, *SPACE), generator=seeded(step))  # never the last class
        truth[0, 0, 0, 0, :2] = 7
        for student in range(2):
            noise = torch.randn(2, CLASSES, *SPACE, generator=seeded(1000 + step))
            strength = 3.0 * step / 60 if student == 0 else 2.0
            right = torch.stack([truth[:, 0] == c for c in range(CLASSES)], 1).float()
            right[:, 1] = 0  # class 1 is never said but by chance
            logits = noise + strength * right
            tracked.see(student, logits, truth)
            tracked.update()
            said, ok = logits.argmax(1), (truth[:, 0] >= 0) & (truth[:, 0] != 7)
            for c in range(CLASSES):
                t, s = (truth[:, 0] == c) & ok, (said == c) & ok
                for row, value in enumerate(((t & s).sum(), (s & ~t).sum(), (t & ~s).sum())):
                    counts[student, row, c] = 0.98 * counts[student, row, c] + 0.02 * value
    dice = 2 * counts[:, 0] / (2 * counts[:, 0] + counts[:, 1] + counts[:, 2]).clamp_min(1e-9)
    assert torch.allclose(tracked.dice, dice, atol=1e-5)
    assert torch.equal(tracked.learned, (dice >= 0.4).all(0))
    assert tracked.learned.tolist() == [True, False, True, True, False]


def test_counts_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process with the patches of both counts."""
    truth = [torch.randint(0, CLASSES, (2, 1, *SPACE), generator=seeded(rank)) for rank in range(2)]
    said = [torch.randn(2, CLASSES, *SPACE, generator=seeded(10 + rank)) for rank in range(2)]
    whole = LearnedClasses(CLASSES, 0.4)
    whole.see(0, torch.cat(said), torch.cat(truth))
    whole.update()
    other = class_counts(said[1], truth[1], None).float()
    monkeypatch.setattr("nnunetv2_dycon.ranks.world_size", lambda: 2)
    monkeypatch.setattr("nnunetv2_dycon.ranks.mean_everywhere", lambda mine: (mine + other) / 2)
    first = LearnedClasses(CLASSES, 0.4)
    first.see(0, said[0], truth[0])
    first.update()
    assert torch.equal(first.counts, whole.counts)


def test_nothing_is_learnt_before_the_first_labelled_patch_unless_all_classes_count() -> None:
    assert not LearnedClasses(CLASSES, 0.4).learned.any()
    assert LearnedClasses(CLASSES, 0.0).learned.all()


@pytest.mark.parametrize("kind", [BCP, CPS, DyCON, MeanTeacher])
def test_unlabelled_terms_have_the_share_of_their_weight_that_is_learnt(kind: type[Method]) -> None:
    """One of two foreground classes is learnt: half of each weight but nnU-Net's own; with none there is no term."""
    options = {"rampup": 0.0} | ({"pretrain": 0.0} if kind is BCP else {"delay": 0.0})

    def weights(dice_of_last: float) -> dict[str, float]:
        step = made(kind, kind.settings_type(**SMALL, **options), UNet())
        step.method.learned.counts[:, 0, -1] = dice_of_last
        step.method.learned.counts[:, 1, -1] = 2 * (1 - dice_of_last)
        step(loader_batch())
        return {
            name: value for name, value in step.log[0].items() if name.endswith("_weight") and "supervised" not in name
        }

    whole, half = weights(1.0), weights(0.3)
    assert whole.keys() == half.keys() != set()
    assert half == {name: value / 2 for name, value in whole.items()}


@pytest.mark.parametrize(("pretrain", "pastes"), [(0.0, False), (0.1, True)])
def test_copy_paste_waits_for_the_first_class(pretrain: float, pastes: bool) -> None:
    step = made(BCP, BCPSettings(**SMALL, pretrain=pretrain), UNet())
    step.number = 20  # of 40
    step.method.learned.counts[:, 0, 1:] = 0
    step(loader_batch())
    terms = {name for name in step.log[0] if "labeled" in name or "pseudo" in name or name == "supervised"}
    assert terms - {"paste_labeled_weight", "paste_labeled_weighted"} == {
        "supervised",
        *(["paste_labeled"] if pastes else []),
    }
    assert step.log[0]["classes_learned"] == 0


# DHC has another loss on labels, MagicNet's cubes teach true labels too.
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"LabeledOnly", "DHC", "MagicNet", "DyCONGAMagicNet"}))
def test_without_a_learnt_class_no_network_sees_an_unlabelled_patch(name: str) -> None:
    """The student gets nnU-Net's own loss alone, bit for bit."""
    kind, settings = METHODS[name]
    pastes = {"paste": 0.0} if hasattr(settings, "paste") else {}
    trained = []
    for method, options in ((kind, replace(settings, **SMALL, **pastes)), (LabeledOnly, TeacherSettings(**SMALL))):
        step = made(method, options, UNet())
        for number in (0, 1):
            step.method.learned.counts[:, 0, 1:] = 0
            step(spoiled(loader_batch(number)))
        trained.append(copied(step.plain))
        assert not any("agreement" in name for name in step.log[0])
    assert equal(*trained)


@pytest.mark.parametrize("kind", [BCP, CPS, DyCON, MeanTeacher])
@pytest.mark.parametrize("learned", [-1, 0, 1, 2])  # -1: not even the background
def test_an_image_that_is_not_finite_skips_the_step_whatever_is_learnt(kind: type[Method], learned: int) -> None:
    options = {"rampup": 0.0} | ({"pretrain": 0.0} if kind is BCP else {"delay": 0.0})
    step = made(kind, kind.settings_type(**SMALL, **options), UNet())
    step.method.learned.counts[:, 0, 1 + learned :] = 0
    step.method.learned.counts[:, 1, 1 + learned :] = 1
    before = copied(step.plain)
    step(spoiled(loader_batch()))
    used = learned > 0  # all methods wait for the first class
    assert step.log[0]["skipped_steps"] == used
    assert equal(before, copied(step.plain)) == used
    assert all(bool(value.isfinite().all()) for value in copied(step.plain).values())
