"""What a layer looks at, over the course of a training: Grad-CAM in whole images (supplement, Fig. 3).

Grad-CAM weighs each channel of a layer by the mean of its gradient and keeps what is positive of the sum (Selvaraju et
al., ICCV 2017). The gradient is that of the mean logit of a class over the voxels of a patch, each weighted by the
class's probability: so there is a map before the network segments anything. Maps of patches are blended as nnU-Net
blends logits.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from tqdm import tqdm

from nnunetv2_dycon.command_lines import Model
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.data.raw_cases import raw_cases
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation.label_files import read_label_map, read_labels
from nnunetv2_dycon.evaluation.overlays import outline
from nnunetv2_dycon.files import first_few
from nnunetv2_dycon.inference import Prepared, full_size, on_image_grid, predict, prepare, write_map
from nnunetv2_dycon.pictures.canvas import Drawn, make_folder, new_figure, save_figure, show_gray, shown, write_rows
from nnunetv2_dycon.pictures.slices import Plane, as_volume, fullest, plane_of
from nnunetv2_dycon.trained import Moment, Trained, Weights, course_of, device_of

_MOST_CLASSES = 4


class Activation(NamedTuple):
    """Grad-CAM of one class after so many epochs: map (Z, Y, X), at most 1, and its largest value before."""

    epochs: int
    label: str
    values: NDArray[np.float32]
    largest: float


def plot_gradcam(
    dataset_id: int | str,
    trainer: str,
    case: str | None = None,
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    plans: str = "nnUNetPlans",
    checkpoints: Sequence[str] = (),
    layer: str | None = None,
    labels: Sequence[str] = (),
    weights: Weights = "student",
    output: str | Path | None = None,
    device: str | None = None,
) -> Drawn:
    """Draw what a layer looks at for each class, over the course of a training.

    Parameters
    ----------
    dataset_id : int or str
        Data set number or name.
    trainer : str
        Trainer name with options, as trained; with option `snapshots` there is a course to see.
    case : str, optional
        A case; by default the first test case, without test cases the first unlabelled one.
    configuration, fold, plans
        As in nnU-Net.
    checkpoints : sequence of str
        File names; by default five of the snapshots and the final checkpoint.
    layer : str, optional
        Name of a module; by default the last but one stage of the decoder.
    labels : sequence of str
        Names of classes; by default the first four.
    weights : {"student", "teacher"}
        Whose.
    output : path, optional
        Folder to write; by default `pictures` in the fold's folder.
    device : str, optional
        cuda, cpu or mps; by default CUDA if there is a device.

    Returns
    -------
    Drawn
        One figure; its files, each map as NIfTI in the place of the image, and the numbers.

    Raises
    ------
    DataError, ConfigError
        One line with the problem, its place and its remedy.
    """
    grad_cam_class()
    where = device_of(device)
    course = course_of(dataset_id, Model(trainer, plans, configuration), fold, checkpoints)
    last = course[-1].trained
    name = layer_name(last.network(weights), layer)
    chosen = _classes(last, labels)
    folder, content = find_raw(last.path.parents[2].name)
    raw = raw_cases(folder, content)
    names = raw.check([case] if case else []) or (raw.roles.test or raw.roles.unlabeled)[:1]
    if not names:
        raise DataError(f"{folder} has neither test cases nor unlabelled ones; name a case")
    image = prepare(last, raw.roles.files[names[0]])
    structure = _structure(last, weights, where, image)
    path = raw.truth(names[0])
    if path is not None:
        structure = as_volume(
            read_label_map(path, read_labels(folder / "dataset.json", path.parent), truth=True).labels
        )
    out = make_folder(last.fold / "pictures" if output is None else Path(output))
    found, files = [], []
    for moment in tqdm(course, desc="Grad-CAM of checkpoints"):
        for one in _activations(moment, weights, where, image, name, chosen):
            found.append(one)
            files.append(out / f"{names[0]}_gradcam_{one.label}_epoch{one.epochs:04d}.nii.gz")
            write_map(files[-1], one.values, image.properties)
    of_label = {label: structure == value for value, label in chosen.items()}
    figure = draw_gradcam(found, image, of_label, f"{names[0]}, {weights}, {name}", truth=path is not None)
    files += save_figure(figure, out, f"{names[0]}_gradcam")
    rows = [
        [names[0], one.epochs, one.label, name, one.largest, _inside(one.values, of_label[one.label])] for one in found
    ]
    share = f"share of the map in the {'true' if path else 'predicted'} structure"
    header = ["case", "epochs", "class", "layer", "largest value", share]
    return Drawn((figure,), (*files, write_rows(out / f"{names[0]}_gradcam.csv", header, rows)))


def grad_cam_class() -> Any:
    """Return captum's Grad-CAM of a layer.

    Raises
    ------
    ConfigError
        If captum is not installed.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise ConfigError("plot gradcam needs captum; type: pip install 'nnunetv2-dycon[pictures]'") from error
    return LayerGradCam


