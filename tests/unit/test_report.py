import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation import figures
from nnunetv2_dycon.evaluation import overlays as overlay_parts
from nnunetv2_dycon.evaluation.comparison import make_comparison
from nnunetv2_dycon.evaluation.figures import (
    Images,
    Picture,
    calibration,
    overlays,
    reliability_counts,
    training_curves,
)
from nnunetv2_dycon.evaluation.forms import Cell, Table
from nnunetv2_dycon.evaluation.label_files import read_labels
from nnunetv2_dycon.evaluation.report import _introduction, as_markdown, html
from nnunetv2_dycon.evaluation.scores import evaluate
from tests.madeup_runs import CASES, a_run, make_dataset, make_predictions, make_truth, write_volume
from tests.unit.test_comparison import score

TABLE = Table("Title <1>", ("Method", "Dice"), [(Cell("<script>"), Cell("1.0", True, True))], ("note & more",))
PICTURE = Picture("boxes", "Boxes", b"\x89PNG", 'alt "text"', "caption")


class Page(HTMLParser):
    """Collects the start tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    return make_dataset(tmp_path, monkeypatch)


def compared(raw, tmp_path, *, probabilities=False, **facts):
    """Return a comparison of two predictions, the second worse, and where its voxels are."""
    runs = []
    for shift, name in enumerate("ab"):
        folder = make_predictions(tmp_path / f"of_{name}", shift, probabilities=probabilities)
        scored = evaluate(raw / "labelsTs", folder, raw / "dataset.json", tmp_path / f"s{name}", processes=1)
        runs.append((a_run(name, str(folder), **facts), scored))
    labels = read_labels(raw / "dataset.json", raw / "labelsTs")
    return make_comparison(runs, "a (student)"), Images(raw / "labelsTs", raw / "imagesTs", labels)


def test_the_page_needs_nothing_else_and_says_what_is_in_its_pictures():
    page = Page(html("A <b>", ["introduction"], [TABLE], [PICTURE]))
    assert not page.of("script")
    assert not page.of("link")
    assert [image["src"][:22] for image in page.of("img")] == ["data:image/png;base64,"]
    assert [image["alt"] for image in page.of("img")] == ['alt "text"']
    assert all(cell.get("scope") == "col" for cell in page.of("th"))
    targets = {attributes["id"] for attributes in page.of("h2")}
    assert {link["href"].removeprefix("#") for link in page.of("a")} == targets


def test_names_are_text_on_the_page_and_marks_are_shown():
    text = html("A <b>", [], [TABLE], [])
    assert "<b>" not in text
    assert "&lt;script&gt;" in text
    assert "<strong>1.0</strong>" in text
    assert re.search(r"<abbr [^>]*>\*</abbr>", text)


def test_facts_are_folded_away_and_the_other_tables_are_not():
    text = html("", [], [TABLE, TABLE._replace(folded="More & more")], [])
    assert text.count("<details>") == text.count("</details>") == 1
    assert text.index("</table>") < text.index("<details>") < text.rindex("<table")
    assert "<summary>More &amp; more</summary>" in text


def test_on_a_narrow_screen_the_column_of_methods_keeps_a_width_and_tables_scroll():
    """Without it, the names have one letter per line; pictures shrink until nothing can be read."""
    text = html("", [], [TABLE], [PICTURE])
    assert '<meta name="viewport" content="width=device-width' in text
    assert re.search(r"\ntd:first-child \{[^}]*min-width: 1\dch", text)
    assert re.search(r"\.wide \{ overflow-x: auto", text)
    assert len(Page(text).of("div")) == 2  # around table and picture


def test_a_long_name_may_be_broken_after_its_underscores_alone():
    row = (Cell("DyCON_beta0p5_<b>"), Cell("90.0"))
    text = html("", [], [TABLE._replace(rows=[row])], [])
    assert "<td>DyCON_<wbr>beta0p5_<wbr>&lt;b&gt;</td>" in text


def test_the_first_lines_of_a_report_have_short_names_alone(raw, tmp_path):
    names = [f"nnUNetTrainer{kind}_epochs40_iters200_bf16_seed0" for kind in ("LabeledOnly", "DyCON_wfecl0")]
    comparison, _ = compared(raw, tmp_path)
    text = " ".join(_introduction(make_comparison([(a_run(n), evaluated(comparison)) for n in names], names[0][:-6])))
    assert "baseline: LabeledOnly." in text
    assert "DyCON_wfecl0" in text
    assert not re.search("nnUNetTrainer|epochs|seed", text)


def test_rows_of_another_protocol_look_different():
    row = (Cell("DyCON ‡"), Cell("90.0"))
    assert '<tr class="published">' in html("", [], [TABLE._replace(rows=[row])], [])
    assert '<tr class="published">' not in html("", [], [TABLE], [])


def test_markdown_names_the_picture_files():
    text = as_markdown("Title", ["introduction"], [TABLE], [PICTURE])
    assert '![alt "text"](figures/boxes.png)' in text
    assert text.startswith("# Title\n\nintroduction\n\n## Title <1>")


def test_the_report_says_which_differences_of_dice_hold():
    def run(shift):
        return [score(f"c{i}", dice=0.5 + 0.01 * i + shift * (1 + 0.01 * i), iou=0.5) for i in range(16)]

    runs = [(a_run(name), run(shift)) for name, shift in (("a", 0.0), ("up", 0.1), ("down", -0.1), ("same", 0.0))]
    text = _introduction(make_comparison(runs, "a (student)"))[-1]
    assert "against a, by the rule below. Higher: up; lower: down; no difference that holds: same. " in text


# ---- pictures


def luminance(color):
    """Return the relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_overlay_colours_differ_in_lightness():
    """As steps of contrast, which need no hue."""
    levels = sorted(
        luminance(color) for color in (overlay_parts.GREEN, overlay_parts.RED, overlay_parts.BLUE, overlay_parts.YELLOW)
    )
    assert all((high + 0.05) / (low + 0.05) > 1.45 for low, high in itertools.pairwise(levels))


