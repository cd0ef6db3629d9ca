"""Write a page for each trainer, and the tables of docs/trainers.md, from the code. Cost: seconds.

    python scripts/trainer_pages.py

A test compares what is written with what is in docs/.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from nnunetv2_dycon.options import Row, Settings, describe
from nnunetv2_dycon.trainers.names import TrainerInfo, list_trainers

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- from the code -->\n", "<!-- end -->\n"
START = "nnUNetTrainer"
HEADER = "| option | default | meaning | allowed |\n|---|---|---|---|\n"
# Where the equations of a trainer are; a preset is explained where its trainer is.
EXPLAINED = {
    "nnUNetTrainerLabeledOnly": ("What is exact", "exactness.md#what-is-exact"),
    "nnUNetTrainerMeanTeacher": ("Total loss", "method.md#total-loss"),
    "nnUNetTrainerUAMT": ("UA-MT", "recipes.md#ua-mt-nnunettraineruamt"),
    "nnUNetTrainerPseudoLabel": ("Pseudo-labels", "recipes.md#pseudo-labels-nnunettrainerpseudolabel"),
    "nnUNetTrainerBCP": ("BCP", "recipes.md#bcp-nnunettrainerbcp"),
    "nnUNetTrainerCPS": ("CPS", "recipes.md#cps-nnunettrainercps"),
    "nnUNetTrainerDHC": ("DHC", "many_organs.md#dhc"),
    "nnUNetTrainerMagicNet": ("MagicNet", "many_organs.md#magicnet"),
    "nnUNetTrainerDyCON": ("The method", "method.md"),
    "nnUNetTrainerDyCONCPS": ("DyCON in co-training", "recipes.md#dycon-in-co-training-nnunettrainerdyconcps"),
    "nnUNetTrainerDyCONBCP": ("Total loss", "method.md#total-loss"),
    "nnUNetTrainerDyCONMagicNet": ("DyCON on top", "many_organs.md#dycon-on-top"),
}


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of options."""
    escaped = [[cell.replace("|", "or") for cell in row] for row in rows]
    lines = (f"| `{name}` | {default} | {meaning} | {allowed} |" for name, default, allowed, meaning in escaped)
    return HEADER + "\n".join(lines) + "\n"


def summary(trainer: TrainerInfo) -> str:
    """Return what a trainer is, in one line."""
    return f"`{trainer.preset_of}` with other defaults." if trainer.preset_of else trainer.summary


def options_of(trainer: TrainerInfo, by_name: dict[str, TrainerInfo]) -> str:
    """Return the options of a trainer beyond those of every trainer; of a preset, those with other defaults."""
    known = by_name[trainer.preset_of].options if trainer.preset_of else describe(Settings)
    rows = [row for row in trainer.options if row not in known]
    if trainer.preset_of:
        title, others = "Other defaults", f"All others are those of [{trainer.preset_of}]({trainer.preset_of}.md)."
    else:
        title, others = "Options", "Those [of every trainer](../trainers.md#options-of-every-trainer) come on top."
    return f"## {title}\n\n{table(rows)}\n{others}\n"


def trainer_page(trainer: TrainerInfo, by_name: dict[str, TrainerInfo]) -> str:
    """Return the page of a trainer: what it is, the command, where it is explained, its options."""
    title, target = EXPLAINED[trainer.preset_of or trainer.name]
    return (
        f"# {trainer.name}\n\n{summary(trainer)}\n\n"
        f"```bash\nnnUNetv2_train 501 3d_fullres 0 -tr {trainer.name}\n```\n\n"
        f"Equations and sources: [{title}](../{target}). Cost of a step: [what it costs](../costs.md#cost-of-a-step).\n"
        "How options are written: [trainers and options](../trainers.md#options-in-a-name).\n\n"
        f"{options_of(trainer, by_name)}"
    )


def index(trainers: Sequence[TrainerInfo]) -> str:
    """Return the table of all trainers and the options of every one."""
    links = (f"[{one.name.removeprefix(START)}](trainers/{one.name}.md)" for one in trainers)
    rows = "\n".join(f"| {link} | {summary(one)} |" for link, one in zip(links, trainers, strict=True))
    common = f"## Options of every trainer\n\n{table(describe(Settings))}"
    return f"## All trainers\n\n| {START}... | what it does |\n|---|---|\n{rows}\n\n{common}"


def pages() -> dict[Path, str]:
    """Return the text of each page that is written, by its place in docs/."""
    trainers = list_trainers()
    by_name = {trainer.name: trainer for trainer in trainers}
    text = (DOCS / "trainers.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    found = {Path("trainers.md"): f"{before}{BEGIN}\n{index(trainers)}\n{END}{rest.split(END)[1]}"}
    return found | {Path("trainers", f"{one.name}.md"): trainer_page(one, by_name) for one in trainers}


def main() -> None:
    """Write all pages; those of trainers that are gone are removed."""
    (DOCS / "trainers").mkdir(exist_ok=True)
    written = pages()
    for place, text in written.items():
        (DOCS / place).write_text(text, encoding="utf-8")
    for path in (DOCS / "trainers").glob("*.md"):
        if path.relative_to(DOCS) not in written:
            path.unlink()
    print(DOCS / "trainers.md")


if __name__ == "__main__":
    main()
