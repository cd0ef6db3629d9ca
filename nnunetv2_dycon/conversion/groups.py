"""The subject of each case, from a table or a JSON file: scans of one subject must not be divided."""

import csv
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from nnunetv2_dycon.errors import SplitError
from nnunetv2_dycon.files import read_json

CASE_COLUMNS = ("case", "case_id", "scan", "image")
SUBJECT_COLUMNS = ("subject", "subject_id", "patient", "patient_id", "group")
_FORM = 'give a table whose first line is "case,subject", or JSON {case: subject}'


def read_groups(path: Path, canonical: Callable[[str], str], training: Collection[str]) -> dict[str, str]:
    """Return the subject of each case.

    A table has a column of cases and one of subjects, found by their names in the first line. Without names there must
    be two columns, cases first.

    Parameters
    ----------
    path : Path
        JSON ``{case: subject}`` or a table with commas, semicolons, tabs or spaces.
    canonical : callable
        Brings a case as the file writes it into the form of case names.
    training : collection of str
        Cases that must have a subject.

    Raises
    ------
    SplitError
        If the file cannot be read in one way only, a case has two subjects or none.
    """
    pairs = _mapping(path) if path.suffix.lower() == ".json" else _table(path)
    groups: dict[str, str] = {}
    for case, subject in ((canonical(case), subject.strip()) for case, subject in pairs):
        if groups.setdefault(case, subject) != subject:
            raise SplitError(f"--groups {path} has two subjects for {case!r}: {groups[case]} and {subject}; keep one")
    lacking = sorted(case for case in training if not groups.get(case))
    if lacking:
        raise SplitError(f"--groups {path} has no subject for {lacking[0]!r} ({len(lacking)} cases in all); add them")
    return {case: subject for case, subject in groups.items() if subject}


def _mapping(path: Path) -> list[tuple[str, str]]:
    content = read_json(path, f"for --groups {_FORM}", SplitError)
    if not isinstance(content, dict):
        raise SplitError(f"--groups {path} is not a mapping; {_FORM}")
    for case, subject in content.items():
        if not isinstance(subject, str | int):
            raise SplitError(f"--groups {path}: the subject of {case!r} is not a text or a whole number; {_FORM}")
    return [(case, str(subject)) for case, subject in content.items()]


def _table(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(text.splitlines(), csv.Sniffer().sniff(text, ",;\t ")))
    except (OSError, ValueError, csv.Error) as error:
        raise SplitError(f"--groups {path} cannot be read ({error}); {_FORM}") from error
    lines = {number: row for number, row in enumerate(rows, 1) if any(cell.strip() for cell in row)}
    if not lines:
        raise SplitError(f"--groups {path} is empty; {_FORM}")
    first = next(iter(lines))
    header = lines[first]
    for number, row in lines.items():
        if len(row) != len(header):
            raise SplitError(
                f"--groups {path}: line {number} has {len(row)} columns and line {first} has {len(header)}; {_FORM}"
            )
    case, subject, named = _columns(path, header)
    return [(row[case], row[subject]) for number, row in lines.items() if not (named and number == first)]


def _columns(path: Path, header: Sequence[str]) -> tuple[int, int, bool]:
    """Return the columns of cases and subjects, and whether the first line has their names."""
    cells = [cell.strip().lower() for cell in header]
    found: Mapping[str, list[int]] = {
        kind: [i for i, cell in enumerate(cells) if cell in names]
        for kind, names in (("case", CASE_COLUMNS), ("subject", SUBJECT_COLUMNS))
    }
    cases, subjects = found["case"], found["subject"]
    if len(cells) == 2 and len(cases) + len(subjects) == 1:  # the other column is clear
        cases, subjects = cases or [1 - subjects[0]], subjects or [1 - cases[0]]
    if len(cases) == len(subjects) == 1:
        return cases[0], subjects[0], True
    if len(cells) == 2 and not cases and not subjects:
        return 0, 1, False
    raise SplitError(
        f"--groups {path} has the columns {', '.join(header)}: it is not clear which are cases and subjects; name one "
        'column "case" and one "subject" in the first line'
    )
