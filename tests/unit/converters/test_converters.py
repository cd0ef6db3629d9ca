"""Every layout of every collection, written by its converter and read back by another reader."""

import hashlib
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from tests import collections
from tests.collections import Truth
from tests.converting import (
    FOLDERS,
    FORMS,
    LABEL_FILES,
    Form,
    find,
    lay_out,
    pancreas,
    read,
    refused,
    run,
    tree,
)

# ---- whole collections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_every_layout_becomes_the_same_kind_of_tree_voxel_for_voxel(raw, source, name) -> None:
    form = FORMS[name]
    truth = lay_out(name, source)
    report = run(form, source, dataset_id=700)
    assert report.state == "written"
    folder = raw / f"Dataset700_{form.collection}"
    assert (report.folder, list(raw.iterdir())) == (folder, [folder])
    expected = {"dataset.json", "splits_final.json", "conversion.json"}
    for role, cases in form.names.items():
        for case in cases:
            expected |= {f"images{FOLDERS[role]}/{case}_{c:04d}{form.ending}" for c in range(len(form.keep))}
            expected |= set() if role == "unlabeled" else {f"labels{FOLDERS[role]}/{case}{form.ending}"}
    assert set(tree(folder)) == expected
    for role, cases in form.names.items():
        for case in cases:
            _check_case(folder, form, FOLDERS[role], case, truth[case], labeled=role != "unlabeled")
    _check_json(folder, form)


def _check_case(folder: Path, form: Form, part: str, case: str, truth: Truth, *, labeled: bool) -> None:
    for channel, index in enumerate(form.keep):
        array, affine = read(folder / f"images{part}" / f"{case}_{channel:04d}{form.ending}")
        assert array.dtype.kind == truth.images[index].dtype.kind
        assert np.array_equal(array, truth.images[index])
        assert np.allclose(affine, truth.affine, rtol=0, atol=1e-4)
    if labeled:
        array, affine = read(folder / f"labels{part}" / f"{case}{form.ending}")
        expected = truth.label
        if form.relabel:
            expected = np.vectorize(lambda value: form.relabel.get(value, 0))(truth.label)
        assert array.dtype == np.uint8
        assert np.array_equal(array, expected)
        first = nib.load(folder / f"images{part}" / f"{case}_0000{form.ending}")
        written = nib.load(folder / f"labels{part}" / f"{case}{form.ending}")
        assert np.array_equal(first.affine, written.affine)  # not even rounding is between them


def _check_json(folder: Path, form: Form) -> None:
    names = form.names
    content = json.loads((folder / "dataset.json").read_text())
    assert content["numTraining"] == len(names["labeled"]) + len(names["validation"])
    assert content["file_ending"] == form.ending
    assert list(content["channel_names"]) == [str(c) for c in range(len(form.keep))]
    assert sorted(content["labels"].values()) == list(range(len(content["labels"])))
    assert content["licence"]
    assert content["reference"]
    conversion = json.loads((folder / "conversion.json").read_text())
    assert {case: entry["role"] for case, entry in conversion["cases"].items()} == {
        case: role for role, cases in names.items() for case in cases
    }
    assert all("label_voxels" in entry for entry in conversion["cases"].values() if entry["role"] != "unlabeled")
    assert str(folder.parents[2]) not in (folder / "conversion.json").read_text()
    for fold in json.loads((folder / "splits_final.json").read_text()):
        assert set(fold) == {"train", "val"}
        if names["validation"]:
            assert (fold["train"], fold["val"]) == (sorted(names["labeled"]), sorted(names["validation"]))
        else:
            assert sorted(fold["train"] + fold["val"]) == sorted(names["labeled"])


def test_channel_names_give_the_normalisation_that_is_meant(raw, source) -> None:
    kinds = {
        "isles-adc": ["DWI", "ADC"],
        "brats-doubled-mixed-all-multi": ["T1", "T1ce", "T2", "FLAIR"],
        "la-nrrd": ["LGE"],
        "pancreas-nifti": ["CT"],
        "btcv-msd": ["CT"],
    }
    for number, (name, channels) in enumerate(kinds.items(), 700):
        lay_out(name, source / name)
        report = run(FORMS[name], source / name, dataset_id=number)
        content = json.loads((report.folder / "dataset.json").read_text())
        assert list(content["channel_names"].values()) == channels


