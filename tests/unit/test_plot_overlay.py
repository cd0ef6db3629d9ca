"""Overlays of constructed cases: colours, the slice that is shown, the surface, and the numbers."""

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from nnunetv2_dycon.errors import ConfigError, DataError, UserError
from nnunetv2_dycon.evaluation.overlays import BLUE, GREEN, KINDS, RED, YELLOW, colored, kinds
from nnunetv2_dycon.pictures.overlay import Shown, draw_overlay, plot_overlay, slice_of
from nnunetv2_dycon.pictures.slices import Plane, fullest, plane_of, spread
from nnunetv2_dycon.pictures.surface import surface_of
from tests.madeup_runs import CASES, SHAPE, make_dataset, make_predictions, make_truth, write_volume


def test_each_kind_of_voxel_has_the_colour_of_the_papers_figures() -> None:
    true, predicted = np.array([[0, 1, 1, 0, 2]]), np.array([[0, 1, 0, 1, 1]])
    found = colored(true, predicted)[0]
    assert found[0, 3] == 0
    for at, color in ((1, GREEN), (2, BLUE), (3, RED), (4, YELLOW)):
        np.testing.assert_allclose(found[at, :3], to_rgb(color), atol=1e-9)
    assert [name for _, name in KINDS][:3] == ["true positive", "false negative", "false positive"]
    assert [mask.sum() for mask in kinds(true, predicted)] == [1, 1, 1, 1]


def shown(true: np.ndarray, *predicted: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> Shown:
    return Shown("case", np.zeros(true.shape), true, {f"m{i}": p for i, p in enumerate(predicted)}, spacing)


def test_the_slice_is_that_with_most_wrong_voxels_of_all_methods() -> None:
    true = np.zeros((6, 8, 8), int)
    true[1, 1:7, 1:7] = 1
    one, other = true.copy(), true.copy()
    one[3, :3, :3] = 1
    other[4, :2, :5] = 1
    case = shown(true, one, other)
    assert slice_of(case, Plane(0, 1.0)) == 4
    assert slice_of(shown(true, one, one), Plane(0, 1.0)) == 3
    assert slice_of(shown(true, true), Plane(0, 1.0)) == 1
    assert slice_of(shown(0 * true, 0 * true), Plane(0, 1.0)) == 3
    assert slice_of(shown(np.swapaxes(true, 0, 2), np.swapaxes(other, 0, 2)), Plane(2, 1.0)) == 4


def test_slices_are_drawn_across_the_coarse_axis_in_true_proportion() -> None:
    assert plane_of((5.0, 0.5, 0.5)) == (0, 1.0)
    assert plane_of((1.0, 4.0, 2.0)) == (1, 0.5)
    assert plane_of((1.0, 1.0, 1.0)) == (0, 1.0)
    figure = draw_overlay([shown(np.ones((2, 4, 4), int), np.ones((2, 4, 4), int), spacing=(5.0, 1.5, 0.5))])
    assert {axis.get_aspect() for axis in figure.axes[:2]} == {3.0}


def test_slices_divide_a_weight_into_equal_parts() -> None:
    weight = np.zeros((10, 1, 1))
    weight[2:6] = 1
    assert spread(weight, Plane(0, 1.0), 4) == [2, 3, 4, 5]
    assert spread(weight, Plane(0, 1.0), 2) == [2, 4]
    assert spread(0 * weight, Plane(0, 1.0), 2) == [2, 7]
    assert fullest(weight * np.arange(10)[:, None, None], Plane(0, 1.0)) == 5


def test_a_surface_has_the_size_and_place_of_the_structure_in_mm() -> None:
    true = np.zeros((12, 12, 12), int)
    true[2:6, 3:9, 4:10] = 1
    surface = surface_of(true, true, (5.0, 1.0, 0.5))
    # marching cubes cuts half way between inside and outside
    np.testing.assert_allclose(surface.triangles.min((0, 1)), [1.5 * 5, 2.5, 3.5 * 0.5])
    np.testing.assert_allclose(surface.triangles.max((0, 1)), [5.5 * 5, 8.5, 9.5 * 0.5])
    assert set(surface.kind) == {0}
    assert surface_of(0 * true, 0 * true, (1.0, 1.0, 1.0)) is None


def test_a_face_has_the_kind_of_what_is_inside_of_it() -> None:
    true, predicted = np.zeros((4, 4, 12), int), np.zeros((4, 4, 12), int)
    true[1:3, 1:3, 1:3] = true[1:3, 1:3, 5:7] = 1  # found, missed
    predicted[1:3, 1:3, 1:3] = predicted[1:3, 1:3, 9:11] = 1  # found, invented
    surface = surface_of(true, predicted, (1.0, 1.0, 1.0))
    x = surface.triangles.mean(1)[:, 2]
    for number, (low, high) in enumerate(((0, 3.5), (4, 7.5), (8, 11.5))):
        assert set(surface.kind[(x > low) & (x < high)]) == {number}


def test_a_large_structure_keeps_its_place_with_fewer_faces() -> None:
    true = np.zeros((10, 260, 300), int)
    true[2:8, 20:240, 30:290] = 1
    surface = surface_of(true, true, (1.0, 1.0, 1.0))
    assert len(surface.kind) < 60_000
    np.testing.assert_allclose(surface.triangles.min((0, 1)), [1.5, 19.5, 29.5], atol=3)
    np.testing.assert_allclose(surface.triangles.max((0, 1)), [7.5, 239.5, 289.5], atol=3)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_dataset(tmp_path, monkeypatch)


def test_the_cases_on_which_methods_differ_most_are_drawn_with_their_numbers(raw: Path, tmp_path: Path) -> None:
    good, bad = make_predictions(tmp_path / "good"), make_predictions(tmp_path / "bad")
    for case, move in ((CASES[4], 4), (CASES[7], 2)):
        write_volume(bad / f"{case}.nii.gz", np.roll(make_truth(case), move, axis=1))
    drawn = plot_overlay(501, [str(good), str(bad)], number=2, output=tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "overlay.csv").open()))
    assert list(dict.fromkeys(row["case"] for row in rows)) == [CASES[4], CASES[7]]
    assert [row["method"] for row in rows[:4]] == ["good", "good", "bad", "bad"]
    for row in rows[:2]:
        # boxes of 6 x 6 x 6 and 4 x 6 x 6 voxels of 1 x 1 x 2 mm
        assert float(row["true positive (ml)"]) == pytest.approx({"left": 0.432, "right": 0.288}[row["structure"]])
        assert (row["false negative (ml)"], row["false positive (ml)"], row["Dice"]) == ("0", "0", "1")
    assert float(rows[2]["false negative (ml)"]) == pytest.approx(6 * 4 * 6 * 2 / 1000)  # moved by 4 of 6 rows
    assert float(rows[2]["Dice"]) == pytest.approx(1 / 3, abs=1e-5)
    assert [path.name for path in drawn.files] == ["overlay.png", "overlay.svg", "overlay.csv"]


