"""Unlabelled cases in the order in which they should be annotated, with drafts of their labels.

The output folder gets

- `ranking.csv`, one line for each case, and `contact_sheet_N.png` and `.svg` of the first ones;
- `drafts/`, the predicted label maps in nnU-Net's names;
- `cases/CASE.json` and `.npz`, what was found out about a case. The first is written last: a killed run goes on with
  the next case, and a case whose images or checkpoint changed is predicted anew.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nnunetv2_dycon import __version__
from nnunetv2_dycon.annotation.scores import CaseScores, ClassScores, dual_entropy, farthest_first, score_case
from nnunetv2_dycon.command_lines import Model
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.data.raw_cases import RawCases, raw_cases
from nnunetv2_dycon.data.splits import fold_unlabeled, read_splits
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.files import file_digest, read_json, remove_leftovers, whole_file, write_json, writing
from nnunetv2_dycon.folders import environment_folder
from nnunetv2_dycon.inference import BottleneckMean, Prediction, Prepared, predict, prepare, write_labels
from nnunetv2_dycon.locks import locked
from nnunetv2_dycon.pictures.canvas import remove_pages, save_figure, write_rows
from nnunetv2_dycon.pictures.sheet import COLUMNS, ROWS, Tile, contact_sheet
from nnunetv2_dycon.pictures.slices import fullest, plane_of
from nnunetv2_dycon.trained import Trained, device_of, find_trained

By = Literal["entropy", "disagreement", "expected_ml"]
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What `rank` wrote: the folder, and the cases in order."""

    folder: Path
    cases: tuple[str, ...]

    def __str__(self) -> str:
        """Return the first cases and the place of all."""
        return "\n".join([*self.cases[:10], f"({len(self.cases)} cases in {self.folder / 'ranking.csv'})"])


class _Known(NamedTuple):
    """What is known of a case: scores, and the arrays of its tile and of its likeness."""

    case: str
    scores: CaseScores
    arrays: Mapping[str, NDArray]


class _Work(NamedTuple):
    """A ranking to be made: training, its two predictors, cases and output folder."""

    trained: Trained
    predictors: Mapping[str, Any]
    raw: RawCases
    output: Path
    source: Mapping[str, Any]


def rank(
    dataset_id: int | str,
    trainer: str,
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    plans: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    by: By = "entropy",
    diverse: bool = False,
    number: int = 12,
    output: str | Path | None = None,
    mirroring: bool = True,
    device: str | None = None,
) -> Ranking:
    """Rank the unlabelled cases of a training by how much their annotation would tell; keep drafts of their labels.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    trainer : str
        Trainer name with options, as trained; it has a teacher.
    configuration, fold, plans, checkpoint
        As in nnU-Net.
    by : {"entropy", "disagreement", "expected_ml"}
        What comes first: most entropy for each expected voxel of foreground, least agreement of student and teacher,
        most foreground.
    diverse : bool
        Among the upper half by `by`, each next one of the first `number` is the least like those before it, by the
        teacher's bottleneck features.
    number : int
        Cases on contact sheets, and to choose with `diverse`.
    output : path, optional
        Folder to write; by default `rank` in the fold's folder.
    mirroring : bool
        Average over mirrored patches.
    device : str, optional
        cuda, cpu or mps; by default CUDA if there is a device.

    Raises
    ------
    DataError, ConfigError, SplitError
        One line with the problem, its place and its remedy.
    """
    if number < 1:
        raise ConfigError(f"-n {number}: give at least 1")
    where = device_of(device)
    trained = find_trained(dataset_id, Model(trainer, plans, configuration), fold, checkpoint)
    trained.refuse_regions()
    if not trained.has_teacher:
        raise DataError(
            f"{trained.path} holds no teacher (another trainer wrote it); give -tr a trainer of this package"
        )
    raw = raw_cases(*find_raw(trained.path.parents[2].name))
    names = _unlabeled(raw, fold)
    folder = trained.fold / "rank" if output is None else Path(output)
    with writing(folder):
        for inner in (folder, folder / "cases", folder / "drafts"):
            inner.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"{folder}: another rank is writing there; wait for it, or give -o another folder"):
        for inner in (folder, folder / "cases", folder / "drafts"):
            remove_leftovers(inner)
        work = _Work(trained, {}, raw, folder, _source(trained, mirroring))
        predictors = {
            kind: trained.predictor(kind, where, mirroring=mirroring)
            for kind in (("student", "teacher") if any(_read(work, case) is None for case in names) else ())
        }
        known = _all_cases(work._replace(predictors=predictors), names)
        for name in ("dataset.json", "plans.json"):  # as nnUNetv2_predict leaves them, for whoever scores the drafts
            write_json(folder / "drafts" / name, read_json(trained.fold.parent / name))
        ordered = _ordered(known, by, diverse, number)
        _write(work, ordered, number, by, diverse)
    return Ranking(folder, tuple(one.case for one in ordered))


