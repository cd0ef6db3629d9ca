"""The folds of a data set: `splits_final.json`, read, checked and written.

Splits are nnU-Net's: one dictionary per fold with the lists "train" and "val" and, in benchmark mode only, "unlabeled":
cases of imagesTr whose labels are never opened.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nnunetv2_dycon.errors import ConfigError, SplitError
from nnunetv2_dycon.files import check_case_names, first_few, read_json, write_json, write_text

UNLABELED = "unlabeled"
SPLITS_FILE = "splits_final.json"
STOCK_FOLDS = 5  # nnU-Net makes five folds, and needs five cases for them
Splits = Sequence[Mapping[str, Any]]


def read_splits(preprocessed_folder: str | Path, raw_folder: str | Path | None = None) -> list[dict[str, Any]]:
    """Return the folds of the preprocessed folder, else of the raw folder, else none.

    Raises
    ------
    SplitError
        If a file is not a list of folds, or a case name is not part of a file name. If both files are there and their
        "unlabeled" lists differ: training reads the file in the preprocessed folder and ignores the other. A fold that
        is in the raw folder's file alone must not have such a list.
    """
    found = []
    for folder in (preprocessed_folder, raw_folder):
        path = Path(folder, SPLITS_FILE) if folder is not None else None
        if path is not None and path.is_file():
            found.append((path, _load_splits(path)))
    if len(found) == 2:
        (used, splits), (other, others) = found
        pairs = zip_longest(splits[: len(others)], others, fillvalue={})
        if any(fold.get(UNLABELED) != passed_over.get(UNLABELED) for fold, passed_over in pairs):
            raise SplitError(
                f'the "unlabeled" lists of {used} and {other} differ and training reads the first; '
                f"type: cp {other} {used} (this replaces the first), or: cp {used} {other}"
            )
    return found[0][1] if found else []


def adopt_splits(preprocessed_folder: Path, raw_folder: Path | None) -> bool:
    """Copy the raw folder's split file to where nnU-Net reads it, unless it has one; returns whether it copied."""
    if raw_folder is None or (preprocessed_folder / SPLITS_FILE).exists() or not (raw_folder / SPLITS_FILE).is_file():
        return False
    write_text(preprocessed_folder / SPLITS_FILE, (raw_folder / SPLITS_FILE).read_text())
    return True


def write_small_splits(preprocessed_folder: Path, cases: Sequence[str]) -> None:
    """Write one fold per case, which validates on it and trains on the others; a single case does both."""
    ordered = sorted(cases)
    folds = [{"train": [c for c in ordered if c != case] or [case], "val": [case]} for case in ordered]
    write_json(preprocessed_folder / SPLITS_FILE, folds)


def _load_splits(path: Path) -> list[dict[str, Any]]:
    splits = read_json(path, "mend or delete it", SplitError)
    if not isinstance(splits, list) or not all(isinstance(fold, dict) for fold in splits):
        raise SplitError(f'{path} must be a list with one {{"train": [...], "val": [...]}} per fold; mend it')
    for fold in splits:
        for cases in fold.values():
            check_case_names(cases if isinstance(cases, list) else (), path, SplitError)
    return splits


def check_fold(splits: Splits, fold: int | str) -> None:
    """Refuse a fold for which nnU-Net would make its own split while others keep cases unlabelled.

    Raises
    ------
    ConfigError
        If any fold has an "unlabeled" list and `fold` is 'all' or not an index into `splits`: nnU-Net would then
        train on the labels of those cases.
    """
    if not any(UNLABELED in entry for entry in splits):
        return
    if fold == "all" or not 0 <= int(fold) < len(splits):
        choice = "0" if len(splits) == 1 else f"0 to {len(splits) - 1}"
        raise ConfigError(
            f'fold {fold} would train on the labels of cases that {SPLITS_FILE} lists as "unlabeled"; use fold {choice}'
        )


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
        If the list is not a list of names, names a case twice, a case that is not known, or one that is also a
        training or validation case of the same fold.
    """
    check_fold(splits, fold)
    if fold == "all" or not 0 <= int(fold) < len(splits):
        return ()
    entry, where = splits[int(fold)], f"{SPLITS_FILE}, fold {fold}"
    cases = entry.get(UNLABELED, [])
    if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
        raise SplitError(f'{where}: "unlabeled" must be a list of case names')
    if len(set(cases)) < len(cases):
        twice = sorted(case for case in set(cases) if cases.count(case) > 1)
        raise SplitError(f'{where}: "unlabeled" names {_some(twice)} twice; remove one')
    for key in ("train", "val"):
        both = set(cases) & set(entry.get(key, []))
        if both:
            raise SplitError(f'{where}: {_some(both)} in both "unlabeled" and "{key}"; remove from one list')
    if known is not None and not set(cases) <= set(known):
        missing = set(cases) - set(known)
        raise SplitError(f'{where}: "unlabeled" names {_some(missing)}, not in imagesTr; correct the list')
    return tuple(sorted(cases))


def benchmark_cases(splits: Splits, known: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the cases that any fold lists as "unlabeled", sorted; checks every list as `fold_unlabeled` does."""
    return tuple(sorted({case for fold in range(len(splits)) for case in fold_unlabeled(splits, fold, known)}))


def _some(cases: Iterable[str]) -> str:
    return first_few([repr(case) for case in sorted(cases)])