def layer_name(network: Any, layer: str | None) -> str:
    """Return the name of a module of a network; by default the last but one stage of the decoder.

    Raises
    ------
    ConfigError
        If there is no such module; the message has the stages.
    """
    modules = dict(network.named_modules())
    stages = [
        f"{part}.stages.{at}" for part in ("encoder", "decoder") for at in range(len(getattr(network, part).stages))
    ]
    if layer is None:
        return [name for name in stages if name.startswith("decoder")][-2:][0]
    if layer not in modules or not layer:
        raise ConfigError(f"--layer {layer}: the network has no such module; its stages are {', '.join(stages)}")
    return layer


def _classes(trained: Trained, labels: Sequence[str]) -> dict[int, str]:
    trained.refuse_regions()
    known = trained.classes
    for label in labels:
        if label not in known.values():
            raise ConfigError(f"--labels {label}: the classes are {first_few(list(known.values()), 20)}")
    chosen = {value: name for value, name in known.items() if name in labels}
    return chosen or dict(list(known.items())[:_MOST_CLASSES])


def _structure(trained: Trained, weights: Weights, device: torch.device, image: Prepared) -> NDArray:
    return predict(trained, trained.predictor(weights, device, mirroring=False), image).labels


def _inside(values: NDArray, mask: NDArray[np.bool_]) -> float:
    total = float(values.sum(dtype=np.float64))
    return float(values[mask].sum(dtype=np.float64)) / total if total else math.nan


def _activations(
    moment: Moment, weights: Weights, device: torch.device, image: Prepared, layer: str, classes: Mapping[int, str]
) -> list[Activation]:
    trained = moment.trained
    predictor = trained.predictor(weights, device, mirroring=False)
    positions = {value: at for at, value in enumerate(trained.classes, start=1)}  # logits: background, then in order
    maps = gradcam_of_image(predictor, image.data, layer, [positions[value] for value in classes])
    found = []
    for label, one in zip(classes.values(), maps, strict=True):
        on_image = on_image_grid(trained, one[None], image.properties)[0].clamp_min(0).numpy()
        values = full_size(trained, on_image.astype(np.float32), image.properties)
        largest = float(values.max())
        share = (values / largest if largest else values).astype(np.float32)
        found.append(Activation(moment.epochs, label, share, largest))
    return found


def gradcam_of_image(predictor: Any, data: Tensor, layer: str, classes: Sequence[int]) -> Tensor:
    """Return Grad-CAM of a preprocessed image, blended over nnU-Net's patches.

    Parameters
    ----------
    predictor : nnUNetPredictor
        Of the network.
    data : Tensor, shape (C, *S)
        The image, with three spatial axes also for a 2D configuration.
    layer : str
        Name of a module.
    classes : sequence of int
        Positions of classes in the logits.

    Returns
    -------
    Tensor, shape (classes, *S)
        On the CPU, not negative.
    """
    patch = tuple(predictor.configuration_manager.patch_size)
    padded, inner = _padded(data, patch)
    network = predictor.network.to(predictor.device).eval()
    gaussian = compute_gaussian(
        patch, sigma_scale=1.0 / 8, value_scaling_factor=1.0, device=torch.device("cpu")
    ).float()
    total = torch.zeros(len(classes), *padded.shape[1:])
    weight = torch.zeros(padded.shape[1:])
    for place in predictor._internal_get_sliding_window_slicers(padded.shape[1:]):
        x = padded[place][None].to(predictor.device)
        for at, position in enumerate(classes):
            total[at][place[1:]] += gradcam_of_patch(network, x, layer, position)[0].cpu() * gaussian
        weight[place[1:]] += gaussian
    whole = (slice(None), *inner)
    return (total / weight)[whole]


