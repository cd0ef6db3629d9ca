"""Preparation of images without labels by nnU-Net's own preprocessor.

For a data identifier ID (plans name and configuration) the dataset's preprocessed folder gets

- `ID_unlabeled/`: CASE.b2nd (C, X, Y, Z) float32, CASE_seg.b2nd (1, X, Y, Z) int16, 0 inside and -1 outside
  the nonzero mask, and CASE.pkl, written last, whose `class_locations` is empty;
- `ID_unlabeled.json`, the manifest: what each case was made from and with. It is beside the folder because
  nnU-Net refuses a data folder with a JSON file in it;
- `.ID_unlabeled.lock`, an empty file that keeps two runs from working at the same time.

Two things hold at any time, also after a kill: a case whose .pkl is there is whole, and a case that the
manifest names was made from just what the manifest says.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.dataset_name_id_conversion import (
    convert_dataset_name_to_id,
    maybe_convert_to_dataset_name,
)
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunetv2_dycon import __version__, parallel
from nnunetv2_dycon.data.roles import (
    Splits,
    benchmark_cases,
    channel_names,
    fold_unlabeled,
    read_roles,
    read_splits,
    unlabeled_name_problems,
)
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.folders import environment_folder
from nnunetv2_dycon.locks import locked

logger = logging.getLogger(__name__)

BENCHMARK_NOTE = (
    "benchmark mode: nnU-Net's planning saw the labels of the cases that splits_final.json lists as "
    '"unlabeled" (intensity statistics, spacing, patch size); a data set converted with these images in '
    "imagesUn avoids this"
)
UNCHECKED_NOTE = "the raw images are not there, so it was not checked whether they changed since preparation"

_FORMAT = 1
_SUFFIXES = (
    ".b2nd",
    "_seg.b2nd",
    ".pkl",
)  # in the order of writing: the last one says that the case is whole
_PLAN_ENTRIES = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
_SAVE_INTERVAL = 1.0  # s between two writes of the manifest; a kill costs the cases of at most this time

Manifest = dict[str, Any]


@dataclass(frozen=True)
class UnlabeledStatus:
    """State of the prepared unlabelled images of one configuration.

    Attributes
    ----------
    state : 'ok', 'missing' or 'stale'
        'missing': cases are not prepared yet; 'stale': plans or images changed, or images were removed.
    reason : str
        What is missing or changed, for people; empty for 'ok'.
    folder : Path
        Where the prepared cases are; nnU-Net's dataset class reads it.
    unlabeled, benchmark : tuple of str
        Cases from imagesUn, and cases of imagesTr that some fold lists as "unlabeled".
    notes : tuple of str
        Warnings that a training should repeat.
    command : str
        What to type to bring it up to date.
    """

    state: Literal["ok", "missing", "stale"]
    reason: str
    folder: Path
    unlabeled: tuple[str, ...]
    benchmark: tuple[str, ...]
    notes: tuple[str, ...]
    command: str

    def cases(self, splits: Splits, fold: int | str) -> tuple[str, ...]:
        """Unlabelled cases of one fold: all of imagesUn and the fold's own list, never another fold's.

        Raises
        ------
        ConfigError, SplitError
            As `nnunetv2_dycon.data.roles.fold_unlabeled`.
        DataError
            If the fold lists a case that is not prepared.
        """
        listed = fold_unlabeled(splits, fold)
        missing = sorted(set(listed) - set(self.benchmark))
        if missing:
            raise DataError(
                f'fold {fold} lists {missing[0]!r} as "unlabeled", which is not in {self.folder}; type: {self.command}'
            )
        return (*self.unlabeled, *listed)


@dataclass(frozen=True)
class _Target:
    """One configuration of one data set, and where its prepared images go."""

    dataset: str
    raw: Path | None
    preprocessed: Path
    dataset_json: dict[str, Any]
    plans: dict[str, Any]
    configuration: str
    folder: Path
    manifest: Path
    entries: dict[str, Any]

    @property
    def command(self) -> str:
        plans = self.plans.get("plans_name", "nnUNetPlans")
        option = "" if plans == "nnUNetPlans" else f" -p {plans}"
        number = convert_dataset_name_to_id(self.dataset)
        return f"nnUNetv2_dycon preprocess_unlabeled -d {number} -c {self.configuration}{option}"

    @property
    def work(self) -> Path:
        # hidden, and outside the data folder, so that nnU-Net never takes a half-written file for data
        return self.folder.with_name(f".{self.folder.name}.tmp")


@dataclass(frozen=True)
class _Task:
    """What a worker process needs to make one case; picklable."""

    case: str
    files: tuple[str, ...]
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    folder: str
    work: str


@dataclass(frozen=True)
class _Difference:
    """What separates the folder from what it should hold."""

    plans: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def state(self) -> Literal["ok", "missing", "stale"]:
        if self.plans or self.changed or self.removed:
            return "stale"
        return "missing" if self.new else "ok"

    def __str__(self) -> str:
        parts = [f"plans changed ({', '.join(self.plans)})"] if self.plans else []
        for cases, what in (
            (self.new, "to prepare"),
            (self.changed, "with changed images"),
            (self.removed, "removed"),
        ):
            if cases:
                parts.append(f"{len(cases)} case{'s' * (len(cases) > 1)} {what} ({_shortened(cases, ', ')})")
        return "; ".join(parts)


def unlabeled_folder(preprocessed_dataset_folder: str | Path, data_identifier: str) -> tuple[Path, Path]:
    """Folder of the prepared unlabelled images of a data identifier, and their manifest beside it."""
    folder = Path(preprocessed_dataset_folder, f"{data_identifier}_unlabeled")
    return folder, folder.with_name(folder.name + ".json")


def preprocess_unlabeled(
    dataset: int | str,
    configurations: Sequence[str] = ("3d_fullres",),
    plans: str | Mapping[str, Any] = "nnUNetPlans",
    processes: int = 8,
    overwrite: bool = False,
) -> list[Path]:
    """Prepare all images that serve without labels; returns one folder a data identifier.

    Taken are the images of imagesUn and, in benchmark mode, those cases of imagesTr that a fold of
    splits_final.json lists as "unlabeled". No label file is opened. Only what is missing or out of date is
    made; a killed run goes on where it stopped; cases whose images are gone are removed. Bad images do not
    keep the good ones from being prepared.

    Parameters
    ----------
    dataset : int or str
        Dataset ID or full name, as in nnU-Net's commands.
    configurations : sequence of str
        Configurations of the plans.
    plans : str or mapping
        Name of the plans file, or the plans themselves.
    processes : int
        Worker processes; 1 works in this process.
    overwrite : bool
        Make all cases anew.

    Raises
    ------
    ConfigError
        If a configuration is not in the plans, or `processes` is below 1.
    DataError
        If folders, plans or images are missing or unusable, or nothing can be written.
    SplitError
        If a case has two roles or an "unlabeled" list is wrong.
    """
    if processes < 1:
        raise ConfigError(f"-np {processes}: the number of processes must be at least 1")
    names = (configurations,) if isinstance(configurations, str) else tuple(configurations)
    targets = [_target(dataset, name, plans, need_raw=True) for name in names]
    unique = {target.folder: target for target in targets}  # configurations may share their data
    for target in unique.values():
        with _writing(target.folder):
            lock = target.folder.with_name(f".{target.folder.name}.lock")
            lock.touch()
        busy = f"{target.folder}: another process is preparing these images; waiting for it"
        with locked(lock, busy, wait=True):  # folds started together wait for the first one to prepare the data
            _prepare(target, processes, overwrite)
    return list(unique)


def unlabeled_status(
    dataset: int | str, configuration: str = "3d_fullres", plans: str | Mapping[str, Any] = "nnUNetPlans"
) -> UnlabeledStatus:
    """Whether the unlabelled images of a configuration are prepared and up to date; nothing is changed.

    Without the raw data set only the prepared files themselves can be judged; a note says so.

    Raises
    ------
    ConfigError, DataError, SplitError
        As `preprocess_unlabeled`, except for images, which are not opened.
    """
    target = _target(dataset, configuration, plans, need_raw=False)
    manifest = _read_manifest(target)
    if target.raw is None:
        expected, notes = _recorded(target, manifest), [UNCHECKED_NOTE]
    else:
        expected, notes = _expected(target), []
    difference = _compare(target, manifest, expected)
    by_source: dict[str, list[str]] = {"imagesUn": [], "imagesTr": []}
    for case in sorted(expected):
        by_source[expected[case]["from"]].append(case)
    if by_source["imagesTr"]:
        notes.append(BENCHMARK_NOTE)
    return UnlabeledStatus(
        state=difference.state,
        reason=str(difference),
        folder=target.folder,
        unlabeled=tuple(by_source["imagesUn"]),
        benchmark=tuple(by_source["imagesTr"]),
        notes=tuple(notes),
        command=target.command,
    )


# ---- what is asked for -------------------------------------------------------------------------------------


def _target(dataset: int | str, configuration: str, plans: str | Mapping[str, Any], need_raw: bool) -> _Target:
    base = environment_folder("nnUNet_preprocessed")
    raw_base = environment_folder("nnUNet_raw") if need_raw or nnUNet_raw.get() else None
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
        number = convert_dataset_name_to_id(name)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise DataError(f"dataset {dataset}: {reason}; check the ID, nnUNet_raw and nnUNet_preprocessed") from error
    raw = raw_base / name if raw_base else None
    if need_raw and raw is not None and not raw.is_dir():
        raise DataError(f"{raw} does not exist; put the data set there or correct nnUNet_raw")
    command = f"nnUNetv2_plan_and_preprocess -d {number} -c {configuration}"
    loaded = _load_plans(base / name, plans, command)
    if configuration not in loaded["configurations"]:
        raise ConfigError(
            f"configuration {configuration!r} is not in the plans of {name}; there are: "
            f"{', '.join(loaded['configurations'])}"
        )
    dataset_json = _load_json(base / name / "dataset.json", command)
    manager = PlansManager(loaded)
    settings = manager.get_configuration(configuration)
    folder, manifest = unlabeled_folder(base / name, settings.data_identifier)
    return _Target(
        dataset=name,
        raw=raw if raw is not None and raw.is_dir() else None,
        preprocessed=base / name,
        dataset_json=dataset_json,
        plans=loaded,
        configuration=configuration,
        folder=folder,
        manifest=manifest,
        entries=_entries_that_matter(manager, settings, dataset_json),
    )


def _load_plans(folder: Path, plans: str | Mapping[str, Any], command: str) -> dict[str, Any]:
    if not isinstance(plans, str):
        return dict(plans)
    hint = "" if plans == "nnUNetPlans" else f" (with -pl or -overwrite_plans_name, so that it makes {plans})"
    return _load_json(folder / f"{plans}.json", command + hint)


def _load_json(path: Path, command: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; type: {command}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON ({error}); type: {command}") from error


def _entries_that_matter(
    plans: PlansManager, configuration: ConfigurationManager, dataset_json: Mapping[str, Any]
) -> dict[str, Any]:
    # patch and batch size, architecture and labels are left out: they do not change a prepared image
    entries = {key: configuration.configuration.get(key) for key in _PLAN_ENTRIES}
    entries["image_reader_writer"] = plans.plans["image_reader_writer"]
    entries["transpose_forward"] = plans.transpose_forward
    entries["foreground_intensity_properties_per_channel"] = plans.foreground_intensity_properties_per_channel
    entries["channel_names"] = channel_names(dataset_json)
    entries["file_ending"] = dataset_json["file_ending"]
    return json.loads(json.dumps(entries))


# ---- what there is and what there should be ----------------------------------------------------------------


def _expected(target: _Target) -> dict[str, dict[str, Any]]:
    """Manifest records of all cases that should be prepared, from the raw data set."""
    raw, ending = target.raw, target.dataset_json["file_ending"]
    images = raw / "imagesUn"
    roles = read_roles(raw, target.dataset_json)
    listed = benchmark_cases(read_splits(target.preprocessed, raw), roles.labeled)
    problems = unlabeled_name_problems(raw, roles, target.dataset_json)
    if problems:
        raise DataError(_bad_files(problems))
    if not roles.unlabeled and not listed:
        raise DataError(
            f"{images} {'holds no image' if images.is_dir() else 'does not exist'} and no fold of "
            'splits_final.json has an "unlabeled" list; put images without labels there, '
            f"as CASE_0000{ending}"
        )
    sources = {**dict.fromkeys(roles.unlabeled, "imagesUn"), **dict.fromkeys(listed, "imagesTr")}
    return {case: _record(source, roles.files[case], raw, ending) for case, source in sources.items()}


def _record(source: str, files: Sequence[Path], raw: Path, ending: str) -> dict[str, Any]:
    stem = files[0].name.removesuffix(ending)[: -len("_0000")]
    sidecar = files[0].with_name(f"{stem}.json")  # nnU-Net's TIFF reader takes the spacing from it
    described = []
    for path in (*files, *([sidecar] if sidecar.is_file() else [])):
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; restore it or remove the case") from error
        name = path.relative_to(raw) if path.is_relative_to(raw) else path
        described.append({"name": str(name), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return {"from": source, "files": described}


def _recorded(target: _Target, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The same from the manifest alone, for machines that have no raw data."""
    listed = benchmark_cases(read_splits(target.preprocessed))
    cases = {case: {"from": record["from"], "files": record["files"]} for case, record in manifest["cases"].items()}
    if not cases and not listed:
        raise DataError(
            f"{target.folder} holds no prepared case and there is no raw data set {target.dataset}; "
            "set nnUNet_raw, or copy the prepared folder and its .json here"
        )
    return {**{case: {"from": "imagesTr", "files": None} for case in listed}, **cases}


