"""BraTS 2019, brain tumours: HGG and LGG folders or a flat tree, `.nii.gz` or `.nii`, doubled folders.

    python dataset_conversion/Dataset502_BraTS19.py SOURCE -d 502 --labeled 25

By default one channel (FLAIR) and one label (whole tumour), as semi-supervised papers use it.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2_dycon.conversion.cases import LabelRule, SourceCase
from nnunetv2_dycon.conversion.commands import converter_parser, run_script
from nnunetv2_dycon.conversion.convert import Collection, Found, convert
from nnunetv2_dycon.conversion.job import Conversion
from nnunetv2_dycon.conversion.source import NIFTI, match, only
from nnunetv2_dycon.conversion.volumes import NiftiFile
from nnunetv2_dycon.errors import ConfigError, DataError

# The first name is that of 2019; copies and later years use the others.
NAMES = {
    "t1": ("t1", "t1n"),
    "t1ce": ("t1ce", "t1c", "t1gd"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "t2f"),
    "seg": ("seg", "label"),
}
MODALITIES = ("t1", "t1ce", "t2", "flair")
LABELS = {
    "whole": ({"background": 0, "whole_tumor": 1}, {0: 0, 1: 1, 2: 1, 4: 1}),
    "multi": ({"background": 0, "necrosis": 1, "edema": 2, "enhancing": 3}, {0: 0, 1: 1, 2: 2, 4: 3}),
}


def find_cases(files: Sequence[Path], modalities: Sequence[str] = ("flair",)) -> Found:
    """Return the cases by the names of their files; folders such as HGG and LGG make no difference.

    Raises
    ------
    DataError
        If a case lacks one of `modalities`.
    """
    notes: list[str] = []
    of_kind = {kind: _files(files, kind, notes) for kind in (*modalities, "seg")}
    names = sorted({case for kind in modalities for case in of_kind[kind]})
    cases = {}
    for case in names:
        lacking = [kind for kind in modalities if case not in of_kind[kind]]
        if lacking:
            folder = next(of_kind[kind][case].parent for kind in modalities if case in of_kind[kind])
            raise DataError(f"{folder} has no {case}_{lacking[0]}.nii.gz (or .nii); fetch it again")
        mask = of_kind["seg"].get(case)
        cases[case] = SourceCase(
            tuple(NiftiFile(of_kind[k][case]) for k in modalities), NiftiFile(mask) if mask else None
        )
    return Found(cases, tuple(notes))


def _files(files: Sequence[Path], kind: str, notes: list[str]) -> dict[str, Path]:
    usual, *others = NAMES[kind]
    fits = match(files, rf"(.*brats.*?)[_-]({'|'.join(NAMES[kind])}){NIFTI}")
    found = [(fit[1], path) for path, fit in fits]
    foreign = [path.name for path, fit in fits if fit[2].lower() in others]
    if foreign:
        more = f", like {len(foreign) - 1} others" if len(foreign) > 1 else ""
        notes.append(f"{foreign[0]} was taken for {usual}{more}")
    if kind == "seg":
        for path, _ in match(files, rf".*segm{NIFTI}"):  # one case of a later year has its mask under a foreign name
            if re.match(r".*brats", path.parent.name, re.IGNORECASE):
                found.append((path.parent.name, path))
                notes.append(f"{path.name} was taken for the mask of {path.parent.name}")
    return only(usual, found)


COLLECTION = Collection(
    name="BraTS19",
    protocols=("brats19_250_25_60",),
    find=find_cases,
    channels=("FLAIR",),
    labels=LABELS["whole"][0],
    rule=LabelRule(maps=(LABELS["whole"][1],)),
    license="Terms of the BraTS 2019 challenge: registration, research use, no redistribution",
    reference="Menze et al. 2014; Bakas et al. 2017; Bakas et al. 2018",
    inner=frozenset({"hgg", "lgg"}),
)


def convert_brats19(
    source: str | Path,
    dataset_id: int = 502,
    labeled: str | float | Path = 25,
    *,
    modalities: Sequence[str] = ("flair",),
    labels: str = "whole",
    **options: Any,
) -> Conversion:
    """Write BraTS 2019 as a raw data set.

    Parameters
    ----------
    source, dataset_id, labeled, options
        See `nnunetv2_dycon.conversion.convert.convert`.
    modalities : sequence of str
        Image channels in this order, of 't1', 't1ce', 't2', 'flair'; an empty list or 'all' means all four.
    labels : str
        'whole' (any tumour) or 'multi' (1 necrosis, 2 oedema, 3 enhancing, which is 4 in the collection).

    Raises
    ------
    ConfigError, DataError, SplitError
        If `modalities` or `labels` cannot be used; else as `convert`.
    """
    if tuple(modalities) in ((), ("all",)):
        modalities = MODALITIES
    if len(set(modalities)) < len(modalities) or not set(modalities) <= set(MODALITIES):
        raise ConfigError(f"--modalities {' '.join(modalities)}: give each of {', '.join(MODALITIES)} at most once")
    if labels not in LABELS:
        raise ConfigError(f"--labels {labels}: give {' or '.join(LABELS)}")
    chosen = replace(
        COLLECTION,
        find=partial(find_cases, modalities=tuple(modalities)),
        channels=tuple({"t1ce": "T1ce"}.get(kind, kind.upper()) for kind in modalities),
        labels=LABELS[labels][0],
        rule=LabelRule(maps=(LABELS[labels][1],)),
    )
    settings = {"modalities": list(modalities), "labels": labels}
    return convert(chosen, source, dataset_id, labeled, settings=settings, **options)


convert_collection = convert_brats19


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    arguments = converter_parser(COLLECTION.name, 502, COLLECTION.protocols)
    arguments.add_argument(
        "--modalities",
        nargs="*",
        choices=(*MODALITIES, "all"),
        default=("flair",),
        help="image channels; without a name all four (default: flair)",
    )
    arguments.add_argument("--labels", choices=tuple(LABELS), default="whole", help="whole tumour, or its three parts")
    return arguments


if __name__ == "__main__":
    raise SystemExit(run_script(convert_brats19, parser()))
