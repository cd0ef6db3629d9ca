"""Entropy of teacher, student and both, in whole images, and whether it tells errors (supplement, Fig. 4)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from nnunetv2_dycon.command_lines import Model
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.data.raw_cases import RawCases, raw_cases
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.figures import COLORS, MARKERS
from nnunetv2_dycon.evaluation.label_files import Labels, read_label_map, read_labels
from nnunetv2_dycon.evaluation.overlays import colored, legend_handles, outline
from nnunetv2_dycon.inference import Prediction, Prepared, predict, prepare, write_map
from nnunetv2_dycon.pictures.canvas import (
    ENTROPY_MAP,
    Drawn,
    make_folder,
    new_figure,
    save_figure,
    show_gray,
    shown,
    write_rows,
)
from nnunetv2_dycon.pictures.slices import Plane, as_volume, plane_of, spread
from nnunetv2_dycon.trained import Trained, device_of, find_trained

SLICES = 3
BINS = 10
_FINE = 1000  # bins from which the area under the curve is counted
_ORDER = ("teacher", "student", "dual")


class Maps(NamedTuple):
    """What both networks say of a case.

    Attributes
    ----------
    case : str
        Its name.
    image : array, shape (Z, Y, X)
        First channel.
    entropy : mapping of str to array
        In nats: of the teacher, the student, and their mean, "dual"; of a training without a teacher the student's.
    labels : mapping of str to array
        Predicted classes by the same names; those of "dual" are the teacher's, which predicts in the end.
    truth : array or None
        True labels where they are known, -1 where they are to be ignored.
    spacing : tuple of float
        In mm.
    """

    case: str
    image: NDArray
    entropy: Mapping[str, NDArray]
    labels: Mapping[str, NDArray]
    truth: NDArray | None
    spacing: tuple[float, ...]


class Reliability(NamedTuple):
    """Voxels and wrong voxels by entropy, in `_FINE` bins from 0 to ln C."""

    voxels: NDArray[np.int64]
    wrong: NDArray[np.int64]

    def coarse(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return both in `BINS` bins."""
        return self.voxels.reshape(BINS, -1).sum(1), self.wrong.reshape(BINS, -1).sum(1)

    def area(self) -> float:
        """Return the share of pairs of a wrong and a right voxel in which the wrong one has more entropy (AUROC)."""
        right = self.voxels - self.wrong
        below = np.cumsum(right) - right
        pairs = float(self.wrong.sum()) * float(right.sum())
        return float((self.wrong * (below + right / 2)).sum() / pairs) if pairs else math.nan


def plot_uncertainty(
    dataset_id: int | str,
    trainer: str,
    cases: Sequence[str] = (),
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    plans: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    number: int = 3,
    output: str | Path | None = None,
    mirroring: bool = True,
    device: str | None = None,
) -> Drawn:
    """Draw the entropy of teacher, student and both in whole images, and compare it with errors where truth is known.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    trainer : str
        Trainer name with options, as trained.
    cases : sequence of str
        Any cases of the data set; by default the first `number` test cases, without test cases the first unlabelled
        ones. No label of an unlabelled case is opened.
    configuration, fold, plans, checkpoint
        As in nnU-Net.
    number : int
        How many cases.
    output : path, optional
        Folder to write; by default `pictures` in the fold's folder.
    mirroring : bool
        Average over mirrored patches.
    device : str, optional
        cuda, cpu or mps; by default CUDA if there is a device.

    Returns
    -------
    Drawn
        A figure for each case and, where a truth is known, one of error rate against entropy; their files, the maps as
        NIfTI in the place of the image, and the numbers.

    Raises
    ------
    DataError, ConfigError
        One line with the problem, its place and its remedy.
    """
    if number < 1:
        raise ConfigError(f"-n {number}: give at least 1")
    where = device_of(device)
    trained = find_trained(dataset_id, Model(trainer, plans, configuration), fold, checkpoint)
    trained.refuse_regions()
    folder, content = find_raw(trained.path.parents[2].name)
    raw = raw_cases(folder, content)
    chosen = raw.check(cases) or (raw.roles.test or raw.roles.unlabeled)[:number]
    if not chosen:
        raise DataError(f"{folder} has neither test cases nor unlabelled ones; name cases")
    labels = read_labels(folder / "dataset.json", folder / "labelsTr")
    weights: tuple[Any, ...] = ("teacher", "student") if trained.has_teacher else ("student",)
    predictors = {kind: trained.predictor(kind, where, mirroring=mirroring) for kind in weights}
    out = make_folder(trained.fold / "pictures" if output is None else Path(output))
    top = math.log(len(trained.classes) + 1)
    totals: dict[str, Reliability] = {}
    figures, files, rows = [], [], []
    for case in tqdm(chosen, desc="Predicting cases"):
        image = prepare(trained, raw.roles.files[case])
        maps = _maps(case, trained, predictors, image, _truth(raw, case, labels, image))
        for name, values in maps.entropy.items():
            path = out / f"{case}_entropy_{name}.nii.gz"
            write_map(path, values, image.properties)
            files.append(path)
        for name, counted in reliability(maps, top).items():
            totals[name] = counted if name not in totals else Reliability(*map(np.add, totals[name], counted))
            rows.append(_row(case, name, maps.entropy[name], top, counted))
        figures.append(draw_maps(maps, top))
        files += save_figure(figures[-1], out, f"{case}_uncertainty")
    files.append(write_rows(out / "uncertainty.csv", _CASE_HEADER, rows))
    if totals:
        figures.append(draw_reliability(totals, top))
        files += save_figure(figures[-1], out, "reliability")
        files.append(write_rows(out / "reliability.csv", _BIN_HEADER, _bins(totals, top)))
    return Drawn(tuple(figures), tuple(files))


