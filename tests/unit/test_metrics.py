"""Metrics against loops over all pairs of surface voxels, constructed cases with known answers, and MedPy."""

import math
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.evaluation.metrics import (
    Counts,
    Lesions,
    Score,
    ScoreSettings,
    Structure,
    count_lesions,
    f1,
    precision,
    recall,
    score_case,
)

ONE = Structure("1", "organ", (1,))
COARSE = (2.5, 1.0, 0.5)
DISTANCES = ("hd95_mm", "asd_mm", "assd_mm")


def score(truth, prediction, spacing=COARSE, **settings) -> Score:
    (one,) = score_case(
        truth.astype(np.uint8), prediction.astype(np.uint8), spacing, [ONE], settings=ScoreSettings(**settings)
    )
    return one[0]


# ---- oracles: slow, written from the definitions ---------------------------------------------------------------


def surface_by_loops(mask):
    """Voxels with a face neighbour that is outside the mask or the image; single slices are 2D."""
    found = []
    for at in zip(*np.nonzero(mask), strict=True):
        for axis, step in product(range(mask.ndim), (-1, 1)):
            next_to = list(at)
            next_to[axis] += step
            inside = 0 <= next_to[axis] < mask.shape[axis]
            if mask.shape[axis] > 1 and not (inside and mask[tuple(next_to)]):
                found.append(at)
                break
    return found


def distances_by_loops(start, end, spacing):
    return [
        min(math.sqrt(sum(((a - b) * s) ** 2 for a, b, s in zip(p, q, spacing, strict=True))) for q in end)
        for p in start
    ]


def percentile_95(values):
    ordered = sorted(values)
    at = 0.95 * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def brute_force(truth, prediction, spacing, tolerance):
    s_t, s_p = surface_by_loops(truth), surface_by_loops(prediction)
    a, b = distances_by_loops(s_p, s_t, spacing), distances_by_loops(s_t, s_p, spacing)
    both = a + b
    return {
        "hd95_mm": max(percentile_95(a), percentile_95(b)),
        "pooled": percentile_95(both),
        "asd_mm": sum(a) / len(a),
        "assd_mm": sum(both) / len(both),
        "nsd": sum(d <= tolerance + 1e-6 for d in both) / len(both),
    }


def masks(minimum=1, maximum=5):
    shapes = hnp.array_shapes(min_dims=2, max_dims=3, min_side=minimum, max_side=maximum)
    return shapes.flatmap(lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape)))


STEPS = st.sampled_from([0.3, 0.5, 0.7, 1.0, 1.25, 2.5, 5.0])
SPACINGS = st.tuples(STEPS, STEPS, STEPS)


# ---- properties ------------------------------------------------------------------------------------------------


@given(masks(), SPACINGS, st.sampled_from([0.0, 0.7, 1.0, 2.0, 2.5]))
def test_distances_equal_brute_force_over_all_pairs(pair, spacing, tolerance):
    truth, prediction = pair
    assume(truth.any() and prediction.any())
    spacing = spacing[: truth.ndim]
    s_t, s_p = surface_by_loops(truth), surface_by_loops(prediction)
    assume(s_t and s_p)
    got, expected = (
        score(truth, prediction, spacing, tolerance=tolerance),
        brute_force(truth, prediction, spacing, tolerance),
    )
    for metric in (*DISTANCES, "nsd"):
        assert getattr(got, metric) == pytest.approx(expected[metric], abs=1e-6), metric
    in_voxels = brute_force(truth, prediction, (1,) * truth.ndim, tolerance)
    literature = score(truth, prediction, spacing, tolerance=tolerance, convention="literature")
    assert literature.hd95_mm == pytest.approx(in_voxels["pooled"], abs=1e-6)
    for metric in ("asd_mm", "assd_mm", "nsd"):
        assert getattr(literature, metric) == pytest.approx(in_voxels[metric], abs=1e-6), metric


