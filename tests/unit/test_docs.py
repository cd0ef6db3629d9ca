"""README and docs: links lead somewhere, tables are those of the code, the first page is short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_dycon.commands import VERBS
from nnunetv2_dycon.options import Settings, describe
from nnunetv2_dycon.trainers.names import TRAINERS, list_trainers
from scripts import build_site, trainer_pages

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
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
        places = {(base / link).resolve() for link in links for base in (ROOT, ROOT / "docs", ROOT / "docs/trainers")}
        new = {path for path in places if path.is_file()} - reached
    assert {path for path in PAGES if path.parent.name == "docs"} <= reached


def test_each_trainer_has_the_page_that_the_code_gives() -> None:
    written = trainer_pages.pages()
    assert {place.stem for place in written} == {"trainers", *TRAINERS}
    assert {trainer_pages.DOCS / place for place in written if place.parts[0] == "trainers"} == set(
        (trainer_pages.DOCS / "trainers").glob("*.md")
    )
    for place, text in written.items():
        assert (trainer_pages.DOCS / place).read_text(encoding="utf-8") == text, "python scripts/trainer_pages.py"


def test_the_page_of_a_trainer_has_every_option_of_its_own(tmp_path: Path) -> None:
    by_name = {trainer.name: trainer for trainer in list_trainers()}
    common = {row.option for row in describe(Settings)}
    for trainer in by_name.values():
        shown = set(re.findall(r"^\| `(\w+)` \|", trainer_pages.trainer_page(trainer, by_name), flags=re.M))
        own = {row.option for row in trainer.options} - common
        assert shown == own if trainer.preset_of is None else shown <= own | common
        assert shown


def test_the_first_page_is_short_and_names_every_trainer_and_verb() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) <= 120
    named = set(re.findall(r"`(?:nnUNetTrainer)?(\w+)`", text))
    assert {name.removeprefix("nnUNetTrainer") for name in TRAINERS if "GA" not in name} <= named
    assert not [verb for verb in VERBS if f"`{verb.split()[0]}`" not in text]


def test_the_site_has_every_page_in_its_navigation(tmp_path: Path) -> None:
    build_site.gather(tmp_path)
    listed = re.findall(r": ([\w./]+\.md)$", (build_site.SITE / "mkdocs.yml").read_text(), flags=re.M)
    assert sorted(listed) == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.md"))


def test_the_page_of_commands_has_the_help_of_every_verb() -> None:
    page = build_site.commands_page()
    for verb in VERBS:
        assert f"\n## {verb}\n\n```text\nusage: nnUNetv2_dycon {verb} [-h]" in page


def test_source_files_are_text_in_the_site() -> None:
    text = "[a](docs/data.md#x) [b](nnunetv2_dycon/step.py) [c](CONTRIBUTING.md)"
    assert build_site.with_links(text, first=True) == "[a](data.md#x) b [c](CONTRIBUTING.md)"


def test_reports_of_one_page_are_kept_next_to_their_markdown(tmp_path: Path) -> None:
    build_site.gather(tmp_path)
    reports = {path.name for path in (ROOT / "docs").glob("*.html")}
    assert reports == {path.name for path in (tmp_path / build_site.REPORTS).iterdir()}
    page = (tmp_path / "comparison_hippocampus.md").read_text()
    assert f"]({build_site.REPORTS}/comparison_hippocampus.html)" in page


@pytest.mark.slow
@pytest.mark.parametrize("link", ["data.md#no-such-heading", "no_such_page.md"])
def test_a_broken_link_ends_the_build(tmp_path: Path, link: str, capfd: pytest.CaptureFixture[str]) -> None:
    pages = tmp_path / "docs"
    build_site.gather(pages)
    (pages / "index.md").write_text(f"# Home\n\n[somewhere]({link})\n")
    assert build_site.build(pages, tmp_path / "site") != 0
    assert f"contains a link '{link}'" in capfd.readouterr().err


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "scripts/build_site.py", "-o", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "trainers.html", "commands.html", "api.html", "results.html"} <= pages
    assert "entropy_weight" in (tmp_path / "site" / "api.html").read_text()
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', (tmp_path / "site" / "index.html").read_text())
    assert not [link for link in loaded if link.endswith((".js", ".css"))]
