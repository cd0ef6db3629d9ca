"""The report of a comparison: one self-contained HTML file, and its parts as Markdown, LaTeX, CSV and PNG."""

import base64
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from nnunetv2_dycon import __version__
from nnunetv2_dycon.evaluation.comparison import ALL, Comparison
from nnunetv2_dycon.evaluation.figures import (
    Images,
    Picture,
    box_plots,
    calibration,
    overlays,
    paired_lines,
    size_and_gain,
    training_curves,
)
from nnunetv2_dycon.evaluation.forms import Table, latex, markdown, markdown_text
from nnunetv2_dycon.evaluation.tables import (
    OTHER_PROTOCOL,
    class_table,
    difference_table,
    facts_table,
    main_table,
    results_csv,
    size_table,
)
from nnunetv2_dycon.files import write_bytes, write_text

REPORT_FILE = "report.html"


def write_report(
    folder: Path, title: str, comparison: Comparison, images: Images, published: Sequence[dict] = ()
) -> None:
    """Write report.html, report.md with figures/, tables.tex and results.csv into an existing folder.

    Parameters
    ----------
    folder : Path
        An existing folder.
    title : str
        Heading of the report.
    comparison : Comparison
        Methods with their scores.
    images : Images
        Folders of truth and images, for overlays and calibration.
    published : sequence of dict
        Rows of published_results.json for the tables of methods and of classes.
    """
    found = (
        main_table(comparison, published),
        class_table(comparison, published),
        size_table(comparison),
        difference_table(comparison),
        facts_table(comparison),
    )
    drawn = (
        box_plots(comparison),
        paired_lines(comparison),
        size_and_gain(comparison),
        calibration(comparison, images),
        overlays(comparison, images),
        training_curves(comparison),
    )
    tables = [table for table in found if table is not None and table.rows]
    pictures = [picture for picture in drawn if picture is not None]
    introduction = _introduction(comparison)
    (folder / "figures").mkdir(exist_ok=True)
    for picture in pictures:
        write_bytes(folder / "figures" / f"{picture.name}.png", picture.png)
    contents = {
        REPORT_FILE: html(title, introduction, tables, pictures),
        "report.md": as_markdown(title, introduction, tables, pictures),
        "tables.tex": "\n".join(map(latex, tables)),
        "results.csv": results_csv(comparison),
    }
    for name, text in contents.items():
        write_text(folder / name, text)


def html(title: str, introduction: Sequence[str], tables: Sequence[Table], pictures: Sequence[Picture]) -> str:
    """Return the report as one HTML page with embedded pictures and no scripts.

    Parameters
    ----------
    title : str
        Heading.
    introduction : sequence of str
        Paragraphs.
    tables : sequence of Table
        Tables in order.
    pictures : sequence of Picture
        Pictures in order.
    """
    template = files("nnunetv2_dycon.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        title=title,
        introduction=introduction,
        tables=tables,
        pictures=[{**p._asdict(), "data": base64.b64encode(p.png).decode()} for p in pictures],
        mark=OTHER_PROTOCOL,
    )


def as_markdown(title: str, introduction: Sequence[str], tables: Sequence[Table], pictures: Sequence[Picture]) -> str:
    """Return the report as Markdown with its pictures in figures/.

    Parameters
    ----------
    title : str
        Heading.
    introduction : sequence of str
        Paragraphs.
    tables : sequence of Table
        Tables in order.
    pictures : sequence of Picture
        Pictures in order.
    """
    parts = [f"# {markdown_text(title)}", *map(markdown_text, introduction)]
    parts += [markdown(table).rstrip() for table in tables]
    for p in pictures:
        heading, alt, caption = map(markdown_text, (p.title, p.alt, p.caption))
        parts.append(f"## {heading}\n\n![{alt}](figures/{p.name}.png)\n\n{caption}")
    return "\n\n".join(parts) + "\n"


def _introduction(comparison: Comparison) -> list[str]:
    methods, baseline = comparison.methods, comparison.methods[0]
    runs = [run for method in methods for run in method.runs]
    dataset = next((run.facts.dataset for run in runs if run.facts.dataset), "an unnamed data set")
    return [
        f"{len(methods)} methods in {len(runs)} runs on {len(comparison.cases)} test cases of {dataset}; baseline: "
        f"{baseline.short}. Written by nnunetv2_dycon {__version__}.",
        _verdict(comparison),
    ]


def _verdict(comparison: Comparison) -> str:
    """Return the differences of the mean Dice to the baseline in words."""
    kinds: dict[str, list[str]] = {"higher": [], "lower": [], "no difference that holds": []}
    for method in comparison.methods[1:]:
        result = comparison.results[method.name, ALL, "dice"]
        mean = result.difference.mean if result.difference and result.holds else 0.0
        kind = "higher" if mean > 0 else "lower" if mean < 0 else "no difference that holds"
        kinds[kind].append(method.short)
    found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    return (
        f"Mean Dice against {comparison.methods[0].short}, by the rule below. {found[0].upper()}{found[1:]}. A "
        "difference that does not hold may still exist, too small to show in these cases and runs."
    )
