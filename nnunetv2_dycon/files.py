"""Files that are whole or absent: written under a temporary name, brought to the disk, then renamed.

One promise for every file of this package. Another process sees the previous file until the new one is complete; after
a power cut the file has its old or its new content; two processes never share a temporary name; a write that fails
leaves nothing behind.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunetv2_dycon.errors import DataError, UserError, WriteError
from nnunetv2_dycon.locks import lock_if_free

_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota
ELSEWHERE = "or choose another folder"  # ends errors about writing
PART = ".part"  # ends temporary names, which begin with a dot: nnU-Net and our own listings pass over them
_OLD = ".old"  # in its place in the name of a folder that is being replaced


@contextmanager
def whole_file(path: Path, elsewhere: str = ELSEWHERE) -> Iterator[Path]:
    """Give a temporary path in the same folder; on leaving without an error it becomes `path`.

    The temporary name keeps the ending of `path` (`.nii.gz`, `.png`), by which writers choose the format.

    Parameters
    ----------
    path : Path
        The file to write; its folder exists.
    elsewhere : str
        What else the user can do; ends the error message.

    Raises
    ------
    WriteError
        If the disk is full, or the folder cannot be written.
    """
    part = temporary_name(path)
    with writing(path, elsewhere):
        try:
            yield part
            place(part, path)
        finally:
            with suppress(OSError):  # it is not there; a read-only disk says so in another way
                part.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder next to `path`; on leaving without an error it becomes `path`.

    A folder that is there stays until the new one is complete, and is replaced then. What killed processes left of the
    same path is removed first, as by `scratch_folder`.

    Parameters
    ----------
    path : Path
        The folder to write; its parent is made where it is missing.

    Raises
    ------
    WriteError
        If the disk is full, or the parent cannot be written.
    """
    with writing(path), scratch_folder(path) as part:
        old = part.with_name(part.name.replace(PART, _OLD, 1))
        try:
            yield part
            for inner in (*part.rglob("*"), part):
                sync(inner)
            if path.exists():
                os.rename(path, old)
            os.rename(part, path)
            sync(path.parent)
        except WriteError as error:  # names a file of the temporary folder
            raise error.__cause__ or error from None
        finally:
            if old.exists() and not path.exists():
                os.rename(old, path)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give an empty hidden folder next to `path`, which is removed in the end.

    Those that killed processes left for the same path are removed first; the lock on a folder tells whether its process
    lives. A folder that such a process was replacing gets its name back.

    Parameters
    ----------
    path : Path
        What the folder is for; its parent is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(path)
    with ExitStack() as stack:
        part = _claimed_folder(path, stack)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _claimed_folder(path: Path, stack: ExitStack) -> Path:
    while True:  # another process may take it for a dead one's before it is locked
        part = temporary_name(path)
        part.mkdir()
        with suppress(FileNotFoundError):
            if stack.enter_context(lock_if_free(part)) is not False and part.exists():
                return part
        stack.close()


def remove_dead(path: Path) -> None:
    """Remove the hidden folders that killed processes left for `path`; one that was being replaced has its name again.

    Parameters
    ----------
    path : Path
        As for `scratch_folder`.
    """
    name = glob.escape(path.name)
    for part in path.parent.glob(f".????????{PART}.{name}"):
        if part.is_dir():
            with suppress(FileNotFoundError), lock_if_free(part) as held:
                if held:
                    shutil.rmtree(part, ignore_errors=True)
    for old in path.parent.glob(f".????????{_OLD}.{name}"):
        if old.with_name(old.name.replace(_OLD, PART, 1)).exists():  # being replaced right now
            continue
        with suppress(FileNotFoundError):
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(old, path)


def place(part: Path, path: Path) -> None:
    """Give a complete file its name; its content and its new name are on the disk afterwards."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def temporary_name(path: Path) -> Path:
    """Return a name next to `path` that no other process uses: hidden, with the endings of `path`."""
    return path.with_name(f".{secrets.token_hex(4)}{PART}.{path.name}")


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete temporary files of `name` that killed processes left; for the only process that writes it."""
    for part in folder.glob(f".????????{PART}.{name}"):
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, elsewhere: str = ELSEWHERE) -> None:
    """Write a file, whole or not at all; `elsewhere` as in `whole_file`."""
    with whole_file(path, elsewhere) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str, elsewhere: str = ELSEWHERE) -> None:
    """Write a UTF-8 file, whole or not at all; line ends as given, `elsewhere` as in `whole_file`."""
    write_bytes(path, text.encode(), elsewhere)


