"""File names of a raw data set that someone would pass over in silence, or take for what they are not.

Folders are listed; no image or label is opened.
"""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_dycon.data.dataset_json import channel_names
from nnunetv2_dycon.data.roles import Roles
from nnunetv2_dycon.files import is_hidden, list_visible

IMAGES = {"labeled": "imagesTr", "unlabeled": "imagesUn", "test": "imagesTs"}
FOLDERS = (*IMAGES.values(), "labelsTr", "labelsTs")
_LIKE_UNLABELED = re.compile(r"(?!label)(images?[_ -]?u[nl].*|.*unlab.*|un)")
_IMAGE_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif", ".tiff")  # of nnU-Net's readers


def unlabeled_name_problems(raw_folder: str | Path, roles: Roles, dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the problems with file names in imagesUn, one line each.

    These are files of another ending, without channel number or with wrong ones, names in _seg, folders with images,
    and folders whose name is nearly imagesUn.

    Parameters
    ----------
    raw_folder : path
        The raw data set.
    roles : Roles
        Its cases.
    dataset_json : mapping
        Content of its dataset.json.
    """
    raw, ending = Path(raw_folder), dataset_json["file_ending"]
    folder, channels = raw / "imagesUn", len(channel_names(dataset_json))
    problems = [*_misspelt(raw, ending), *_folders_with_images(folder, ending)]
    for path in list_visible(folder):
        if path.suffix == ".json":
            continue
        if not path.name.endswith(ending):
            problems.append(f"{path} does not end in {ending}, the data set's file ending; convert or remove it")
        else:
            problems += _without_channel(path, ending)
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
    return [*problems, *_masks(roles, roles.unlabeled)]


def other_name_problems(raw_folder: Path, roles: Roles, dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the problems with file names in the other folders, one line each.

    These are images that nnU-Net passes over, and hidden files, which it takes for cases.

    Parameters
    ----------
    raw_folder : Path
        The raw data set.
    roles : Roles
        Its cases.
    dataset_json : mapping
        Content of its dataset.json.
    """
    ending = dataset_json["file_ending"]
    problems = hidden_cases(raw_folder, dataset_json)
    for role in ("labeled", "test"):
        if role == "labeled" and "dataset" in dataset_json:  # which names its own files
            continue
        folder = raw_folder / IMAGES[role]
        problems += _folders_with_images(folder, ending)
        for path in list_visible(folder):
            if path.name.endswith(ending):
                problems += _without_channel(path, ending)
            elif path.name.endswith(_IMAGE_ENDINGS):
                problems.append(f"{path} does not end in {ending}, the data set's file ending; convert or remove it")
    return [*problems, *_masks(roles, roles.labeled)]


def hidden_cases(raw_folder: Path, dataset_json: Mapping[str, Any]) -> list[str]:
    """Return one line for each hidden file that nnU-Net's commands would take for an image of a case.

    Parameters
    ----------
    raw_folder : Path
        The raw data set.
    dataset_json : mapping
        Content of its dataset.json.
    """
    problems = []
    for name in IMAGES.values():
        folder = raw_folder / name
        for found in sorted(os.listdir(folder)) if folder.is_dir() else ():
            if is_hidden(found) and found.endswith(dataset_json["file_ending"]):
                typed = f": find {shlex.quote(str(raw_folder))} -name '._*' -delete" if found.startswith("._") else ""
                problems.append(f"{folder / found} is hidden, but nnU-Net takes it for a case; delete it{typed}")
    return problems


def unread_folders(raw_folder: Path, dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the names of further folders with images, which nobody reads.

    Parameters
    ----------
    raw_folder : Path
        The raw data set.
    dataset_json : mapping
        Content of its dataset.json.
    """
    others = (path for path in sorted(raw_folder.iterdir()) if path.is_dir() and path.name not in FOLDERS)
    return [path.name for path in others if not is_hidden(path.name) and _holds(path, dataset_json["file_ending"])]


def _misspelt(raw: Path, ending: str) -> list[str]:
    """Return one line for each folder whose name is nearly that of a folder that is read."""
    problems = []
    for path in sorted(raw.iterdir()) if raw.is_dir() else ():
        if path.name in FOLDERS or is_hidden(path.name) or not path.is_dir():
            continue
        same = [name for name in FOLDERS if name.lower() == path.name.lower()]
        meant = same or (["imagesUn"] if _LIKE_UNLABELED.fullmatch(path.name.lower()) else [])
        if meant and _holds(path, ending):
            problems.append(f"{path} holds images but is not read; move them to {raw / meant[0]}, or remove it")
    return problems


def _folders_with_images(folder: Path, ending: str) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    return [
        f"{folder / name} is a folder, whose images are not read; move them up, or remove it"
        for name in inner
        if _holds(folder / name, ending)
    ]


def _holds(folder: Path, ending: str) -> bool:
    """Return whether a folder holds an image of the data set, at any depth."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if any(name.endswith(ending) and not is_hidden(name) for name in names):
            return True
    return False


def _without_channel(path: Path, ending: str) -> list[str]:
    if re.fullmatch(r".+_\d{4}", path.name.removesuffix(ending), re.DOTALL):
        return []
    return [f"{path} has no channel number; rename it, for example to CASE_0000{ending}"]


def _masks(roles: Roles, cases: tuple[str, ...]) -> list[str]:
    return [
        f"{roles.files[case][0]}: nnU-Net takes names in _seg for masks; rename the case"
        for case in cases
        if case.endswith("_seg")
    ]
