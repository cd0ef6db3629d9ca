"""A change of several files of a raw data set that is carried out wholly: a killed run is finished by the next one.

New files wait in the hidden folder `.annotate` of the data set. The journal in it, written last, names every move. From
then on the change is decided: whoever comes next carries it out before anything else. Until then nothing has changed.
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import read_json, sync, write_json, write_text, writing

FOLDER, JOURNAL = ".annotate", "journal.json"


class Change(NamedTuple):
    """Cases that change, moves of files inside the data set (from, to), and texts of files to write (path, text)."""

    cases: tuple[str, ...]
    moves: tuple[tuple[str, str], ...]
    texts: tuple[tuple[str, str], ...]


def stage(raw: Path, source: Path, name: str) -> str:
    """Copy a user's file to where it waits, by its path inside the data set, which is returned."""
    folder = raw / FOLDER
    with writing(folder):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / name)
        sync(folder / name)
    return f"{FOLDER}/{name}"


def decide(raw: Path, change: Change) -> None:
    """Write the journal: from now on the change is carried out, by this run or a later one."""
    write_json(raw / FOLDER / JOURNAL, change._asdict())


def carry_out(raw: Path) -> tuple[str, ...]:
    """Carry out a change that was decided, and return its cases; without one remove what waits and return none.

    Each step can be repeated, so that it does not matter where an earlier run ended.

    Raises
    ------
    DataError
        If the journal cannot be read, a file to move is gone, or nothing can be written.
    """
    folder = raw / FOLDER
    if not (folder / JOURNAL).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # copies of files that their owner still has
        return ()
    content = read_json(folder / JOURNAL, "restore it: it says which files are to be moved")
    change = _change(content, folder / JOURNAL)
    with writing(raw):
        for source, target in change.moves:
            _move(raw / source, raw / target)
        for path, text in change.texts:
            write_text(Path(path), text)
        sync(raw)
    shutil.rmtree(folder)
    return change.cases


def _change(content: Any, path: Path) -> Change:
    try:
        return Change(
            tuple(map(str, content["cases"])),
            tuple((str(one), str(other)) for one, other in content["moves"]),
            tuple((str(one), str(other)) for one, other in content["texts"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a journal of annotate; restore it") from error


def _move(source: Path, target: Path) -> None:
    if not os.path.lexists(source):
        if os.path.lexists(target):  # an earlier run did it
            return
        raise DataError(
            f"{source} is gone, and {target} is not there; restore one of them, then type the command again"
        )
    target.parent.mkdir(exist_ok=True)
    os.replace(source, target)
    for folder in (target.parent, source.parent):
        sync(folder)