def test_more_cases_than_fit_have_pages_and_earlier_pages_go(raw: Path, tmp_path: Path) -> None:
    make_predictions(tmp_path / "p", shift=1)
    drawn = plot_overlay(501, [str(tmp_path / "p")], CASES[:4], output=tmp_path / "out")
    assert len(drawn.figures) == 2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["overlay_1.png", "overlay_2.png"]
    plot_overlay(501, [str(tmp_path / "p")], CASES[:1], output=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["overlay.png"]


def test_nothing_segmented_is_drawn_as_missed(raw: Path, tmp_path: Path) -> None:
    make_predictions(tmp_path / "p")
    write_volume(tmp_path / "p" / f"{CASES[0]}.nii.gz", np.zeros(SHAPE, np.uint8))
    plot_overlay(501, [str(tmp_path / "p")], CASES[:1], output=tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "overlay.csv").open()))
    assert {row["Dice"] for row in rows} == {"0"}
    empty = np.zeros((3, 4, 4), int)
    draw_overlay([shown(empty, empty)])


def test_flat_images_have_no_surface(raw: Path) -> None:
    square = np.zeros((1, 8, 8), int)
    square[0, 2:5, 2:5] = 1
    assert len(draw_overlay([shown(square, square)]).axes) == 2


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        (("test_0",), r"Dataset501_Made has no case 'test_0'; the nearest names are test_0"),
        ((CASES[9],), r"p has no prediction of test_09 by p"),
        ((), None),
    ],
)
def test_a_case_that_cannot_be_shown_is_named(raw: Path, tmp_path: Path, cases, said) -> None:
    make_predictions(tmp_path / "p", cases=CASES[:2])
    if said is None:
        for path in (raw / "labelsTs").iterdir():
            path.unlink()
        said = "no case with a known label was predicted by p"
    with pytest.raises(UserError, match=said):
        plot_overlay(501, [str(tmp_path / "p")], cases, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_refusals_are_one_line(raw: Path, tmp_path: Path) -> None:
    make_predictions(tmp_path / "p")
    with pytest.raises(ConfigError, match="-n 0"):
        plot_overlay(501, [str(tmp_path / "p")], number=0)
    (raw / "imagesUn").mkdir()
    write_volume(raw / "imagesUn" / "u_0000.nii.gz", np.zeros(SHAPE, np.float32))
    with pytest.raises(DataError, match="label of u is not known or not to be opened"):
        plot_overlay(501, [str(tmp_path / "p")], ["u"])
    write_volume(tmp_path / "p" / f"{CASES[0]}.nii.gz", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(DataError, match="does not lie on the truth: shape"):
        plot_overlay(501, [str(tmp_path / "p")], CASES[:1])
