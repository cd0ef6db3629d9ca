"""From a downloaded collection to a raw data set of nnU-Net: what all converters share."""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from tqdm import tqdm

from nnunetv2_dycon import __version__, parallel
from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.conversion.assign import ROLES, Assignment, Known, Request, as_json, assign, parse_labeled
from nnunetv2_dycon.conversion.cases import CaseTask, LabelRule, SourceCase, Task
from nnunetv2_dycon.conversion.protocols import Protocol, find_protocol
from nnunetv2_dycon.conversion.source import inside, list_files, looks_like
from nnunetv2_dycon.conversion.volumes import NiftiFile
from nnunetv2_dycon.errors import DataError, SplitError

logger = logging.getLogger(__name__)

WORDS = {"labeled": "labelled", "validation": "validation", "unlabeled": "unlabelled", "test": "test"}
_SHOWN = 8  # case names in one line of the summary; conversion.json has all


@dataclass(frozen=True)
class Found:
    """What a collection's finder saw.

    Attributes
    ----------
    cases : mapping of str to SourceCase
        By case name.
    notes : tuple of str
        What the user should know.
    form : str
        Which of the public forms it is, and what follows from it; goes to dataset.json.
    rule : LabelRule, optional
        In place of the collection's, where this form needs another one.
    """

    cases: Mapping[str, SourceCase]
    notes: tuple[str, ...] = ()
    form: str = ""
    rule: LabelRule | None = None


@dataclass(frozen=True)
class Collection:
    """A public collection: how its cases are found, and what nnU-Net has to know of it.

    Attributes
    ----------
    name : str
        Short name, which is also the data set's.
    protocols : tuple of str
        Published protocols, the default first.
    find : callable
        From all files to the cases; opens no file.
    channels : tuple of str
        Names of the image channels; nnU-Net chooses the normalisation by them.
    labels : mapping of str to int
        Labels of the data set.
    rule : LabelRule
        From the collection's label maps to these.
    licence, reference : str
        For dataset.json.
    prefix : str
        What stands before the four digits of a case name; empty where names are no numbers.
    inner : frozenset of str
        Folders inside the collection, lower case: given one of these, the collection is its parent.
    empty : frozenset of str
        Cases without foreground.
    dropped : frozenset of str
        Cases that are left out.
    drop_reason : str
        Why.
    """

    name: str
    protocols: tuple[str, ...]
    find: Callable[[Sequence[Path]], Found]
    channels: tuple[str, ...]
    labels: Mapping[str, int]
    rule: LabelRule
    licence: str
    reference: str
    prefix: str = ""
    inner: frozenset[str] = frozenset()
    empty: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    drop_reason: str = ""

    def case_name(self, text: str) -> str:
        """Case name of an id as lists write it: with an ending, a prefix, a channel, or without leading zeros."""
        stem = re.sub(r"(\.nii)?(\.(gz|h5|npy|nrrd))?$", "", text.strip())
        if not self.prefix:
            return stem
        word = re.findall("[a-z]+", self.prefix, re.IGNORECASE)[-1]  # lists leave the "sub-" of ISLES out
        # other numbers, of a session or channel, may follow that of the case
        digits = re.findall(rf"{word}_?(\d+)", stem, re.IGNORECASE)[:1] or re.findall(r"\d+", stem)[-1:]
        return f"{self.prefix}{int(digits[0]):04d}" if digits else stem


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do.

    Attributes
    ----------
    folder : Path
        The raw data set.
    state : str
        'written', 'planned' (dry run) or 'up to date'.
    title : str
        Data set and protocol.
    rows : tuple
        Role, cases that the protocol names, cases that are there.
    notes : tuple of str
        What the user should know.
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
        number = int(self.folder.name[len("Dataset") :][:3])
        lines += [f"{where[self.state]}: {self.folder}", f"next: nnUNetv2_dycon check -d {number}"]
        return "\n".join(lines)