def test_labels_of_btcv_are_in_the_published_order(raw, source) -> None:
    lay_out("btcv-raw", source)
    report = run(FORMS["btcv-raw"], source)
    labels = json.loads((report.folder / "dataset.json").read_text())["labels"]
    words = "background spleen right_kidney left_kidney gallbladder esophagus liver stomach aorta inferior_vena_cava"
    assert list(labels)[:10] == words.split()
    assert [labels[n] for n in ("pancreas", "right_adrenal_gland", "left_adrenal_gland")] == [11, 12, 13]
    voxels = json.loads((report.folder / "conversion.json").read_text())["cases"]
    assert "4" not in voxels["img0034"]["label_voxels"]
    assert "4" in voxels["img0002"]["label_voxels"]


def test_nifti_images_are_the_very_bytes_of_the_download(raw, source) -> None:
    for number, name in enumerate(("isles-archive", "brats-flat-nii", "pancreas-nifti", "btcv-raw"), 700):
        lay_out(name, source / name)
        files = {hashlib.sha256(p.read_bytes()).hexdigest() for p in (source / name).rglob("*") if p.is_file()}
        folder = run(FORMS[name], source / name, dataset_id=number).folder
        assert {h for path, h in tree(folder).items() if path.startswith("images")} <= files


def test_a_lesion_free_case_has_an_empty_label_whether_its_mask_is_there_or_not(raw, source) -> None:
    form = FORMS["isles-archive"]
    lay_out("isles-archive", source)
    report = run(form, source, labeled="all")
    for case in ("0150", "0151"):
        assert not read(report.folder / "labelsTr" / f"sub-strokecase{case}.nii.gz")[0].any()
    said = [note for note in report.notes if "known to have no lesion" in note]
    assert [note.split(":")[0] for note in said] == ["sub-strokecase0151", "sub-strokecase0170"]


def test_a_case_whose_mask_is_missing_is_left_out_and_named(raw, source) -> None:
    form = FORMS["isles-archive"]
    lay_out("isles-archive", source)
    find(source, "**/sub-strokecase0004*_msk.nii.gz").unlink()
    report = run(form, source)
    assert any("labelled, 19" in note and "missing" in note for note in report.notes)
    assert not list(report.folder.rglob("*0004*"))


def test_flair_comes_onto_the_grid_of_the_dwi_with_a_warning(raw, source) -> None:
    form = FORMS["isles-archive"]
    lay_out("isles-archive", source)
    report = run(form, source, modalities=("dwi", "adc", "flair"))
    assert any("not registered" in note for note in report.notes)
    assert "not registered" in json.loads((report.folder / "dataset.json").read_text())["description"]
    for case in ("0003", "0248"):
        part = "imagesTr" if case == "0003" else "imagesUn"
        dwi, flair = (report.folder / part / f"sub-strokecase{case}_{c:04d}.nii.gz" for c in (0, 2))
        original = find(source, f"**/sub-strokecase{case}*_FLAIR.nii.gz")
        grid, moving = sitk.ReadImage(str(dwi)), sitk.ReadImage(str(original), sitk.sitkFloat32)
        expected = sitk.GetArrayFromImage(sitk.Resample(moving, grid, sitk.Transform(), sitk.sitkLinear, 0.0)).T
        found, affine = read(flair)
        assert np.allclose(affine, read(dwi)[1], rtol=0, atol=1e-4)
        inside = expected > 0  # at the border the two differ in how far half a voxel reaches
        assert inside.mean() > 0.3
        assert np.median(np.abs(found - expected)[inside]) < 1e-2


