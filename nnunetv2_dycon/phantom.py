"""A generated data set: a coarse diffusion-weighted brain with scattered bright lesions, from three scanners.

It replaces real data in the demo and in tests, and it is a semi-supervised task: by default the few labelled cases
all come from one scanner, unlabelled and test cases from all three. So the unlabelled images show something that the
labelled ones do not. It contains no patient data.

Axes: ``(C, X, Y, Z)`` is channel, left-right, back-front, bottom-top. Lengths are in voxels; the written spacing is
3 mm.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter
from tqdm import tqdm

from nnunetv2_dycon import __version__, parallel
from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.files import write_json

Shape = tuple[int, int, int]
Role = Literal["labeled", "unlabeled", "test"]

SHAPE: Shape = (48, 56, 40)
SPACING_MM = 3.0
CHANNELS = ("DWI", "ADC")
SHORTEST_AXIS = 16
OUTSIDE, CSF, GREY, WHITE = range(4)

logger = logging.getLogger(__name__)


class Scanner(NamedTuple):
    """The image properties of one virtual scanner; noise, bias and levels are fractions of full scale."""

    gain: float
    gain_sd: float
    gamma: float
    psf: tuple[float, float, float]
    noise: float
    bias: float
    white: float
    grey: float
    csf: float


SCANNERS = (
    Scanner(900, 120, 1.0, (0.35, 0.35, 0.5), 0.022, 0.10, white=0.42, grey=0.52, csf=0.10),
    Scanner(300, 60, 0.85, (0.55, 0.55, 0.9), 0.034, 0.18, white=0.46, grey=0.54, csf=0.16),
    Scanner(1800, 300, 1.2, (0.3, 0.3, 0.4), 0.028, 0.14, white=0.36, grey=0.50, csf=0.06),
)


class Difficulty(NamedTuple):
    """The differences between the normal and the hard task; volumes in voxels of the default shape."""

    volume: float
    volume_log_sd: float
    count: float
    contrast: tuple[float, float]
    contrast_small: tuple[float, float]
    susceptibility: tuple[float, float]
    noise: tuple[float, float] | None


NORMAL = Difficulty(520, 1.1, 3.5, (0.38, 0.90), (0.34, 0.75), (0.12, 0.38), None)
HARD = Difficulty(330, 1.3, 4.0, (0.22, 0.80), (0.22, 0.75), (0.12, 0.60), (0.03, 0.05))


class Anatomy(NamedTuple):
    """One posed head: coordinates in voxels from its centre, depth below its surface, tissue classes."""

    x: np.ndarray  # (3, X, Y, Z)
    brain: np.ndarray  # (X, Y, Z), bool
    depth: np.ndarray  # (X, Y, Z), voxels
    tissue: np.ndarray  # (X, Y, Z), OUTSIDE, CSF, GREY or WHITE

    @property
    def parenchyma(self) -> np.ndarray:
        """Grey and white matter, where lesions can be; (X, Y, Z), bool."""
        return self.tissue >= GREY


@dataclass(frozen=True)
class Phantom:
    """The checked settings of one generated data set, which decide every voxel of it.

    Parameters
    ----------
    cases, test : int
        Number of cases in all, and of test cases (the last ones).
    labeled : int
        Number of labelled cases, >= 2.
    labeled_scanner : int or "all"
        The scanner of all labelled cases, or "all" to take the scanners in turn.
    seed : int
        Case i depends only on ``seed + i``, not on the number of cases.
    channels : int
        1 (DWI) or 2 (DWI, ADC; white-matter spots can then be told from lesions).
    hard : bool
        Smaller, fainter lesions and more noise; not learnable in minutes.
    shape : tuple of int
        Voxels of each image; the head is scaled with it, the spacing stays at 3 mm.

    Raises
    ------
    ConfigError
        If a number is out of its range.
    """

    cases: int = 60
    labeled: int = 4
    labeled_scanner: int | Literal["all"] = 0
    test: int = 20
    seed: int = 1000
    channels: int = 1
    hard: bool = False
    shape: Shape = field(default=SHAPE)

    def __post_init__(self) -> None:
        _check_case(self.channels, self.shape)
        if self.labeled_scanner != "all" and self.labeled_scanner not in range(len(SCANNERS)):
            raise ConfigError(f"labeled_scanner is {self.labeled_scanner!r}: give 0, 1, 2 or all.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: give 0 or more.")
        if not 0 <= self.test < self.cases:
            raise ConfigError(f"test is {self.test}: give 0 to {self.cases - 1}, as there are {self.cases} cases.")
        if self.labeled < 2:
            raise ConfigError(f"labeled is {self.labeled}: give 2 or more.")

    def case_seed(self, index: int) -> int:
        """Return the seed of case `index`."""
        return self.seed + index

    def make(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image (C, X, Y, Z) and label (X, Y, Z) of case `index`; see `make_case`."""
        return make_case(
            self.case_seed(index),
            _scanner_of(index),
            channels=self.channels,
            hard=self.hard,
            shape=self.shape,
        )

    def roles(self) -> list[Role]:
        """Return the role of every case; each labelled case has a lesion.

        Raises
        ------
        ConfigError
            If too few cases have a lesion.
        """
        pool = self.cases - self.test
        order = np.random.default_rng(self.seed).permutation(pool).tolist()
        wanted = range(len(SCANNERS)) if self.labeled_scanner == "all" else [self.labeled_scanner]
        by_scanner = [[i for i in order if _scanner_of(i) == scanner] for scanner in wanted]
        in_turn = [i for turn in zip_longest(*by_scanner) for i in turn if i is not None]
        labeled: set[int] = set()
        for index in in_turn:
            if len(labeled) < self.labeled and self.make(index)[1].any():
                labeled.add(index)
        if len(labeled) < self.labeled:
            raise ConfigError(
                f"labeled is {self.labeled}, but of the {len(in_turn)} cases of scanner "
                f"{self.labeled_scanner} that are not for testing only {len(labeled)} have a lesion: "
                f"give {len(labeled)} or fewer."
            )
        return ["test" if i >= pool else "labeled" if i in labeled else "unlabeled" for i in range(self.cases)]


