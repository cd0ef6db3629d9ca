"""The manifest of prepared unlabelled images, compared with the raw data set and the plans.

The manifest `ID_unlabeled.json` of a data identifier ID (plans name and configuration) is next to the folder
`ID_unlabeled/`, because nnU-Net refuses a data folder with a JSON file in it. It records for each case the
files and the plans that the case was made from.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_dycon.data.dataset_json import channel_names, check_dataset_json
from nnunetv2_dycon.data.datasets import dataset_name, dataset_number
from nnunetv2_dycon.data.difference import compare_manifest, open_unsure
from nnunetv2_dycon.data.file_names import unlabeled_name_problems
from nnunetv2_dycon.data.plans import reads_plans
from nnunetv2_dycon.data.roles import image_sidecar, read_roles
from nnunetv2_dycon.data.splits import Splits, benchmark_cases, fold_unlabeled, read_splits
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.files import check_case_names, first_few, read_json, write_json
from nnunetv2_dycon.folders import environment_folder

BENCHMARK_NOTE = (
    "benchmark mode: nnU-Net's planning saw the labels of the cases that splits_final.json lists as "
    '"unlabeled" (intensity statistics, spacing, patch size); a data set converted with these images in '
    "imagesUn avoids this"
)
UNCHECKED_NOTE = "the raw images are not there, so it was not checked whether they changed since preparation"
FORMAT = 1
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
_OPENING = 1.0  # s in which cases are opened whose files may be damaged
ELSEWHERE = "or let nnUNet_preprocessed point elsewhere"  # ends errors about writing

Manifest = dict[str, Any]


@dataclass(frozen=True)
class UnlabeledStatus:
    """State of the prepared unlabelled images of one configuration.

    Attributes
    ----------
    state : 'ok', 'missing' or 'stale'
        'missing': cases are not prepared yet; 'stale': plans or images changed, prepared files are damaged, or images
        were removed.
    reason : str
        The missing, changed or damaged cases and plans, in words; empty for 'ok'.
    folder : Path
        Where the prepared cases are; nnU-Net's dataset class reads it.
    unlabeled, benchmark : tuple of str
        Cases of imagesUn, and cases of imagesTr that some fold lists as "unlabeled".
    notes : tuple of str
        Warnings for the log of a training.
    command : str
        The command that brings it up to date.
    """

    state: Literal["ok", "missing", "stale"]
    reason: str
    folder: Path
    unlabeled: tuple[str, ...]
    benchmark: tuple[str, ...]
    notes: tuple[str, ...]
    command: str

    def cases(self, splits: Splits, fold: int | str) -> tuple[str, ...]:
        """Return the unlabelled cases of one fold: all of imagesUn and the fold's own list.

        Raises
        ------
        ConfigError, SplitError
            As `nnunetv2_dycon.data.splits.fold_unlabeled`.
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
class Configuration:
    """One configuration of one data set, and the place of its prepared images.

    Attributes
    ----------
    dataset : str
        Full name of the data set.
    raw : Path or None
        The raw data set, where it is on this machine.
    preprocessed : Path
        nnU-Net's preprocessed folder of the data set.
    dataset_json, plans : dict
        Content of these two files.
    name : str
        Name in the plans.
    folder, manifest : Path
        Folder of the prepared images, and their manifest.
    entries : dict
        Entries of plans and dataset.json that change a prepared image.
    """

    dataset: str
    raw: Path | None
    preprocessed: Path
    dataset_json: dict[str, Any]
    plans: dict[str, Any]
    name: str
    folder: Path
    manifest: Path
    entries: dict[str, Any]

    @property
    def command(self) -> str:
        """The command that prepares its unlabelled images."""
        plans = self.plans.get("plans_name", "nnUNetPlans")
        option = "" if plans == "nnUNetPlans" else f" -p {plans}"
        number = dataset_number(self.dataset)
        return f"nnUNetv2_dycon preprocess_unlabeled -d {number} -c {self.name}{option}"

    @property
    def work(self) -> Path:
        """Folder of incomplete files."""
        # hidden and outside the data folder, so that nnU-Net never reads an incomplete file
        return self.folder.with_name(f".{self.folder.name}.tmp")


