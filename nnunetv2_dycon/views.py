"""Views: the inputs of student and teacher, made from a step's patches on the tensors' device.

Shapes: `(B, C, *S)` is batch, input channel, space (two or three axes); `K` counts the classes. The teacher sees the
loader's patch, the student a view of it; both keep the loader's geometry, except where a view moves voxels between
patches. Such a view has the map that moves the teacher's targets alike, so that a loss on a mixed view is the same
loss, and where it only moves voxels about, its inverse. Nothing here waits for the device: all draws are tensors, all
choices are masks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from nnunetv2_dycon.errors import ConfigError

Outputs = Tensor | Sequence[Tensor]  # of a network: with deep supervision several, the finest first

# Side of a mixing box as a fraction of the patch, per axis. In 3D the mean volume share is 0.54^3 = 0.16 and
# never above 0.42; in 2D it is 0.29 and never above 0.56. At least a third, so that a whole structure with its
# surroundings moves and the box spans several FeCL patches; at most three quarters, so that on each axis the
# receiving patch keeps context around the box and, on average, most of its own voxels.
BOX_SIDE = (1 / 3, 3 / 4)
BCP_BOX_SIDE = (2 / 3, 2 / 3)  # BCP's own; 8/27 of the volume
# Logit of a known label: softmax gives 1 and exp(-80), so its entropy is 0 in float32 and every value stays
# finite, in float16 and bfloat16 too.
HARD_LOGIT = 40.0
# Each change of `intensity` is made with this chance. The ranges below are nnU-Net's, its chances are 0.1 to
# 0.3: they would leave every third view unchanged; with five changes at 0.5 it is every thirty-second.
INTENSITY_CHANCE = 0.5
NOISE_SD = (0.0, 0.1)  # in standard deviations of the image, which is z-scored
BLUR_SIGMA = (0.5, 1.0)  # voxels
BLUR_RADIUS = 3  # voxels; three standard deviations of the widest kernel
BRIGHTNESS = (0.75, 1.25)
CONTRAST = (0.75, 1.25)
GAMMA = (0.7, 1.5)


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class View:
    """The inputs of one student pass, and how they lie to the patches that they come from.

    Attributes
    ----------
    student : Tensor, shape (B, C, *S)
        Input of the student: a view of the unlabelled patches, of the labelled ones, or of both, one after the other.
    teacher : Tensor, shape (B_u, C, *S), or None
        Input of the teacher, where it has a say.
    mix : callable
        Turns the teacher's logits `(B_u, K, *S)` for `teacher` into targets, as logits, for `student`.
    restore : callable
        Turns each of the student's outputs `(B, K, *G)`, of any resolution, back into the frame of the patches. The
        identity unless voxels were exchanged between patches and all of them are still there.
    mixes : bool
        Whether `mix` moves voxels.
    pasted : Tensor, shape (B, 1, *S), bool, or None
        Where the student's input is a labelled patch's; None where no labelled patch was pasted.
    truth : Tensor, shape (B, 1, *S), integer, or None
        True labels there, anything elsewhere.
    name : str
        Begins the names of the pass's terms.
    share : float
        Factor of the terms' weights: two views of the same patches have half each.
    """

    student: Tensor
    teacher: Tensor = None  # type: ignore[assignment]  # not every view has what is None here
    mix: Callable[[Tensor], Tensor] = _identity
    restore: Callable[[Tensor], Tensor] = _identity
    mixes: bool = False
    pasted: Tensor = None  # type: ignore[assignment]
    truth: Tensor = None  # type: ignore[assignment]
    name: str = ""
    share: float = 1.0

    def restored(self, outputs: Outputs) -> Outputs:
        """Return the student's outputs, one or a list, in the frame of the patches."""
        return self.restore(outputs) if isinstance(outputs, Tensor) else [self.restore(output) for output in outputs]


class LabeledPatches(NamedTuple):
    """The labelled half of a batch, as far as a view may use it.

    Attributes
    ----------
    x : Tensor, shape (B_l, C, *S)
        Images.
    y : Tensor, shape (B_l, 1, *S), integer
        Labels at full resolution, below K.
    ignore_label : int or None
        The label that means "not annotated".
    """

    x: Tensor
    y: Tensor
    ignore_label: int | None


ViewMaker = Callable[[Tensor, LabeledPatches, Generator], View]


