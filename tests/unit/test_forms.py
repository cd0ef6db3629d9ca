"""Names of folders, cases and classes are shown as they are in every form of a report, and run nothing."""

import csv
import io
import itertools
import json
import re
import warnings
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.evaluation import figures
from nnunetv2_dycon.evaluation.comparison import make_comparison
from nnunetv2_dycon.evaluation.figures import Images
from nnunetv2_dycon.evaluation.forms import (
    Cell,
    Table,
    csv_table,
    csv_text,
    latex,
    latex_text,
    markdown,
    markdown_text,
    plain_text,
)
from nnunetv2_dycon.evaluation.label_files import read_labels
from nnunetv2_dycon.evaluation.report import write_report
from nnunetv2_dycon.evaluation.scores import evaluate, read_scores
from tests.madeup_runs import CASES, a_run, make_dataset, make_predictions
from tests.unit.test_comparison import score

TABLE = Table(
    "A & B",
    ("M_1", "Dice (%) ↑"),
    [(Cell("x|y"), Cell("1.0 ± 0.5", True, True)), (Cell("z"), Cell("–"))],
    ("note *: y",),
)
HOSTILE = (
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "a|b",
    "=HYPERLINK(1)",
    "+1",
    "-1",
    "@SUM(1)",
    "'quoted",
    "a_b_",
    "_hidden",
    "50% of $x$",
    "two\nlines",
    "back\\slash{}^~#&",
    "*bold* `code` [link](http://x)",
    "[first]",
    "&lt;b&gt;",
    "# heading",
    "> quote",
    "1. list",
    "häm 脑",
    "-0.5",
    "\tTab",
)


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags |= {tag, *(name for name, _ in attrs)}

    def handle_data(self, data):
        self.text += data


def test_markdown_marks_and_escapes():
    lines = markdown(TABLE).splitlines()
    assert lines[2:6] == ["| M_1 | Dice (%) ↑ |", "| --- | --- |", r"| x\|y | **1.0 ± 0.5**\* |", "| z | – |"]
    assert lines[-1] == r"note \*: y"


def test_latex_marks_and_escapes():
    text = latex(TABLE)
    assert r"M\_1 & Dice (\%) $\uparrow$ \\" in text
    assert r"x$|$y & \textbf{1.0 $\pm$ 0.5}$^{*}$ \\" in text
    assert r"\caption{A \& B. note {*}: y}" in text
    assert r"\begin{tabular}{lc}" in text


# ---- Markdown, by another program's reading


