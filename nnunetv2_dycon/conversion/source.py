"""Files of a downloaded collection: their list, and the collection that they look like."""

import os
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from nnunetv2_dycon.conversion.dataset import free_id
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import is_hidden

_JUNK = {"desktop.ini", "thumbs.db", "__macosx"}
NIFTI = r"\.nii(?:\.gz)?"

# Patterns of each collection's files, for paths in lower case with "/"; the first that fits is named.
_LOOKS = (
    (rf"strokecase\d{{4}}[^/]*_(dwi|adc|flair|msk){NIFTI}$", "ISLES-2022", "ISLES22", "0.1"),
    (rf"_(flair|t1|t1ce|t2|seg){NIFTI}$", "BraTS", "BraTS19", "25"),
    (r"(lgemri|laendo)\.nrrd$|mri_norm2\.h5$", "LA (2018 Atrial Segmentation Challenge)", "LA", "8"),
    (rf"(^|/)img\d{{4}}{NIFTI}$", "BTCV", "BTCV", "4"),
    (rf"pancreas_?\d{{4}}|(^|/)image\d{{4}}({NIFTI}|(_norm)?\.h5)$", "Pancreas-NIH", "PancreasNIH", "12"),
    (r"case\d{4}\.npy\.h5$|slice\d{3}\.npz$", "TransUNet's preprocessed BTCV, whose slices and labels differ", "", ""),
    (r"btcv_h5/|\d{4}_(image|label)\.npy$", "a preprocessed BTCV (MagicNet, DHC), whose grid differs", "", ""),
    (r"brats[^/]*\.h5$", "SSL4MIS's preprocessed BraTS, cropped and normalised", "", ""),
    (r"case_\d{3}\.h5$", "a preprocessed ISLES-2022, resized to one shape", "", ""),
)
_DATASET = "dataset.json"  # of nnU-Net, and of the Decathlon
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")


def list_files(source: str | Path, inner: Collection[str] = ()) -> tuple[Path, list[Path]]:
    """Return the root of a collection and all its files, sorted, without files of operating systems.

    Parameters
    ----------
    source : path
        The user's folder. A folder further up works as well, since the whole tree is read.
    inner : collection of str
        Names, in lower case, of folders inside the collection. A `source` of such a name is one level too low:
        its parent is the root.

    Raises
    ------
    DataError
        If it is not a folder, or a link in it leads out of it.
    """
    root = Path(source).expanduser()
    if root.is_file() and root.name.lower().endswith(_ARCHIVES):
        raise DataError(f"{root} is an archive; unpack it, and give the folder that it makes")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; give the folder that holds the collection")
    root = root.resolve()
    while root.name.lower() in inner:
        root = root.parent
    files: list[Path] = []
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not _is_junk(name))
        for name in folders:
            _stays_in(here / name, root)
        real = here.resolve()
        if real in seen:  # a link to a folder that was read already
            folders.clear()
            continue
        seen.add(real)
        files += [here / name for name in sorted(names) if not _is_junk(name)]
    return root, files


def _is_junk(name: str) -> bool:
    return is_hidden(name) or name.lower() in _JUNK


def inside(path: Path, root: Path) -> Path:
    """Return `path`, unless it or a file in it is a link that leaves `root`.

    Raises
    ------
    DataError
        If a link leads out of `root` or to nothing.
    """
    _stays_in(path, root)
    if path.is_dir():
        for entry in path.iterdir():
            _stays_in(entry, root)
    return path


def _stays_in(path: Path, root: Path) -> None:
    if not path.is_symlink():
        return
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise DataError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; put the real file there"
        ) from error
    if not real.is_relative_to(root):
        raise DataError(f"{path} is a link that leaves {root} (to {real}); put the real file or folder there")


def match(files: Iterable[Path], pattern: str) -> list[tuple[Path, re.Match[str]]]:
    """Return the files whose whole name fits `pattern` in any case, and the matches."""
    compiled = re.compile(pattern, re.IGNORECASE)
    found = ((path, compiled.fullmatch(path.name)) for path in files)
    return [(path, fit) for path, fit in found if fit]


def only(kind: str, found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return one file of each case.

    Raises
    ------
    DataError
        If a case has two files; the message names both.
    """
    files: dict[str, Path] = {}
    spelling: dict[str, str] = {}
    for case, path in found:
        first = spelling.setdefault(case.casefold(), case)
        if first in files:
            raise DataError(f"{first} has two files for {kind}: {files[first]} and {path}; remove one")
        files[first] = path
    return files


def looks_like(root: Path, files: Sequence[Path], asked: str = "") -> str:
    """Return the end of an error message: the collection that a tree holds, and its command unless it is `asked`.

    Parameters
    ----------
    root : Path
        Folder that the user named.
    files : sequence of Path
        All files below it.
    asked : str
        Collection that the user asked for.
    """
    if not files:
        return "the folder is empty; give the folder that holds the collection"
    names = ["/".join(path.relative_to(root).parts).lower() for path in files]
    for pattern, title, collection, labeled in _LOOKS:
        if any(re.search(pattern, name) for name in names):
            if asked and collection == asked:
                return f"it looks like a part of {title} without the images; give the whole collection"
            typed = f"nnUNetv2_dycon convert {collection} {shlex.quote(str(root))} --labeled {labeled}"
            return f"it looks like {title}; {f'type: {typed}' if collection else 'it cannot be converted'}"
    of_nnunet = next((path for path in files if path.name == _DATASET), None)
    if of_nnunet is not None:
        return f"it looks like an nnU-Net or Decathlon data set; {_to_split(of_nnunet.parent)}"
    return f"it holds, for example, {files[0].relative_to(root)}; give the folder that holds the collection"


def _to_split(folder: Path) -> str:
    """Return how a data set in nnU-Net's or in the Decathlon's form becomes one with unlabelled cases."""
    try:
        number = dataset_number(folder.name)
    except DataError:
        typed = f"nnUNetv2_convert_MSD_dataset -i {shlex.quote(str(folder))}"
        return f"bring it into nnU-Net's form first ({typed}), then type: nnUNetv2_dycon split --help"
    return f"type: nnUNetv2_dycon split -d {number} --as {free_id(number)} --labeled 0.1"
