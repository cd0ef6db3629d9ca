"""Bad input of converters: one line that names the file, and nothing is left."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from nnunetv2_dycon.conversion import volumes
from nnunetv2_dycon.dataset_conversion import converter
from nnunetv2_dycon.errors import ConfigError, DataError, SplitError, UserError
from tests import collections
from tests.converting import (
    A_LABEL,
    AN_IMAGE,
    FORMS,
    NIFTI_LABELS,
    ONE_EACH,
    Form,
    find,
    lay_out,
    read,
    refused,
    run,
    tree,
)

# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [A_LABEL, AN_IMAGE], ids=["label", "image"])
@pytest.mark.parametrize("damage", ["empty", "half", "text"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_damaged_file_is_named_and_nothing_is_left(raw, source, name, damage, what) -> None:
    form = FORMS[name]
    lay_out(name, source)
    path = find(source, what[name])
    content = {"empty": b"", "half": path.read_bytes()[: path.stat().st_size // 2], "text": b"<html>404</html>" * 40}
    path.write_bytes(content[damage])
    place = path.parent if path.suffix == ".dcm" else path
    refused(raw, form, source, str(place))


@pytest.mark.parametrize("name", NIFTI_LABELS)
@pytest.mark.parametrize(("value", "word"), [(0.9999, "0.9999"), (77, "label value 77"), (np.nan, "has NaN or Inf")])
def test_a_label_value_that_is_not_known_is_named_with_its_file(raw, source, name, value, word) -> None:
    form = FORMS[name]
    lay_out(name, source)
    path = find(source, A_LABEL[name])
    image = nib.load(path)
    array = np.asanyarray(image.dataobj).astype(np.float32)
    array[tuple(np.argwhere(array > 0)[0])] = value
    nib.save(nib.Nifti1Image(array, image.affine), path)
    refused(raw, form, source, str(path), word)


def test_label_14_of_btcv_is_refused_and_its_origin_said(raw, source) -> None:
    lay_out("btcv-raw", source)
    path = find(source, A_LABEL["btcv-raw"])
    image = nib.load(path)
    array = np.asanyarray(image.dataobj).copy()
    array[0, 0, 0] = 14
    nib.save(nib.Nifti1Image(array, image.affine), path)
    refused(raw, FORMS["btcv-raw"], source, str(path), "label value 14 (1 voxels)", "duodenum")


@pytest.mark.parametrize("name", ["isles-archive", "brats-grades", "btcv-raw"])
@pytest.mark.parametrize("wrong", ["shape", "origin"])
def test_a_mask_on_another_grid_is_refused(raw, source, name, wrong) -> None:
    lay_out(name, source)
    path = find(source, A_LABEL[name])
    image = nib.load(path)
    array, affine = np.asanyarray(image.dataobj), image.affine.copy()
    affine[2, 3] += 0.5 if wrong == "origin" else 0
    nib.save(nib.Nifti1Image(array[:-1] if wrong == "shape" else array, affine), path)
    refused(raw, FORMS[name], source, str(path), "different grids")


def test_channels_on_two_grids_are_refused(raw, source) -> None:
    form = FORMS["isles-adc"]
    lay_out("isles-adc", source)
    path = find(source, "**/sub-strokecase0248*_adc.nii.gz")
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine @ np.diag([1, 1, 1.1, 1])), path)
    refused(raw, form, source, str(path), "channels must share one")


def test_a_missing_modality_is_named(raw, source) -> None:
    lay_out("isles-archive", source)
    find(source, "**/sub-strokecase0248*_adc.nii.gz").unlink()
    assert run(FORMS["isles-archive"], source).state == "written"
    refused(raw, FORMS["isles-adc"], source, "sub-strokecase0248_*_adc.nii.gz", dataset_id=701)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_case_that_is_there_twice_is_refused_with_both_places(raw, source, name) -> None:
    form = FORMS[name]
    lay_out(name, source)
    path = find(source, AN_IMAGE[name])
    copy = source / "copy" / path.parent.name / path.name
    if name == "pancreas-dicom":
        shutil.copytree(path.parent, source / "copy" / "PANCREAS_0013" / "series")
        refused(raw, form, source, "two series", str(path.parent), str(source / "copy"), "PANCREAS_0013")
        return
    copy.parent.mkdir(parents=True)
    shutil.copy(path, copy)
    refused(raw, form, source, "two files", str(path), str(copy))


def test_two_forms_in_one_source_are_refused(raw, source) -> None:
    lay_out("la-nrrd", source)
    lay_out("la-h5", source)
    refused(raw, FORMS["la-nrrd"], source, "two forms", "lgemri.nrrd", "mri_norm2.h5")
    lay_out("pancreas-nifti", source / "p")
    lay_out("pancreas-mcnet", source / "p")
    refused(raw, FORMS["pancreas-nifti"], source / "p", "NIfTI and h5 forms")


LOOKS = {
    "isles-kit": "ISLES-2022",
    "brats-flat-nii": "BraTS",
    "la-nrrd": "LA (2018",
    "la-h5": "LA (2018",
    "pancreas-dicom": "Pancreas-NIH",
    "pancreas-nifti": "Pancreas-NIH",
    "pancreas-mcnet": "Pancreas-NIH",
    "btcv-raw": "BTCV",
    "btcv-msd": "BTCV",
}


@pytest.mark.parametrize("name", LOOKS)
def test_another_collection_is_recognised(raw, source, name) -> None:
    lay_out(name, source)
    for collection in ("ISLES22", "BraTS19", "LA", "PancreasNIH", "BTCV"):
        if collection != FORMS[name].collection:
            asked = Form(collection, FORMS[name].make, {}, 4)
            words = (f"holds no case of {collection}", f"looks like {LOOKS[name]}")
            refused(raw, asked, source, *words, f"convert {FORMS[name].collection}", labeled=4)


def test_a_folder_that_is_empty_or_not_there_is_refused(raw, source) -> None:
    refused(raw, FORMS["la-nrrd"], source, "the folder is empty")
    refused(raw, FORMS["la-nrrd"], source / "none", "does not exist")
    (source / "zip.zip").touch()
    refused(raw, FORMS["la-nrrd"], source / "zip.zip", "is an archive; unpack it")


@pytest.mark.parametrize("name", ONE_EACH)
def test_links_inside_the_source_work_and_links_out_of_it_are_refused(raw, source, tmp_path, name) -> None:
    form = FORMS[name]
    lay_out(name, source)
    expected = tree(run(form, source, dataset_id=700).folder)
    path = find(source, AN_IMAGE[name])
    store = source / ".store" / "one.dat"  # as git-annex keeps content
    store.parent.mkdir()
    path.rename(store)
    path.symlink_to(store)
    assert tree(run(form, source, dataset_id=700, overwrite=True).folder) == expected
    path.unlink()
    outside = tmp_path / "outside.dat"
    store.rename(outside)
    path.symlink_to(outside)
    refused(raw, form, source, str(path), "leaves", dataset_id=701)
    outside.unlink()
    refused(raw, form, source, str(path), dataset_id=701)


def test_a_folder_that_is_a_link_out_of_the_source_is_refused(raw, source, tmp_path) -> None:
    lay_out("la-nrrd", tmp_path / "elsewhere")
    (source / "Training Set").symlink_to(tmp_path / "elsewhere" / "Training Set")
    refused(raw, FORMS["la-nrrd"], source, str(source / "Training Set"), "leaves")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert run(FORMS["la-nrrd"], tmp_path / "link").state == "written"  # the source itself may be one


@pytest.mark.parametrize("how", ["external", "soft", "virtual", "raw"])
@pytest.mark.parametrize("key", ["image", "label"])
def test_h5_files_that_lead_elsewhere_are_refused(raw, source, tmp_path, how, key) -> None:
    import h5py

    lay_out("la-h5", source)
    path = find(source, A_LABEL["la-h5"])
    secret = tmp_path / "secret.h5"
    shutil.copy(path, secret)
    with h5py.File(path, "a") as file:
        shape, dtype = file[key].shape, file[key].dtype
        del file[key]
        if how == "external":
            file[key] = h5py.ExternalLink(str(secret), f"/{key}")
        elif how == "soft":
            file[key] = h5py.SoftLink("/elsewhere")
        elif how == "virtual":
            layout = h5py.VirtualLayout(shape, dtype)
            layout[:] = h5py.VirtualSource(str(secret), key, shape, dtype)
            file.create_virtual_dataset(key, layout)
        else:
            file.create_dataset(key, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    refused(raw, FORMS["la-h5"], source, str(path), repr(key))


def test_a_folder_that_cannot_be_written_is_one_line(raw, source, monkeypatch) -> None:
    form = FORMS["la-h5"]
    lay_out("la-h5", source)
    mkdir = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.is_relative_to(raw):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    refused(raw, form, source, "cannot write ", str(raw), "Permission denied")


@pytest.mark.parametrize("name", ["la-h5", "btcv-raw"])
@pytest.mark.parametrize("when", ["image", "label", "report", "json"])
def test_a_full_disk_is_said_and_nothing_is_left(raw, source, monkeypatch, name, when) -> None:
    form = FORMS[name]
    lay_out(name, source)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "image":
        monkeypatch.setattr(volumes, "_link", full)
        monkeypatch.setattr(nib, "save", full)
    elif when == "label":
        monkeypatch.setattr("nnunetv2_dycon.conversion.cases.save", full)
    elif when == "json":
        monkeypatch.setattr("nnunetv2_dycon.conversion.job.write_json", full)
    else:
        monkeypatch.setattr("nnunetv2_dycon.conversion.cases.write_json", full)
    text = refused(raw, form, source, "No space left on device")
    assert "cases are bad" not in text  # the first one ends it


def test_several_bad_cases_are_counted(raw, source) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    for number in ("0002", "0023", "0034", "0039", "0004"):
        find(source, f"**/RawData/**/label{number}.nii.gz").write_bytes(b"")
    refused(raw, form, source, "5 cases are bad", "and 2 more", "label0002")


def test_an_id_that_is_taken_and_foreign_files_are_left_alone(raw, source) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    (raw / "Dataset505_Other").mkdir()
    refused(raw, form, source, f"-d 505 belongs to {raw / 'Dataset505_Other'}; choose a free id: -d 506")
    folder = run(form, source, dataset_id=700).folder
    refused(raw, form, source, "--overwrite", dataset_id=700, labeled=2)
    (folder / "imagesTr" / "mine_0000.nii.gz").touch()
    refused(raw, form, source, "mine_0000.nii.gz was added", dataset_id=700, labeled=2, overwrite=True)
    for wrong in (0, 1000):
        refused(raw, form, source, "a number from 1 to 999", dataset_id=wrong)


@pytest.mark.parametrize("name", ["btcv-raw", "pancreas-dicom"])
def test_a_source_that_was_changed_at_the_same_size_is_said(raw, source, name) -> None:
    form = FORMS[name]
    lay_out(name, source)
    folder = run(form, source).folder
    (find(source, AN_IMAGE[name]).parent / ".DS_Store").touch()  # no file of a scan
    assert run(form, source).state == "up to date"
    os.utime(find(source, AN_IMAGE[name]), ns=(1, 1))
    refused(raw, form, source, "source files were changed", str(folder), "--overwrite")
    assert run(form, source, overwrite=True).state == "written"
    assert run(form, source).state == "up to date"


def test_a_failed_overwrite_leaves_the_old_data_set(raw, source) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    run(form, source, dataset_id=700)
    find(source, "**/RawData/**/label0004.nii.gz").write_bytes(b"")
    refused(raw, form, source, "is empty", dataset_id=700, labeled=2, overwrite=True)


def test_protocol_files_of_the_user_work(raw, source) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    lists = {"labelled": ["label0001.nii.gz"], "unlabelled": [2, "0023"], "val": ["img0006"], "test": ["0004.h5"]}
    path = source.parent / "mine.json"
    path.write_text(json.dumps(lists))
    folder = run(form, source, dataset_id=700, labeled=path).folder
    names = sorted(p.name[:7] for p in (folder / "imagesUn").iterdir())
    assert names == ["img0002", "img0023"]
    again = run(form, source, dataset_id=701, labeled=1, protocol=path).folder
    parts = [{k: v for k, v in tree(f).items() if "json" not in k} for f in (folder, again)]
    assert parts[0] == parts[1]


def test_wrong_options_are_one_line(raw, source) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    for options, word in (
        ({"labeled": "0.99x"}, "no such file"),
        ({"labeled": "1.5"}, "--labeled 1.5"),
        ({"labeled": "inf"}, "--labeled inf"),
        ({"labeled": "nan"}, "--labeled nan"),
        ({"labeled": 21}, "1 to 20"),
        ({"labeled": 3}, "no list of 3"),
        ({"labeled_seed": -1}, "--labeled_seed -1"),
        ({"protocol": "none"}, "no such protocol"),
        ({"processes": 0}, "-np 0"),
    ):
        refused(raw, form, source, word, **options)


def test_the_command_ends_with_2_and_one_line(raw, source, capsys) -> None:
    from nnunetv2_dycon.conversion.commands import run_script

    module = converter("la")
    code = run_script(module.convert_la, module.parser(), [str(source), "--labeled", "8", "-np", "1"])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    lay_out("la-h5", source)
    code = run_script(module.convert_la, module.parser(), [str(source), "--labeled", "8", "-np", "1", "-d", "12"])
    assert code == 0
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith("next")] == [
        "next: nnUNetv2_dycon check -d 12"
    ]
    assert "next" not in printed.out
    with pytest.raises(ConfigError, match="no converter is called 'Hippocampus'"):
        converter("Hippocampus")


def test_no_labeled_case_on_disk_is_said(raw, source) -> None:
    collections.la_h5(source, collections.LA["test"])
    with pytest.raises(SplitError, match="no training case of la_80_20 is there with its label"):
        run(FORMS["la-h5"], source)
    assert issubclass(SplitError, UserError)
    assert issubclass(DataError, UserError)


@pytest.mark.parametrize("form", ["pancreas-dicom", "pancreas-nifti"])
@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_label_with_fewer_slices_than_its_scan_is_never_shifted(raw, source, form, lost) -> None:
    truth = lay_out(form, source)["PANCREAS_0001"]
    path = find(source, A_LABEL[form])
    image = nib.load(path)
    turned = image.as_reoriented([[0, 1], [1, 1], [2, -1]])  # begins far from the organ
    for corrected in (False, True):
        affine = turned.affine.copy()
        affine[:3, 3] += corrected * lost * affine[:3, 2]
        nib.save(nib.Nifti1Image(np.asanyarray(turned.dataobj)[:, :, lost:], affine), path)
        try:
            folder = run(FORMS[form], source, overwrite=True).folder
        except DataError:
            refused(raw, FORMS[form], source, str(path), "the CT does not show clearly", "all slices", overwrite=True)
        else:
            assert np.array_equal(read(folder / "labelsTr" / "PANCREAS_0001.nii.gz")[0], truth.label)


@pytest.mark.parametrize("name", ["a\\..\\b", "tab\there", "two\nlines", "x..", " "])
def test_a_folder_whose_name_no_case_has_is_left_out_and_said_on_one_line(raw, source, name) -> None:
    cases = [case for group in collections.LA.values() for case in group]
    collections.la_h5(source, [*cases, name])
    report = run(FORMS["la-h5"], source)
    assert sorted(path.name for path in report.folder.parent.iterdir()) == [report.folder.name]
    files = sorted(path.name for path in report.folder.glob("images*/*"))
    assert files == sorted(f"{case}_0000.nii.gz" for case in cases)
    (note,) = (note for note in report.notes if "not in the protocol" in note)
    assert "\n" not in note
    assert "\t" not in note
    path = source.parent / "protocol.json"
    path.write_text(json.dumps({"labeled": [cases[0]], "unlabeled": [name], "test": [cases[1]]}))
    if name.strip() and name.isprintable() and "\\" not in name:
        assert run(FORMS["la-h5"], source, labeled=path, overwrite=True).state == "written"
    else:
        refused(raw, FORMS["la-h5"], source, "protocol.json names a case", labeled=path, overwrite=True)