def _padded(data: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Return an image (C, *S) that holds a patch, with zeros around it, and where the image is in it."""
    size = [0] * (data.ndim - 1 - len(patch)) + list(patch)
    lacking = [max(0, wanted - there) for wanted, there in zip(size, data.shape[1:], strict=True)]
    before = [gap // 2 for gap in lacking]
    around = [one for gap, start in zip(lacking, before, strict=True) for one in (gap - start, start)]
    inner = tuple(slice(start, start + there) for start, there in zip(before, data.shape[1:], strict=True))
    return pad(data, around[::-1]), inner


def gradcam_of_patch(network: nn.Module, x: Tensor, layer: str, position: int) -> Tensor:
    """Return Grad-CAM of patches, at their size.

    Parameters
    ----------
    network : nn.Module
        Returns logits (B, K, *S).
    x : Tensor, shape (B, C, *S)
        The patches.
    layer : str
        Name of a module.
    position : int
        Position of the class in the logits.

    Returns
    -------
    Tensor, shape (B, *S)
        Not negative.
    """

    def score(patch: Tensor) -> Tensor:
        return class_score(network(patch), position)

    maps = grad_cam_class()(score, network.get_submodule(layer)).attribute(x, relu_attributions=True).detach()
    mode = "trilinear" if x.ndim == 5 else "bilinear"
    return interpolate(maps, x.shape[2:], mode=mode, align_corners=False)[:, 0]


def class_score(logits: Tensor, position: int) -> Tensor:
    """Return the mean logit of a class over voxels, weighted by its probability, (B,), for logits (B, K, *S)."""
    with torch.no_grad():
        p = torch.softmax(logits, 1)[:, position].flatten(1)
        p = p / p.sum(1, keepdim=True)
    return (logits[:, position].flatten(1) * p).sum(1)


def draw_gradcam(
    found: Sequence[Activation],
    image: Prepared,
    structures: Mapping[str, NDArray[np.bool_]],
    title: str,
    *,
    truth: bool,
) -> Figure:
    """Return the figure: a row for each class, a column for each checkpoint.

    Parameters
    ----------
    found : sequence of Activation
        All classes of all checkpoints.
    image : Prepared
        The image.
    structures : mapping of str to array
        Mask (Z, Y, X) of each class, which is outlined.
    title : str
        Above the figure.
    truth : bool
        Whether the masks are true ones; predicted ones are dashed.
    """
    labels = list(structures)
    epochs = list(dict.fromkeys(one.epochs for one in found))
    spacing = image.properties["spacing"]
    plane = Plane(0, spacing[1] / spacing[2]) if len(image.shown) == 1 else plane_of(spacing)
    columns = len(epochs) + 1
    figure, axes = new_figure(len(labels), columns, 2.3 * columns + 0.9, 1.0 + 2.6 * len(labels))
    colors: Any = None
    for row, label in zip(axes, labels, strict=True):
        of_label = {one.epochs: one.values for one in found if one.label == label}
        mask = structures[label]
        at = fullest(mask if mask.any() else of_label[epochs[-1]], plane)
        for axis, epoch in zip(row, [None, *epochs], strict=True):
            show_gray(axis, plane.of(image.shown, at), plane.aspect)
            if epoch is not None:
                values = plane.of(of_label[epoch], at)
                colors = axis.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.65, aspect=plane.aspect)
            outline(axis, plane.of(mask, at), "#56B4E9", "solid" if truth else "dashed", 1.5)
        row[0].set_ylabel(f"{shown(label)}, slice {at}", fontsize=9)
    for axis, text in zip(axes[0], ["image", *(f"epoch {epoch}" for epoch in epochs)], strict=True):
        axis.set_title(text, fontsize=9)
    figure.colorbar(colors, ax=axes[:, -1].tolist(), label="Grad-CAM (share of its largest value)", shrink=0.8)
    figure.suptitle(f"{shown(title)}; outline: {'truth' if truth else 'prediction'}", fontsize=9)
    return figure
