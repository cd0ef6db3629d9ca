"""README and docs: links lead somewhere, tables are those of the code, the first page is short."""

import re
from pathlib import Path

import pytest

from nnunetv2_dycon.commands import VERBS
from nnunetv2_dycon.trainers.names import TRAINERS
from scripts import trainer_tables

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")) if not path.name.startswith("comparison_")
)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(path: Path) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), flags=re.M)
    found: set[str] = set()
    for title in titles:
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def test_every_page_is_linked_from_the_first_one_or_one_that_it_links() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        text = "".join(without_code(page.read_text(encoding="utf-8")) + "\0" for page in new)
        links = {link.partition("#")[0] for link in LINK.findall(text) if link.partition("#")[0].endswith(".md")}
        places = {(base / link).resolve() for link in links for base in (ROOT, ROOT / "docs")}
        new = {path for path in places if path.is_file()} - reached
    assert {path for path in PAGES if path.parent.name == "docs"} <= reached


def test_the_tables_of_options_are_those_of_the_code() -> None:
    text = trainer_tables.PAGE.read_text(encoding="utf-8")
    assert trainer_tables.page(text) == text


def test_the_first_page_is_short_and_names_every_trainer_and_verb() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 130
    missing = [name for name in TRAINERS if name not in text and "GA" not in name and "Paper" not in name]
    assert not missing
    assert not [verb for verb in VERBS if f"`{verb.split()[0]}`" not in text]
