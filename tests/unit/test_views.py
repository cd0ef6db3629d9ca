"""Views: what moves, what stays, and that targets follow the images."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_dycon import views
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.views import VIEWS, draw_views, paste_labeled

torch.set_num_threads(1)

SHAPES = [(3, 2, 9, 12), (3, 1, 6, 9, 12), (2, 1, 1, 8, 8)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def make_view(name: str, x: torch.Tensor, *, generator: torch.Generator, **labelled) -> views.View:
    """The first view of a name; the labelled half is made up where a test gives none."""
    x_l = labelled.get("x_labeled", x)
    y_l = labelled.get("target", torch.zeros((len(x_l), 1, *x_l.shape[2:]), dtype=torch.int16))
    return next(draw_views(name, x, x_l, y_l, labelled.get("ignore_label"), generator=generator))


def view_of(name: str, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> views.View:
    x_l = batch((2, *shape[1:]), 2).to(dtype)
    target = torch.randint(0, 3, (2, 1, *shape[2:]), generator=seeded(3), dtype=torch.int16)
    return make_view(name, batch(shape).to(dtype), x_labeled=x_l, target=target, generator=seeded(seed))


def is_one_box(mask: np.ndarray) -> bool:
    """Whether the True voxels fill their own bounding box."""
    where = np.argwhere(mask)
    return len(where) > 0 and len(where) == np.prod(where.max(0) - where.min(0) + 1)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_view_keeps_shape_and_dtype_and_is_finite(name, shape, dtype):
    view = view_of(name, shape, dtype=dtype)
    for x in (view.student, view.teacher):
        assert x.shape == shape
        assert x.dtype == dtype
        assert torch.isfinite(x).all()
    logits = batch((shape[0], 4, *shape[2:])).to(dtype)
    mixed = view.mix(logits)
    assert mixed.shape == logits.shape
    assert mixed.dtype == dtype
    assert torch.equal(mixed, logits) != view.mixes


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_decided_by_its_generator_alone(name):
    state = torch.get_rng_state()
    first, again, other = (view_of(name, SHAPES[1], seed) for seed in (0, 0, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.student, again.student)
    assert torch.equal(first.teacher, again.teacher)
    if name != "weak":
        assert not (torch.equal(first.student, other.student) and torch.equal(first.teacher, other.teacher))


@pytest.mark.parametrize("name", VIEWS)
def test_no_view_changes_what_it_was_given(name):
    x, x_l = batch(SHAPES[1]), batch(SHAPES[1], 2)
    target = torch.ones((3, 1, 6, 9, 12), dtype=torch.int16)
    logits = batch(SHAPES[1], 4)
    kept = [t.clone() for t in (x, x_l, target, logits)]
    make_view(name, x, x_labeled=x_l, target=target, generator=seeded()).mix(logits)
    for now, before in zip((x, x_l, target, logits), kept, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("name", VIEWS)
def test_no_view_waits_for_the_device(name):
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero", "aten::equal"}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func._schema.name not in waits, func
            return func(*args, **(kwargs or {}))

    x, x_l, logits = batch(SHAPES[1]), batch(SHAPES[1], 2), batch((3, 4, 6, 9, 12))
    target, generator = torch.ones((3, 1, 6, 9, 12), dtype=torch.int16), seeded()
    with Watch():
        make_view(name, x, x_labeled=x_l, target=target, ignore_label=4, generator=generator).mix(logits)


def test_weak_gives_both_networks_the_patch_itself():
    x = batch(SHAPES[0])
    view = make_view("weak", x, generator=seeded())
    assert view.student is x
    assert view.teacher is x


def test_noise_goes_to_the_teacher_and_is_clipped_at_two_sigma():
    x = torch.zeros(2, 1, 24, 24, 24)
    view = make_view("noise", x, generator=seeded())
    assert view.student is x
    assert view.teacher.abs().max() == pytest.approx(0.2)
    # Normal with standard deviation 0.1 cut at 2 sigma: 2 * (1 - Phi(2)) sits on the limits.
    assert (view.teacher.abs() >= 0.2).float().mean().item() == pytest.approx(math.erfc(math.sqrt(2)), abs=0.01)
    assert (view.teacher.abs() < 0.1).float().mean().item() == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.01)


def test_intensity_changes_the_student_only_and_each_sample_on_its_own():
    x = batch((1, 1, 8, 8, 8)).expand(8, -1, -1, -1, -1).contiguous()
    view = make_view("intensity", x, generator=seeded())
    assert view.teacher is x
    students = {tuple(s.flatten().tolist()) for s in view.student}
    assert len(students) >= 7  # the same image eight times; at most one of them left as it was


def test_intensity_leaves_a_sample_untouched_to_the_bit_when_no_change_is_drawn(monkeypatch):
    monkeypatch.setattr(views, "INTENSITY_CHANCE", 0.0)
    x = batch(SHAPES[1])
    assert torch.equal(make_view("intensity", x, generator=seeded()).student, x)


def test_intensity_chooses_its_changes_per_sample(monkeypatch):
    monkeypatch.setattr(views, "INTENSITY_CHANCE", 0.1)
    x = batch((16, 1, 4, 4))
    untouched = (make_view("intensity", x, generator=seeded()).student == x).flatten(1).all(1)
    assert 0 < untouched.sum() < 16


def test_intensity_keeps_a_constant_image_finite(monkeypatch):
    monkeypatch.setattr(views, "INTENSITY_CHANCE", 1.0)
    x = torch.full((2, 1, 4, 4, 4), 3.0)
    assert torch.isfinite(make_view("intensity", x, generator=seeded()).student).all()
    for change in (views._blur, views._scale_contrast, views._apply_gamma):
        torch.testing.assert_close(change(x, seeded()), x)


@pytest.mark.parametrize("shape", [(2, 2, 9, 11), (2, 1, 7, 9, 8)])
def test_blur_is_a_gaussian_filter_of_the_drawn_widths(shape):
    x = batch(shape)
    widths = seeded(7)
    sigmas = [torch.empty(shape[:2]).uniform_(0.5, 1.0, generator=widths) for _ in shape[2:]]
    got = views._blur(x, seeded(7))
    for b in range(shape[0]):
        for c in range(shape[1]):
            sigma = [s[b, c].item() for s in sigmas]
            wanted = gaussian_filter(x[b, c].double().numpy(), sigma, mode="nearest", radius=3)
            np.testing.assert_allclose(got[b, c].numpy(), wanted, atol=1e-5)


def test_contrast_stays_in_range_and_gamma_keeps_mean_and_spread():
    x = batch((4, 2, 8, 8, 8))
    space = (2, 3, 4)
    contrast = views._scale_contrast(x, seeded())
    assert not torch.equal(contrast, x)
    assert (contrast.amin(space) >= x.amin(space)).all()
    assert (contrast.amax(space) <= x.amax(space)).all()
    gamma = views._apply_gamma(x, seeded())
    exponents = views._factor(x, (0.7, 1.5), seeded()).flatten().double().numpy()
    for image, got, g in zip(x.flatten(0, 1).double().numpy(), gamma.flatten(0, 1), exponents, strict=True):
        curve = ((image - image.min()) / (image.max() - image.min())) ** g
        wanted = (curve - curve.mean()) / curve.std() * image.std() + image.mean()
        np.testing.assert_allclose(got.numpy(), wanted, atol=1e-4)


def test_brightness_multiplies_and_noise_adds_within_their_ranges():
    x = batch((6, 2, 12, 12, 12))
    ratio = views._scale_brightness(x, seeded()) / x
    torch.testing.assert_close(ratio, ratio[..., :1, :1, :1].expand_as(ratio))
    assert ratio.min() >= 0.7499
    assert ratio.max() <= 1.2501
    assert ratio.std() > 0.05
    sd = (views._add_noise(x, seeded()) - x).std((2, 3, 4))
    assert sd.max() < 0.105
    assert sd.std() > 0.01  # drawn per sample and channel


def test_factors_lie_below_and_above_one_equally_often():
    factors = views._factor(torch.empty(4000, 1, 1, 1), (0.7, 1.5), seeded())
    assert factors.min() >= 0.7
    assert factors.max() <= 1.5
    assert factors.min() < 0.71
    assert factors.max() > 1.49
    assert (factors < 1).float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_cutmix_takes_one_box_of_each_patch_from_the_next_patch_of_the_ring(shape, seed):
    x = batch(shape)
    view = make_view("cutmix", x, generator=seeded(seed))
    assert view.teacher is x
    for i in range(len(x)):
        moved = (view.student[i, 0] != x[i, 0]).numpy()
        assert is_one_box(moved)
        assert not moved.all()
        for c in range(x.shape[1]):
            wanted = np.where(moved, x[(i + 1) % len(x), c].numpy(), x[i, c].numpy())
            np.testing.assert_array_equal(view.student[i, c].numpy(), wanted)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_cutmix_moves_targets_as_it_moves_voxels(shape):
    x = batch(shape)
    view = make_view("cutmix", x, generator=seeded())
    # A teacher that works voxel by voxel must commute with the exchange.
    logits = torch.stack([x[:, 0] ** 2, -x[:, 0], x[:, 0] + 1], 1)
    seen = view.student[:, 0]
    assert torch.equal(view.mix(logits), torch.stack([seen**2, -seen, seen + 1], 1))


@pytest.mark.parametrize("seed", range(5))
def test_copy_paste_puts_labelled_voxels_and_their_labels_into_one_box(seed):
    x, x_l = batch((4, 2, 6, 9, 12)), batch((2, 2, 6, 9, 12), 2)
    target = torch.randint(0, 3, (2, 1, 6, 9, 12), generator=seeded(3), dtype=torch.int16)
    logits = batch((4, 3, 6, 9, 12), 4)
    view = make_view("copy_paste", x, x_labeled=x_l, target=target, generator=seeded(seed))
    mixed = view.mix(logits)
    assert view.teacher is x
    partners = []
    for i in range(4):
        pasted = view.student[i, 0] != x[i, 0]
        assert is_one_box(pasted.numpy())
        # Its partner is the one labelled patch that agrees inside, in every channel.
        (partner,) = (j for j in range(2) if torch.equal(view.student[i][:, pasted], x_l[j][:, pasted]))
        partners.append(partner)
        assert torch.equal(view.student[i][:, ~pasted], x[i][:, ~pasted])
        assert torch.equal(mixed[i][:, ~pasted], logits[i][:, ~pasted])
        for k in range(3):
            wanted = torch.where(target[partner, 0] == k, 40.0, -40.0)
            assert torch.equal(mixed[i, k][pasted], wanted[pasted])
    assert set(partners) == {0, 1}


def test_copy_paste_draws_the_partner():
    x, x_l = torch.zeros(1, 1, 6, 6), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 6, 6)
    target = torch.ones(3, 1, 6, 6, dtype=torch.int16)
    seen = {
        make_view("copy_paste", x, x_labeled=x_l, target=target, generator=seeded(s)).student.max().item()
        for s in range(30)
    }
    assert seen == {1.0, 2.0, 3.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copy_paste_targets_are_certain_and_finite(dtype):
    x = torch.zeros(1, 1, 8, 8)
    target = torch.ones(1, 1, 8, 8, dtype=torch.int16)
    view = make_view("copy_paste", x, x_labeled=x + 1, target=target, generator=seeded())
    logp = view.mix(torch.zeros(1, 3, 8, 8, dtype=dtype)).float().log_softmax(1)
    inside = view.student[:, 0] == 1
    entropy = -(logp.exp() * logp).sum(1)
    assert torch.isfinite(logp).all()
    assert entropy[inside].max() < 1e-30
    torch.testing.assert_close(entropy[~inside], torch.full_like(entropy[~inside], math.log(3)))


@pytest.mark.parametrize(("unknown", "ignore_label"), [(-1, None), (-1, 3), (3, 3)])
def test_copy_paste_leaves_out_voxels_without_a_true_label(unknown, ignore_label):
    x, x_l = torch.zeros(2, 1, 8, 8, 8), torch.ones(2, 1, 8, 8, 8)
    target = torch.ones(2, 1, 8, 8, 8, dtype=torch.int16)
    target[..., ::2] = unknown
    logits = batch((2, 3, 8, 8, 8))
    view = make_view("copy_paste", x, x_labeled=x_l, target=target, ignore_label=ignore_label, generator=seeded())
    pasted = view.student == 1
    assert pasted[..., 1::2].any()
    assert not pasted[..., ::2].any()
    assert torch.equal(view.mix(logits)[..., ::2], logits[..., ::2])


@pytest.mark.parametrize("name", ["cutmix", "copy_paste", "copy_paste_in", "copy_paste_out"])
def test_intensity_on_a_mixing_view_changes_the_student_s_input_alone(name):
    x, x_l = batch((2, 1, 8, 9, 12)), batch((2, 1, 8, 9, 12), 2) + 50
    target = torch.ones(2, 1, 8, 9, 12, dtype=torch.int16)
    logits = batch((2, 3, 8, 9, 12), 4)
    plain, strong = (
        make_view(one, x, x_labeled=x_l, target=target, generator=seeded()) for one in (name, f"{name}_intensity")
    )
    assert torch.equal(strong.teacher, x)
    assert torch.equal(strong.mix(logits), plain.mix(logits))
    assert strong.mixes
    assert (strong.student != plain.student).any()
    # What was pasted is still there: 50 above the rest, which no change of intensity by a quarter hides.
    pasted = plain.student > 25
    for seen, inside in zip(strong.student, pasted, strict=True):
        assert name == "cutmix" or seen[inside].min() > seen[~inside].max()


@pytest.mark.parametrize(("name", "inverted"), [("copy_paste_out", False), ("copy_paste_in", True)])
def test_both_directions_of_bcp_have_its_box(name, inverted):
    x, x_l = torch.zeros(2, 1, 9, 12, 6), torch.ones(2, 1, 9, 12, 6)
    target = torch.ones(2, 1, 9, 12, 6, dtype=torch.int16)
    starts = set()
    for seed in range(20):
        view = make_view(name, x, x_labeled=x_l, target=target, generator=seeded(seed))
        for pasted in (view.student == 1)[:, 0]:
            box = ~pasted if inverted else pasted
            assert is_one_box(box.numpy())
            assert box.sum() == 6 * 8 * 4
            starts.add(tuple(box.nonzero()[0].tolist()))
        assert torch.equal(view.mix(torch.zeros(2, 2, 9, 12, 6))[:, 1:] == 40, view.student == 1)
    assert len(starts) > 20


@pytest.mark.parametrize("number", [1, 2, 5])
def test_either_mixes_every_other_patch_the_one_way_and_the_rest_the_other(number: int) -> None:
    x, x_l = torch.zeros((number, 1, 9, 12, 6)), torch.ones((2, 1, 9, 12, 6))
    y_l = torch.ones((2, 1, 9, 12, 6), dtype=torch.int16)
    firsts = []
    for seed in range(30):
        view = make_view("copy_paste_either", x, x_labeled=x_l, target=y_l, generator=seeded(seed))
        inward = [bool(image[0, 0, 0, 0] and image[0, -1, -1, -1]) or bool(image.sum() > 324) for image in view.student]
        for image, outside in zip(view.student[:, 0], inward, strict=True):
            box = image == 0 if outside else image == 1
            assert is_one_box(box.numpy())
            assert box.sum() == 6 * 8 * 4
        assert inward == [inward[0] == (i % 2 == 0) for i in range(number)]
        firsts.append(inward[0])
    assert 5 < sum(firsts) < 25


@pytest.mark.parametrize("name", [name for name in VIEWS if "copy_paste" in name or "bcp" in name])
def test_a_view_that_pastes_labelled_voxels_says_where_and_what(name):
    x, x_l = batch((2, 1, 8, 9, 12)), batch((2, 1, 8, 9, 12), 2)
    target = torch.randint(-1, 3, (2, 1, 8, 9, 12), generator=seeded(3), dtype=torch.int16)
    view = make_view(name, x, x_labeled=x_l, target=target, ignore_label=2, generator=seeded())
    classes = torch.arange(2).view(2, 1, 1, 1)
    wanted = torch.where(view.truth == classes, 40.0, -40.0).where(view.pasted, torch.zeros(()))
    assert torch.equal(view.mix(torch.zeros(2, 2, 8, 9, 12)), wanted)
    assert set(view.truth[view.pasted].tolist()) == {0, 1}
    if not name.endswith("_intensity"):
        assert torch.equal((view.student != x), view.pasted)


def test_views_without_labelled_patches_paste_nothing():
    x = batch((2, 1, 8, 9))
    for name in ("weak", "noise", "intensity", "cutmix", "cutmix_intensity"):
        assert make_view(name, x, generator=seeded()).pasted is None


@pytest.mark.parametrize("name", ["bcp", "bcp_intensity"])
def test_both_mixes_of_bcp_are_drawn_one_after_the_other_and_share_the_weight(name):
    x, x_l = batch((2, 1, 6, 9, 12)), batch((2, 1, 6, 9, 12), 2)
    y_l = torch.ones((2, 1, 6, 9, 12), dtype=torch.int16)
    both = draw_views(name, x, x_l, y_l, generator=(generator := seeded()))
    inward = next(both)
    drawn = generator.get_state()
    outward = next(both)
    assert not torch.equal(generator.get_state(), drawn)  # the second was not drawn with the first
    assert [(view.name, view.share) for view in (inward, outward)] == [("in_", 0.5), ("out_", 0.5)]
    assert inward.teacher is outward.teacher is x
    suffix = name.removeprefix("bcp")
    again = seeded()
    for view, way in ((inward, "in"), (outward, "out")):
        single = make_view(f"copy_paste_{way}{suffix}", x, x_labeled=x_l, target=y_l, generator=again)
        assert torch.equal(view.student, single.student)
        assert torch.equal(view.pasted, single.pasted)
        assert (single.name, single.share) == ("", 1.0)


@pytest.mark.parametrize("ignore_label", [None, 2])
def test_pastes_among_labelled_patches_count_where_they_are_annotated(ignore_label):
    x, y = batch((3, 2, 6, 9, 12)), torch.randint(-1, 3, (3, 1, 6, 9, 12), generator=seeded(3), dtype=torch.int16)
    view = paste_labeled(x, y, ignore_label, (0.5, 0.5), generator=seeded())
    box = (view.student != x)[:, :1]
    assert all(is_one_box(one[0].numpy()) and one.sum() == 3 * 4 * 6 for one in box)
    assert torch.equal(view.student, torch.where(box, x[[1, 2, 0]], x))
    assert torch.equal(view.truth, torch.where(box, y[[1, 2, 0]], y))
    known = {0, 1, 2} - {ignore_label}
    assert set(view.truth[view.pasted].tolist()) == known
    assert not known & set(view.truth[~view.pasted].tolist())


def test_a_view_restores_one_output_or_a_list_of_them():
    turned = views.View(batch(SHAPES[0]), restore=lambda x: x.flip(0))
    one, other = batch((3, 2, 4, 4)), batch((3, 2, 2, 2), 2)
    assert torch.equal(turned.restored(one), one.flip(0))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(turned.restored([one, other]), (one, other), strict=True))


@pytest.mark.parametrize(("space", "share"), [((48, 48, 48), (13 / 24) ** 3), ((160, 160), (13 / 24) ** 2)])
def test_boxes_have_the_stated_sides_and_mean_share(space, share):
    shape = torch.Size((200, 1, *space))
    box = torch.cat([views.random_box(torch.Size((20, *shape[1:])), torch.device("cpu"), seeded(s)) for s in range(10)])
    for axis, size in enumerate(space):
        others = tuple(2 + a for a in range(len(space)) if a != axis)
        sides = box.amax(others).sum((1, 2))
        assert sides.min() >= math.floor(size / 3)
        assert sides.max() <= math.ceil(size * 3 / 4)
    # Standard error of the mean share of 200 boxes is about 0.007 (3D) and 0.009 (2D).
    assert box.float().mean().item() == pytest.approx(share, abs=0.025)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_boxes_reach_both_ends_of_an_axis_and_never_leave_it(size):
    shape = torch.Size((400, 1, size, 7))
    rows = views.random_box(shape, torch.device("cpu"), seeded()).amax(3)[:, 0]
    assert (rows.sum(1) >= 1).all()
    assert (rows.sum(1) <= max(1, math.ceil(size * 3 / 4))).all()
    assert rows[:, 0].any()
    assert rows[:, -1].any()


def test_an_unknown_view_is_an_error_that_lists_the_views():
    with pytest.raises(ConfigError, match="Unknown view 'strong'; choose one of weak, noise, intensity, cutmix"):
        make_view("strong", batch(SHAPES[0]), generator=seeded())


def test_cutmix_of_one_patch_is_an_error_that_says_what_to_set():
    with pytest.raises(ConfigError, match="unlabeledbatch2"):
        make_view("cutmix", batch((1, 1, 8, 8)), generator=seeded())


@pytest.mark.parametrize(
    ("x_l", "target"),
    [
        ((2, 1, 9, 12), (2, 1, 9, 12)),
        ((2, 2, 9, 11), (2, 1, 9, 11)),
        ((2, 2, 9, 12), (2, 9, 12)),
        ((2, 2, 9, 12), (1, 1, 9, 12)),
    ],
)
def test_labelled_tensors_that_do_not_fit_raise_and_name_the_shapes(x_l, target):
    with pytest.raises(ValueError, match=r"\(3, 2, 9, 12\)"):
        make_view(
            "copy_paste",
            batch(SHAPES[0]),
            x_labeled=torch.zeros(x_l),
            target=torch.zeros(target, dtype=torch.int16),
            generator=seeded(),
        )


@pytest.mark.parametrize("name", ["cutmix", "copy_paste", "copy_paste_in_intensity"])
@pytest.mark.parametrize("shape", [(1, 3, 9, 12), (3, 3, 9, 6), (3, 3, 1, 1)])
def test_logits_on_another_grid_raise_instead_of_broadcasting(name, shape):
    with pytest.raises(ValueError, match="do not lie on the grid"):
        view_of(name, SHAPES[0]).mix(torch.zeros(shape))


def test_a_batch_without_space_axes_is_an_error():
    with pytest.raises(ValueError, match="2 or 3 axes"):
        make_view("weak", torch.zeros(2, 1, 5), generator=seeded())
