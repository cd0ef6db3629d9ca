"""Roles of the cases of a raw data set: labelled, unlabelled and test, by file names.

Folders are listed; no image or label is opened.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import (
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)

from nnunetv2_dycon.errors import SplitError
from nnunetv2_dycon.files import check_case_names


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
        If a name in dataset.json is not part of a file name.
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
    check_case_names(dataset_json["dataset"], raw / "dataset.json")
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


def image_sidecar(image: Path, ending: str) -> Path:
    """Return the JSON file next to an image from which nnU-Net's TIFF reader takes the spacing, there or not."""
    return image.with_name(image.name[: -len(f"_0000{ending}")] + ".json")


def label_sidecar(label: Path, ending: str) -> Path:
    """Return the same file of a label map."""
    return label.with_name(label.name.removesuffix(ending) + ".json")


def _image_files(folder: Path, ending: str) -> dict[str, tuple[Path, ...]]:
    # the same as nnU-Net's list of files, which needs a pool of processes
    if not folder.is_dir():
        return {}
    files: dict[str, list[Path]] = {
        str(case): [] for case in get_identifiers_from_splitted_dataset_folder(str(folder), ending)
    }
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(ending))
    for path in sorted(folder.iterdir(), key=lambda path: path.name):  # paths compare slowly
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
    """Return the names of the image channels, by nnU-Net's key or that of its first version."""
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def unlabeled_name_problems(raw_folder: str | Path, roles: Roles, dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the problems with file names in imagesUn, one line each: ending, channel numbers, names in _seg.

    Parameters
    ----------
    raw_folder : path
        The raw data set.
    roles : Roles
        Its cases.
    dataset_json : mapping
        Content of its dataset.json.
    """
    folder, ending = Path(raw_folder, "imagesUn"), dataset_json["file_ending"]
    channels = len(channel_names(dataset_json))
    problems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() or path.name.startswith(".") or path.suffix == ".json":
            continue
        if not path.name.endswith(ending):
            problems.append(f"{path} does not end in {ending}, the data set's file ending; convert or remove it")
        elif not re.fullmatch(r".+_\d{4}", path.name.removesuffix(ending)):
            problems.append(f"{path} has no channel number; rename it, for example to CASE_0000{ending}")
    for case in roles.unlabeled:
        first = roles.files[case][0]
        numbers = [int(path.name.removesuffix(ending)[-4:]) for path in roles.files[case]]
        # a single file may hold all channels (RGB pictures), which only reading it tells
        if numbers != list(range(channels)) and numbers != [0]:
            problems.append(
                f"{first}: the case has channel file{'s' * (len(numbers) > 1)} "
                f"{', '.join(f'_{n:04d}' for n in numbers)}, dataset.json names {channels} "
                f"(_0000 to _{channels - 1:04d}); add or remove files"
            )
        if case.endswith("_seg"):
            problems.append(f"{first}: nnU-Net takes names in _seg for masks; rename the case")
    return problems
