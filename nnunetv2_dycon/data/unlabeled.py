"""Preparation of images without labels by nnU-Net's own preprocessor.

For a data identifier ID (plans name and configuration) the dataset's preprocessed folder gets

- `ID_unlabeled/`: CASE.b2nd (C, X, Y, Z) float32, CASE_seg.b2nd (1, X, Y, Z) int16, 0 inside and -1 outside
  the nonzero mask, and CASE.pkl, written last, whose `class_locations` is empty;
- `ID_unlabeled.json`, the manifest: the files, plans and versions that each case was made from, and sizes, times and
  digest of what was written;
- `.ID_unlabeled.lock`, an empty file that keeps two runs from working at the same time.

At any time, also after a kill, a case with a .pkl is complete, and a case in the manifest was made from exactly
the files and plans that the manifest records.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_dycon import __version__, parallel
from nnunetv2_dycon.data.difference import Difference, compare_manifest
from nnunetv2_dycon.data.manifest import (
    BENCHMARK_NOTE,
    ELSEWHERE,
    FORMAT,
    Configuration,
    Manifest,
    bad_files,
    expected_cases,
    find_configuration,
    read_manifest,
    write_manifest,
)
from nnunetv2_dycon.data.prepare_case import CaseToPrepare, prepare_case
from nnunetv2_dycon.data.prepared_files import look_at, remove_case
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.files import first_few, remove_leftovers, writing
from nnunetv2_dycon.locks import locked

logger = logging.getLogger(__name__)

_SAVE_INTERVAL = 1.0  # s between two writes of the manifest; a kill loses at most the cases of this time


def preprocess_unlabeled(
    dataset: int | str,
    configurations: Sequence[str] = ("3d_fullres",),
    plans: str | Mapping[str, Any] = "nnUNetPlans",
    processes: int | None = None,
    overwrite: bool = False,
    again: Sequence[str] = (),
) -> list[Path]:
    """Prepare all images that are used without labels; returns one folder per data identifier.

    These are the images of imagesUn and, in benchmark mode, the cases of imagesTr that a fold of splits_final.json
    lists as "unlabeled". No label file is opened. Only missing, outdated and damaged cases are prepared; a killed run
    continues where it stopped; cases without an image are removed. The good images are prepared even if others
    are bad.

    Parameters
    ----------
    dataset : int or str
        Dataset ID or full name, as in nnU-Net's commands.
    configurations : sequence of str
        Configurations of the plans.
    plans : str or mapping
        Name of the plans file, or the plans themselves.
    processes : int, optional
        Worker processes; one per processor, at most 8, by default. 1 works in this process.
    overwrite : bool
        Prepare all cases again.
    again : sequence of str
        Cases to prepare again.

    Raises
    ------
    ConfigError
        If a configuration is not in the plans, or `processes` is below 1.
    DataError
        If folders, plans or images are missing or unusable, or nothing can be written.
    SplitError
        If a case has two roles or an "unlabeled" list is wrong.
    """
    processes = parallel.worker_processes(processes)
    names = (configurations,) if isinstance(configurations, str) else tuple(configurations)
    configs = [find_configuration(dataset, name, plans, need_raw=True) for name in names]
    unique = {config.folder: config for config in configs}  # configurations may share their data
    for config in unique.values():
        with writing(config.folder, ELSEWHERE):
            lock = config.folder.with_name(f".{config.folder.name}.lock")
            lock.touch()
        busy = f"{config.folder}: another process is preparing these images; waiting for it"
        with locked(lock, busy, wait=True):  # folds started together wait for the first one to prepare the data
            _prepare(config, processes, overwrite, again)
    return list(unique)


def _prepare(config: Configuration, processes: int, overwrite: bool, again: Sequence[str]) -> None:
    """Bring the folder of one data identifier up to date; the caller holds the lock."""
    shutil.rmtree(config.work, ignore_errors=True)  # left by a killed run
    remove_leftovers(config.manifest.parent, config.manifest.name)
    expected, manifest = expected_cases(config), read_manifest(config)
    unknown = sorted(set(again) - expected.keys())
    if unknown:
        raise DataError(f"--again {unknown[0]}: {config.dataset} has no unlabelled case of that name; correct it")
    difference = compare_manifest(config, manifest, expected)
    if any(record["from"] == "imagesTr" for record in expected.values()):
        logger.warning("%s: %s", config.dataset, BENCHMARK_NOTE)
    if not overwrite:
        difference = _after_a_look(config, manifest, difference, processes)
    if difference.state == "ok" and not overwrite and not again:
        logger.info("%s: %d cases are up to date", config.folder, len(expected))
        return
    logger.info("%s: %s", config.folder, "all cases again" if overwrite else difference or f"again {first_few(again)}")
    todo = sorted(expected if overwrite else {*difference.new, *difference.changed, *difference.damaged, *again})
    kept = expected.keys() - set(todo)
    manifest = {
        "format": FORMAT,
        "dataset": config.dataset,
        "plans": config.entries,
        "cases": {case: manifest["cases"][case] for case in sorted(kept)},
    }
    try:
        with writing(config.folder, ELSEWHERE):
            for folder in (config.folder, config.work):
                folder.mkdir(exist_ok=True)
            write_manifest(config, manifest)  # names nothing that is about to change
            for case in difference.removed:
                remove_case(config.folder, case)
        problems = _make_all(config, manifest, {case: expected[case] for case in todo}, processes)
    finally:
        shutil.rmtree(config.work, ignore_errors=True)  # first, for the space that it takes on a full disk
        write_manifest(config, manifest)
    if problems:
        raise DataError(bad_files(problems))


def _after_a_look(config: Configuration, manifest: Manifest, difference: Difference, processes: int) -> Difference:
    """Read the content of unsure cases: whole ones get a new record in the manifest, the others count as damaged."""
    if not difference.unsure:
        return difference
    logger.info("%s: looking at the content of %d cases", config.folder, len(difference.unsure))
    records = manifest["cases"]
    with ThreadPoolExecutor(processes) as pool:  # reading and hashing leave Python's lock to others
        looks = pool.map(lambda case: look_at(config.folder, case, records[case].get("prepared")), difference.unsure)
        progress = tqdm(looks, total=len(difference.unsure), desc="Reading unlabelled cases")
        found = dict(zip(difference.unsure, progress, strict=True))
    damaged = {case for case, record in found.items() if record is None}
    for case in found.keys() - damaged:
        records[case]["prepared"] = found[case]
    with writing(config.folder, ELSEWHERE):
        write_manifest(config, manifest)
    return replace(difference, damaged=tuple(sorted({*difference.damaged, *damaged})), unsure=())


def _make_all(
    config: Configuration, manifest: Manifest, records: Mapping[str, dict[str, Any]], processes: int
) -> list[str]:
    """Prepare the cases of `records` and enter them into `manifest`; returns the problems with the others."""
    made_with = f"nnunetv2_dycon {__version__}, nnunetv2 {version('nnunetv2')}"
    tasks = [_case_to_prepare(config, case, record) for case, record in records.items()]
    problems, saved = [], -_SAVE_INTERVAL
    with closing(parallel.run(prepare_case, tasks, processes)) as results:
        for task, prepared in tqdm(results, total=len(tasks), desc="Preparing unlabelled cases", disable=not tasks):
            if isinstance(prepared, str):
                problems.append(prepared)
                continue
            manifest["cases"][task.case] = {**records[task.case], "made_with": made_with, "prepared": prepared}
            if time.monotonic() - saved >= _SAVE_INTERVAL:
                write_manifest(config, manifest)
                saved = time.monotonic()
    return problems


def _case_to_prepare(config: Configuration, case: str, record: Mapping[str, Any]) -> CaseToPrepare:
    paths = (config.raw / file["name"] for file in record["files"])
    return CaseToPrepare(
        case=case,
        files=tuple(str(path) for path in paths if path.name.endswith(config.dataset_json["file_ending"])),
        plans=config.plans,
        configuration=config.name,
        dataset_json=config.dataset_json,
        folder=str(config.folder),
        work=str(config.work),
    )
