"""Write the tables of options in docs/trainers.md from the code. Cost: seconds.

    python scripts/trainer_tables.py

What is between the two comments of the page is replaced; a test compares both.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from nnunetv2_dycon.options import Row, Settings, describe
from nnunetv2_dycon.trainers.names import TrainerInfo, list_trainers

PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
HEADER = "| option | default | allowed | meaning |\n|---|---|---|---|\n"


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of options."""
    escaped = [[cell.replace("|", "or") for cell in row] for row in rows]
    lines = (f"| `{name}` | {default} | {allowed} | {meaning} |" for name, default, allowed, meaning in escaped)
    return HEADER + "\n".join(lines) + "\n"


def section(trainer: TrainerInfo, by_name: dict[str, TrainerInfo]) -> str:
    """Return the section of a trainer: what it is, and its options beyond those of every trainer.

    A preset has a table of what differs from the trainer whose preset it is.
    """
    known = by_name[trainer.preset_of].options if trainer.preset_of else describe(Settings)
    rows = [row for row in trainer.options if row not in known]
    what = f"`{trainer.preset_of}` with other defaults." if trainer.preset_of else trainer.summary
    return f"### {trainer.name}\n\n{what}\n\n{table(rows) if rows else 'No options of its own.'}".rstrip() + "\n"


def tables() -> str:
    """Return all sections: options of every trainer, then each trainer."""
    trainers = list_trainers()
    by_name = {trainer.name: trainer for trainer in trainers}
    common = f"### Options of every trainer\n\n{table(describe(Settings))}"
    return "\n".join([common, *(section(trainer, by_name) for trainer in trainers)])


def page(text: str) -> str:
    """Return the text of the page with its tables renewed."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
