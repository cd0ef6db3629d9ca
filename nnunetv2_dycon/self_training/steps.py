"""The steps of an experiment in their order; steps that are done are skipped."""

import logging
import shlex
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.locks import locked
from nnunetv2_dycon.self_training.claims import check_ids, take_ids
from nnunetv2_dycon.self_training.experiment import read_experiment
from nnunetv2_dycon.self_training.lengths import share_epochs
from nnunetv2_dycon.self_training.preparation import Preparation
from nnunetv2_dycon.self_training.round_data import RoundData
from nnunetv2_dycon.self_training.training import Training, list_trainings
from nnunetv2_dycon.self_training.trial import try_files, try_images

logger = logging.getLogger(__name__)


class SelfTraining(NamedTuple):
    """The fold's folder of the last training, and what a user would type next."""

    folder: Path
    then: str


def self_train(
    dataset_id: int | str,
    new_ids: Sequence[int],
    trainer: str = "nnUNetTrainer",
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    plans: str = "nnUNetPlans",
    epochs: Sequence[int] = (1000,),  # as nnU-Net
    repeat: int | str = "half",
    keep_empty: bool = False,
    device: str | None = None,
    processes: int | None = None,
    dry_run: bool = False,
) -> SelfTraining:
    """Train, pseudo-label and train again, one round per new data set; continue where an earlier run stopped.

    All trainings have the network, patch, spacing and intensity statistics of the given data set. They start from
    random weights and end with their final checkpoint. Only labels of the fold's training and validation cases are
    read, and only images of imagesUn are predicted.

    Parameters
    ----------
    dataset_id : int or str
        Planned and preprocessed data set with unlabelled images in imagesUn.
    new_ids : sequence of int
        Free ids, one for the data set of each round.
    trainer : str
        nnUNetTrainer, or nnUNetTrainerLabeledOnly with any option except `epochs`.
    configuration, fold, plans
        As in nnU-Net's commands. Data sets of rounds have only fold 0, which validates on the same cases.
    epochs : sequence of int
        One number is the total and is shared equally, the last training gets the rest; or one number per training.
    repeat : int or "half"
        How often a round's fold lists each labelled case: nnU-Net draws it as many times as often as a pseudo-labelled
        case. With "half" about half of all training patches are labelled; 1 pools all cases.
    keep_empty : bool
        Also train on pseudo-labels without foreground.
    device : {"cuda", "cpu", "mps"}, optional
        CUDA by default if there is a device, else the processor.
    processes : int, optional
        Worker processes; one per processor, at most 8, by default.
    dry_run : bool
        Only log the steps and their commands; write nothing.

    Returns
    -------
    SelfTraining
        The fold's folder of the last training, and what to type next.

    Raises
    ------
    ConfigError
        If trainer, epochs, fold, configuration or `repeat` cannot be used.
    DataError, SplitError
        If the data set is not ready, an id is taken, a command of nnU-Net fails, or the files of an earlier run do not
        fit.
    """
    experiment = read_experiment(dataset_id, configuration, fold, plans, repeat, keep_empty, device, processes)
    lengths = share_epochs(epochs, len(new_ids))
    trainings = list_trainings(experiment, new_ids, trainer, lengths)
    last = trainings[-1]
    logger.info(
        "self-training on %s, fold %s: %s = %d epochs in all; compare it with one training of %d epochs "
        "on the labelled cases. Predictions and preprocessing take extra time.",
        experiment.data.name,
        fold,
        " + ".join(map(str, lengths)),
        sum(lengths),
        sum(lengths),
    )
    _try(trainings)
    steps = _steps(trainings)
    if dry_run:
        for step in steps:
            step.tell("done" if step.done() else "to do")
        return SelfTraining(last.folder, "the same command without --dry_run")
    folder = trainings[0].folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {folder} ({error.strerror}); set nnUNet_results") from error
    busy = f"another run, or a command that it started, is working on {folder}: wait for it, or stop it"
    with locked(folder, busy) as lock:
        take_ids(trainings)
        for step in steps:
            if step.done():
                step.tell("done")
                continue
            step.tell("now")
            step.act(lock)
            if not step.done():
                raise DataError(f"{step.title}: no error, but the results are missing; see the output above")
    images = experiment.data.raw / "imagesTs" if experiment.roles.test else "IMAGES"
    words = [*last.predict_words(), "-i", str(images), "-o", str(last.folder / "self_training")]
    return SelfTraining(last.folder, shlex.join(words))


def _try(trainings: Sequence[Training]) -> None:
    """Find before the first training what would stop the run after it."""
    check_ids(trainings)
    first = trainings[0]
    if not first.is_trained():
        try_files(first.experiment)
    if not first.is_begun():
        try_images(first.experiment)


class _Step(NamedTuple):
    """One step: whether it is done, the commands that a user would type, if any, and the function that does it."""

    title: str
    done: Callable[[], bool]
    commands: Sequence[Callable[[], list[str]]]
    act: Callable[[int | None], None]

    def tell(self, state: str) -> None:
        """Log the step, with its commands unless it is done."""
        if state == "done":
            logger.info("%s: %s", state, self.title)
            return
        typed = " && ".join(shlex.join(words()) for words in self.commands)
        typed = typed or "(links to images, labels and pseudo-labels: by this command)"
        logger.info("%s: %s\n  %s", state, self.title, typed)


def _steps(trainings: Sequence[Training]) -> list[_Step]:
    first = trainings[0]
    steps = [_Step("train on the labelled cases", first.is_trained, [first.train_words], first.train)]
    for teacher, one in pairwise(trainings):
        of = f"round {one.number}: "
        data, ready = RoundData(teacher, one), Preparation(one.experiment, one.data)
        plans = [ready.copy_words, ready.plan_words]
        steps += [
            _Step(of + "pseudo-labels", teacher.is_predicted, [teacher.label_words], teacher.label),
            _Step(of + f"data set {one.data.name}", data.is_made, [], data.make),
            _Step(of + f"plans of {first.data.name}", ready.is_planned, plans, ready.plan),
            _Step(of + "preprocessing", ready.is_preprocessed, [ready.preprocess_words], ready.preprocess),
            _Step(of + "train", one.is_trained, [one.train_words], one.train),
        ]
    return steps
