import builtins
import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon import parallel
from nnunetv2_dycon.conversion.cases import link_case
from nnunetv2_dycon.conversion.split import split
from nnunetv2_dycon.errors import ConfigError, DataError, SplitError
from tests.datasets import environment, make_dataset

OPTIONS = {"labeled": 10, "unlabeled": 2, "test": 3, "shape": (8, 8, 8)}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "default_processes", lambda: 1)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    make_dataset(tmp_path, dataset_id=4, **OPTIONS)
    return tmp_path / "nnUNet_raw"


def names(folder: Path, where: str) -> set[str]:
    return {path.name.removesuffix(".nii.gz").removesuffix("_0000") for path in (folder / where).iterdir()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def roles(folder: Path) -> dict[str, set[str]]:
    return {where: names(folder, where) for where in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs")}


def subjects(path: Path, divided: dict[str, str]) -> Path:
    """Write a table in which every annotated case is its own subject, except the given ones."""
    path.write_text(json.dumps({f"l_{i:02d}": f"s{i}" for i in range(10)} | divided))
    return path


def test_labels_of_unlabeled_cases_are_not_in_the_new_data_set(raw):
    folder = split(4, 604, 3).folder
    new = roles(folder)
    assert len(new["imagesTr"]) == 3
    assert new["imagesTr"] == new["labelsTr"]
    assert len(new["imagesUn"]) == 9  # 7 that lose their label and 2 that had none
    assert not new["imagesUn"] & (new["labelsTr"] | new["labelsTs"])
    assert new["imagesTs"] == new["labelsTs"] == {"t_00", "t_01", "t_02"}


def test_no_image_and_no_label_is_opened(raw, monkeypatch):
    opened = []
    real = builtins.open

    def note(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", note)
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: note(self, *a, **k))
    split(4, 604, 3, processes=1)
    source = [name for name in opened if "Dataset004" in name]
    assert all(name.endswith("dataset.json") for name in source)


def test_files_are_the_same_files(raw):
    folder = split(4, 604, 3).folder
    for path in folder.rglob("*.nii.gz"):
        case = path.name.removesuffix(".nii.gz").removesuffix("_0000")
        (old,) = (raw / "Dataset004_Tiny").rglob(f"{case}{path.name[len(case) :]}")
        assert path.samefile(old)


def test_dataset_json_keeps_labels_regions_ignore_and_counts_the_training_cases(tmp_path, monkeypatch):
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    make_dataset(tmp_path, dataset_id=5, regions=True, ignore=True, **OPTIONS)
    old = json.loads((tmp_path / "nnUNet_raw/Dataset005_Tiny/dataset.json").read_text())
    new = json.loads((split(5, 605, 4).folder / "dataset.json").read_text())
    assert new["numTraining"] == 4
    for key in ("labels", "regions_class_order", "channel_names", "file_ending", "overwrite_image_reader_writer"):
        assert new[key] == old[key]


def test_a_dataset_dictionary_is_resolved_and_not_carried_over(raw, tmp_path):
    old = raw / "Dataset004_Tiny"
    elsewhere = tmp_path / "scans"
    elsewhere.mkdir()
    content = json.loads((old / "dataset.json").read_text())
    content["dataset"] = {}
    for case in sorted(names(old, "imagesTr")):
        image, label = elsewhere / f"x{case}.nii.gz", elsewhere / f"y{case}.nii.gz"
        os.rename(old / "imagesTr" / f"{case}_0000.nii.gz", image)
        os.rename(old / "labelsTr" / f"{case}.nii.gz", label)
        content["dataset"][case] = {"images": [str(image)], "label": str(label)}
    (old / "dataset.json").write_text(json.dumps(content))
    folder = split(4, 604, 3).folder
    assert "dataset" not in json.loads((folder / "dataset.json").read_text())
    for case in names(folder, "imagesTr"):
        assert (folder / "imagesTr" / f"{case}_0000.nii.gz").samefile(elsewhere / f"x{case}.nii.gz")
        assert (folder / "labelsTr" / f"{case}.nii.gz").samefile(elsewhere / f"y{case}.nii.gz")


def test_the_same_seed_gives_the_same_tree_and_another_seed_another_draw_with_the_same_tests(raw):
    one = split(4, 604, 3, test=0.2, labeled_seed=1).folder
    again = split(4, 605, 3, test=0.2, labeled_seed=1).folder
    other = split(4, 606, 3, test=0.2, labeled_seed=2).folder
    assert roles(one) == roles(again)
    assert roles(one)["imagesTr"] != roles(other)["imagesTr"]
    assert roles(one)["imagesTs"] == roles(other)["imagesTs"]
    assert len(roles(one)["imagesTs"]) == 2


def test_a_repeated_split_is_up_to_date_and_changes_nothing(raw):
    folder = split(4, 604, 3).folder
    before = tree(folder)
    assert split(4, 604, 3).state == "up to date"
    assert tree(folder) == before
    assert split(4, 604, 3, overwrite=True).state == "written"
    assert tree(folder) == before


def test_a_smaller_draw_is_inside_a_larger_one_and_all_has_the_same_tests(raw):
    small, large = (roles(split(4, number, count, test=2).folder) for number, count in ((604, 2), (605, 5)))
    everything = roles(split(4, 606, "all", test=2).folder)
    assert small["imagesTr"] < large["imagesTr"] < everything["imagesTr"]
    assert small["imagesTs"] == large["imagesTs"] == everything["imagesTs"]
    assert everything["imagesUn"] == {"u_00", "u_01"}


@pytest.mark.parametrize("form", ["csv", "tsv", "json"])
def test_scans_of_a_subject_stay_in_one_role(raw, tmp_path, form):
    subject = {f"l_{i:02d}": f"s{i // 2}" for i in range(10)}
    path = tmp_path / f"groups.{form}"
    if form == "json":
        path.write_text(json.dumps(subject))
    else:
        comma = "," if form == "csv" else "\t"
        path.write_text("".join(f"{case}{comma}{who}\n" for case, who in {"case": "subject", **subject}.items()))
    for seed in range(8):
        folder = split(4, 604 + seed, 4, test=2, groups=path, labeled_seed=seed).folder
        new = roles(folder)
        sides = [new["imagesTr"], new["imagesUn"], new["imagesTs"]]
        people = [{subject[case] for case in side if case in subject} for side in sides]
        assert sum(map(len, people)) == 5
        assert [len(side) for side in people] == [2, 2, 1]
        for fold in json.loads((folder / "splits_final.json").read_text()):
            assert not {subject[case] for case in fold["train"]} & {subject[case] for case in fold["val"]}


def test_a_protocol_file_names_every_role(raw, tmp_path):
    path = tmp_path / "protocol.json"
    lists = {
        "labelled": {"2": ["l_03", "l_01"]},
        "train": [f"l_{i:02d}" for i in range(6)],
        "val": ["l_06"],
        "test": ["l_07"],
    }
    path.write_text(json.dumps(lists))
    report = split(4, 604, 2, protocol=path)
    new = roles(report.folder)
    assert new["imagesTr"] == {"l_01", "l_03", "l_06"}
    assert new["imagesTs"] == {"l_07"}
    assert new["imagesUn"] == {"l_00", "l_02", "l_04", "l_05", "u_00", "u_01"}
    assert json.loads((report.folder / "splits_final.json").read_text()) == [
        {"train": ["l_01", "l_03"], "val": ["l_06"]}
    ]
    assert any("l_08, l_09" in note for note in report.notes)
    assert any("imagesTs are left out" in note for note in report.notes)


def test_a_json_file_of_labeled_cases_is_a_protocol_of_its_own(raw, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"labeled": ["l_00"], "unlabeled": ["l_01"], "val": ["l_02"], "test": ["l_03"]}))
    new = roles(split(4, 604, path).folder)
    assert (new["imagesTr"], new["imagesTs"]) == ({"l_00", "l_02"}, {"l_03"})
    assert new["imagesUn"] == {"l_01", "u_00", "u_01"}