def unlabeled_folder(preprocessed_dataset_folder: str | Path, data_identifier: str) -> tuple[Path, Path]:
    """Return the folder of the prepared unlabelled images of a data identifier, and their manifest next to it."""
    folder = Path(preprocessed_dataset_folder, f"{data_identifier}_unlabeled")
    return folder, folder.with_name(folder.name + ".json")


def unlabeled_status(
    dataset: int | str, configuration: str = "3d_fullres", plans: str | Mapping[str, Any] = "nnUNetPlans"
) -> UnlabeledStatus:
    """Return whether the unlabelled images of a configuration are prepared and up to date; nothing is changed.

    Without the raw data set only the prepared files are checked; a note says so. Cases whose sizes and times do not
    vouch for them are opened, for a second in all.

    Parameters
    ----------
    dataset : int or str
        Dataset ID or full name.
    configuration : str
        Configuration of the plans.
    plans : str or mapping
        Name of the plans file, or the plans themselves.

    Raises
    ------
    ConfigError, DataError, SplitError
        As `preprocess_unlabeled`, except for images, which are not opened.
    """
    config = find_configuration(dataset, configuration, plans, need_raw=False)
    manifest = read_manifest(config)
    if config.raw is None:
        expected, notes = _recorded(config, manifest), [UNCHECKED_NOTE]
    else:
        expected, notes = expected_cases(config), []
    difference, opened = open_unsure(compare_manifest(config, manifest, expected), config.folder, _OPENING)
    if difference.unsure:
        notes.append(
            f"{len(difference.unsure)} of the prepared unlabelled cases have other times than when they were written, "
            f"or no record of their files; {opened} of them were opened. To look at all of them: {config.command}"
        )
    by_source: dict[str, list[str]] = {"imagesUn": [], "imagesTr": []}
    for case in sorted(expected):
        by_source[expected[case]["from"]].append(case)
    if by_source["imagesTr"]:
        notes.append(BENCHMARK_NOTE)
    return UnlabeledStatus(
        state=difference.state,
        reason=str(difference),
        folder=config.folder,
        unlabeled=tuple(by_source["imagesUn"]),
        benchmark=tuple(by_source["imagesTr"]),
        notes=tuple(notes),
        command=config.command,
    )


