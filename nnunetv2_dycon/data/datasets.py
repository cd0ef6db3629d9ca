"""Names and ids of data sets."""

import os
import re
from pathlib import Path

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few
from nnunetv2_dycon.folders import unset

_NAME = re.compile(r"Dataset(\d{3,})(?:_([^/\\]+))?")


def dataset_number(name: str) -> int:
    """Return the id in a full name.

    Raises
    ------
    DataError
        If the name is not of nnU-Net's form.

    Examples
    --------
    >>> dataset_number("Dataset004_Hippocampus")
    4
    >>> dataset_number("Dataset1004_Hippocampus")
    1004
    """
    return int(_parts(name)[0])


def dataset_title(name: str) -> str:
    """Return the part of a full name after the id; "Data" where there is none.

    Raises
    ------
    DataError
        If the name is not of nnU-Net's form.

    Examples
    --------
    >>> dataset_title("Dataset004_Left_Atrium")
    'Left_Atrium'
    """
    return _parts(name)[1] or "Data"


def _parts(name: str) -> tuple[str, str | None]:
    fit = _NAME.fullmatch(name)
    if fit is None:
        raise DataError(f"{name!r} is not a data set's name; nnU-Net needs three digits: Dataset012_Name")
    return fit[1], fit[2]


def dataset_name(dataset: int | str) -> str:
    """Return the full name of the data set with this id or name in any of nnU-Net's three folders.

    Raises
    ------
    DataError
        If no data set has it, or several do.
    """
    text = str(dataset)
    if text.startswith("Dataset"):
        _parts(text)
        return text
    if not text.isdecimal():
        raise DataError(f"-d {dataset}: give an id (4) or a full name (Dataset004_Name)")
    number = int(text)
    # nnU-Net's search for 100 finds 1000 too
    found = [str(name) for name in find_candidate_datasets(number) if _is_numbered(str(name), number)]
    if len(found) > 1:
        raise DataError(f"-d {dataset} may be {' or '.join(found)}; rename the folders of one, with another id")
    if not found:
        raise DataError(f"-d {dataset}: no data set has this id; {_what_there_is()}")
    return found[0]


def _is_numbered(name: str, number: int) -> bool:
    fit = _NAME.fullmatch(name)
    return fit is not None and int(fit[1]) == number


def _what_there_is() -> str:
    value = os.environ.get("nnUNet_raw")
    if not value:
        return unset("nnUNet_raw")
    raw = Path(value)
    names = sorted(path.name for path in raw.iterdir() if _NAME.fullmatch(path.name)) if raw.is_dir() else []
    return f"{raw} has {first_few(names, 8) if names else 'none'}; correct the id, or nnUNet_raw"
