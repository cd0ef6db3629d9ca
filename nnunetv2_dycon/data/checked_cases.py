"""Prepared cases, read by nnU-Net's data set classes: a case that cannot be read is one line with its name.

nnU-Net unpickles the properties of a case, which runs code that the file names. Here they are looked at first: a file
that names anything but numpy arrays and plain values is refused.
"""

import os
import pickle
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import file_ending_dataset_mapping, nnUNetBaseDataset

from nnunetv2_dycon.checkpoint import TRUST
from nnunetv2_dycon.errors import DataError, UserError

CASE = "CASE"  # in a command: the name of the case
_PLAIN = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *(("builtins", name) for name in ("complex", "set", "frozenset", "slice", "range", "bytearray")),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}


class CaseReader:
    """Stands where nnU-Net expects a data set class, and makes data sets of that class with checked cases.

    Parameters
    ----------
    stock : type
        nnU-Net's class for the format of the folder.
    command : str
        The command that prepares a case of the folder again; CASE in it becomes the case's name.
    """

    def __init__(self, stock: type[nnUNetBaseDataset], command: str) -> None:
        self.stock = stock
        self.command = command

    def __call__(self, folder: str, identifiers: list[str] | None = None, **options: Any) -> "CheckedCases":
        """Return a data set of the cases of a folder, all or those named."""
        return CheckedCases(self.stock(folder, identifiers, **options), self.command)

    def get_identifiers(self, folder: str) -> list[str]:
        """As nnU-Net's."""
        return self.stock.get_identifiers(folder)

    def unpack_dataset(self, folder: str, **options: Any) -> None:
        """As nnU-Net's, for the format that needs it.

        Raises
        ------
        DataError
            If a case cannot be read.
        """
        try:
            self.stock.unpack_dataset(folder, **options)
        except Exception:
            self(folder).read_all()  # which one was it?
            raise


def folder_reader(folder: Path, command: str) -> CaseReader:
    """Return the reader of a folder of prepared cases, for the format of its files.

    Parameters
    ----------
    folder : Path
        nnU-Net's folder of one data identifier.
    command : str
        As for `CaseReader`.

    Raises
    ------
    DataError
        If the folder is missing or empty, or holds other files than cases of one format.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    formats = {name.rpartition(".")[2]: name for name in names}
    for ending in ("pkl", "npy"):  # of either format
        formats.pop(ending, None)
    strange = [name for ending, name in formats.items() if ending not in file_ending_dataset_mapping]
    if strange:
        path = folder / strange[0]
        raise DataError(f"{path} is not a prepared case; type: rm {shlex.quote(str(path))}")
    if len(formats) != 1:
        found = f"has cases in two formats ({', '.join(formats.values())})" if formats else "has no prepared case"
        raise DataError(f"{folder} {found}; type: {command}")
    return CaseReader(file_ending_dataset_mapping[next(iter(formats))], command)


class CheckedCases:
    """Cases of one folder, as nnU-Net's data set classes give them.

    Parameters
    ----------
    stock : nnUNetBaseDataset
        nnU-Net's data set.
    command : str
        As for `CaseReader`.
    """

    def __init__(self, stock: nnUNetBaseDataset, command: str) -> None:
        self.stock = stock
        self.command = command
        self.identifiers: list[str] = stock.identifiers
        self._looked_at: dict[str, tuple[int, int]] = {}  # size and time of a case's properties

    def load_case(self, case: str) -> tuple["_Array", "_Array", "_Array | None", dict[str, Any]]:
        """Return image, segmentation, that of the stage before, and properties; arrays are read where they are cut.

        Raises
        ------
        DataError
            Here, or when an array is cut: if a file of the case is missing or damaged, or its properties hold objects
            that are not plain.
        """
        with self._reading(case):
            self._look_at_properties(case)
            *arrays, properties = self.stock.load_case(case)
            shapes = {array.shape[1:] for array in arrays if array is not None}
            if len(shapes) > 1:
                raise ValueError("image and segmentation differ in shape")
            if "class_locations" not in properties:
                raise ValueError("it has no class_locations")
        data, seg, previous = (self._watched(case, array) for array in arrays)
        return data, seg, previous, properties

    __getitem__ = load_case

    def _watched(self, case: str, array: Any) -> Any:
        return None if array is None else _Array(array, lambda: self._reading(case))

    def _look_at_properties(self, case: str) -> None:
        """Refuse properties that run code, once for each file: large ones take as long as a patch of a small image."""
        path = os.path.join(self.stock.source_folder, f"{case}.pkl")
        found = os.stat(path)
        if self._looked_at.get(case) != (found.st_size, found.st_mtime_ns):
            check_properties(Path(path))
            self._looked_at[case] = found.st_size, found.st_mtime_ns

    def open_some(self, seconds: float) -> int:
        """Open one case after the other, for so long; returns how many were opened.

        Raises
        ------
        DataError
            If one cannot be opened.
        """
        end = time.monotonic() + seconds
        for number, case in enumerate(self.identifiers):
            if time.monotonic() > end:
                return number
            self.load_case(case)
        return len(self.identifiers)

    def read_all(self) -> None:
        """Read every case whole; DataError if one cannot be read."""
        for case in self.identifiers:
            for array in self.load_case(case)[:2]:
                array[:]

    @contextmanager
    def _reading(self, case: str) -> Iterator[None]:
        try:
            yield
        except (UserError, MemoryError):
            raise
        except FileNotFoundError as error:
            reason = f"{error.filename} is missing" if error.filename else str(error)
            before = self.stock.folder_with_segs_from_previous_stage
            if before is not None and before in reason:
                raise DataError(
                    f"{reason}; train the stage before this one first, with its final validation"
                ) from error
            raise self._unreadable(case, reason) from error
        except OSError as error:  # permissions, or too many open files: preparing again would not help
            raise DataError(f"{error.filename}: {error.strerror}; mend that, and train on with --c") from error
        except Exception as error:  # each format has its own
            raise self._unreadable(case, (str(error).splitlines() or [type(error).__name__])[0][:200]) from error

    def _unreadable(self, case: str, reason: str) -> DataError:
        folder = self.stock.source_folder
        return DataError(
            f"{os.path.join(folder, case)}: the prepared case cannot be read ({reason.replace(folder + os.sep, '')}); "
            f"type: {self.command.replace(CASE, shlex.quote(case))} (then train on with --c)"
        )


class _Array:
    """An array whose parts are read when they are asked for, within `reading`."""

    def __init__(self, array: Any, reading: Callable[[], Any]) -> None:
        self._array = array
        self._reading = reading
        self.shape = array.shape
        self.dtype = array.dtype

    def __getitem__(self, key: Any) -> Any:
        with self._reading():
            part = self._array[key]
            # nnU-Net's transforms write into what they get: here into a file that is open for reading alone
            return np.array(part) if isinstance(part, np.memmap) else part


def check_properties(path: Path) -> None:
    """Raise UnpicklingError for a pickle that names more than arrays and plain values, unless the user trusts files."""
    if os.environ.get(TRUST) == "1":
        return
    with open(path, "rb") as file:
        _PlainUnpickler(file).load()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"its .pkl names {module}.{name}, so to read it means to run code; {TRUST}=1 allows that"
        )