@reads_plans
def find_configuration(
    dataset: int | str, configuration: str, plans: str | Mapping[str, Any], need_raw: bool
) -> Configuration:
    """Return one configuration of a data set.

    Parameters
    ----------
    dataset : int or str
        Dataset ID or full name.
    configuration : str
        Name in the plans.
    plans : str or mapping
        Name of the plans file, or the plans themselves.
    need_raw : bool
        Whether a missing raw data set is an error.

    Raises
    ------
    ConfigError, DataError
        If there is no such configuration, or a folder or file is missing.
    """
    base = environment_folder("nnUNet_preprocessed")
    raw_base = environment_folder("nnUNet_raw") if need_raw or nnUNet_raw.get() else None
    name = dataset_name(dataset)
    raw = raw_base / name if raw_base else None
    if need_raw and raw is not None and not raw.is_dir():
        raise DataError(f"{raw} does not exist; put the data set there or correct nnUNet_raw")
    command = f"nnUNetv2_plan_and_preprocess -d {dataset_number(name)} -c {configuration}"
    loaded = _load_plans(base / name, plans, command)
    if configuration not in loaded["configurations"]:
        raise ConfigError(
            f"configuration {configuration!r} is not in the plans of {name}; there are: "
            f"{', '.join(loaded['configurations'])}"
        )
    dataset_json = _load_json(base / name / "dataset.json", command)
    check_dataset_json(dataset_json, base / name / "dataset.json")
    manager = PlansManager(loaded)
    settings = manager.get_configuration(configuration)
    if Path(settings.data_identifier).name != settings.data_identifier:
        raise DataError(
            f"the plans of {name} keep {configuration} in {settings.data_identifier!r}, which is not a folder name; "
            f"type: {command}"
        )
    folder, manifest = unlabeled_folder(base / name, settings.data_identifier)
    return Configuration(
        dataset=name,
        raw=raw if raw is not None and raw.is_dir() else None,
        preprocessed=base / name,
        dataset_json=dataset_json,
        plans=loaded,
        name=configuration,
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
    return read_json(path, f"type: {command}")


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


def expected_cases(config: Configuration) -> dict[str, dict[str, Any]]:
    """Return the manifest records of all cases to prepare, from the raw data set.

    Raises
    ------
    DataError
        If imagesUn has bad file names, or there is no unlabelled image.
    SplitError
        If a case has two roles, or an "unlabeled" list is wrong.
    """
    raw: Any = config.raw  # it was asked for
    ending = config.dataset_json["file_ending"]
    images = raw / "imagesUn"
    roles = read_roles(raw, config.dataset_json)
    listed = benchmark_cases(read_splits(config.preprocessed, raw), roles.labeled)
    problems = unlabeled_name_problems(raw, roles, config.dataset_json)
    if problems:
        raise DataError(bad_files(problems))
    if not roles.unlabeled and not listed:
        raise DataError(
            f"{images} {'holds no image' if images.is_dir() else 'does not exist'} and no fold of "
            'splits_final.json has an "unlabeled" list; put images without labels there, '
            f"as CASE_0000{ending}"
        )
    sources = {**dict.fromkeys(roles.unlabeled, "imagesUn"), **dict.fromkeys(listed, "imagesTr")}
    return {case: _record(source, roles.files[case], raw, ending) for case, source in sources.items()}


def _record(source: str, files: Sequence[Path], raw: Path, ending: str) -> dict[str, Any]:
    sidecar = image_sidecar(files[0], ending)
    described = []
    for path in (*files, *([sidecar] if sidecar.is_file() else [])):
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; restore it or remove the case") from error
        name = str(path).removeprefix(f"{raw}{os.sep}")
        described.append({"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return {"from": source, "files": described}


def _recorded(config: Configuration, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return the records of the manifest, on a machine without the raw data set."""
    listed = benchmark_cases(read_splits(config.preprocessed))
    cases = {case: {"from": record["from"], "files": record["files"]} for case, record in manifest["cases"].items()}
    if not cases and not listed:
        raise DataError(
            f"{config.folder} holds no prepared case, and the raw data set {config.dataset} is missing; "
            "set nnUNet_raw, or copy the prepared folder and its .json here"
        )
    return {**{case: {"from": "imagesTr", "files": None} for case in listed}, **cases}


def read_manifest(config: Configuration) -> Manifest:
    """Return the manifest; without one that can be used an empty one, by which all cases are new.

    Raises
    ------
    DataError
        If a case name in it is not part of a file name: files outside the folder would be taken for prepared ones.
    """
    empty = {"format": FORMAT, "dataset": config.dataset, "plans": None, "cases": {}}
    try:
        manifest = read_json(config.manifest)
    except DataError:
        return empty
    if not _is_manifest(manifest):
        return empty
    check_case_names(manifest["cases"], config.manifest)
    return manifest


def _is_manifest(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and content.get("format") == FORMAT
        and isinstance(content.get("plans"), dict | NoneType)
        and isinstance(content.get("cases"), dict)
        and all(isinstance(record, dict) and {"from", "files"} <= record.keys() for record in content["cases"].values())
    )


def write_manifest(config: Configuration, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all."""
    write_json(config.manifest, manifest, sort_keys=True, elsewhere=ELSEWHERE)


def bad_files(problems: Sequence[str]) -> str:
    """Return one line about bad files."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} files are bad: {first_few(problems, separator=' | ')}"
