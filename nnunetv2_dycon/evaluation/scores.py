"""Score a folder of predictions: a table of all cases, a summary, and nnU-Net's summary.json."""

import csv
import errno
import json
import logging
import math
import shlex
import statistics
import tempfile
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
from tqdm import tqdm

from nnunetv2_dycon import __version__, parallel
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.forms import csv_table, plain_text
from nnunetv2_dycon.evaluation.label_files import (
    DATASET_FILE,
    PLANS_FILE,
    Labels,
    case_files,
    read_label_map,
    read_labels,
    reader_that_agrees,
    same_geometry,
)
from nnunetv2_dycon.evaluation.metrics import (
    DISTANCES,
    OVERLAPS,
    Convention,
    Counts,
    Score,
    ScoreSettings,
    Status,
    f1,
    precision,
    recall,
    score_case,
)
from nnunetv2_dycon.files import first_few, whole_file, writing

logger = logging.getLogger(__name__)

MADE_BY_NNUNET = (PLANS_FILE, "predict_from_raw_data_args.json")  # in a folder of predictions
SUMMARIZED = (*OVERLAPS, *DISTANCES, "volume_error_ml", "lesion_f1")

Scored = list[tuple[Score, Counts]]


class _Task(NamedTuple):
    case: str
    truth: Path
    prediction: Path
    labels: Labels
    settings: ScoreSettings


def evaluate(
    truth_folder: str | Path,
    prediction_folder: str | Path,
    dataset_json: str | Path | None = None,
    output: str | Path | None = None,
    processes: int | None = None,
    *,
    convention: Convention = "mm",
    tolerance: float = 2.0,
    lesions: bool = False,
    distances: bool = True,
    chill: bool = False,
) -> list[Score]:
    """Score every case of a folder of predictions.

    Writes scores.csv (all cases), scores.json (the result of `summarize`) and nnU-Net's summary.json, all or none.
    With convention "literature" the first two are named scores_literature.csv and scores_literature.json.

    Parameters
    ----------
    truth_folder, prediction_folder : path
        Folders of label maps with the same file names.
    dataset_json : path, optional
        Gives labels, regions, the ignore label and the file ending. By default nnU-Net's copy in the folder of the
        predictions, else dataset.json next to the folder of the truth.
    output : path, optional
        Folder for the three files; by default the folder of the predictions.
    processes : int, optional
        Worker processes; by default one per processor, at most 8.
    convention, tolerance, lesions, distances
        See `ScoreSettings`.
    chill : bool
        Accept missing predictions and score the others, as in nnU-Net.

    Returns
    -------
    list of Score
        One a case and structure, by case.

    Raises
    ------
    DataError
        If folders or files do not match, or a file cannot be read or written.
    ConfigError
        If an option has an invalid value.
    """
    settings = ScoreSettings(convention, tolerance, distances, lesions)
    truth_folder, prediction_folder = Path(truth_folder), Path(prediction_folder)
    _check_order(truth_folder, prediction_folder, output)
    output = prediction_folder if output is None else Path(output)
    path = _dataset_file(truth_folder, prediction_folder) if dataset_json is None else Path(dataset_json)
    labels = read_labels(path, truth_folder, prediction_folder)
    truths, predictions = (case_files(folder, labels.ending) for folder in (truth_folder, prediction_folder))
    _check_names(truths, predictions, truth_folder, prediction_folder, chill)
    names = _file_names(convention)
    check_writable(output, names)
    tasks = [_Task(case, truths[case], file, labels, settings) for case, file in predictions.items()]
    done: dict[str, Scored] = {}
    workers = parallel.default_processes() if processes is None else processes
    with closing(parallel.run(_score_files, tasks, workers)) as results:
        for task, scored in tqdm(results, total=len(tasks), desc="Scoring cases"):
            done[task.case] = scored
    rows = [score for task in tasks for score, _ in done[task.case]]
    of_nnunet = nnunet_summary([(task.truth, task.prediction, done[task.case]) for task in tasks])
    summary = {"truth": str(truth_folder), "predictions": str(prediction_folder), **summarize(rows)}
    texts = (
        _csv(rows),
        json.dumps(summary, indent=2, allow_nan=False),
        json.dumps(of_nnunet, indent=4, sort_keys=True),
    )
    files = dict(zip(names, texts, strict=True))
    _write(output, files)
    logger.info("%d of %d cases scored; written: %s", len(tasks), len(truths), output / f"{{{','.join(files)}}}")
    return rows


def _score_files(task: _Task) -> Scored:
    truth = read_label_map(task.truth, task.labels, truth=True)
    prediction = read_label_map(task.prediction, task.labels, truth=False)
    difference = same_geometry(truth, prediction)
    if difference:
        mend = "write it in the truth's geometry"
        other = reader_that_agrees(task.truth, task.prediction, task.labels)
        if other:
            mend = f'as {other} reads them they do not differ: add "overwrite_image_reader_writer": "{other}" to '
            mend += f"{DATASET_FILE} if nnU-Net predicted with it, else write the prediction in the truth's geometry"
        raise DataError(f"{task.prediction} has {difference} of {task.truth}; {mend}")
    return score_case(
        truth.labels,
        prediction.labels,
        truth.spacing,
        task.labels.structures,
        case=task.case,
        ignore=task.labels.ignore,
        settings=task.settings,
    )


