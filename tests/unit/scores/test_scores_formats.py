"""Label maps of every format, unit and orientation are scored alike."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.metrics import DISTANCES, Structure, score_case
from nnunetv2_dycon.evaluation.scores import evaluate
from tests.label_maps import (
    SHAPE,
    as_4d,
    as_floats,
    as_itk,
    as_nifti,
    as_picture,
    as_tif,
    label_map,
    write,
    write_dataset,
)


@pytest.mark.parametrize(
    ("ending", "writer"),
    [
        (".nii", as_nifti),
        (".nii.gz", as_nifti),
        (".nii.gz", as_floats),
        (".nii.gz", as_4d),
        (".nrrd", as_itk),
        (".mha", as_itk),
        (".gipl", as_itk),
        (".tif", as_tif),
        (".tiff", as_tif),
    ],
)
def test_every_format_gives_the_same_scores(
    tmp_path: Path, ending: str, writer: Callable[[Path, np.ndarray], None]
) -> None:
    dataset = write_dataset(tmp_path, ending=ending)
    for folder, seed in (("truth", 1), ("prediction", 2)):
        (tmp_path / folder).mkdir()
        writer(tmp_path / folder / f"a{ending}", label_map(seed))
    rows = evaluate(tmp_path / "truth", tmp_path / "prediction", dataset, processes=1)
    structures = [Structure("1", "first", (1,)), Structure("2", "second", (2,))]
    expected = score_case(label_map(1), label_map(2), (0.5, 1, 2.5), structures, case="a")
    for row, (other, _) in zip(rows, expected, strict=True):
        for metric in (*DISTANCES, "dice", "nsd", "volume_pred_ml", "diagonal_mm"):
            assert getattr(row, metric) == pytest.approx(getattr(other, metric), abs=1e-5), metric


@pytest.mark.parametrize(
    ("ending", "writer", "spacing"),
    [
        (".png", as_picture, (1, 1)),
        (".bmp", as_picture, (1, 1)),
        (".tif", as_picture, (1, 1)),
        (".mha", as_itk, (0.5, 1)),
        (".nii.gz", as_nifti, (0.5, 1)),
    ],
)
def test_2d_images_are_scored_in_2d(
    tmp_path: Path, ending: str, writer: Callable[[Path, np.ndarray], None], spacing: tuple[float, float]
) -> None:
    dataset = write_dataset(tmp_path, ending=ending)
    images = [label_map(seed)[:, :, 4] for seed in (1, 2)]
    for folder, image in zip(("truth", "prediction"), images, strict=True):
        (tmp_path / folder).mkdir()
        writer(tmp_path / folder / f"a{ending}", image)
    row = evaluate(tmp_path / "truth", tmp_path / "prediction", dataset, processes=1)[0]
    ((expected, _),) = score_case(*images, spacing, [Structure("1", "first", (1,))], case="a")
    for metric in (*DISTANCES, "dice", "nsd", "diagonal_mm"):
        assert getattr(row, metric) == pytest.approx(getattr(expected, metric)), metric
    assert row.volume_truth_ml is None


def test_spacing_goes_with_its_axis(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, {"background": 0, "point": 1})
    for folder, at in (("truth", (1, 1, 1)), ("prediction", (1, 1, 4))):
        labels = np.zeros(SHAPE, np.uint8)
        labels[at] = 1
        write(tmp_path / folder / "a.nii.gz", labels)
    assert evaluate(tmp_path / "truth", tmp_path / "prediction", dataset, processes=1)[0].hd95_mm == 7.5


@pytest.mark.parametrize(("unit", "scale"), [("micron", 1000.0), ("meter", 0.001), ("mm", 1.0), ("unknown", 1.0)])
def test_distances_and_volumes_are_in_mm_and_ml_whatever_unit_a_file_has(
    folders: tuple[Path, Path], tmp_path: Path, unit: str, scale: float
) -> None:
    """SimpleITK converts, and an image that nnU-Net wrote by it has the same geometry as the one that it read."""
    truth, prediction = folders
    expected = evaluate(truth, prediction, processes=1)
    image = nib.load(truth / "a.nii.gz")
    affine = np.diag([*(scale,) * 3, 1.0]) @ image.affine
    other = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    other.header.set_xyzt_units(unit)
    nib.save(other, truth / "a.nii.gz")
    assert sitk.ReadImage(str(truth / "a.nii.gz")).GetSpacing() == pytest.approx(tuple(image.header.get_zooms()))
    assert [row.hd95_mm for row in evaluate(truth, prediction, processes=1)] == pytest.approx(
        [row.hd95_mm for row in expected]
    )


def test_a_reader_that_reorients_may_compare_other_orientations(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    before = evaluate(truth, prediction, processes=1)
    for path in prediction.glob("*.nii.gz"):
        nib.save(nib.as_closest_canonical(nib.load(path)), path)
    with pytest.raises(DataError, match="direction"):
        evaluate(truth, prediction, processes=1)
    write_dataset(truth.parent, overwrite_image_reader_writer="NibabelIOWithReorient")
    after = evaluate(truth, prediction, processes=1)
    for one, other in zip(before, after, strict=True):
        assert one.hd95_mm == pytest.approx(other.hd95_mm)
        assert one.dice == other.dice
