"""Where methods are right and wrong: slices and surfaces of one case next to each other (supplement, Figs. 8 and 9)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.data.raw_cases import RawCases, raw_cases
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.facts import Weights
from nnunetv2_dycon.evaluation.label_files import (
    LabelMap,
    Labels,
    case_files,
    read_channel,
    read_label_map,
    read_labels,
    same_geometry,
)
from nnunetv2_dycon.evaluation.overlays import box_of, colored, kinds, legend_handles, outline
from nnunetv2_dycon.evaluation.predict import predict as predict_run
from nnunetv2_dycon.evaluation.runs import Place, Run, find_runs
from nnunetv2_dycon.pictures.canvas import Drawn, make_folder, new_figure, save_pages, show_gray, wrapped, write_rows
from nnunetv2_dycon.pictures.slices import Plane, as_volume, plane_of
from nnunetv2_dycon.pictures.surface import draw_surface, surface_of

ON_A_PAGE = 3  # cases


class Shown(NamedTuple):
    """A case to draw.

    Attributes
    ----------
    case : str
        Its name.
    image, true : array, shape (Z, Y, X)
        First channel, and truth without the ignore label.
    predicted : mapping of str to array
        Label map of each method, 0 where the truth is to be ignored.
    spacing : tuple of float
        In mm, one number for each axis.
    """

    case: str
    image: NDArray
    true: NDArray
    predicted: Mapping[str, NDArray]
    spacing: tuple[float, ...]

    @property
    def flat(self) -> bool:
        """Whether it is a 2D image."""
        return len(self.true) == 1


def plot_overlay(
    dataset_id: int | str,
    runs: Sequence[str],
    cases: Sequence[str] = (),
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    plans: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    weights: Sequence[Weights] = ("student",),
    predict: bool = False,
    mirroring: bool = True,
    device: str | None = None,
    number: int = 3,
    output: str | Path | None = None,
) -> Drawn:
    """Draw true positive, false negative and false positive voxels of several methods side by side.

    For each case the slice in which they are most often wrong, and, of 3D images, the surface.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    runs : sequence of str
        Methods, as for `compare`: trainer names, results folders, folders of predictions, RUN=FOLDER.
    cases : sequence of str
        Cases with a known label; by default the `number` predicted ones on which Dice differs most between methods.
    configuration, fold, plans, checkpoint
        As in nnU-Net.
    weights : sequence of {"student", "teacher"}
        Whose predictions.
    predict : bool
        Predict test cases where predictions are missing.
    mirroring, device
        As -disable_tta and -device of nnU-Net.
    number : int
        How many cases.
    output : path, optional
        Folder to write; by default `DATASET_pictures` in the present folder.

    Raises
    ------
    DataError, ConfigError
        One line with the problem, its place and its remedy.
    """
    if number < 1:
        raise ConfigError(f"-n {number}: give at least 1")
    folder, content = find_raw(dataset_id)
    raw = raw_cases(folder, content)
    raw.check(cases)
    place = Place(folder.name, configuration, plans, (fold,), checkpoint)
    found = [run for text in runs for run in find_runs(text, place, weights, mirroring)]
    for run in found:
        if predict and not run.predictions.is_dir():
            predict_run(run, folder / "imagesTs", mirroring=mirroring, device=device)
    methods = _named(found)
    labels = read_labels(folder / "dataset.json", folder / "labelsTr", next(iter(methods.values())))
    chosen = _chosen(raw, methods, labels, cases, number)
    drawn = [_read(raw, case, methods, labels) for case in chosen]
    pages = [draw_overlay(drawn[at : at + ON_A_PAGE]) for at in range(0, len(drawn), ON_A_PAGE)]
    out = make_folder(Path(f"{folder.name}_pictures") if output is None else Path(output))
    rows = [row for one in drawn for row in _rows(one, labels)]
    header = [
        "case",
        "method",
        "structure",
        "slice",
        "true positive (ml)",
        "false negative (ml)",
        "false positive (ml)",
    ]
    table = write_rows(out / "overlay.csv", [*header, "Dice"], rows)
    return Drawn(tuple(pages), (*save_pages(pages, out, "overlay"), table))


def _named(runs: Sequence[Run]) -> dict[str, Path]:
    """Return the folder of predictions of each run, by a short name."""
    folders: dict[str, Path] = {}
    for run in runs:
        if not run.predictions.is_dir():
            raise DataError(f"{run.predictions} is not there: {run.method} did not predict yet; type --predict")
        name = run.method.removeprefix("nnUNetTrainer")
        name = name if name not in folders else f"{name} {len(folders) + 1}"
        folders[name] = run.predictions
    return folders


def _chosen(
    raw: RawCases, methods: Mapping[str, Path], labels: Labels, cases: Sequence[str], number: int
) -> tuple[str, ...]:
    """Return the cases to draw: the given ones, else those on which methods differ most."""
    predicted = [set(case_files(folder, labels.ending)) for folder in methods.values()]
    common = set.intersection(*predicted)
    for case in cases:
        if raw.truth(case) is None:
            raise DataError(f"the label of {case} is not known or not to be opened; give a labelled or a test case")
        for (name, folder), of_method in zip(methods.items(), predicted, strict=True):
            if case not in of_method:
                raise DataError(f"{folder} has no prediction of {case} by {name}; predict it, or give another case")
    if cases:
        return tuple(cases)
    known = sorted(case for case in common if case in raw.roles.files and raw.truth(case) is not None)
    if not known:
        raise DataError(f"no case with a known label was predicted by {', '.join(methods)}; predict the test cases")
    if len(known) <= number:
        return tuple(known)
    spread = {}
    for case in tqdm(known, desc="Choosing cases"):
        true, maps, _ = _labels_of(raw, case, methods, labels)
        dice = [_dice(true, one) for one in maps.values()]
        spread[case] = (max(dice) - min(dice), -min(dice))  # of one method its worst
    return tuple(sorted(known, key=lambda case: (spread[case], case), reverse=True)[:number])


def _dice(true: NDArray, predicted: NDArray) -> float:
    """Return Dice of all structures together: voxels with the right label over the mean of both sizes."""
    size = np.count_nonzero(true) + np.count_nonzero(predicted)
    return 2 * np.count_nonzero((true == predicted) & (true > 0)) / size if size else 1.0


def _labels_of(
    raw: RawCases, case: str, methods: Mapping[str, Path], labels: Labels
) -> tuple[NDArray, dict[str, NDArray], LabelMap]:
    """Return truth and predictions (Z, Y, X) without the voxels to ignore, and the truth as read."""
    path = raw.truth(case)
    truth = read_label_map(path, labels, truth=True)  # type: ignore[arg-type]  # there is one: it was looked for
    ignored = truth.labels == (-1 if labels.ignore is None else labels.ignore)
    maps = {}
    for name, folder in methods.items():
        predicted = read_label_map(folder / f"{case}{labels.ending}", labels, truth=False)
        difference = same_geometry(truth, predicted)
        if difference is not None:
            raise DataError(f"{folder / case}{labels.ending} does not lie on the truth: {difference}; predict again")
        maps[name] = as_volume(np.where(ignored, 0, predicted.labels))
    return as_volume(np.where(ignored, 0, truth.labels)), maps, truth


def _read(raw: RawCases, case: str, methods: Mapping[str, Path], labels: Labels) -> Shown:
    true, maps, truth = _labels_of(raw, case, methods, labels)
    image = as_volume(read_channel(raw.roles.files[case][0], labels, truth.labels.shape))
    spacing = truth.spacing if len(truth.spacing) == 3 else (max(truth.spacing), *truth.spacing)
    return Shown(case, image, true, maps, tuple(spacing))


def _plane(one: Shown) -> Plane:
    return Plane(0, one.spacing[1] / one.spacing[2]) if one.flat else plane_of(one.spacing)


def slice_of(one: Shown, plane: Plane) -> int:
    """Return the slice with most wrong voxels over all methods; without any that with most structure."""
    axes = tuple(at for at in range(3) if at != plane.axis)
    wrong = sum(np.count_nonzero(one.true != maps, axis=axes) for maps in one.predicted.values())
    if not np.any(wrong):
        wrong = np.count_nonzero(one.true, axis=axes)
    return int(np.argmax(wrong)) if np.any(wrong) else one.true.shape[plane.axis] // 2


def _rows(one: Shown, labels: Labels) -> list[list]:
    voxel = math.prod(one.spacing if not one.flat else one.spacing[1:]) / 1000
    at = slice_of(one, _plane(one))
    rows = []
    for method, predicted in one.predicted.items():
        for structure in labels.structures:
            t, p = np.isin(one.true, structure.values), np.isin(predicted, structure.values)
            tp, fn, fp = (int(np.count_nonzero(mask)) for mask in (t & p, t & ~p, ~t & p))
            dice = 2 * tp / (2 * tp + fn + fp) if tp + fn + fp else math.nan
            rows.append([one.case, method, structure.name, at, tp * voxel, fn * voxel, fp * voxel, dice])
    return rows


def draw_overlay(cases: Sequence[Shown]) -> Figure:
    """Return a page: for each case a row of slices, truth first, and a row of surfaces of 3D images.

    Parameters
    ----------
    cases : sequence of Shown
        All with the same methods.
    """
    methods = list(cases[0].predicted)
    rows = [(one, surface) for one in cases for surface in ((False,) if one.flat else (False, True))]
    columns = len(methods) + 1
    figure, axes = new_figure(len(rows), columns, max(6.0, 2.5 * columns), 0.9 + 2.6 * len(rows))
    for row, (one, surface) in zip(axes, rows, strict=True):
        if surface:
            row = [_in_3d(figure, axis) for axis in row]
            draw_surface(row[0], surface_of(one.true, one.true, one.spacing))
            for axis, predicted in zip(row[1:], one.predicted.values(), strict=True):
                draw_surface(axis, surface_of(one.true, predicted, one.spacing))
        else:
            _slices(row, one)
    several = max(int(np.max(one.true)) for one in cases) > 1
    figure.legend(
        handles=legend_handles(several=several), loc="outside lower center", ncols=3, fontsize=8, facecolor="0.75"
    )
    return figure


def _in_3d(figure: Figure, axis: Any) -> Any:
    """Put a 3D axis in the place of another one."""
    place = axis.get_subplotspec()
    axis.remove()
    return figure.add_subplot(place, projection="3d")


def _slices(row: Sequence, one: Shown) -> None:
    plane = _plane(one)
    at = slice_of(one, plane)
    true, image = plane.of(one.true, at), plane.of(one.image, at)
    maps = {name: plane.of(predicted, at) for name, predicted in one.predicted.items()}
    box = box_of((true > 0) | np.any([predicted > 0 for predicted in maps.values()], axis=0))
    for axis, (name, predicted) in zip(row, [("truth", None), *maps.items()], strict=True):
        show_gray(axis, image[box], plane.aspect)
        if predicted is None:
            axis.set_title(f"{wrapped(one.case)}\nslice {at}, truth", fontsize=8)
            axis.imshow(colored(true[box], true[box]), aspect=plane.aspect)
        else:
            axis.imshow(colored(true[box], predicted[box]), aspect=plane.aspect)
            outline(axis, predicted[box] > 0, "black", "dashed")
            wrong = sum(int(mask.sum()) for mask in kinds(one.true, one.predicted[name])[1:])
            dice = 100 * _dice(one.true, one.predicted[name])
            axis.set_title(f"{wrapped(name)}\nDice {dice:.1f} %, {wrong} voxels wrong", fontsize=8)
        outline(axis, true[box] > 0, "white", "solid")