@given(masks())
def test_overlap_and_volumes_equal_sets_of_voxels(pair):
    truth, prediction = pair
    spacing = COARSE[: truth.ndim]
    ((got, counts),) = score_case(truth.view(np.uint8), prediction.view(np.uint8), spacing, [ONE])
    t, p = (set(map(tuple, np.argwhere(mask).tolist())) for mask in pair)
    assert counts == Counts(len(t & p), len(p - t), len(t - p), truth.size - len(t | p))
    assert got.dice == (2 * len(t & p) / (len(t) + len(p)) if t | p else None)
    assert got.iou == (len(t & p) / len(t | p) if t | p else None)
    if truth.ndim == 2:
        assert got.volume_truth_ml is got.volume_pred_ml is got.volume_error_ml is None
    else:
        expected = [n * 1.25 / 1000 for n in (len(t), len(p), len(p) - len(t))]
        assert [got.volume_truth_ml, got.volume_pred_ml, got.volume_error_ml] == pytest.approx(expected)


@given(masks(minimum=2), SPACINGS)
def test_all_but_asd_are_symmetric(pair, spacing):
    truth, prediction = pair
    one, other = (score(a, b, spacing[: truth.ndim]) for a, b in ((truth, prediction), (prediction, truth)))
    for metric in ("dice", "iou", "hd95_mm", "assd_mm", "nsd"):
        assert getattr(one, metric) == pytest.approx(getattr(other, metric), abs=1e-9)


@given(masks(minimum=2), SPACINGS, st.tuples(*[st.integers(0, 3)] * 6))
def test_empty_space_around_the_masks_changes_nothing_but_the_image(pair, spacing, margins):
    truth, prediction = pair
    spacing, width = spacing[: truth.ndim], list(zip(margins[::2], margins[1::2], strict=True))[: truth.ndim]
    one, other = score(truth, prediction, spacing), score(np.pad(truth, width), np.pad(prediction, width), spacing)
    for field in (field.name for field in fields(Score) if field.name != "diagonal_mm"):
        value = getattr(one, field)
        assert getattr(other, field) == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), field


@given(masks(minimum=2), SPACINGS, st.sampled_from([0.1, 0.5, 2.0, 10.0]))
def test_distances_scale_with_the_spacing(pair, spacing, factor):
    truth, prediction = pair
    spacing = spacing[: truth.ndim]
    one = score(truth, prediction, spacing, tolerance=1.1)
    other = score(truth, prediction, [step * factor for step in spacing], tolerance=1.1 * factor)
    for metric in (*DISTANCES, "diagonal_mm"):
        value = getattr(one, metric)
        assert getattr(other, metric) == (None if value is None else pytest.approx(value * factor))
    assert one.nsd == other.nsd


@given(masks(minimum=2), SPACINGS, st.permutations([0, 1, 2]))
def test_the_order_and_the_sense_of_the_axes_do_not_matter(pair, spacing, order):
    truth, prediction = pair
    order = [axis for axis in order if axis < truth.ndim]
    one = score(truth, prediction, spacing[: truth.ndim])
    turned = (np.flip(mask.transpose(order), 0) for mask in pair)
    other = score(*turned, [spacing[axis] for axis in order])
    for metric in (*DISTANCES, "dice", "nsd"):
        assert getattr(one, metric) == pytest.approx(getattr(other, metric), abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 4]))
def test_many_structures_at_once_equal_each_on_its_own(seed, ignore):
    rng = np.random.default_rng(seed)
    truth, prediction = rng.integers(0, 5, (4, 5, 6), np.uint8), rng.integers(0, 4, (4, 5, 6), np.uint8)
    prediction[truth == 2] = 2
    structures = [
        *(Structure(str(v), "a", (v,)) for v in (1, 2, 3, 7)),
        Structure("(1, 3)", "b", (1, 3)),
        Structure("(0, 2)", "c", (0, 2)),
    ]
    settings = ScoreSettings(lesions=True)
    together = score_case(truth, prediction, COARSE, structures, ignore=ignore, settings=settings)
    use = truth != ignore
    for structure, (got, counts) in zip(structures, together, strict=True):
        alone = [(np.isin(labels, structure.values) & use).astype(np.uint8) for labels in (truth, prediction)]
        ((expected, of_one),) = score_case(
            *alone, COARSE, [Structure(structure.label, structure.name, (1,))], settings=settings
        )
        assert got == expected
        assert counts == of_one._replace(tn=of_one.tn - int((~use).sum()))