def make_case(
    seed: int, scanner: int, *, channels: int = 1, hard: bool = False, shape: Shape = SHAPE
) -> tuple[np.ndarray, np.ndarray]:
    """Return one image and its label; the same arguments give the same case.

    Parameters
    ----------
    seed : int
        Seed of the case's own random generator.
    scanner : int
        0, 1 or 2: intensity scale, contrast, blur, noise and bias field.
    channels : int
        1 (DWI) or 2 (DWI, ADC). The first channel does not depend on it.
    hard : bool
        Smaller, fainter lesions and more noise.
    shape : tuple of int
        Voxels (X, Y, Z), each 16 or more.

    Returns
    -------
    image : ndarray, shape (C, X, Y, Z), int16
        Zero outside the head (the brain and one voxel around it).
    label : ndarray, shape (X, Y, Z), uint8
        1 in lesions, 0 elsewhere. About 3 of 100 cases have none.

    Raises
    ------
    ConfigError
        If an argument is out of its range.
    """
    _check_case(channels, shape)
    if scanner not in range(len(SCANNERS)):
        raise ConfigError(f"scanner is {scanner!r}: give 0, 1 or 2.")
    rng, look, difficulty = np.random.default_rng(seed), SCANNERS[scanner], HARD if hard else NORMAL
    anatomy = _anatomy(rng, shape)
    clean = _tissue_signal(rng, anatomy.tissue, (look.csf, look.grey, look.white))
    lesions, label = _lesions(rng, anatomy, difficulty)
    spots = _white_matter_spots(rng, anatomy)
    distractors = spots + _grey_patches(rng, anatomy) + _susceptibility(rng, anatomy, difficulty)
    noise = look.noise if difficulty.noise is None else rng.uniform(*difficulty.noise)
    gain = max(rng.normal(look.gain, look.gain_sd), look.gain / 3)
    measure = partial(_acquire, rng, brain=anatomy.brain, psf=look.psf, noise=noise)
    image = [measure(clean + lesions + distractors, gamma=look.gamma, bias=look.bias, gain=gain)]
    if channels == 2:  # drawn last, so that the first channel does not depend on it
        water = _tissue_signal(rng, anatomy.tissue, (0.95, 0.42, 0.36)) - 0.55 * lesions + 0.8 * spots
        image.append(measure(water, gamma=1.0, bias=0.0, gain=1000.0))
    return np.stack(image), label