def test_a_spacing_file_beside_a_tiff_image_goes_along(tmp_path, monkeypatch):
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
        Path(folder).mkdir()
    old = tmp_path / "nnUNet_raw/Dataset007_Tiff"
    for where in ("imagesTr", "labelsTr"):
        (old / where).mkdir(parents=True)
    for case in ("a", "b.1"):
        volume = sitk.GetImageFromArray(np.ones((4, 4, 4), np.uint8))
        sitk.WriteImage(volume, str(old / "imagesTr" / f"{case}_0000.tif"))
        sitk.WriteImage(volume, str(old / "labelsTr" / f"{case}.tif"))
        for where in ("imagesTr", "labelsTr"):
            (old / where / f"{case}.json").write_text('{"spacing": [1, 1, 2]}')
    content = {
        "channel_names": {"0": "x"},
        "labels": {"background": 0, "a": 1},
        "numTraining": 2,
        "file_ending": ".tif",
    }
    (old / "dataset.json").write_text(json.dumps(content))
    folder = split(7, 607, 1).folder
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json") if path.parent != folder)
    assert len(found) == 3  # two of the labelled case, one of the unlabelled
    assert split(7, 607, 1, overwrite=True).state == "written"  # names with dots are known as its own


def test_what_was_added_later_is_not_overwritten(raw):
    folder = split(4, 604, 3).folder
    added = folder / "imagesUn/new_0000.nii.gz"
    added.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"new_0000\.nii\.gz was added later"):
        split(4, 604, 4, overwrite=True)
    assert added.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "added", ["labelsTr/{un}.nii.gz", "imagesTr/{un}_0000.nii.gz", "labelsTs/t_00.nii.gz", "imagesUn/{un}_0001.nii.gz"]
)
def test_files_that_were_added_for_its_cases_are_not_overwritten(raw, added):
    (raw / "Dataset004_Tiny/labelsTs/t_00.nii.gz").unlink()
    folder = split(4, 604, 3).folder
    path = folder / added.format(un=min(names(folder, "imagesUn")))
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match=f"{path.name} was added later"):
        split(4, 604, 4, overwrite=True)
    assert path.read_bytes() == b"mine"


