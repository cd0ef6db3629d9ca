"""Check of a raw data set before hours of training: roles, duplicates, geometry, channels, labels."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from tqdm import tqdm

from nnunetv2_dycon import parallel
from nnunetv2_dycon.conversion.dataset import conversion_of
from nnunetv2_dycon.conversion.headers import passed_over
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.conversion.volumes import reading
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.data.readers import check_nifti
from nnunetv2_dycon.data.roles import Roles, channel_names, label_paths, read_roles, unlabeled_name_problems
from nnunetv2_dycon.data.splits import fold_unlabeled, read_splits
from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.files import first_few
from nnunetv2_dycon.findings import Finding


@dataclass(frozen=True)
class _Task:
    """A case to check; picklable."""

    case: str
    images: tuple[Path, ...]
    label: Path | None
    reader: Any
    channels: int
    values: frozenset[int]


class _Seen(NamedTuple):
    """Findings in one case: problems by finding, hashes of its channels' voxels, and what its reader passes over."""

    problems: tuple[tuple[str, str], ...]
    hashes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def check(dataset_id: int | str, *, processes: int | None = None) -> list[Finding]:
    """Check every image, and every label of a labelled or test case; the last finding is the next command.

    Parameters
    ----------
    dataset_id : int or str
        Data set in nnUNet_raw, by id or name.
    processes : int, optional
        Worker processes; as many as there are processors (at most 8) by default.

    Raises
    ------
    DataError
        If there is no such data set, or nnU-Net cannot use its dataset.json.
    """
    raw, content = find_raw(dataset_id)
    try:
        roles = read_roles(raw, content)
    except UserError as error:
        return [Finding("roles", False, str(error))]
    labels = label_paths(raw, content, roles)
    tasks = _tasks(raw, content, roles, labels)
    looks = parallel.run(_look, tasks, processes)
    seen = {task.case: result for task, result in tqdm(looks, total=len(tasks), desc="Checking", disable=None)}
    role_of = _role_of(roles)
    findings = [
        Finding(
            "roles", True, ", ".join(f"{len(getattr(roles, role))} {role}" for role in ("labeled", "unlabeled", "test"))
        ),
        _unlabeled(raw, content, roles),
        _duplicates(role_of, seen),
        *(_gathered(name, text, seen) for name, text in _LOOKED_AT.items()),
        _headers(seen),
        _missing_labels(roles, labels),
        _splits(raw, roles),
        _provenance(raw, role_of),
    ]
    number = dataset_number(raw.name)
    if all(one.ok for one in findings):
        findings.append(
            Finding("next", True, f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres --verify_dataset_integrity")
        )
    else:
        findings.append(Finding("next", False, f"mend it, then type again: nnUNetv2_dycon check -d {number}"))
    return findings


_LOOKED_AT = {
    "images": "all can be read, with the right number of channels, on one grid per case, without NaN or Inf",
    "geometry": "every label is on the grid of its image",
    "label values": "every label holds values of dataset.json alone",
}


def _role_of(roles: Roles) -> dict[str, str]:
    return {case: role for role in ("labeled", "unlabeled", "test") for case in getattr(roles, role)}


def _tasks(raw: Path, content: Mapping[str, Any], roles: Roles, labels: Mapping[str, Path]) -> list[_Task]:
    example = next(iter(roles.files.values()), (raw / "none",))[0]
    reader = determine_reader_writer_from_dataset_json(dict(content), str(example), verbose=False)
    values: set[int] = set()
    for value in content["labels"].values():
        values |= set(value) if isinstance(value, list | tuple) else {value}
    channels = len(channel_names(content))
    return [
        _Task(
            case=case,
            images=files,
            label=labels[case] if case in labels and labels[case].is_file() else None,
            reader=reader,
            channels=channels,
            values=frozenset(int(value) for value in values),
        )
        for case, files in roles.files.items()
    ]


# ---- one case ----------------------------------------------------------------------------------------------


def _look(task: _Task) -> _Seen:
    problems: list[tuple[str, str]] = []
    try:
        image, properties = _read(task.images, task.reader)
    except DataError as error:
        return _Seen((("images", str(error)),), ())
    names = ", ".join(str(path) for path in task.images)
    if len(image) != task.channels:
        problems.append(("images", f"{names}: {len(image)} channels, dataset.json names {task.channels}"))
    if not np.isfinite(image).all():
        problems.append(("images", f"{names} has NaN or Inf"))
    if image.size == 0 or not image.any():
        problems.append(("images", f"{names} is empty or holds only zeros"))
    hashes = tuple(_hash(channel) for channel in image)
    if task.label is not None:
        problems += _look_at_label(task, image, properties)
    files = (*task.images, *([task.label] if task.label and not problems else []))
    notes = tuple(note for path in files if (note := passed_over(path, task.reader)))
    return _Seen(tuple(problems), hashes, notes)


def _read(files: Sequence[Path], reader: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Return image (C, X, Y, Z) and properties; raises DataError if nnU-Net's reader cannot read it."""
    for path in files:
        check_nifti(path)
    with reading(files[0]):
        try:
            return reader().read_images([str(path) for path in files])
        except Exception as error:  # every reader has its own
            raise DataError(f"{', '.join(map(str, files))} cannot be read ({_last_line(error)})") from error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[-200:]


def _look_at_label(task: _Task, image: np.ndarray, properties: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the problems of a label with the geometry of its image (C, X, Y, Z) and with its values."""
    path: Any = task.label
    try:
        with reading(path):
            check_nifti(path)
            label, of_label = task.reader().read_seg(str(path))
    except DataError as error:
        return [("label values", str(error))]
    problems = []
    if label.shape[1:] != image.shape[1:] or not _same_place(properties, of_label):
        problems.append(("geometry", f"{task.label} and {task.images[0]} are on different grids"))
    found = {float(value) for part in label[0] for value in np.unique(part)}
    unknown = sorted(found - task.values)
    if unknown:
        problems.append(
            ("label values", f"{task.label} has the value {unknown[0]:g}, which dataset.json does not name")
        )
    return problems


def _same_place(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare spacing, and origin and direction if the reader has them, with a tolerance for rounding."""
    if not np.allclose(one["spacing"], other["spacing"], rtol=1e-3):
        return False
    for key in ("sitk_stuff", "nibabel_stuff"):
        if key in one and key in other:
            return all(
                np.allclose(value, other[key][name], rtol=0, atol=1e-2)
                for name, value in one[key].items()
                if name in other[key] and np.issubdtype(np.asarray(value).dtype, np.number)
            )
    return True


def _hash(channel: np.ndarray) -> str:
    """Return a hash of shape and values of a channel (X, Y, Z), independent of the type on disk."""
    values = np.ascontiguousarray(channel, np.float32)
    return hashlib.blake2b(values.tobytes() + str(values.shape).encode(), digest_size=16).hexdigest()


# ---- all cases together ------------------------------------------------------------------------------------


def _gathered(name: str, good: str, seen: Mapping[str, _Seen]) -> Finding:
    problems = sorted(text for result in seen.values() for of, text in result.problems if of == name)
    return Finding(name, not problems, first_few(problems, separator=" | ") if problems else good)


def _headers(seen: Mapping[str, _Seen]) -> Finding:
    """Say what nnU-Net's reader passes over in headers; the data set can be used."""
    notes = sorted(note for result in seen.values() for note in result.notes)
    return Finding("headers", True, _joined(notes) if notes else "nnU-Net's reader passes over nothing in them")


def _duplicates(role_of: Mapping[str, str], seen: Mapping[str, _Seen]) -> Finding:
    """Find the same voxels under two names, in one role or in two."""
    cases: dict[str, list[str]] = defaultdict(list)
    for case, result in sorted(seen.items()):
        if result.hashes:
            cases[result.hashes[0]].append(case)
    twice = [group for group in cases.values() if len(group) > 1]
    across = [group for group in twice if len({role_of[case] for case in group}) > 1]
    if across:
        texts = [" = ".join(f"{case} ({role_of[case]})" for case in group) for group in across]
        return Finding("duplicates", False, f"the same image in two roles: {_joined(texts)}; keep one of each")
    if twice:
        texts = [f"{' = '.join(group)} ({role_of[group[0]]})" for group in twice]
        return Finding(
            "duplicates",
            True,
            f"none across roles; the same image twice in one role: {_joined(texts)}",
        )
    return Finding("duplicates", True, "no image occurs twice")


def _unlabeled(raw: Path, content: Mapping[str, Any], roles: Roles) -> Finding:
    problems = unlabeled_name_problems(raw, roles, content)
    if problems:
        return Finding("unlabelled", False, first_few(problems, separator=" | "))
    hidden = set(roles.unlabeled)
    ending = content["file_ending"]
    for folder in (path for path in sorted(raw.iterdir()) if path.is_dir() and path.name.startswith("labels")):
        found = sorted(path for path in folder.iterdir() if path.name.removesuffix(ending) in hidden)
        if found:
            return Finding("unlabelled", False, f"{found[0]} is a label of an unlabelled case; move it out of {raw}")
    if not hidden:
        return Finding("unlabelled", True, "there are none: only trainers without unlabelled images can be used")
    return Finding("unlabelled", True, f"{len(hidden)} cases without a label")


def _missing_labels(roles: Roles, labels: Mapping[str, Path]) -> Finding:
    missing = [str(labels[case]) for case in roles.labeled if not labels[case].is_file()]
    if missing:
        return Finding("labels", False, f"missing: {_joined(missing)}; add them, or move the images to imagesUn")
    without = sum(not labels[case].is_file() for case in roles.test)
    tests = f"; {without} of {len(roles.test)} test cases have none and cannot be scored" if without else ""
    return Finding("labels", True, f"every labelled case has one{tests}")


def _splits(raw: Path, roles: Roles) -> Finding:
    name = "splits_final.json"
    try:
        folds = read_splits(raw)
        for index in range(len(folds)):
            fold_unlabeled(folds, index, roles.labeled)
    except UserError as error:
        return Finding(name, False, str(error))
    for index, fold in enumerate(folds):
        named = [*fold.get("train", []), *fold.get("val", [])]
        unknown = sorted(set(named) - set(roles.labeled))
        if unknown:
            return Finding(
                name, False, f"fold {index} names {unknown[0]!r}, which is not a labelled case; correct the list"
            )
    return Finding(name, True, f"{len(folds)} folds" if folds else "none: nnU-Net will make five folds")


def _provenance(raw: Path, role_of: Mapping[str, str]) -> Finding:
    """Compare the roles with conversion.json; a data set without this file passes."""
    cases = conversion_of(raw).get("cases")
    if not cases:
        return Finding("conversion.json", True, "none: nothing is recorded about where the cases come from")
    recorded = {case: {"validation": "labeled"}.get(entry["role"], entry["role"]) for case, entry in cases.items()}
    for case in sorted(recorded.keys() | role_of.keys()):
        if recorded.get(case) != role_of.get(case):
            return Finding(
                "conversion.json",
                False,
                f"{case!r} was written as {recorded.get(case, 'nothing')} and is now {role_of.get(case, 'gone')}; "
                "convert again, or delete conversion.json if you changed it on purpose",
            )
    return Finding("conversion.json", True, f"{len(recorded)} cases in the roles that were written")


def _joined(problems: Sequence[str]) -> str:
    return first_few(problems, separator=" | ")