def write_phantom(
    dataset_id: int,
    *,
    cases: int = 60,
    labeled: int = 4,
    labeled_scanner: int | Literal["all"] = 0,
    test: int = 20,
    seed: int = 1000,
    channels: int = 1,
    hard: bool = False,
    shape: Shape = SHAPE,
    overwrite: bool = False,
    processes: int | None = None,
) -> Path:
    """Write the raw data set ``nnUNet_raw/DatasetXXX_Phantom`` of labelled, unlabelled and test cases; return it.

    Fold 0 of its `splits_final.json` trains on all labelled cases and validates on the same cases, since four cases
    are too few to spare one: this validation measures nothing, and scores come from the test cases. Labels of
    unlabelled cases are never written.

    Parameters
    ----------
    dataset_id : int
        1 to 999, and not the id of another data set in any of nnU-Net's three folders.
    cases, labeled, labeled_scanner, test, seed, channels, hard, shape
        See `Phantom`.
    overwrite : bool
        Replace a phantom of this id. Only a folder that this function wrote is replaced.
    processes : int, optional
        Worker processes; one per processor, at most 8, by default. The result does not depend on it.

    Raises
    ------
    ConfigError
        If a setting is out of its range.
    DataError
        If nnUNet_raw is not set or cannot be written, or the id is taken.
    """
    settings = Phantom(cases, labeled, labeled_scanner, test, seed, channels, hard, tuple(shape))
    folder = dataset.new_folder(dataset_id, "Phantom")
    dataset.check_free(folder, made_by=__name__, overwrite=overwrite)
    roles = settings.roles()
    with dataset.building(folder, stamp=repr(settings), made_by=__name__, overwrite=overwrite) as space:
        _write_cases(space.data, settings, roles, processes)
        _write_descriptions(space.data, settings, roles)
    stale = dataset.stale_preparation(folder)
    if stale is not None:
        logger.warning("%s is still made from the replaced phantom: delete it and plan again.", stale)
    return folder


def case_name(index: int) -> str:
    """Return the name of case `index`; three digits, since nnU-Net reads four at the end as a channel number."""
    return f"phantom_{index:03d}"


def _scanner_of(index: int) -> int:
    return index % len(SCANNERS)


def _check_case(channels: int, shape: Iterable[int]) -> None:
    if channels not in (1, 2):
        raise ConfigError(f"channels is {channels!r}: give 1 (DWI) or 2 (DWI and ADC).")
    shape = tuple(shape)
    if len(shape) != 3 or min(shape) < SHORTEST_AXIS:
        raise ConfigError(f"shape is {shape}: give three numbers of {SHORTEST_AXIS} or more.")


# ---- making a case ---------------------------------------------------------------------------------------


def _smooth_noise(rng: np.random.Generator, shape: Shape, sigma: float | tuple[float, ...]) -> np.ndarray:
    """Gaussian-filtered white noise of standard deviation 1; (X, Y, Z), float32."""
    smooth = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
    return smooth / smooth.std()


def _scale(shape: Shape) -> np.ndarray:
    """Size of the head against the default one, per axis; (3,)."""
    return np.array(shape) / np.array(SHAPE)


