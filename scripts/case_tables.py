"""The Dice of every test case as one table: a row for each case and class, a column for each run.

The workflow writes it as dice.csv, forest_figure.py reads it. A column is named LABELLED_DRAW/RUN_WEIGHTS. A value is
empty where a run was not scored on a case, and nan where the structure is neither in truth nor in prediction.
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.scores import read_scores

ROW = ("data", "case", "label", "name")

Dice = dict[tuple[str, int], float]  # of each case and label
Runs = dict[tuple[str, str], Dice]  # by data set and name of the column


def of_folders(folders: Iterable[Path]) -> tuple[Runs, dict[tuple[str, int], str]]:
    """Return the Dice of runs from the workflow's folders DATASET/RUN_WEIGHTS with scores.csv, and names of labels.

    A structure that is in neither map has nan.
    """
    runs: Runs = {}
    names: dict[tuple[str, int], str] = {}
    for folder in folders:
        data, place = _data_and_place(folder.parent.name)
        scores = read_scores(folder / "scores.csv")
        runs[data, f"{place}/{folder.name}"] = {
            (one.case, one.label): math.nan if one.dice is None else one.dice for one in scores
        }
        names.update({(data, one.label): one.name for one in scores})
    return runs, names


def _data_and_place(folder: str) -> tuple[str, str]:
    """Return data set and labelled number with draw of the workflow's name of a data set.

    Examples
    --------
    >>> _data_and_place("Dataset661_ACDC_labeled6_draw0")
    ('ACDC', 'labeled6_draw0')
    """
    found = re.fullmatch(r"Dataset\d+_(.+)_(labeled[^_]+_draw[^_]+)", folder)
    if found is None:
        raise DataError(f"{folder} is not a data set of the workflow: DatasetNNN_NAME_labeledN_drawD")
    return found[1], found[2]


def write(path: Path, runs: Runs, names: Mapping[tuple[str, int], str]) -> None:
    """Write the table, with six decimals."""
    columns = sorted({column for _, column in runs})
    rows = sorted({(data, *unit) for (data, _), dice in runs.items() for unit in dice})
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*ROW, *columns])
        for data, case, label in rows:
            values = [runs.get((data, column), {}).get((case, label)) for column in columns]
            cells = ["" if value is None else f"{value:.6f}" for value in values]
            table.writerow([data, case, label, names[data, label], *cells])


def read(path: Path) -> Runs:
    """Return the runs of a table.

    Raises
    ------
    DataError
        If the file is not such a table.
    """
    runs: Runs = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if tuple((table.fieldnames or ())[: len(ROW)]) != ROW:
                raise ValueError(f"its first columns are not {', '.join(ROW)}")
            for row in table:
                for column in (table.fieldnames or ())[len(ROW) :]:
                    if row[column]:
                        dice = runs.setdefault((row["data"], column), {})
                        dice[row["case"], int(row["label"])] = float(row[column])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a table of the workflow (dice.csv): {error}") from error
    return runs
