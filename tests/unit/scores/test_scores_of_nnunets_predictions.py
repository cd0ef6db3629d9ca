"""What nnU-Net predicted for an image is scored against the truth of that image, whatever their headers say."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name as reader_named

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.metrics import Structure, score_case
from nnunetv2_dycon.evaluation.scores import evaluate
from tests.collections import oblique
from tests.label_maps import label_map, write_dataset

HERE = oblique((0.5, 1.0, 2.5), (12.0, -7.0, 30.0), 0)
THERE = oblique((0.5, 1.0, 2.5), (-3.0, 4.0, 55.0), 10)
STRUCTURES = [Structure("1", "first", (1,)), Structure("2", "second", (2,))]


def put(folder: Path, ending: str, qform: int, sform: int, **header: object) -> tuple[Path, Path]:
    """Write a truth with that header, and what nnU-Net's reader of the ending predicts for it; returns the folders."""
    truth, predicted = folder / "truth", folder / "predicted"
    image = nib.Nifti1Image(label_map(1), None)
    image.set_qform(HERE, qform)
    image.set_sform(THERE, sform)
    for key, value in header.items():
        getattr(image.header, f"set_{key}")(value)
    truth.mkdir(exist_ok=True)
    nib.save(image, truth / f"a{ending}")
    predict(truth / f"a{ending}", predicted, "NibabelIO" if ending == ".nii" else "SimpleITKIO")
    return truth, predicted


def predict(image: Path, folder: Path, reader: str) -> None:
    """Write label map 2 in the way in which nnU-Net exports a prediction for an image."""
    folder.mkdir(exist_ok=True)
    io = reader_named(reader)()
    _, properties = io.read_images([str(image)])
    io.write_seg(label_map(2).T, str(folder / image.name), properties)


def check_scores(rows: list) -> None:
    expected = score_case(label_map(1).T, label_map(2).T, (2.5, 1, 0.5), STRUCTURES)
    for row, (other, _) in zip(rows, expected, strict=True):
        assert (row.dice, row.nsd) == (other.dice, other.nsd)
        assert row.hd95_mm == pytest.approx(other.hd95_mm)
        assert row.volume_pred_ml == pytest.approx(other.volume_pred_ml)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize(("qform", "sform"), [(1, 2), (1, 1), (2, 4), (0, 2), (1, 0)])
def test_predictions_of_nnunet_are_scored_where_sform_and_qform_differ(tmp_path, ending, qform, sform) -> None:
    write_dataset(tmp_path, ending=ending)
    check_scores(evaluate(*put(tmp_path, ending, qform, sform), processes=1))


def test_a_truth_without_any_place_is_scored(tmp_path) -> None:
    write_dataset(tmp_path)
    truth, predicted = put(tmp_path, ".nii.gz", 0, 0)
    assert evaluate(truth, predicted, processes=1)[0].dice == pytest.approx(
        score_case(label_map(1), label_map(2), (1, 1, 1), STRUCTURES)[0][0].dice
    )


def test_a_unit_that_nnunets_reader_passes_over_does_not_part_truth_and_prediction(tmp_path) -> None:
    """NibabelIO writes a prediction without the unit; distances are in mm nevertheless."""
    write_dataset(tmp_path, ending=".nii")
    truth, predicted = put(tmp_path, ".nii", 0, 0)
    image = nib.load(truth / "a.nii", mmap=False)
    for place in (image.set_qform, image.set_sform):
        place(np.diag([1000.0, 1000, 1000, 1]) @ HERE, 1)
    image.header.set_xyzt_units("micron")
    nib.save(image, truth / "a.nii")
    predict(truth / "a.nii", predicted, "NibabelIO")
    check_scores(evaluate(truth, predicted, processes=1))


