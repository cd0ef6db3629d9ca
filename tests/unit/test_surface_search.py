"""The nearest voxel of a surface is found in a tree or on a map, whichever is quicker; both are exact."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.evaluation import metrics
from nnunetv2_dycon.evaluation.metrics import Structure, score_case
from tests.unit.test_metrics import COARSE, DISTANCES, SPACINGS, brute_force, masks, score


def by(dense, truth, prediction, spacing, **settings):
    """Score with maps alone (`dense` large), or with trees alone (0)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_DENSE", dense)
        return score(truth, prediction, spacing, **settings)


@given(masks(minimum=1), SPACINGS, st.sampled_from(["mm", "literature"]), st.tuples(*[st.integers(0, 4)] * 6))
def test_a_tree_and_a_map_find_the_same_distances(pair, spacing, convention, margins):
    width = list(zip(margins[::2], margins[1::2], strict=True))[: pair[0].ndim]
    truth, prediction = (np.pad(mask, width) for mask in pair)
    tree, on_map = (by(d, truth, prediction, spacing[: truth.ndim], convention=convention) for d in (0, 10**9))
    for metric in (*DISTANCES, "nsd"):
        assert getattr(tree, metric) == pytest.approx(getattr(on_map, metric), abs=1e-12), metric


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), COARSE])
def test_noise_is_searched_on_a_map_and_smooth_surfaces_in_a_tree(monkeypatch, spacing):
    """Searches in noise take long and much memory; a map of the image would for an organ in a large CT."""
    rng, used = np.random.default_rng(0), []
    on_map, tree = metrics._on_map, metrics.KDTree
    monkeypatch.setattr(metrics, "_on_map", lambda *a: used.append("map") or on_map(*a))
    monkeypatch.setattr(metrics, "KDTree", lambda *a, **k: used.append("tree") or tree(*a, **k))
    noise, x = rng.random((40, 40, 40)) < 0.5, np.ogrid[:90, :90, :90]
    score(noise, rng.random((40, 40, 40)) < 0.5, spacing)
    assert used == ["map", "map"]
    used.clear()
    score(sum((a - 45) ** 2 for a in x) < 40**2, sum((a - 45) ** 2 for a in x) < 43**2, spacing)
    assert used == ["tree", "tree"]
    used.clear()
    score(noise, np.pad(np.ones((3, 3, 3), bool), ((0, 37),) * 3), spacing)
    assert sorted(used) == ["map", "tree"]  # many voxels to a few, and a few to many


@pytest.mark.parametrize("dense", [0, 10**9], ids=["tree", "map"])
@given(pair=masks(minimum=2), spacing=SPACINGS)
def test_each_way_equals_brute_force_over_all_pairs(dense, pair, spacing):
    truth, prediction = (np.pad(mask, 1) for mask in pair)
    truth.flat[np.flatnonzero(np.pad(np.ones_like(pair[0]), 1))[0]] = True  # no mask is empty
    prediction.flat[np.flatnonzero(np.pad(np.ones_like(pair[0]), 1))[-1]] = True
    spacing = spacing[: truth.ndim]
    got, expected = by(dense, truth, prediction, spacing), brute_force(truth, prediction, spacing, 2.0)
    for metric in (*DISTANCES, "nsd"):
        assert getattr(got, metric) == pytest.approx(expected[metric], abs=1e-9), metric


def test_one_label_alone_is_boxed_as_among_others():
    truth, prediction = np.zeros((2, 9, 8, 7), np.uint8)
    truth[2:5, 1:6, 3:5] = prediction[3:6, 1:6, 3:5] = 1
    ((alone, _),) = score_case(truth, prediction, COARSE, [Structure("1", "", (1,))])
    truth[8, 7, 6] = prediction[8, 7, 6] = 2
    assert score_case(truth, prediction, COARSE, [Structure("1", "", (1,))])[0][0] == alone
    assert score_case(2 * (truth == 1), 2 * (prediction == 1), COARSE, [Structure("1", "", (2,))])[0][0] == alone
