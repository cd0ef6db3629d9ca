"""Every public layout becomes the right tree, voxel for voxel; bad downloads give one line and leave nothing."""

import errno
import hashlib
import json
import locale
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.conversion import volumes
from nnunetv2_dycon.dataset_conversion import converter
from nnunetv2_dycon.errors import ConfigError, DataError, SplitError, UserError
from tests import collections
from tests.collections import Truth
from tests.datasets import environment

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
FOLDERS = {"labeled": "Tr", "validation": "Tr", "unlabeled": "Un", "test": "Ts"}


class Form(NamedTuple):
    """A layout of a collection: how to make it, cases by role, number for --labeled, file ending, prefix of cases."""

    collection: str
    make: Callable[..., dict[str, Truth]]
    roles: Mapping[str, tuple[str, ...]]
    labeled: int
    options: Mapping[str, Any] = {}
    ending: str = ".nii.gz"
    prefix: str = ""
    keep: tuple[int, ...] = (0,)  # channels of `Truth` that the data set has
    relabel: Mapping[int, int] | None = None

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        return {role: tuple(self.prefix + case for case in cases) for role, cases in self.roles.items()}


def isles(layout: str) -> Form:
    return Form("ISLES22", lambda r: collections.isles(r, layout), collections.ISLES, 20, prefix="sub-strokecase")


def brats(layout: str, *args: Any, ending: str = ".nii.gz", **changes: Any) -> Form:
    form = Form("BraTS19", lambda r: collections.brats(r, layout, *args), collections.BRATS, 25, ending=ending)
    return form._replace(**{"keep": (3,), "relabel": {1: 1, 2: 1, 4: 1}, **changes})


def pancreas(make: Callable[..., dict[str, Truth]], **changes: Any) -> Form:
    return Form("PancreasNIH", make, collections.PANCREAS, 12, prefix="PANCREAS_", **changes)


FORMS = {
    "isles-archive": isles("archive"),
    "isles-kit": isles("kit"),
    "isles-hosted": isles("hosted"),
    "isles-adc": isles("archive")._replace(options={"modalities": ("dwi", "adc")}, keep=(0, 1)),
    "brats-grades": brats("grades"),
    "brats-flat-nii": brats("flat", (".nii",), ending=".nii"),
    "brats-doubled-mixed-all-multi": brats(
        "doubled",
        (".nii", ".nii.gz"),
        collections.LATER,
        options={"modalities": (), "labels": "multi"},
        keep=(0, 1, 2, 3),
        relabel={1: 1, 2: 2, 4: 3},
    ),
    "la-nrrd": Form("LA", collections.la_nrrd, collections.LA, 8),
    "la-h5": Form("LA", collections.la_h5, collections.LA, 8),
    "pancreas-dicom": pancreas(collections.pancreas_dicom),
    "pancreas-nifti": pancreas(collections.pancreas_nifti),
    "pancreas-nifti-data": pancreas(lambda r: collections.pancreas_nifti(r, "data")),
    "pancreas-coranet": pancreas(lambda r: collections.pancreas_h5(r, collections.PANCREAS_H5[0])),
    "pancreas-mcnet": pancreas(lambda r: collections.pancreas_h5(r, collections.PANCREAS_H5[1])),
    "pancreas-dycon": pancreas(lambda r: collections.pancreas_h5(r, collections.PANCREAS_H5[2])),
    "btcv-raw": Form("BTCV", collections.btcv, collections.BTCV, 4, prefix="img"),
    "btcv-msd": Form("BTCV", lambda r: collections.btcv(r, "msd"), collections.BTCV, 4, prefix="img"),
}
_made: dict[str, tuple[Path, dict[str, Truth]]] = {}


