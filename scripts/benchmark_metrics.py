"""Time and memory of `nnUNetv2_dycon evaluate` against MedPy, MONAI and nnU-Net's evaluation, on generated shapes.

Cost: about five minutes on one core, nearly all of it MedPy, and 2 GB of memory; it leaves nothing behind. The rows of
MedPy and MONAI need these packages: pip install medpy monai. Times are CPU seconds, medians after a warm-up (MedPy at
the large size runs once); whole commands are timed by the clock. The exit code is 1 if a bar is missed.

    OMP_NUM_THREADS=1 python scripts/benchmark_metrics.py
"""

import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from nnunetv2_dycon.evaluation.label_files import read_label_map, read_labels
from nnunetv2_dycon.evaluation.metrics import ScoreSettings, Structure, score_case

CT, CT_SPACING = (128, 512, 512), (2.5, 0.8, 0.8)
LA, LA_SPACING = (112, 112, 80), (0.625, 0.625, 0.625)
ORGANS = 13
NOISE = 160


def ellipsoid(shape: tuple[int, ...], center: tuple[float, ...], radii: tuple[float, ...]) -> NDArray[np.bool_]:
    """Return the mask of an ellipsoid with a wavy surface.

    Parameters
    ----------
    shape : tuple of int
        Of the mask.
    center, radii : tuple of float
        In voxels.
    """
    axes = [((np.arange(n) - c) / r).astype(np.float32) for n, c, r in zip(shape, center, radii, strict=True)]
    x, y, z = np.ix_(*axes)
    return x**2 + y**2 + z**2 <= 1 + 0.1 * np.sin(6 * x) * np.sin(5 * y) * np.cos(4 * z)


def pair(
    shape: tuple[int, ...], center: tuple[float, ...], radii: tuple[float, ...], blob: bool
) -> tuple[NDArray, NDArray]:
    """Return a truth and a prediction that is displaced by 1.5 voxels and 5 % larger.

    Parameters
    ----------
    shape, center, radii
        See `ellipsoid`.
    blob : bool
        Add a false positive in the far corner to the prediction.
    """
    truth = ellipsoid(shape, center, radii).astype(np.uint8)
    moved, larger = tuple(c + 1.5 for c in center), tuple(1.05 * r for r in radii)
    prediction = ellipsoid(shape, moved, larger).astype(np.uint8)
    if blob:
        prediction[-5:, -6:, -6:] = 1
    return truth, prediction


def organs() -> tuple[NDArray, NDArray]:
    """Return label maps of truth and prediction with thirteen organs of several sizes in one CT."""
    rng = np.random.default_rng(0)
    maps = np.zeros((2, *CT), np.uint8)
    for organ in range(ORGANS):
        row, at = divmod(organ, 5)
        center = (64 + rng.integers(-20, 20), 100 + 150 * row, 60 + 98 * at)
        radii = tuple(float(r) for r in np.array((14, 30, 28)) * rng.uniform(0.5, 1.5))
        for labels, mask in zip(maps, pair(CT, center, radii, blob=False), strict=True):
            labels[mask > 0] = organ + 1
    return maps[0], maps[1]


def seconds(work: Callable[[], object], repeats: int = 5, *, warm: bool = True) -> float:
    """Return the median CPU seconds of some work.

    Parameters
    ----------
    work : callable
        Without arguments.
    repeats : int
        Number of measurements.
    warm : bool
        Call `work` once before.
    """
    if warm:
        work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def ours(
    truth: NDArray, prediction: NDArray, spacing: tuple[float, ...], classes: range = range(1, 2)
) -> Callable[[], object]:
    """Return a call of our `score_case`, for all metrics of the given classes.

    Parameters
    ----------
    truth, prediction : array of integers, shape (Z, Y, X)
        Label maps.
    spacing : tuple of float
        Voxel size in mm.
    classes : range
        Labels to score.
    """
    structures = [Structure(str(value), "", (value,)) for value in classes]
    return lambda: score_case(truth, prediction, spacing, structures, settings=ScoreSettings())


def medpys(truth: NDArray, prediction: NDArray, spacing: tuple[float, ...]) -> Callable[[], object]:
    """Return a call of MedPy for Dice, IoU, HD95, ASD and ASSD (it does not have NSD); arguments as in `ours`."""
    binary = importlib.import_module("medpy.metric.binary")
    measures = (binary.hd95, binary.asd, binary.assd)
    return lambda: (
        binary.dc(prediction, truth),
        binary.jc(prediction, truth),
        *(measure(prediction, truth, spacing) for measure in measures),
    )


