"""A case name is one component of a path, wherever it is read: nothing outside is written, replaced or deleted."""

import json
from pathlib import Path

import pytest

from nnunetv2_dycon.conversion.cases import link_case
from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.conversion.protocols import read_names, read_protocol
from nnunetv2_dycon.conversion.split import split
from nnunetv2_dycon.data.manifest import unlabeled_status
from nnunetv2_dycon.data.prepare_case import remove_case
from nnunetv2_dycon.data.splits import read_splits
from nnunetv2_dycon.errors import DataError, SplitError, UserError
from nnunetv2_dycon.files import check_case_names
from tests.prepared import ID, NAME, Place, prepare, sources

OUTSIDE = (
    "../../../Dataset900_Other/imagesTr/x",
    "../../../../escaped",
    "/tmp/absolute",
    "..",
    ".hidden",
    "sub/case",
    "a\\b",
    "",
    "two\nlines",
    "nul\0",
)


def everything(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", [*OUTSIDE, ".", 7, None])
def test_a_name_that_is_not_part_of_a_file_name_is_refused_in_one_line(name: object) -> None:
    with pytest.raises(SplitError, match=r"^list\.json names a case .*; rename the case$") as caught:
        check_case_names(["good", name], "list.json", SplitError)
    assert "\n" not in str(caught.value)


def test_names_that_are_in_use_pass() -> None:
    check_case_names(["la_0001", "BraTS19_2013_0_1", "sub-strokecase0001", "P 12 (é)", "x..", "x.y_0001"], "list.json")


@pytest.mark.parametrize("name", OUTSIDE)
def test_split_writes_nothing_for_such_a_name_in_dataset_json(place: Place, name: str) -> None:
    other = place.raw.with_name("Dataset900_Other") / "imagesTr"
    other.mkdir(parents=True)
    (other / "x_0000.nii.gz").write_bytes(b"of others")
    path = place.raw / "dataset.json"
    listed = {
        case: {"images": [f"imagesTr/{source}_0000.nii.gz"], "label": f"labelsTr/{source}.nii.gz"}
        for case, source in (("l_00", "l_00"), (name, "l_01"), ("l_02", "l_02"))
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": listed}))
    before = everything(place.root)
    with pytest.raises(DataError, match=r"dataset\.json names a case"):
        split(ID, 905, 1, processes=1)
    assert everything(place.root) == before
    assert sorted(p.name for p in place.raw.parent.iterdir()) == ["Dataset900_Other", NAME]
    with pytest.raises(DataError, match=r"dataset\.json names a case"):
        check(ID, processes=1)


def test_preparation_deletes_nothing_for_such_a_name_in_the_manifest(place: Place) -> None:
    prepare()
    manifest = json.loads(place.manifest.read_text())
    manifest["cases"]["../nnUNetPlans_3d_fullres/l_00"] = next(iter(manifest["cases"].values()))
    place.manifest.write_text(json.dumps(manifest))
    before = everything(place.root)
    for read in (prepare, lambda: unlabeled_status(ID)):
        with pytest.raises(DataError, match=r"unlabeled\.json names a case '\.\./nnUNet"):
            read()
    with pytest.raises(DataError, match="names a case"):
        remove_case(place.folder, "../nnUNetPlans_3d_fullres/l_00")
    assert everything(place.root) == before


@pytest.mark.parametrize("folder", ["../other", "/tmp/other", "a/b"])
def test_preparation_writes_nothing_where_plans_lead_outside(place: Place, folder: str) -> None:
    place.change_plans(lambda plans, configuration: configuration.update(data_identifier=folder))
    before = everything(place.root)
    with pytest.raises(DataError, match="is not a folder name; type: nnUNetv2_plan_and_preprocess"):
        prepare()
    assert everything(place.root) == before


@pytest.mark.parametrize("key", ["train", "val", "unlabeled"])
def test_folds_with_such_a_name_are_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"], key: ["c", "../d"]}]))
    with pytest.raises(SplitError, match=r"splits_final\.json, fold 0 names a case '\.\./d'"):
        read_splits(tmp_path)


@pytest.mark.parametrize("key", ["labeled", "train", "val", "test"])
def test_protocols_and_lists_with_such_a_name_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "protocol.json"
    path.write_text(json.dumps({"labeled": ["a"], "train": ["a", "b"], key: ["../c"]}))
    with pytest.raises(SplitError, match=r"protocol\.json names a case '\.\./c'"):
        read_protocol(path, str)
    path = tmp_path / "list.txt"
    path.write_text("a\n../c\n")
    with pytest.raises(SplitError, match=r"list\.txt names a case '\.\./c'"):
        read_names(path, str)


def test_no_case_of_a_collection_is_written_under_such_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names a case"):
        link_case("../x", "unlabeled", [tmp_path / "x_0000.nii.gz"], None, ".nii.gz", tmp_path)


@pytest.mark.parametrize(
    "cases", [["u_00"], {"u_00": None}, {"u_00": {"from": "imagesUn"}}, None], ids=["list", "none", "short", "null"]
)
def test_a_manifest_with_other_content_means_that_all_is_prepared_again(place: Place, cases: object) -> None:
    prepare()
    content = sources(place.manifest)
    for broken in ({**content, "cases": cases}, {**content, "plans": ["x"]}):
        place.manifest.write_text(json.dumps(broken))
        assert unlabeled_status(ID).state == "missing"
    prepare()
    assert sources(place.manifest) == content