def test_a_data_set_that_does_not_say_what_was_written_is_up_to_date_but_left_alone(raw):
    folder = split(4, 604, 3).folder
    path = folder / "conversion.json"
    content = json.loads(path.read_text())
    del content["stamp"]
    for entry in content["cases"].values():
        del entry["written"]
    path.write_text(json.dumps(content))
    before = tree(folder)
    os.utime(raw / "Dataset004_Tiny/labelsTr/l_00.nii.gz", ns=(1, 1))
    assert split(4, 604, 3).state == "up to date"
    with pytest.raises(DataError, match="was added later and would be lost"):
        split(4, 604, 3, overwrite=True)
    assert tree(folder) == before


def test_a_source_that_was_changed_in_place_is_said(raw):
    folder = split(4, 604, "all").folder
    label = raw / "Dataset004_Tiny/labelsTr/l_00.nii.gz"
    content = label.read_bytes()
    label.unlink()  # what was linked stays as it was
    label.write_bytes(content)
    os.utime(label, ns=(1, 1))
    for dry_run in (False, True):
        with pytest.raises(DataError, match=r"source files were changed after .*Dataset604_Tiny.*--overwrite"):
            split(4, 604, "all", dry_run=dry_run)
    assert not (folder / "labelsTr/l_00.nii.gz").samefile(label)
    assert split(4, 604, "all", overwrite=True).state == "written"
    assert (folder / "labelsTr/l_00.nii.gz").samefile(label)
    assert split(4, 604, "all").state == "up to date"


def test_another_data_set_with_this_id_is_left_alone(raw):
    make_dataset(raw.parent, dataset_id=604, **OPTIONS)
    before = tree(raw / "Dataset604_Tiny")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="Dataset604_Tiny"):
            split(4, 604, 3, overwrite=overwrite)
    assert tree(raw / "Dataset604_Tiny") == before


def test_a_dry_run_writes_nothing(raw):
    before = set(raw.iterdir())
    report = split(4, 604, 3, dry_run=True)
    assert report.state == "planned"
    assert set(raw.iterdir()) == before
    assert "nothing was written" in str(report)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labeled": 11}, ConfigError, "means 11 of 10"),
        ({"labeled": 0}, ConfigError, "--labeled 0"),
        ({"labeled": 1.5}, ConfigError, "whole number"),
        ({"labeled": "none.txt"}, ConfigError, "no such file"),
        ({"labeled": 3, "labeled_seed": -1}, ConfigError, "--labeled_seed -1"),
        ({"labeled": 3, "test": "all"}, ConfigError, "--test all"),
        ({"labeled": 3, "test": "1.0"}, ConfigError, r"--test 1\.0 .*type 1 \(one case\)$"),
        ({"labeled": 3, "test": 20}, ConfigError, "--test 20 means"),
        ({"labeled": 3, "protocol": "fold9"}, ConfigError, "--protocol fold9"),
        ({"labeled": 3, "processes": 0}, ConfigError, "-np 0"),
        ({"labeled": 3, "new_id": 1000}, ConfigError, "1 to 999"),
        ({"labeled": 3, "new_id": 4}, DataError, "exists"),
        ({"labeled": 3, "dataset_id": 77}, DataError, "-d 77"),
    ],
)
def test_a_wrong_argument_is_one_line_and_writes_nothing(raw, arguments, error, message):
    before = tree(raw)
    with pytest.raises(error, match=message) as caught:
        split(**{"dataset_id": 4, "new_id": 604, **arguments})
    assert "\n" not in str(caught.value)
    assert tree(raw) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("groups.json", "[1]", "is not a mapping"),
        ("groups.json", "{", "cannot be read .*for --groups give a table"),
        ("groups.csv", "", "cannot be read"),
    ],
)
def test_groups_that_are_not_pairs_are_one_line(raw, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SplitError, match=message) as caught:
        split(4, 604, 3, groups=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_groups_must_name_every_training_case(raw, tmp_path):
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({f"l_{i:02d}": "s" for i in range(9)}))
    with pytest.raises(SplitError, match="no subject for 'l_09'"):
        split(4, 604, 3, groups=path)


