"""A change of several files of a raw data set that is carried out wholly: a killed run is finished by the next one.

New files wait in the hidden folder `.annotate` of the data set. The journal in it, written last, names every move. From
then on the change is decided: whoever comes next carries it out before anything else. Until then nothing has changed.
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_dycon.data.splits import SPLITS_FILE
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import read_json, sync, write_json, write_text, writing

FOLDER, JOURNAL = ".annotate", "journal.json"
_STAMP = "stamp"  # by which the folder is known for ours
_PLACES = {(source, target) for source in ("imagesUn", FOLDER) for target in ("imagesTr", "labelsTr")}


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
        (folder / _STAMP).touch()
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
        If the journal cannot be read or names files of others, the folder was made by somebody else, a file to move is
        gone, or nothing can be written.
    """
    folder = raw / FOLDER
    if not (folder / JOURNAL).is_file() or folder.is_symlink():
        _remove_waiting(folder)
        return ()
    content = read_json(folder / JOURNAL, "restore it: it says which files are to be moved")
    change = _change(content, folder / JOURNAL)
    _check_places(raw, change)
    with writing(raw):
        for source, target in change.moves:
            _move(raw / source, raw / target)
        for path, text in change.texts:
            write_text(Path(path), text)
        sync(raw)
    shutil.rmtree(folder)
    return change.cases


def _remove_waiting(folder: Path) -> None:
    """Remove what a run left that decided nothing: copies of files that their owner still has; the stamp goes last."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or ((there := os.listdir(folder)) and _STAMP not in there):
        raise DataError(f"{folder} was not made by this command; move it away")
    with writing(folder):
        for name in sorted(there, key=_STAMP.__eq__):
            os.remove(folder / name)
        folder.rmdir()


def _check_places(raw: Path, change: Change) -> None:
    """Refuse a journal by which a file would go, or be written, where annotate puts none.

    It came with the data set, perhaps from somebody else.
    """
    journal = raw / FOLDER / JOURNAL
    for source, target in change.moves:
        parts = (*Path(source).parts, *Path(target).parts)
        if len(parts) != 4 or parts[::2] not in _PLACES or ".." in parts:
            raise DataError(f"{journal} moves {source!r} to {target!r}, which annotate does not; restore it")
    preprocessed = Path(os.environ.get("nnUNet_preprocessed", ""), raw.name)
    ours = {path.resolve() for path in (raw / "dataset.json", raw / SPLITS_FILE, preprocessed / SPLITS_FILE)}
    for path, _ in change.texts:
        if Path(path).resolve() not in ours:
            raise DataError(
                f"{journal} writes {path!r}, which is not a file of this data set; restore it, or correct the variable "
                "nnUNet_preprocessed"
            )


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
