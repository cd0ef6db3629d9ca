"""Layouts of the collections as tests convert them, and what every test of a converter needs."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.dataset_conversion import converter
from nnunetv2_dycon.errors import UserError
from tests import collections
from tests.collections import Truth

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
FOLDERS = {"labeled": "Tr", "validation": "Tr", "unlabeled": "Un", "test": "Ts"}


class Form(NamedTuple):
    """A layout of a collection: how to make it, cases by role, number for --labeled, file ending, prefix of cases."""

    collection: str
    make: Callable[..., dict[str, Truth]]
    roles: Mapping[str, tuple[str, ...]]
    labeled: int
    options: Mapping[str, Any] = {}
    ending: str = ".nii.gz"
    prefix: str = ""
    keep: tuple[int, ...] = (0,)  # channels of `Truth` that the data set has
    relabel: Mapping[int, int] | None = None

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        return {role: tuple(self.prefix + case for case in cases) for role, cases in self.roles.items()}


def isles(layout: str) -> Form:
    return Form("ISLES22", lambda r: collections.isles(r, layout), collections.ISLES, 20, prefix="sub-strokecase")


def brats(layout: str, *args: Any, ending: str = ".nii.gz", **changes: Any) -> Form:
    form = Form("BraTS19", lambda r: collections.brats(r, layout, *args), collections.BRATS, 25, ending=ending)
    return form._replace(**{"keep": (3,), "relabel": {1: 1, 2: 1, 4: 1}, **changes})


def pancreas(make: Callable[..., dict[str, Truth]], **changes: Any) -> Form:
    return Form("PancreasNIH", make, collections.PANCREAS, 12, prefix="PANCREAS_", **changes)


FORMS = {
    "isles-archive": isles("archive"),
    "isles-kit": isles("kit"),
    "isles-hosted": isles("hosted"),
    "isles-adc": isles("archive")._replace(options={"modalities": ("dwi", "adc")}, keep=(0, 1)),
    "brats-grades": brats("grades"),
    "brats-flat-nii": brats("flat", (".nii",), ending=".nii"),
    "brats-doubled-mixed-all-multi": brats(
        "doubled",
        (".nii", ".nii.gz"),
        collections.LATER,
        options={"modalities": (), "labels": "multi"},
        keep=(0, 1, 2, 3),
        relabel={1: 1, 2: 2, 4: 3},
    ),
    "la-nrrd": Form("LA", collections.la_nrrd, collections.LA, 8),
    "la-h5": Form("LA", collections.la_h5, collections.LA, 8),
    "pancreas-dicom": pancreas(collections.pancreas_dicom),
    "pancreas-nifti": pancreas(collections.pancreas_nifti),
    "pancreas-nifti-data": pancreas(lambda r: collections.pancreas_nifti(r, "data")),
    "pancreas-coranet": pancreas(lambda r: collections.pancreas_h5(r, collections.PANCREAS_H5[0])),
    "pancreas-mcnet": pancreas(lambda r: collections.pancreas_h5(r, collections.PANCREAS_H5[1])),
    "pancreas-dycon": pancreas(lambda r: collections.pancreas_h5(r, collections.PANCREAS_H5[2])),
    "btcv-raw": Form("BTCV", collections.btcv, collections.BTCV, 4, prefix="img"),
    "btcv-msd": Form("BTCV", lambda r: collections.btcv(r, "msd"), collections.BTCV, 4, prefix="img"),
}
MADE: dict[str, tuple[Path, dict[str, Truth]]] = {}  # every tree that was made, so that a test only copies it


def lay_out(name: str, folder: Path) -> dict[str, Truth]:
    """Put the tree of a form into `folder`."""
    if name not in MADE:
        shelf = MADE[""][0] / name
        MADE[name] = (shelf, FORMS[name].make(shelf))
    shutil.copytree(MADE[name][0], folder, dirs_exist_ok=True)
    return MADE[name][1]


ONE_EACH = ("isles-archive", "brats-grades", "la-nrrd", "la-h5", "pancreas-dicom", "pancreas-nifti", "btcv-raw")
LABEL_FILES = {  # where the label of an unlabelled case lies
    "isles-archive": "**/sub-strokecase0248*_msk.nii.gz",
    "brats-grades": "**/BraTS19_2013_0_1_seg.nii.gz",
    "la-nrrd": "**/CMPXO4J23G58J53Q98SZ/laendo.nrrd",
    "pancreas-dicom": "**/label0013.nii.gz",
    "pancreas-nifti": "**/label0013.nii.gz",
    "btcv-raw": "**/RawData/**/label0001.nii.gz",
}


def find(source: Path, pattern: str) -> Path:
    """Return the file of a collection that fits, not the files next to it."""
    (path,) = (p for p in source.glob(pattern) if not {"__MACOSX", "RegData"} & set(p.parts))
    return path


def run(form: Form, source: Path, **options: Any) -> Any:
    settings = {"labeled": form.labeled, "processes": 1, **form.options, **options}
    return converter(form.collection).convert_collection(source, **settings)


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def refused(raw: Path, form: Form, source: Path, *words: str, **options: Any) -> str:
    """Convert, and return the one line that it ends with; nothing is left."""
    before = tree(raw)
    with pytest.raises(UserError) as caught:
        run(form, source, **options)
    text = str(caught.value)
    for word in words:
        assert word in text
    assert "\n" not in text
    assert tree(raw) == before
    assert not [p for p in raw.rglob("*") if ".converting" in p.name]
    return text


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) and RAS affine, as SimpleITK sees them."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


NIFTI_LABELS = ("isles-archive", "brats-grades", "pancreas-dicom", "pancreas-nifti", "btcv-raw")
A_LABEL = {
    "isles-archive": "**/sub-strokecase0003*_msk.nii.gz",
    "brats-grades": "**/BraTS19_CBICA_ASA_1_seg.nii.gz",
    "la-nrrd": "**/0RZDK210BSMWAA6467LU/laendo.nrrd",
    "la-h5": "**/0RZDK210BSMWAA6467LU/mri_norm2.h5",
    "pancreas-dicom": "**/label0001.nii.gz",
    "pancreas-nifti": "**/label0001.nii.gz",
    "btcv-raw": "**/RawData/**/label0004.nii.gz",
}
AN_IMAGE = {
    "isles-archive": "**/sub-strokecase0248*_dwi.nii.gz",
    "brats-grades": "**/BraTS19_2013_0_1_flair.nii.gz",
    "la-nrrd": "**/CMPXO4J23G58J53Q98SZ/lgemri.nrrd",
    "la-h5": "**/CMPXO4J23G58J53Q98SZ/mri_norm2.h5",
    "pancreas-dicom": "**/PANCREAS_0013/**/1-004.dcm",
    "pancreas-nifti": "**/image0013.nii.gz",
    "btcv-raw": "**/RawData/**/img0001.nii.gz",
}