def draw_views(
    name: str,
    x_u: Tensor,
    x_l: Tensor,
    y_l: Tensor,
    ignore_label: int | None = None,
    *,
    generator: Generator,
) -> Iterator[View]:
    """Yield the views of an unlabelled batch that an option `view` names, each drawn when its turn comes.

    Parameters
    ----------
    name : str
        A key of `VIEWS`.
    x_u : Tensor, shape (B, C, *S), floating
        Unlabelled patches from the loader, z-scored.
    x_l : Tensor, shape (B_l, C, *S)
        Labelled patches.
    y_l : Tensor, shape (B_l, 1, *S), integer
        Their labels at full resolution, below K.
    ignore_label : int, optional
        The label that means "not annotated".
    generator : Generator
        Source of every draw, on the device of `x_u`.

    Raises
    ------
    ConfigError
        If the name is unknown, or `cutmix` has one patch only.
    ValueError
        If a shape does not fit.
    """
    if name not in VIEWS:
        raise ConfigError(f"Unknown view {name!r}; choose one of {', '.join(VIEWS)}.")
    if x_u.ndim not in (4, 5):
        raise ValueError(f"x_u must be (B, C, *S) with 2 or 3 axes, got {tuple(x_u.shape)}.")
    if x_l.shape[1:] != x_u.shape[1:] or y_l.shape != (len(x_l), 1, *x_l.shape[2:]):
        raise ValueError(
            f"Labelled images {tuple(x_l.shape)} and labels {tuple(y_l.shape)} do not fit "
            f"unlabelled images {tuple(x_u.shape)}: expected (B_l, C, *S) and (B_l, 1, *S)."
        )
    makers = VIEWS[name]
    for start, maker in makers.items():
        view = maker(x_u, LabeledPatches(x_l, y_l, ignore_label), generator)
        yield replace(view, name=start, share=1 / len(makers))


def paste_labeled(
    x_l: Tensor,
    y_l: Tensor,
    ignore_label: int | None,
    side: tuple[float, float],
    *,
    generator: Generator,
) -> View:
    """Return a view of labelled patches with a box from the next labelled patch, images and labels alike.

    Parameters
    ----------
    x_l : Tensor, shape (B_l, C, *S)
        Labelled patches.
    y_l : Tensor, shape (B_l, 1, *S), integer
        Their labels.
    ignore_label : int or None
        The label that means "not annotated".
    side : tuple of float
        Smallest and largest side of the box, as `random_box` takes them.
    generator : Generator
        Source of every draw, on the device of `x_l`.

    Returns
    -------
    View
        `truth` are the mixed labels, `pasted` is where they are annotated.

    Raises
    ------
    ConfigError
        If there is one labelled patch only, which would be pasted into itself.
    """
    check_pastes(len(x_l))
    box = random_box(x_l.shape, x_l.device, generator, side)
    truth = torch.where(box, y_l.roll(-1, 0), y_l)
    return View(torch.where(box, x_l.roll(-1, 0), x_l), pasted=_annotated(truth, ignore_label), truth=truth)


def noisy(x: Tensor, generator: Generator) -> Tensor:
    """Return the images with clip(0.1 N(0, 1), -0.2, 0.2) added, the noise of mean teacher's usual recipe."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + noise.mul_(0.1).clamp_(-0.2, 0.2)


def _weak(x: Tensor, labeled: LabeledPatches, generator: Generator) -> View:
    """Return the same patch for both: all difference between them is in the weights."""
    return View(x, x)


def _noise(x: Tensor, labeled: LabeledPatches, generator: Generator) -> View:
    """Return a view whose teacher sees clipped Gaussian noise, as in DyCON's released code."""
    return View(x, noisy(x, generator))


def _intensity(x: Tensor, labeled: LabeledPatches, generator: Generator) -> View:
    """Return a view whose student sees other intensities, drawn per sample, in nnU-Net's order."""
    y = x.float()
    for change in (_add_noise, _blur, _scale_brightness, _scale_contrast, _apply_gamma):
        y = torch.where(_per_sample(x, generator) < INTENSITY_CHANCE, change(y, generator), y)
    return View(y.to(x.dtype), x)


def check_pastes(patches: int) -> None:
    """Raise ConfigError if a process has too few labelled patches in a step to paste among them.

    Examples
    --------
    >>> check_pastes(2)
    """
    if patches < 2:
        raise ConfigError(
            "Pastes among labelled patches need two of them, but a process has only one: use a trainer name with "
            "batch2 or more per process, or with paste0 and, for BCP, pretrain0."
        )


