"""Label values are never rounded; labels come onto the grid of their image by position, against a slow oracle."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.conversion.align import map_values, on_grid, present, resample, same_grid
from nnunetv2_dycon.conversion.volumes import Volume
from nnunetv2_dycon.errors import DataError
from tests.collections import oblique

MAPS = ({0: 0, 255: 1}, {0: 0, 1: 1})


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("high", [1, 255])
def test_whole_numbers_of_any_type_become_uint8(dtype, high) -> None:
    if high == 255 or dtype != np.int8:
        array = np.array([[[0, high, 0, high, high]]]).astype(dtype)
        mapped = map_values(array, MAPS, "file")
        assert mapped.dtype == np.uint8
        assert mapped.ravel().tolist() == [0, 1, 0, 1, 1]


def test_the_first_map_that_knows_all_values_is_used_and_mixtures_are_refused() -> None:
    assert map_values(np.zeros((2, 2, 2)), MAPS, "file").sum() == 0
    mixed = np.array([0, 1, 255], np.uint8).reshape(1, 1, 3)
    with pytest.raises(DataError, match=r"file has the label value 1 \(1 voxels\); expected is \{0, 255\} or \{0, 1\}"):
        map_values(mixed, MAPS, "file")


@pytest.mark.parametrize("value", [0.9999, 1.0001, 1e-7, np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_whole_number_is_named(value) -> None:
    array = np.zeros((3, 3, 3), np.float64)
    array[1, 1, 1], array[0, 0, 0] = value, 1
    with pytest.raises(DataError, match=f"^file has 1 voxels that are not whole numbers, such as {value:g}; "):
        map_values(array, MAPS, "file")


@pytest.mark.parametrize("value", [2, 3, -1, 257, 256, 10**6])
def test_an_unknown_value_is_named_and_does_not_wrap_round(value) -> None:
    array = np.zeros((3, 3, 3), np.int64)
    array[0, 0] = value
    with pytest.raises(DataError, match=rf"label value {value} \(3 voxels\).*: see there"):
        map_values(array, ({0: 0, 1: 1},), "file", ": see there")


@given(st.lists(st.sampled_from([0, 1, 2, 4]), min_size=8, max_size=8))
def test_mapping_is_what_a_loop_over_voxels_does(values) -> None:
    array = np.array(values, np.int16).reshape(2, 2, 2)
    known = {0: 0, 1: 1, 2: 2, 4: 3}
    assert map_values(array, (known,), "").ravel().tolist() == [known[v] for v in values]
    assert present(array) == set(values)


# ---- grids -------------------------------------------------------------------------------------------------


def volume(array: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(array, affine)


def test_rounding_in_headers_is_no_difference_and_a_hundredth_of_a_voxel_is() -> None:
    affine = oblique((2, 2, 2), (80, -90, -40))
    array = np.zeros((112, 112, 73), np.uint8)
    for change, same in ((1e-7, True), (1e-3, True), (0.05, False)):
        other = affine.copy()
        other[1, 3] += change
        assert same_grid(volume(array, affine), volume(array, other)) is same
    turned = affine.copy()
    turned[:3, 0] += 1e-6  # which at the far corner is a tenth of a micrometre
    assert same_grid(volume(array, affine), volume(array, turned))
    turned[:3, 0] += 1e-3
    assert not same_grid(volume(array, affine), volume(array, turned))
    assert not same_grid(volume(array, affine), volume(array[1:], affine))
    flipped = affine @ np.diag([-1, 1, 1, 1])
    assert not same_grid(volume(array, affine), volume(array, flipped))


def test_a_label_on_another_grid_is_refused_with_both_grids() -> None:
    image = volume(np.zeros((4, 5, 6)), np.diag([1, 1, 2, 1.0]))
    label = volume(np.ones((4, 5, 7), np.uint8), np.diag([1, 1, 2, 1.0]))
    with pytest.raises(DataError, match=r"name: mask and image are on different grids \(4 x 5 x 7 .*4 x 5 x 6 voxels"):
        on_grid(image, label, "name")
    same = volume(np.ones((4, 5, 6), np.uint8), image.affine)
    assert on_grid(image, same, "name")[0] is same.array


def slow_nearest(moving: Volume, grid: Volume) -> np.ndarray:
    """Value of the nearest voxel in millimetres, voxel by voxel; 0 outside."""
    out = np.zeros(grid.array.shape, moving.array.dtype)
    for index in product(*map(range, grid.array.shape)):
        where = np.linalg.solve(moving.affine, grid.affine @ [*index, 1])[:3]
        nearest = np.floor(where + 0.5).astype(int)
        if (nearest >= 0).all() and (nearest < moving.array.shape).all():
            out[index] = moving.array[tuple(nearest)]
    return out


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("noise", [0, 1e-5])
def test_turned_axes_are_undone_by_position_exactly(axes, noise) -> None:
    rng = np.random.default_rng(3)
    image = volume(np.zeros((5, 6, 4)), oblique((0.7, 0.8, 2.5), (10, 20, 30), 15))
    label = rng.integers(0, 9, (5, 6, 4)).astype(np.uint8)
    turn = np.eye(4)
    for axis in axes:
        turn[axis, axis], turn[axis, 3] = -1, label.shape[axis] - 1
    moving = volume(np.flip(label, axes), image.affine @ turn + noise)
    assert np.array_equal(resample(moving, image, order=0), label)
    assert np.array_equal(slow_nearest(moving, image), label)


@pytest.mark.parametrize("shift", [(2, 0, 0), (0, -1, 0), (1, 1, -1)])
def test_a_shift_by_whole_voxels_moves_voxels(shift) -> None:
    image = volume(np.zeros((5, 6, 4)), oblique((0.7, 0.8, 2.5), (10, 20, 30), 15))
    moved = np.eye(4)
    moved[:3, 3] = shift
    moving = volume(np.random.default_rng(3).integers(1, 9, (5, 6, 4)), image.affine @ moved)
    assert np.array_equal(resample(moving, image, order=0), slow_nearest(moving, image))


@pytest.mark.parametrize("seed", range(4))
def test_nearest_neighbours_are_those_of_a_loop_over_millimetres(seed) -> None:
    rng = np.random.default_rng(seed)
    moving = volume(
        rng.integers(1, 99, (6, 5, 7)).astype(np.int16), oblique(rng.uniform(0.8, 2, 3), rng.uniform(-2, 2, 3), 20)
    )
    image = volume(np.zeros((7, 6, 5)), oblique(rng.uniform(0.8, 2, 3), rng.uniform(-2, 2, 3), -10))
    found = resample(moving, image, order=0)
    expected = slow_nearest(moving, image)
    assert (found != 0).sum() > 10
    # beyond half of the outermost voxels scipy keeps the border value a little longer or shorter
    both = (found != 0) & (expected != 0)
    assert np.array_equal(found[both], expected[both])
    assert both.sum() > 0.8 * (expected != 0).sum()
