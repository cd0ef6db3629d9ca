"""The loss around a network over the course of a training: UnCL, FeCL, supervised, total (supplement, Fig. 2).

The student moves in the plane of two random directions, which are drawn once and scaled to the filters of each
checkpoint; patches, teacher, head and every random draw of the step stay. The losses are the terms of the trainer's own
method as they enter its loss, with the weights after the ramp and the entropy scale of that epoch. nnU-Net's loss is
taken at full resolution, without deep supervision.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from nnunetv2_dycon.checkpoint import KEY
from nnunetv2_dycon.command_lines import Model
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.files import file_digest, read_json, remove_leftovers, write_json
from nnunetv2_dycon.locks import locked
from nnunetv2_dycon.pictures.canvas import Drawn, make_folder, new_figure, save_figure, write_rows
from nnunetv2_dycon.pictures.directions import moved_weights, random_direction
from nnunetv2_dycon.pictures.fixed_batch import Patches, fixed_patches
from nnunetv2_dycon.step import Batch, DataInfo, Method, full_resolution, run_pass
from nnunetv2_dycon.trained import Moment, Trained, course_of, device_of
from nnunetv2_dycon.trainers.names import read_name

FORMAT = 1
_SAVE_INTERVAL = 5.0  # s; a kill loses at most the points of this time
_NAMES = {"uncl": "UnCL", "fecl": "FeCL", "supervised": "supervised"}


class Surface(NamedTuple):
    """Losses after so many epochs, by name, each (n, n): rows along the first direction, columns along the second."""

    epochs: int
    losses: Mapping[str, NDArray[np.float64]]


def plot_landscape(
    dataset_id: int | str,
    trainer: str,
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    plans: str = "nnUNetPlans",
    checkpoints: Sequence[str] = (),
    size: int = 21,
    radius: float = 1.0,
    batches: int = 1,
    seed: int = 0,
    output: str | Path | None = None,
    device: str | None = None,
) -> Drawn:
    """Draw the loss around the student over the course of a training.

    What is computed of a checkpoint is kept; a run that was stopped goes on.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    trainer : str
        Trainer name with options, as trained; with option `snapshots` there is a course to see.
    configuration, fold, plans
        As in nnU-Net.
    checkpoints : sequence of str
        File names; by default three of the snapshots and the final checkpoint.
    size : int
        Points along each direction, odd, so that the checkpoint itself is in the middle.
    radius : float
        How far to go along a direction; 1 is as far as the weights are long.
    batches : int
        Batches of labelled and unlabelled patches whose losses are averaged.
    seed : int
        Of directions, patches and draws.
    output : path, optional
        Folder to write; by default `pictures` in the fold's folder.
    device : str, optional
        cuda, cpu or mps; by default CUDA if there is a device.

    Raises
    ------
    DataError, ConfigError
        One line with the problem, its place and its remedy.
    """
    if size < 3 or size % 2 == 0:
        raise ConfigError(f"--size {size}: give an odd number of at least 3")
    if not (math.isfinite(radius) and radius > 0) or batches < 1:
        raise ConfigError(f"--radius {radius} --batches {batches}: give a radius above 0 and at least 1 batch")
    where = device_of(device)
    course = course_of(dataset_id, Model(trainer, plans, configuration), fold, checkpoints, most=3)
    for moment in course:
        if not moment.trained.has_teacher:
            raise DataError(f"{moment.trained.path} was not trained by this package; it has no terms to draw")
    last = course[-1].trained
    out = make_folder(last.fold / "pictures" if output is None else Path(output))
    with locked(out, f"{out}: another picture is being made there; wait for it, or give -o another folder"):
        remove_leftovers(out, "landscape_*")
        grid = np.linspace(-radius, radius, size)
        surfaces = []
        for moment in course:
            losses = Losses(moment.trained, batches, seed, where)
            key = {"format": FORMAT, "checkpoint": file_digest(moment.trained.path), "radius": radius, "size": size}
            key |= {"batches": batches, "seed": seed}
            path = out / f"landscape_epoch{moment.epochs:04d}.json"
            surfaces.append(_surface(moment, losses, grid, seed, path, key))
        figure = draw_landscape(surfaces, grid)
        rows = [row for surface in surfaces for row in _rows(surface, grid)]
        names = list(surfaces[0].losses)
        table = write_rows(out / "landscape.csv", ["epochs", "first direction", "second direction", *names], rows)
        return Drawn((figure,), (*save_figure(figure, out, "landscape"), table))


def _rows(surface: Surface, grid: NDArray) -> list[list[float]]:
    values = list(surface.losses.values())
    return [
        [surface.epochs, float(a), float(b), *(float(one[i, j]) for one in values)]
        for i, a in enumerate(grid)
        for j, b in enumerate(grid)
    ]


# ---- the losses at one point -----------------------------------------------------------------------------------


class Losses:
    """The terms of a training's method on fixed patches; calling it returns them for the student's present weights.

    Parameters
    ----------
    trained : Trained
        A checkpoint of this package.
    batches : int
        How many batches.
    seed : int
        Of patches and of every draw of a step.
    device : torch.device
        Where to compute.

    Raises
    ------
    ConfigError
        If the method is not defined for the data.
    """

    def __init__(self, trained: Trained, batches: int, seed: int, device: torch.device) -> None:
        self.student = trained.network("student").to(device).requires_grad_(False)
        state = trained.checkpoint[KEY]
        kind, settings = read_name(str(trained.checkpoint["trainer_name"]))
        labels = trained.plans.get_label_manager(trained.dataset_json)
        data = DataInfo(labels.num_segmentation_heads, labels.ignore_label, labels.has_regions, False)
        self.method: Method = kind(settings, data, 0)
        self.method.build(self.student)
        self.method.teacher.network.load_state_dict(state["teacher"])
        self.method.load_state_dict(state["method"], strict=False)
        self.method.to(device).requires_grad_(False)
        self._state = {name: value.clone() for name, value in self.method.state_dict().items()}
        fraction = min(1.0, state["step"] / settings.steps)
        self.now = {name: value(fraction) for name, value in settings.schedules().items()}
        if "ramp" in self.now:
            self.now["ramp"] = 1.0
        number = settings.batch or trained.configuration.batch_size
        unlabeled = (settings.unlabeledbatch or number) if self.method.uses_unlabeled else 0
        draws = np.random.default_rng(seed)
        self.patches = [fixed_patches(trained, number, unlabeled, draws) for _ in range(batches)]
        self._loss = DC_and_CE_loss(
            {"batch_dice": trained.configuration.batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
            {},
            ignore_label=labels.ignore_label,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
        self._device, self._seed = device, seed

    def __call__(self) -> dict[str, float]:
        """Return each loss by name and their sum, "total"; the student's weights are used as they are."""
        sums: dict[str, float] = {}
        for number, patches in enumerate(self.patches):
            for name, value in self._terms(patches, self._seed + number).items():
                sums[name] = sums.get(name, 0.0) + value / len(self.patches)
        return {**sums, "total": sum(sums.values())}

    def _terms(self, patches: Patches, seed: int) -> dict[str, float]:
        x_l, y_l, x_u = (part.to(self._device) for part in patches)
        batch = Batch(x_l, y_l, x_u, self._supervised(y_l), self.now, torch.Generator(self._device).manual_seed(seed))
        found = dict.fromkeys(_NAMES.values(), 0.0)
        answer = None
        for p in self.method.passes(self.student, batch):
            cost, answer = run_pass(p, batch, answer)
            for name, term in cost.terms.items():
                group = next((title for part, title in _NAMES.items() if part in name), name)
                found[group] = found.get(group, 0.0) + term.weight * float(term.value)
        self.method.load_state_dict(self._state)  # a labelled pass counts how well each class is known
        return found

    def _supervised(self, y_l: Tensor) -> Callable[[Any], Tensor]:
        return lambda outputs: self._loss(full_resolution(outputs), y_l)