def _check_order(truth_folder: Path, prediction_folder: Path, output: str | Path | None) -> None:
    """Refuse folders in the wrong order, which would be scored nearly as well, with the results among true labels."""
    predicted, swapped = (
        any((folder / name).is_file() for name in MADE_BY_NNUNET) for folder in (prediction_folder, truth_folder)
    )
    swapped = swapped and not predicted
    labels = prediction_folder.absolute().name in ("labelsTr", "labelsTs")
    if not (swapped or (labels and output is None)):
        return
    reason = f"{truth_folder} holds predictions of nnU-Net" if swapped else f"{prediction_folder} holds true labels"
    order = shlex.join(map(str, (prediction_folder, truth_folder)))
    raise DataError(
        f"{reason}, and the truth comes first; type: nnUNetv2_dycon evaluate {order}"
        + ("" if swapped else ", or give -o another folder if the order is meant")
    )


def _dataset_file(truth_folder: Path, prediction_folder: Path) -> Path:
    places = (prediction_folder / DATASET_FILE, truth_folder.absolute().parent / DATASET_FILE)
    for path in places:
        if path.is_file():
            return path
    raise DataError(f"neither {places[0]} nor {places[1]} exists; name the data set's own with -djfile")


def _check_names(
    truths: Mapping[str, Path],
    predictions: Mapping[str, Path],
    truth_folder: Path,
    prediction_folder: Path,
    chill: bool,
) -> None:
    missing, extra = sorted(truths.keys() - predictions.keys()), sorted(predictions.keys() - truths.keys())
    if len(missing) == len(truths):
        one, other = next(iter(truths.values())), next(iter(predictions.values()))
        raise DataError(
            f"{truth_folder} and {prediction_folder} share no file name ({one.name}, {other.name}); "
            "give the truth of these cases, or rename the files"
        )
    if extra:
        names = first_few([predictions[case].name for case in extra])
        raise DataError(f"{prediction_folder}: {names} has no truth in {truth_folder}; add it or remove the file")
    if missing and not chill:
        names = first_few([truths[case].name for case in missing])
        raise DataError(f"{prediction_folder} has no {names}; predict it, or type --chill to score the others alone")


# ---- summaries -------------------------------------------------------------------------------------------------


def summarize(rows: Collection[Score]) -> dict[str, Any]:
    """Return statistics of each structure over its cases, and means over structures.

    Parameters
    ----------
    rows : collection of Score
        Rows of one evaluation.

    Returns
    -------
    dict
        Keys "convention", "nsd_tolerance_mm", "version", "classes", "mean_over_classes". A class has its name, the
        number of cases n, the number of cases by status, and for each metric n, mean, sd (of a sample), median and
        quartiles q1 and q3 over the cases in which the metric is defined. Dice, IoU and NSD are defined unless both
        masks are empty, so that the mean Dice is nnU-Net's; distances are defined for status "ok". A distance also has
        a penalized_mean, which counts missed structures and false alarms as the image's diagonal. If lesions were
        counted, "lesions" has their numbers over all cases, with precision, recall and F1 from these.
        "mean_over_classes" averages the classes in which the metric has a mean. In the convention "literature" keys
        end in "_voxels" instead of "_mm".

    Raises
    ------
    DataError
        If there are no rows, or if they are from several evaluations.
    """
    protocols = sorted({(row.convention, row.nsd_tolerance_mm) for row in rows})
    if len(protocols) != 1:
        raise DataError(f"rows of {len(protocols)} conventions or tolerances {protocols}; summarize one evaluation")
    convention, tolerance = protocols[0]
    classes: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(row.label for row in rows):
        classes[label] = _summarize_class([row for row in rows if row.label == label])
    return {
        "convention": convention,
        column("nsd_tolerance_mm", convention): tolerance,
        "version": __version__,
        "mean_over_classes": {
            column(metric, convention): {
                key: _mean([c[column(metric, convention)][key] for c in classes.values()])
                for key in (("mean", "penalized_mean") if metric in DISTANCES else ("mean",))
            }
            for metric in SUMMARIZED
        },
        "classes": classes,
    }


def _summarize_class(rows: Sequence[Score]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "name": rows[0].name,
        "n": len(rows),
        "status": {status: sum(row.status == status for row in rows) for status in get_args(Status)},
    }
    for metric in SUMMARIZED:
        entry = _statistics([getattr(row, metric) for row in rows])
        if metric in DISTANCES:
            measured = any(row.nsd is not None for row in rows)
            entry["penalized_mean"] = _mean([row.penalized(metric) for row in rows]) if measured else None
        summary[column(metric, rows[0].convention)] = entry
    counted = [row for row in rows if row.lesion_tp is not None]
    if counted:
        tp, fp, fn = (sum(getattr(row, f"lesion_{key}") for row in counted) for key in ("tp", "fp", "fn"))
        rates = {"precision": precision(tp, fp), "recall": recall(tp, fn), "f1": f1(tp, fp, fn)}
        summary["lesions"] = {"tp": tp, "fp": fp, "fn": fn, **rates}
    return summary


