"""A tiny data set with unlabelled images, and its prepared cases."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_dycon.data.manifest import unlabeled_folder
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled

ID = 901
NAME = "Dataset901_Tiny"


class Place:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw = root / "nnUNet_raw" / NAME
        self.preprocessed = root / "nnUNet_preprocessed" / NAME
        self.folder, self.manifest = unlabeled_folder(self.preprocessed, "nnUNetPlans_3d_fullres")
        self.plans = self.preprocessed / "nnUNetPlans.json"

    def image(self, case: str) -> Path:
        return self.raw / "imagesUn" / f"{case}_0000.nii.gz"

    def change_plans(self, change: Callable[[dict, dict], None]) -> None:
        plans = json.loads(self.plans.read_text())
        change(plans, plans["configurations"]["3d_fullres"])
        self.plans.write_text(json.dumps(plans))

    def benchmark(self) -> list[dict]:
        splits = [
            {"train": ["l_00"], "val": ["l_01"], "unlabeled": ["l_02", "l_03"]},
            {"train": ["l_03"], "val": ["l_02"], "unlabeled": ["l_01"]},
        ]
        (self.preprocessed / "splits_final.json").write_text(json.dumps(splits))
        return splits


def prepare(**options: Any) -> list[Path]:
    return preprocess_unlabeled(ID, processes=1, **options)


def tree(place: Place) -> dict[str, str]:
    """Content of everything that preparation writes, hidden files too."""
    paths = [p for p in place.preprocessed.rglob("*unlabeled*/*") if p.is_file()]
    paths += [p for p in place.preprocessed.glob("*unlabeled*") if p.is_file()]
    return {str(path.relative_to(place.preprocessed)): content(path) for path in paths}


def sources(manifest: Path) -> dict:
    """The manifest without what is about the written files, which differ from time to time."""
    found = json.loads(manifest.read_text())
    for record in found["cases"].values():
        record.pop("prepared", None)
    return found


def content(path: Path) -> str:
    if path.suffix == ".json":
        return json.dumps(sources(path))
    if path.suffix != ".b2nd":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    array = blosc2.open(str(path), mode="r")  # compressed bytes depend on the order in which threads finish
    digest = hashlib.sha256(array[:].tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {array.chunks} {array.blocks} {digest}"


def load(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray, dict]:
    data, seg, _, properties = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)
    return data[:], seg[:], properties
