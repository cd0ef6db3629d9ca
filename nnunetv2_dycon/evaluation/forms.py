"""Text and tables as Markdown, LaTeX and CSV: names of folders, cases and classes stay text, whatever they hold."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_LATEX = {
    **{sign: f"\\{sign}" for sign in "%_#&${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"${sign}$" for sign in "<>|"},
    **{sign: f"{{{sign}}}" for sign in "[*"},  # either would belong to the \\ of the line before
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "−": "$-$",
    "‡": r"$\ddagger$",
}
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # begin a formula in spreadsheets
_NARROW = 10  # columns that fit a page of LaTeX as they are
_TEXT_MARK = "'"  # tells a spreadsheet that a cell is text


class Cell(NamedTuple):
    """Text of a cell, and its marks: better than all others (bold), differs from the baseline (star)."""

    text: str
    best: bool = False
    star: bool = False


class Table(NamedTuple):
    """A table before rendering; `notes` are printed below it. A page shows one with `folded` when that is clicked."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    notes: tuple[str, ...] = ()
    folded: str = ""


# ---- Markdown --------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Return the table as Markdown, its notes below."""

    def cell(c: Cell) -> str:
        text = markdown_text(c.text)
        return (f"**{text}**" if c.best else text) + (r"\*" if c.star else "")

    lines = [f"## {markdown_text(table.title)}", ""]
    lines += [_row(map(markdown_text, table.header)), _row(["---"] * len(table.header))]
    lines += [_row([cell(c) for c in row]) for row in table.rows]
    for note in table.notes:
        lines += ["", markdown_text(note)]
    return "\n".join(lines) + "\n"


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def markdown_text(text: str) -> str:
    r"""Return text in one line of Markdown that is shown as it is.

    Examples
    --------
    >>> markdown_text("a_b <b>|_c_")
    'a_b &lt;b>\\|\\_c\\_'
    """
    text = " ".join(text.split())
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it means nothing
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    return re.sub(r"^([#>]|[+-](?=[\s-]|$))", r"\\\1", text)


# ---- LaTeX -----------------------------------------------------------------------------------------------------


def latex(table: Table) -> str:
    """Return the table as LaTeX for the package booktabs."""

    def cell(c: Cell) -> str:
        text = latex_text(c.text)
        return (rf"\textbf{{{text}}}" if c.best else text) + ("$^{*}$" if c.star else "")

    columns = "l" + "c" * (len(table.header) - 1)
    caption = f"{latex_text(table.title)}. {latex_text(' '.join(table.notes))}"
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        *([r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"] if len(table.header) > _NARROW else []),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
    ]
    lines += [" & ".join(map(latex_text, table.header)) + r" \\", r"\midrule"]
    lines += [" & ".join(cell(c) for c in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def latex_text(text: str) -> str:
    """Return text in one line of LaTeX that is set as it is."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


# ---- CSV -------------------------------------------------------------------------------------------------------


def csv_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV: numbers with all digits, None as an empty cell, texts never a formula.

    Parameters
    ----------
    header : sequence of str
        Names of the columns.
    rows : iterable of sequences
        Cells; the type tells texts from numbers.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([csv_text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue()


def csv_text(text: str) -> str:
    """Return the text of a cell, with a mark before what a spreadsheet would take for a formula; see `plain_text`.

    Examples
    --------
    >>> csv_text("=1+1"), csv_text("case_1")
    ("'=1+1", 'case_1')
    """
    return _TEXT_MARK + text if text.startswith((*_FORMULA, _TEXT_MARK)) else text


def plain_text(cell: str) -> str:
    """Return the text that `csv_text` made a cell of."""
    return cell.removeprefix(_TEXT_MARK)
