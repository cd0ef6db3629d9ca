"""A new raw data set of nnU-Net, built in a hidden folder and renamed when it is complete.

While it is built, everything is in the hidden folder `.DatasetXXX_Name.converting` next to the data set's folder.
nnU-Net does not see it:

- `data/`: the future data set; every file in it is complete, since it is renamed into place;
- `records/CASE.json`: written last, so it marks a complete case;
- `stamp`: identifies the data set that is built; with another stamp a killed run is not continued but started again;
- `old/`: for a moment, the data set that is replaced.

A killed run leaves this folder, and the next run of the same command continues with it. An error removes it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.files import PART, read_json, sync, write_text, writing
from nnunetv2_dycon.folders import VARIABLES, unset
from nnunetv2_dycon.locks import locked

IMAGES = {"labeled": "imagesTr", "validation": "imagesTr", "unlabeled": "imagesUn", "test": "imagesTs"}
LABELS = {"labeled": "labelsTr", "validation": "labelsTr", "test": "labelsTs"}
FOLDERS = ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs")
COMMAND_FILE = "workflow.json"  # where scripts/workflow notes the command that wrote the data set
_STAMP = "stamp"
FILES = ("dataset.json", "splits_final.json", "conversion.json")
_LAST_ID = 999
ELSEWHERE = "or let nnUNet_raw point elsewhere"
_ID_OPTIONS = {"split": "--as", "self_train": "--as"}  # of other commands it is -d


@dataclass(frozen=True)
class Workspace:
    """Folder in which a data set is built."""

    work: Path

    @property
    def data(self) -> Path:
        """The future data set."""
        return self.work / "data"

    @property
    def records(self) -> Path:
        """One file per complete case."""
        return self.work / "records"


def workspace(folder: Path) -> Workspace:
    """Return the workspace of the data set at `folder`."""
    return Workspace(folder.with_name(f".{folder.name}.converting"))


def new_folder(dataset_id: int, name: str, option: str = "-d") -> Path:
    """Return the folder of a new data set in nnUNet_raw.

    Parameters
    ----------
    dataset_id : int
        1 to 999.
    name : str
        Its name after the id.
    option : str
        The option by which the user gave the id, for messages.

    Raises
    ------
    ConfigError
        If the id is out of range.
    DataError
        If nnUNet_raw is not set, or the id belongs to another data set in any of nnU-Net's folders.
    """
    raw = nnUNet_raw.get()
    if not raw:
        raise DataError(unset("nnUNet_raw"))
    if not 1 <= dataset_id <= _LAST_ID:
        raise ConfigError(f"{option} {dataset_id}: an id is a number from 1 to {_LAST_ID}; {_free(1, option)}")
    folder = Path(raw) / f"Dataset{dataset_id:03d}_{name}"
    others = [found for found in find_candidate_datasets(dataset_id) if found != folder.name]
    if others:
        place = next(path for path in _places(others[0]) if path.is_dir())
        raise DataError(f"{option} {dataset_id} belongs to {place}; {_free(dataset_id, option)}")
    return folder


def _places(name: str) -> list[Path]:
    """Return where a data set of this name may be: nnU-Net's three folders, where they are set."""
    return [Path(value) / name for value in map(os.environ.get, VARIABLES) if value]


def free_id(dataset_id: int) -> int | None:
    """Return the next id, from `dataset_id` on, that no data set has in any of nnU-Net's folders; None without one."""
    following = (*range(dataset_id, _LAST_ID + 1), *range(1, dataset_id))
    return next((number for number in following if not len(find_candidate_datasets(number))), None)


def _free(dataset_id: int, option: str) -> str:
    free = free_id(dataset_id)
    return "all ids are taken; remove a data set" if free is None else f"choose a free id: {option} {free}"


def conversion_of(folder: Path) -> dict[str, Any]:
    """Return the content of a data set's conversion.json; empty if it cannot be read, or is not such a file."""
    try:
        content = read_json(folder / "conversion.json")
    except DataError:
        return {}
    return content if isinstance(content, dict) and _are_cases(content.get("cases", {})) else {}


def _are_cases(cases: Any) -> bool:
    return isinstance(cases, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("role"), str) and _are_names(entry.get("written", []))
        for entry in cases.values()
    )


def _are_names(written: Any) -> bool:
    return isinstance(written, list) and all(isinstance(name, str) for name in written)


def check_free(folder: Path, *, made_by: str, overwrite: bool) -> None:
    """Refuse to replace a data set that must stay.

    Parameters
    ----------
    folder : Path
        The data set's folder.
    made_by : str
        Name of the converter.
    overwrite : bool
        Whether a data set of the same converter may be replaced.

    Raises
    ------
    DataError
        If `folder` exists and was written by something else, or holds files that were added later, or `overwrite` is
        not set. --overwrite is advised only where it will do.
    """
    if not folder.exists():
        return
    elsewhere = _free(dataset_number(folder.name), _ID_OPTIONS.get(made_by, "-d"))
    conversion = conversion_of(folder)
    if conversion.get("converter") != made_by:
        raise DataError(f"{folder} exists and was not written by this command, so it is left alone; {elsewhere}")
    added = next(_added(folder, conversion), None)
    if added is not None:
        raise DataError(f"{added} was added later and would be lost; move it away first, or {elsewhere}")
    if not overwrite:
        raise DataError(f"{folder} exists; type the command again with --overwrite to replace it, or {elsewhere}")