def test_a_subject_in_a_kept_test_set_is_refused_in_training(raw, tmp_path):
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({f"l_{i:02d}": f"s{i}" for i in range(10)} | {"t_00": "s1"}))
    with pytest.raises(SplitError, match="subject 's1'"):
        split(4, 604, 3, groups=path)


def test_a_subject_may_be_labeled_and_unlabeled_since_both_are_training(raw, tmp_path):
    new = roles(split(4, 604, "all", groups=subjects(tmp_path / "groups.json", {"u_00": "s3"})).folder)
    assert {"l_03"} <= new["imagesTr"]
    assert {"u_00"} <= new["imagesUn"]


def test_tests_are_drawn_among_subjects_without_a_scan_that_is_trained_on(raw, tmp_path):
    drawn = roles(split(4, 604, "all", test=2).folder)["imagesTs"]
    trained = min(drawn)
    groups = subjects(tmp_path / "groups.json", {"u_00": f"s{int(trained[-2:])}"})
    other = roles(split(4, 605, "all", test=2, groups=groups).folder)
    assert trained in other["imagesTr"]
    assert len(other["imagesTs"]) == 2
    assert drawn - {trained} < other["imagesTs"]  # the others are the same ones
    groups.write_text(json.dumps(dict.fromkeys([*(f"l_{i:02d}" for i in range(10)), "u_00"], "one")))
    with pytest.raises(SplitError, match=r"--test 2: no subject without a scan in imagesUn has 2 .*/imagesUn$"):
        split(4, 606, "all", test=2, groups=groups)


@pytest.mark.parametrize(
    ("one", "other"), [("labeled", "val"), ("unlabeled", "val"), ("labeled", "test"), ("val", "test")]
)
def test_a_protocol_that_divides_a_subject_is_refused(raw, tmp_path, one, other):
    lists = {"labeled": ["l_00"], "unlabeled": ["l_01"], "val": ["l_02"], "test": ["l_03"]}
    protocol = tmp_path / "protocol.json"
    protocol.write_text(json.dumps(lists))
    groups = subjects(tmp_path / "groups.json", dict.fromkeys([lists[one][0], lists[other][0]], "both"))
    with pytest.raises(SplitError, match=f"subject 'both' has '{lists[one][0]}' as .* and '{lists[other][0]}' as "):
        split(4, 604, 1, protocol=protocol, groups=groups)
    assert not (raw / "Dataset604_Tiny").exists()
    groups = subjects(tmp_path / "groups.json", {"l_00": "both", "l_01": "both"})
    assert split(4, 604, 1, protocol=protocol, groups=groups).state == "written"


def test_a_missing_label_leaves_its_case_out_and_says_so(raw):
    split_all = split(4, 604, "all")
    assert not any("missing" in note for note in split_all.notes)
    (raw / "Dataset004_Tiny/labelsTr/l_05.nii.gz").unlink()
    report = split(4, 605, "all")
    assert "l_05" not in names(report.folder, "imagesTr")
    assert any("missing" in note and "l_05" in note for note in report.notes)


def test_one_function_links_a_case_with_the_files_that_give_a_tiff_its_spacing(tmp_path):
    images = [tmp_path / f"p.1_0001_000{channel}.tif" for channel in range(2)]
    label = tmp_path / "labels" / "p.1_0001.tif"
    label.parent.mkdir()
    for path in (*images, label, tmp_path / "p.1_0001.json", label.with_suffix(".json")):
        path.touch()

    def outputs(role, path=label):
        return link_case("new", role, images, path, ".tif", tmp_path).outputs

    channels = ("imagesTr/new_0000.tif", "imagesTr/new_0001.tif", "imagesTr/new.json")
    assert outputs("labeled") == (*channels, "labelsTr/new.tif", "labelsTr/new.json")
    assert outputs("unlabeled") == tuple(name.replace("Tr", "Un") for name in channels)
    label.unlink()
    assert outputs("test") == tuple(name.replace("Tr", "Ts") for name in (*channels, "labelsTr/new.json"))
    assert "labelsTr/new.tif" in outputs("labeled")  # reading it will tell that it is missing
    assert outputs("labeled", None) == channels


def test_the_name_of_a_new_data_set_is_on_the_disk_when_it_is_told(raw, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "nnunetv2_dycon.conversion.dataset.sync", lambda folder: synced.append((folder, set(folder.iterdir())))
    )
    folder = split(4, 604, 3).folder
    assert synced[-1][0] == raw
    assert folder in synced[-1][1]
