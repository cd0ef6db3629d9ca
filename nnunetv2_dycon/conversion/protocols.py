"""Protocols: lists of training, validation and test cases, and of the labelled ones among the training cases.

Published protocols are data files in `published/`, with their source. A user's file has the same form:
``{"labeled": [...], "train": [...], "val": [...], "test": [...]}``, where "labeled" may also be a mapping
``{"4": [...], "8": [...]}`` from a number to a list, and "unlabeled" may replace "train". Next to "train", whose cases
are unlabelled unless they are labelled, "unlabeled" changes nothing and may name only cases of "train".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nnunetv2_dycon.errors import ConfigError, SplitError
from nnunetv2_dycon.files import check_case_names, read_json

PUBLISHED = Path(__file__).with_name("published")


@dataclass(frozen=True)
class Protocol:
    """Lists of case names.

    Attributes
    ----------
    name, source, note : str
        Its name, its source, and a note about it.
    train, val, test : tuple of str
        Disjoint; in the published order, since "the first n" depends on it.
    labeled : mapping of int to tuple of str
        Published labelled cases by their number; each list is inside `train`.
    """

    name: str
    source: str
    note: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    labeled: Mapping[int, tuple[str, ...]]

    @property
    def first_are_labeled(self) -> bool:
        """Whether every published list of labelled cases is the head of the training list."""
        return all(self.train[:n] == cases for n, cases in self.labeled.items())


def find_protocol(name: str | Path, published: Sequence[str], canonical: Callable[[str], str]) -> Protocol:
    """Return a published protocol by its name, or the one in a user's file.

    Parameters
    ----------
    name : str
        Full name, its end after an underscore where that is unique (`fold1`), or the path of a JSON file.
    published : sequence of str
        Names to choose from.
    canonical : callable
        Brings an id into the form of case names.

    Raises
    ------
    ConfigError
        If there is no such protocol.
    SplitError
        If the file is not a protocol, or a case is in two roles.
    """
    fitting = [known for known in published if known == str(name) or known.endswith(f"_{name}")]
    if str(name) in fitting or len(fitting) == 1:
        chosen = str(name) if str(name) in fitting else fitting[0]
        return read_protocol(PUBLISHED / f"{chosen}.json", canonical)
    if Path(name).is_file():
        return read_protocol(Path(name), canonical)
    choice = f"one of {', '.join(published)}, or a JSON file" if published else "a JSON file"
    raise ConfigError(f"--protocol {name}: no such protocol; give {choice}")


def read_protocol(path: Path, canonical: Callable[[str], str]) -> Protocol:
    """Read and check a protocol file.

    Raises
    ------
    SplitError
        If the file is not a protocol, or a case is in two roles.
    """
    content = _load(path)
    lists = {key: _names(path, key, content.get(key, []), canonical) for key in ("train", "val", "test")}
    labeled = _labeled(path, content, canonical)
    unlabeled = _names(path, "unlabeled", _either(content, "unlabeled"), canonical)
    if not lists["train"]:
        longest = max(labeled.values(), key=len, default=())
        lists["train"] = (*longest, *unlabeled)
        _no_case_twice(path, "train", lists["train"])
    outside = [case for case in unlabeled if case not in lists["train"]]
    if outside:
        raise SplitError(
            f'{path}: unlabelled case {outside[0]!r} is not in "train"; add it there, or leave "train" out'
        )
    protocol = Protocol(
        name=str(content.get("name", path.stem)),
        source=str(content.get("source", path.name)),
        note=str(content.get("note", "")),
        labeled=labeled,
        **lists,
    )
    _check(path, protocol, content.get("counts"))
    return protocol


def read_names(path: Path, canonical: Callable[[str], str]) -> tuple[str, ...]:
    """Return the case names in a text file, one per line; blank lines and lines that start with # are ignored.

    Raises
    ------
    SplitError
        If it cannot be read as text, is empty, or names a case twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SplitError(f"{path} cannot be read as a list of cases ({error}); write one id per line") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise SplitError(f"{path} names no case; write one id per line")
    return _names(path, "labeled", names, canonical)


def _load(path: Path) -> dict[str, Any]:
    content = read_json(path, "mend it", SplitError)
    if not isinstance(content, dict):
        raise SplitError(f'{path} must be {{"labeled": [...], "train": [...], "val": [...], "test": [...]}}; mend it')
    return content


def _either(content: Mapping[str, Any], key: str) -> Any:
    """Return the value of `key`, in American or British spelling."""
    return content.get(key, content.get(key.replace("labeled", "labelled"), []))


def _labeled(path: Path, content: Mapping[str, Any], canonical: Callable[[str], str]) -> dict[int, tuple[str, ...]]:
    given = _either(content, "labeled")
    if isinstance(given, list):
        return {len(given): _names(path, "labeled", given, canonical)} if given else {}
    if not isinstance(given, dict) or not all(str(key).isdecimal() for key in given):
        raise SplitError(f'{path}: "labeled" must be a list of ids, or number: list of ids; mend it')
    return {int(key): _names(path, f"labeled {key}", ids, canonical) for key, ids in given.items()}


def _names(path: Path, key: str, ids: Any, canonical: Callable[[str], str]) -> tuple[str, ...]:
    if not isinstance(ids, list) or not all(isinstance(text, str | int) for text in ids):
        raise SplitError(f'{path}: "{key}" must be a list of ids; mend it')
    names = tuple(canonical(str(text).strip()) for text in ids)
    check_case_names(names, path, SplitError)
    _no_case_twice(path, key, names)
    return names


def _no_case_twice(path: Path, key: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SplitError(f'{path}: "{key}" names {twice!r} twice; remove one')


def _check(path: Path, protocol: Protocol, counts: Mapping[str, int] | None) -> None:
    lists = {"train": protocol.train, "val": protocol.val, "test": protocol.test}
    for (one, a), (other, b) in combinations(lists.items(), 2):
        both = sorted(set(a) & set(b))
        if both:
            raise SplitError(f'{path}: {both[0]!r} is in both "{one}" and "{other}"; remove it from one')
    for number, cases in protocol.labeled.items():
        if len(cases) != number:
            raise SplitError(f'{path}: "labeled" {number} lists {len(cases)} cases; mend it')
        outside = sorted(set(cases) - set(protocol.train))
        if outside:
            raise SplitError(f'{path}: labelled case {outside[0]!r} is not in "train"; add it there')
    for key, number in (counts or {}).items():
        if key in lists and len(lists[key]) != number:
            raise SplitError(f'{path}: "{key}" lists {len(lists[key])} cases, its "counts" say {number}; mend it')
