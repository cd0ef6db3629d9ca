"""Annotated cases leave imagesUn and become training cases."""

import difflib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_dycon.annotation.journal import Change, carry_out, decide, stage
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.data.datasets import dataset_number
from nnunetv2_dycon.data.readers import read_view, reading
from nnunetv2_dycon.data.roles import Roles, image_sidecar, label_sidecar, read_roles
from nnunetv2_dycon.data.splits import OVERLAP, SPLITS_FILE, check_splits, read_splits
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.label_files import LabelMap, Labels, read_label_map, read_labels, same_geometry
from nnunetv2_dycon.files import first_few, read_json
from nnunetv2_dycon.locks import locked


@dataclass(frozen=True)
class Annotated:
    """What `annotate` did: the data set, its new training cases, and the commands that prepare them."""

    folder: Path
    cases: tuple[str, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it in lines."""
        moved = f"{first_few(self.cases, 8)} {'is' if len(self.cases) == 1 else 'are'} in imagesTr and labelsTr now"
        return "\n".join([moved, *self.notes])


def annotate(dataset_id: int | str, pairs: Sequence[str | Path]) -> Annotated:
    """Move annotated cases from imagesUn to imagesTr and copy their labels to labelsTr.

    dataset.json counts them, and in each fold of the split they join "train", never "val". Several runs wait for none:
    the second one is refused. A run that was killed left the data set as it was, or is finished by the next one.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    pairs : sequence of str or path
        A case and its label map, and so on. The label maps stay where they are.

    Raises
    ------
    ConfigError
        If a label map is missing for a case.
    DataError, SplitError
        If a case is not an unlabelled one, a label map is not of its image or has other values than the data set; then
        nothing is changed.
    """
    if not pairs or len(pairs) % 2:
        raise ConfigError("give each case and its label map: nnUNetv2_dycon annotate -d ID CASE LABEL CASE LABEL ...")
    folder, content = find_raw(dataset_id)
    with locked(folder, f"{folder}: another annotate is at work there; wait for it, then type the command again"):
        finished = carry_out(folder)
        given = _given(pairs)
        left = {case: path for case, path in given.items() if case not in finished}
        content = read_json(folder / "dataset.json") if finished else content
        if left:
            _add(folder, content, left)
    notes: tuple[str, ...] = (f"(an earlier run was finished: {first_few(finished)})",) if finished else ()
    if not (folder / SPLITS_FILE).is_file() and not _splits_in_use(folder):
        notes += ("there is no split file: nnU-Net draws folds at the next training, and may validate on them",)
    cases = tuple(dict.fromkeys([*finished, *given]))
    return Annotated(folder, cases, _commands(folder), notes)


def _given(pairs: Sequence[str | Path]) -> dict[str, Path]:
    given: dict[str, Path] = {}
    for case, path in zip(pairs[::2], pairs[1::2], strict=True):
        if str(case) in given:
            raise ConfigError(f"{case} is given twice; leave one out")
        given[str(case)] = Path(path)
    return given


def _add(folder: Path, content: Mapping[str, Any], given: Mapping[str, Path]) -> None:
    """Check all cases, then move them."""
    roles = read_roles(folder, content)
    for case in given:
        _check_role(folder, roles, case)
    labels = read_labels(folder / "dataset.json", folder / "imagesUn")
    for case, path in tqdm(given.items(), desc="Checking label maps"):
        _check_label(case, path, roles.files[case], labels)
    moves: list[tuple[str, str]] = []
    for case, path in given.items():
        moves += _moves(folder, case, path, roles.files[case], labels.ending)
    texts = [(str(folder / "dataset.json"), _dataset_json(content, roles, given, labels.ending))]
    texts += [(str(path), _splits(path, tuple(given))) for path in _split_files(folder)]
    decide(folder, Change(tuple(given), tuple(moves), tuple(texts)))
    carry_out(folder)


def _check_role(folder: Path, roles: Roles, case: str) -> None:
    if case in roles.unlabeled:
        return
    if case in roles.labeled:
        raise DataError(
            f"{case} is labelled already: to correct its label, replace the file in {folder / 'labelsTr'} and "
            f"preprocess again: nnUNetv2_preprocess -d {dataset_number(folder.name)}"
        )
    if case in roles.test:
        raise DataError(f"{case} is a test case: a network that trained on it could not be measured; leave it out")
    near = difflib.get_close_matches(case, roles.unlabeled, 3, 0.5) or list(roles.unlabeled)
    there = f"the nearest names are {first_few(near)}" if near else "the folder is empty"
    raise DataError(f"{folder / 'imagesUn'} has no case {case!r}; {there}")


def _check_label(case: str, path: Path, images: Sequence[Path], labels: Labels) -> None:
    if not path.is_file():
        raise DataError(f"{path} is not a file; give the label map of {case}")
    if not path.name.endswith(labels.ending):
        raise DataError(f"{path} does not end in {labels.ending}, the data set's file ending; convert the label map")
    label = read_label_map(path, labels, truth=True)
    with reading(images[0]):
        image = read_view(images[0], labels.reader)
    shape = image.values.shape[-label.labels.ndim :]  # a file may hold several channels
    difference = same_geometry(
        LabelMap(image.values[(0,) * (image.values.ndim - len(shape))], image.spacing, image.place), label
    )
    if difference is not None:
        raise DataError(f"{path} does not lie on the image {images[0]}: {difference}; annotate that image, or resample")


def _moves(folder: Path, case: str, label: Path, images: Sequence[Path], ending: str) -> list[tuple[str, str]]:
    """Return the moves of a case; its label map is copied to where it waits for them."""
    moves = [(f"imagesUn/{path.name}", f"imagesTr/{path.name}") for path in images]
    beside = image_sidecar(images[0], ending)
    if beside.is_file():
        moves.append((f"imagesUn/{beside.name}", f"imagesTr/{beside.name}"))
    moves.append((stage(folder, label, f"{case}{ending}"), f"labelsTr/{case}{ending}"))
    if label_sidecar(label, ending).is_file():
        moves.append((stage(folder, label_sidecar(label, ending), f"{case}.json"), f"labelsTr/{case}.json"))
    return moves


def _dataset_json(content: Mapping[str, Any], roles: Roles, given: Mapping[str, Path], ending: str) -> str:
    changed = dict(content)
    if "dataset" in changed:  # it names its training cases
        changed["dataset"] = {**changed["dataset"], **{case: _entry(roles, case, ending) for case in given}}
    changed["numTraining"] = len(roles.labeled) + len(given)
    return _text(changed)


def _entry(roles: Roles, case: str, ending: str) -> dict[str, Any]:
    return {"images": [f"imagesTr/{path.name}" for path in roles.files[case]], "label": f"labelsTr/{case}{ending}"}


def _text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


# ---- the split, and what must be prepared anew -----------------------------------------------------------------


def _preprocessed(folder: Path) -> Path | None:
    base = os.environ.get("nnUNet_preprocessed")
    return Path(base, folder.name) if base and Path(base, folder.name).is_dir() else None


def _split_files(folder: Path) -> list[Path]:
    preprocessed = _preprocessed(folder)
    read_splits(preprocessed or folder, folder)  # refuses a wrong one
    return [path / SPLITS_FILE for path in (folder, preprocessed) if path and (path / SPLITS_FILE).is_file()]


def _splits_in_use(folder: Path) -> bool:
    preprocessed = _preprocessed(folder)
    return preprocessed is not None and (preprocessed / SPLITS_FILE).is_file()


def _splits(path: Path, cases: Sequence[str]) -> str:
    folds = [_with(fold, cases) for fold in read_json(path)]
    check_splits(folds, path)
    return _text(folds)


def _with(fold: Mapping[str, Any], cases: Sequence[str]) -> dict[str, Any]:
    """Return a fold that trains on further cases.

    A fold that validates on its own training cases says so from now on: with the new ones the lists differ.
    """
    changed = {**fold, "train": [*fold["train"], *(case for case in cases if case not in fold["train"])]}
    if set(fold["train"]) & set(fold["val"]):
        changed[OVERLAP] = True
    return changed


def _commands(folder: Path) -> tuple[str, ...]:
    """Return the commands that prepare again what was prepared without the new cases."""
    preprocessed, number = _preprocessed(folder), dataset_number(folder.name)
    commands = []
    for path in sorted(preprocessed.glob("*.json")) if preprocessed else ():
        content = read_json(path)
        configurations = content.get("configurations") if isinstance(content, dict) else None
        if not isinstance(configurations, dict):
            continue
        prepared = [name for name, entry in configurations.items() if _is_prepared(path.parent, entry)]
        if prepared:
            option = [] if path.stem == "nnUNetPlans" else ["-plans_name", path.stem]
            commands.append(shlex.join(["nnUNetv2_preprocess", "-d", str(number), *option, "-c", *prepared]))
    return tuple(commands) or (f"nnUNetv2_plan_and_preprocess -d {number}",)


def _is_prepared(folder: Path, entry: Any) -> bool:
    identifier = entry.get("data_identifier") if isinstance(entry, dict) else None
    return isinstance(identifier, str) and (folder / identifier).is_dir()
