"""Compare several runs on the same test cases: check that they are comparable, score them, write a report."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nnunetv2_dycon import parallel
from nnunetv2_dycon.data.datasets import dataset_name
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.advice import short
from nnunetv2_dycon.evaluation.comparison import make_comparison
from nnunetv2_dycon.evaluation.facts import Weights
from nnunetv2_dycon.evaluation.figures import Images
from nnunetv2_dycon.evaluation.label_files import case_files, read_labels
from nnunetv2_dycon.evaluation.likeness import check_alike, find_baseline
from nnunetv2_dycon.evaluation.metrics import Convention
from nnunetv2_dycon.evaluation.predict import predict as predict_run
from nnunetv2_dycon.evaluation.report import REPORT_FILE, write_report
from nnunetv2_dycon.evaluation.runs import Place, Run, find_runs
from nnunetv2_dycon.evaluation.scores import check_writable, evaluate
from nnunetv2_dycon.evaluation.tables import choose_published
from nnunetv2_dycon.files import remove_dead, whole_folder
from nnunetv2_dycon.folders import environment_folder

logger = logging.getLogger(__name__)


def compare(
    dataset_id: int | str,
    runs: Sequence[str],
    baseline: str | None = None,
    output: str | Path = "",
    configuration: str = "3d_fullres",
    *,
    upper: Sequence[str] = (),
    folds: Sequence[int | str] = (0,),
    plans: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    weights: Sequence[Weights] = ("student",),
    predict: bool = False,
    mirroring: bool = True,
    save_probabilities: bool = False,
    device: str | None = None,
    published: str | None = None,
    truth_folder: str | Path | None = None,
    convention: Convention = "mm",
    processes: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Compare runs on the test cases of a data set and write a report.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    runs : sequence of str
        Trainer names (`*` stands for anything), results folders, folders of predictions, or RUN=FOLDER for the
        predictions of RUN in FOLDER. Runs whose trainer names differ in `seed` alone are one method.
    baseline : str, optional
        The run that the others are compared with; by default the first.
    upper : sequence of str
        Upper bounds: runs on more labels, usually all. Named like `runs`; give the results folder of a run on another
        data set. They come last in the table, which also shows the share of the gap between baseline and the first
        upper bound that each method closes.
    output : path
        Folder to write: report.html, report.md with figures/, tables.tex, results.csv, and scores/ of every case.
    configuration, folds, plans, checkpoint
        Which trainings of a trainer name, as in nnU-Net. Several folds are several labelled draws.
    weights : sequence of {"student", "teacher"}
        Networks whose predictions are compared; each is a row. The baseline is its first row.
    predict : bool
        Predict the test cases of runs without predictions, into `test/` of the fold's folder.
    mirroring : bool
        Whether these predictions are (or were) averaged over mirrored ones.
    save_probabilities : bool
        Write probabilities with new predictions; the report shows calibration where every run has them.
    device : str, optional
        For predictions; by default CUDA if available, else the CPU.
    published : str, optional
        Add published results: the data set's name in published_results.json, or "auto" to find it.
    truth_folder : path, optional
        True label maps of the test cases; by default labelsTs of the raw data set.
    convention : {"mm", "literature"}
        Convention of the distances, see `metrics`.
    processes : int, optional
        Worker processes of the evaluation; by default one per processor, at most 8.
    overwrite : bool
        Replace the output folder if it is a report.

    Returns
    -------
    Path
        The HTML report.

    Raises
    ------
    DataError
        If runs cannot be compared, are not finished or not predicted, or a file cannot be read or written.
    ConfigError
        If an option has an invalid value.
    """
    output = Path(output)
    check_writable(output.parent)
    remove_dead(output)  # the report that a killed run was replacing is a report again
    _check_output(output, overwrite)
    processes = parallel.default_processes() if processes is None else processes
    dataset = dataset_name(dataset_id)
    raw = environment_folder("nnUNet_raw") / dataset
    truth = _truth(raw, truth_folder)
    labels = read_labels(raw / "dataset.json", truth)
    cases = case_files(truth, labels.ending)
    place = Place(dataset, configuration, plans, tuple(folds), checkpoint)
    found, bounds = (
        _unique([run for text in named for run in find_runs(text, place, weights, mirroring)])
        for named in (runs, upper)
    )
    reference = find_baseline(runs[0] if baseline is None else baseline, found)
    others = choose_published(dataset if published == "auto" else published, _labeled(found)) if published else []
    found += [replace(run, upper=True) for run in bounds]
    if len({run.method for run in found}) < 2:
        raise ConfigError("--runs names one method only (seeds of it, or one run); give at least two, or --upper")
    for run in found:
        if not run.predictions.is_dir():
            _predict(run, predict, raw / "imagesTs", mirroring, device, save_probabilities)
    predicted = {str(run.predictions): case_files(run.predictions, labels.ending) for run in found}
    check_alike(found, cases, predicted)
    labels = read_labels(raw / "dataset.json", truth, found[0].predictions)
    images = Images(truth, raw / "imagesTs" if (raw / "imagesTs").is_dir() else None, labels)
    title = f"Comparison on {dataset.split('_', 1)[-1]}"
    with whole_folder(output) as whole:
        scored = []
        for number, run in enumerate(found):
            logger.info("%d of %d: %s, %s", number + 1, len(found), run.method, run.predictions)
            scores = whole / "scores" / f"{number:02d}_{run.facts.trainer or run.predictions.name}_{run.facts.weights}"
            scores.mkdir(parents=True)
            with _quiet(evaluate.__module__):  # it would name a folder that is moved at the end
                rows = evaluate(truth, run.predictions, raw / "dataset.json", scores, processes, convention=convention)
            scored.append((run, rows))
        write_report(whole, title, make_comparison(scored, reference), images, others)
        _check_output(output, overwrite)  # another run may have written there meanwhile
    return output / REPORT_FILE


