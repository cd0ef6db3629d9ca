"""Build the documentation as a site. Cost: about half a minute; needs `pip install '.[docs]'` and no network.

    python scripts/build_site.py -o site

The pages are README.md as the first one, those of docs/, CONTRIBUTING.md and CHANGELOG.md, and two that are made here:
the commands, from their own --help, and the API, from docstrings. A broken link or heading ends the build.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from nnunetv2_dycon import commands

ROOT = Path(__file__).parents[1]
SITE = ROOT / "scripts" / "site"
WIDTH = "100"
REPORTS = "reports"
API = {
    "Losses": ["losses.voxels", "losses.patches", "losses.gradient_aware", "losses.class_weighted", "losses.mse"],
    "What a step is": ["step", "views", "learned", "schedules"],
    "Pictures": ["pictures.dataset", "pictures.overlay", "pictures.uncertainty", "pictures.gradcam"],
    "Scores": ["evaluation.metrics", "evaluation.statistics"],
}


def help_of(words: Sequence[str]) -> str:
    """Return what a command prints for --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        commands.parse([*words, "--help"])
    return printed.getvalue().strip()


def commands_page() -> str:
    """Return the page of all verbs with their help."""
    os.environ["COLUMNS"] = WIDTH
    parts = ["# Commands\n\nWhat each verb prints for `--help`.\n"]
    for verb in commands.VERBS:
        parts.append(f"## {verb}\n\n```text\n{help_of(verb.split())}\n```\n")
    return "\n".join(parts)


def api_page() -> str:
    """Return the page of the API, which mkdocstrings fills from docstrings."""
    parts = ["# API\n\nFunctions and classes that other code may use, by module of `nnunetv2_dycon`.\n"]
    for title, modules in API.items():
        parts.append(f"## {title}\n")
        parts += [f"### {name}\n\n::: nnunetv2_dycon.{name}\n" for name in modules]
    return "\n".join(parts)


def with_links(text: str, *, first: bool = False) -> str:
    """Return a page with links as they are in the site: all pages in one folder, source files as text.

    Examples
    --------
    >>> with_links("[data](docs/data.md), [step.py](../nnunetv2_dycon/step.py), [new](../CHANGELOG.md)", first=True)
    '[data](data.md), step.py, [new](CHANGELOG.md)'
    """
    if first:
        text = text.replace("](docs/", "](")
    text = re.sub(r"\]\(\.\./((?:CONTRIBUTING|CHANGELOG)\.md)", r"](\1", text)
    text = re.sub(r"\]\((?:\.\./)?README\.md", "](index.md", text)
    text = re.sub(r"\]\((\w+\.html)\)", rf"]({REPORTS}/\1)", text)
    sources = r"\[([^\]]+)\]\((?:\.\./)?(?:nnunetv2_dycon|scripts|dataset_conversion|tests)/[^)]*\)"
    return re.sub(sources, r"\1", text)


def gather(folder: Path) -> None:
    """Write all pages and pictures of the site into a folder."""
    shutil.copytree(ROOT / "docs", folder, dirs_exist_ok=True)
    shutil.copy(SITE / "site.css", folder)
    # A report as one page has the name that its Markdown page will get.
    (folder / REPORTS).mkdir()
    for report in folder.glob("*.html"):
        report.rename(folder / REPORTS / report.name)
    for page in folder.rglob("*.md"):
        page.write_text(with_links(page.read_text(encoding="utf-8")), encoding="utf-8")
    for source, page in (("README", "index"), ("CONTRIBUTING", "CONTRIBUTING"), ("CHANGELOG", "CHANGELOG")):
        text = (ROOT / f"{source}.md").read_text(encoding="utf-8")
        (folder / f"{page}.md").write_text(with_links(text, first=True), encoding="utf-8")
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "api.md").write_text(api_page(), encoding="utf-8")


def build(pages: Path, output: Path) -> int:
    """Make the site of gathered pages; returns the exit code of mkdocs, which a warning makes 1."""
    configuration = pages.with_name("mkdocs.yml")
    configuration.write_text(f"docs_dir: {pages.name}\n{(SITE / 'mkdocs.yml').read_text(encoding='utf-8')}")
    # Not --quiet: a warning that is not shown is not counted by --strict either.
    words = ["build", "--strict", "-f", str(configuration), "-d", str(output.resolve())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *words], env=environment, check=False, capture_output=True, text=True
    )
    for line in (done.stdout + done.stderr).splitlines():
        if line and not line.startswith("INFO"):
            print(line, file=sys.stderr)
    return done.returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Build the site; returns the exit code of mkdocs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="output", type=Path, default=Path("site"), help="folder of the site (default: site)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        pages = Path(temporary, "docs")
        gather(pages)
        failed = build(pages, arguments.output)
    if not failed:
        print(arguments.output / "index.html")
    return failed


if __name__ == "__main__":
    sys.exit(main())
