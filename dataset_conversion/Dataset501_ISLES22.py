"""ISLES-2022, stroke lesions: the archive's tree, the challenge kit's and re-hosted ones.

    python dataset_conversion/Dataset501_ISLES22.py SOURCE -d 501 --labeled 0.1

Masks are on the grid of the diffusion-weighted image (DWI), and so is the ADC map. FLAIR has a grid of its own and
is not registered: with `--modalities dwi adc flair` it is resampled by its header, and may be displaced.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2_dycon.conversion.cases import LabelRule, Resampled, SourceCase
from nnunetv2_dycon.conversion.commands import converter_parser, run_script
from nnunetv2_dycon.conversion.convert import Collection, Found, convert
from nnunetv2_dycon.conversion.job import Conversion
from nnunetv2_dycon.conversion.source import NIFTI, match, only
from nnunetv2_dycon.conversion.volumes import NiftiFile, Source
from nnunetv2_dycon.errors import ConfigError, DataError

MODALITIES = ("dwi", "adc", "flair")
FLAIR_WARNING = (
    "FLAIR is not registered to the DWI: it was resampled by its header alone, and structures may not lie on each other"
)
PREFIX = "sub-strokecase"


def find_cases(files: Sequence[Path], modalities: Sequence[str] = ("dwi",)) -> Found:
    """Return the cases by the names of their files; masks may be in any folder.

    Raises
    ------
    DataError
        If a case lacks one of `modalities`.
    """
    of_kind = {kind: _files(files, kind) for kind in (*MODALITIES, "msk")}
    cases, notes = {}, []
    for case in sorted(of_kind["dwi"]):
        lacking = [kind for kind in modalities if case not in of_kind[kind]]
        if lacking:
            raise DataError(
                f"{of_kind['dwi'][case].parent} has no {case}_*_{lacking[0]}.nii.gz: fetch it, or leave "
                f"{lacking[0]} out of --modalities"
            )
        images = tuple(_image(of_kind, case, kind) for kind in modalities)
        mask = of_kind["msk"].get(case)
        cases[case] = SourceCase(images, NiftiFile(mask) if mask else None)
    if "flair" in modalities:
        notes.append(FLAIR_WARNING)
    return Found(cases, tuple(notes), FLAIR_WARNING if "flair" in modalities else "")


def _files(files: Sequence[Path], kind: str) -> dict[str, Path]:
    found = match(files, rf"(sub-strokecase\d{{4}})(?:_.*)?_{kind}{NIFTI}")
    return only(kind, ((fit[1].lower(), path) for path, fit in found))


def _image(of_kind: dict[str, dict[str, Path]], case: str, kind: str) -> Source:
    image = NiftiFile(of_kind[kind][case])
    return Resampled(image, onto=NiftiFile(of_kind["dwi"][case])) if kind == "flair" else image


COLLECTION = Collection(
    name="ISLES22",
    protocols=("isles22_dycon_fold0", "isles22_dycon_fold1", "isles22_dycon_fold2"),
    find=find_cases,
    channels=("DWI",),
    labels={"background": 0, "lesion": 1},
    rule=LabelRule(maps=({0: 0, 1: 1},)),
    license="CC BY-SA 4.0 (organisers' repository; copies elsewhere say CC BY 4.0)",
    reference="Hernandez Petzsche et al., Scientific Data 9:762 (2022)",
    prefix=PREFIX,
    inner=frozenset({"rawdata", "derivatives"}),
    empty=frozenset({f"{PREFIX}0150", f"{PREFIX}0151", f"{PREFIX}0170"}),
)


def convert_isles22(
    source: str | Path,
    dataset_id: int = 501,
    labeled: str | float | Path = 0.1,
    *,
    modalities: Sequence[str] = ("dwi",),
    **options: Any,
) -> Conversion:
    """Write ISLES-2022 as a raw data set.

    Parameters
    ----------
    source, dataset_id, labeled, options
        See `nnunetv2_dycon.conversion.convert.convert`.
    modalities : sequence of str
        Image channels in this order: 'dwi', then 'adc' and 'flair' in any order, or neither.

    Raises
    ------
    ConfigError, DataError, SplitError
        If `modalities` cannot be used; else as `convert`.
    """
    if modalities[0] != "dwi" or len(set(modalities)) < len(modalities) or not set(modalities) <= set(MODALITIES):
        raise ConfigError(
            f"--modalities {' '.join(modalities)}: give dwi first (masks are on its grid), then adc, flair as wanted"
        )
    chosen = replace(
        COLLECTION,
        find=partial(find_cases, modalities=tuple(modalities)),
        channels=tuple(kind.upper() for kind in modalities),
    )
    return convert(chosen, source, dataset_id, labeled, settings={"modalities": list(modalities)}, **options)


convert_collection = convert_isles22


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    arguments = converter_parser(COLLECTION.name, 501, COLLECTION.protocols)
    arguments.add_argument(
        "--modalities", nargs="+", choices=MODALITIES, default=("dwi",), help="image channels, dwi first (default: dwi)"
    )
    return arguments


if __name__ == "__main__":
    raise SystemExit(run_script(convert_isles22, parser()))