def _read_manifest(target: _Target) -> Manifest:
    """The manifest; an empty one, which makes all cases new, where there is none that can be used."""
    empty = {"format": _FORMAT, "dataset": target.dataset, "plans": None, "cases": {}}
    try:
        manifest = json.loads(target.manifest.read_text())
    except (FileNotFoundError, ValueError):
        return empty
    return manifest if isinstance(manifest, dict) and manifest.get("format") == _FORMAT else empty


def _write_manifest(target: _Target, manifest: Manifest) -> None:
    part = target.work / "manifest"
    with _writing(target.manifest):
        part.write_text(json.dumps(manifest, indent=1, sort_keys=True))
        _to_disk(part)
        os.replace(part, target.manifest)


def _compare(target: _Target, manifest: Manifest, expected: Mapping[str, Mapping[str, Any]]) -> _Difference:
    recorded = manifest["cases"]
    present = set(os.listdir(target.folder)) if target.folder.is_dir() else set()
    plans = manifest["plans"] or target.entries
    # compared as text, where NaN equals NaN
    entries = tuple(sorted(key for key, value in target.entries.items() if _text(plans.get(key)) != _text(value)))
    new, changed = [], []
    for case, record in sorted(expected.items()):
        if entries or case not in recorded or not {case + suffix for suffix in _SUFFIXES} <= present:
            new.append(case)
        elif any(recorded[case][key] != record[key] for key in ("from", "files")):
            changed.append(case)
    on_disk = {re.sub(r"(_seg)?\.(b2nd|pkl)$", "", name) for name in present if name.endswith((".b2nd", ".pkl"))}
    removed = sorted((on_disk | recorded.keys()) - expected.keys())
    return _Difference(entries, tuple(new), tuple(changed), tuple(removed))


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