def _statistics(values: Sequence[float | None]) -> dict[str, Any]:
    there = [value for value in values if value is not None]
    q1, median, q3 = np.percentile(there, (25, 50, 75)).tolist() if there else (None,) * 3
    sd = statistics.stdev(there) if len(there) > 1 else None
    return {"n": len(there), "mean": _mean(values), "sd": sd, "median": median, "q1": q1, "q3": q3}


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [math.nan if value is None else value for value in values]
    # the function that nnU-Net uses, for the same last digit
    return None if all(map(math.isnan, numbers)) else float(np.nanmean(numbers))


def nnunet_summary(cases: Sequence[tuple[Path, Path, Scored]]) -> dict[str, Any]:
    """Return the content of nnU-Net's summary.json; its own code would import torch in every worker.

    Parameters
    ----------
    cases : sequence of (truth file, prediction file, result of `score_case`)
        In the order of the file.
    """
    per_case: list[dict[str, Any]] = [
        {
            "reference_file": str(truth),
            "prediction_file": str(prediction),
            "metrics": {score.label: _nnunet_metrics(counts) for score, counts in scored},
        }
        for truth, prediction, scored in cases
    ]
    labels, keys = per_case[0]["metrics"], _nnunet_metrics(Counts(0, 0, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a structure that is in no case is nan, as in nnU-Net
        means = {
            label: {key: float(np.nanmean([case["metrics"][label][key] for case in per_case])) for key in keys}
            for label in labels
        }
    foreground = {key: float(np.mean([mean[key] for mean in means.values()])) for key in keys}
    return {"metric_per_case": per_case, "mean": means, "foreground_mean": foreground}


def _nnunet_metrics(counts: Counts) -> dict[str, float]:
    tp, fp, fn, tn = counts
    union = tp + fp + fn
    dice, iou = (2 * tp / (union + tp), tp / union) if union else (math.nan, math.nan)
    return {"Dice": dice, "IoU": iou, "FP": fp, "TP": tp, "FN": fn, "TN": tn, "n_pred": fp + tp, "n_ref": fn + tp}


# ---- files -----------------------------------------------------------------------------------------------------


def column(field: str, convention: Convention) -> str:
    """Return the name of a field in files: `_voxels` instead of `_mm` for the convention "literature"."""
    return field if convention == "mm" or not field.endswith("_mm") else field.removesuffix("mm") + "voxels"


def _file_names(convention: Convention) -> tuple[str, str, str]:
    stem = "scores" if convention == "mm" else f"scores_{convention}"
    return f"{stem}.csv", f"{stem}.json", "summary.json"


def _columns(convention: Convention) -> list[str]:
    return [column(field.name, convention) for field in fields(Score)]


def _csv(rows: Sequence[Score]) -> str:
    return csv_table(_columns(rows[0].convention), map(astuple, rows))


def read_scores(path: str | Path) -> list[Score]:
    """Return the rows of a table that `evaluate` wrote.

    Raises
    ------
    DataError
        If the file cannot be read or is not such a table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); type: nnUNetv2_dycon evaluate") from error
    if header not in [_columns(convention) for convention in get_args(Convention)]:
        raise DataError(f"{path} lacks the columns of a table of scores; type: nnUNetv2_dycon evaluate")
    kinds = [_kind(hint) for hint in get_type_hints(Score).values()]
    names = [field.name for field in fields(Score)]
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            cells: Iterable[Any] = (kind(cell) if cell else None for kind, cell in zip(kinds, line, strict=True))
            values: dict[str, Any] = dict(zip(names, cells, strict=True))
            rows.append(Score(**values))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}; type: nnUNetv2_dycon evaluate") from error
    return rows


def _kind(hint: Any) -> Callable[[str], Any]:
    """Return what converts a cell: `float` for `float | None`, `plain_text` for text and a literal."""
    kind = get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    return kind if kind in (int, float) else plain_text


def check_writable(folder: Path, names: Iterable[str] = ()) -> None:
    """Make a folder, and check before the work that files can be written to it.

    Parameters
    ----------
    folder : Path
        The folder.
    names : iterable of str
        Files that will be written there.

    Raises
    ------
    WriteError
        If it cannot be written to, or a folder has the name of a file.
    """
    with writing(folder):
        if folder.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in (folder / name for name in names):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{path.name} in it is a folder")


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write all files or none: they get their names when all are complete."""
    with ExitStack() as stack:
        for name, text in texts.items():
            part = stack.enter_context(whole_file(folder / name, "or give -o another folder"))
            part.write_bytes(text.encode())
