"""Findings of a check that need no image: roles, file names, labels, number of cases, folds, where it comes from."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_dycon.conversion.dataset import conversion_of
from nnunetv2_dycon.data.dataset_json import FILE
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.data.file_names import other_name_problems, unlabeled_name_problems, unread_folders
from nnunetv2_dycon.data.roles import Roles, stray_labels
from nnunetv2_dycon.data.splits import SPLITS_FILE, STOCK_FOLDS, check_copies, check_splits, read_splits
from nnunetv2_dycon.errors import UserError
from nnunetv2_dycon.files import first_few, list_visible, write_json
from nnunetv2_dycon.findings import Finding


@dataclass(frozen=True)
class RawData:
    """The data set: folder, dataset.json, cases by role, and the label map that each should have."""

    raw: Path
    content: dict[str, Any]
    roles: Roles
    labels: Mapping[str, Path]

    @property
    def role_of(self) -> dict[str, str]:
        """The role of every case."""
        return {case: role for role in ("labeled", "unlabeled", "test") for case in getattr(self.roles, role)}


def look_at_layout(data: RawData, *, fix: bool) -> list[Finding]:
    """Return the findings.

    Parameters
    ----------
    data : RawData
        The data set.
    fix : bool
        Correct "numTraining" in dataset.json.

    Raises
    ------
    WriteError
        If that cannot be written.
    """
    return [
        _roles(data.roles),
        _names(data),
        _unlabeled(data),
        _labels(data),
        _number(data, fix),
        _splits(data),
        _provenance(data),
    ]


def _roles(roles: Roles) -> Finding:
    text = ", ".join(f"{len(getattr(roles, role))} {role}" for role in ("labeled", "unlabeled", "test"))
    if not roles.labeled:
        return Finding("roles", False, f"{text}; put images into imagesTr, and their labels into labelsTr")
    return Finding("roles", True, text)


def _names(data: RawData) -> Finding:
    problems = other_name_problems(data.raw, data.roles, data.content)
    if problems:
        return Finding("file names", False, joined(problems))
    others = unread_folders(data.raw, data.content)
    return Finding("file names", True, f"all are read{f', but for the folders {first_few(others)}' * bool(others)}")


def _unlabeled(data: RawData) -> Finding:
    raw, content, roles = data.raw, data.content, data.roles
    problems = unlabeled_name_problems(raw, roles, content)
    if problems:
        return Finding("unlabelled", False, first_few(problems, separator=" | "))
    hidden = set(roles.unlabeled)
    ending = content["file_ending"]
    for folder in (path for path in sorted(raw.iterdir()) if path.is_dir() and path.name.startswith("labels")):
        found = [path for path in list_visible(folder, ending) if path.name.removesuffix(ending) in hidden]
        if found:
            return Finding("unlabelled", False, f"{found[0]} is a label of an unlabelled case; move it out of {raw}")
    if not hidden:
        return Finding("unlabelled", True, "there are none: only trainers without unlabelled images can be used")
    return Finding("unlabelled", True, f"{len(hidden)} cases without a label")


def _labels(data: RawData) -> Finding:
    missing = [str(data.labels[case]) for case in data.roles.labeled if not data.labels[case].is_file()]
    if missing:
        return Finding("labels", False, f"missing: {joined(missing)}; add them, or move the images to imagesUn")
    stray = stray_labels(data.raw, data.content, data.roles)
    if stray:
        return Finding("labels", False, f"without an image: {joined(stray)}; add the images, or remove the labels")
    without = sum(not data.labels[case].is_file() for case in data.roles.test)
    tests = f"; {without} of {len(data.roles.test)} test cases have none and cannot be scored" if without else ""
    return Finding("labels", True, f"every labelled case has one{tests}")


def _number(data: RawData, fix: bool) -> Finding:
    path, there = data.raw / FILE, len(data.roles.labeled)
    said = data.content.get("numTraining", "missing")
    if said == there and not isinstance(said, bool):
        return Finding("numTraining", True, f"{there}, as many as there are")
    if not fix:
        command = f"nnUNetv2_dycon check -d {dataset_number(data.raw.name)} --fix"
        text = f'"numTraining" of {path} is {said!r}, and there are {there} training cases'
        return Finding("numTraining", False, f"{text}; to correct it type: {command}")
    data.content["numTraining"] = there
    write_json(path, data.content, elsewhere="or correct it by hand")
    return Finding("numTraining", True, f"it was {said!r} in {path} and is {there} now")


def _splits(data: RawData) -> Finding:
    raw, roles = data.raw, data.roles
    path, cases = raw / SPLITS_FILE, len(roles.labeled)
    if not path.is_file():
        return Finding(SPLITS_FILE, True, f"none: {_folds_to_come(cases)}")
    try:
        folds = read_splits(raw)
        check_splits(folds, path, roles.labeled, raw / "imagesTr")
        check_copies(Path(os.environ.get("nnUNet_preprocessed", raw), raw.name), raw)
    except UserError as error:
        return Finding(SPLITS_FILE, False, str(error))
    return Finding(SPLITS_FILE, True, f"{len(folds)} folds" if len(folds) > 1 else "1 fold: train with -f 0")


def _folds_to_come(cases: int) -> str:
    if cases >= STOCK_FOLDS:
        return f"nnU-Net will make {STOCK_FOLDS} folds"
    if cases == 1:
        return "one labelled case is too few for folds: fold 0 of our trainers trains and validates on it"
    return f"{cases} labelled cases are too few for nnU-Net's {STOCK_FOLDS} folds: our trainers make one fold per case"


def _provenance(data: RawData) -> Finding:
    """Compare the roles with conversion.json; a data set without this file passes."""
    cases, role_of = conversion_of(data.raw).get("cases"), data.role_of
    if not cases:
        return Finding("conversion.json", True, "none: nothing is recorded about where the cases come from")
    recorded = {case: {"validation": "labeled"}.get(entry["role"], entry["role"]) for case, entry in cases.items()}
    for case in sorted(recorded.keys() | role_of.keys()):
        if recorded.get(case) != role_of.get(case):
            return Finding(
                "conversion.json",
                False,
                f"{case!r} was written as {recorded.get(case, 'nothing')} and is now {role_of.get(case, 'gone')}; "
                "undo that, or delete conversion.json if you changed it on purpose",
            )
    return Finding("conversion.json", True, f"{len(recorded)} cases in the roles that were written")


def joined(problems: Sequence[object]) -> str:
    """Return the first problems for one line."""
    return first_few(problems, separator=" | ")
