"""dataset.json of a data set: every entry that we or nnU-Net use has the type that its reader expects."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import check_case_names, read_json

FILE = "dataset.json"
_OLD = "run nnUNetv2_convert_old_nnUNet_dataset if the data set is of the first nnU-Net"


def read_dataset_json(path: Path, mend: str = "a raw data set of nnU-Net has one: mend it") -> dict[str, Any]:
    """Return the checked content of a dataset.json.

    Parameters
    ----------
    path : Path
        The file.
    mend : str
        What the user can do about a file that is missing or not JSON; ends the error message.

    Raises
    ------
    DataError
        If it cannot be read, or as `check_dataset_json`.
    """
    content = read_json(path, mend)
    check_dataset_json(content, path)
    return content


def check_dataset_json(content: Any, path: str | Path = FILE) -> None:
    """Refuse a dataset.json with a missing entry, or one of another type than its readers expect.

    What nnU-Net makes of the labels, and the number of cases, are not looked at.

    Parameters
    ----------
    content : any
        Content of the file.
    path : path
        The file, for messages.

    Raises
    ------
    DataError
        For the first such entry, with its right form.
    """
    if not isinstance(content, dict):
        raise DataError(f"{path} must be {{...}} with labels, channel_names and file_ending; mend it")
    lacking = {"labels", "channel_names", "file_ending"} - content.keys()
    if "modality" in content:  # the word of the first nnU-Net
        lacking -= {"channel_names"}
    for key, (fits, form) in _FORMS.items():
        if key in lacking:
            raise DataError(f'{path} has no "{key}"; add {form}')
        if key in content and not fits(content[key]):
            raise DataError(f'{path}: "{key}" is {_short(content[key])}; write {form}')
    check_case_names(content.get("dataset", ()), path)


def channel_names(dataset_json: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the names of the image channels, by nnU-Net's key or that of its first version."""
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def numbers_of(label: Any) -> set[int]:
    """Return the numbers of a label: one, or those of a region."""
    return {int(number) for number in (label if isinstance(label, list) else [label])}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# ---- forms -------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    """Return whether nnU-Net can take it for a whole number; it accepts the text "1"."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.isdecimal())


def _are_labels(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            _is_number(label) or (isinstance(label, list) and label and all(map(_is_number, label)))
            for label in value.values()
        )
    )


def _are_channels(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value.values())


def _are_cases(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_case(case) for case in value.values())


def _is_case(case: Any) -> bool:
    if not isinstance(case, dict) or not isinstance(case.get("label"), str):
        return False
    images = case.get("images")
    return isinstance(images, list) and bool(images) and all(isinstance(image, str) for image in images)


def _is_ending(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(\.[A-Za-z0-9]+)+", value) is not None


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "labels": (_are_labels, f'a number for each name: {{"background": 0, "organ": 1}}, or {_OLD}'),
    "channel_names": (_are_channels, 'a name for each channel: {"0": "CT"}'),
    "modality": (_are_channels, '"channel_names" with a name for each channel: {"0": "CT"}'),
    "file_ending": (_is_ending, 'an ending with its dot: ".nii.gz"'),
    "dataset": (_are_cases, '{"CASE": {"images": ["imagesTr/CASE_0000.nii.gz"], "label": "labelsTr/CASE.nii.gz"}}'),
    "regions_class_order": (_are_numbers, "a list of label numbers: [1, 2]"),
    "overwrite_image_reader_writer": (_is_text, 'the name of a reader: "SimpleITKIO", or leave it out'),
}
