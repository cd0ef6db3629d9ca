"""What nnU-Net's own verification and planning will say to a raw data set, without opening its files again."""

import contextlib
import io
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import (
    LIST_OF_IO_CLASSES,
    recursive_find_reader_writer_by_name,
)

from nnunetv2_dycon.files import write_json


def unknown_reader(content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the reader in dataset.json; nnU-Net passes over a name that it does not know."""
    wanted = content.get("overwrite_image_reader_writer")
    if wanted in (None, "None"):
        return None
    with contextlib.suppress(RuntimeError), _silence():
        recursive_find_reader_writer_by_name(wanted)
        return None
    readers = ", ".join(one.__name__ for one in LIST_OF_IO_CLASSES)
    return f'there is no reader {wanted!r} ("overwrite_image_reader_writer"), but {readers}; correct it or leave it out'


def refusal(content: Mapping[str, Any], images: Mapping[str, Sequence[Path]], labels: Mapping[str, Path]) -> str | None:
    """Return what nnU-Net's verification says against dataset.json; None if it would go on to open every file.

    Parameters
    ----------
    content : mapping
        Content of dataset.json.
    images, labels : mapping
        Files of training cases that can be read.
    """
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity  # a second, for torch

    if "channel_names" not in content:
        return '"modality" is the word of the first nnU-Net; rename it to "channel_names"'
    if not images:
        return None
    cases = {case: {"images": list(map(str, files)), "label": str(labels[case])} for case, files in images.items()}
    with TemporaryDirectory() as folder, _silence():
        write_json(Path(folder, "dataset.json"), {**content, "dataset": cases, "numTraining": len(cases)})
        try:
            verify_dataset_integrity(folder, num_processes=0)
        except Exception as error:  # it asserts, and looks things up that may not be there
            # all else is behind it when it starts its processes, which are none
            started = any(frame.name == "Pool" for frame in traceback.extract_tb(error.__traceback__))
            return None if started else " ".join(str(error).split()) or type(error).__name__
    return None


def planned_configuration(shapes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]]) -> str:
    """Return the configuration to prepare: nnU-Net plans 2d alone where the usual image is one slice.

    Parameters
    ----------
    shapes : sequence of (X, Y, Z)
        Voxels of the training images.
    spacings : sequence of (X, Y, Z)
        Their voxel sizes.
    """
    if not shapes:
        return "3d_fullres"
    through = int(np.argmax(np.median(spacings, 0)))  # slices are taken across the axis of the largest spacing
    return "2d" if np.median(shapes, 0)[through] == 1 else "3d_fullres"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