@pytest.mark.parametrize(("modalities", "word"), [(("adc", "dwi"), "dwi first"), (("dwi", "dwi"), "dwi first")])
def test_wrong_modalities_are_refused(raw, source, modalities, word) -> None:
    lay_out("isles-kit", source)
    refused(raw, FORMS["isles-kit"], source, word, modalities=modalities)
    lay_out("brats-flat-nii", source)
    refused(raw, FORMS["brats-flat-nii"], source, "at most once", modalities=("t1", "t1"))
    refused(raw, FORMS["brats-flat-nii"], source, "whole or multi", labels="both")


def test_t1_is_never_taken_for_t1ce(raw, source) -> None:
    form = FORMS["brats-grades"]._replace(options={"modalities": ("t1ce", "t1")}, keep=(1, 0))
    truth = form.make(source)
    folder = run(form, source).folder
    case = form.roles["test"][0]
    assert np.array_equal(read(folder / "imagesTs" / f"{case}_0000.nii.gz")[0], truth[case].images[1])
    assert np.array_equal(read(folder / "imagesTs" / f"{case}_0001.nii.gz")[0], truth[case].images[0])
    find(source, f"**/{case}_t1.nii.gz").unlink()
    refused(raw, form, source, f"has no {case}_t1.nii", dataset_id=701)


def test_names_of_later_years_are_taken_and_said_once(raw, source) -> None:
    lay_out("brats-doubled-mixed-all-multi", source)
    report = run(FORMS["brats-doubled-mixed-all-multi"], source)
    said = [note for note in report.notes if "taken for" in note]
    assert [note.split()[-1] for note in said] == ["t1", "t1ce", "t2", "flair", "seg"]
    assert "_t1Gd.nii" in said[1]
    for path in list(source.rglob("*_flair.nii*")):
        path.rename(path.with_name(path.name.replace("_flair", "-t2f")))
    report = run(FORMS["brats-grades"], source, dataset_id=700)
    assert len([note for note in report.notes if "t2f" in note]) == 1
    assert any("was taken for flair, like 6 others" in note for note in report.notes)


def test_a_mask_under_a_foreign_name_is_found_and_said(raw, source) -> None:
    form = FORMS["brats-grades"]
    lay_out("brats-grades", source)
    mask = find(source, "**/BraTS19_TCIA02_309_1_seg.nii.gz")
    mask.rename(mask.with_name("W39_1998.09.19_Segm.nii.gz"))
    report = run(form, source)
    assert any("W39_1998.09.19_Segm.nii.gz was taken for the mask of BraTS19_TCIA02_309_1" in n for n in report.notes)
    assert (report.folder / "labelsTs" / "BraTS19_TCIA02_309_1.nii.gz").is_file()


def test_the_crop_of_the_h5_forms_is_named_in_the_log_and_in_dataset_json(raw, source) -> None:
    for number, name in enumerate(("la-h5", "pancreas-mcnet"), 700):
        lay_out(name, source / name)
        report = run(FORMS[name], source / name, dataset_id=number)
        assert any("cropped around the ground truth" in note for note in report.notes)
        assert "not comparable" in json.loads((report.folder / "dataset.json").read_text())["description"]
    lay_out("la-nrrd", source / "whole")
    report = run(FORMS["la-nrrd"], source / "whole", dataset_id=710)
    assert not any("crop" in note for note in report.notes)
    assert any("not in the protocol, left out (1): ZZZZ" in note for note in report.notes)


def test_a_label_whose_header_is_wrong_is_turned_and_that_is_said(raw, source) -> None:
    form = pancreas(lambda r: collections.pancreas_dicom(r, wrong_header=("0002",)))
    truth = form.make(source)
    report = run(form, source)
    assert [n for n in report.notes if "turned" in n] == [
        "PANCREAS_0002: the label's position does not fit the CT; placed axes y turned, which does"
    ]
    assert np.array_equal(read(report.folder / "labelsTr" / "PANCREAS_0002.nii.gz")[0], truth["PANCREAS_0002"].label)


