"""BTCV, abdominal organs (Synapse syn3193805): `RawData/Training/{img,label}`, or imagesTr and labelsTr.

    python dataset_conversion/Dataset505_BTCV.py SOURCE -d 505 --labeled 4

Papers use at least four different splits of the same 30 cases: always report the protocol with a result.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_dycon.conversion.cases import LabelRule, SourceCase
from nnunetv2_dycon.conversion.commands import converter_parser, run_script
from nnunetv2_dycon.conversion.convert import Collection, Found, convert
from nnunetv2_dycon.conversion.job import Conversion
from nnunetv2_dycon.conversion.source import NIFTI, match, only
from nnunetv2_dycon.conversion.volumes import NiftiFile
from nnunetv2_dycon.errors import DataError

PREFIX = "img"
ORGANS = (
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "portal_and_splenic_vein",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
)


def find_cases(files: Sequence[Path]) -> Found:
    """Return the cases by number; files below RegData are left out, since they were registered and resampled.

    Raises
    ------
    DataError
        If there is only RegData.
    """
    raw = [path for path in files if "regdata" not in (part.lower() for part in path.parts)]
    if files and not raw:
        raise DataError(f"{files[0]} is of RegData, whose scans were registered and resampled; give RawData")
    images = only("the scan", ((f"{PREFIX}{fit[1]}", path) for path, fit in match(raw, rf"img(\d{{4}}){NIFTI}")))
    labels = only("the label", ((f"{PREFIX}{fit[1]}", path) for path, fit in match(raw, rf"label(\d{{4}}){NIFTI}")))
    return Found(
        {
            case: SourceCase((NiftiFile(path),), NiftiFile(labels[case]) if case in labels else None)
            for case, path in images.items()
        }
    )


COLLECTION = Collection(
    name="BTCV",
    protocols=("btcv_dhc_v1", "btcv_genericssl", "btcv_skcdf", "btcv_magicnet_18_12"),
    find=find_cases,
    channels=("CT",),
    labels={"background": 0, **{organ: value for value, organ in enumerate(ORGANS, 1)}},
    rule=LabelRule(
        maps=({value: value for value in range(len(ORGANS) + 1)},),
        hint=": 14 organs or other numbers are those of another collection (Zenodo 1169361 has the duodenum as 14)",
    ),
    license="Synapse syn3193805: registration, no redistribution",
    reference="Landman et al., Multi-Atlas Labeling Beyond the Cranial Vault (2015)",
    prefix=PREFIX,
    inner=frozenset({"img", "label", "training", "imagestr", "labelstr"}),
)


def convert_btcv(
    source: str | Path, dataset_id: int = 505, labeled: str | float | Path = 4, **options: Any
) -> Conversion:
    """Write BTCV as a raw data set.

    Parameters
    ----------
    source, dataset_id, labeled, options
        See `nnunetv2_dycon.conversion.convert.convert`.
    """
    return convert(COLLECTION, source, dataset_id, labeled, **options)


convert_collection = convert_btcv


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    return converter_parser(COLLECTION.name, 505, COLLECTION.protocols)


if __name__ == "__main__":
    raise SystemExit(run_script(convert_btcv, parser()))
