"""The raw data set of a round: labelled cases, and unlabelled images with their pseudo-labels, as links."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2_dycon import __version__
from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.conversion.cases import LinkTask, link_case
from nnunetv2_dycon.conversion.job import Job, carry_out
from nnunetv2_dycon.data.roles import label_paths
from nnunetv2_dycon.data.splits import OVERLAP, REPEATS
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few, write_json
from nnunetv2_dycon.self_training.experiment import DataSet, Experiment
from nnunetv2_dycon.self_training.training import Training, Voxels

logger = logging.getLogger(__name__)

MADE_BY = "self_train"


@dataclass(frozen=True)
class RoundData:
    """The data set of a training (the student), with the pseudo-labels of the previous training (the teacher)."""

    teacher: Training
    student: Training

    @property
    def _experiment(self) -> Experiment:
        return self.student.experiment

    @property
    def _data(self) -> DataSet:
        return self.student.data

    def is_made(self) -> bool:
        """Return whether the data set is there.

        Raises
        ------
        DataError
            If it was made with other settings or pseudo-labels.
        """
        data = self._data
        if not self.teacher.is_predicted() or not data.raw.exists():
            return False
        if dataset.conversion_of(data.raw).get("fingerprint") != self._job().fingerprint:
            raise DataError(
                f"{data.raw} was made with other settings or pseudo-labels; type --as other ids, or delete it with "
                f"{data.preprocessed} and {data.results}"
            )
        return True

    def make(self, lock: int | None) -> None:
        """Write the data set and log its cases; no command runs, so `lock` is not passed on."""
        job = self._job()
        for note in job.notes:
            logger.info("- %s", note)
        carry_out(job, processes=self._experiment.processes)

    def _job(self) -> Job:
        """Return the cases of the data set, their number in the fold, and the source of every file."""
        experiment, teacher, student = self._experiment, self.teacher, self.student
        train, val = experiment.fold_cases()
        voxels = teacher.voxels() or {}
        empty = [case for case, counts in voxels.items() if not any(counts.values())]
        pseudo = [case for case in voxels if experiment.keep_empty or case not in set(empty)]
        if not pseudo:
            raise DataError(
                f"all {len(empty)} pseudo-labels in {teacher.pseudo_labels} are empty: train longer, or on more cases"
            )
        wanted = round(len(pseudo) / len(train)) if experiment.repeat == "half" else int(experiment.repeat)
        repeat = max(1, wanted)
        facts = {
            "round": student.number,
            "dataset": experiment.data.name,
            "fold": experiment.fold,
            "epochs": list(student.all_epochs),
            "total_epochs": sum(student.all_epochs),
            "trainer": student.trainer,
            "teacher": {
                "dataset": teacher.data.name,
                "trainer": teacher.trainer,
                "fold": teacher.fold,
                "checkpoint_sha256": teacher.checkpoint_digest(),
            },
            "plans": f"{experiment.plans_name} of {experiment.data.name}",
            "labeled": train,
            "validation": val,
            "pseudo_labeled": pseudo,
            "empty": {"kept" if experiment.keep_empty else "left_out": empty},
            "repeat": repeat,
            "labeled_share_of_patches": round(repeat * len(train) / (repeat * len(train) + len(pseudo)), 4),
        }
        tasks = self._tasks(train, val, pseudo)
        cases = {task.name: {"role": task.role, "files": _described(task)} for task in tasks}
        for case in pseudo:
            cases[case]["label"] = "pseudo"
        return Job(
            folder=self._data.raw,
            tasks=tasks,
            plan={"converter": MADE_BY, "version": __version__, MADE_BY: facts, "cases": cases},
            folds=[_fold([*(train * repeat), *pseudo], val)],
            describe=partial(self._describe, len({*train, *val, *pseudo})),
            title=f"{experiment.data.name}, round {student.number} of self-training",
            rows=(),
            notes=tuple(self._notes(facts, voxels)),
        )

    def _tasks(self, train: Sequence[str], val: Sequence[str], pseudo: Sequence[str]) -> list[LinkTask]:
        experiment = self._experiment
        role_of = {
            **dict.fromkeys(experiment.roles.test, "test"),
            **dict.fromkeys(val, "validation"),
            **dict.fromkeys([*train, *pseudo], "labeled"),
        }
        labels = label_paths(experiment.data.raw, experiment.content, experiment.roles)
        labels |= {case: self.teacher.pseudo_label(case) for case in pseudo}
        work = dataset.workspace(self._data.raw).work
        return [
            link_case(case, role, experiment.roles.files[case], labels[case], experiment.ending, work)
            for case, role in sorted(role_of.items())
        ]

    def _describe(self, number: int, folder: Path) -> None:
        content = {key: value for key, value in self._experiment.content.items() if key != "dataset"}
        content |= {"name": self._data.name.split("_", 1)[1], "numTraining": number}
        # or nnU-Net, when it moves plans, would take the first of its readers that opens an image: another for .nii
        content["overwrite_image_reader_writer"] = self._experiment.plans["image_reader_writer"]
        write_json(folder / "dataset.json", content | {"converted_by": f"nnunetv2_dycon {__version__}"})

    def _notes(self, facts: Mapping[str, Any], voxels: Voxels) -> Iterator[str]:
        yield (
            f"round {facts['round']}: {len(facts['labeled'])} labelled cases, each listed {facts['repeat']} times, and "
            f"{len(facts['pseudo_labeled'])} pseudo-labelled; {facts['labeled_share_of_patches']:.0%} of training "
            f"patches are from labelled cases; {len(facts['validation'])} validation cases"
        )
        for what, cases in facts["empty"].items():
            if cases:
                yield f"{len(cases)} pseudo-labels are empty and {what.replace('_', ' ')}: {first_few(cases, 8)}"
        for structure in self._experiment.labels.structures:
            lacking = sum(not counts[structure.label] for counts in voxels.values())
            if lacking:
                yield f"{structure.name} is absent from {lacking} of {len(voxels)} pseudo-labels"
        others = set(self._experiment.roles.labeled) - {*facts["labeled"], *facts["validation"]}
        if others:
            yield f"{len(others)} cases of imagesTr are in neither list of the fold and are left out"


def _fold(train: Sequence[str], val: Sequence[str]) -> dict[str, Any]:
    """Return the fold, which says what is meant: repeated cases, and validation on training cases (fold all)."""
    fold: dict[str, Any] = {"train": list(train), "val": list(val)}
    if len(set(train)) < len(train):
        fold[REPEATS] = True
    if set(train) & set(val):
        fold[OVERLAP] = True
    return fold


def _described(task: LinkTask) -> list[dict[str, Any]]:
    return [{"name": "/".join(path.parts[-2:]), "bytes": path.stat().st_size} for path in task.sources]