def test_withdrawn_scans_are_left_out_unless_they_are_wanted(raw, source) -> None:
    form = FORMS["pancreas-nifti"]
    lay_out("pancreas-nifti", source)
    for number, options in enumerate(({}, {"protocol": "pancreas_dycon"}), 700):
        report = run(form, source, dataset_id=number, **options)
        assert not [p for p in report.folder.rglob("*") if "0025" in p.name or "0070" in p.name]
        assert any("withdrawn" in note for note in report.notes)
    kept = run(form, source, dataset_id=702, protocol="pancreas_dycon", keep_withdrawn=True)
    assert (kept.folder / "imagesUn" / "PANCREAS_0025_0000.nii.gz").is_file()
    assert (kept.folder / "labelsTs" / "PANCREAS_0070.nii.gz").is_file()


@pytest.mark.parametrize("name", ["isles-archive", "brats-doubled-mixed-all-multi", "btcv-raw", "pancreas-nifti"])
def test_the_source_may_be_given_too_high_or_too_low(raw, source, name) -> None:
    form = FORMS[name]
    lay_out(name, source / "very" / "deep")
    low = {"isles-archive": "derivatives", "btcv-raw": "label", "pancreas-nifti": "label"}.get(name, "LGG")
    contents = []
    for number, folder in enumerate((source, next(p for p in source.rglob(low) if "RegData" not in p.parts)), 700):
        contents.append(tree(run(form, folder, dataset_id=number).folder))
        contents[-1].pop("conversion.json")
        contents[-1].pop("dataset.json")
    assert contents[0] == contents[1]


def test_all_gives_the_same_validation_and_test_cases(raw, source) -> None:
    for number, name in enumerate(("isles-archive", "btcv-raw", "la-h5"), 700):
        form = FORMS[name]
        lay_out(name, source / name)
        some = run(form, source / name, dataset_id=number).folder
        every = run(form, source / name, dataset_id=number + 10, labeled="all").folder
        roles = [json.loads((f / "conversion.json").read_text())["cases"] for f in (some, every)]
        sets = [{c for c, e in cases.items() if e["role"] in ("validation", "test")} for cases in roles]
        assert sets[0] == sets[1]
        assert not list((every / "imagesUn").iterdir())
        val = [json.loads((f / "splits_final.json").read_text())[0]["val"] for f in (some, every)]
        assert val[0] == val[1]


# ---- leaks -------------------------------------------------------------------------------------------------

opened: list[str] | None = None


def _note(event: str, arguments: tuple) -> None:
    if opened is not None and event in ("open", "os.link", "shutil.copyfile") and isinstance(arguments[0], str | Path):
        opened.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.mark.parametrize("name", LABEL_FILES)
def test_labels_of_unlabeled_cases_are_not_opened_and_change_nothing(raw, source, name) -> None:
    global opened
    form = FORMS[name]
    lay_out(name, source)
    opened = []
    try:
        folder = run(form, source, dataset_id=700).folder
    finally:
        seen, opened = opened, None
    label = find(source, LABEL_FILES[name])
    assert str(label) not in seen
    if form.collection != "LA":  # SimpleITK opens out of Python's sight
        assert any("label" in f or "msk" in f or "seg" in f for f in seen)  # the hook sees opened files
    trees = [tree(folder)]
    label.write_bytes(b"not a label")
    trees.append(tree(run(form, source, dataset_id=700, overwrite=True).folder))
    label.unlink()
    trees.append(tree(run(form, source, dataset_id=700, overwrite=True).folder))
    assert trees[0] == trees[1] == trees[2]


def test_the_label_array_of_an_unlabeled_h5_file_is_not_needed(raw, source) -> None:
    import h5py

    form = FORMS["la-h5"]
    lay_out("la-h5", source)
    before = tree(run(form, source, dataset_id=700).folder)
    with h5py.File(find(source, "**/CMPXO4J23G58J53Q98SZ/*.h5"), "a") as file:
        del file["label"]
    after = tree(run(form, source, dataset_id=700, overwrite=True).folder)
    assert {k: v for k, v in before.items() if k != "conversion.json"} == {
        k: v for k, v in after.items() if k != "conversion.json"
    }