def _unlabeled(raw: RawCases, fold: int | str) -> tuple[str, ...]:
    splits = read_splits(environment_folder("nnUNet_preprocessed") / raw.folder.name, raw.folder)
    names = tuple(sorted({*raw.roles.unlabeled, *fold_unlabeled(splits, fold, raw.roles.labeled)}))
    if not names:
        raise DataError(f"{raw.folder / 'imagesUn'} holds no image; put there what may be annotated next")
    return names


def _source(trained: Trained, mirroring: bool) -> dict[str, Any]:
    return {"format": FORMAT, "version": __version__, "checkpoint": file_digest(trained.path), "mirroring": mirroring}


def _images(raw: RawCases, case: str) -> list[list[Any]]:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in raw.roles.files[case]]


# ---- one case ------------------------------------------------------------------------------------------------


def _all_cases(work: _Work, names: Sequence[str]) -> list[_Known]:
    """Return what is known of each case; those that are not known yet are predicted."""
    network = work.predictors["teacher"].network if work.predictors else None
    likeness = BottleneckMean(network) if hasattr(getattr(network, "encoder", None), "stages") else None
    known = []
    for case in tqdm(names, desc="Predicting unlabelled cases"):
        found = _read(work, case)
        known.append(_predicted(work, case, likeness) if found is None else found)
    return known


def _read(work: _Work, case: str) -> _Known | None:
    """Return what an earlier run found out; None if there is nothing, or the case or the checkpoint changed."""
    path = work.output / "cases" / f"{case}.json"
    draft = work.output / "drafts" / f"{case}{work.raw.json['file_ending']}"
    if not (path.is_file() and draft.is_file()):
        return None
    try:
        record = read_json(path)
        if record["source"] != work.source or record["images"] != _images(work.raw, case):
            return None
        of_classes = {name: ClassScores(*map(_number, values)) for name, values in record["classes"].items()}
        with np.load(path.with_suffix(".npz")) as archive:
            return _Known(case, CaseScores(**record["scores"], classes=of_classes), dict(archive))
    except (DataError, OSError, KeyError, TypeError, ValueError):  # damaged: predict it again
        return None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _predicted(work: _Work, case: str, likeness: BottleneckMean | None) -> _Known:
    """Predict a case with both networks and write what is to be kept of it, the record last."""
    image = prepare(work.trained, work.raw.roles.files[case])
    student = predict(work.trained, work.predictors["student"], image)
    teacher = predict(work.trained, work.predictors["teacher"], image)
    names = work.trained.classes
    scores = score_case(student, teacher, names, math.prod(image.properties["spacing"]) / 1000)  # type: ignore[arg-type]
    arrays = _tile_arrays(work.trained, image, student, teacher)
    if likeness is not None:
        arrays["likeness"] = likeness.take()
    ending, path = work.raw.json["file_ending"], work.output / "cases" / f"{case}.json"
    path.unlink(missing_ok=True)  # of another checkpoint: it does not vouch for what is written now
    write_labels(work.trained, work.output / "drafts" / f"{case}{ending}", teacher.labels, image.properties)
    with whole_file(path.with_suffix(".npz")) as part:
        np.savez_compressed(part, **arrays)  # type: ignore[arg-type]
    record = {
        "source": work.source,
        "images": _images(work.raw, case),
        "scores": {key: value for key, value in scores._asdict().items() if key != "classes"},
        "classes": {
            name: [None if math.isnan(value) else value for value in of_class]
            for name, of_class in scores.classes.items()
        },
    }
    write_json(path, record)
    return _Known(case, scores, arrays)