_CASE_HEADER = ("case", "entropy of", "mean (nats)", "share of the largest possible", "wrong voxels", "AUROC of errors")
_BIN_HEADER = ("entropy of", "from (nats)", "to (nats)", "voxels", "wrong voxels", "error rate")


def _truth(raw: RawCases, case: str, labels: Labels, image: Prepared) -> NDArray | None:
    path = raw.truth(case)
    if path is None:
        return None
    found = as_volume(read_label_map(path, labels, truth=True).labels).astype(np.int16)
    if found.shape != image.shown.shape:
        raise DataError(f"{path} has shape {found.shape}, its image {image.shown.shape}; replace one of them")
    if labels.ignore is not None:
        found[found == labels.ignore] = -1
    return found


def _maps(case: str, trained: Trained, predictors: Mapping[str, Any], image: Prepared, truth: NDArray | None) -> Maps:
    said: dict[str, Prediction] = {kind: predict(trained, one, image) for kind, one in predictors.items()}
    entropy: dict[str, NDArray] = {kind: one.entropy for kind, one in said.items()}
    labels = {kind: one.labels for kind, one in said.items()}
    if "teacher" in said:
        entropy["dual"] = (entropy["student"] + entropy["teacher"]) / 2
        labels["dual"] = labels["teacher"]
    return Maps(case, image.shown, entropy, labels, truth, tuple(image.properties["spacing"]))


def reliability(maps: Maps, top: float) -> dict[str, Reliability]:
    """Return for each map how many voxels there are by entropy, and how many are wrong; nothing without a truth.

    Parameters
    ----------
    maps : Maps
        Of a case.
    top : float
        Largest possible entropy, ln C.
    """
    if maps.truth is None:
        return {}
    known = maps.truth >= 0
    found = {}
    for name, entropy in maps.entropy.items():
        at = np.minimum((entropy[known] * (_FINE / top)).astype(np.int64), _FINE - 1)
        wrong = (maps.labels[name] != maps.truth)[known]
        found[name] = Reliability(np.bincount(at, minlength=_FINE), np.bincount(at[wrong], minlength=_FINE))
    return found


def _row(case: str, name: str, entropy: NDArray, top: float, counted: Reliability) -> list[Any]:
    mean = float(entropy.mean(dtype=np.float64))
    return [case, name, mean, mean / top, int(counted.wrong.sum()), counted.area()]