@contextmanager
def _quiet(module: str) -> Iterator[None]:
    other = logging.getLogger(module)
    level = other.level
    other.setLevel(logging.WARNING)
    try:
        yield
    finally:
        other.setLevel(level)


def _truth(raw: Path, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    if not (raw / "labelsTs").is_dir():
        command = f"nnUNetv2_dycon split -d {short(raw.name)} --as ID --labeled all --test 0.2"
        raise DataError(
            f"{raw / 'labelsTs'} does not exist, so there are no test cases to compare on; name their true label maps "
            f"with --truth, or set cases aside before the training, as data set ID: {command}"
        )
    return raw / "labelsTs"


def _labeled(runs: Sequence[Run]) -> list[int | None]:
    return [run.facts.labeled_count for run in runs]


def _unique(runs: Sequence[Run]) -> list[Run]:
    """Return the runs without repetitions: a pattern may match a run that is also named."""
    return list({(str(run.predictions.absolute()), run.facts.weights): run for run in reversed(runs)}.values())[::-1]


def _predict(
    run: Run, wanted: bool, images: Path, mirroring: bool, device: str | None, save_probabilities: bool
) -> None:
    if not wanted:
        name = run.facts.trainer or run.name
        raise DataError(
            f"{name} has no predictions in {run.predictions}; type --predict, or where they are: --runs {name}=FOLDER"
        )
    if not images.is_dir():
        raise DataError(f"{images} does not exist, so nothing can be predicted; put the test images there")
    logger.info("predicting the test cases with %s, fold %s", run.method, run.facts.fold)
    predict_run(run, images, mirroring=mirroring, device=device, save_probabilities=save_probabilities)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / REPORT_FILE).is_file():
        raise DataError(f"{output} exists and is not a report; give -o another folder")
    if not overwrite:
        raise DataError(f"{output} holds a report; type --overwrite to replace it, or give -o another folder")
