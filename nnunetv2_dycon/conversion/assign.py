"""Roles of the cases of a collection (labelled, validation, unlabelled, test), and the folds that follow.

No file of the collection is opened: roles depend only on names, a protocol and a seed.
"""

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunetv2_dycon.conversion.protocols import Protocol, read_names, read_protocol
from nnunetv2_dycon.errors import ConfigError, SplitError
from nnunetv2_dycon.files import first_few

LabeledChoice = float | int | Literal["all"] | Path
ROLES = ("labeled", "validation", "unlabeled", "test")

VALIDATION_SEED = 12345  # the seed of nnU-Net's own folds
FOLDS = 5


@dataclass(frozen=True)
class Assignment:
    """The role of every case.

    Attributes
    ----------
    protocol : Protocol
        The protocol that decided: the requested one, or that of the user's file.
    cases : mapping of str to tuple of str
        Cases of each of `ROLES` that are there, in the protocol's order.
    missing : mapping of str to tuple of str
        Cases of each role that the protocol names and that are not there, or not with their label.
    unknown : tuple of str
        Cases that are there but not in the protocol; they are left out.
    folds : tuple of dict
        Content of splits_final.json.
    notes : tuple of str
        Notes for the user.
    """

    protocol: Protocol
    cases: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, tuple[str, ...]]
    unknown: tuple[str, ...]
    folds: tuple[dict[str, list[str]], ...]
    notes: tuple[str, ...]

    @property
    def role_of(self) -> dict[str, str]:
        """The role of every case that is used."""
        return {case: role for role in ROLES for case in self.cases[role]}


@dataclass(frozen=True)
class Request:
    """The user's request.

    Attributes
    ----------
    labeled : float, int, 'all' or Path
        A fraction of the training cases, a number of them, all of them, or a file that names them.
    seed : int, optional
        Seed of a draw; without it the published cases are taken.
    """

    labeled: LabeledChoice
    seed: int | None = None


@dataclass(frozen=True)
class Known:
    """Facts of a collection's cases that need no label.

    Attributes
    ----------
    with_label : mapping of str to bool
        Every case that is there, and whether a label file is.
    empty : collection of str
        Cases without foreground: never drawn as labelled cases.
    dropped : collection of str
        Cases to leave out of every role.
    groups : mapping of str to str
        Subject of each case; a case without an entry is a subject of its own.
    """

    with_label: Mapping[str, bool]
    empty: Collection[str] = ()
    dropped: Collection[str] = ()
    groups: Mapping[str, str] = field(default_factory=dict)


def parse_labeled(text: str | float | Path, option: str = "--labeled") -> LabeledChoice:
    """Return the fraction, number, 'all' or path that the user typed for --labeled, or for another `option`.

    Raises
    ------
    ConfigError
        If it is none of them.
    """
    if isinstance(text, Path):
        return text
    every = option == "--labeled"
    try:
        number = float(text)
    except ValueError:
        if text == "all":
            return "all"
        if Path(str(text)).is_file():
            return Path(str(text))
        forms = ", all, or a file with one id per line; there is no such file" if every else ""
        raise ConfigError(f"{option} {text}: give a fraction (0.1), or a number of cases (8){forms}") from None
    if 0 < number < 1:
        return number
    if number == 1 and not str(text).strip().isdecimal():
        either = " or all" if every else ""
        raise ConfigError(f"{option} {text} may mean one case or all of them; type 1 (one case){either}")
    if number >= 1 and number.is_integer() and "." not in str(text).removesuffix(".0"):
        return int(number)
    forms = ", all, or a file" if every else ""
    raise ConfigError(f"{option} {text}: give a fraction between 0 and 1, a whole number of cases{forms}")