def check_number(name: str, patches: int) -> None:
    """Raise ConfigError if a view needs more unlabelled patches than a process has in a step.

    Examples
    --------
    >>> check_number("noise", 1)
    >>> check_number("cutmix_intensity", 2)
    """
    if name.startswith("cutmix") and patches < 2:
        raise ConfigError(
            f"View {name!r} exchanges boxes between unlabelled patches, but a process has only one of them: "
            "use a trainer name with unlabeledbatch2 or more per process, or the view copy_paste."
        )


def _cutmix(x: Tensor, labeled: LabeledPatches, generator: Generator) -> View:
    """Return a view in which a box of patch i comes from the same place of patch (i + 1) mod B.

    References
    ----------
    CutMix-Seg (French et al., BMVC 2020); there one box is shared by a pair, here each patch has its own.
    """
    check_number("cutmix", len(x))
    box = random_box(x.shape, x.device, generator)

    def mix(logits: Tensor) -> Tensor:
        _check_same_grid(logits, x)
        return torch.where(box, logits.roll(-1, 0), logits)

    return View(mix(x), x, mix, mixes=True)


def _copy_paste(side: tuple[float, float], *, inverted: bool | None = False) -> ViewMaker:
    """Return a view in which a box of each patch comes from a labelled patch, with its true labels; inverted, all else.

    With `inverted` None every other patch is inverted, the first of a batch or the second by a draw.

    Voxels without a true label (the ignore label, or below 0) are not pasted, image and target
    alike.

    References
    ----------
    BCP (Bai et al., CVPR 2023): both directions, each a pass of its own.
    """

    def maker(x: Tensor, labeled: LabeledPatches, generator: Generator) -> View:
        # Partners are drawn, since nnU-Net puts its forced-foreground patches last in the batch.
        order = torch.randperm(len(labeled.x), generator=generator, device=x.device)
        partner = order[torch.arange(len(x), device=x.device) % len(order)]
        truth = labeled.y[partner]
        box = random_box(x.shape, x.device, generator, side)
        around: bool | Tensor = bool(inverted)
        if inverted is None:
            first = torch.randint(2, (), generator=generator, device=x.device)
            others = (torch.arange(len(x), device=x.device) + first) % 2 == 0
            around = others.view(-1, *[1] * (x.ndim - 1))
        pasted = (box != around) & _annotated(truth, labeled.ignore_label)

        def mix(logits: Tensor) -> Tensor:
            _check_same_grid(logits, x)
            classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
            hard = torch.full_like(logits, -HARD_LOGIT).masked_fill_(truth == classes, HARD_LOGIT)
            return torch.where(pasted, hard, logits)

        student = torch.where(pasted, labeled.x[partner].to(x.dtype), x)
        return View(student, x, mix, mixes=True, pasted=pasted, truth=truth)

    return maker


def _then_intensity(mixing: ViewMaker) -> ViewMaker:
    """Return a mixing view whose student sees other intensities on top, pasted voxels included."""

    def maker(x: Tensor, labeled: LabeledPatches, generator: Generator) -> View:
        view = mixing(x, labeled, generator)
        return replace(view, student=_intensity(view.student, labeled, generator).student)

    return maker


_MIXING: dict[str, dict[str, ViewMaker]] = {
    "cutmix": {"": _cutmix},
    "copy_paste": {"": _copy_paste(BOX_SIDE)},
    "copy_paste_in": {"": _copy_paste(BCP_BOX_SIDE, inverted=True)},
    "copy_paste_out": {"": _copy_paste(BCP_BOX_SIDE)},
    "copy_paste_either": {"": _copy_paste(BCP_BOX_SIDE, inverted=None)},
    "bcp": {"in_": _copy_paste(BCP_BOX_SIDE, inverted=True), "out_": _copy_paste(BCP_BOX_SIDE)},
}
# What option `view` may be: the views of a step, each a student pass of its own, by the beginning of its terms' names.
VIEWS: dict[str, dict[str, ViewMaker]] = {
    "weak": {"": _weak},
    "noise": {"": _noise},
    "intensity": {"": _intensity},
    **_MIXING,
    **{
        f"{name}_intensity": {start: _then_intensity(maker) for start, maker in makers.items()}
        for name, makers in _MIXING.items()
    },
}


def _annotated(y: Tensor, ignore_label: int | None) -> Tensor:
    """Return where labels (B, 1, *S) are annotated."""
    return y >= 0 if ignore_label is None else (y >= 0) & (y != ignore_label)


def _check_same_grid(logits: Tensor, x: Tensor) -> None:
    if len(logits) != len(x) or logits.shape[2:] != x.shape[2:]:
        raise ValueError(f"Teacher logits {tuple(logits.shape)} do not lie on the grid of {tuple(x.shape)}.")


