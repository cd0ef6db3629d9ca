"""The Decathlon's hippocampus data as a raw data set for the demo."""

import shutil
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import whole_folder, write_json


def _unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpack an archive of files and folders; DataError, and nothing is written, where it holds anything else.

    Looked at here, since Python has a filter for this only from 3.10.12 and 3.11.4 on.
    """
    for info in archive.getmembers():
        inside = (folder / info.name).resolve().is_relative_to(folder.resolve())
        if not inside or not (info.isreg() or info.isdir()):
            raise DataError(
                f"--task04 {archive.name} is not the published archive: {info.name!r} in it is a link, a device or a "
                "place outside; download it again. Nothing was written."
            )
    checked = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    archive.extractall(folder, **checked)


@contextmanager
def task04_files(path: Path) -> Iterator[dict[str, tuple[Path, Path]]]:
    """Image and label of every case of the Decathlon's Task04, from its folder or archive."""
    with TemporaryDirectory() as scratch:
        if path.is_file():
            try:
                with tarfile.open(path) as archive:
                    _unpack(archive, Path(scratch))
            except tarfile.TarError:
                raise DataError(
                    f"--task04 {path} is not an archive: give Task04_Hippocampus.tar or its folder."
                ) from None
        root = Path(scratch) if path.is_file() else path
        labels = {p.name: p for p in root.rglob("labelsTr/hippocampus_[0-9][0-9][0-9].nii.gz")}
        images = {p.name: p for p in root.rglob("imagesTr/hippocampus_[0-9][0-9][0-9].nii.gz")}
        if len(labels.keys() & images.keys()) < 20:
            raise DataError(f"--task04 {path} has no imagesTr and labelsTr of 20 or more hippocampus_NNN.nii.gz.")
        for name in sorted(labels.keys() ^ images.keys()):
            print(f"left out: {name} has no {'label' if name in images else 'image'}")
        yield {n.removesuffix(".nii.gz"): (images[n], labels[n]) for n in sorted(labels.keys() & images.keys())}


def fits(case: str, image: Path, label: Path) -> bool:
    """Some copies of this archive hold planted errors: whole heads in place of the cut-out."""
    shape, other = nib.load(image).shape, nib.load(label).shape
    good = shape == other and len(shape) == 3 and max(shape) <= 100
    if not good:
        print(f"left out: {case} has shapes {shape} (image) and {other} (label)")
    return good


def deal_pairs(cases: list[str], sizes: dict[str, int], seed: int) -> dict[str, str]:
    """Role of each case; both sides of a subject (ids 2k-1 and 2k) get the same one, whole pairs at random."""
    pairs = defaultdict(list)
    for case in cases:
        pairs[(int(case.rsplit("_", 1)[1]) + 1) // 2].append(case)
    order = [pairs[k] for k in np.random.default_rng(seed).permutation(sorted(pairs))]
    roles: dict[str, str] = {}
    for role, size in sizes.items():
        chosen: list[str] = []
        while order and len(chosen) < size:
            chosen += order.pop()
        roles |= dict.fromkeys(chosen[:size], role)  # the odd one out has no role
    return roles


def make_hippocampus(raw: Path, path: Path, labeled: int) -> None:
    """Raw data set from the Decathlon's hippocampus data: labelled, 100 unlabelled, 40 test cases."""
    with task04_files(path) as files, whole_folder(raw) as part:
        _lay_out(files, part, labeled)


def _lay_out(files: dict[str, tuple[Path, Path]], part: Path, labeled: int) -> None:
    """Write the data set into an empty folder."""
    cases = [case for case, pair in files.items() if fits(case, *pair)]
    roles = deal_pairs(cases, {"Ts": 40, "Tr": labeled, "Un": 100}, seed=0)
    for name in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs"):
        (part / name).mkdir(parents=True)
    for case, role in roles.items():
        shutil.copyfile(files[case][0], part / f"images{role}" / f"{case}_0000.nii.gz")
        if role != "Un":
            shutil.copyfile(files[case][1], part / f"labels{role}" / f"{case}.nii.gz")
    training = sorted(case for case, role in roles.items() if role == "Tr")
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(training),
        "file_ending": ".nii.gz",
        "licence": "CC-BY-SA 4.0",
        "reference": "Medical Segmentation Decathlon, Task04_Hippocampus",
    }
    write_json(part / "dataset.json", dataset)
    # as for the phantom: all labels train, the same cases are watched, only test cases measure
    write_json(part / "splits_final.json", [{"train": training, "val": training}])
