"""The files of a prepared unlabelled case, and the record by which damage to them is found.

The record of a case has the sizes and times of its files, which one listing of the folder compares for all cases, and
the digest of their content, which tells a damaged case from one that was copied and has new times.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_dycon.data.checked_cases import CaseReader
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import check_case_names

SUFFIXES = (
    ".b2nd",
    "_seg.b2nd",
    ".pkl",
)  # in the order of writing: the last one says that the case is whole
Files = Mapping[str, os.stat_result]


def list_files(folder: Path) -> dict[str, os.stat_result]:
    """Return size and time of each file in a folder by name; nothing if there is no folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat() for entry in entries if entry.is_file()}


def describe(folder: Path, case: str) -> dict[str, Any]:
    """Return the record of a case that was just written."""
    stats = [os.stat(folder / (case + suffix)) for suffix in SUFFIXES]
    return {
        "sizes": [stat.st_size for stat in stats],
        "mtimes_ns": [stat.st_mtime_ns for stat in stats],
        "sha256": _digest(folder, case),
    }


def state_of_case(case: str, files: Files, record: Any) -> Literal["whole", "missing", "damaged", "unsure"]:
    """Return what sizes and times say about a case.

    Parameters
    ----------
    case : str
        Its name.
    files : mapping
        As `list_files`.
    record : object
        As `describe` returned it. With other times, or without a record (as in older manifests), a case is 'unsure'.
    """
    there = [files.get(case + suffix) for suffix in SUFFIXES]
    stats = [stat for stat in there if stat is not None]
    if len(stats) < len(there):
        return "missing"
    if not isinstance(record, dict):
        return "unsure"
    if record.get("sizes") != [stat.st_size for stat in stats]:
        return "damaged"
    return "whole" if record.get("mtimes_ns") == [stat.st_mtime_ns for stat in stats] else "unsure"


def look_at(folder: Path, case: str, record: Any) -> dict[str, Any] | None:
    """Return the new record of a case that sizes and times cannot vouch for, or None if it is damaged.

    Its content is compared with the record; without a record it is read.
    """
    try:
        found = describe(folder, case)
        if isinstance(record, dict):
            return found if found["sha256"] == record.get("sha256") else None
        CaseReader(nnUNetDatasetBlosc2, "")(str(folder), [case]).read_all()
    except (OSError, DataError):
        return None
    return found


def remove_case(folder: Path, case: str) -> None:
    """Delete the files of a prepared case; DataError for a name that is not part of a file name."""
    check_case_names([case], folder)
    for suffix in reversed(SUFFIXES):  # first the file that marks a complete case
        (folder / (case + suffix)).unlink(missing_ok=True)


def _digest(folder: Path, case: str) -> str:
    digest = hashlib.sha256()
    for suffix in SUFFIXES:
        with open(folder / (case + suffix), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