def _bins(totals: Mapping[str, Reliability], top: float) -> list[list[Any]]:
    rows = []
    for name, total in totals.items():
        for at, (voxels, wrong) in enumerate(zip(*total.coarse(), strict=True)):
            rate = wrong / voxels if voxels else math.nan
            rows.append([name, top * at / BINS, top * (at + 1) / BINS, int(voxels), int(wrong), rate])
    return rows


def draw_maps(maps: Maps, top: float) -> Figure:
    """Return the figure of a case: slices where the structure is, with the image, the entropies, and errors.

    Parameters
    ----------
    maps : Maps
        What is drawn.
    top : float
        Largest possible entropy, ln C.
    """
    names = [name for name in _ORDER if name in maps.entropy]
    final = maps.labels[names[-1]]
    plane = Plane(0, maps.spacing[1] / maps.spacing[2]) if len(maps.image) == 1 else plane_of(maps.spacing)
    structure = (final > 0) if maps.truth is None else (final > 0) | (maps.truth > 0)
    weight = structure if structure.any() else maps.entropy[names[-1]]
    slices = spread(weight, plane, SLICES)
    columns = 1 + len(names) + (maps.truth is not None)
    figure, axes = new_figure(len(slices), columns, 2.4 * columns + 0.8, 0.9 + 2.5 * len(slices))
    highest = max(float(plane.of(maps.entropy[name], at).max()) for name in names for at in slices)
    shades: Any = None
    for row, at in zip(axes, slices, strict=True):
        image, predicted = plane.of(maps.image, at), plane.of(final, at)
        show_gray(row[0], image, plane.aspect)
        outline(row[0], predicted > 0, "#56B4E9", "dashed")
        row[0].set_ylabel(f"slice {at}")
        for axis, name in zip(row[1:], names, strict=False):
            values = plane.of(maps.entropy[name], at)
            shades = axis.imshow(values, cmap=ENTROPY_MAP, vmin=0, vmax=max(highest, 1e-6), aspect=plane.aspect)
            axis.set(xticks=[], yticks=[])
        if maps.truth is not None:
            truth = plane.of(maps.truth, at)
            outline(row[0], truth > 0, "white", "solid")
            show_gray(row[-1], image, plane.aspect)
            row[-1].imshow(colored(np.maximum(truth, 0), np.where(truth < 0, 0, predicted)), aspect=plane.aspect)
            outline(row[-1], truth > 0, "white", "solid")
            outline(row[-1], predicted > 0, "black", "dashed")
    titles = ["image", *(f"entropy, {name}" for name in names), *(["errors"] if maps.truth is not None else [])]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.colorbar(
        shades,
        ax=axes[:, -1].tolist(),
        label=f"entropy (nats; at most ln {round(math.exp(top))} = {top:.2f})",
        shrink=0.8,
    )
    if maps.truth is not None:
        several = int(maps.truth.max()) > 1
        handles = legend_handles(several=several)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, facecolor="0.75")
    figure.suptitle(shown(maps.case), fontsize=10)
    return figure


def draw_reliability(totals: Mapping[str, Reliability], top: float) -> Figure:
    """Return the figure of error rate against entropy, and how many voxels have it.

    Parameters
    ----------
    totals : mapping of str to Reliability
        By network.
    top : float
        Largest possible entropy, ln C.
    """
    figure, ((axis, bars),) = new_figure(1, 2, 9.5, 4.2)
    p = np.linspace(1e-6, 0.5, 200)
    two = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    axis.plot(two, p, ":", color="0.4", label="calibrated, two classes in question")
    middle = top * (np.arange(BINS) + 0.5) / BINS
    for at, (name, total) in enumerate(totals.items()):
        voxels, wrong = total.coarse()
        there = voxels > 0
        style = {"color": COLORS[at], "marker": MARKERS[at], "linestyle": ("-", "--", "-.")[at % 3]}
        label = f"{name} (AUROC {total.area():.3f})"
        axis.plot(middle[there], wrong[there] / voxels[there], label=label, **style)
        bars.plot(middle, np.maximum(voxels, 0.5), **style)
    axis.set(xlabel="entropy (nats)", ylabel="share of voxels that are wrong", xlim=(0, top), ylim=(0, 1))
    bars.set(xlabel="entropy (nats)", ylabel="voxels", xlim=(0, top), yscale="log")
    for one in (axis, bars):
        one.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