def test_an_overlay_colours_each_kind_of_voxel():
    true = np.array([[0, 1, 1, 0, 1]])
    predicted = np.array([[0, 1, 0, 1, 2]])
    found = figures.colored(true, predicted)[0]
    assert found[0].tolist() == [0, 0, 0, 0]
    for at, color in (
        (1, overlay_parts.GREEN),
        (2, overlay_parts.BLUE),
        (3, overlay_parts.RED),
        (4, overlay_parts.YELLOW),
    ):
        assert found[at, :3] == pytest.approx(to_rgb(color))


def test_overlays_name_best_median_and_worst_case(raw, tmp_path):
    comparison, images = compared(raw, tmp_path)
    picture = overlays(comparison, images)
    dice = {c: sum(comparison.per_case(m, "dice")[c] for m in comparison.methods) for c in CASES}
    best, worst = max(dice.values()), min(dice.values())
    named = re.search(r"(test_\d+) \(best\), (test_\d+) \(median\), (test_\d+) \(worst\)", picture.alt).groups()
    assert dice[named[0]] == best
    assert dice[named[2]] == worst
    assert dice[named[1]] == sorted(dice.values(), reverse=True)[len(CASES) // 2]
    assert picture.png.startswith(b"\x89PNG")


@pytest.fixture
def drawn(monkeypatch):
    """Figures in place of their files."""
    made = []
    monkeypatch.setattr(figures, "_png", lambda figure: made.append(figure) or b"")
    return made


def test_overlays_show_each_methods_errors_and_dice(raw, tmp_path, drawn, monkeypatch):
    comparison, images = compared(raw, tmp_path)
    colored, found = figures.colored, []
    monkeypatch.setattr(figures, "colored", lambda *arguments: found.append(arguments) or colored(*arguments))
    picture = overlays(comparison, images)
    cases = re.findall(r"(test_\d+) \(", picture.alt)
    for row, case in enumerate(cases):
        (truth, of_a), (same_truth, of_b) = found[2 * row : 2 * row + 2]
        assert (truth == of_a).all()  # the first method is always right
        assert (same_truth == truth).all()
        assert (of_b != truth).any()
        for method, axis in zip(comparison.methods, drawn[0].axes[3 * row + 1 : 3 * row + 3], strict=True):
            dice = np.mean([s.dice for unit, s in method.scores[0].items() if unit[0] == case])
            assert axis.get_title() == f"{method.short}\nDice {100 * dice:.1f} %"


def test_boxes_and_lines_are_those_of_each_methods_cases(raw, tmp_path, drawn):
    comparison, _ = compared(raw, tmp_path)
    figures.box_plots(comparison)
    figures.paired_lines(comparison)
    dice = [[100 * comparison.per_case(m, "dice")[case] for case in CASES] for m in comparison.methods]
    dots = [line for line in drawn[0].axes[0].lines if len(line.get_xdata()) == len(CASES)]
    assert np.array([line.get_xdata() for line in dots]) == pytest.approx(np.array(dice))
    lines = drawn[1].axes[0].lines
    assert np.array([line.get_ydata() for line in lines[: len(CASES)]]) == pytest.approx(np.transpose(dice))
    assert list(lines[len(CASES)].get_ydata()) == pytest.approx(np.mean(dice, axis=1))


def test_curves_are_in_the_panel_of_their_series(raw, tmp_path, drawn):
    comparison, _ = compared(raw, tmp_path)
    series = {"training loss": [1.0, 0.5], "validation loss": [0.9, 0.6], "pseudo Dice": [0.1, 0.3]}
    runs = [(a_run(name, curves=series), evaluated(comparison)) for name in ("a", "b")]
    training_curves(make_comparison(runs, "a (student)"))
    assert [axis.lines[0].get_ydata().tolist() for axis in drawn[0].axes] == list(series.values())


def test_overlays_do_without_images_and_with_an_empty_case(raw, tmp_path):
    comparison, images = compared(raw, tmp_path)
    overlays(comparison, images._replace(images=None))
    assert figures.box_of(np.zeros((4, 5), bool)) == (slice(None), slice(None))


def test_no_title_of_an_overlay_covers_another_or_is_cut(raw, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    comparison, images = compared(raw, tmp_path)
    names = [f"nnUNetTrainerDyCON_beta{i}p5to0p05_wuncl{i}p5_wfecl{i}p25_gamma{i}p5" for i in range(6)]
    runs = [(a_run(name, str(tmp_path / "of_b")), evaluated(comparison)) for name in names]
    overlays(make_comparison(runs, f"{names[0]} (student)"), images)
    figure = drawn[0]
    figure.canvas.draw()
    boxes = [axis.title.get_window_extent() for axis in figure.axes[:7]]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
    assert boxes[0].x0 > 0
    assert boxes[-1].x1 < figure.bbox.x1
    assert max(box.y1 for box in boxes) < figure.bbox.y1


def test_fourteen_methods_can_be_told_apart_and_their_names_fit(raw, tmp_path, drawn):
    comparison, _ = compared(raw, tmp_path)
    series = {"training loss": [1.0, 0.5], "validation loss": [0.9, 0.6], "pseudo Dice": [0.1, 0.3]}
    names = [f"nnUNetTrainerDyCONGAMagicNet_w{i}" for i in range(14)]
    runs = [(a_run(name, curves=series), evaluated(comparison)) for name in names]
    many = make_comparison(runs, f"{names[0]} (student)")
    training_curves(many)
    figures.paired_lines(many)
    looks = {(line.get_color(), line.get_marker()) for line in drawn[0].axes[0].lines}
    assert len(looks) == 14
    for figure in drawn:
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1
    ticks = [tick.get_window_extent() for tick in drawn[1].axes[0].get_xticklabels()]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(ticks))


def evaluated(comparison):
    return list(comparison.methods[1].scores[0].values())


def test_a_long_name_is_broken_into_lines_and_nothing_is_lost():
    text = figures._wrapped("DyCON_beta0p5to0p05_viewcopy_paste (student)")
    assert max(map(len, text.split("\n"))) <= 22
    assert text.replace("\n", "").replace(" ", "") == "DyCON_beta0p5to0p05_viewcopy_paste(student)"


def test_every_plot_says_what_it_shows(raw, tmp_path):
    comparison, _ = compared(raw, tmp_path)
    for picture in (figures.box_plots(comparison), figures.paired_lines(comparison)):
        assert picture.png.startswith(b"\x89PNG")
        assert all(word in picture.alt for word in ("Dice (%)", "HD95 (mm)"))
        assert picture.caption


def test_reliability_gives_the_worked_example(raw):
    labels = read_labels(raw / "dataset.json", raw / "labelsTs")
    #  truth 1 right at .8; truth 0 called 2 at .6 (wrong); truth 0 called 0: does not count; truth 2 called 0 at .5
    probabilities = np.array([[0.1, 0.2, 0.9, 0.5], [0.8, 0.2, 0.05, 0.1], [0.1, 0.6, 0.05, 0.4]])
    count, confidence, right = reliability_counts(probabilities, np.array([1, 0, 0, 2]), labels)
    assert (count[8], count[6], count[5], count.sum()) == (1, 1, 1, 3)
    assert confidence[[8, 6, 5]].tolist() == [0.8, 0.6, 0.5]
    assert right[[8, 6, 5]].tolist() == [1, 0, 0]
    with pytest.raises(DataError, match=r"shape \(3, 4\) do not match 3 labels and a truth of shape \(5,\)"):
        reliability_counts(probabilities, np.zeros(5, int), labels)


def test_calibration_is_shown_where_there_are_probabilities(raw, tmp_path):
    comparison, images = compared(raw, tmp_path, probabilities=True)
    # the first method is always right, and its voxels say 0.8
    assert "a 20.0 %" in calibration(comparison, images).alt
    (comparison.methods[1].runs[0].predictions / f"{CASES[3]}.npz").unlink()
    assert " b " not in calibration(comparison, images).alt
    (comparison.methods[0].runs[0].predictions / f"{CASES[3]}.npz").write_bytes(b"broken")
    broken = comparison.methods[0].runs[0].predictions / f"{CASES[3]}.npz"
    whole = (broken.parent / f"{CASES[2]}.npz").read_bytes()
    for content in (b"broken", whole[: len(whole) // 2], b""):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"test_03\.npz holds no probabilities"):
            calibration(comparison, images)


@pytest.mark.parametrize("how", ["half", "shape"])
def test_a_test_image_that_cannot_be_shown_is_named(raw, tmp_path, how):
    comparison, images = compared(raw, tmp_path)
    for path in (raw / "imagesTs").iterdir():
        if how == "half":
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        else:
            write_volume(path, np.zeros((3, 3, 3), np.float32))
    with pytest.raises(DataError, match=r"_0000\.nii\.gz cannot be shown"):
        overlays(comparison, images)


def test_calibration_counts_all_cases(raw, tmp_path, drawn):
    comparison, images = compared(raw, tmp_path, probabilities=True)
    totals = figures._reliability(comparison.methods[0], comparison, images)
    foreground = sum(int((make_truth(case) > 0).sum()) for case in CASES)
    assert [total.sum() for total in totals] == pytest.approx([foreground, 0.8 * foreground, foreground])


def test_without_probabilities_and_logs_two_pictures_fall_away(raw, tmp_path):
    comparison, images = compared(raw, tmp_path)
    assert calibration(comparison, images) is None
    assert training_curves(comparison) is None


def test_a_training_is_drawn_once_for_student_and_teacher(raw, tmp_path):
    comparison, _ = compared(raw, tmp_path)
    runs = []
    for name in ("a", "b"):
        for weights in ("student", "teacher"):
            run = a_run(
                name, weights=weights, curves={"training loss": [1.0, 0.5], "teacher's pseudo Dice": [0.1, 0.2]}
            )
            runs.append((run, list(comparison.methods[0].scores[0].values())))
    assert "for 2 trainings of a, b." in training_curves(make_comparison(runs, "a (student)")).alt
