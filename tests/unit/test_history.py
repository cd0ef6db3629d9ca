"""The series of a training: means, rows, files, and the alarm for a class that is gone."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_dycon.trainers.history import History, class_names, epoch_means, unseen_classes


def test_a_mean_leaves_out_what_is_missing_or_not_finite() -> None:
    steps = [{"a": 1.0, "b": math.nan}, {"a": 3.0, "b": 4.0, "c": 7.0}, {"a": 5.0, "b": math.inf, "d": math.nan}]
    means = epoch_means(steps)
    assert list(means) == ["a", "b", "c", "d"]
    assert (means["a"], means["b"], means["c"]) == (3.0, 4.0, 7.0)
    assert math.isnan(means["d"])
    assert epoch_means([]) == {}


def test_a_run_that_is_taken_up_earlier_drops_the_rows_of_the_one_that_went_further() -> None:
    history = History()
    for epoch in range(4):
        history.add(epoch, {"x": float(epoch)})
    history.add(2, {"x": 20.0})
    assert history.rows == [{"epoch": 0.0, "x": 0.0}, {"epoch": 1.0, "x": 1.0}, {"epoch": 2.0, "x": 20.0}]


def test_rows_are_copies() -> None:
    rows = [{"epoch": 0.0, "x": 1.0}]
    history = History(rows)
    history.rows[0]["x"] = 2.0
    assert rows == [{"epoch": 0.0, "x": 1.0}]


def test_columns_are_in_order_of_appearance_and_a_gap_is_nan(tmp_path: Path) -> None:
    history = History()
    history.add(0, {"b": 1.0})
    history.add(1, {"a": 2.0, "b": 0.25})
    assert history.columns == ["epoch", "b", "a"]
    assert history.series("b") == [1.0, 0.25]
    assert math.isnan(history.series("a")[0])
    history.write_csv(tmp_path / "x.csv")
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.reader(file)) == [["epoch", "b", "a"], ["0.0", "1.0", ""], ["1.0", "0.25", "2.0"]]
    history.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_schedules_and_shares_of_every_view_and_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curves of a BCP mix have `in_` and `out_` before their names, those of a second network an end."""
    shown: dict[str, list[str]] = {}
    save = Figure.savefig

    def noted(figure: Figure, *args: Any, **kwargs: Any) -> None:
        shown.update({axis.get_title(): [line.get_label() for line in axis.lines] for axis in figure.axes})
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noted)
    shares = ["ramp", "patches_kept", "in_agreement", "out_patches_kept", "in_voxels_kept_second"]
    history = History()
    history.add(
        0, dict.fromkeys(["supervised", "in_uncl", "in_uncl_weighted", *shares, "dice_a", "in_uncl_weight"], 0.5)
    )
    history.plot(tmp_path / "x.png")
    assert shown == {
        "loss terms as weighted": ["supervised", "in_uncl_weighted"],
        "schedules and shares": shares,
        "pseudo Dice per class": ["dice_a"],
    }


@pytest.mark.parametrize(
    ("series", "ramp", "unseen"),
    [
        ([0.11, 0.009], 0.0, True),  # passed 0.1, now below 0.01
        ([0.10, 0.009], 0.0, False),
        ([0.11, 0.010], 0.0, False),
        ([0.00, 0.000], 0.51, True),  # the teacher has more than half of its weight
        ([0.00, 0.000], 0.5, False),
        ([0.5, math.nan], 1.0, False),  # absent from all patches
    ],
)
def test_a_class_is_unseen_when_its_dice_falls_to_nothing(series: list[float], ramp: float, unseen: bool) -> None:
    history = History()
    for epoch, value in enumerate(series):
        history.add(epoch, {"dice_teacher_a": value, "dice_teacher_b": 0.9, "ramp": ramp})
    assert unseen_classes(history, ["a", "b"]) == (["a"] if unseen else [])


@pytest.mark.parametrize(
    ("labels", "order", "names"),
    [
        ({"background": 0, "lesion": 2, "organ": 1, "ignore": 3}, None, ["organ", "lesion"]),
        ({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, [1, 2], ["whole", "core"]),
        ({"background": 0, "whole": [1, 2], "core": 2}, [1, 2], ["whole", "core"]),
    ],
)
def test_class_names_are_in_the_order_of_nnunets_dice(labels: dict, order: list[int] | None, names: list[str]) -> None:
    assert class_names(LabelManager(labels, order), {"labels": labels}) == names
