"""Who is in which role: labelled, unlabelled and test cases, and the third list of a fold.

Folders are listed, no image or label is opened. Splits are nnU-Net's `splits_final.json`: one dictionary a
fold with the lists "train" and "val" and, in benchmark mode only, "unlabeled".
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import (
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)

from nnunetv2_dycon.errors import ConfigError, SplitError

UNLABELED = "unlabeled"
SPLITS_FILE = "splits_final.json"
STOCK_FOLDS = 5  # that nnU-Net makes, and needs as many cases for

Splits = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Roles:
    """The cases of a raw data set by role; every name is in exactly one.

    Attributes
    ----------
    labeled, unlabeled, test : tuple of str
        Sorted case identifiers: those nnU-Net trains on (imagesTr, or "dataset" of dataset.json), those of
        imagesUn and those of imagesTs.
    files : mapping of str to tuple of Path
        Image files of every case, in channel order.
    """

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    test: tuple[str, ...]
    files: Mapping[str, tuple[Path, ...]]


def read_roles(raw_folder: str | Path, dataset_json: Mapping[str, Any]) -> Roles:
    """Roles of all cases below `raw_folder`, by file names.

    A label file counts for the role of its folder even where its image is missing: a label in labelsTr makes
    the name a labelled one, so that an image moved to imagesUn without its label moved away is noticed.

    Raises
    ------
    SplitError
        If a name has two roles; the message holds one path of each.
    """
    raw, ending = Path(raw_folder), dataset_json["file_ending"]
    labeled, label_files = _training_cases(raw, dataset_json)
    unlabeled = _image_files(raw / "imagesUn", ending)
    test = _image_files(raw / "imagesTs", ending)
    places = (
        _label_files(raw / "labelsTr", ending) | label_files | _first(labeled),
        _first(unlabeled),
        _label_files(raw / "labelsTs", ending) | _first(test),
    )
    for one, other in combinations(places, 2):
        clashes = sorted(one.keys() & other.keys())
        if clashes:
            case = clashes[0]
            more = f" ({len(clashes)} such names)" if len(clashes) > 1 else ""
            raise SplitError(f"{case!r} is in two roles: {one[case]} and {other[case]}{more}; remove or rename one")
    return Roles(*(tuple(sorted(d)) for d in (labeled, unlabeled, test)), files={**labeled, **unlabeled, **test})


def _training_cases(raw: Path, dataset_json: Mapping[str, Any]) -> tuple[dict[str, tuple[Path, ...]], dict[str, Path]]:
    if "dataset" not in dataset_json:
        return _image_files(raw / "imagesTr", dataset_json["file_ending"]), {}
    # a copy, because nnU-Net writes absolute paths into the dictionary that it gets
    listed = get_filenames_of_train_images_and_targets(str(raw), deepcopy(dict(dataset_json)))
    images = {case: tuple(map(Path, entry["images"])) for case, entry in listed.items()}
    return images, {case: Path(entry["label"]) for case, entry in listed.items()}


def training_labels(raw_folder: str | Path, dataset_json: Mapping[str, Any], cases: Iterable[str]) -> dict[str, Path]:
    """Where the label map of each training case should be; nothing is opened."""
    _, listed = _training_cases(Path(raw_folder), dataset_json)
    folder, ending = Path(raw_folder, "labelsTr"), dataset_json["file_ending"]
    return {case: listed.get(case, folder / f"{case}{ending}") for case in cases}


def _image_files(folder: Path, ending: str) -> dict[str, tuple[Path, ...]]:
    # nnU-Net's own list of files needs a pool of processes; its identifiers and one pass give the same
    if not folder.is_dir():
        return {}
    files: dict[str, list[Path]] = {
        str(case): [] for case in get_identifiers_from_splitted_dataset_folder(str(folder), ending)
    }
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(ending))
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and match[1] in files:
            files[match[1]].append(path)
    return {case: tuple(paths) for case, paths in files.items() if paths}


def _label_files(folder: Path, ending: str) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {path.name.removesuffix(ending): path for path in folder.iterdir() if path.name.endswith(ending)}


def _first(files: Mapping[str, tuple[Path, ...]]) -> dict[str, Path]:
    return {case: paths[0] for case, paths in files.items()}


def channel_names(dataset_json: Mapping[str, Any]) -> Mapping[str, str]:
    """Names of the image channels, under nnU-Net's key or under the one of its first version."""
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def unlabeled_name_problems(raw_folder: str | Path, roles: Roles, dataset_json: Mapping[str, Any]) -> list[str]:
    """What is wrong with names of files in imagesUn, a line each: file ending, channel numbers, names in _seg."""
    folder, ending = Path(raw_folder, "imagesUn"), dataset_json["file_ending"]
    channels = len(channel_names(dataset_json))
    problems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() or path.name.startswith(".") or path.suffix == ".json":
            continue
        if not path.name.endswith(ending):
            problems.append(f"{path} does not end in {ending}, the data set's file ending; convert or remove it")
        elif not re.fullmatch(r".+_\d{4}", path.name.removesuffix(ending)):
            problems.append(f"{path} has no channel number; rename it as in CASE_0000{ending}")
    for case in roles.unlabeled:
        first = roles.files[case][0]
        numbers = [int(path.name.removesuffix(ending)[-4:]) for path in roles.files[case]]
        # one file may hold all channels (RGB pictures): known only when it is read
        if numbers != list(range(channels)) and numbers != [0]:
            problems.append(
                f"{first}: the case has channel file{'s' * (len(numbers) > 1)} "
                f"{', '.join(f'_{n:04d}' for n in numbers)}, dataset.json names {channels} "
                f"(_0000 to _{channels - 1:04d}); add or remove files"
            )
        if case.endswith("_seg"):
            problems.append(f"{first}: nnU-Net takes names in _seg for masks; rename the case")
    return problems