# ---- constructed cases: (truth, prediction), and what is known -------------------------------------------------


def empty():
    return np.zeros((24, 24, 24), bool)


def box(*spans):
    mask = empty()
    mask[tuple(slice(*span) for span in spans)] = True
    return mask


def ball(radius=6):
    x, y, z = np.ogrid[:24, :24, :24]
    return (x - 8) ** 2 + (y - 8) ** 2 + (z - 8) ** 2 <= radius**2


def half_ball():
    mask = ball()
    mask[:, :, 9:] = False
    return mask


def full(slices=12):
    mask = np.zeros((12, 12, 12), bool)
    mask[:slices] = True
    return mask


def with_blob():
    return ball() | box((19, 23), (17, 24), (17, 24))


POINT = box((3, 4), (3, 4), (3, 4))
CONSTRUCTED = {
    "two voxels three slices apart": (
        (POINT, box((6, 7), (3, 4), (3, 4)), COARSE),
        {"hd95_mm": 7.5, "asd_mm": 7.5, "assd_mm": 7.5, "dice": 0, "nsd": 0},
    ),
    "two voxels apart on all axes": (
        (POINT, box((6, 7), (7, 8), (9, 10)), COARSE),
        dict.fromkeys(DISTANCES, math.sqrt(7.5**2 + 4**2 + 3**2)),  # 9.0139
    ),
    "the same voxel": ((POINT, POINT, COARSE), {**dict.fromkeys(DISTANCES, 0), "nsd": 1, "dice": 1, "iou": 1}),
    "two planes ten millimetres apart": (
        (box((3, 4), (0, 24), (0, 24)), box((7, 8), (0, 24), (0, 24)), COARSE),
        {**dict.fromkeys(DISTANCES, 10), "nsd": 0},
    ),
    "a cube shifted by two slices": (
        (box((4, 12), (4, 12), (4, 12)), box((6, 14), (4, 12), (4, 12)), COARSE),
        # 296 surface voxels each, of which 232 within 2.5 mm; 1.4324 and 0.7838
        {"hd95_mm": 5, "assd_mm": 424 / 296, "nsd": 232 / 296, "dice": 0.75},
    ),
    "the whole image and two slices fewer": (
        (full(10), full(), (2.5, 1, 1)),
        {"hd95_mm": 5, "asd_mm": 1.140110, "assd_mm": 0.767544},
    ),
    "a ball and one far voxel": ((ball(), ball() | box((20, 21), (20, 21), (20, 21)), COARSE), {"hd95_mm": 0}),
    "a ball and a far blob": ((ball(), with_blob(), COARSE), {}),
    "half of a ball": ((ball(), half_ball(), COARSE), {}),
    "all but a corner missing": ((full(), np.pad(full(1)[:, :1, :1], ((0, 0), (0, 11), (0, 11))), COARSE), {}),
}


@pytest.mark.parametrize(("inputs", "known"), CONSTRUCTED.values(), ids=CONSTRUCTED)
def test_constructed_cases_have_their_known_values(inputs, known):
    truth, prediction, spacing = inputs
    got = score(truth, prediction, spacing, tolerance=2.5)
    for metric, value in known.items():
        assert getattr(got, metric) == pytest.approx(value, abs=1e-6), metric
    # all the rest by the other exact way: a distance map of each surface
    surfaces = [mask ^ binary_erosion(mask, generate_binary_structure(3, 1)) for mask in (truth, prediction)]
    to_truth, to_prediction = (distance_transform_edt(~s, sampling=spacing) for s in surfaces)
    a, b = to_truth[surfaces[1]], to_prediction[surfaces[0]]
    assert got.hd95_mm == pytest.approx(max(percentile_95(a), percentile_95(b)), abs=1e-9)
    assert got.asd_mm == pytest.approx(a.mean(), abs=1e-9)
    assert got.assd_mm == pytest.approx(np.concatenate((a, b)).mean(), abs=1e-9)


