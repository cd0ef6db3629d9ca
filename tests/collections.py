"""Tiny trees in exactly the layouts of the public collections, with their quirks, and what is in them.

Arrays have axes (X, Y, Z); affines lead to millimetres in RAS+. Content is a function of the case's name.
"""

import json
import locale
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Truth(NamedTuple):
    """A case: its channels as the data set must hold them, label map in the values of the data set, geometry."""

    images: tuple[np.ndarray, ...]
    label: np.ndarray
    affine: np.ndarray


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def blob(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """A box of ones off the centre, so that no turn of it is itself."""
    mask = np.zeros(shape, np.uint8)
    start = [int(rng.integers(1, n // 3)) for n in shape]
    mask[tuple(slice(s, s + n // 3) for s, n in zip(start, shape, strict=True))] = 1
    return mask


def oblique(
    spacing: Sequence[float], origin: Sequence[float], degrees: float = 12, signs: Sequence[int] = (-1, 1, 1)
) -> np.ndarray:
    """Affine with axes turned about two directions."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.diag(np.multiply(spacing, signs))
    affine[:3, 3] = origin
    return affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, codes: tuple[int, int] = (1, 1)) -> None:
    """Write with the form codes (q, s)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    nib.save(image, path)


def junk(folder: Path) -> None:
    """Write the files that operating systems leave, next to cases and under names that look like a case's."""
    (folder / "__MACOSX").mkdir(parents=True, exist_ok=True)
    for victim in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".gz", ".nii", ".nrrd", ".h5"))[
        :2
    ]:
        victim.with_name(f"._{victim.name}").write_bytes(b"\x00\x05\x16\x07")
        (folder / "__MACOSX" / victim.name).write_bytes(b"\x00\x05\x16\x07")
    (folder / ".DS_Store").write_bytes(b"\x00")
    (folder / "desktop.ini").write_text("[.ShellClassInfo]")


# ---- ISLES-2022 --------------------------------------------------------------------------------------------

ISLES_LAYOUTS = ("archive", "kit", "hosted")
ISLES = {  # of fold 0
    "labeled": ("0003", "0004"),
    "unlabeled": ("0150", "0151", "0248"),
    "validation": ("0002", "0170"),
    "test": ("0001", "0013"),
}


def isles(root: Path, layout: str = "archive", numbers: Iterable[str] | None = None) -> dict[str, Truth]:
    """ISLES-2022 below `root`; 0150 has an empty mask, 0151 and 0170 have none."""
    truth = {}
    for number in numbers or [n for group in ISLES.values() for n in group]:
        case = f"sub-strokecase{number}"
        rng = rng_of(case)
        shape = [(9, 10, 11), (12, 8, 9)][int(number) % 2]
        affine = oblique((2, 2, 2.0 if int(number) % 2 else 4.5), (80.5, -90.25, -40), 12)
        dwi, adc = (_interpolated(rng, shape) for _ in range(2))
        flair, flair_affine = rng.integers(0, 500, (14, 15, 6)), oblique((1.3, 1.3, 6), (85, -95, -45), 3)
        mask = blob(rng, shape) * (number not in ("0150", "0151", "0170"))
        session = f"{case}/ses-0001"
        image = {
            "archive": f"ISLES-2022/{session}/dwi",
            "kit": f"rawdata/{session}",
            "hosted": f"dataset/rawdata/{session}",
        }
        place = {"archive": f"ISLES-2022/{session}/anat"}.get(layout, image[layout])
        derived = {"archive": "ISLES-2022/", "kit": "", "hosted": "dataset/"}[layout] + f"derivatives/{session}"
        stem = f"{case}_ses-0001"
        write_nifti(root / image[layout] / f"{stem}_dwi.nii.gz", dwi, affine)
        write_nifti(root / image[layout] / f"{stem}_adc.nii.gz", adc, affine)
        name = "FLAIR" if layout == "archive" else "flair"
        write_nifti(root / place / f"{stem}_{name}.nii.gz", flair.astype(np.int16), flair_affine)
        if int(number) % 3 == 0:
            (root / image[layout] / f"{stem}_dwi.json").write_text("{}")
        if number not in ("0151", "0170"):
            noise = np.zeros((4, 4))
            noise[:3] = rng.uniform(-1e-7, 1e-7, (3, 4))
            write_nifti(root / derived / f"{stem}_msk.nii.gz", mask.astype(np.uint16), affine + noise, codes=(0, 2))
        truth[case] = Truth((dwi, adc), mask, affine)
    junk(root)
    return truth


def _interpolated(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """float64 with small negatives and mostly exact zeros."""
    values = rng.normal(400, 150, shape) * (rng.random(shape) < 0.2)
    values.flat[:3] = -0.0123, -1.5e-3, 0.25
    return values


# ---- BraTS 2019 --------------------------------------------------------------------------------------------

BRATS = {
    "labeled": ("BraTS19_TCIA02_370_1", "BraTS19_CBICA_ASA_1"),
    "unlabeled": ("BraTS19_2013_0_1", "BraTS19_CBICA_BHZ_1"),
    "validation": ("BraTS19_CBICA_AAP_1",),
    "test": ("BraTS19_TCIA02_309_1", "BraTS19_CBICA_AYA_1"),
}
BRATS_AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
BRATS_KINDS = ("t1", "t1ce", "t2", "flair")
LATER = {"t1": "t1n", "t1ce": "t1Gd", "t2": "t2w", "flair": "t2f", "seg": "label"}


def brats(
    root: Path,
    layout: str = "grades",
    endings: Sequence[str] = (".nii.gz",),
    names: dict[str, str] | None = None,
    cases: Iterable[str] | None = None,
) -> dict[str, Truth]:
    """BraTS 2019 below `root` ('grades': HGG and LGG, 'flat', 'doubled'); every second case has labels {0, 2} alone.

    Endings and, for the first case, other names of kinds take turns. Labels in `Truth` are those of the files.
    """
    top = root / "MICCAI_BraTS_2019_Data_Training"
    top = {"grades": top, "flat": root, "doubled": top / top.name}[layout]
    truth = {}
    for index, case in enumerate(cases or [c for group in BRATS.values() for c in group]):
        rng, shape = rng_of(case), (12, 11, 10)
        images = {kind: rng.integers(1, 900, shape).astype(np.int16) for kind in BRATS_KINDS}
        for image in images.values():
            image[:, :2] = 0
        label = np.zeros(shape, np.uint8)
        label[3:8, 4:9, 2:8] = 2
        if index % 2 == 0:
            label[4:7, 5:8, 3:6], label[5, 6, 4] = 4, 1
        folder = top if layout == "flat" else top / ("LGG" if index % 2 else "HGG")
        for number, (kind, array) in enumerate({**images, "seg": label}.items()):
            called = (names or {}).get(kind, kind) if index == 0 else kind
            ending = endings[(index + number) % len(endings)]
            write_nifti(folder / case / f"{case}_{called}{ending}", array, BRATS_AFFINE)
        truth[case] = Truth(tuple(images[k] for k in BRATS_KINDS), label, BRATS_AFFINE)
    (top / "name_mapping.csv").write_text("Grade,BraTS_2019_subject_ID\n")
    (top / "survival_data.csv").write_text("BraTS19ID,Age\n")
    junk(root)
    return truth


# ---- LA ----------------------------------------------------------------------------------------------------

LA = {
    "labeled": ("06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU", "1D7CUD1955YZPGK8XHJX"),
    "unlabeled": ("CMPXO4J23G58J53Q98SZ", "3C2QTUNI0852XV7ZH4Q1"),
    "validation": (),
    "test": ("UPT6DX9IQY9JAZ7HJKA7", "UTBUJIWZMKP64E3N73YC"),
}


def la_nrrd(root: Path, cases: Iterable[str] | None = None, stranger: bool = True) -> dict[str, Truth]:
    """Folders of the challenge: uint8, mask 0/255, spacing and direction that show any mistake, and other files."""
    truth = {}
    names = list(cases or [c for group in LA.values() for c in group])
    for case in [*names, *(["ZZZZTESTSETZZZZTESTS"] if stranger else [])]:
        rng, shape = rng_of(case), (11, 13, 8)
        affine = _LPS @ oblique((0.625, 0.7, 1.25), (-31.5, 12.25, 100.125), 25, signs=(-1, 1, 1))
        image, mask = rng.integers(0, 255, shape).astype(np.uint8), blob(rng, shape)
        folder = root / ("Training Set" if case in names else "Testing Set") / case
        for name, array in (("lgemri", image), ("laendo", 255 * mask), ("lawall", 0 * mask)):
            write_nrrd(folder / f"{name}.nrrd", array, affine)
        truth[case] = Truth((image,), mask, affine)
    junk(root)
    return truth


def write_nrrd(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write with SimpleITK; the affine is RAS+."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.T)
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path))


def la_h5(root: Path, cases: Iterable[str] | None = None, shape: Sequence[int] = (14, 12, 8)) -> dict[str, Truth]:
    """The form of semi-supervised papers; a folder name with a blank, a stray file of Windows."""
    truth = {}
    for case in cases or [c for group in LA.values() for c in group]:
        rng = rng_of(case)
        image, mask = rng.normal(0.9, 0.9, shape).astype(np.float32), blob(rng, shape)
        folder = root / "2018LA_Seg_Training Set" / case
        write_h5(folder / "mri_norm2.h5", image, mask)
        if case == "CMPXO4J23G58J53Q98SZ":
            (folder / "desktop.ini").write_text("[.ShellClassInfo]")
        truth[case] = Truth((image,), mask, _LPS @ np.diag([0.625, 0.625, 0.625, 1]))
    return truth


def write_h5(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=image, compression="gzip", compression_opts=1)
        file.create_dataset("label", data=label, compression="gzip", compression_opts=1)


# ---- Pancreas-NIH ------------------------------------------------------------------------------------------

PANCREAS = {
    "labeled": ("0001", "0002"),
    "unlabeled": ("0013", "0014"),
    "validation": (),
    "test": ("0064", "0065"),
}
WITHDRAWN = ("0025", "0070")
_CT_SPACING, _CT_ORIGIN = (0.75, 0.875, 1.5), (-120.5, -110.25, 30.5)


def ct(name: str, shape: Sequence[int] = (12, 13, 10)) -> tuple[np.ndarray, np.ndarray]:
    """CT in HU and an organ in it, in one corner of the body and the body in one corner of the air."""
    rng = rng_of(name)
    image = np.full(shape, -1000, np.int16)
    image[1:7, 1:7, 1:6] = rng.integers(30, 70, (6, 6, 5))
    organ = np.zeros(shape, np.uint8)
    x, y, z = (int(rng.integers(1, 3)) for _ in range(3))
    organ[x : x + 3, y : y + 4, z : z + 2] = 1
    image[organ > 0] = rng.integers(55, 66, int(organ.sum()))
    return image, organ


def ct_affine() -> np.ndarray:
    """Identity direction of DICOM, in RAS+."""
    affine = np.diag([*_CT_SPACING, 1.0])
    affine[:3, 3] = _CT_ORIGIN
    return _LPS @ affine


def pancreas_dicom(
    root: Path, numbers: Iterable[str] | None = None, wrong_header: Iterable[str] = ()
) -> dict[str, Truth]:
    """TCIA's tree and its labels, which run the other way along y and fit by position; `wrong_header` ones do not.

    Every second case has slices without ending; the second one has a scout next to its series.
    """
    truth = {}
    wanted = numbers or [*(n for group in PANCREAS.values() for n in group), *WITHDRAWN]
    for index, number in enumerate(wanted):
        image, organ = ct(number)
        study = root / "Pancreas-CT" / f"PANCREAS_{number}" / "11-24-2015-PANCREAS0001-Pancreas-18957"
        write_series(study / "Pancreas-63502", image, ending=".dcm" if index % 2 == 0 else "", uid=f"1.2.3.{index + 1}")
        if index == 1:
            write_series(study / "scout", image[:, :, :2], uid="1.2.3.99")
        (study.parent / "LICENSE").write_text("CC BY 3.0")
        label_affine = _turned(ct_affine(), organ.shape, 1)
        if number in wrong_header:
            label_affine = ct_affine()
        write_nifti(root / "TCIA_pancreas_labels-02-05-2017" / f"label{number}.nii.gz", organ[:, ::-1], label_affine)
        truth[f"PANCREAS_{number}"] = Truth((image,), organ, ct_affine())
    junk(root)
    return truth


def _turned(affine: np.ndarray, shape: Sequence[int], axis: int) -> np.ndarray:
    """Affine of the array that is turned along an axis, of the same positions."""
    turn = np.eye(4)
    turn[axis, axis], turn[axis, 3] = -1, shape[axis] - 1
    return affine @ turn


def write_series(
    folder: Path,
    array: np.ndarray,
    *,
    ending: str = ".dcm",
    uid: str = "1.2.3.4",
    modality: str = "CT",
    positions: Sequence[float] | None = None,
    skip_tags: Sequence[str] = (),
    first: int = 1,
    tilt: float = 0.0,
) -> list[Path]:
    """A DICOM series, slice by slice; names and instance numbers run against the positions.

    `tilt` displaces each slice by so many mm against the one before, as a tilted gantry does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    depth = array.shape[2]
    for k in range(depth):
        image = sitk.GetImageFromArray(array[:, :, k : k + 1].T)
        image.SetSpacing(_CT_SPACING)
        z = _CT_ORIGIN[2] + _CT_SPACING[2] * k if positions is None else positions[k]
        tags = {
            "0008|0060": modality,
            "0020|000d": f"{uid}.0",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{k + first}",
            "0020|0013": str(depth - k),
            "0020|0032": f"{_CT_ORIGIN[0]}\\{_CT_ORIGIN[1] + tilt * k}\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            if tag not in skip_tags:
                image.SetMetaData(tag, value)
        path = folder / f"1-{depth - k + first - 1:03d}.dcm"
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(path))
        kept = locale.setlocale(locale.LC_ALL)
        writer.Execute(image)
        locale.setlocale(locale.LC_ALL, kept)  # the writer leaves it at "C"
        written.append(path.rename(path.with_name(path.stem + ending)))
    return written


def pancreas_nifti(root: Path, layout: str = "folders", numbers: Iterable[str] | None = None) -> dict[str, Truth]:
    """NIfTI copies: 'folders' image/ and label/, or 'data' with the names of the archive."""
    truth = {}
    for number in numbers or [*(n for group in PANCREAS.values() for n in group), *WITHDRAWN]:
        image, organ = ct(number)
        at = f"image/image{number}.nii.gz" if layout == "folders" else f"data/PANCREAS_{number}.nii.gz"
        write_nifti(root / at, image, ct_affine())
        write_nifti(root / "label" / f"label{number}.nii.gz", organ[:, ::-1], _turned(ct_affine(), organ.shape, 1))
        truth[f"PANCREAS_{number}"] = Truth((image,), organ, ct_affine())
    return truth


PANCREAS_H5 = ("{}.h5", "image{}_norm.h5", "PANCREAS_{}.h5")


def pancreas_h5(root: Path, name: str, numbers: Iterable[str] | None = None) -> dict[str, Truth]:
    """The literature's arrays, values from 0 to 1, named by one of `PANCREAS_H5`."""
    truth = {}
    for number in numbers or [n for group in PANCREAS.values() for n in group]:
        image, organ = ct(number)
        scaled = ((np.clip(image, -125, 275) + 125) / 400).astype(np.float32)
        write_h5(root / "Pancreas_h5" / name.format(number), scaled, organ)
        truth[f"PANCREAS_{number}"] = Truth((scaled,), organ, _LPS)
    return truth


# ---- BTCV --------------------------------------------------------------------------------------------------

BTCV = {
    "labeled": ("0002", "0023", "0034", "0039"),
    "unlabeled": ("0001", "0021"),
    "validation": ("0006",),
    "test": ("0004", "0010"),
}


def btcv(root: Path, layout: str = "raw", numbers: Iterable[str] | None = None, scale: int = 1) -> dict[str, Truth]:
    """Synapse's tree ('raw', with RegData and Testing) or imagesTr and labelsTr; 0034 has no gallbladder.

    The images have `scale` times (15, 9, 8) voxels.
    """
    truth = {}
    top = root / "Abdomen" / "RawData"
    images = top / "Training" / "img" if layout == "raw" else root / "imagesTr"
    labels = top / "Training" / "label" if layout == "raw" else root / "labelsTr"
    for number in numbers or [n for group in BTCV.values() for n in group]:
        rng, shape = rng_of(number), (15, 9, 8)
        affine = oblique((0.7, 0.7, 3.0), (160.5, -140, 12.25), 0, signs=(1, 1, 1))
        image = rng.integers(-1000, 1000, shape).astype(np.int16)
        label = np.zeros(shape, np.uint8)
        for organ in range(1, 14):
            if (number, organ) != ("0034", 4):
                label[organ, 1 : 2 + organ % 5, 2:5] = organ
        image, label = (np.kron(array, np.ones((scale,) * 3, array.dtype)) for array in (image, label))
        write_nifti(images / f"img{number}.nii.gz", image, affine)
        write_nifti(labels / f"label{number}.nii.gz", label, affine, codes=(2, 1))
        truth[f"img{number}"] = Truth((image,), label, affine)
    if layout == "raw":
        for place in ("RawData/Testing/img/img0061.nii.gz", "RegData/Training/img/img0001.nii.gz"):
            write_nifti(root / "Abdomen" / place, np.zeros((5, 5, 5), np.int16), np.eye(4))
        write_nifti(root / "Abdomen/RegData/Training/label/label0001.nii.gz", np.zeros((5, 5, 5), np.uint8), np.eye(4))
    else:
        (root / "dataset_0.json").write_text(json.dumps({"training": []}))
        write_nifti(root / "imagesTs" / "img0061.nii.gz", np.zeros((5, 5, 5), np.int16), np.eye(4))
    junk(root)
    return truth