def assign(protocol: Protocol, request: Request, known: Known, canonical: Callable[[str], str]) -> Assignment:
    """Give every case that is there its role; the same arguments give the same roles.

    Parameters
    ----------
    protocol : Protocol
        The published or given lists.
    request : Request
        The user's request.
    known : Known
        The cases that are there.
    canonical : callable
        Case name of an id as lists write it.

    Raises
    ------
    ConfigError
        If the number of labelled cases cannot be had.
    SplitError
        If a file of the user does not fit the protocol, or no labelled case is there.
    """
    protocol, labeled, notes = _labeled_cases(protocol, request, known, canonical)
    dropped = sorted(set(known.dropped) & {*protocol.train, *protocol.val, *protocol.test})
    if dropped:
        notes.append(f"left out of the protocol's lists: {', '.join(dropped)}")
    chosen = set(labeled)
    wanted = {
        "labeled": labeled,
        "validation": protocol.val,
        "unlabeled": tuple(case for case in protocol.train if case not in chosen),
        "test": protocol.test,
    }
    cases, missing = {}, {}
    for role, names in wanted.items():
        names = tuple(case for case in names if case not in known.dropped)
        usable = {
            case for case in names if case in known.with_label and (role == "unlabeled" or _has_truth(case, known))
        }
        cases[role] = tuple(case for case in names if case in usable)
        missing[role] = tuple(case for case in names if case not in usable)
    if not cases["labeled"]:
        raise _without_labeled(protocol, labeled, request, known)
    named = {case for names in wanted.values() for case in names} | set(known.dropped)
    unknown = tuple(sorted(set(known.with_label) - named))
    folds, meaning = _folds(cases["labeled"], cases["validation"], _reference(protocol, labeled), known.groups)
    return Assignment(protocol, cases, missing, unknown, folds, (*notes, meaning))


def _without_labeled(protocol: Protocol, labeled: Sequence[str], request: Request, known: Known) -> SplitError:
    """Return the error for a request by which no labelled case is left."""
    with_label = [case for case in protocol.train if known.with_label.get(case)]
    if not with_label:
        return SplitError(f"no training case of {protocol.name} is there with its label; add images and labels")
    if not labeled:  # drawn by whole subjects
        least = min(len(cases) for cases in _by_group(with_label, known.groups).values())
        return SplitError(
            f"--labeled {request.labeled}: each subject has {least} or more scans; type --labeled {least}"
        )
    drawn = "" if request.seed is not None else ", or draw among those there with --labeled_seed 0"
    return SplitError(
        f"none of the {len(labeled)} labelled cases of {protocol.name} is there with its label "
        f"({first_few(labeled)}); name others with --labeled FILE{drawn}"
    )


def _has_truth(case: str, known: Known) -> bool:
    return known.with_label[case] or case in known.empty


# ---- labelled cases ----------------------------------------------------------------------------------------


def _labeled_cases(
    protocol: Protocol, request: Request, known: Known, canonical: Callable[[str], str]
) -> tuple[Protocol, tuple[str, ...], list[str]]:
    """Return the protocol (another one if the file is a whole protocol), the labelled cases, and notes on them."""
    if isinstance(request.labeled, Path):
        return _from_file(protocol, request.labeled, canonical)
    if request.labeled == "all":
        return protocol, protocol.train, []
    number = labeled_number(request.labeled, len(protocol.train))
    if request.seed is not None:
        if request.seed < 0:
            raise ConfigError(f"--labeled_seed {request.seed}: give 0 or more")
        eligible = [case for case in protocol.train if case not in {*known.dropped, *known.empty}]
        usable = {case for case, has_label in known.with_label.items() if has_label}
        drawn = draw(eligible, request.seed, known.groups, number, among=usable)
        return protocol, drawn, _short_of(number, drawn)
    if number in protocol.labeled:
        return protocol, protocol.labeled[number], []
    if not protocol.labeled or not protocol.first_are_labeled:
        choice = ", ".join(map(str, sorted(protocol.labeled))) or "none"
        raise ConfigError(
            f"--labeled {request.labeled}: {protocol.name} has no list of {number} labelled cases (it has: {choice}); "
            "give one of these, or --labeled_seed 0 for a draw"
        )
    first = [case for case in protocol.train if case not in {*known.dropped, *known.empty}][:number]
    published = ", ".join(map(str, sorted(protocol.labeled)))
    return protocol, tuple(first), [f"{number} labelled cases are not a published number ({published}): the first ones"]


def labeled_number(labeled: float | int, cases: int, option: str = "--labeled") -> int:
    """Return how many of `cases` a fraction or number means; halves are rounded to even.

    Parameters
    ----------
    labeled : float or int
        The user's number or fraction.
    cases : int
        Cases to choose from.
    option : str
        Name of the option, for messages.

    Raises
    ------
    ConfigError
        If that is less than 1 or more than `cases`.
    """
    number = round(labeled * cases) if isinstance(labeled, float) else labeled
    if not 1 <= number <= cases:
        raise ConfigError(f"{option} {labeled} means {number} of {cases} training cases; give 1 to {cases}")
    return number