def read_markdown(text: str) -> str:
    """Return the words that a page shows; AssertionError if Markdown means anything else than words."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = Page(parser.render(text))
    assert page.tags <= {"p"}
    return page.text.strip()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_markdown_is_text(name):
    assert read_markdown(markdown_text(name)) == " ".join(name.split())


@given(st.text(alphabet="ab_ <>&;|*`[]~$\\#+-1.)(!=\n", max_size=12))
def test_any_name_in_markdown_is_text(name):
    assert read_markdown(markdown_text(name)) == " ".join(name.split())


# ---- LaTeX


@given(st.text(alphabet="ab \\{}%_#&$~^<>|[*\n±↑↓–−‡", max_size=12))
def test_any_name_in_latex_is_text(name):
    text = latex_text(name)
    plain = text
    for command in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}"):
        plain = plain.replace(command, "")
    for math in (r"$\pm$", r"$\uparrow$", r"$\downarrow$", r"$\ddagger$", "$-$", "$<$", "$>$", "$|$", "{[}", "{*}"):
        plain = plain.replace(math, "")
    plain = re.sub(r"\\[%_#&${}]", "", plain)
    assert not re.search(r"[\\{}%_#&$~^<>|\[*\n]", plain)
    assert not text.startswith(("[", "*"))


# ---- CSV


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_csv_is_no_formula_and_comes_back(name):
    ((cell, number),) = csv.reader(io.StringIO(csv_table(("a", "b"), [(name, -0.5)]).split("\n", 1)[1]))
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert plain_text(cell) == name
    assert number == "-0.5"


@given(st.text())
def test_any_text_comes_back_from_csv(text):
    assert plain_text(csv_text(text)) == text
    assert csv_text(text) == text or text[0] in "=+-@\t\r\n'"


def test_cases_and_classes_with_any_name_come_back_from_the_table_of_scores(tmp_path, monkeypatch):
    raw = make_dataset(tmp_path, monkeypatch)
    names = ["=1+1", "-2", "'a", "+b|c", "@d"]
    dataset = json.loads((raw / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, '=HYPERLINK("x")': 1, "two\nlines, and more": 2}
    (raw / "dataset.json").write_text(json.dumps(dataset))
    predicted = make_predictions(tmp_path / "p", 1)
    for case, name in zip(CASES, names, strict=False):
        for folder in (predicted, raw / "labelsTs"):
            (folder / f"{case}.nii.gz").rename(folder / f"{name}.nii.gz")
    rows = evaluate(raw / "labelsTs", predicted, raw / "dataset.json", processes=1)
    assert read_scores(predicted / "scores.csv") == rows
    assert {row.case for row in rows} >= set(names)
    cells = list(itertools.chain(*csv.reader((predicted / "scores.csv").read_text().splitlines())))
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@")) or re.match(r"-\D", cell)]


# ---- the whole report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Files of a report of methods with all these names, by name."""
    root = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        raw = make_dataset(root, patch)
    rows = [score(case, dice=0.5 + 0.01 * at) for at, case in enumerate(CASES)]
    runs = [(a_run(name, str(make_predictions(root / f"p{at}"))), rows) for at, name in enumerate(HOSTILE)]
    comparison = make_comparison(runs, runs[0][0].method)
    images = Images(raw / "labelsTs", None, read_labels(raw / "dataset.json", raw / "labelsTs"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(root, "On <b>x</b>", comparison, images)
    return {path.name: path.read_text() for path in root.iterdir() if path.is_file()}


def test_the_page_shows_every_name_and_has_no_tag_of_them(report):
    page = Page(report["report.html"])
    assert not page.tags & {"script", "onerror", "b", "link", "iframe"}
    for name in ("On <b>x</b>", *HOSTILE):
        assert " ".join(name.split()) in " ".join(page.text.split())


def test_the_markdown_shows_every_name_in_its_cell(report):
    lines = report["report.md"].splitlines()
    assert not [line for line in lines if re.search(r"<(script|img|b)\b", line)]
    start = lines.index("## Test cases") + 2
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    page = parser.render("\n".join(lines[start : start + 2 + len(HOSTILE)]))
    first_cells = [Page(cell).text for cell in re.findall(r"<tr>\s*<td>(.*?)</td>", page, re.DOTALL)]
    assert first_cells == [" ".join(name.split()) for name in HOSTILE]


def test_the_csv_has_no_formula_and_its_numbers_are_numbers(report):
    rows = list(csv.DictReader(io.StringIO(report["results.csv"])))
    assert {plain_text(row["method"]) for row in rows} == set(HOSTILE)
    for row in rows:
        for key, cell in row.items():
            if key in ("runs", "mean", "lowest", "highest", "difference", "p_holm", "cases"):
                assert cell == "" or float(cell) is not None
            else:
                assert not cell.startswith(("=", "+", "-", "@", "\t"))


def test_the_tables_of_latex_have_a_line_for_each_row(report):
    rows = [line for line in report["tables.tex"].splitlines() if line.endswith(r" \\")]
    assert len(rows) == 3 + 2 * len(HOSTILE) + 4 * (len(HOSTILE) - 1)


def test_figures_show_dollars_and_underscores_as_they_are(monkeypatch):
    assert figures._shown("50% of $x$") == r"50% of \$x\$"
    assert figures._shown("_hidden") == " _hidden"
    assert figures._wrapped("$a_b$") == r"\$a_b\$"
