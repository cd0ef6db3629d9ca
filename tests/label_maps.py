"""Label maps in files, and the dataset.json that goes with them."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

LABELS = {"background": 0, "first": 1, "second": 2}
AFFINE = np.array([[-0.5, 0, 0, 12], [0, 1, 0, -7], [0, 0, 2.5, 30], [0, 0, 0, 1.0]])
SHAPE = (7, 8, 9)  # x, y, z


def label_map(seed: int, values: int = 3) -> np.ndarray:
    """Blocks of labels, so that there are surfaces of some size."""
    small = np.random.default_rng(seed).integers(0, values, (3, 3, 3), np.uint8)
    return small.repeat(3, 0).repeat(3, 1).repeat(3, 2)[: SHAPE[0], : SHAPE[1], : SHAPE[2]]


def write(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine), path)
    return path


def write_dataset(folder: Path, labels: dict = LABELS, ending: str = ".nii.gz", **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dataset.json"
    path.write_text(json.dumps({"labels": labels, "file_ending": ending, "channel_names": {"0": "CT"}, **more}))
    return path


def as_itk(path: Path, labels: np.ndarray) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(labels.T)
    image.SetSpacing((0.5, 1.0, 2.5)[: labels.ndim])
    sitk.WriteImage(image, str(path))


def as_tif(path: Path, labels: np.ndarray) -> None:
    pytest.importorskip("tifffile").imwrite(path, labels.T)
    path.with_name(f"{path.name.split('.')[0]}.json").write_text(json.dumps({"spacing": [2.5, 1.0, 0.5]}))


def as_nifti(path: Path, labels: np.ndarray) -> None:
    write(path, labels, np.diag([0.5, 1, 2.5, 1]))


def as_floats(path: Path, labels: np.ndarray) -> None:
    as_nifti(path, labels.astype(np.float64))


def as_4d(path: Path, labels: np.ndarray) -> None:
    as_nifti(path, labels[..., None])


def as_picture(path: Path, labels: np.ndarray) -> None:
    pytest.importorskip("skimage.io").imsave(path, labels.T, check_contrast=False)
