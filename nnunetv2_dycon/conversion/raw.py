"""An existing raw data set of nnU-Net: its folder, and its checked dataset.json."""

from pathlib import Path
from typing import Any

from nnunetv2_dycon.data.dataset_json import FILE, read_dataset_json
from nnunetv2_dycon.data.datasets import dataset_name
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.folders import environment_folder


def find_raw(dataset_id: int | str) -> tuple[Path, dict[str, Any]]:
    """Return folder and content of dataset.json of a data set in nnUNet_raw, by id or name.

    Raises
    ------
    DataError
        If there is no such data set, or nnU-Net cannot use its dataset.json.
    """
    folder = environment_folder("nnUNet_raw") / dataset_name(dataset_id)
    if not folder.is_dir():
        raise DataError(f"-d {dataset_id}: {folder} does not exist; put the data set there, or correct nnUNet_raw")
    return folder, read_dataset_json(folder / FILE)
