"""The difference between the prepared unlabelled cases and those that the raw data set and the plans ask for."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_dycon.data.checked_cases import CaseReader
from nnunetv2_dycon.data.prepared_files import list_files, state_of_case
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few

if TYPE_CHECKING:
    from nnunetv2_dycon.data.manifest import Configuration, Manifest


@dataclass(frozen=True)
class Difference:
    """Difference between the prepared cases and the expected ones.

    Attributes
    ----------
    plans : tuple of str
        Entries of the plans that are not those of the prepared cases.
    new, changed, damaged, removed : tuple of str
        Cases that are not prepared, whose images changed, whose prepared files are not as they were written, and that
        are expected no longer.
    unsure : tuple of str
        Cases whose files have the right sizes and other times, or no record of either: copied ones, and those of an
        earlier version. Only their content tells whether they are whole.
    """

    plans: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()

    @property
    def state(self) -> Literal["ok", "missing", "stale"]:
        """See `UnlabeledStatus.state`."""
        if self.plans or self.changed or self.damaged or self.removed:
            return "stale"
        return "missing" if self.new else "ok"

    def __str__(self) -> str:
        parts = [f"plans changed ({', '.join(self.plans)})"] if self.plans else []
        for cases, what in (
            (self.new, "to prepare"),
            (self.changed, "with changed images"),
            (self.damaged, "with damaged files"),
            (self.removed, "removed"),
        ):
            if cases:
                parts.append(f"{len(cases)} case{'s' * (len(cases) > 1)} {what} ({first_few(cases)})")
        return "; ".join(parts)


def compare_manifest(
    config: "Configuration", manifest: "Manifest", expected: Mapping[str, Mapping[str, Any]]
) -> Difference:
    """Compare the prepared cases with the expected ones, by their records and by one listing of their folder.

    Parameters
    ----------
    config : Configuration
        The configuration.
    manifest : dict
        Content of its manifest.
    expected : mapping
        Records of the expected cases by name.
    """
    recorded, files = manifest["cases"], list_files(config.folder)
    plans = manifest["plans"] or config.entries
    # as text, where NaN equals NaN
    entries = tuple(sorted(key for key, value in config.entries.items() if _text(plans.get(key)) != _text(value)))
    found: dict[str, list[str]] = {kind: [] for kind in ("whole", "missing", "changed", "damaged", "unsure")}
    for case, record in sorted(expected.items()):
        kind: str = "missing"
        if not entries and case in recorded:
            kind = state_of_case(case, files, recorded[case].get("prepared"))
            if kind != "missing" and any(recorded[case][key] != record[key] for key in ("from", "files")):
                kind = "changed"
        found[kind].append(case)
    on_disk = {re.sub(r"(_seg)?\.(b2nd|pkl)$", "", name) for name in files if name.endswith((".b2nd", ".pkl"))}
    removed = sorted((on_disk | recorded.keys()) - expected.keys())
    return Difference(
        plans=entries,
        new=tuple(found["missing"]),
        changed=tuple(found["changed"]),
        damaged=tuple(found["damaged"]),
        removed=tuple(removed),
        unsure=tuple(found["unsure"]),
    )


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def open_unsure(difference: Difference, folder: Path, seconds: float) -> tuple[Difference, int]:
    """Open unsure cases for so long; returns the difference with those that are damaged, and how many were opened.

    Parameters
    ----------
    difference : Difference
        As `compare_manifest`.
    folder : Path
        Folder of the prepared cases.
    seconds : float
        When to stop: a training must not wait for thousands of cases.
    """
    end, opened, damaged = time.monotonic() + seconds, 0, []
    for case in difference.unsure:
        if time.monotonic() > end:
            break
        opened += 1
        try:
            CaseReader(nnUNetDatasetBlosc2, "")(str(folder), [case]).load_case(case)
        except DataError:
            damaged.append(case)
    return replace(difference, damaged=tuple(sorted({*difference.damaged, *damaged}))), opened