# ---- making it ---------------------------------------------------------------------------------------------


def _prepare(target: _Target, processes: int, overwrite: bool) -> None:
    """Bring the folder of one data identifier up to date; the caller holds the lock."""
    shutil.rmtree(target.work, ignore_errors=True)  # what a killed run left
    expected, manifest = _expected(target), _read_manifest(target)
    difference = _compare(target, manifest, expected)
    if any(record["from"] == "imagesTr" for record in expected.values()):
        logger.warning("%s: %s", target.dataset, BENCHMARK_NOTE)
    if difference.state == "ok" and not overwrite:
        logger.info("%s: %d cases are up to date", target.folder, len(expected))
        return
    logger.info("%s: %s", target.folder, "all cases anew" if overwrite else difference)
    todo = sorted(expected) if overwrite else sorted((*difference.new, *difference.changed))
    kept = expected.keys() - set(todo)
    manifest = {
        "format": _FORMAT,
        "dataset": target.dataset,
        "plans": target.entries,
        "cases": {case: manifest["cases"][case] for case in sorted(kept)},
    }
    with _writing(target.folder):
        for folder in (target.folder, target.work):
            folder.mkdir(exist_ok=True)
        _write_manifest(target, manifest)  # names nothing that is about to change
        for case in difference.removed:
            _remove(target.folder, case)
    try:
        problems = _make_all(target, manifest, {case: expected[case] for case in todo}, processes)
    finally:
        _write_manifest(target, manifest)
        shutil.rmtree(target.work, ignore_errors=True)
    if problems:
        raise DataError(_bad_files(problems))


