"""Carrying out a conversion: everything is decided before the first file is written, and a killed run continues."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_dycon import parallel
from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.conversion.cases import Task
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few, json_digest, list_visible, text_digest, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion, or of a dry run.

    Attributes
    ----------
    folder : Path
        The raw data set.
    state : str
        'written', 'planned' (dry run) or 'up to date'.
    title : str
        Data set and protocol.
    rows : tuple
        Role, number of cases in the protocol, number of cases that are there.
    notes : tuple of str
        Notes for the user.
    """

    folder: Path
    state: str
    title: str
    rows: tuple[tuple[str, int, int], ...]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [self.title, f"{'role':<12}{'in the protocol':>16}{'here':>8}"]
        lines += [f"{role:<12}{named:>16}{here:>8}" for role, named, here in self.rows]
        lines += [f"- {note}" for note in self.notes]
        where = {"written": "written", "planned": "nothing was written; would be", "up to date": "is up to date"}
        return "\n".join([*lines, f"{where[self.state]}: {self.folder}"])

    @property
    def then(self) -> str:
        """What a user would type next."""
        if self.state == "planned":
            return "the same command without --dry_run"
        return f"nnUNetv2_dycon check -d {dataset_number(self.folder.name)}"


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first file is written.

    Attributes
    ----------
    folder : Path
        The data set's folder.
    tasks : sequence of Task
        Its cases.
    plan : mapping
        Content of conversion.json without the records of the cases.
    folds : sequence of mapping
        Content of splits_final.json.
    describe : callable
        Writes dataset.json into a folder.
    title, rows, notes
        For the `Conversion`.
    dated : bool
        Whether conversion.json keeps the `stamp`, so that a later run notices changed sources. False if sources may
        be written again with the same content.
    """

    folder: Path
    tasks: Sequence[Task]
    plan: Mapping[str, Any]
    folds: Sequence[Mapping[str, Any]]
    describe: Callable[[Path], None]
    title: str
    rows: tuple[tuple[str, int, int], ...]
    notes: tuple[str, ...]
    dated: bool = False

    @property
    def fingerprint(self) -> str:
        """Changes with anything in the plan."""
        return json_digest([self.plan, self.folds])

    @property
    def stamp(self) -> str:
        """Changes with the plan, and with every source file."""
        times = [
            file.stat().st_mtime_ns
            for task in self.tasks
            for path in task.sources
            for file in (list_visible(path) if path.is_dir() else (path,))
        ]
        return text_digest(f"{self.fingerprint} {times}")

    def result(self, state: str, notes: Sequence[str] = ()) -> Conversion:
        """Return the result, for the user."""
        return Conversion(self.folder, state, self.title, self.rows, (*self.notes, *notes))


def carry_out(job: Job, *, processes: int | None = None, dry_run: bool = False, overwrite: bool = False) -> Conversion:
    """Write the data set of a job, or continue it; the result does not depend on interruptions.

    Parameters
    ----------
    job : Job
        The planned conversion.
    processes : int, optional
        Worker processes; one per processor, at most 8, by default.
    dry_run : bool
        Only report; write nothing.
    overwrite : bool
        Replace a data set that this converter made.

    Raises
    ------
    DataError
        If the folder is taken, or made from sources that were changed since; if a case is bad (all bad ones are
        counted) or nothing can be written.
    """
    stamp = job.stamp  # taken once, so that changes during the conversion are noticed
    if not dry_run:
        dataset.settle(job.folder, stamp)
    if not overwrite and _is_there(job, stamp):
        return job.result("up to date")
    made_by = job.plan["converter"]
    if dry_run:
        dataset.check_free(job.folder, made_by=made_by, overwrite=overwrite)
        return job.result("planned")
    with dataset.building(job.folder, stamp=stamp, made_by=made_by, overwrite=overwrite) as space:
        _write_cases(job.tasks, processes)
        notes = _describe(job, stamp, space.data)
    stale = dataset.stale_preparation(job.folder)
    if stale is not None:
        notes.append(f"{stale} may still be made from an earlier data set: delete it and plan again")
    return job.result("written", notes)


def _is_there(job: Job, stamp: str) -> bool:
    """Return whether the same command made the data set and it is complete; its files are not opened."""
    made = dataset.conversion_of(job.folder)
    if made.get("fingerprint") != job.fingerprint:
        return False
    for name in (*dataset.FILES, *(name for task in job.tasks for name in task.outputs)):
        if not (job.folder / name).is_file():
            raise _make_again(job, f"{job.folder / name} is gone")
    if made.get("stamp", stamp) != stamp:  # older versions kept none
        raise _make_again(job, f"source files were changed after {job.folder} was made from them")
    return True


def _make_again(job: Job, problem: str) -> DataError:
    """Return the error that advises --overwrite; raises another one where that would be refused."""
    dataset.check_free(job.folder, made_by=job.plan["converter"], overwrite=True)
    return DataError(f"{problem}; type the command again with --overwrite to make the data set again")


def _write(task: Task) -> str | None:
    return task.write()


def _write_cases(tasks: Sequence[Task], processes: int | None) -> None:
    todo = [task for task in tasks if not task.is_whole()]
    if len(todo) < len(tasks):
        logger.info("going on: %d of %d cases are there", len(tasks) - len(todo), len(tasks))
    problems = []
    with closing(parallel.run(_write, todo, processes)) as results:
        for _, problem in tqdm(results, total=len(todo), desc="Converting", unit="case", disable=None):
            if problem is not None:
                problems.append(problem)
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        raise DataError(f"{len(problems)} cases are bad: {first_few(sorted(problems), separator=' | ')}")


def _describe(job: Job, stamp: str, folder: Path) -> list[str]:
    """Write the three JSON files; returns the notes of the cases' records."""
    records = {task.name: task.record() for task in job.tasks}
    written = {task.name: list(task.outputs) for task in job.tasks}
    cases = {}
    for name, case in job.plan["cases"].items():
        kept = {key: records[name][key] for key in ("label_voxels", "notes") if records[name].get(key)}
        cases[name] = {**case, "written": written[name], **kept}
    job.describe(folder)
    write_json(folder / "splits_final.json", list(job.folds), elsewhere=dataset.ELSEWHERE)
    marks = {"fingerprint": job.fingerprint, **({"stamp": stamp} if job.dated else {})}
    write_json(folder / "conversion.json", {**job.plan, **marks, "cases": cases}, elsewhere=dataset.ELSEWHERE)
    ways = Counter(way for record in records.values() for way in record["how"])
    notes = [f"{name}: {note}" for name, record in records.items() for note in record["notes"]]
    return [*notes, "files: " + ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))]
