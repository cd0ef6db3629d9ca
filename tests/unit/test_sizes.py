"""Size of each structure against the gain of a method: the numbers, the table and the picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_dycon.evaluation import figures, report
from nnunetv2_dycon.evaluation.comparison import Comparison, make_comparison
from nnunetv2_dycon.evaluation.figures import Images, size_and_gain
from nnunetv2_dycon.evaluation.label_files import Labels
from nnunetv2_dycon.evaluation.statistics import rank_correlation
from nnunetv2_dycon.evaluation.tables import size_table
from tests.madeup_runs import a_run
from tests.unit.test_comparison import CASES, DICE, score, scores

VOLUMES = {"1": 4.0, "2": 0.5, "3": 32.0, "4": 2.0, "5": 8.0}
GAINS = {"1": 0.02, "2": -0.05, "3": 0.01, "4": -0.01, "5": 0.04}
RUNS: tuple[tuple[str, dict[str, float]], ...] = (("a", {}), ("b", GAINS), ("c", {}))


def organs(gains: dict[str, float], volumes: dict[str, float | None] = VOLUMES) -> list:
    """Return scores of eight cases; the structure has twice its volume in every other case, a mean of 1.5 times it."""
    return [
        replace(one, volume_truth_ml=volume and volume * (1 + i % 2))
        for label, volume in volumes.items()
        for i, one in enumerate(scores([d + gains.get(label, 0.0) for d in DICE], label))
    ]


@pytest.fixture
def compared() -> Comparison:
    runs = [(a_run("a"), organs({})), (a_run("b"), organs(GAINS)), (a_run("c"), organs({}))]
    return make_comparison(runs, "a (student)")


def test_structures_are_ordered_by_their_mean_volume_where_they_are(compared: Comparison) -> None:
    assert compared.volumes == {label: 1.5 * VOLUMES[label] for label in "35142"}
    absent = [
        score(s.case, s.label, status="both_empty", volume_truth_ml=0.0) if (s.case, s.label) == (CASES[0], "3") else s
        for s in organs({})
    ]
    assert make_comparison([(a_run("a"), absent)], "a (student)").volumes["3"] == pytest.approx(32 * (4 * 2 + 3) / 7)


def test_the_gain_of_a_structure_is_its_difference_and_its_rank_is_spearmans(compared: Comparison) -> None:
    b, c = compared.methods[1:]
    assert compared.gains(b) == pytest.approx({label: GAINS[label] for label in "35142"})
    ranks = [np.argsort(np.argsort([values[label] for label in "12345"])) for values in (VOLUMES, GAINS)]
    assert compared.gain_by_volume(b) == pytest.approx(np.corrcoef(*ranks)[0, 1]) == pytest.approx(0.7)
    assert compared.gain_by_volume(c) is None  # no gain anywhere


def test_a_correlation_needs_five_pairs_that_differ() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 1.0, 7.0, 9.0]
    midranks = [3.0, 1.5, 1.5, 4.0, 5.0]
    assert rank_correlation(x, y) == pytest.approx(np.corrcoef(x, midranks)[0, 1])
    assert rank_correlation(x[:4], y[:4]) is None
    assert rank_correlation(x, [1.0] * 5) is None
    assert rank_correlation([1.0] * 5, y) is None


def test_the_table_has_a_row_for_each_structure_the_largest_first(compared: Comparison) -> None:
    table = size_table(compared)
    assert table is not None
    assert table.header == ("Structure", "Volume (ml)", "a (%)", "b", "c")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["name 3", "48", "67.5", "+1.0", "0.0"],
        ["name 5", "12", "67.5", "+4.0", "0.0"],
        ["name 1", "6", "67.5", "+2.0", "0.0"],
        ["name 4", "3", "67.5", "−1.0", "0.0"],
        ["name 2", "0.75", "67.5", "−5.0", "0.0"],
        ["Rank correlation", "–", "–", "+0.70", "–"],
    ]
    assert "Spearman" in table.notes[1]


def test_differences_that_hold_are_marked() -> None:
    many = [f"d{i}" for i in range(24)]  # so many cases that p is small after Holm's correction
    cases = {name: [replace(s, case=f"{s.case}{more}") for more in many for s in organs(g)] for name, g in RUNS}
    compared = make_comparison([(a_run(name), cases[name]) for name, _ in RUNS], "a (student)")
    table = size_table(compared)
    assert [row[3].star for row in table.rows] == [True] * 5 + [False]
    assert not any(row[4].star for row in table.rows)


def test_few_structures_have_a_table_without_a_rank_and_one_or_none_in_ml_have_neither() -> None:
    def of(labels: str, volumes: dict[str, float | None] = VOLUMES) -> Comparison:
        one = {label: volumes[label] for label in labels}
        return make_comparison([(a_run(name), organs(g, one)) for name, g in RUNS], "a (student)")

    table = size_table(of("1234"))
    assert [row[0].text for row in table.rows] == ["name 3", "name 1", "name 4", "name 2"]
    assert len(table.notes) == 1
    assert size_and_gain(of("1234")) is None
    assert size_table(of("1")) is None
    flat = of("12345", dict.fromkeys(VOLUMES))  # images with two axes have no volumes
    assert size_table(flat) is size_and_gain(flat) is None


def test_a_structure_that_no_method_and_no_truth_shows_has_no_gain() -> None:
    empty = [score(case, "2", status="both_empty", volume_truth_ml=0.0) for case in CASES]
    compared = make_comparison([(a_run(n), [*scores(DICE), *empty]) for n in "ab"], "a (student)")
    assert [row[0].text for row in size_table(compared).rows] == ["name 1"]


def test_the_picture_has_a_panel_for_each_method_with_its_structures(
    compared: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    picture = size_and_gain(compared)
    assert len(drawn[0].axes) == 2
    for axis, gains in zip(drawn[0].axes, (GAINS, {}), strict=True):
        points = sorted(map(tuple, axis.collections[0].get_offsets().tolist()))
        expected = sorted((1.5 * VOLUMES[label], 100 * gains.get(label, 0.0)) for label in VOLUMES)
        assert np.array(points) == pytest.approx(np.array(expected))
        assert axis.get_xscale() == "log"
    assert "rank correlation 0.70" in drawn[0].axes[0].get_title()
    assert "b 0.70" in picture.alt
    assert "c " not in picture.alt.split("correlation")[1]


def test_filled_marks_are_differences_that_hold_and_empty_panels_are_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    names = ["a", "b", "c", "d", "e", "f"]
    cases = {
        n: [replace(s, case=f"{s.case}{i}") for i in range(24) for s in organs({"1": g})]
        for n, g in zip(names, (0.0, 0.1, 0.0, 0.0, 0.0, 0.0), strict=True)
    }
    picture = size_and_gain(make_comparison([(a_run(n), cases[n]) for n in names], "a (student)"))
    axes = drawn[0].axes
    assert len(axes) == 8
    assert [axis.axison for axis in axes] == [True] * 5 + [False] * 3
    labeled = [axis.xaxis.get_tick_params()["labelbottom"] for axis in axes[:5]]
    assert labeled == [False, True, True, True, True]
    faces = axes[0].collections[0].get_facecolors()
    assert [bool(face[3]) for face in faces] == [False, False, True, False, False]  # by volume: 3, 5, 1, 4, 2
    assert picture.name == "sizes"


@pytest.mark.parametrize(("gain", "scale"), [(0.09, "linear"), (-0.4, "symlog")])
def test_a_lost_structure_does_not_flatten_the_others(monkeypatch: pytest.MonkeyPatch, gain: float, scale: str) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    runs = [(a_run("a"), organs({})), (a_run("b"), organs(GAINS | {"2": gain})), (a_run("c"), organs(GAINS))]
    picture = size_and_gain(make_comparison(runs, "a (student)"))
    drawn[0].canvas.draw()
    for axis in drawn[0].axes:  # all panels alike
        assert axis.get_yscale() == scale
        at = [axis.transData.transform((1, y))[1] for y in (-100 * abs(gain), 0, 4, 5)]
        assert at == sorted(at)
        assert (at[3] - at[2]) > 0.03 * axis.bbox.height
    assert ("logarithmic" in picture.caption) == (scale == "symlog")


def test_upper_bounds_are_in_the_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    runs = [(a_run("a"), organs({})), (a_run("b"), organs(GAINS)), (a_run("a", upper=True), organs(GAINS))]
    compared = make_comparison(runs, "a (student)")
    assert size_table(compared).header[3:] == ("b", "a_upper-bound")
    assert size_and_gain(compared) is not None
    assert [axis.get_title().split("\n")[0] for axis in drawn[0].axes] == ["b"]


def test_the_report_has_the_table_and_the_picture(
    compared: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needs_images in ("calibration", "overlays"):
        monkeypatch.setattr(report, needs_images, lambda *_: None)
    no_images = Images(tmp_path, None, Labels((), frozenset(), None, ".nii.gz", object))
    report.write_report(tmp_path, "T", compared, no_images)
    text = (tmp_path / "report.md").read_text()
    assert text.index("## Classes") < text.index("## Size and gain") < text.index("## Differences to a")
    assert "](figures/sizes.png)" in text
    assert (tmp_path / "figures" / "sizes.png").read_bytes().startswith(b"\x89PNG")
