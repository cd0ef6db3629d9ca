"""The folds of a data set: `splits_final.json`, read, checked and written.

Splits are nnU-Net's: one dictionary per fold with the lists "train" and "val" and, in benchmark mode only, "unlabeled":
cases of imagesTr whose labels are never opened. A mistake in the file stops whoever reads it, since stock nnU-Net
trains with most of them and says nothing. Two oddities may be meant, and a fold says so: `"repeats": true`, "train"
names cases several times and nnU-Net draws them as often; `"overlap": true`, it validates on cases that it trains on.
"""

import difflib
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

from nnunetv2_dycon.errors import ConfigError, DataError, SplitError
from nnunetv2_dycon.files import check_case_names, first_few, read_json, write_json, write_text

UNLABELED, REPEATS, OVERLAP = "unlabeled", "repeats", "overlap"
SPLITS_FILE = "splits_final.json"
STOCK_FOLDS = 5  # nnU-Net makes five folds, and needs five cases for them
Splits = Sequence[Mapping[str, Any]]
_LISTS = ("train", "val", UNLABELED)
_SWITCHES = (REPEATS, OVERLAP)


def read_splits(preprocessed_folder: str | Path, raw_folder: str | Path | None = None) -> list[dict[str, Any]]:
    """Return the folds of the preprocessed folder, else of the raw folder, else none.

    Raises
    ------
    SplitError
        If a file is wrong in a way that needs no knowledge of the data set, see `check_splits`. If both files are there
        and their "unlabeled" lists differ: training reads the file in the preprocessed folder and ignores the other. A
        fold that is in the raw folder's file alone must not have such a list.
    """
    found = []
    for folder in (preprocessed_folder, raw_folder):
        path = Path(folder, SPLITS_FILE) if folder is not None else None
        if path is not None and path.is_file():
            found.append((path, _load_splits(path)))
    if len(found) == 2:
        (used, splits), (other, others) = found
        pairs: Iterable[tuple[dict, dict]] = zip_longest(splits[: len(others)], others, fillvalue={})
        if any(fold.get(UNLABELED) != passed_over.get(UNLABELED) for fold, passed_over in pairs):
            raise SplitError(
                f'the "unlabeled" lists of {used} and {other} differ and training reads the first; '
                f"type: {_copy(other, used)} (this replaces the first), or: {_copy(used, other)}"
            )
    return found[0][1] if found else []


def adopt_splits(preprocessed_folder: Path, raw_folder: Path | None) -> bool:
    """Copy the raw folder's split file to where nnU-Net reads it, unless it has one; returns whether it copied.

    Raises
    ------
    SplitError
        If the file is wrong, see `check_splits`; it is not copied then.
    """
    if raw_folder is None or (preprocessed_folder / SPLITS_FILE).exists() or not (raw_folder / SPLITS_FILE).is_file():
        return False
    _load_splits(raw_folder / SPLITS_FILE)
    write_text(preprocessed_folder / SPLITS_FILE, (raw_folder / SPLITS_FILE).read_text())
    return True


def check_copies(preprocessed_folder: Path, raw_folder: Path) -> None:
    """Refuse a file in the raw folder that is not the one in use: nnU-Net's planner would stop.

    Raises
    ------
    SplitError
        If a fold of the raw folder's file has other cases in the preprocessed folder's, or is not in it.
    """
    used, other = preprocessed_folder / SPLITS_FILE, raw_folder / SPLITS_FILE
    if not (used.is_file() and other.is_file()):
        return
    pairs: Iterable[tuple[dict, dict]] = zip_longest(
        read_splits(preprocessed_folder), read_splits(raw_folder), fillvalue={}
    )
    for number, (fold, copy) in enumerate(pairs):
        if copy and any(set(fold.get(key, ())) != set(copy.get(key, ())) for key in _LISTS):
            raise SplitError(
                f"fold {number} of {other} differs from that of {used}, which training reads and planning refuses; "
                f"type: {_copy(other, used)} (this replaces the second), or: {_copy(used, other)}"
            )


def write_small_splits(preprocessed_folder: Path, cases: Sequence[str]) -> None:
    """Write one fold per case, which validates on it and trains on the others; a single case does both."""
    ordered = sorted(cases)
    folds = [{"train": [c for c in ordered if c != case] or [case], "val": [case]} for case in ordered]
    write_json(preprocessed_folder / SPLITS_FILE, folds)


