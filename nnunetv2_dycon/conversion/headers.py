"""What a NIfTI header says and nnU-Net's reader of the data set passes over."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_dycon.conversion.volumes import affine_of
from nnunetv2_dycon.data.readers import Reader, is_nifti, millimeters, open_nifti, read_itk_header

TOLERANCE_VOXELS = 0.1  # qforms are rounded more coarsely than sforms


def passed_over(path: Path, reader: Reader) -> str | None:
    """Return what a reader passes over in a header, as a line for the user; None if there is nothing.

    Parameters
    ----------
    path : Path
        A file that the reader can read; None for one that is not 3-D NIfTI.
    reader : type
        nnU-Net's reader of the data set.
    """
    if not is_nifti(path):
        return None
    image, by_itk = open_nifti(path), issubclass(reader, SimpleITKIO)
    unit = millimeters(image)
    if image.ndim < 3:
        return None
    if not by_itk and unit != 1:
        name = image.header.get_xyzt_units()[0]
        return f"{path} is in {name}, which nnU-Net takes for mm ({reader.__name__}); write its header in mm"
    forms = {"sform": image.get_sform(coded=True)[0], "qform": image.get_qform(coded=True)[0]}
    corners = {name: unit * _corners(affine, image.shape) for name, affine in forms.items() if affine is not None}
    if not corners:
        return f"{path} does not say where it lies, and programs assume different places; set its qform and sform"
    apart = max(float(np.abs(found - next(iter(corners.values()))).max()) for found in corners.values())
    if apart <= TOLERANCE_VOXELS * unit * min(image.header.get_zooms()[:3]):
        return None
    seen = _corners(affine_of(read_itk_header(path)) if by_itk else image.affine, image.shape)
    own, other = sorted(corners, key=lambda name: np.abs(corners[name] - seen).max())
    return (
        f"the {other} of {path} puts it {apart:.3g} mm from where its {own} does: nnU-Net goes by the {own} "
        f"({reader.__name__}), other programs may go by the {other}"
    )


def _corners(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the corner voxels of a 3-D image in mm, (8, 3)."""
    indices = np.array(list(product(*((0, n - 1) for n in shape[:3]))), float)
    return indices @ affine[:3, :3].T + affine[:3, 3]
