"""From a downloaded collection to a raw data set of nnU-Net, for all converters."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from nnunetv2_dycon import __version__
from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.conversion.assign import ROLES, Assignment, Known, Request, as_json, assign, parse_labeled
from nnunetv2_dycon.conversion.cases import CaseTask, LabelRule, SourceCase, Task
from nnunetv2_dycon.conversion.job import Conversion, Job, carry_out
from nnunetv2_dycon.conversion.protocols import Protocol, find_protocol
from nnunetv2_dycon.conversion.source import inside, list_files, looks_like
from nnunetv2_dycon.conversion.volumes import NiftiFile
from nnunetv2_dycon.errors import DataError, SplitError
from nnunetv2_dycon.files import first_few, list_visible

WORDS = {"labeled": "labelled", "validation": "validation", "unlabeled": "unlabelled", "test": "test"}
_SHOWN = 8  # case names in one line of the summary; conversion.json has all


@dataclass(frozen=True)
class Found:
    """Result of a collection's finder.

    Attributes
    ----------
    cases : mapping of str to SourceCase
        By case name.
    notes : tuple of str
        Notes for the user.
    form : str
        The public form of the collection and its consequences; goes to dataset.json.
    rule : LabelRule, optional
        Replaces the collection's rule, where this form needs another one.
    """

    cases: Mapping[str, SourceCase]
    notes: tuple[str, ...] = ()
    form: str = ""
    rule: LabelRule | None = None


@dataclass(frozen=True)
class Collection:
    """A public collection: how its cases are found, and the content of its dataset.json.

    Attributes
    ----------
    name : str
        Short name, which is also the data set's.
    protocols : tuple of str
        Published protocols, the default first.
    find : callable
        From all files to the cases; opens no file.
    channels : tuple of str
        Names of the image channels, which decide nnU-Net's normalisation.
    labels : mapping of str to int
        Labels of the data set.
    rule : LabelRule
        From the collection's label maps to these.
    license, reference : str
        For dataset.json.
    prefix : str
        Text before the four digits of a case name; empty where names are not numbers.
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
    license: str
    reference: str
    prefix: str = ""
    inner: frozenset[str] = frozenset()
    empty: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    drop_reason: str = ""

    def case_name(self, text: str) -> str:
        """Return the case name of an id in a list, which may have an ending, a prefix or a channel, or lack zeros."""
        stem = re.sub(r"(\.nii)?(\.(gz|h5|npy|nrrd))?$", "", text.strip())
        if not self.prefix:
            return stem
        word = re.findall("[a-z]+", self.prefix, re.IGNORECASE)[-1]  # lists leave the "sub-" of ISLES out
        # other numbers, of a session or channel, may follow that of the case
        digits = re.findall(rf"{word}_?(\d+)", stem, re.IGNORECASE)[:1] or re.findall(r"\d+", stem)[-1:]
        return f"{self.prefix}{int(digits[0]):04d}" if digits else stem


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
) -> Conversion:
    """Write a collection as raw data set ``nnUNet_raw/DatasetXXX_NAME``; labels of unlabelled cases are not opened.

    Parameters
    ----------
    collection : Collection
        The collection.
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
        Only report the plan; write nothing, open no image.
    strict : bool
        Refuse a collection that lacks cases of the protocol.
    overwrite : bool
        Replace a data set that this converter made.
    settings : mapping, optional
        Choices of the converter, for conversion.json.

    Raises
    ------
    ConfigError, DataError, SplitError
        One line with the problem, its place and its remedy. No incomplete data set is left.
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
    folder = dataset.new_folder(dataset_id, collection.name)
    tasks = _tasks(collection, found, roles, folder)
    job = Job(
        folder=folder,
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
    """Return the cases by their names in the protocol, which may differ in upper and lower case."""
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


def _tasks(collection: Collection, found: Found, roles: Assignment, folder: Path) -> list[CaseTask]:
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
            work=dataset.workspace(folder).work,
        )
        for name, role in sorted(roles.role_of.items())
    ]


def file_ending(images: Sequence[Any]) -> str:
    """Return `.nii` if every image is such a file and can be linked; `.nii.gz` otherwise."""
    plain = all(isinstance(source, NiftiFile) and source.path.name.lower().endswith(".nii") for source in images)
    return ".nii" if plain else ".nii.gz"


def plan_of(tasks: Sequence[Task], roles: Assignment, root: Path) -> dict[str, Any]:
    """Return the roles and the source of every case, for conversion.json.

    Parameters
    ----------
    tasks : sequence of Task
        The cases.
    roles : Assignment
        Their roles.
    root : Path
        Folder of the sources.
    """
    return {
        "version": __version__,
        "source": root.name,
        "protocol": {key: getattr(roles.protocol, key) for key in ("name", "source", "note")},
        **as_json(roles),
        "cases": {task.name: {"role": task.role, "files": _described(task, root)} for task in tasks},
    }


def _described(task: Task, root: Path) -> list[dict[str, Any]]:
    """Describe the source files, those below `root` by relative names; a folder stands for all its files."""
    described = []
    for path in task.sources:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        size = {"files": len(list_visible(path))} if path.is_dir() else {"bytes": path.stat().st_size}
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
        "license": collection.license,
        "reference": collection.reference,
        "description": " ".join(filter(None, parts)),
        "converted_by": f"nnunetv2_dycon {__version__}",
    }


def _write_dataset_json(arguments: Mapping[str, Any], folder: Path) -> None:
    # a copy, since nnU-Net changes its arguments
    generate_dataset_json(str(folder), **json.loads(json.dumps(arguments)))


def training_cases(tasks: Sequence[Task]) -> int:
    """Return the number of cases in imagesTr."""
    return sum(dataset.IMAGES[task.role] == "imagesTr" for task in tasks)


def role_rows(roles: Assignment) -> tuple[tuple[str, int, int], ...]:
    """Return, for each role, its name in prose, the cases in the protocol and the cases that are there."""
    here = {role: len(roles.cases[role]) for role in ROLES}
    return tuple((WORDS[role], here[role] + len(roles.missing[role]), here[role]) for role in ROLES)


def role_notes(roles: Assignment) -> list[str]:
    """Return notes on the roles, for the user."""
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
    return first_few(names, _SHOWN)


def _text(labeled: str | float | Path) -> str:
    return labeled.name if isinstance(labeled, Path) else Path(str(labeled)).name
