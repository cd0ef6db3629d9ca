"""One training with stock nnU-Net, and the pseudo-labels that its model predicts.

Next to a training's checkpoints are

- `pseudo_labels/`: predictions of all images in imagesUn;
- `pseudo_labels.json`, written last: the voxels of every structure in each prediction, and the checkpoint.
"""

import logging
import zipfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunetv2_dycon import parallel
from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.data.datasets import dataset_title
from nnunetv2_dycon.data.splits import STOCK_FOLDS, adopt_splits, read_splits, write_small_splits
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.label_files import Labels, read_label_map
from nnunetv2_dycon.files import file_digest, place, read_json_object, write_json
from nnunetv2_dycon.self_training import running
from nnunetv2_dycon.self_training.experiment import DataSet, Experiment
from nnunetv2_dycon.self_training.lengths import trainer_of_length

logger = logging.getLogger(__name__)

FINAL = "checkpoint_final.pth"
_CHECKPOINTS = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")

Voxels = dict[str, dict[str, int]]  # number by case and structure


@dataclass(frozen=True)
class Training:
    """One training; `number` 0 is the one on the labelled cases alone, `all_epochs` has the epochs of all trainings."""

    experiment: Experiment
    number: int
    data: DataSet
    fold: int | str
    trainer: str
    all_epochs: Sequence[int]

    @property
    def folder(self) -> Path:
        """The fold's folder."""
        model = f"{self.trainer}__{self.experiment.plans_name}__{self.experiment.configuration}"
        return self.data.results / model / f"fold_{self.fold}"

    def is_trained(self) -> bool:
        """Return whether the final checkpoint and the scores of the validation cases are there."""
        return _is_checkpoint(self.folder / FINAL) and (self.folder / "validation" / "summary.json").is_file()

    def is_begun(self) -> bool:
        """Return whether there is a checkpoint."""
        return any(_is_checkpoint(self.folder / name) for name in _CHECKPOINTS)

    def train_words(self) -> list[str]:
        """Return the command that trains, or continues from a checkpoint."""
        there = [name for name in _CHECKPOINTS if _is_checkpoint(self.folder / name)]
        how = [] if not there else ["--val"] if FINAL in there else ["--c"]
        experiment = self.experiment
        words = ["nnUNetv2_train", str(self.data.id), experiment.configuration, str(self.fold)]
        return [*words, "-tr", self.trainer, "-p", experiment.plans_name, "-device", experiment.device, *how]

    def train(self, lock: int | None) -> None:
        """Train to the end; an incomplete checkpoint is renamed first."""
        for path in (self.folder / name for name in _CHECKPOINTS):
            if path.is_file() and not _is_checkpoint(path):  # nnU-Net writes in place, so a kill cuts it short
                logger.warning("%s is incomplete and is renamed to .cut", path)
                place(path, path.with_name(f"{path.name}.cut"))
        if self.number == 0 and self.fold != "all":
            self._write_splits()
        running.call(self.train_words(), lock, training=True)

    def _write_splits(self) -> None:
        """Write the split file where nnU-Net, as it trains, would miss it or could not make it."""
        preprocessed, cases = self.data.preprocessed, self.experiment.roles.labeled
        adopt_splits(preprocessed, self.data.raw)  # nnU-Net ignores one that came after planning
        if len(cases) < STOCK_FOLDS and not read_splits(preprocessed):
            write_small_splits(preprocessed, cases)
            logger.info("%d labelled cases are too few for five folds: each fold validates on one case", len(cases))

    def checkpoint_digest(self) -> str:
        """Return the SHA-256 of the final checkpoint, hexadecimal."""
        return file_digest(self.folder / FINAL)

    def predict_words(self) -> list[str]:
        """Return the command that predicts with the final checkpoint, without images and output."""
        experiment = self.experiment
        words = ["nnUNetv2_predict", "-d", str(self.data.id), "-c", experiment.configuration]
        words += ["-f", str(self.fold), "-tr", self.trainer, "-p", experiment.plans_name]
        workers = str(max(1, min(3, experiment.processes // 2)))  # nnU-Net's own number is 3
        return [*words, "-device", experiment.device, "-npp", workers, "-nps", workers]

    @property
    def pseudo_labels(self) -> Path:
        """Folder of the predictions."""
        return self.folder / "pseudo_labels"

    def pseudo_label(self, case: str) -> Path:
        """Return the prediction of one of the unlabelled images."""
        return self.pseudo_labels / f"{case}{self.experiment.ending}"

    @property
    def _record(self) -> Path:
        return self.folder / "pseudo_labels.json"

    def is_predicted(self) -> bool:
        """Return whether each unlabelled image has a complete pseudo-label by the final checkpoint."""
        return self.is_trained() and self.voxels() is not None

    def voxels(self) -> Voxels | None:
        """Return the voxels of each structure in each pseudo-label; None if a pseudo-label is missing.

        Raises
        ------
        DataError
            If another checkpoint predicted the pseudo-labels.
        """
        try:
            noted = read_json_object(self._record)
        except DataError:
            return None
        if noted.get("checkpoint") != self.checkpoint_digest():
            raise DataError(
                f"{self.pseudo_labels} was predicted by another state of {self.folder / FINAL}; delete "
                f"{self._record} and the folder, and everything made from it"
            )
        voxels = noted.get("voxels")
        return voxels if voxels and set(voxels) == set(self.experiment.roles.unlabeled) else None

    def label_words(self) -> list[str]:
        """Return the command that predicts the unlabelled images."""
        images = self.experiment.data.raw / "imagesUn"
        return [*self.predict_words(), "-i", str(images), "-o", str(self.pseudo_labels), "--continue_prediction"]

    def label(self, lock: int | None) -> None:
        """Predict missing and incomplete pseudo-labels, then count the voxels of each.

        Raises
        ------
        DataError
            If an image was not predicted.
        """
        files = {case: self.pseudo_label(case) for case in self.experiment.roles.unlabeled}
        self._note(None)
        seen = self._look(list(files.values()))
        missing = _not_whole(seen)
        for path in missing:
            path.unlink(missing_ok=True)
        if missing:
            running.call(self.label_words(), lock)
            seen |= self._look(missing)
        bad = _not_whole(seen)
        if bad:
            raise DataError(f"{bad[0]} was not predicted ({len(bad)} such cases); see above, then type this again")
        self._note({case: counts for case, path in files.items() if (counts := seen[path]) is not None})

    def _look(self, files: Sequence[Path]) -> dict[Path, dict[str, int] | None]:
        tasks = [(path, self.experiment.labels) for path in files]
        with closing(parallel.run(_count, tasks, self.experiment.processes)) as results:
            found = tqdm(results, total=len(tasks), desc="Pseudo-labels", unit="case", disable=None)
            return {path: counts for (path, _), counts in found}

    def _note(self, voxels: Voxels | None) -> None:
        write_json(self._record, {"checkpoint": self.checkpoint_digest(), "voxels": voxels})


def list_trainings(
    experiment: Experiment, new_ids: Sequence[int], trainer: str, epochs: Sequence[int]
) -> list[Training]:
    """Return the training of the given data set and one for each new id, in their order.

    Parameters
    ----------
    experiment : Experiment
        Shared by all trainings.
    new_ids : sequence of int
        Free ids, one per round.
    trainer : str
        Trainer name, without its length.
    epochs : sequence of int
        Epochs of each training.

    Raises
    ------
    ConfigError
        If an id is given twice or cannot be used, or no trainer has a training's length.
    DataError
        If an id belongs to another data set.
    """
    data = experiment.data
    if len({*new_ids, data.id}) <= len(new_ids):
        raise ConfigError(f"--as {' '.join(map(str, new_ids))}: give each round its own id, different from -d")
    trainings = [Training(experiment, 0, data, experiment.fold, trainer_of_length(trainer, epochs[0]), epochs)]
    words = dataset_title(data.name)
    for number, new_id in enumerate(new_ids, start=1):
        raw = dataset.new_folder(new_id, f"{words}_fold{experiment.fold}_self{number}", "--as")
        new = DataSet.named(raw.name)
        trainings.append(Training(experiment, number, new, 0, trainer_of_length(trainer, epochs[number]), epochs))
    return trainings


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)  # torch's format ends with its table of contents


def _not_whole(seen: dict[Path, dict[str, int] | None]) -> list[Path]:
    return [path for path, counts in seen.items() if counts is None]


def _count(task: tuple[Path, Labels]) -> dict[str, int] | None:
    """Return the voxels of each structure; None if the file is missing or incomplete."""
    path, labels = task
    if not path.is_file():
        return None
    try:
        values = read_label_map(path, labels, truth=False).labels
    except DataError:
        return None
    counts = dict(enumerate(np.bincount(values.ravel()).tolist()))
    return {one.label: sum(counts.get(value, 0) for value in one.values) for one in labels.structures}