def _load_splits(path: Path) -> list[dict[str, Any]]:
    splits = read_json(path, "mend or delete it", SplitError)
    check_splits(splits, path)
    return splits


# ---- what a file may hold ----------------------------------------------------------------------------------


def check_splits(
    splits: Any, path: str | Path, known: Collection[str] | None = None, place: str | Path = "imagesTr"
) -> None:
    """Refuse folds that would train or validate on other cases than their author believes.

    Parameters
    ----------
    splits : any
        Content of a split file.
    path : path
        The file, for messages.
    known : collection of str, optional
        All training cases of the data set. Without it the names are compared with each other alone.
    place : path
        Where the known cases are, for messages.

    Raises
    ------
    SplitError
        If it is not a list of folds; if a fold lacks a list, has one under another name, an empty one, a case twice or
        in two lists; if a case is not known. A fold may train and validate on the same cases where no other is left.
    """
    if not isinstance(splits, list) or not splits or not all(isinstance(fold, dict) for fold in splits):
        raise SplitError(f'{path} must be a list with one {{"train": [...], "val": [...]}} per fold; mend or delete it')
    for number, fold in enumerate(splits):
        where = f"{path}, fold {number}"
        _check_keys(fold, where)
        for key in _LISTS:
            _check_list(fold.get(key, []), key, fold, where)
        _check_between(fold, where)
        if known is not None:
            _check_known(fold, where, known, place)


def _check_keys(fold: Mapping[str, Any], where: str) -> None:
    for key in fold:
        if key in _LISTS:
            continue
        if key not in _SWITCHES:
            meant = difflib.get_close_matches(key.lower(), (*_LISTS, *_SWITCHES), 1, 0.7)
            remedy = f'write "{meant[0]}"' if meant else "remove it"
            raise SplitError(f'{where}: nothing reads "{key}"; {remedy}')
        if not isinstance(fold[key], bool):
            raise SplitError(f'{where}: "{key}" must be true or false')
    for key in ("train", "val"):
        if key not in fold:
            raise SplitError(f'{where} has no "{key}"; add the list')


def _check_list(cases: Any, key: str, fold: Mapping[str, Any], where: str) -> None:
    if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
        raise SplitError(f'{where}: "{key}" must be a list of case names')
    check_case_names(cases, where, SplitError)
    if not cases and key != UNLABELED:
        raise SplitError(f'{where}: "{key}" is empty; name cases, or leave the fold out')
    twice = [case for case, count in Counter(cases).items() if count > 1]
    if twice and not (key == "train" and fold.get(REPEATS)):
        meant = f', or add "{REPEATS}": true if it is to be drawn more often' if key == "train" else ""
        raise SplitError(f'{where}: "{key}" names {_some(twice)} twice; remove one{meant}')


def _check_between(fold: Mapping[str, Any], where: str) -> None:
    lists = {key: set(fold.get(key, [])) for key in _LISTS}
    for one, other in combinations(_LISTS, 2):
        both = lists[one] & lists[other]
        if not both:
            continue
        if (one, other) != ("train", "val"):
            raise SplitError(f'{where}: {_some(both)} in both "{one}" and "{other}"; remove from one list')
        if not fold.get(OVERLAP) and lists[one] != lists[other]:
            raise SplitError(
                f'{where}: {_some(both)} in both "train" and "val", and a score on training cases says nothing; remove '
                f'from one list, or add "{OVERLAP}": true if it is meant'
            )


def _check_known(fold: Mapping[str, Any], where: str, known: Collection[str], place: str | Path) -> None:
    for key in _LISTS:
        missing = set(fold.get(key, [])) - set(known)
        if missing:
            raise SplitError(f'{where}: "{key}" names {_some(missing)}, not in {place}; correct the list')
    others = set(known) - {case for key in _LISTS for case in fold.get(key, [])}
    if set(fold["train"]) == set(fold["val"]) and others and not fold.get(OVERLAP):
        raise SplitError(
            f'{where} validates on its training cases, though {_some(others)} could be validated on; correct "val", or '
            f'add "{OVERLAP}": true if it is meant'
        )


# ---- one fold ----------------------------------------------------------------------------------------------


