"""Tiny raw nnU-Net data sets with awkward geometry, and nnU-Net's planning without its process pools.

Images have an oblique or flipped direction, an offset origin, anisotropic spacing that differs from case to
case, and a border of zeros; classes are nested blobs of different brightness, every class in every case.
"""

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import SimpleITK as sitk
import skimage.io
import tifffile

ENDING = ".nii.gz"


class Names(NamedTuple):
    dataset: str
    labeled: list[str]
    unlabeled: list[str]
    test: list[str]


def environment(root: Path) -> dict[str, str]:
    """The three variables of nnU-Net for data below `root`."""
    return {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}


def make_dataset(
    root: Path,
    *,
    dataset_id: int = 901,
    labeled: int = 4,
    unlabeled: int = 3,
    test: int = 2,
    shape: tuple[int, int, int] = (24, 24, 24),
    classes: int = 2,
    channels: int = 1,
    regions: bool = False,
    ignore: bool = False,
    seed: int = 0,
    json_extra: dict[str, Any] | None = None,
) -> Names:
    """Write Dataset<ID>_Tiny below root/nnUNet_raw (labelled, imagesUn, test); make the other two folders."""
    for folder in environment(root).values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    name = f"Dataset{dataset_id:03d}_Tiny"
    raw = root / "nnUNet_raw" / name
    sizes = {"l": labeled, "u": unlabeled, "t": test}
    names = Names(name, *([f"{role}_{i:02d}" for i in range(n)] for role, n in sizes.items()))
    places = [(names.labeled, "imagesTr", "labelsTr"), (names.unlabeled, "imagesUn", None)]
    places.append((names.test, "imagesTs", "labelsTs"))
    for role, (cases, images, labels) in enumerate(places):
        for index, case in enumerate(cases):
            rng = np.random.default_rng([seed, role, index])
            image, label = volume(rng, shape, classes, channels)
            if ignore:
                label[:, : shape[1] // 3] = classes + 1
            for channel in range(channels):
                write_image(raw / images / f"{case}_{channel:04d}{ENDING}", image[channel], variant=index)
            if labels:
                write_image(raw / labels / f"{case}{ENDING}", label, variant=index)
    (raw / "dataset.json").write_text(
        json.dumps(_dataset_json(labeled, classes, channels, regions, ignore) | (json_extra or {}))
    )
    return names


def _dataset_json(labeled: int, classes: int, channels: int, regions: bool, ignore: bool) -> dict[str, Any]:
    labels: dict[str, Any] = {"background": 0}
    for value in range(1, classes + 1):
        labels[f"class{value}"] = list(range(value, classes + 1)) if regions else value
    if ignore:
        labels["ignore"] = classes + 1
    content = {
        "channel_names": {str(c): "MRI" for c in range(channels)},
        "labels": labels,
        "numTraining": labeled,
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    if regions:
        content["regions_class_order"] = list(range(1, classes + 1))
    return content


def volume(
    rng: np.random.Generator, shape: Sequence[int], classes: int, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Image (channels, *shape) int16 with a border of zeros, and nested labels (*shape) uint8."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    centre = rng.uniform(-0.15, 0.15, (3, 1, 1, 1))
    axes = rng.uniform(0.8, 1.2, (3, 1, 1, 1))
    radius = np.sqrt((((grid - centre) / axes) ** 2).sum(0))
    label = np.zeros(shape, np.uint8)
    for value in range(1, classes + 1):
        label[radius < 0.65 * (1 - (value - 1) / (classes + 0.5))] = value
    image = np.stack([200 + 100 * np.abs(label.astype(float) - c) + rng.normal(0, 10, shape) for c in range(channels)])
    image[:, (np.abs(grid) > 0.9).any(0)] = 0
    return image.astype(np.int16), label


def write_image(path: Path, array: np.ndarray, variant: int = 0) -> None:
    """Write `array` (z, y, x) with one of three geometries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([(1.0, 1.0, 1.5), (0.9, 1.1, 1.5), (1.0, 1.0, 1.4)][variant % 3])
    image.SetOrigin((-31.5 + variant, 47.25, 1000.125))
    cos, sin = math.cos(0.2), math.sin(0.2)
    image.SetDirection(
        [(-1, 0, 0, 0, 1, 0, 0, 0, 1), (cos, -sin, 0, sin, cos, 0, 0, 0, 1), np.eye(3).ravel()][variant % 3]
    )
    sitk.WriteImage(image, str(path))


def reformat(root: Path, ending: str, *, flat: bool = False, reader: str | None = None) -> None:
    """Write the files of `make_dataset` in another format; `flat` takes the middle slice of each.

    Parameters
    ----------
    root : Path
        Folder of `make_dataset`.
    ending : str
        New file ending.
    flat : bool
        Write 2-D files.
    reader : str, optional
        nnU-Net's reader in dataset.json; without it nnU-Net chooses by the ending.
    """
    (raw,) = (root / "nnUNet_raw").glob("Dataset*")
    for path in sorted(raw.glob(f"*/*{ENDING}")):
        image, case = sitk.ReadImage(str(path)), path.name.removesuffix(ENDING)
        array = sitk.GetArrayFromImage(image)
        path.unlink()
        _write_as(path.with_name(case + ending), image, array[len(array) // 2] if flat else array)
        if ending in (".tif", ".tiff") and not flat:
            sidecar = {"spacing": image.GetSpacing()[::-1]}
            (path.parent / f"{case.removesuffix('_0000')}.json").write_text(json.dumps(sidecar))
    content = json.loads((raw / "dataset.json").read_text()) | {"file_ending": ending}
    del content["overwrite_image_reader_writer"]
    (raw / "dataset.json").write_text(
        json.dumps(content | ({"overwrite_image_reader_writer": reader} if reader else {}))
    )


def _write_as(path: Path, image: sitk.Image, array: np.ndarray) -> None:
    if path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, array.astype(np.uint16))
    elif array.ndim == 2:
        skimage.io.imsave(path, (array // (2 if array.max() > 9 else 1)).astype(np.uint8), check_contrast=False)
    else:
        again = sitk.GetImageFromArray(array)
        for part in ("Spacing", "Origin", "Direction"):
            getattr(again, f"Set{part}")(getattr(image, f"Get{part}")())
        sitk.WriteImage(again, str(path))


def plan_and_preprocess(
    dataset_id: int = 901,
    *,
    root: Path | None = None,
    configurations: Sequence[str] = ("3d_fullres",),
    small: bool = True,
) -> Path:
    """Run nnU-Net's fingerprint, planner and preprocessor in this process; returns the preprocessed folder.

    Parameters
    ----------
    dataset_id : int
        As given to `make_dataset`.
    root : Path, optional
        Folder of `make_dataset`; without it nnU-Net's variables must be set.
    configurations : sequence of str
        What to preprocess.
    small : bool
        Rewrite the plans by `small_plans` before preprocessing.
    """
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    class FewSamples(DatasetFingerprintExtractor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.num_foreground_voxels_for_intensitystats = 1e4  # 1e8 take half a minute

    # with nnUNet_n_proc_DA=0, which suits training, the planner sets 0 torch threads and crashes
    variables = {"nnUNet_n_proc_DA": "1", **(environment(root) if root else {})}
    with mock.patch.dict(os.environ, variables), no_pools(), contextlib.redirect_stdout(io.StringIO()):
        folder = Path(nnUNet_preprocessed, str(convert_id_to_dataset_name(dataset_id)))
        api.extract_fingerprint_dataset(dataset_id, FewSamples, num_processes=1, show_progress_bar=False)
        api.plan_experiment_dataset(dataset_id)
        if small:
            for configuration in configurations:
                small_plans(folder, configuration)
        api.preprocess_dataset(
            dataset_id, configurations=list(configurations), num_processes=[1], show_progress_bar=False
        )
    return folder


def small_plans(
    preprocessed_dataset_folder: Path,
    configuration: str = "3d_fullres",
    *,
    features: Sequence[int] = (4, 8, 16),
    patch: int = 16,
    batch: int = 2,
    plans: str = "nnUNetPlans",
) -> dict[str, Any]:
    """Rewrite a configuration of the plans file to a tiny network (stride 2 a stage); returns the plans."""
    path = Path(preprocessed_dataset_folder, f"{plans}.json")
    content = json.loads(path.read_text())
    entry = content["configurations"][configuration]
    axes, stages = len(entry["patch_size"]), len(features)
    entry.update(patch_size=[patch] * axes, batch_size=batch)
    entry["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=list(features),
        kernel_sizes=[[3] * axes] * stages,
        strides=[[1] * axes] + [[2] * axes] * (stages - 1),
        n_conv_per_stage=[1] * stages,
        n_conv_per_stage_decoder=[1] * (stages - 1),
    )
    path.write_text(json.dumps(content, indent=1))
    return content


def leave(*_: object) -> None:
    """End the process at once, as a kill does; for workers."""
    os._exit(9)


def stay(path: Path) -> None:
    """Say by a file that the work has begun, and work for long."""
    path.touch()
    time.sleep(1000)


class _Ready:
    def __init__(self, value: list[Any]) -> None:
        self.value = value

    def ready(self) -> bool:
        return True

    def get(self) -> list[Any]:
        return self.value


class _Here:
    """A pool that works in this process, as far as nnU-Net uses one."""

    _pool: tuple[()] = ()

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "_Here":
        return self

    def __exit__(self, *_: object) -> None: ...

    def starmap(self, function: Any, arguments: Any) -> list[Any]:
        return [function(*a) for a in arguments]

    def starmap_async(self, function: Any, arguments: Any) -> _Ready:
        return _Ready(self.starmap(function, arguments))


@contextlib.contextmanager
def no_pools() -> Iterator[None]:
    from nnunetv2.utilities import utils

    with (
        mock.patch("multiprocessing.get_context", return_value=mock.Mock(Pool=_Here)),
        mock.patch.object(utils, "Pool", _Here),
    ):
        yield


def write_splits(root: Path, dataset: str, **fold: Sequence[str]) -> None:
    """Write a one-fold splits_final.json into the raw folder, where nnU-Net's planner finds it."""
    path = root / "nnUNet_raw" / dataset / "splits_final.json"
    path.write_text(json.dumps([{name: list(cases) for name, cases in fold.items()}]))