def _added(folder: Path, conversion: Mapping[str, Any]) -> Iterator[Path]:
    # a file that no list names counts as added: a data set of a version without lists is left alone
    written = (entry.get("written", ()) for entry in conversion.get("cases", {}).values())
    own = {*FILES, COMMAND_FILE}.union(*written)
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        if place not in (FOLDERS if path.is_dir() else own):
            yield path


@contextmanager
def building(folder: Path, *, stamp: str, made_by: str, overwrite: bool) -> Iterator[Workspace]:
    """Give a workspace, and rename its `data` to `folder` when the block ends without an error.

    Parameters
    ----------
    folder : Path
        The data set's folder.
    stamp : str
        Changes with everything that decides the content; the work of a killed run with the same stamp is kept.
    made_by : str
        Name of the converter, in conversion.json under "converter".
    overwrite : bool
        Replace a data set that the same converter made. The old one stays until the new one is whole.

    Raises
    ------
    DataError
        As `check_free`; if another run builds the same data set.
    WriteError
        If nnUNet_raw cannot be written; nothing incomplete is left.
    """
    space = workspace(folder)
    if not space.work.exists():  # refused before anything is made
        check_free(folder, made_by=made_by, overwrite=overwrite)
    with writing(folder, ELSEWHERE), _claimed(space.work):
        _refuse_foreign(space.work)
        _settle(folder, space.work)
        check_free(folder, made_by=made_by, overwrite=overwrite)
        try:
            _prepare(space, stamp)
            yield space
            _put_in_place(folder, space)
        except Exception:
            _discard(space.work)
            raise


@contextmanager
def _claimed(work: Path) -> Iterator[None]:
    """Make the hidden folder, and keep other runs out of it."""
    with ExitStack() as stack:
        while True:  # another run may end, and remove it, between any two of these lines
            work.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                handle = stack.enter_context(locked(work, _busy(work)))
                if handle is None or os.path.samestat(os.fstat(handle), os.stat(work)):
                    break
            stack.close()
        yield


def _discard(work: Path) -> None:
    """Remove the hidden folder; the stamp, by which it is known for ours, goes last."""
    for folder in (work / "data", work / "records", work / "old", work):
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_foreign(work: Path) -> None:
    """Refuse a folder with files that no run made there: all of it is deleted in the end."""
    own = {"data", "records", "old", _STAMP}
    found = sorted(entry.name for entry in os.scandir(work) if entry.name not in own and PART not in entry.name)
    if work.is_symlink() or found or (os.listdir(work) and not (work / _STAMP).is_file()):
        raise DataError(f"{work / found[0] if found else work} was not made by this command; move it away first")


def _prepare(space: Workspace, stamp: str) -> None:
    if not _is_stamped(space.work, stamp):
        for folder in (space.data, space.records):
            shutil.rmtree(folder, ignore_errors=True)
        write_text(space.work / _STAMP, stamp, ELSEWHERE)
    for folder in (*(space.data / name for name in FOLDERS), space.records):
        folder.mkdir(parents=True, exist_ok=True)
    for part in space.data.glob("*/.*"):  # left by a killed run
        part.unlink()


def _is_stamped(work: Path, stamp: str) -> bool:
    note = work / _STAMP
    return note.is_file() and note.read_text() == stamp


def settle(folder: Path, stamp: str) -> None:
    """Restore a data set that a killed run was replacing, and remove the workspace of a finished run of this `stamp`.

    For a data set that needs no more work; `building` restores on its own.
    """
    work = workspace(folder).work
    if not work.exists():
        return
    with suppress(FileNotFoundError), locked(work, _busy(work)):  # another run may remove it at any time
        _refuse_foreign(work)
        _settle(folder, work)
        if folder.exists() and _is_stamped(work, stamp) and not (work / "data").exists():
            _discard(work)


def _settle(folder: Path, work: Path) -> None:
    if not (work / "old").exists():
        return
    if folder.exists():  # killed after the new one was in place
        shutil.rmtree(work / "old")
    else:
        _rename(work / "old", folder)


def _put_in_place(folder: Path, space: Workspace) -> None:
    if folder.exists():
        _rename(folder, space.work / "old")
    try:
        _rename(space.data, folder)
    except OSError:
        _settle(folder, space.work)
        raise
    _discard(space.work)


def _rename(folder: Path, name: Path) -> None:
    os.rename(folder, name)
    sync(name.parent)


def stale_preparation(folder: Path) -> Path | None:
    """Return the preprocessed folder of a data set, if there is one: a new data set makes it outdated."""
    preprocessed = nnUNet_preprocessed.get()
    prepared = Path(preprocessed) / folder.name if preprocessed else None
    return prepared if prepared is not None and prepared.exists() else None


def _busy(work: Path) -> str:
    return f"another run is writing {work}: wait for it to end"