def _from_file(
    protocol: Protocol, path: Path, canonical: Callable[[str], str]
) -> tuple[Protocol, tuple[str, ...], list[str]]:
    if path.suffix.lower() != ".json":
        names = read_names(path, canonical)
        outside = [name for name in names if name not in protocol.train]
        if outside:
            raise SplitError(
                f"{path}: {outside[0]!r} is not a training case of {protocol.name}; remove it, or give a JSON file "
                'with "labeled", "unlabeled", "val" and "test"'
            )
        return protocol, names, []
    own = read_protocol(path, canonical)
    if not own.labeled:
        raise SplitError(f'{path} has no "labeled" list; add it')
    if len(own.labeled) > 1:
        typed = f"--protocol {shlex.quote(str(path))} --labeled {min(own.labeled)}"
        numbers = ", ".join(map(str, sorted(own.labeled)))
        raise SplitError(f'{path} has "labeled" lists of {numbers} cases; keep one, or type for example: {typed}')
    return own, next(iter(own.labeled.values())), []


def draw(
    cases: Iterable[str], seed: int, groups: Mapping[str, str], number: int, among: Collection[str] | None = None
) -> tuple[str, ...]:
    """Draw at most `number` cases with a seed; a smaller draw is the head of a larger one.

    Parameters
    ----------
    cases : iterable of str
        Names to permute; their order has no influence.
    seed : int
        Seed.
    groups : mapping of str to str
        Subject of each case: all cases of a subject or none.
    number : int
        Cases to draw; fewer come back where whole subjects do not fit.
    among : collection of str, optional
        Cases that may be drawn; the permutation does not depend on them.
    """
    members = _by_group(cases, groups)
    names = sorted(members)
    drawn: list[str] = []
    for index in np.random.default_rng(seed).permutation(len(names)):
        group = [case for case in members[names[index]] if among is None or case in among]
        if len(drawn) + len(group) <= number:
            drawn += group
    return tuple(drawn)


def _by_group(cases: Iterable[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for case in sorted(cases):
        # a case and a subject may have the same name
        key = f"subject {groups[case]}" if case in groups else f"case {case}"
        members.setdefault(key, []).append(case)
    return members


def _short_of(number: int, drawn: Sequence[str]) -> list[str]:
    return [] if len(drawn) == number else [f"{len(drawn)} labelled cases were drawn in place of {number}"]


# ---- folds -------------------------------------------------------------------------------------------------


def _reference(protocol: Protocol, labeled: Sequence[str]) -> tuple[str, ...]:
    """Return the labelled cases to choose validation cases from: those that all numbers of labelled cases share."""
    if not protocol.labeled:
        return tuple(labeled[:20])
    smallest = protocol.labeled[min(protocol.labeled)]
    return smallest if set(smallest) <= set(labeled) else tuple(labeled[: len(smallest)])


def _folds(
    labeled: Sequence[str], validation: Sequence[str], reference: Sequence[str], groups: Mapping[str, str]
) -> tuple[tuple[dict[str, list[str]], ...], str]:
    """Return the folds, and a note on fold 0."""
    if validation:
        fold = {"train": sorted(labeled), "val": sorted(validation)}
        text = f"fold 0 trains on the {len(labeled)} labelled cases and validates on {len(validation)} others"
        return (fold,), f"{text}; fold all would train on the validation cases too"
    inside = [case for case in reference if case in set(labeled)] or list(labeled)
    members = _by_group(inside, groups)
    names = sorted(members)
    order = [members[names[i]] for i in np.random.default_rng(VALIDATION_SEED).permutation(len(names))]
    step = max(1, len(order) // FOLDS)
    parts = [list(chain(*order[i : i + step])) for i in range(0, step * min(FOLDS, len(order)), step)]
    folds = []
    for part in parts:
        held = {case for key in _by_group(part, groups) for case in _by_group(labeled, groups)[key]}
        folds.append({"train": sorted(set(labeled) - held) or sorted(held), "val": sorted(held)})
    first = folds[0]
    if first["train"] == first["val"]:
        return tuple(folds), "fold 0 validates on its own training cases: that validation measures nothing"
    return tuple(folds), (
        f"no validation cases: fold 0 trains on {len(first['train'])} of the {len(labeled)} labelled "
        f"cases and validates on {len(first['val'])} of them ({first_few(first['val'])}), "
        "too few to choose anything by; "
        f"fold all trains on all {len(labeled)}"
    )


def as_json(assignment: Assignment) -> dict[str, Any]:
    """Return the entries for conversion.json."""
    return {
        "missing": {role: list(names) for role, names in assignment.missing.items() if names},
        "not_in_protocol": list(assignment.unknown),
        "notes": list(assignment.notes),
    }