def _posed_coordinates(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Coordinates (3, X, Y, Z) of a head that is turned, shifted and slightly warped."""
    centre = (np.array(shape) - 1) / 2
    x = np.indices(shape, dtype=np.float32) - centre[:, None, None, None].astype(np.float32)
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.normal(0, 6, 3))):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        plane = np.eye(3)
        plane[i, i] = plane[j, j] = np.cos(angle)
        plane[i, j], plane[j, i] = -np.sin(angle), np.sin(angle)
        turn = plane @ turn
    shift = rng.normal(0, 1, 3)
    x = np.tensordot(turn, x - shift[:, None, None, None], axes=1)
    return x + 0.9 * np.stack([_smooth_noise(rng, shape, 6) for _ in range(3)])


def _ellipsoid(x: np.ndarray, centre: Iterable[float], radii: Iterable[float]) -> np.ndarray:
    """Mask (X, Y, Z) of an ellipsoid, from coordinates (3, X, Y, Z)."""
    return sum(((x[i] - c) / r) ** 2 for i, (c, r) in enumerate(zip(centre, radii, strict=True))) < 1


def _anatomy(rng: np.random.Generator, shape: Shape) -> Anatomy:
    x = _posed_coordinates(rng, shape)
    head = x / _scale(shape)[:, None, None, None]  # coordinates in voxels of the default shape
    radii = np.array([20.5, 25.0, 17.5]) * rng.uniform(0.92, 1.04, 3)
    brain = sum(np.abs(head[i] / radii[i]) ** p for i, p in enumerate((2.2, 2.0, 2.4))) < 1
    depth = distance_transform_edt(brain).astype(np.float32)
    folded = depth + 1.1 * _smooth_noise(rng, shape, 1.6)
    rim = 3.2 + 0.5 * _smooth_noise(rng, shape, 4)
    tissue = np.where(folded < 1.2, CSF, np.where(folded < rim, GREY, WHITE))
    tissue[(np.abs(head[0]) < 0.6) & (head[2] > 2)] = CSF
    half = np.stack([np.abs(head[0]), head[1], head[2]])  # both sides at once
    tissue[_ellipsoid(half, (4.2, -2.5, -1.5), (2.6, 4.0, 2.8))] = GREY  # thalamus
    tissue[_ellipsoid(half, (8.5, 2.5, -1.0), (2.0, 4.6, 3.2))] = GREY  # putamen
    v = rng.uniform(0.8, 1.5)
    half[0] -= 0.12 * np.abs(head[1])  # the ventricles widen towards both ends
    tissue[_ellipsoid(half, (3.0, -1.0, 2.0), (1.6 * v, 8.5 * np.sqrt(v), 2.6 * v))] = CSF
    tissue[~brain] = OUTSIDE
    return Anatomy(x, brain, depth, tissue.astype(np.uint8))


def _tissue_signal(rng: np.random.Generator, tissue: np.ndarray, levels: tuple[float, float, float]) -> np.ndarray:
    """Signal of CSF, grey and white matter with a mild texture; (X, Y, Z)."""
    table = np.concatenate([[0.0], np.array(levels) * rng.normal(1, 0.06, 3)]).astype(np.float32)
    return table[tissue] * (1 + 0.05 * _smooth_noise(rng, tissue.shape, 1.2))


def _lesions(rng: np.random.Generator, anatomy: Anatomy, difficulty: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    """Signal that all lesions add, float32, and their label, uint8; both (X, Y, Z)."""
    shape = anatomy.tissue.shape
    signal, label = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    if rng.random() < 0.03:
        return signal, label
    sizes = _lesion_sizes(rng, difficulty, float(np.prod(_scale(shape))))
    for centre, size in zip(_lesion_centres(rng, anatomy, len(sizes)), sizes, strict=True):
        one, mask = _lesion(rng, anatomy, centre, int(size), difficulty)
        np.maximum(signal, one, out=signal)
        label |= mask
    return signal, label


def _lesion_sizes(rng: np.random.Generator, difficulty: Difficulty, scale: float) -> np.ndarray:
    """Voxels of each lesion (N,), largest first: a log-normal total, shared by a heavy tail."""
    total = np.exp(rng.normal(np.log(difficulty.volume), difficulty.volume_log_sd)) * scale
    total = max(40.0, min(total, 5000 * scale))
    count = round(float(np.exp(rng.normal(np.log(difficulty.count), 0.8))))
    count = int(np.clip(count, 1, max(1, min(25, total / 12))))
    shares = np.sort(rng.pareto(1.1, count) + 0.15)[::-1]
    return np.maximum(1, np.round(total * shares / shares.sum())).astype(int)


def _lesion_centres(rng: np.random.Generator, anatomy: Anatomy, count: int) -> list[np.ndarray]:
    """Voxel (3,) of each lesion: the largest ones on up to four hubs, the others clustered around them."""
    deep = anatomy.parenchyma & (anatomy.depth > 1)
    hubs = []
    for _ in range(1 + min(int(rng.poisson(0.7)), 3)):
        side = anatomy.x[0] > 0 if rng.random() < 0.5 else anatomy.x[0] <= 0
        hubs.append(rng.choice(np.argwhere(deep & side)))
    reach = rng.uniform(5, 11)
    voxels = np.argwhere(anatomy.parenchyma)
    near_grey = 0.2 + gaussian_filter((anatomy.tissue == GREY).astype(np.float32), 1)[anatomy.parenchyma]
    centres = []
    for rank in range(count):
        hub = hubs[rng.integers(len(hubs))]
        if rank >= len(hubs):
            density = near_grey * np.exp(-((voxels - hub) ** 2).sum(1) / (2 * reach**2))
            hub = rng.choice(voxels, p=density / density.sum())
        centres.append(hub)
    return centres


def _lesion(
    rng: np.random.Generator, anatomy: Anatomy, centre: np.ndarray, size: int, difficulty: Difficulty
) -> tuple[np.ndarray, np.ndarray]:
    """Signal and label (X, Y, Z) of one ragged lesion of about `size` voxels around a voxel (3,)."""
    shape = anatomy.tissue.shape
    radius = (3 * size / (4 * np.pi)) ** (1 / 3)
    stretch = rng.uniform(0.65, 1.5, 3)
    stretch /= stretch.prod() ** (1 / 3)
    away = np.indices(shape, dtype=np.float32) - centre[:, None, None, None]
    score = np.sqrt(((away / (stretch * radius)[:, None, None, None]) ** 2).sum(0))
    score -= 0.35 * _smooth_noise(rng, shape, max(1.2, radius / 2.2))
    score[~anatomy.parenchyma] = np.inf
    nearest = np.argsort(score, axis=None, kind="stable")[:size]
    mask = np.zeros(shape, np.float32)
    mask.flat[nearest[score.flat[nearest] <= 2.2]] = 1
    profile = gaussian_filter(mask, rng.uniform(0.5, 0.95))
    contrast = rng.uniform(*(difficulty.contrast_small if size <= 20 else difficulty.contrast))
    cut = rng.uniform(0.42, 0.58)  # as if each lesion had another rater: its border is ambiguous
    halo = rng.uniform(0.03, 0.12) * contrast / 0.5 * gaussian_filter(mask, 2.0)
    label = mask > 0 if size < 8 else profile > cut
    return contrast * profile + halo, label.astype(np.uint8)


def _spot(shape: Shape, centre: np.ndarray, sigma: Iterable[float]) -> np.ndarray:
    """Gaussian bump of height 1 at a voxel; (X, Y, Z)."""
    axes = [np.exp(-((np.arange(n) - c) ** 2) / (2 * s**2)) for n, c, s in zip(shape, centre, sigma, strict=True)]
    return np.einsum("i,j,k->ijk", *axes)


def _white_matter_spots(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """Faint bright spots in white matter; (X, Y, Z)."""
    out, white = np.zeros(anatomy.tissue.shape), np.argwhere(anatomy.tissue == WHITE)
    for _ in range(rng.poisson(2.5) if len(white) else 0):
        out += rng.uniform(0.06, 0.15) * _spot(out.shape, rng.choice(white), [rng.uniform(1, 2)] * 3)
    return out


def _grey_patches(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """Faint bright patches in grey matter; (X, Y, Z)."""
    bright = np.maximum(_smooth_noise(rng, anatomy.tissue.shape, 3), 0) * rng.uniform(0.02, 0.07)
    return np.where(anatomy.tissue == GREY, bright, 0)


def _susceptibility(rng: np.random.Generator, anatomy: Anatomy, difficulty: Difficulty) -> np.ndarray:
    """Bright artefacts at the lower surface, as near air-filled bone; (X, Y, Z)."""
    low = anatomy.x[2] < -6 * _scale(anatomy.tissue.shape)[2]
    out, near = np.zeros(anatomy.tissue.shape), np.argwhere(anatomy.brain & (anatomy.depth < 3) & low)
    for _ in range(rng.poisson(1.5) if len(near) else 0):
        out += rng.uniform(*difficulty.susceptibility) * _spot(out.shape, rng.choice(near), (3, 2, 1.2))
    return out


def _acquire(
    rng: np.random.Generator,
    signal: np.ndarray,
    *,
    brain: np.ndarray,
    psf: tuple[float, float, float],
    noise: float,
    gamma: float,
    bias: float,
    gain: float,
) -> np.ndarray:
    """The scanner's image of a clean signal: blur, contrast curve, bias field, noise, gain; (X, Y, Z), int16."""
    seen = gaussian_filter(np.where(brain, np.maximum(signal, 0), 0), psf) ** gamma
    seen *= np.exp(bias * _smooth_noise(rng, brain.shape, (14, 14, 10)))
    sigma = noise * rng.uniform(0.7, 1.3)
    real, imaginary = rng.normal(0, sigma, (2, *brain.shape))
    magnitude = np.hypot(seen + real, imaginary) * gain  # Rician
    return np.round(np.where(binary_dilation(brain), magnitude, 0)).clip(0, 32767).astype(np.int16)


# ---- writing the data set --------------------------------------------------------------------------------


def _write_cases(folder: Path, settings: Phantom, roles: list[Role], processes: int | None) -> None:
    jobs = [partial(_write_case, folder, settings, index, role) for index, role in enumerate(roles)]
    for _ in tqdm(parallel.run(_do, jobs, processes), total=len(jobs), desc="phantom", unit="case"):
        pass


def _do(job: Callable[[], None]) -> None:
    job()


def _write_case(folder: Path, settings: Phantom, index: int, role: Role) -> None:
    image, label = settings.make(index)
    for channel, volume in enumerate(image):
        _save(volume, folder / dataset.IMAGES[role] / f"{case_name(index)}_{channel:04d}.nii.gz")
    if role in dataset.LABELS:
        _save(label, folder / dataset.LABELS[role] / f"{case_name(index)}.nii.gz")


def _save(volume: np.ndarray, path: Path) -> None:
    """Write a volume (X, Y, Z) as NIfTI."""
    nib.save(nib.Nifti1Image(volume, np.diag([SPACING_MM] * 3 + [1.0])), path)


def _write_descriptions(folder: Path, settings: Phantom, roles: list[Role]) -> None:
    labeled = [case_name(i) for i, role in enumerate(roles) if role == "labeled"]
    description = {
        "name": "Phantom",
        "description": "Generated images, no patient data. Fold 0 validates on its own training cases.",
        "licence": "CC0-1.0",  # nnU-Net's spelling
        "converted_by": f"nnunetv2_dycon {__version__}",
        "channel_names": {str(i): name for i, name in enumerate(CHANNELS[: settings.channels])},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(labeled),
        "file_ending": ".nii.gz",
    }
    conversion = {
        "converter": __name__,
        "version": __version__,
        "source": "generated by nnUNetv2_dycon phantom; no patient data",
        "settings": asdict(settings),
        "spacing_mm": SPACING_MM,
        "validation": "fold 0 validates on its own training cases: only the test cases measure anything",
        "cases": {
            case_name(i): {
                "role": role,
                "scanner": _scanner_of(i),
                "seed": settings.case_seed(i),
                "written": sorted(p.relative_to(folder).as_posix() for p in folder.glob(f"*/{case_name(i)}[._]*")),
            }
            for i, role in enumerate(roles)
        },
    }
    splits = [{"train": labeled, "val": labeled}]
    for name, content in zip(dataset.FILES, (description, splits, conversion), strict=True):
        write_json(folder / name, content)