def _make_all(target: _Target, manifest: Manifest, records: Mapping[str, dict[str, Any]], processes: int) -> list[str]:
    """Make the cases of `records` and enter them into `manifest`; returns what is wrong with the others."""
    made_with = f"nnunetv2_dycon {__version__}, nnunetv2 {version('nnunetv2')}"
    tasks = [_task(target, case, record) for case, record in records.items()]
    problems, saved = [], -_SAVE_INTERVAL
    with closing(parallel.run(_make_case, tasks, processes)) as results:
        for task, problem in tqdm(results, total=len(tasks), desc="Preparing unlabelled cases", disable=not tasks):
            if problem is not None:
                problems.append(problem)
                continue
            manifest["cases"][task.case] = {**records[task.case], "made_with": made_with}
            if time.monotonic() - saved >= _SAVE_INTERVAL:
                _write_manifest(target, manifest)
                saved = time.monotonic()
    return problems


def _task(target: _Target, case: str, record: Mapping[str, Any]) -> _Task:
    paths = (target.raw / file["name"] for file in record["files"])
    return _Task(
        case=case,
        files=tuple(str(path) for path in paths if path.name.endswith(target.dataset_json["file_ending"])),
        plans=target.plans,
        configuration=target.configuration,
        dataset_json=target.dataset_json,
        folder=str(target.folder),
        work=str(target.work),
    )


