"""An existing raw data set of nnU-Net: its folder, and its checked dataset.json."""

from pathlib import Path
from typing import Any

from nnunetv2_dycon.data.datasets import dataset_name
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import read_json
from nnunetv2_dycon.folders import environment_folder


def find_raw(dataset_id: int | str) -> tuple[Path, dict[str, Any]]:
    """Return folder and content of dataset.json of a data set in nnUNet_raw, by id or name.

    Raises
    ------
    DataError
        If there is no such data set, or nnU-Net cannot use its dataset.json.
    """
    raw = environment_folder("nnUNet_raw")
    folder = raw / dataset_name(dataset_id)
    path = folder / "dataset.json"
    content = read_json(path, "a raw data set of nnU-Net has one: mend it")
    _check(path, content)
    return folder, content


def _check(path: Path, content: Any) -> None:
    if not isinstance(content, dict):
        raise DataError(f"{path} must be {{...}} with labels, channel_names and file_ending; mend it")
    try:
        for value in content.get("labels", {}).values():
            for number in value if isinstance(value, list) else [value]:
                int(number)
    except (AttributeError, TypeError, ValueError):
        raise DataError(
            f'{path}: "labels" must give a number to each name; write {{"background": 0, "organ": 1}}, or run '
            "nnUNetv2_convert_old_nnUNet_dataset if the data set is of the first nnU-Net"
        ) from None
    for keys in (("labels",), ("file_ending",), ("channel_names", "modality")):
        if not any(key in content for key in keys):
            raise DataError(f"{path} has no {keys[0]!r}; add it")
