"""A label lies on its CT by a position that is proved, by what the CT shows clearly, or not at all."""

import numpy as np
import pytest

from nnunetv2_dycon.conversion.placement import border_step, by_position, is_organ
from nnunetv2_dycon.conversion.volumes import Volume
from nnunetv2_dycon.errors import DataError
from tests.collections import ct, ct_affine


def volume(array: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(array, affine)


def flipped(array: np.ndarray, affine: np.ndarray, axes: tuple[int, ...]) -> Volume:
    turn = np.eye(4)
    for axis in axes:
        turn[axis, axis], turn[axis, 3] = -1, array.shape[axis] - 1
    return volume(np.flip(array, axes), affine @ turn)


AXES = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)]


@pytest.mark.parametrize("axes", [(), *AXES])
def test_a_label_that_fits_by_position_is_taken_without_a_word(axes) -> None:
    image, organ = ct("a")
    placed, notes = by_position(volume(image, ct_affine()), flipped(organ, ct_affine(), axes), "name")
    assert notes == []
    assert np.array_equal(placed, organ)


@pytest.mark.parametrize("axes", AXES)
def test_a_header_that_lies_is_found_out_and_the_fewest_turns_are_taken(axes) -> None:
    image, organ = ct("a")
    wrong = volume(np.flip(organ, axes), ct_affine())
    placed, notes = by_position(volume(image, ct_affine()), wrong, "name")
    assert np.array_equal(placed, organ)
    letters = ", ".join("xyz"[axis] for axis in axes)
    assert notes == [f"the label's position does not fit the CT; placed axes {letters} turned, which does"]


def test_of_two_turns_that_fit_alike_none_is_taken() -> None:
    image = np.full((12, 12, 8), -1000, np.int16)
    image[:, 1:6] = 50  # a body that is symmetric in x and z
    label = np.zeros(image.shape, np.uint8)
    label[2:5, 2:5, 1:3] = 1
    with pytest.raises(DataError, match=r"^name: .*the CT does not show clearly how it lies; give a label with all"):
        by_position(volume(image, ct_affine()), volume(np.flip(label, 1), ct_affine()), "name")


def test_a_header_elsewhere_is_placed_voxel_by_voxel_where_that_fits() -> None:
    image, organ = ct("b")
    far = ct_affine()
    far[:3, 3] += 500
    placed, notes = by_position(volume(image, ct_affine()), volume(organ, far), "name")
    assert np.array_equal(placed, organ)
    assert "placed voxel by voxel" in notes[0]


def test_a_label_that_fits_nowhere_or_is_empty_is_refused() -> None:
    image, organ = ct("a")
    air = volume(np.full(image.shape, -1000, np.int16), ct_affine())
    with pytest.raises(DataError, match=r"^name: the label does not fit its CT.*median -1000 HU"):
        by_position(air, volume(organ, ct_affine()), "name")
    with pytest.raises(DataError, match="name is empty"):
        by_position(air, volume(0 * organ, ct_affine()), "name")
    far = ct_affine()
    far[:3, 3] += 500
    with pytest.raises(DataError, match="median no HU"):
        by_position(volume(image, ct_affine()), volume(organ[1:], far), "name")


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ([60] * 100, True),
        ([0] * 100, True),
        ([200] * 100, True),
        ([201] * 100, False),
        ([-1] * 51 + [60] * 49, False),
        ([60] * 96 + [-201] * 4, True),
        ([60] * 95 + [-201] * 5, False),
        ([60] * 95 + [-200] * 5, True),
        ([], False),
    ],
)
def test_an_organ_is_known_by_its_median_and_its_share_of_air(values, fits) -> None:
    scan = np.array([*values, -1000], np.int16).reshape(-1, 1, 1)
    mask = np.ones(scan.shape, np.uint8)
    mask[-1] = 0
    assert is_organ(scan, mask) is fits


# ---- another number of slices ------------------------------------------------------------------------------


def scan(seed: int = 0, contrast: float = 60, noise: float = 15) -> tuple[np.ndarray, np.ndarray]:
    """An organ of an odd shape in softer tissue in a body in air; HU (X, Y, Z), and the organ."""
    rng = np.random.default_rng(seed)
    shape = (26, 24, 22)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    organ = ((grid - rng.uniform(-0.1, 0.1, (3, 1, 1, 1))) ** 2 / np.array([0.3, 0.12, 0.2]).reshape(3, 1, 1, 1)).sum(
        0
    ) < 1
    organ[: shape[0] // 2, :, shape[2] // 2 :] = False  # no turn of it is itself
    body = (grid**2).sum(0) < 1.6
    image = np.where(body, 20 + contrast * organ, -1000) + rng.normal(0, noise, shape) * body
    return image.astype(np.int16), organ.astype(np.uint8)


def cut(
    organ: np.ndarray, axis: int, first: int, last: int, *, corrected: bool = False, turned: bool = False
) -> Volume:
    """A label without some slices at either end; `corrected`: its origin says so; `turned`: its axis runs back."""
    n = organ.shape[axis]
    array = np.take(organ, range(first, n - last), axis)
    affine = ct_affine()
    if turned:
        array, affine = np.flip(array, axis), flipped(organ, ct_affine(), (axis,)).affine
    if corrected:
        affine = affine.copy()
        affine[:3, 3] += affine[:3, axis] * (last if turned else first)
    return volume(array, affine)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("first", "last"), [(2, 0), (1, 0), (0, 2), (1, 2), (3, 1)])