def test_a_voxel_size_that_the_affine_does_not_have_does_not_part_them(tmp_path) -> None:
    """NibabelIO takes the spacing from pixdim and writes one that fits the affine."""
    write_dataset(tmp_path, ending=".nii")
    truth, predicted = put(tmp_path, ".nii", 0, 1)
    content = bytearray((truth / "a.nii").read_bytes())
    content[80:92] = np.array([0.5, 1, 2.4], np.float32).tobytes()
    (truth / "a.nii").write_bytes(content)
    predict(truth / "a.nii", predicted, "NibabelIO")
    rows = evaluate(truth, predicted, processes=1)
    expected = score_case(label_map(1).T, label_map(2).T, (2.4, 1, 0.5), STRUCTURES)
    assert rows[0].hd95_mm == pytest.approx(expected[0][0].hd95_mm)


@pytest.mark.parametrize("where", ["plans", "dataset"])
@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_the_reader_that_plans_or_dataset_json_name_is_used(tmp_path, where: str, reader: str) -> None:
    named = {"overwrite_image_reader_writer": reader} if where == "dataset" else {}
    write_dataset(tmp_path, **named)
    truth, predicted = put(tmp_path, ".nii.gz", 1, 2)
    predict(truth / "a.nii.gz", predicted, reader)
    if where == "plans":
        (predicted / "plans.json").write_text(json.dumps({"image_reader_writer": reader}))
    rows = evaluate(truth, predicted, processes=1)
    if reader.endswith("Reorient"):  # they predict in other axes than those of the file
        assert 0 < rows[0].dice < 1
    else:
        check_scores(rows)


def test_a_prediction_by_another_reader_is_refused_with_the_line_that_names_it(tmp_path) -> None:
    path = write_dataset(tmp_path)
    truth, predicted = put(tmp_path, ".nii.gz", 1, 2)
    predict(truth / "a.nii.gz", predicted, "NibabelIO")
    with pytest.raises(DataError, match=r'add "overwrite_image_reader_writer": "NibabelIO" to dataset\.json') as caught:
        evaluate(truth, predicted, processes=1)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overwrite_image_reader_writer": "NibabelIO"}))
    check_scores(evaluate(truth, predicted, processes=1))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("slope", [0.1, 0.5, 0.01])
def test_whole_numbers_that_are_stored_with_a_scale_are_labels(tmp_path, ending: str, slope: float) -> None:
    write_dataset(tmp_path, ending=ending)
    truth, predicted = put(tmp_path, ending, 1, 1)
    for folder, seed in ((truth, 1), (predicted, 2)):
        image = nib.load(folder / f"a{ending}")
        scaled = nib.Nifti1Image(np.rint(label_map(seed) / slope).astype(np.int16), None, image.header)
        scaled.header.set_data_dtype(np.int16)
        scaled.header.set_slope_inter(slope, 0)
        nib.save(scaled, folder / f"a{ending}")
    check_scores(evaluate(truth, predicted, processes=1))


def test_a_number_next_to_a_whole_one_is_said_with_all_digits(tmp_path) -> None:
    """nnU-Net would cut it down to the label below."""
    write_dataset(tmp_path)
    truth, predicted = put(tmp_path, ".nii.gz", 1, 1)
    image = nib.load(predicted / "a.nii.gz")
    values = np.asarray(image.dataobj).astype(np.float32)
    values[values == 2] = np.nextafter(np.float32(2), np.float32(0))
    nib.save(nib.Nifti1Image(values, image.affine), predicted / "a.nii.gz")
    with pytest.raises(DataError, match=r"holds 1\.9999999, so probabilities or intensities"):
        evaluate(truth, predicted, processes=1)


def test_hidden_files_are_no_cases(tmp_path) -> None:
    write_dataset(tmp_path)
    truth, predicted = put(tmp_path, ".nii.gz", 1, 1)
    for folder in (truth, predicted):
        (folder / "._a.nii.gz").write_bytes(b"\0\5\26\7")
    check_scores(evaluate(truth, predicted, processes=1))
