"""One unlabelled case, prepared by nnU-Net's own preprocessor: the work of one process."""

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_dycon.data.dataset_json import channel_names
from nnunetv2_dycon.data.manifest import ELSEWHERE
from nnunetv2_dycon.data.prepared_files import SUFFIXES, describe, remove_case
from nnunetv2_dycon.data.readers import is_nifti, open_nifti
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import place, writing


@dataclass(frozen=True)
class CaseToPrepare:
    """Input of the worker process that prepares one case; picklable."""

    case: str
    files: tuple[str, ...]
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    folder: str
    work: str


def prepare_case(task: CaseToPrepare) -> dict[str, Any] | str:
    """Prepare one case; returns the record of its files, or the problem with its images."""
    plans = PlansManager(task.plans)
    configuration = plans.get_configuration(task.configuration)
    try:
        image, properties = read_image(task.files, plans, len(channel_names(task.dataset_json)))
    except DataError as error:
        return str(error)
    # nnU-Net's run_case in its two halves, so that the image is checked without reading it twice
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, mask, properties = preprocessor.run_case_npy(image, None, properties, plans, configuration, task.dataset_json)
    properties["class_locations"] = {}  # nnU-Net's loader asks for the key
    _save(
        task,
        data.astype(np.float32, copy=False),
        mask.astype(np.int16, copy=False),
        properties,
        configuration,
    )
    return describe(Path(task.folder), task.case)


def read_image(files: Sequence[str], plans: PlansManager, channels: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return image (C, X, Y, Z) and properties by nnU-Net's reader.

    Raises
    ------
    DataError
        If the image cannot be read, lacks channels, is empty or has NaN or Inf.
    """
    names = ", ".join(files)
    reader = plans.image_reader_writer_class
    for file in filter(is_nifti, map(Path, files)):
        open_nifti(file, "replace or remove it", unpack=True)
    try:
        not_finite = [_not_finite_on_disk(file) if issubclass(reader, SimpleITKIO) else 0 for file in files]
        image, properties = reader().read_images(files)
    except MemoryError:
        raise
    except Exception as error:  # every reader has its own
        reason = (str(error).strip().splitlines() or ["channels differ in shape or spacing"])[-1].strip()
        raise DataError(f"{names} cannot be read ({reason[-200:]}); replace or remove it") from error
    if len(image) > max(channels, len(files)):
        raise DataError(f"{names} is 4-D ({len(image)} volumes); write one 3-D file per channel: CASE_0000, CASE_0001")
    if len(image) != channels:
        raise DataError(
            f"{names}: {len(image)} channel{'s' * (len(image) != 1)}, dataset.json names {channels}; "
            "add the missing channels or remove the case"
        )
    counts = [channel.size - int(np.count_nonzero(np.isfinite(channel))) for channel in image]
    for name, bad in (*zip(files, not_finite, strict=True), *zip(_per_channel(files, channels), counts, strict=True)):
        if bad:
            raise DataError(f"{name} has NaN or Inf in {bad} voxel{'s' * (bad > 1)}; replace the values or remove it")
    if not np.any(image):
        raise DataError(f"{names} is empty ({'no voxel' if image.size == 0 else 'only zeros'}); replace or remove it")
    return image, properties


def _per_channel(files: Sequence[str], channels: int) -> Sequence[str]:
    return files if len(files) == channels else [", ".join(files)] * channels


def _not_finite_on_disk(file: str) -> int:
    """Return the number of NaN and Inf in a NIfTI file.

    SimpleITK reads both as 0.
    """
    if not file.endswith((".nii", ".nii.gz")):
        return 0
    values = np.asanyarray(nibabel.load(file).dataobj.get_unscaled())
    return values.size - int(np.count_nonzero(np.isfinite(values))) if values.dtype.kind in "fc" else 0


def _save(
    task: CaseToPrepare,
    data: np.ndarray,
    mask: np.ndarray,
    properties: dict[str, Any],
    configuration: ConfigurationManager,
) -> None:
    """Write the three files of a case from its image (C, X, Y, Z) and mask (1, X, Y, Z)."""
    patch = tuple(configuration.patch_size)
    blocks, chunks = comp_blosc2_params(data.shape, patch, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(mask.shape, patch, mask.itemsize)
    with writing(Path(task.folder), ELSEWHERE), tempfile.TemporaryDirectory(dir=task.work) as scratch:
        try:
            nnUNetDatasetBlosc2.save_case(
                data,
                mask,
                properties,
                os.path.join(scratch, task.case),
                chunks=chunks,
                blocks=blocks,
                chunks_seg=chunks_seg,
                blocks_seg=blocks_seg,
            )
        except RuntimeError as error:  # blosc2 says no more of a full disk
            raise OSError(errno.ENOSPC, str(error)) from error
        remove_case(Path(task.folder), task.case)
        for suffix in SUFFIXES:
            place(Path(scratch, task.case + suffix), Path(task.folder, task.case + suffix))