def write_json(path: Path, content: Any, *, sort_keys: bool = False, elsewhere: str = ELSEWHERE) -> None:
    """Write JSON that a person can read, whole or not at all.

    Parameters
    ----------
    path : Path
        The file.
    content : object
        Anything that JSON can hold.
    sort_keys : bool
        Write keys in alphabetical order.
    elsewhere : str
        As in `whole_file`.
    """
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    write_text(path, text, elsewhere)


def read_json(path: Path, mend: str = "restore it", error: type[UserError] = DataError) -> Any:
    """Return the content of a JSON file.

    Parameters
    ----------
    path : Path
        A UTF-8 file, with or without a byte order mark.
    mend : str
        What the user can do; ends the error message.
    error : type
        Class of the error.

    Raises
    ------
    DataError
        Or `error`: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror}); {mend}") from reason
    except ValueError as reason:  # not JSON, or not UTF-8
        raise error(f"{path} cannot be read (not JSON: {reason}); {mend}") from reason


def read_json_object(path: Path, mend: str = "restore it", error: type[UserError] = DataError) -> dict[str, Any]:
    """Return the content of a JSON file that holds {...}; parameters and errors as those of `read_json`."""
    content = read_json(path, mend, error)
    if not isinstance(content, dict):
        raise error(f"{path} is not a JSON object; {mend}")
    return content


def is_hidden(name: str) -> bool:
    """Return whether systems hide a file or folder of this name; it is nobody's data, like the `._` files of macOS."""
    return name.startswith(".")


def list_visible(folder: Path, ending: str = "") -> list[Path]:
    """Return the files in a folder, sorted, without hidden ones and folders; none if it is not a folder.

    Parameters
    ----------
    folder : Path
        The folder.
    ending : str
        End of the names.
    """
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if entry.name.endswith(ending) and not is_hidden(entry.name) and not entry.is_dir()
        ]
    return [folder / name for name in sorted(names)]


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_digest(content: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal, whatever the order of its keys."""
    return text_digest(json.dumps(content, sort_keys=True))


def check_case_names(names: Iterable[object], source: str | Path, error: type[UserError] = DataError) -> None:
    """Refuse case names that could lead out of the folder of their files.

    Parameters
    ----------
    names : iterable
        Names as they were read.
    source : str or Path
        The file or option that they come from, for the message.
    error : type
        Class of the error.

    Raises
    ------
    UserError
        Of the class `error`, for the first name that is not a text of one path component, or that would hide its files.
    """
    for name in names:
        if not isinstance(name, str) or not name or is_hidden(name) or not name.isprintable() or set(name) & set("/\\"):
            raise error(
                f"{source} names a case {name!r:.80}, but a case name is part of a file name: it does not begin with a "
                "dot and has no slash, backslash, tab or line end; rename the case"
            )


def first_few(items: Sequence[object], limit: int = 3, separator: str = ", ") -> str:
    """Return the first items for a message, and how many more there are.

    Parameters
    ----------
    items : sequence
        What to list.
    limit : int
        Largest number of items to show.
    separator : str
        Text between two items.

    Examples
    --------
    >>> first_few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    texts = map(str, items[:limit])
    shown = separator.join(text if text.isprintable() else repr(text) for text in texts)  # on one line
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


@contextmanager
def writing(path: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Turn errors of the operating system about writing `path` into one line.

    Raises
    ------
    WriteError
        In place of an OSError, with the free space of a full disk; `elsewhere` says what else the user can do.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, elsewhere) from error


def cannot_write(path: Path, error: OSError, elsewhere: str = ELSEWHERE) -> WriteError:
    """Return one line about a file that cannot be written; where the disk is full, with its free space.

    Parameters
    ----------
    path : Path
        What was to be written.
    error : OSError
        What the operating system said.
    elsewhere : str
        What else the user can do.
    """
    reason, mend = error.strerror or str(error), "check its permissions"
    if error.errno in _FULL:
        there = next((folder for folder in path.parents if folder.exists()), Path())
        with suppress(OSError):
            reason += f" ({shutil.disk_usage(there).free / 1e6:.1f} MB are free)"
        mend = "make room"
    return WriteError(f"cannot write {path}: {reason}; {mend}, {elsewhere}")
