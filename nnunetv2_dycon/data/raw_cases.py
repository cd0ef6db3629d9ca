"""The cases of a raw data set with their images, and the true labels that may be opened."""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_dycon.data.roles import Roles, label_paths, read_roles
from nnunetv2_dycon.data.splits import UNLABELED, read_splits
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few


@dataclass(frozen=True)
class RawCases:
    """Cases of a raw data set.

    Attributes
    ----------
    folder : Path
        The raw data set.
    json : mapping
        Content of its dataset.json.
    roles : Roles
        Its cases by role and their images.
    hidden : frozenset of str
        Cases of imagesTr that a fold uses without labels: theirs are not opened either.
    """

    folder: Path
    json: Mapping[str, Any]
    roles: Roles
    hidden: frozenset[str]

    def truth(self, case: str) -> Path | None:
        """Return the label map of a labelled or test case; None for an unlabelled one, and where there is none."""
        path = None if case in self.hidden else label_paths(self.folder, self.json, self.roles).get(case)
        return path if path is not None and path.is_file() else None

    @property
    def labeled(self) -> tuple[str, ...]:
        """Cases of imagesTr whose labels may be opened."""
        return tuple(case for case in self.roles.labeled if case not in self.hidden)

    def check(self, cases: Iterable[str]) -> tuple[str, ...]:
        """Return the cases.

        Raises
        ------
        DataError
            If the data set has none of that name; the message has the most similar ones.
        """
        known = sorted(self.roles.files)
        for case in cases:
            if case not in self.roles.files:
                near = difflib.get_close_matches(case, known, 3, 0.5) or known
                raise DataError(f"{self.folder.name} has no case {case!r}; the nearest names are {first_few(near)}")
        return tuple(cases)


def raw_cases(folder: Path, content: Mapping[str, Any]) -> RawCases:
    """Return the cases of a raw data set.

    Parameters
    ----------
    folder : Path
        The raw data set.
    content : mapping
        Content of its dataset.json.

    Raises
    ------
    SplitError, DataError
        If a case has two roles, or a split file is wrong.
    """
    base = os.environ.get("nnUNet_preprocessed")
    preprocessed = Path(base, folder.name) if base else folder
    splits = read_splits(preprocessed, folder)
    hidden = frozenset(case for fold in splits for case in fold.get(UNLABELED, ()))
    return RawCases(folder, content, read_roles(folder, content), hidden)
