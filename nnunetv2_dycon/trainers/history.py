"""The series of a training: one row per epoch, kept in the checkpoint, written as CSV and as a picture."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # as nnU-Net's logger does: no window, whatever the machine
import matplotlib.pyplot as plt

from nnunetv2_dycon.files import whole_file
from nnunetv2_dycon.trainers.results import GO_ON

Row = dict[str, float]


def epoch_means(steps: Sequence[Mapping[str, float]]) -> Row:
    """Return the mean over steps of every number; one that is missing or not finite in a step is left out."""
    names = dict.fromkeys(name for step in steps for name in step)
    row: Row = {}
    for name in names:
        values = [step[name] for step in steps if name in step and math.isfinite(step[name])]
        row[name] = sum(values) / len(values) if values else math.nan
    return row


class History:
    """Rows of numbers by epoch, from epoch 0 on."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows: list[Row] = [dict(row) for row in rows]

    def add(self, epoch: int, row: Row) -> None:
        """Append the row of `epoch`, dropping rows of a run that went further and was taken up again earlier."""
        self.rows = [*self.rows[:epoch], {"epoch": float(epoch), **row}]

    @property
    def columns(self) -> list[str]:
        """Names of all numbers, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def series(self, name: str) -> list[float]:
        """Return one number over the epochs; nan where it was not measured."""
        return [row.get(name, math.nan) for row in self.rows]

    def write_csv(self, path: Path) -> None:
        """Write all rows, whole or not at all."""
        with whole_file(path, GO_ON) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self, path: Path) -> None:
        """Write the picture: terms as they enter the loss, schedules and shares, pseudo Dice per class."""
        panels = (
            (
                "loss terms as weighted",
                [n for n in self.columns if n.endswith("_weighted") or n == "supervised"],
            ),
            ("schedules and shares", [n for n in self.columns if _plain(n) in SHARES]),
            ("pseudo Dice per class", [n for n in self.columns if n.startswith("dice_")]),
        )
        figure, axes = plt.subplots(len(panels), 1, figsize=(11, 12))
        figure.subplots_adjust(left=0.07, right=0.72, top=0.96, bottom=0.06, hspace=0.3)  # legends on the right
        for axis, (title, names) in zip(axes, panels, strict=True):
            for name in names:
                style = "--" if name.startswith("dice_teacher") else "-"
                axis.plot(self.series("epoch"), self.series(name), style, label=name)
            axis.set(title=title, xlabel="epoch")
            if names:
                axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0))
        with whole_file(path, GO_ON) as part:
            figure.savefig(part, dpi=100)
        plt.close(figure)


SHARES = (
    "ramp",
    "beta",
    "threshold",
    "classes_learned",
    "agreement",
    "voxels_kept",
    "patches_kept",
    "foreground_patches",
    "skipped_steps",
)


def _plain(name: str) -> str:
    """Return the name without the start of its view (in_, out_) and the end of its pair (_second)."""
    return name.removeprefix("in_").removeprefix("out_").removesuffix("_second")


def unseen_classes(history: History, classes: Sequence[str], *, seen: float = 0.1, unseen: float = 0.01) -> list[str]:
    """Return the classes that the teacher does not show in the last epoch, though it should: their pseudo Dice is 0.

    This is the alarm of semi-supervised training: such a teacher tells the student that the class is absent. A class
    counts whose teacher pseudo Dice is below `unseen`, if it has passed `seen` before, or if the unlabelled terms have
    more than half of their weight, so that it should have been learnt by now.

    Parameters
    ----------
    history : History
        The series of the training.
    classes : sequence of str
        Names of all foreground classes.
    seen, unseen : float
        Pseudo Dice from which a class has been learnt, and below which it is lost.
    """
    last = history.rows[-1]
    return [
        name
        for name in classes
        if last.get(f"dice_teacher_{name}", math.nan) < unseen
        and (last.get("ramp", 0.0) > 0.5 or any(value > seen for value in history.series(f"dice_teacher_{name}")))
    ]


def class_names(labels: Any, dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the names of foreground classes (or regions) in the order of nnU-Net's Dice.

    Parameters
    ----------
    labels : LabelManager
        nnU-Net's.
    dataset_json : mapping
        Content of dataset.json.
    """
    kept = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    names = {str(value): name for name, value in dataset_json["labels"].items()}
    return [names.get(str(list(k) if isinstance(k, tuple) else int(k)), str(k)) for k in kept]
