"""Check of a raw data set before hours of training: roles, duplicates, geometry, channels, labels."""

import contextlib
import hashlib
import io
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nnunetv2_dycon import parallel
from nnunetv2_dycon.conversion.headers import passed_over
from nnunetv2_dycon.conversion.layout import RawData, joined, look_at_layout
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.conversion.verification import planned_configuration, refusal, unknown_reader
from nnunetv2_dycon.conversion.volumes import reading
from nnunetv2_dycon.data.dataset_json import FILE, channel_names, numbers_of
from nnunetv2_dycon.data.datasets import dataset_name, dataset_number
from nnunetv2_dycon.data.readers import check_nifti, find_reader
from nnunetv2_dycon.data.roles import Roles, label_paths, read_roles
from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.files import first_few
from nnunetv2_dycon.findings import Finding
from nnunetv2_dycon.folders import environment_folder

_FAR = 3  # times the largest, or a part of the smallest, voxel size of the labelled images


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
    """Findings in one case: problems by finding, hashes of its channels' voxels, values of its label.

    Shape, spacing and what is passed over in headers are those of nnU-Net's reader.
    """

    problems: tuple[tuple[str, str], ...]
    hashes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    values: frozenset[float] = frozenset()
    notes: tuple[str, ...] = ()


def check(dataset_id: int | str, *, processes: int | None = None, fix: bool = False) -> list[Finding]:
    """Check every image, and every label of a labelled or test case; the last finding is the next command.

    Parameters
    ----------
    dataset_id : int or str
        Data set in nnUNet_raw, by id or name.
    processes : int, optional
        Worker processes; as many as there are processors (at most 8) by default.
    fix : bool
        Correct "numTraining" in dataset.json; nothing else is changed.

    Raises
    ------
    DataError
        If there is no such data set, its dataset.json cannot be used, or with `fix` not be written.
    """
    raw, content = find_raw(dataset_id)
    try:
        roles = read_roles(raw, content)
    except UserError as error:
        return [Finding("roles", False, str(error))]
    data = RawData(raw, content, roles, label_paths(raw, content, roles))
    findings = look_at_layout(data, fix=fix)
    tasks = _tasks(data)
    looks = parallel.run(_look, tasks, processes)
    seen = {task.case: result for task, result in tqdm(looks, total=len(tasks), desc="Checking", disable=None)}
    findings += [
        *(_gathered(name, text, seen) for name, text in _LOOKED_AT.items()),
        _classes(data, seen),
        _duplicates(data.role_of, seen),
        _spacing(roles, seen),
        _headers(seen),
        _verification(data, seen),
    ]
    return [*findings, _next(data, seen, all(one.ok for one in findings))]


_LOOKED_AT = {
    "images": "all can be read, with the right number of channels, on one grid per case, without NaN or Inf",
    "geometry": "every label is on the grid of its image",
    "label values": "every label holds values of dataset.json alone",
}


def _tasks(data: RawData) -> list[_Task]:
    reader = find_reader(data.content, (files[0] for files in data.roles.files.values()))
    values = {number for value in data.content["labels"].values() for number in numbers_of(value)}
    channels = len(channel_names(data.content))
    return [
        _Task(
            case=case,
            images=files,
            label=data.labels[case] if case in data.labels and data.labels[case].is_file() else None,
            reader=reader,
            channels=channels,
            values=frozenset(values),
        )
        for case, files in data.roles.files.items()
    ]


# ---- one case ----------------------------------------------------------------------------------------------