def _surface(moment: Moment, losses: Losses, grid: NDArray, seed: int, path: Path, key: Mapping[str, Any]) -> Surface:
    """Return the losses on the grid, those of an earlier run as they were."""
    points = _kept(path, key)
    draws = torch.Generator().manual_seed(seed)
    directions = [random_direction(losses.student, draws) for _ in range(2)]
    places = [(i, j) for i in range(len(grid)) for j in range(len(grid)) if f"{i},{j}" not in points]
    saved = time.monotonic()
    try:
        with moved_weights(losses.student, directions) as move:
            for i, j in tqdm(places, desc=f"Losses around epoch {moment.epochs}", disable=not places):
                move(float(grid[i]), float(grid[j]))
                points[f"{i},{j}"] = losses()
                if time.monotonic() - saved >= _SAVE_INTERVAL:
                    write_json(path, {"key": key, "points": points})
                    saved = time.monotonic()
    finally:
        write_json(path, {"key": key, "points": points})
    names = list(points["0,0"])
    values = {n: np.array([[points[f"{i},{j}"][n] for j in range(len(grid))] for i in range(len(grid))]) for n in names}
    return Surface(moment.epochs, values)


def _kept(path: Path, key: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the points of an earlier run with the same checkpoint, grid and patches."""
    try:
        content = read_json(path)
        return dict(content["points"]) if content["key"] == key else {}
    except (DataError, KeyError, TypeError, ValueError):  # there is none, or it is damaged: compute it
        return {}


def draw_landscape(surfaces: Sequence[Surface], grid: NDArray) -> Figure:
    """Return the figure: a row for each loss, a column for each checkpoint, the checkpoint itself marked.

    Parameters
    ----------
    surfaces : sequence of Surface
        In the order of epochs. A loss that is 0 everywhere, as UnCL before a class is learnt, has no row.
    grid : array, shape (n,)
        Places along both directions.
    """
    names = [name for name in surfaces[0].losses if any(np.any(one.losses[name]) for one in surfaces)]
    figure, axes = new_figure(
        len(names), len(surfaces), 3.4 * len(surfaces) + 0.8, 3.1 * len(names), subplot_kw={"projection": "3d"}
    )
    first, second = np.meshgrid(grid, grid, indexing="ij")
    middle = len(grid) // 2
    for row, name in zip(axes, names, strict=True):
        for axis, surface in zip(row, surfaces, strict=True):
            values = surface.losses[name]
            low, high = float(np.nanmin(values)), float(np.nanmax(values))
            flat = high - low <= 1e-9 * max(1.0, abs(high))
            floor = low - (1.0 if flat else 0.35 * (high - low))
            axis.plot_surface(first, second, values, cmap="viridis", linewidth=0, rasterized=True, alpha=0.9)
            if not flat:
                axis.contour(first, second, values, 8, zdir="z", offset=floor, cmap="viridis", linewidths=0.8)
            axis.plot([0, 0], [0, 0], [floor, values[middle, middle]], "k:", linewidth=1)
            axis.plot(
                [0], [0], [values[middle, middle]], "^", color="black", markeredgecolor="white", markersize=7, zorder=10
            )
            axis.set_zlim(floor, high)
            axis.tick_params(labelsize=6, pad=-1)
            axis.set_xlabel("direction 1", fontsize=7, labelpad=-6)
            axis.set_ylabel("direction 2", fontsize=7, labelpad=-6)
            axis.set_title(
                f"{name}, epoch {surface.epochs}\nat the checkpoint {values[middle, middle]:.3g}", fontsize=8
            )
    figure.suptitle("Loss along two random directions (triangle: the checkpoint)", fontsize=9)
    return figure
