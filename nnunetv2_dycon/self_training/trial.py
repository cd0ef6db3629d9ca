"""Everything that could fail after the first training, tried before it."""

import tempfile
from contextlib import closing
from typing import Any, NamedTuple

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunetv2_dycon import parallel
from nnunetv2_dycon.data.dataset_json import channel_names
from nnunetv2_dycon.data.file_names import unlabeled_name_problems
from nnunetv2_dycon.data.prepare_case import read_image
from nnunetv2_dycon.data.roles import label_paths
from nnunetv2_dycon.data.splits import read_splits
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few, writing
from nnunetv2_dycon.folders import VARIABLES, environment_folder
from nnunetv2_dycon.self_training.experiment import Experiment


def try_files(experiment: Experiment) -> None:
    """Look whether all files that the rounds link are there, and whether nnU-Net's folders can be written.

    Raises
    ------
    DataError
        For the first thing that a round would fail on.
    """
    for variable in VARIABLES:
        folder = environment_folder(variable)
        with writing(folder, f"or set {variable}"), tempfile.TemporaryFile(dir=folder):
            pass
    problems = unlabeled_name_problems(experiment.data.raw, experiment.roles, experiment.content)
    if problems:
        raise DataError(first_few(problems, separator=" | "))
    splits = read_splits(experiment.data.preprocessed, experiment.data.raw)
    drawn = bool(splits) and experiment.fold != "all"
    cases = {case for part in experiment.fold_cases(splits) for case in part} if drawn else {*experiment.roles.labeled}
    labels = label_paths(experiment.data.raw, experiment.content, experiment.roles)
    for case in sorted(cases):
        for path in (*experiment.roles.files[case], labels[case]):
            if not path.is_file():
                raise DataError(f"{path} is gone; a round links it: restore it")
    folder = experiment.data.preprocessed / experiment.data_identifier
    there = {path.name.removesuffix(".pkl") for path in folder.glob("*.pkl")}
    # without a split file nnU-Net takes all preprocessed cases
    wrong = cases - there or (set() if drawn else there - cases)
    if wrong:
        raise DataError(
            f"{sorted(wrong)[0]!r} is in one of {experiment.data.raw / 'imagesTr'} and {folder} alone; type: "
            f"nnUNetv2_preprocess -d {experiment.data.id} -plans_name {experiment.plans_name} "
            f"-c {experiment.configuration}"
        )


class _Image(NamedTuple):
    """An unlabelled image to read; picklable."""

    files: tuple[str, ...]
    plans: dict[str, Any]
    channels: int


def try_images(experiment: Experiment) -> None:
    """Read every unlabelled image as nnU-Net will read it.

    Raises
    ------
    DataError
        If one cannot be read, has other channels than dataset.json names, is empty, or has NaN or Inf.
    """
    files = [tuple(map(str, experiment.roles.files[case])) for case in experiment.roles.unlabeled]
    tasks = [_Image(names, dict(experiment.plans), len(channel_names(experiment.content))) for names in files]
    with closing(parallel.run(_problem, tasks, experiment.processes)) as results:
        seen = tqdm(results, total=len(tasks), desc="Unlabelled images", unit="case", disable=None)
        problems = sorted(problem for _, problem in seen if problem is not None)
    if problems:
        raise DataError(first_few(problems, separator=" | "))


def _problem(image: _Image) -> str | None:
    try:
        read_image(image.files, PlansManager(image.plans), image.channels)
    except DataError as error:
        return str(error)
    return None