def _look(task: _Task) -> _Seen:
    problems: list[tuple[str, str]] = []
    try:
        image, properties = _read(task.images, task.reader)
    except DataError as error:
        return _Seen((("images", str(error)),))
    names = ", ".join(str(path) for path in task.images)
    if len(image) != task.channels:
        problems.append(("images", f"{names}: {len(image)} channels, dataset.json names {task.channels}"))
    if not np.isfinite(image).all():
        problems.append(("images", f"{names} has NaN or Inf"))
    if image.size == 0 or not image.any():
        problems.append(("images", f"{names} is empty or holds only zeros"))
    hashes = tuple(_hash(channel) for channel in image)
    values: set[float] = set()
    if task.label is not None:
        of_label, values = _look_at_label(task, image, properties)
        problems += of_label
    spacing = tuple(map(float, properties["spacing"]))
    files = (*task.images, *([task.label] if task.label and not problems else []))
    notes = tuple(note for path in files if (note := passed_over(path, task.reader)))
    return _Seen(tuple(problems), hashes, image.shape[1:], spacing, frozenset(values), notes)


def _read(files: Sequence[Path], reader: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Return image (C, X, Y, Z) and properties; raises DataError if nnU-Net's reader cannot read it."""
    for path in files:
        _refuse_unpacked(path)
        check_nifti(path)
    return _by(reader().read_images, ", ".join(map(str, files)), [str(path) for path in files])


def _by(read: Callable[[Any], Any], names: str, argument: Any) -> Any:
    """Return what one of nnU-Net's readers reads; raises DataError if it cannot."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where SimpleITKIO says what it raises without a word
            return read(argument)
    except MemoryError:
        raise
    except Exception as error:  # every reader has its own
        reason = _last_line(error) or "channels differ in shape or spacing"
        raise DataError(f"{names} cannot be read ({reason}); replace it, or remove the case") from error


def _refuse_unpacked(path: Path) -> None:
    """Refuse a file that is not packed as its name says; SimpleITK reads it, other programs do not."""
    if not path.name.endswith(".nii.gz"):
        return
    with reading(path), path.open("rb") as file:
        start = file.read(2)
    if start and start != b"\x1f\x8b":
        packed, plain = shlex.quote(str(path)), shlex.quote(str(path.with_suffix("")))
        raise DataError(f"{path} is not gzip data; if it is NIfTI type: mv {packed} {plain} && gzip {plain}")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()[-200:]


def _look_at_label(
    task: _Task, image: np.ndarray, properties: Mapping[str, Any]
) -> tuple[list[tuple[str, str]], set[float]]:
    """Return the problems of a label with the geometry of its image (C, X, Y, Z) and with its values, and these."""
    path: Any = task.label
    try:
        _refuse_unpacked(path)
        check_nifti(path)
        label, of_label = _by(task.reader().read_seg, str(path), str(path))
    except DataError as error:
        return [("label values", str(error))], set()
    problems = []
    if label.shape[1:] != image.shape[1:] or not _same_place(properties, of_label):
        problems.append(("geometry", f"{task.label} and {task.images[0]} are on different grids"))
    found = {float(value) for part in label[0] for value in np.unique(part)}
    unknown = sorted(found - task.values)
    if unknown:
        problems.append(
            ("label values", f"{task.label} has the value {unknown[0]:g}, which dataset.json does not name")
        )
    return problems, found


def _same_place(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare spacing, and origin and direction if the reader has them, with a tolerance for rounding."""
    spacings = one["spacing"], other["spacing"]
    if np.shape(spacings[0]) != np.shape(spacings[1]) or not np.allclose(*spacings):  # as nnU-Net's verification
        return False
    for key in ("sitk_stuff", "nibabel_stuff"):
        if key in one and key in other:
            return all(
                np.shape(value) == np.shape(other[key][name])
                and np.allclose(value, other[key][name], rtol=0, atol=1e-2)
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
    return Finding(name, not problems, joined(problems) if problems else good)


def _headers(seen: Mapping[str, _Seen]) -> Finding:
    """Say what nnU-Net's reader passes over in headers; the data set can be used."""
    notes = sorted(note for result in seen.values() for note in result.notes)
    return Finding("headers", True, joined(notes) if notes else "nnU-Net's reader passes over nothing in them")


def _classes(data: RawData, seen: Mapping[str, _Seen]) -> Finding:
    """Find labels that no labelled case has; without any, nnU-Net cannot take intensity statistics."""
    named = {name: numbers_of(value) for name, value in data.content["labels"].items()}
    found = {value for case in data.roles.labeled for value in seen[case].values} - {0} - named.get("ignore", set())
    absent = [name for name, numbers in named.items() if not (numbers & {0, *found}) and name != "ignore"]
    if absent and not found and any(seen[case].values for case in data.roles.labeled):
        text = f"no label map has any of {first_few(absent)}; annotate, or correct the files"
        return Finding("classes", False, text)
    if absent:
        return Finding("classes", True, f"no labelled case has {first_few(absent)}, which cannot be learnt then")
    return Finding("classes", True, "each occurs in a labelled case")


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
        return Finding("duplicates", False, f"the same image in two roles: {joined(texts)}; keep one of each")
    if twice:
        texts = [f"{' = '.join(group)} ({role_of[group[0]]})" for group in twice]
        return Finding(
            "duplicates",
            True,
            f"none across roles; the same image twice in one role: {joined(texts)}",
        )
    return Finding("duplicates", True, "no image occurs twice")


def _spacing(roles: Roles, seen: Mapping[str, _Seen]) -> Finding:
    """Find unlabelled and test images with voxels far larger or smaller than those of all labelled images."""
    of_labeled = [seen[case] for case in roles.labeled if seen[case].spacing]
    if not of_labeled:
        return Finding("spacing", True, "there is no labelled image to compare with")
    spacings, axes = np.array([one.spacing for one in of_labeled]), {_axes(one) for one in of_labeled}
    low, high = spacings.min(0), spacings.max(0)
    problems = []
    for case in (*roles.unlabeled, *roles.test):
        one = seen[case]
        if one.spacing and _axes(one) not in axes:
            problems.append(f"{roles.files[case][0]} is {_axes(one)}-D, labelled images are {min(axes)}-D")
        elif one.spacing and ((one.spacing < low / _FAR) | (one.spacing > high * _FAR)).any():
            problems.append(
                f"{roles.files[case][0]} has voxels of {_size(one.spacing)} mm, labelled images from {_size(low)} to "
                f"{_size(high)} mm"
            )
    if problems:
        return Finding("spacing", False, f"{joined(problems)}; correct the headers, or remove the cases")
    return Finding("spacing", True, "unlabelled and test images have voxels like those of labelled ones")


def _axes(one: _Seen) -> int:
    return int(np.count_nonzero(np.array(one.shape) > 1))


def _size(numbers: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{number:.3g}" for number in numbers[::-1])  # as files have it


def _verification(data: RawData, seen: Mapping[str, _Seen]) -> Finding:
    whole = {
        case: data.roles.files[case] for case in data.roles.labeled if data.labels[case].is_file() and seen[case].shape
    }
    said = refusal(data.content, whole, data.labels) or unknown_reader(data.content)
    if said is None:
        return Finding("nnU-Net", True, "its verification accepts dataset.json")
    return Finding("nnU-Net", False, f"its verification says of {data.raw / FILE}: {said}")


def _next(data: RawData, seen: Mapping[str, _Seen], good: bool) -> Finding:
    """Return the next command, as it can be typed now."""
    again = f"nnUNetv2_dycon check -d {dataset_number(data.raw.name)}"
    try:
        number = dataset_number(dataset_name(dataset_number(data.raw.name)))  # as nnU-Net's commands will look for it
        environment_folder("nnUNet_preprocessed")
    except DataError as error:
        return Finding("next", False, f"{error}; then: {again}")
    if not good:
        return Finding("next", False, f"mend it, then type again: {again}")
    of_labeled = [seen[case] for case in data.roles.labeled]
    configuration = planned_configuration([one.shape for one in of_labeled], [one.spacing for one in of_labeled])
    command = f"nnUNetv2_plan_and_preprocess -d {number} -c {configuration} --verify_dataset_integrity"
    return Finding("next", True, command)