def test_hd95_sees_a_far_blob_that_the_pooled_percentile_passes_over():
    truth = np.zeros((40, 40, 40), bool)
    truth[5:25, 5:25, 5:25] = True
    prediction = truth.copy()
    prediction[31:37, 31:37, 31:37] = True
    cube, blob = 20**3 - 18**3, 6**3 - 4**3
    assert blob / (cube + blob) > 0.05 > blob / (2 * cube + blob)
    assert score(truth, prediction, (1, 1, 1)).hd95_mm > 10
    assert score(truth, prediction, (1, 1, 1), convention="literature").hd95_mm == 0


def test_asd_is_blind_to_what_is_missing_and_assd_is_not():
    plate, half = box((4, 5), (4, 20), (4, 20)), box((4, 5), (4, 12), (4, 20))
    got = score(plate, half)
    assert got.asd_mm == 0
    assert got.assd_mm > 0


@pytest.mark.parametrize("convention", ["mm", "literature"])
@pytest.mark.parametrize(
    ("truth", "prediction", "status", "overlap"),
    [
        (ball(), empty(), "missed", 0),
        (empty(), ball(), "false_alarm", 0),
        (empty(), empty(), "both_empty", None),
    ],
)
def test_empty_masks_have_a_status_and_no_distance(truth, prediction, status, overlap, convention):
    got = score(truth, prediction, convention=convention, lesions=True)
    assert got.status == status
    assert got.dice == got.iou == got.nsd == overlap
    diagonal = 24 * math.sqrt(2.5**2 + 1 + 0.25) if convention == "mm" else 24 * math.sqrt(3)
    assert got.diagonal_mm == pytest.approx(diagonal)
    for metric in DISTANCES:
        assert getattr(got, metric) is None
        assert got.penalized(metric) == (None if status == "both_empty" else got.diagonal_mm)
    assert got.penalized("dice") == overlap
    assert got.lesion_f1 == overlap


def test_a_measured_distance_has_no_penalty():
    got = score(ball(), half_ball())
    assert got.penalized("hd95_mm") == got.hd95_mm


def test_a_single_slice_is_a_2d_image():
    truth, prediction = np.zeros((2, 1, 9, 9), bool)
    truth[0, 1:8, 1:8] = True
    prediction[0, 2:8, 1:8] = True
    flat = score(truth[0], prediction[0], (1.0, 0.5))
    got = score(truth, prediction, (5.0, 1.0, 0.5))
    assert [getattr(got, m) for m in (*DISTANCES, "nsd")] == [getattr(flat, m) for m in (*DISTANCES, "nsd")]
    assert got.asd_mm > 0
    assert (got.volume_truth_ml, flat.volume_truth_ml) == (pytest.approx(49 * 2.5 / 1000), None)


def test_an_image_of_one_voxel_has_a_surface():
    one = np.ones((1, 1, 1), bool)
    assert score(one, one).hd95_mm == 0


def test_a_surface_at_the_very_tolerance_is_within_it():
    step = float(np.float32(0.1))  # as a header stores it, a little above
    assert score(POINT, box((6, 7), (3, 4), (3, 4)), (step, 1, 1), tolerance=0.3).nsd == 1
    assert score(POINT, box((7, 8), (3, 4), (3, 4)), (step, 1, 1), tolerance=0.3).nsd == 0


def test_ignored_voxels_are_in_no_mask_and_no_count():
    truth, prediction = np.zeros((2, 6, 6, 6), np.uint8)
    truth[1:3, 1:3, 1:3] = 1
    prediction[1:3, 1:3, 1:3] = 1
    prediction[5] = 1  # where nobody has looked
    truth[5] = 2
    ((got, counts),) = score_case(truth, prediction, (1, 1, 1), [ONE], ignore=2, settings=ScoreSettings(lesions=True))
    assert counts == Counts(8, 0, 0, 6 * 36 - 36 - 8)
    assert (got.dice, got.hd95_mm, got.lesion_fp, got.volume_error_ml) == (1, 0, 0, 0)