def test_a_label_without_some_slices_is_put_where_the_scan_shows_its_organ(axis, turned, first, last) -> None:
    image, organ = scan()
    for corrected in (True, False):
        label = cut(organ, axis, first, last, corrected=corrected, turned=turned)
        placed, notes = by_position(volume(image, ct_affine()), label, "name")
        assert np.array_equal(placed, organ)
        lost = last if turned else first
        moved = lost and not corrected
        assert len(notes) == bool(moved)
        if moved:
            way = "back" if turned else "further"
            assert notes == [
                f"the label's position does not fit the CT; placed {lost} voxels {way} along {'xyz'[axis]}, which does"
            ]


@pytest.mark.parametrize("contrast", [0, 3, 60])
@pytest.mark.parametrize("noise", [1, 40])
@pytest.mark.parametrize("seed", range(4))
def test_a_label_without_some_slices_is_placed_rightly_or_refused(seed, noise, contrast) -> None:
    image, organ = scan(seed, contrast, noise)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        first, last = rng.integers(0, 4, 2)
        label = cut(organ, int(rng.integers(3)), int(first), int(last), corrected=bool(rng.integers(2)))
        try:
            placed, _ = by_position(volume(image, ct_affine()), label, "name")
        except DataError:
            assert contrast < 60 or noise > 1
        else:
            assert np.array_equal(placed, organ)


def test_a_fat_organ_at_a_proved_position_stays_there_and_is_not_turned() -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(-90, 10, (20, 24, 12))
    organ = np.zeros(image.shape, np.uint8)
    organ[4:12, 2:8, 3:9], organ[4:8, 2:5, 3:6] = 1, 0
    image[organ > 0] += 60  # a median of -30 HU: no organ, by itself
    image[2:16, 14:23] += 140  # tissue in which the turned label lies, with the median of an organ
    image[np.flip(organ, 1) > 0] += 6
    turned = np.flip(organ, 1)
    assert is_organ(image, turned)
    assert border_step(image, turned).mean > 5  # which would do, if it had to
    placed, notes = by_position(volume(image, ct_affine()), volume(organ, ct_affine()), "name")
    assert notes == []
    assert np.array_equal(placed, organ)


def test_a_header_by_which_a_sliver_is_left_in_the_scan_does_not_count() -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(20, 15, (26, 12, 12))
    organ = np.zeros(image.shape, np.uint8)
    organ[17:23, 4:9, 4:9], organ[16, 6, 6] = 1, 1
    image[organ > 0] += 30
    beyond = ct_affine()
    beyond[:3, 3] += 9 * beyond[:3, 0]  # by which a single voxel is left
    placed, notes = by_position(volume(image, ct_affine()), volume(organ, beyond), "name")
    assert np.array_equal(placed, organ)
    assert "placed 9 voxels back along x" in notes[0]


def test_a_label_whose_header_is_two_slices_off_is_put_right() -> None:
    image, organ = scan()
    shifted = ct_affine()
    shifted[:3, 3] += 2 * shifted[:3, 2]
    placed, notes = by_position(volume(image, ct_affine()), volume(organ, shifted), "name")
    assert np.array_equal(placed, organ)
    assert "placed 2 voxels back along z" in notes[0]


def test_a_label_with_more_slices_than_its_scan_is_put_right() -> None:
    image, organ = scan()
    more = np.concatenate([organ[:, :, :3] * 0, organ], 2)
    placed, notes = by_position(volume(image, ct_affine()), volume(more, ct_affine()), "name")
    assert np.array_equal(placed, organ)
    assert "placed 3 voxels back along z" in notes[0]


def test_a_coarser_label_of_the_same_box_is_placed_by_position() -> None:
    image, organ = scan(contrast=0)
    affine = ct_affine() @ np.diag([1, 1, 2, 1])
    affine[:3, 3] += ct_affine()[:3, 2] / 2
    placed, notes = by_position(volume(image, ct_affine()), volume(organ[:, :, ::2], affine), "name")
    assert notes == []
    assert np.array_equal(placed[:, :, ::2], organ[:, :, ::2])
    assert np.array_equal(placed[:, :, 1::2], organ[:, :, ::2])


def test_a_scan_without_contrast_proves_nothing_and_a_position_that_is_proved_needs_none() -> None:
    image, organ = scan(contrast=0)
    placed, _ = by_position(volume(image, ct_affine()), volume(organ, ct_affine()), "name")
    assert np.array_equal(placed, organ)
    for corrected in (False, True):
        with pytest.raises(DataError, match=r"26 x 24 x 20 voxels .*its CT 26 x 24 x 22 voxels"):
            by_position(volume(image, ct_affine()), cut(organ, 2, 2, 0, corrected=corrected), "name")


def test_the_step_over_a_border_is_that_of_a_loop_over_neighbours() -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(-300, 400, (5, 6, 4))
    mask = rng.integers(0, 2, (5, 6, 4)).astype(np.uint8)
    steps = []
    for index in np.ndindex(*mask.shape):
        for axis in range(3):
            other = tuple(i + (a == axis) for a, i in enumerate(index))
            if other[axis] < mask.shape[axis] and mask[index] != mask[other]:
                pair = sorted((mask[p], np.clip(values[p], -200, 300)) for p in (index, other))
                steps.append(float(pair[1][1]) - float(pair[0][1]))
    found = border_step(values, mask)
    assert found.mean == pytest.approx(np.mean(steps), rel=1e-5)
    assert found.error == pytest.approx(np.std(steps, ddof=1) / len(steps) ** 0.5, rel=1e-5)
    assert border_step(values, np.ones_like(mask)) == (0, 0)