def read_splits(preprocessed_folder: str | Path, raw_folder: str | Path | None = None) -> list[dict[str, Any]]:
    """Folds that training uses: those of the preprocessed folder, else of the raw folder, else none.

    Raises
    ------
    SplitError
        If a file is no list of folds, or if both files are there and their "unlabeled" lists differ: training
        would read the one in the preprocessed folder and pass over the other. A fold that only the raw folder's
        file has must have no such list.
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
    """Copy the raw folder's split file where nnU-Net reads it, if there is none yet; returns whether it did."""
    if raw_folder is None or (preprocessed_folder / SPLITS_FILE).exists() or not (raw_folder / SPLITS_FILE).is_file():
        return False
    _write_splits(preprocessed_folder, (raw_folder / SPLITS_FILE).read_text())
    return True


def write_small_splits(preprocessed_folder: Path, cases: Sequence[str]) -> None:
    """Write one fold a case that validates on it and trains on the others; one case alone does both."""
    ordered = sorted(cases)
    folds = [{"train": [c for c in ordered if c != case] or [case], "val": [case]} for case in ordered]
    _write_splits(preprocessed_folder, json.dumps(folds, indent=4))


def _write_splits(folder: Path, text: str) -> None:
    part = folder / f".{SPLITS_FILE}.{os.getpid()}"
    part.write_text(text)
    os.replace(part, folder / SPLITS_FILE)


def _load_splits(path: Path) -> list[dict[str, Any]]:
    try:
        splits = json.loads(path.read_text())
    except ValueError as error:
        raise SplitError(f"{path} is no valid JSON ({error}); mend or delete it") from error
    if not isinstance(splits, list) or not all(isinstance(fold, dict) for fold in splits):
        raise SplitError(f'{path} must be a list with one {{"train": [...], "val": [...]}} a fold; mend it')
    return splits


def check_fold(splits: Splits, fold: int | str) -> None:
    """Refuse a fold for which nnU-Net would make its own split while others keep cases unlabelled.

    Raises
    ------
    ConfigError
        If any fold has an "unlabeled" list and `fold` is 'all' or no index into `splits`: nnU-Net would then
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
    """Refuse cases of a fold that have another role by now: their labels must not be used.

    Parameters
    ----------
    cases : iterable of str
        Training and validation cases of the fold, which come from the preprocessed folder.
    unlabeled, test : iterable of str
        Cases of imagesUn and of imagesTs, which come from the raw data set.
    number : int
        Of the data set, for the message.

    Raises
    ------
    SplitError
        If one is an unlabelled or a test case.
    """
    for role, others in (("an unlabelled", unlabeled), ("a test", test)):
        moved = set(cases) & set(others)
        if moved:
            raise SplitError(
                f"{_some(moved)}: trained or validated on by this fold, but {role} case by now; the preprocessed "
                f"data are older. Delete {preprocessed_folder} and type: "
                f"nnUNetv2_plan_and_preprocess -d {number}"
            )


def fold_unlabeled(splits: Splits, fold: int | str, known: Collection[str] | None = None) -> tuple[str, ...]:
    """Cases of imagesTr that serve without labels in `fold`, sorted; empty outside benchmark mode.

    Parameters
    ----------
    splits : sequence of dict
        Folds as in splits_final.json.
    fold : int or 'all'
        The fold that is trained.
    known : collection of str, optional
        All training cases; given, the list must name only these.

    Raises
    ------
    ConfigError
        As `check_fold`.
    SplitError
        If the list is no list of names, names a case twice, a case that is not known, or one that is also a
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
    """Cases that any fold lists as "unlabeled", sorted, every list checked as by `fold_unlabeled`."""
    return tuple(sorted({case for fold in range(len(splits)) for case in fold_unlabeled(splits, fold, known)}))


def _some(cases: Iterable[str]) -> str:
    ordered = sorted(cases)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(map(repr, ordered[:3])) + more