# ---- lesions ---------------------------------------------------------------------------------------------------


def components_by_loops(mask):
    """Sets of voxels, joined over faces, edges and corners."""
    left, found = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        todo, one = [left.pop()], set()
        while todo:
            at = todo.pop()
            one.add(at)
            near = {
                tuple(map(sum, zip(at, step, strict=True))) for step in product((-1, 0, 1), repeat=mask.ndim)
            } & left
            left -= near
            todo += near
        found.append(one)
    return found


@given(masks())
def test_lesions_equal_sets_of_voxels(pair):
    truth, prediction = map(components_by_loops, pair)
    found = sum(any(t & p for p in prediction) for t in truth)
    false = sum(not any(t & p for t in truth) for p in prediction)
    assert count_lesions(*pair) == Lesions(found, false, len(truth) - found)


def test_lesion_rates_of_a_worked_example():
    truth = np.array([[1, 1, 0, 1, 0, 0, 1, 0, 0]] * 2, bool)  # three lesions
    prediction = np.array([[1, 0, 0, 0, 0, 1, 0, 0, 1]] * 2, bool)  # one found, two false
    got = score(truth, prediction, (1, 1), lesions=True)
    assert (got.lesion_tp, got.lesion_fp, got.lesion_fn, got.lesion_f1) == (1, 2, 2, 1 / 3)
    assert (precision(1, 2), recall(1, 3), f1(1, 2, 3)) == (1 / 3, 1 / 4, 2 / 7)
    assert precision(0, 0) is recall(0, 0) is f1(0, 0, 0) is None


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    truth = np.zeros((3, 3, 3), bool)
    truth[0, 0, 0] = truth[1, 1, 1] = True
    assert count_lesions(truth, truth) == Lesions(1, 0, 0)


def test_nothing_is_measured_that_was_not_asked_for():
    got = score(ball(), half_ball(), distances=False)
    assert got.nsd is got.hd95_mm is got.asd_mm is got.assd_mm is got.lesion_tp is None
    assert got.dice == pytest.approx(score(ball(), half_ball()).dice)


# ---- MedPy -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
def test_the_literatures_convention_is_medpys(seed, share):
    medpy = pytest.importorskip("medpy.metric.binary")
    rng = np.random.default_rng(seed)
    truth, prediction = rng.random((2, 6, 7, 8)) < share
    assume(truth.any() and prediction.any())
    got = score(truth, prediction, convention="literature")
    expected = {"dice": medpy.dc, "iou": medpy.jc, "hd95_mm": medpy.hd95, "asd_mm": medpy.asd, "assd_mm": medpy.assd}
    for metric, function in expected.items():
        assert getattr(got, metric) == pytest.approx(function(prediction, truth), abs=1e-9), metric


@pytest.mark.parametrize("inputs", [inputs for inputs, _ in CONSTRUCTED.values()], ids=CONSTRUCTED)
def test_constructed_cases_equal_medpy_in_both_units(inputs):
    medpy = pytest.importorskip("medpy.metric.binary")
    truth, prediction, spacing = inputs
    literature, got = score(truth, prediction, spacing, convention="literature"), score(truth, prediction, spacing)
    assert literature.hd95_mm == pytest.approx(medpy.hd95(prediction, truth))
    assert literature.asd_mm == pytest.approx(medpy.asd(prediction, truth))
    assert got.asd_mm == pytest.approx(medpy.asd(prediction, truth, spacing))
    assert got.assd_mm == pytest.approx(medpy.assd(prediction, truth, spacing))


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"convention": "paper"}, {"tolerance": -1}, {"tolerance": math.nan}, {"tolerance": math.inf}]
)
def test_an_impossible_protocol_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}"):
        ScoreSettings(**wrong)


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one must fit all"):
        score_case(np.zeros((2, 2, 2), int), np.zeros((2, 2, 3), int), (1, 1, 1), [ONE])
    with pytest.raises(ValueError, match="one must fit all"):
        score_case(np.zeros((2, 2, 2), int), np.zeros((2, 2, 2), int), (1, 1), [ONE])