def monais(truth: NDArray, prediction: NDArray, spacing: tuple[float, ...]) -> Callable[[], object]:
    """Return a call of MONAI for Dice, IoU, HD95, ASD, ASSD and NSD; arguments as in `ours`."""
    warnings.simplefilter("ignore", FutureWarning)  # MONAI calls its own deprecated functions
    metrics, torch = importlib.import_module("monai.metrics"), importlib.import_module("torch")
    torch.set_num_threads(1)
    p, t = (torch.from_numpy(mask)[None, None] for mask in (prediction, truth))

    def work() -> None:
        metrics.compute_dice(p, t)
        metrics.compute_iou(p, t)
        metrics.compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=spacing)
        for symmetric in (False, True):
            metrics.compute_average_surface_distance(
                p, t, include_background=True, symmetric=symmetric, spacing=spacing
            )
        metrics.compute_surface_dice(p, t, class_thresholds=[2.0], include_background=True, spacing=spacing)

    return work


def write_folders(root: Path, cases: int, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """Write truth and predictions, dataset.json, and the part of plans.json that nnU-Net's evaluation reads.

    Parameters
    ----------
    root : Path
        Folder to write into.
    cases : int
        Number of cases.
    shape, spacing
        Of each case, in voxels and mm.
    """
    for number in range(cases):
        center = tuple(n / 2 + number % 5 for n in shape)
        masks = pair(shape, center, tuple(n / 3.5 for n in shape), blob=number % 4 == 0)
        for folder, mask in zip(("truth", "predicted"), masks, strict=True):
            (root / folder).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(mask, np.diag([*spacing, 1]))
            nib.save(image, root / folder / f"case_{number:02d}.nii.gz")
    labels = {"background": 0, "structure": 1}
    dataset = {"labels": labels, "file_ending": ".nii.gz", "channel_names": {"0": "MRI"}}
    (root / "dataset.json").write_text(json.dumps(dataset))
    (root / "plans.json").write_text(json.dumps({"label_manager": "LabelManager"}))


def command_seconds(name: str, *arguments: str | Path) -> float:
    """Return the median seconds of a whole command, by the clock."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([Path(sys.executable).with_name(name), *map(str, arguments)], check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def peak_bytes(root: Path) -> int:
    """Return the additional memory of reading and scoring one case, in a process that has scored a small one."""
    labels = read_labels(root / "dataset.json", root / "truth")
    small = pair((20, 20, 20), (10, 10, 10), (5, 5, 5), blob=False)
    ours(*small, (1, 1, 1))()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak; Linux only
    before = peak_now()
    truth, prediction = (
        read_label_map(root / folder / "case_00.nii.gz", labels, truth=folder == "truth")
        for folder in ("truth", "predicted")
    )
    score_case(truth.labels, prediction.labels, truth.spacing, labels.structures)
    return peak_now() - before


def peak_now() -> int:
    """Return the largest resident size of this process since the last reset, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


class Bars:
    """Prints each result with its bar, and remembers whether all were met."""

    met = True

    def add(self, name: str, value: float, bar: float, *, least: bool, note: str = "") -> None:
        """Print one row.

        Parameters
        ----------
        name : str
            Of the row.
        value, bar : float
            The result and its bar.
        least : bool
            The bar is a lower one.
        note : str
            Printed after the bar.
        """
        good = value >= bar if least else value <= bar
        self.met &= good
        sign = ">=" if least else "<="
        print(f"{'ok  ' if good else 'MISS'}  {name:<66} {value:8.2f} {sign} {bar:<6g} {note}", flush=True)


def against_others(bars: Bars) -> None:
    """Compare with the same metrics of other packages."""
    sizes = {
        "CT 128x512x512, 0.2 M voxels": (CT, CT_SPACING, (60, 200, 250), (14, 60, 60), 100, 1),
        "CT 128x512x512, 2.8 M voxels": (CT, CT_SPACING, (60, 250, 220), (40, 130, 130), 100, 1),
        "LA 112x112x80": (LA, LA_SPACING, (56, 56, 40), (30, 26, 22), 10, 3),
    }
    for name, (shape, spacing, center, radii, bar, repeats) in sizes.items():
        for blob in (False, True):
            masks = pair(shape, center, radii, blob)
            own, label = seconds(ours(*masks, spacing)), f"{name}{', stray blob' if blob else ''}"
            for package, other, least in (("MedPy", medpys, bar), ("MONAI", monais, 3)):
                try:
                    work = other(*masks, spacing)
                except ImportError as error:
                    print(f"skip  {label}: {package} ({error})")
                    continue
                slow = package == "MedPy" and repeats == 1
                theirs = seconds(work, repeats=repeats, warm=not slow)
                note = f"({own:.3f} s, {package} {theirs:.2f} s)"
                bars.add(f"{label}: times {package}", theirs / own, least, least=True, note=note)


def against_noise(bars: Bars) -> None:
    """Compare with MedPy on masks that are surface everywhere, and on such a mask with a smooth or a sparse one."""
    rng = np.random.default_rng(0)
    noise, other, sparse = (rng.random((NOISE,) * 3) < share for share in (0.5, 0.5, 0.001))
    ball = ellipsoid((NOISE,) * 3, (NOISE / 2,) * 3, (NOISE / 4,) * 3)
    for name, truth in {"noise": other, "a ball": ball, "sparse voxels": sparse}.items():
        masks = truth.view(np.uint8), noise.view(np.uint8)
        own = seconds(ours(*masks, CT_SPACING), repeats=3)
        try:
            theirs = seconds(medpys(*masks, CT_SPACING), repeats=1, warm=False)
        except ImportError as error:
            print(f"skip  noise: MedPy ({error})")
            return
        note = f"({own:.2f} s, MedPy {theirs:.2f} s)"
        bars.add(f"noise of {NOISE}^3 against {name}: times MedPy", theirs / own, 1, least=True, note=note)


def noise_bytes() -> int:
    """Return the additional memory of scoring noise against noise, in a process that has scored a small case."""
    rng = np.random.default_rng(0)
    truth, prediction = ((rng.random((NOISE,) * 3) < 0.5).view(np.uint8) for _ in range(2))
    ours(*pair((20, 20, 20), (10, 10, 10), (5, 5, 5), blob=False), (1, 1, 1))()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_now()
    ours(truth, prediction, (1, 1, 1))()
    return peak_now() - before


def against_classes(bars: Bars) -> None:
    """Compare a CT with thirteen organs, scored for all of them, with one organ."""
    truth, prediction = organs()
    everything = seconds(ours(truth, prediction, CT_SPACING, range(1, ORGANS + 1)))
    organ = range(1, ORGANS + 1)
    one = statistics.median(seconds(ours(truth, prediction, CT_SPACING, range(v, v + 1)), repeats=3) for v in organ)
    alone = statistics.median(
        seconds(ours((truth == v).view(np.uint8), (prediction == v).view(np.uint8), CT_SPACING), repeats=3)
        for v in organ
    )
    note = f"({everything:.3f} s, {one:.3f} s for one; {alone:.3f} s without the others in the label maps)"
    bars.add("CT, 13 classes: times one class of these label maps", everything / one, 4, least=False, note=note)


def main() -> int:
    """Print all results; return 1 if a bar is missed."""
    bars = Bars()
    against_others(bars)
    against_noise(bars)
    against_classes(bars)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(noise_bytes)
    bars.add(f"noise of {NOISE}^3, peak memory: MB", peak / 2**20, 400, least=False)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folders(root / "la", 20, LA, LA_SPACING)
        gt, pred, dataset = (root / "la" / name for name in ("truth", "predicted", "dataset.json"))
        common = (gt, pred, "-djfile", dataset, "-o")
        taken = command_seconds("nnUNetv2_dycon", "evaluate", *common, root / "out", "-np", "2")
        bars.add("20 LA-sized cases, whole command, 2 processes: seconds", taken, 20, least=False)
        for processes in ("1", "2"):
            options = ("-np", processes, "--disable_distances")
            dice = command_seconds("nnUNetv2_dycon", "evaluate", *common, root / "out", *options)
            plans = ("-pfile", root / "la" / "plans.json", "-np", processes)
            stock = command_seconds("nnUNetv2_evaluate_folder", *common, root / "stock.json", *plans)
            name = f"the same, Dice alone, -np {processes}: times nnUNetv2_evaluate_folder"
            bars.add(name, dice / stock, 1, least=False, note=f"({dice:.2f} s, {stock:.2f} s)")

        write_folders(root / "ct", 1, CT, CT_SPACING)  # with a blob: the prediction's box is most of the image
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_bytes, (root / "ct",))
        note = f"({peak / 2**20:.0f} MB)"
        name = "CT with a stray blob, peak memory: label volumes of one byte per voxel"
        bars.add(name, peak / np.prod(CT), 4, least=False, note=note)
    return 0 if bars.met else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
