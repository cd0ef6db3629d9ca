"""Patches for measuring a loss: the same each time, without augmentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunetv2_dycon.checkpoint import KEY
from nnunetv2_dycon.data.checked_cases import folder_reader
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.data.manifest import unlabeled_status
from nnunetv2_dycon.data.ready import UnlabeledCases
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.folders import environment_folder
from nnunetv2_dycon.trained import Trained


class Patches(NamedTuple):
    """Labelled patches (B_l, C, *S) with their labels (B_l, 1, *S), and unlabelled ones (B_u, C, *S)."""

    x_l: Tensor
    y_l: Tensor
    x_u: Tensor


def fixed_patches(trained: Trained, labeled: int, unlabeled: int, generator: np.random.Generator) -> Patches:
    """Return patches of the prepared cases of a training, drawn by a generator.

    A labelled patch is centred on a voxel of foreground, an unlabelled one lies anywhere. Prepared unlabelled cases
    have no labels that could be opened.

    Parameters
    ----------
    trained : Trained
        A training of this package, which names its cases.
    labeled, unlabeled : int
        How many patches.
    generator : numpy.random.Generator
        Source of the draws.

    Raises
    ------
    DataError
        If the prepared cases are not there.
    """
    cases = trained.checkpoint[KEY]["cases"]
    dataset, configuration = trained.path.parents[2].name, trained.path.parents[1].name.rsplit("__", 1)[1]
    folder = environment_folder("nnUNet_preprocessed") / dataset / str(trained.configuration.data_identifier)
    command = f"nnUNetv2_preprocess -d {dataset_number(dataset)} -c {configuration}"
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; type: {command}")
    of_labeled = folder_reader(folder, command)(str(folder), list(cases["labeled"]))
    images, targets = zip(
        *(_patch(of_labeled, case, trained, generator) for case in _draw(cases["labeled"], labeled, generator)),
        strict=True,
    )
    others = []
    if unlabeled:
        source = _unlabeled(trained, dataset, configuration, cases["unlabeled"])
        others = [
            _patch(source, case, trained, generator)[0] for case in _draw(cases["unlabeled"], unlabeled, generator)
        ]
    x_l = torch.from_numpy(np.stack(images)).float()
    y_l = torch.from_numpy(np.maximum(np.stack(targets), 0).astype(np.int16))  # -1 is outside of the nonzero mask
    return Patches(x_l, y_l, torch.from_numpy(np.stack(others)).float() if others else x_l[:0])


def _unlabeled(trained: Trained, dataset: str, configuration: str, cases: Sequence[str]) -> Any:
    status = unlabeled_status(dataset, configuration, trained.plans.plans)
    known = {*status.unlabeled, *status.benchmark}
    missing = sorted(set(cases) - known)
    if status.state != "ok" or missing:
        raise DataError(
            f"unlabelled images of {dataset} are {status.state}: {status.reason or missing}; type: {status.command}"
        )
    return UnlabeledCases(Path(status.folder), tuple(cases), status.command).dataset()


def _draw(cases: Sequence[str], number: int, generator: np.random.Generator) -> list[str]:
    """Return cases, each once before one comes a second time."""
    order: list[str] = []
    while len(order) < number:
        order += [str(case) for case in generator.permutation(sorted(cases))]
    return order[:number]


def _patch(source: Any, case: str, trained: Trained, generator: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Return image (C, *S) and labels (1, *S) of a patch."""
    data, labels, _, properties = source.load_case(case)
    spots = [found for found in (properties.get("class_locations") or {}).values() if len(found)]
    size = tuple(trained.configuration.patch_size)
    shape = tuple(data.shape[1:])
    if spots:
        found = spots[generator.integers(len(spots))]
        center = [int(at) for at in found[generator.integers(len(found))][1:]]
    else:
        center = [int(generator.integers(there)) for there in shape]
    flat = len(size) < len(shape)  # of a 2D configuration one slice
    start = [
        _start(at, wanted, there)
        for at, wanted, there in zip(center[-len(size) :], size, shape[-len(size) :], strict=True)
    ]
    return tuple(_cut(array, start, size, center[0] if flat else None) for array in (data, labels))  # type: ignore[return-value]


def _start(at: int, wanted: int, there: int) -> int:
    """Return where a patch begins: around a voxel, inside of the image; a larger patch around the whole image."""
    if wanted >= there:
        return -((wanted - there) // 2)
    return int(np.clip(at - wanted // 2, 0, there - wanted))


def _cut(array: Any, start: Sequence[int], size: Sequence[int], at: int | None) -> NDArray:
    inner = [slice(max(0, one), one + wanted) for one, wanted in zip(start, size, strict=True)]
    place = (slice(None), *([] if at is None else [slice(at, at + 1)]), *inner)
    part = np.asarray(array[place])
    part = part if at is None else part[:, 0]
    before = [max(0, -one) for one in start]
    around = [(b, wanted - there - b) for b, wanted, there in zip(before, size, part.shape[1:], strict=True)]
    return np.pad(part, [(0, 0), *around])
