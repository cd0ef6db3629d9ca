"""Roles of the cases of a raw data set: labelled, unlabelled and test, by file names.

Folders are listed; no image or label is opened. Hidden files are never cases.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_dycon.data.dataset_json import check_dataset_json
from nnunetv2_dycon.errors import SplitError
from nnunetv2_dycon.files import check_case_names, list_visible


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
    """Return the roles of all cases of a raw data set, by file names.

    A label file counts for the role of its folder even without its image: an image that was moved to imagesUn while
    its label stayed in labelsTr is refused.

    Raises
    ------
    SplitError
        If a name has two roles; the message names one file of each.
    DataError
        If dataset.json cannot be used, see `check_dataset_json`, or a name cannot be part of a file name.
    """
    raw = Path(raw_folder)
    check_dataset_json(dataset_json, raw / "dataset.json")
    ending = dataset_json["file_ending"]
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
    files = {**labeled, **unlabeled, **test}
    check_case_names(files, raw)
    return Roles(tuple(sorted(labeled)), tuple(sorted(unlabeled)), tuple(sorted(test)), files)


def _training_cases(raw: Path, dataset_json: Mapping[str, Any]) -> tuple[dict[str, tuple[Path, ...]], dict[str, Path]]:
    if "dataset" not in dataset_json:
        return _image_files(raw / "imagesTr", dataset_json["file_ending"]), {}
    # a copy, because nnU-Net writes absolute paths into the dictionary that it gets
    listed = get_filenames_of_train_images_and_targets(str(raw), deepcopy(dict(dataset_json)))
    images = {case: tuple(map(Path, entry["images"])) for case, entry in listed.items()}
    return images, {case: Path(entry["label"]) for case, entry in listed.items()}


def label_paths(raw_folder: str | Path, dataset_json: Mapping[str, Any], roles: Roles) -> dict[str, Path]:
    """Return the path of the label map of each labelled and test case, there or not.

    Parameters
    ----------
    raw_folder : path
        The raw data set.
    dataset_json : mapping
        Content of its dataset.json.
    roles : Roles
        Its cases.
    """
    raw, ending = Path(raw_folder), dataset_json["file_ending"]
    _, listed = _training_cases(raw, dataset_json)
    training = {case: listed.get(case, raw / "labelsTr" / f"{case}{ending}") for case in roles.labeled}
    return training | {case: raw / "labelsTs" / f"{case}{ending}" for case in roles.test}


def stray_labels(raw_folder: Path, dataset_json: Mapping[str, Any], roles: Roles) -> list[Path]:
    """Return the label files in labelsTr and labelsTs whose case has no image, sorted.

    Parameters
    ----------
    raw_folder : Path
        The raw data set.
    dataset_json : mapping
        Content of its dataset.json.
    roles : Roles
        Its cases.
    """
    ending = dataset_json["file_ending"]
    folders = [("labelsTs", roles.test)] + ([] if "dataset" in dataset_json else [("labelsTr", roles.labeled)])
    return sorted(
        path
        for name, cases in folders
        for case, path in _label_files(raw_folder / name, ending).items()
        if case not in set(cases)
    )


def image_sidecar(image: Path, ending: str) -> Path:
    """Return the JSON file next to an image from which nnU-Net's TIFF reader takes the spacing, there or not."""
    return image.with_name(image.name[: -len(f"_0000{ending}")] + ".json")


def label_sidecar(label: Path, ending: str) -> Path:
    """Return the same file of a label map."""
    return label.with_name(label.name.removesuffix(ending) + ".json")


def _image_files(folder: Path, ending: str) -> dict[str, tuple[Path, ...]]:
    # nnU-Net's own list takes hidden files for cases, cuts names without a number, and needs a pool of processes
    files: dict[str, list[Path]] = {}
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(ending), re.DOTALL)
    for path in list_visible(folder, ending):
        match = pattern.fullmatch(path.name)
        if match:
            files.setdefault(match[1], []).append(path)
    return {case: tuple(paths) for case, paths in files.items()}


def _label_files(folder: Path, ending: str) -> dict[str, Path]:
    return {path.name.removesuffix(ending): path for path in list_visible(folder, ending)}


def _first(files: Mapping[str, tuple[Path, ...]]) -> dict[str, Path]:
    return {case: paths[0] for case, paths in files.items()}