def _make_case(task: _Task) -> str | None:
    """Prepare one case; returns what is wrong with its images, None if it is done."""
    plans = PlansManager(task.plans)
    configuration = plans.get_configuration(task.configuration)
    try:
        image, properties = _read_image(task.files, plans, len(channel_names(task.dataset_json)))
    except DataError as error:
        return str(error)
    # reading, then run_case_npy, is what nnU-Net's run_case does; apart, so that checks need not read again
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
    return None


def _read_image(files: Sequence[str], plans: PlansManager, channels: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Image (C, X, Y, Z) and properties by nnU-Net's reader, refused if no network could use it."""
    names = ", ".join(files)
    reader = plans.image_reader_writer_class
    try:
        not_finite = [_not_finite_on_disk(file) if issubclass(reader, SimpleITKIO) else 0 for file in files]
        image, properties = reader().read_images(files)
    except MemoryError:
        raise
    except Exception as error:  # every reader has its own
        reason = (str(error).strip().splitlines() or ["channels differ in shape or spacing"])[-1].strip()
        raise DataError(f"{names} cannot be read ({reason[-200:]}); replace or remove it") from error
    if len(image) > max(channels, len(files)):
        raise DataError(f"{names} is 4-D ({len(image)} volumes); write one 3-D file a channel: CASE_0000, CASE_0001")
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
    """Number of NaN and Inf in a NIfTI file.

    SimpleITK cannot tell: it reads both as 0, and the missing part of a truncated file too.
    """
    if not file.endswith((".nii", ".nii.gz")):
        return 0
    values = np.asanyarray(nibabel.load(file).dataobj.get_unscaled())
    return values.size - int(np.count_nonzero(np.isfinite(values))) if values.dtype.kind in "fc" else 0


def _save(
    task: _Task,
    data: np.ndarray,
    mask: np.ndarray,
    properties: dict[str, Any],
    configuration: ConfigurationManager,
) -> None:
    patch = tuple(configuration.patch_size)
    blocks, chunks = comp_blosc2_params(data.shape, patch, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(mask.shape, patch, mask.itemsize)
    with _writing(Path(task.folder)), tempfile.TemporaryDirectory(dir=task.work) as scratch:
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
        for suffix in _SUFFIXES:
            _to_disk(Path(scratch, task.case + suffix))
        _remove(Path(task.folder), task.case)
        for suffix in _SUFFIXES:
            os.replace(os.path.join(scratch, task.case + suffix), os.path.join(task.folder, task.case + suffix))


def _remove(folder: Path, case: str) -> None:
    for suffix in reversed(_SUFFIXES):  # first the mark of a whole case
        (folder / (case + suffix)).unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    # a rename may reach the disk before the content does; after a power cut the case would look whole
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing below or at `path` into one line."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or path}: {error.strerror or error}; check its permissions and "
            "the free space, or let nnUNet_preprocessed point elsewhere"
        ) from error


def _bad_files(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} files are bad: {_shortened(problems, ' | ')}"


def _shortened(items: Sequence[str], separator: str, limit: int = 3) -> str:
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