def convert(
    collection: Collection,
    source: str | Path,
    dataset_id: int,
    labeled: str | float | Path,
    *,
    labeled_seed: int | None = None,
    protocol: str | Path | None = None,
    processes: int | None = None,
    dry_run: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """Write a collection as raw data set ``nnUNet_raw/DatasetXXX_NAME``; labels of unlabelled cases are not opened.

    Parameters
    ----------
    collection : Collection
        What it is.
    source : path
        Folder of the download, or one a little further up or down.
    dataset_id : int
        1 to 999.
    labeled : str, float or Path
        Fraction or number of labelled cases, 'all', or a file that names them.
    labeled_seed : int, optional
        Draw them with this seed; without it they are the published ones.
    protocol : str or Path, optional
        Published protocol or a user's JSON file; the collection's first by default.
    processes : int, optional
        Worker processes; as many as there are processors (at most 8) by default.
    dry_run : bool
        Say what would be done, write nothing, open no image.
    strict : bool
        Refuse a collection that lacks cases of the protocol.
    overwrite : bool
        Replace a data set that this converter made.
    settings : mapping, optional
        Choices of the converter, for conversion.json.

    Raises
    ------
    ConfigError, DataError, SplitError
        One line on what is wrong, where, and what to do. Nothing is left half-written.
    """
    root, files = list_files(source, collection.inner)
    found = collection.find(files)
    if not found.cases:
        raise DataError(f"{root} holds no case of {collection.name}: {looks_like(root, files, collection.name)}")
    _check_links(found.cases, root)
    chosen = find_protocol(protocol or collection.protocols[0], collection.protocols, collection.case_name)
    found = replace(found, cases=_as_spelled(found.cases, chosen))
    known = Known(
        with_label={name: case.label is not None for name, case in found.cases.items()},
        empty=collection.empty,
        dropped=collection.dropped,
    )
    request = Request(parse_labeled(labeled), labeled_seed)
    roles = assign(chosen, request, known, collection.case_name)
    if strict:
        _refuse_missing(roles)
    target = dataset.target_folder(dataset_id, collection.name)
    tasks = _tasks(collection, found, roles, target)
    job = Job(
        target=target,
        tasks=tasks,
        plan={
            "converter": collection.name,
            "request": {"labeled": _text(labeled), "labeled_seed": labeled_seed, **(settings or {})},
            **plan_of(tasks, roles, root),
        },
        folds=roles.folds,
        describe=partial(_write_dataset_json, _dataset_json(collection, found, roles, tasks)),
        title=f"{collection.name}, protocol {roles.protocol.name}, --labeled {_text(labeled)}",
        rows=role_rows(roles),
        notes=tuple(
            filter(
                None, (found.form, *found.notes, *_drop_notes(collection, roles.protocol, known), *role_notes(roles))
            )
        ),
        dated=True,
    )
    return carry_out(job, processes=processes, dry_run=dry_run, overwrite=overwrite)


def _as_spelled(cases: Mapping[str, SourceCase], protocol: Protocol) -> dict[str, SourceCase]:
    """Cases by the names that the protocol gives them, where only upper and lower case differ."""
    spelled = {name.casefold(): name for name in (*protocol.train, *protocol.val, *protocol.test)}
    return {spelled.get(name.casefold(), name): case for name, case in cases.items()}


def _check_links(cases: Mapping[str, SourceCase], root: Path) -> None:
    for case in cases.values():
        for item in (*case.images, *([case.label] if case.label else [])):
            for path in item.files:
                inside(path, root)


def _refuse_missing(roles: Assignment) -> None:
    missing = [f"{role} {name}" for role in ROLES for name in roles.missing[role]]
    if missing:
        raise SplitError(
            f"--strict: {len(missing)} cases of {roles.protocol.name} are not there with what they need "
            f"({_listed(missing)}); add them or leave --strict out"
        )


def _tasks(collection: Collection, found: Found, roles: Assignment, target: Path) -> list[CaseTask]:
    used = {name: found.cases[name] for name in roles.role_of}
    ending = file_ending([source for case in used.values() for source in case.images])
    return [
        CaseTask(
            name=name,
            role=role,
            case=SourceCase(used[name].images, None if role == "unlabeled" else used[name].label),
            rule=found.rule or collection.rule,
            empty=name in collection.empty,
            ending=ending,
            work=dataset.workspace(target).work,
        )
        for name, role in sorted(roles.role_of.items())
    ]


def file_ending(images: Sequence[Any]) -> str:
    """`.nii` where every image is such a file, so that it can be linked; `.nii.gz` otherwise."""
    plain = all(isinstance(source, NiftiFile) and source.path.name.lower().endswith(".nii") for source in images)
    return ".nii" if plain else ".nii.gz"


def plan_of(tasks: Sequence[Task], roles: Assignment, root: Path) -> dict[str, Any]:
    """Return what conversion.json says about the roles and where every case came from."""
    return {
        "version": __version__,
        "source": root.name,
        "protocol": {key: getattr(roles.protocol, key) for key in ("name", "source", "note")},
        **as_json(roles),
        "cases": {task.name: {"role": task.role, "files": _described(task, root)} for task in tasks},
    }


def _described(task: Task, root: Path) -> list[dict[str, Any]]:
    """Source files, below `root` by their relative names; a folder stands for all its files."""
    described = []
    for path in task.sources:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        size = {"files": len(os.listdir(path))} if path.is_dir() else {"bytes": path.stat().st_size}
        described.append({"name": name, **size})
    return described


def _dataset_json(collection: Collection, found: Found, roles: Assignment, tasks: Sequence[CaseTask]) -> dict[str, Any]:
    protocol = roles.protocol
    counts = ", ".join(f"{len(roles.cases[role])} {WORDS[role]}" for role in ROLES)
    parts = (found.form, f"Protocol {protocol.name} ({protocol.source}): {counts}.", protocol.note)
    return {
        "channel_names": dict(enumerate(collection.channels)),
        "labels": dict(collection.labels),
        "file_ending": tasks[0].ending,
        "num_training_cases": training_cases(tasks),
        "dataset_name": collection.name,
        "license": collection.licence,
        "reference": collection.reference,
        "description": " ".join(filter(None, parts)),
        "converted_by": f"nnunetv2_dycon {__version__}",
    }


def _write_dataset_json(arguments: Mapping[str, Any], folder: Path) -> None:
    # a copy, since nnU-Net changes what it gets
    generate_dataset_json(str(folder), **json.loads(json.dumps(arguments)))


def training_cases(tasks: Sequence[Task]) -> int:
    """Return the number of cases in imagesTr."""
    return sum(dataset.IMAGES[task.role] == "imagesTr" for task in tasks)


def role_rows(roles: Assignment) -> tuple[tuple[str, int, int], ...]:
    """Return, for each role, its name for people, the cases in the protocol and the cases that are there."""
    here = {role: len(roles.cases[role]) for role in ROLES}
    return tuple((WORDS[role], here[role] + len(roles.missing[role]), here[role]) for role in ROLES)


def role_notes(roles: Assignment) -> list[str]:
    """Return what the user should know about who is in which role."""
    notes = [
        f"missing, or without what the role needs ({WORDS[role]}, {len(names)}): {_listed(names)}"
        for role, names in roles.missing.items()
        if names
    ]
    if roles.unknown:
        notes.append(f"not in the protocol, left out ({len(roles.unknown)}): {_listed(roles.unknown)}")
    return [*notes, *roles.notes]


def _drop_notes(collection: Collection, protocol: Protocol, known: Known) -> list[str]:
    concerned = {*known.with_label, *protocol.train, *protocol.val, *protocol.test} & collection.dropped
    return [collection.drop_reason] if concerned else []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _text(labeled: str | float | Path) -> str:
    return labeled.name if isinstance(labeled, Path) else Path(str(labeled)).name


# ---- carrying it out ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first file is written.

    Attributes
    ----------
    target : Path
        The data set's folder.
    tasks : sequence of Task
        Its cases.
    plan : mapping
        Content of conversion.json but for what the cases' own reports add.
    folds : sequence of mapping
        Content of splits_final.json.
    describe : callable
        Writes dataset.json into a folder.
    title, rows, notes
        For the report.
    dated : bool
        Whether conversion.json keeps the `stamp`, so that a later run notices changed sources. Not where sources may
        be made again with the same content.
    """

    target: Path
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
        return _hash(json.dumps([self.plan, self.folds], sort_keys=True))

    @property
    def stamp(self) -> str:
        """Changes with the plan, and when a source file was changed."""
        times = [
            file.stat().st_mtime_ns
            for task in self.tasks
            for path in task.sources
            for file in (sorted(path.iterdir()) if path.is_dir() else (path,))
        ]
        return _hash(f"{self.fingerprint} {times}")

    def report(self, state: str, notes: Sequence[str] = ()) -> Report:
        """Return what to tell the user."""
        return Report(self.target, state, self.title, self.rows, (*self.notes, *notes))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def carry_out(job: Job, *, processes: int | None = None, dry_run: bool = False, overwrite: bool = False) -> Report:
    """Write the data set of a job, or go on with it; the result does not depend on interruptions.

    Raises
    ------
    DataError
        If the target is taken, or made from sources that were changed since; if a case is bad (all bad ones are
        counted) or nothing can be written.
    """
    stamp = job.stamp  # once, so that it tells of changes during the conversion
    if not dry_run:
        dataset.settle(job.target, stamp)
    if not overwrite and _is_there(job, stamp):
        return job.report("up to date")
    made_by = job.plan["converter"]
    if dry_run:
        dataset.check_free(job.target, made_by=made_by, overwrite=overwrite)
        return job.report("planned")
    with dataset.building(job.target, stamp=stamp, made_by=made_by, overwrite=overwrite) as space:
        _write_cases(job.tasks, parallel.default_processes() if processes is None else processes)
        notes = _describe(job, stamp, space.data)
    stale = dataset.stale_preparation(job.target)
    if stale is not None:
        notes.append(f"{stale} may still be made from an earlier data set: delete it and plan again")
    return job.report("written", notes)


def _is_there(job: Job, stamp: str) -> bool:
    """Whether the data set was made by the same command and is complete; its files are not opened."""
    made = dataset.conversion_of(job.target)
    if made.get("fingerprint") != job.fingerprint:
        return False
    for name in (*dataset.FILES, *(name for task in job.tasks for name in task.outputs)):
        if not (job.target / name).is_file():
            raise DataError(f"{job.target / name} is gone; type --overwrite to make the data set again")
    if made.get("stamp", stamp) != stamp:  # older versions kept none
        raise DataError(
            f"source files were changed after {job.target} was made from them; type --overwrite to make it again"
        )
    return True


def _write(task: Task) -> str | None:
    return task.write()


def _write_cases(tasks: Sequence[Task], processes: int) -> None:
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
        more = f" | and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"{len(problems)} cases are bad: {' | '.join(sorted(problems)[:3])}{more}")


def _describe(job: Job, stamp: str, folder: Path) -> list[str]:
    """Write the three JSON files; returns what the cases' reports have to say."""
    reports = {task.name: task.report() for task in job.tasks}
    written = {task.name: list(task.outputs) for task in job.tasks}
    cases = {}
    for name, case in job.plan["cases"].items():
        kept = {key: reports[name][key] for key in ("label_voxels", "notes") if reports[name].get(key)}
        cases[name] = {**case, "written": written[name], **kept}
    job.describe(folder)
    dataset.write_json(folder / "splits_final.json", list(job.folds))
    marks = {"fingerprint": job.fingerprint, **({"stamp": stamp} if job.dated else {})}
    dataset.write_json(folder / "conversion.json", {**job.plan, **marks, "cases": cases})
    ways = Counter(way for report in reports.values() for way in report["how"])
    notes = [f"{name}: {note}" for name, report in reports.items() for note in report["notes"]]
    return [*notes, "files: " + ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))]