def random_box(
    shape: torch.Size, device: torch.device, generator: Generator, side: tuple[float, float] = BOX_SIDE
) -> Tensor:
    """Return masks `(B, 1, *S)`, True in one box per sample: any position inside, `side` as a share of each axis.

    Parameters
    ----------
    shape : torch.Size
        That of the images, (B, C, *S).
    device : torch.device
        Where the mask is made, that of the generator.
    generator : Generator
        Source of sides and positions.
    side : tuple of float
        Smallest and largest side, in (0, 1], rounded to whole voxels.
    """
    batch, space = shape[0], shape[2:]
    draws = torch.rand((2, len(space), batch, 1), generator=generator, device=device)
    box = torch.ones((batch, 1) + (1,) * len(space), dtype=torch.bool, device=device)
    for axis, size in enumerate(space):
        voxels = draws[0, axis].mul(side[1] - side[0]).add(side[0]).mul(size).round().clamp_(min=1)
        # The minimum is for a product that float32 rounds up to the next whole number.
        start = torch.minimum((draws[1, axis] * (size - voxels + 1)).floor(), size - voxels)
        grid = torch.arange(size, device=device)
        inside = (grid >= start) & (grid < start + voxels)
        box = box & inside.view(batch, 1, *[size if a == axis else 1 for a in range(len(space))])
    return box


def _per_sample(x: Tensor, generator: Generator) -> Tensor:
    """Return one number from [0, 1) per sample, shape (B, 1, ...)."""
    return torch.rand((len(x),) + (1,) * (x.ndim - 1), generator=generator, device=x.device)


def _uniform(x: Tensor, bounds: tuple[float, float], generator: Generator) -> Tensor:
    """Return one draw per sample and channel, shape (B, C, 1, ...)."""
    return torch.empty(_per_channel(x), device=x.device).uniform_(*bounds, generator=generator)


def _factor(x: Tensor, bounds: tuple[float, float], generator: Generator) -> Tensor:
    """Return one factor per sample and channel, as often below 1 as above, as nnU-Net draws them."""
    draw = _uniform(x, (-1.0, 1.0), generator)
    return 1 + torch.where(draw < 0, draw * (1 - bounds[0]), draw * (bounds[1] - 1))


def _per_channel(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:2], *[1] * (x.ndim - 2))


def _space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _add_noise(x: Tensor, generator: Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return x + noise * _uniform(x, NOISE_SD, generator)


def _blur(x: Tensor, generator: Generator) -> Tensor:
    """Return x convolved with a Gaussian, one width per sample, channel and axis, edges repeated.

    Written as shifted sums: widths differ by sample, and autocast leaves sums alone.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
    for axis in _space(x):
        sigma = _uniform(x, BLUR_SIGMA, generator)
        kernel = torch.exp(-0.5 * (offsets.view(-1, *[1] * x.ndim) / sigma) ** 2)
        kernel = kernel / kernel.sum(0)
        margin = [0, 0] * (x.ndim - 1 - axis) + [BLUR_RADIUS] * 2 + [0, 0] * (axis - 2)
        padded = pad(x, margin, mode="replicate")
        blurred = torch.zeros_like(x)
        for k in range(len(kernel)):
            blurred.addcmul_(padded.narrow(axis, k, x.shape[axis]), kernel[k])
        x = blurred
    return x


def _scale_brightness(x: Tensor, generator: Generator) -> Tensor:
    return x * _factor(x, BRIGHTNESS, generator)


def _scale_contrast(x: Tensor, generator: Generator) -> Tensor:
    """Return x stretched about its mean and cut to its range."""
    mean = x.mean(_space(x), keepdim=True)
    stretched = (x - mean) * _factor(x, CONTRAST, generator) + mean
    return torch.clamp(stretched, x.amin(_space(x), keepdim=True), x.amax(_space(x), keepdim=True))


def _apply_gamma(x: Tensor, generator: Generator) -> Tensor:
    """Return x with a gamma curve over its own range, brought back to its mean and standard deviation."""
    low, high = x.amin(_space(x), keepdim=True), x.amax(_space(x), keepdim=True)
    # The smallest divisor is for a constant channel, which stays as it is.
    curved = ((x - low) / (high - low).clamp_min(1e-7)) ** _factor(x, GAMMA, generator)
    spread, centre = torch.std_mean(curved, _space(x), correction=0, keepdim=True)
    wanted_spread, wanted_centre = torch.std_mean(x, _space(x), correction=0, keepdim=True)
    return (curved - centre) / spread.clamp_min(1e-7) * wanted_spread + wanted_centre