def check_fold(splits: Splits, fold: int | str, path: str | Path = SPLITS_FILE) -> None:
    """Refuse a fold that the split file does not have: nnU-Net would make a random split of its own.

    Parameters
    ----------
    splits : sequence of dict
        Folds of the file; none if there is no file.
    fold : int or 'all'
        The fold that is asked for.
    path : path
        The file, for messages.

    Raises
    ------
    ConfigError
        If `fold` is not an index into `splits`; if it is 'all' and any fold has an "unlabeled" list: nnU-Net would then
        train on the labels of those cases.
    """
    if not splits:
        return
    choice = _choice(len(splits))
    if fold == "all":
        if any(UNLABELED in entry for entry in splits):
            raise ConfigError(f'fold all would train on the labels of cases that {path} lists as "unlabeled"; {choice}')
    elif not _is_one_of(fold, len(splits)):
        raise ConfigError(f"{path} has no fold {fold}; {choice}")


def check_planned_fold(cases: int, fold: int | str) -> None:
    """Refuse a fold that will not be made where there is no split file.

    Parameters
    ----------
    cases : int
        Number of labelled cases.
    fold : int or 'all'
        The fold that is asked for.

    Raises
    ------
    DataError
        If there is no labelled case.
    ConfigError
        If nnU-Net, or with fewer than five cases we, would make fewer folds.
    """
    if cases == 0:
        raise DataError("there is no labelled case: put images into imagesTr, their labels into labelsTr")
    made = min(STOCK_FOLDS, cases)
    if fold != "all" and not _is_one_of(fold, made):
        raise ConfigError(
            f"there is no fold {fold}: {cases} labelled cases are divided into {made} fold{'s' * (made > 1)}; "
            f"{_choice(made)}"
        )


def _is_one_of(fold: int | str, number: int) -> bool:
    return str(fold).isdecimal() and int(fold) < number


def _choice(number: int) -> str:
    return f"type -f 0{f' to {number - 1}' * (number > 1)}"


def check_training_cases(
    cases: Iterable[str], unlabeled: Iterable[str], test: Iterable[str], number: int, preprocessed_folder: Path
) -> None:
    """Refuse cases of a fold that have another role now: their labels must not be used.

    Parameters
    ----------
    cases : iterable of str
        Training and validation cases of the fold, which come from the preprocessed folder.
    unlabeled, test : iterable of str
        Cases of imagesUn and of imagesTs, which come from the raw data set.
    number : int
        Id of the data set, for the message.

    Raises
    ------
    SplitError
        If one is an unlabelled or a test case.
    """
    for role, others in (("an unlabelled", unlabeled), ("a test", test)):
        moved = set(cases) & set(others)
        if moved:
            raise SplitError(
                f"{_some(moved)}: this fold trains or validates on it, but it is {role} case now; the preprocessed "
                f"data are older. Delete {preprocessed_folder} and type: "
                f"nnUNetv2_plan_and_preprocess -d {number}"
            )


def fold_unlabeled(splits: Splits, fold: int | str, known: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the cases of imagesTr that `fold` uses without labels, sorted; empty outside benchmark mode.

    Parameters
    ----------
    splits : sequence of dict
        Folds as in splits_final.json.
    fold : int or 'all'
        The fold that is trained.
    known : collection of str, optional
        All training cases: the list may name only these.

    Raises
    ------
    ConfigError
        As `check_fold`.
    SplitError
        If the list names a case that is not known.
    """
    check_fold(splits, fold)
    if fold == "all" or not splits:
        return ()
    cases = splits[int(fold)].get(UNLABELED, [])
    missing = set(cases) - set(cases if known is None else known)
    if missing:
        where = f"{SPLITS_FILE}, fold {fold}"
        raise SplitError(f'{where}: "{UNLABELED}" names {_some(missing)}, not in imagesTr; correct the list')
    return tuple(sorted(cases))


def benchmark_cases(splits: Splits, known: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the cases that any fold lists as "unlabeled", sorted; checks every list as `fold_unlabeled` does."""
    return tuple(sorted({case for fold in range(len(splits)) for case in fold_unlabeled(splits, fold, known)}))


def _copy(source: Path, target: Path) -> str:
    return shlex.join(["cp", str(source), str(target)])


def _some(cases: Iterable[str]) -> str:
    return first_few([repr(case) for case in sorted(cases)])
