"""LA, left atrium (2018 Atrial Segmentation Challenge): the challenge's NRRD folders, or `mri_norm2.h5`.

    python dataset_conversion/Dataset503_LA.py SOURCE -d 503 --labeled 8

Semi-supervised papers use the h5 files. These were cropped around the ground truth, of test cases too, so their
results cannot be compared with those on whole images. Use the NRRD folders if you can.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_dycon.conversion.cases import LabelRule, SourceCase
from nnunetv2_dycon.conversion.commands import converter_parser, run_script
from nnunetv2_dycon.conversion.convert import Collection, Found, convert
from nnunetv2_dycon.conversion.job import Conversion
from nnunetv2_dycon.conversion.source import match, only
from nnunetv2_dycon.conversion.volumes import H5Array, NrrdFile
from nnunetv2_dycon.errors import DataError

SPACING_MM = 0.625
H5_FORM = (
    "Form mri_norm2.h5: x and y were cropped around the ground truth (of test cases too) with a margin of about 10 to "
    "20 voxels, and intensities were normalised before the crop; results are not comparable with whole images. "
    f"The files have no geometry: {SPACING_MM} mm and an identity direction were written."
)


def find_cases(files: Sequence[Path]) -> Found:
    """Return the cases by the folders of their files.

    Raises
    ------
    DataError
        If there are NRRD and h5 files.
    """
    images, masks = _files(files, r"lgemri\.nrrd"), _files(files, r"laendo\.nrrd")
    arrays = _files(files, r"mri_norm2\.h5")
    if images and arrays:
        one, other = next(iter(images.values())), next(iter(arrays.values()))
        raise DataError(f"the source holds two forms of LA, such as {one} and {other}; give the folder of one")
    if arrays:
        cases = {
            case: SourceCase((H5Array(path, "image", SPACING_MM),), H5Array(path, "label", SPACING_MM))
            for case, path in arrays.items()
        }
        return Found(cases, form=H5_FORM)
    return Found(
        {
            case: SourceCase((NrrdFile(path),), NrrdFile(masks[case]) if case in masks else None)
            for case, path in images.items()
        }
    )


def _files(files: Sequence[Path], pattern: str) -> dict[str, Path]:
    return only(pattern.replace("\\", ""), ((path.parent.name, path) for path, _ in match(files, pattern)))


COLLECTION = Collection(
    name="LA",
    protocols=("la_80_20",),
    find=find_cases,
    channels=("LGE",),
    labels={"background": 0, "left_atrium": 1},
    rule=LabelRule(maps=({0: 0, 255: 1}, {0: 0, 1: 1})),
    license="none stated by the challenge or by the copies; ask the organisers before you pass it on",
    reference="Xiong et al., Medical Image Analysis 67:101832 (2021)",
)


def convert_la(
    source: str | Path, dataset_id: int = 503, labeled: str | float | Path = 8, **options: Any
) -> Conversion:
    """Write LA as a raw data set.

    Parameters
    ----------
    source, dataset_id, labeled, options
        See `nnunetv2_dycon.conversion.convert.convert`.
    """
    return convert(COLLECTION, source, dataset_id, labeled, **options)


convert_collection = convert_la


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    return converter_parser(COLLECTION.name, 503, COLLECTION.protocols)


if __name__ == "__main__":
    raise SystemExit(run_script(convert_la, parser()))