def _tile_arrays(trained: Trained, image: Prepared, student: Prediction, teacher: Prediction) -> dict[str, NDArray]:
    """Return the slice with most dual entropy: image, entropy and both masks."""
    dual = dual_entropy(student.entropy, teacher.entropy, len(trained.classes) + 1)
    plane = plane_of(image.properties["spacing"])
    at = fullest(dual, plane)
    return {
        "image": plane.of(image.shown, at).astype(np.float32),
        "entropy": plane.of(dual, at),
        "student": plane.of(student.labels, at) > 0,
        "teacher": plane.of(teacher.labels, at) > 0,
        "aspect": np.array(plane.aspect),
    }


# ---- all cases -----------------------------------------------------------------------------------------------


def _ordered(known: Sequence[_Known], by: By, diverse: bool, number: int) -> list[_Known]:
    """Return the cases in order; those without foreground first among equals, names decide at last."""
    ordered = sorted(known, key=lambda one: (-getattr(one.scores, by), one.case))
    if not diverse or len(ordered) < 2:
        return ordered
    if any("likeness" not in one.arrays for one in ordered):
        raise ConfigError("--diverse: the network has no encoder.stages whose features could be compared; leave it out")
    pool = ordered[: max(number, math.ceil(len(ordered) / 2))]
    points = np.stack([one.arrays["likeness"] for one in pool]).astype(np.float64)
    chosen = [pool[at] for at in farthest_first(points, 0, number)]
    names = {one.case for one in chosen}
    return [*chosen, *(one for one in ordered if one.case not in names)]


def _write(work: _Work, ordered: Sequence[_Known], number: int, by: By, diverse: bool) -> None:
    classes = list(work.trained.classes.values())
    parts = ClassScores._fields
    header = ["rank", "case", *[f for f in CaseScores._fields if f != "classes"]]
    header += [f"{part} {name}" for name in classes for part in parts]
    rows = []
    for at, one in enumerate(ordered, start=1):
        of_case = [*one.scores[:-2], "yes" if one.scores.segmented else "nothing segmented"]
        of_classes = [value for name in classes for value in one.scores.classes[name]]
        rows.append([at, one.case, *of_case, *of_classes])
    write_rows(work.output / "ranking.csv", header, rows)
    tiles = [_tile(at, one) for at, one in enumerate(ordered[:number], start=1)]
    page = COLUMNS * ROWS
    remove_pages(work.output, "contact_sheet")
    title = f"{work.raw.folder.name}: first by {by}{', unlike each other' if diverse else ''}"
    for start in range(0, len(tiles), page):
        figure = contact_sheet(tiles[start : start + page], title)
        save_figure(figure, work.output, f"contact_sheet_{start // page + 1}")


def _tile(at: int, one: _Known) -> Tile:
    a, scores = one.arrays, one.scores
    text = f"{at}. {one.case}\nentropy {scores.entropy:.3g}, disagreement {scores.disagreement:.2f}, "
    text += f"{scores.expected_ml:.3g} ml" if scores.segmented else "nothing segmented"
    return Tile(text, a["image"], a["entropy"], a["student"], a["teacher"], float(a["aspect"]))