@pytest.fixture(scope="module", autouse=True)
def _shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep every tree that was made, so that a test has but to copy it."""
    _made[""] = (tmp_path_factory.mktemp("collections"), {})
    yield
    _made.clear()


def lay_out(name: str, folder: Path) -> dict[str, Truth]:
    """Put the tree of a form into `folder`."""
    if name not in _made:
        shelf = _made[""][0] / name
        _made[name] = (shelf, FORMS[name].make(shelf))
    shutil.copytree(_made[name][0], folder, dirs_exist_ok=True)
    return _made[name][1]


ONE_EACH = ("isles-archive", "brats-grades", "la-nrrd", "la-h5", "pancreas-dicom", "pancreas-nifti", "btcv-raw")
LABEL_FILES = {  # where the label of an unlabelled case lies
    "isles-archive": "**/sub-strokecase0248*_msk.nii.gz",
    "brats-grades": "**/BraTS19_2013_0_1_seg.nii.gz",
    "la-nrrd": "**/CMPXO4J23G58J53Q98SZ/laendo.nrrd",
    "pancreas-dicom": "**/label0013.nii.gz",
    "pancreas-nifti": "**/label0013.nii.gz",
    "btcv-raw": "**/RawData/**/label0001.nii.gz",
}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in environment(tmp_path / "nn unet ä").items():
        Path(folder).mkdir(parents=True)
        monkeypatch.setenv(name, folder)
    return tmp_path / "nn unet ä" / "nnUNet_raw"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "download of Zoë"  # a blank and a letter beyond ASCII
    folder.mkdir()
    return folder


def find(source: Path, pattern: str) -> Path:
    """Return the file of a collection that fits, not the files next to it."""
    (path,) = (p for p in source.glob(pattern) if not {"__MACOSX", "RegData"} & set(p.parts))
    return path


def run(form: Form, source: Path, **options: Any) -> Any:
    settings = {"labeled": form.labeled, "processes": 1, **form.options, **options}
    return converter(form.collection).convert_collection(source, **settings)


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def refused(raw: Path, form: Form, source: Path, *words: str, **options: Any) -> str:
    """Convert, and return the one line that it ends with; nothing is left."""
    before = tree(raw)
    with pytest.raises(UserError) as caught:
        run(form, source, **options)
    text = str(caught.value)
    for word in words:
        assert word in text
    assert "\n" not in text
    assert tree(raw) == before
    assert not [p for p in raw.rglob("*") if ".converting" in p.name]
    return text


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) and RAS affine, by the reader that the converters do not use for NIfTI."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


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


# ---- runs again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_repeated_run_is_up_to_date_and_one_that_is_forced_gives_the_same_bytes(raw, source, name) -> None:
    form = FORMS[name]
    lay_out(name, source)
    first = tree(run(form, source).folder)
    times = {p: p.stat().st_mtime_ns for p in raw.rglob("*")}
    again = run(form, source)
    assert again.state == "up to date"
    assert times == {p: p.stat().st_mtime_ns for p in raw.rglob("*")}
    forced = run(form, source, overwrite=True)
    assert (forced.state, tree(forced.folder)) == ("written", first)


def test_a_dry_run_says_the_same_and_writes_nothing(raw, source) -> None:
    form = FORMS["brats-grades"]
    lay_out("brats-grades", source)
    planned = run(form, source, dry_run=True)
    assert (planned.state, list(raw.iterdir())) == ("planned", [])
    assert "nothing was written" in str(planned)
    written = run(form, source)
    assert (written.rows, written.title) == (planned.rows, planned.title)
    assert set(planned.notes) <= set(written.notes)


def test_strict_refuses_what_is_incomplete_and_names_cases(raw, source) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    refused(raw, form, source, "--strict: 21 cases of btcv_dhc_v1", "validation img0025", strict=True)
    everything = collections.btcv(source / "all", "msd", [f"{n:04d}" for n in (*range(1, 11), *range(21, 41))])
    assert len(everything) == 30
    report = run(form, source / "all", strict=True)
    assert [row[1:] for row in report.rows] == [(4, 4), (4, 4), (16, 16), (6, 6)]


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("survivor", ["image", "whole case"])
def test_what_a_killed_run_left_is_continued_to_the_same_tree(raw, source, monkeypatch, name, survivor) -> None:
    form = FORMS[name]
    lay_out(name, source)
    clean = tree(run(form, source, dataset_id=700).folder)
    shutil.rmtree(raw)
    raw.mkdir()

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    # `building` does not catch this either, so it removes nothing, as after a kill
    place = (
        "nnunetv2_dycon.conversion.cases.CaseTask._write_label"
        if survivor == "image"
        else ("nnunetv2_dycon.conversion.job._describe")
    )
    with monkeypatch.context() as patched:
        patched.setattr(place, kill)
        with pytest.raises(Killed):
            run(form, source, dataset_id=700)
    left = list(raw.glob(".*.converting/data/*/*"))
    assert left
    half = left[0].with_name(f".0123abcd.part.{left[0].name}")
    half.write_bytes(b"half")
    assert tree(run(form, source, dataset_id=700).folder) == clean
    assert [p.name for p in raw.iterdir()] == [f"Dataset700_{form.collection}"]


def test_a_source_that_was_changed_after_a_kill_is_read_again(raw, source, monkeypatch) -> None:
    form = FORMS["pancreas-dicom"]
    lay_out("pancreas-dicom", source)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("nnunetv2_dycon.conversion.job._describe", kill)
        with pytest.raises(Killed):
            run(form, source)
    path = find(source, AN_IMAGE["pancreas-dicom"])
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes((content[-2] ^ 1, content[-1])))  # one voxel, in place
    run(form, source)
    changed = tree(raw)
    run(form, source, overwrite=True)
    assert tree(raw) == changed


class Killed(BaseException):
    """What ends a run as a kill does: nothing is removed."""


def killed_at_rename(number: int, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> None:
    """Run a conversion that ends in place of a rename of a whole folder: the first, the second, or after them."""
    rename, rmtree, calls = os.rename, shutil.rmtree, []

    def counted(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) > number:
            raise Killed
        rename(*paths)

    def remove(folder: Path, **more: Any) -> None:
        if Path(folder).name.endswith(".converting"):
            raise Killed
        rmtree(folder, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", counted)
        patched.setattr(shutil, "rmtree", remove)
        with pytest.raises(Killed):
            run(*args, **options)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_run_that_is_killed_while_it_replaces_a_data_set_loses_neither(raw, source, monkeypatch, number) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    run(form, source, dataset_id=701, labeled=2)
    new = tree(raw / "Dataset701_BTCV")
    shutil.rmtree(raw / "Dataset701_BTCV")
    run(form, source, dataset_id=700)
    old = tree(raw / "Dataset700_BTCV")
    killed_at_rename(number, monkeypatch, form, source, dataset_id=700, labeled=2, overwrite=True)
    if number < 2:  # another command does not profit from the kill
        with pytest.raises(DataError, match="--overwrite"):
            run(form, source, dataset_id=700, labeled=8)
        assert tree(raw / "Dataset700_BTCV") == old
    run(form, source, dataset_id=700, labeled=2, overwrite=True)
    assert tree(raw / "Dataset700_BTCV") == new
    assert [p.name for p in raw.iterdir()] == ["Dataset700_BTCV"]


def test_a_dry_run_leaves_what_a_killed_run_left(raw, source, monkeypatch) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    run(form, source, dataset_id=700)
    killed_at_rename(0, monkeypatch, form, source, dataset_id=700, labeled=2, overwrite=True)
    before = tree(raw)
    run(form, source, dataset_id=700, dry_run=True)
    run(form, source, dataset_id=700, dry_run=True, overwrite=True)
    assert tree(raw) == before


def test_descriptions_are_read_in_the_encoding_in_which_they_were_written(raw, source) -> None:
    form = FORMS["la-h5"]
    lay_out("la-h5", source)
    run(form, source)
    kept = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "C")
        assert run(form, source).state == "up to date"
        assert run(form, source, overwrite=True).state == "written"
    finally:
        locale.setlocale(locale.LC_ALL, kept)


# ---- bad input ---------------------------------------------------------------------------------------------

NIFTI_LABELS = ("isles-archive", "brats-grades", "pancreas-dicom", "pancreas-nifti", "btcv-raw")
A_LABEL = {
    "isles-archive": "**/sub-strokecase0003*_msk.nii.gz",
    "brats-grades": "**/BraTS19_CBICA_ASA_1_seg.nii.gz",
    "la-nrrd": "**/0RZDK210BSMWAA6467LU/laendo.nrrd",
    "la-h5": "**/0RZDK210BSMWAA6467LU/mri_norm2.h5",
    "pancreas-dicom": "**/label0001.nii.gz",
    "pancreas-nifti": "**/label0001.nii.gz",
    "btcv-raw": "**/RawData/**/label0004.nii.gz",
}
AN_IMAGE = {
    "isles-archive": "**/sub-strokecase0248*_dwi.nii.gz",
    "brats-grades": "**/BraTS19_2013_0_1_flair.nii.gz",
    "la-nrrd": "**/CMPXO4J23G58J53Q98SZ/lgemri.nrrd",
    "la-h5": "**/CMPXO4J23G58J53Q98SZ/mri_norm2.h5",
    "pancreas-dicom": "**/PANCREAS_0013/**/1-004.dcm",
    "pancreas-nifti": "**/image0013.nii.gz",
    "btcv-raw": "**/RawData/**/img0001.nii.gz",
}


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
@pytest.mark.parametrize(("value", "word"), [(0.9999, "0.9999"), (77, "label value 77"), (np.nan, "nan")])
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
    refused(raw, FORMS["la-nrrd"], source / "zip.zip", "is a file")


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
    refused(raw, form, source, "Cannot write to", str(raw), "Permission denied")


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
    refused(raw, form, source, "Id 505 belongs to Dataset505_Other")
    folder = run(form, source, dataset_id=700).folder
    refused(raw, form, source, "--overwrite", dataset_id=700, labeled=2)
    (folder / "imagesTr" / "mine_0000.nii.gz").touch()
    refused(raw, form, source, "mine_0000.nii.gz was added", dataset_id=700, labeled=2, overwrite=True)
    for wrong in (0, 1000):
        refused(raw, form, source, "give 1 to 999", dataset_id=wrong)


@pytest.mark.parametrize("name", ["btcv-raw", "pancreas-dicom"])
def test_a_source_that_was_changed_at_the_same_size_is_said(raw, source, name) -> None:
    form = FORMS[name]
    lay_out(name, source)
    folder = run(form, source).folder
    (find(source, AN_IMAGE[name]).parent / ".DS_Store").touch()  # no file of a scan
    (find(source, AN_IMAGE[name]).parent / ".DS_Store").unlink()
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
    assert "next: nnUNetv2_dycon check -d 12" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no converter is called 'Hippocampus'"):
        converter("Hippocampus")


def test_no_labeled_case_on_disk_is_said(raw, source) -> None:
    collections.la_h5(source, collections.LA["test"])
    with pytest.raises(SplitError, match="none of the 8 labelled cases of la_80_20 is there"):
        run(FORMS["la-h5"], source)
    assert issubclass(SplitError, UserError)
    assert issubclass(DataError, UserError)
