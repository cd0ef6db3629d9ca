"""Pancreas-NIH (TCIA Pancreas-CT): the DICOM tree with its label NIfTI, NIfTI copies, the literature's h5 files.

    python dataset_conversion/Dataset504_PancreasNIH.py SOURCE -d 504 --labeled 12

The axes of a label file and its DICOM stack have opposite directions, so labels are placed by position in mm. Where
that proves nothing, as with another number of slices, the CT's Hounsfield units decide, or the case is refused. Cases
0025 and 0070 were withdrawn (the patient of 0002) and are left out.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_dycon.conversion.cases import LabelRule, SourceCase
from nnunetv2_dycon.conversion.commands import converter_parser, run_script
from nnunetv2_dycon.conversion.convert import Collection, Found, convert
from nnunetv2_dycon.conversion.dicom import CtSeries
from nnunetv2_dycon.conversion.job import Conversion
from nnunetv2_dycon.conversion.placement import by_position
from nnunetv2_dycon.conversion.source import NIFTI, match, only
from nnunetv2_dycon.conversion.volumes import H5Array, NiftiFile, Source
from nnunetv2_dycon.errors import DataError

PREFIX = "PANCREAS_"
MAPS = ({0: 0, 1: 1}, {0: 0, 255: 1})
H5_SPACING_MM = 1.0
H5_FORM = (
    "Form h5: volumes were cropped around the ground truth (of test cases too), clipped and normalised by their "
    "makers; results are not comparable with whole images. The files have no geometry: 1 mm and an identity "
    "direction were written."
)
_LABEL_FOLDER = re.compile(r"label|mask|seg", re.IGNORECASE)


def find_cases(files: Sequence[Path]) -> Found:
    """Return the cases by the number in the names of their files or of the folder of their DICOM series.

    Raises
    ------
    DataError
        If there is more than one form of the scans.
    """
    forms = {"DICOM": _series(files), "NIfTI": _volumes(files), "h5": _arrays(files)}
    filled = {form: cases for form, cases in forms.items() if cases}
    if len(filled) > 1:
        raise DataError(f"the source holds {' and '.join(filled)} forms of the scans; give the folder of one form")
    if not filled:
        return Found({})
    ((form, images),) = filled.items()
    if form == "h5":
        cases = {
            case: SourceCase((image,), H5Array(image.path, "label", H5_SPACING_MM)) for case, image in images.items()
        }
        return Found(cases, form=H5_FORM, rule=LabelRule(MAPS))  # values are not HU, and grids are equal
    labels = only(
        "the label", ((_name(fit[1]), path) for path, fit in match(files, rf".*?(\d{{4}}){NIFTI}") if _is_label(path))
    )
    return Found(
        {
            case: SourceCase((image,), NiftiFile(labels[case]) if case in labels else None)
            for case, image in images.items()
        }
    )


def _name(digits: str) -> str:
    return f"{PREFIX}{digits}"


def _is_label(path: Path) -> bool:
    return bool(_LABEL_FOLDER.search(path.name) or _LABEL_FOLDER.search(path.parent.name))


def _series(files: Sequence[Path]) -> dict[str, Source]:
    """Return the DICOM series: files with `.dcm`, a UID or no ending, below a folder with the case's name."""
    folders: dict[str, set[Path]] = defaultdict(set)
    for path in files:
        # a name without ending that is a UID ends with a number
        if not re.fullmatch(r"(\.dcm|\.\d+)?", path.suffix.lower()) or path.name.upper() in ("DICOMDIR", "LICENSE"):
            continue
        for parent in path.parents:
            fit = re.fullmatch(r"pancreas_?(\d{4})", parent.name, re.IGNORECASE)
            if fit:
                folders[_name(fit[1])].add(path.parent)
                break
    return {case: CtSeries(case, tuple(sorted(found))) for case, found in sorted(folders.items())}


def _volumes(files: Sequence[Path]) -> dict[str, Source]:
    found = match(files, rf"(?:image|pancreas_?)?(\d{{4}}){NIFTI}")
    return {
        case: NiftiFile(path)
        for case, path in only(
            "the scan", ((_name(fit[1]), path) for path, fit in found if not _is_label(path))
        ).items()
    }


def _arrays(files: Sequence[Path]) -> dict[str, H5Array]:
    found = match(files, r"(?:image|pancreas_?)?(\d{4})(?:_norm)?\.h5")
    return {
        case: H5Array(path, "image", H5_SPACING_MM)
        for case, path in only("the scan", ((_name(fit[1]), path) for path, fit in found)).items()
    }


COLLECTION = Collection(
    name="PancreasNIH",
    protocols=(
        "pancreas_coranet_bcp",
        "pancreas_dycon",
        "pancreas_dycon_fold1",
        "pancreas_dycon_fold2",
        "pancreas_dycon_fold3",
        "pancreas_mcnet",
    ),
    find=find_cases,
    channels=("CT",),
    labels={"background": 0, "pancreas": 1},
    rule=LabelRule(MAPS, fit=by_position, needs_image=True),
    license="CC BY 3.0",
    reference="Roth et al., MICCAI 2015 and TCIA 2016; Clark et al., Journal of Digital Imaging 26(6) (2013)",
    prefix=PREFIX,
    inner=frozenset({"pancreas-ct", "image", "label", "images", "labels"}),
    dropped=frozenset({f"{PREFIX}0025", f"{PREFIX}0070"}),
    drop_reason="0025 and 0070 are left out: they were withdrawn as scans of the patient of 0002 (--keep_withdrawn)",
)


def convert_pancreas_nih(
    source: str | Path,
    dataset_id: int = 504,
    labeled: str | float | Path = 12,
    *,
    keep_withdrawn: bool = False,
    **options: Any,
) -> Conversion:
    """Write Pancreas-NIH as a raw data set.

    Parameters
    ----------
    source, dataset_id, labeled, options
        See `nnunetv2_dycon.conversion.convert.convert`.
    keep_withdrawn : bool
        Keep cases 0025 and 0070 where the protocol names them.
    """
    chosen = replace(COLLECTION, dropped=frozenset(), drop_reason="") if keep_withdrawn else COLLECTION
    settings = {"keep_withdrawn": keep_withdrawn}
    return convert(chosen, source, dataset_id, labeled, settings=settings, **options)


convert_collection = convert_pancreas_nih


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    arguments = converter_parser(COLLECTION.name, 504, COLLECTION.protocols)
    arguments.add_argument("--keep_withdrawn", action="store_true", help="keep cases 0025 and 0070")
    return arguments


if __name__ == "__main__":
    raise SystemExit(run_script(convert_pancreas_nih, parser()))
