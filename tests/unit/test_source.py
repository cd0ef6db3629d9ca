"""Trees are walked whole, without junk and without leaving them; what they look like is said."""

import os
from pathlib import Path

import pytest

from nnunetv2_dycon.conversion.source import inside, list_files, looks_like, match, only
from nnunetv2_dycon.errors import DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root: Path, **options) -> list[str]:
    top, files = list_files(root, **options)
    return [path.relative_to(top).as_posix() for path in files]


def test_files_are_sorted_and_what_systems_leave_is_not_among_them(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.nii", "b/1.nii", "a b/ü.nii.gz", "top.csv")
    touch(tmp_path, "b/._1.nii", ".DS_Store", "Desktop.ini", "b/Thumbs.db", "__MACOSX/b/1.nii", ".git/annex/x.nii")
    assert names(tmp_path) == ["top.csv", "a b/ü.nii.gz", "b/1.nii", "b/2.nii"]


def test_a_source_inside_the_collection_stands_for_the_collection(tmp_path: Path) -> None:
    touch(tmp_path, "c/Training/img/1.nii", "c/Training/label/1.nii", "other/x")
    inner = ("img", "label", "training")
    for place in ("c", "c/Training", "c/Training/img"):
        assert list_files(tmp_path / place, inner)[0] == tmp_path / "c"
    assert list_files(tmp_path / "c/Training")[0] == tmp_path / "c/Training"


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    with pytest.raises(DataError, match="is a file; give the folder"):
        list_files(tmp_path / "file")
    with pytest.raises(DataError, match="does not exist; give the folder"):
        list_files(tmp_path / "none")


def test_links_are_followed_inside_and_refused_outside_and_circles_end(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "real/1.nii")
    touch(tmp_path, "outside/2.nii")
    (root / "circle").symlink_to(root)
    (root / "real" / "up").symlink_to(root / "real")
    assert names(root) == ["real/1.nii"]
    (root / "zlink").symlink_to("real", target_is_directory=True)
    assert names(root) == ["real/1.nii"]  # once
    (root / "away").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"away is a link that leaves .*root \(to .*outside\)"):
        list_files(root)


def test_a_used_link_must_lead_to_something_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "real.nii", "folder/a.dcm")
    touch(tmp_path, "root2/outside.nii")  # a neighbour whose name begins alike
    for name, target in (
        ("good", "real.nii"),
        ("gone", "none.nii"),
        ("away", "../root2/outside.nii"),
        ("self", "self"),
        ("folder/b.dcm", "../../root2/outside.nii"),
    ):
        (root / name).symlink_to(target)
    assert inside(root / "good", root) == root / "good"
    assert inside(root / "real.nii", root) == root / "real.nii"
    for name, words in (("gone", "does not exist"), ("away", "leaves"), ("self", "does not exist")):
        with pytest.raises(DataError, match=f"{name} is a link .*{words}"):
            inside(root / name, root)
    with pytest.raises(DataError, match=r"b\.dcm is a link that leaves"):  # a folder stands for its files
        inside(root / "folder", root)


def test_a_source_that_is_itself_a_link_is_its_folder(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path, "root/store/1.nii")
    (tmp_path / "root" / "used").symlink_to("store")
    (tmp_path / "link").symlink_to("root")
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "link", "link", "root"):
        top, files = list_files(source)
        assert (top, len(files)) == (tmp_path / "root", 1)


def test_names_are_matched_whole_and_whatever_their_case() -> None:
    files = [Path(n) for n in ("x/IMG0001.NII.GZ", "img0002.nii", "img0003.nii.gz.part", "aimg0004.nii")]
    assert [(p.name, fit[1]) for p, fit in match(files, r"img(\d{4})\.nii(?:\.gz)?")] == [
        ("IMG0001.NII.GZ", "0001"),
        ("img0002.nii", "0002"),
    ]


def test_two_files_of_a_case_are_named_both_whatever_the_spelling_of_the_case() -> None:
    assert only("x", [("a", Path("1")), ("b", Path("2"))]) == {"a": Path("1"), "b": Path("2")}
    with pytest.raises(DataError, match="a has two files for the mask: 1 and 2; remove one"):
        only("the mask", [("a", Path("1")), ("A", Path("2"))])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rawdata/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_dwi.nii.gz", "ISLES-2022; type: .*ISLES22"),
        ("HGG/BraTS19_2013_0_1/BraTS19_2013_0_1_t1ce.nii", "BraTS; type: .*BraTS19"),
        ("Training Set/06SR5RBREL16DQ6M8LWS/lgemri.nrrd", "LA .*type: .*convert LA"),
        ("2018LA/06SR5RBREL16DQ6M8LWS/mri_norm2.h5", "LA .*type: .*convert LA"),
        ("Pancreas-CT/PANCREAS_0001/a/b/1-01.dcm", "Pancreas-NIH; type: .*PancreasNIH"),
        ("image/image0001.nii.gz", "Pancreas-NIH; type: .*PancreasNIH"),
        ("image0001_norm.h5", "Pancreas-NIH; type: .*PancreasNIH"),
        ("img/img0001.nii.gz", "BTCV; type: .*convert BTCV"),
        ("test_vol_h5/case0001.npy.h5", "TransUNet.*cannot be converted"),
        ("btcv_h5/0001.h5", "preprocessed BTCV.*cannot be converted"),
        ("npy/0001_image.npy", "preprocessed BTCV.*cannot be converted"),
        ("data/BraTS2019/data/BraTS19_2013_0_1.h5", "preprocessed BraTS.*cannot be converted"),
        ("case_001.h5", "preprocessed ISLES-2022.*cannot be converted"),
        ("Task04_Hippocampus/dataset.json", "Decathlon data set; .*nnUNetv2_convert_MSD_dataset -i .*split"),
        ("Dataset004_X/dataset.json", "Decathlon data set; type: nnUNetv2_dycon split -d 4 --as [0-9]+ --labeled 0.1$"),
        ("a/holiday.jpg", "it holds, for example, a/holiday.jpg"),
    ],
)
def test_a_tree_is_recognised_by_its_names(tmp_path: Path, name: str, words: str) -> None:
    from re import search

    assert search(words, looks_like(tmp_path, [tmp_path / name]))


def test_btcv_is_recognised_though_its_labels_are_called_like_those_of_the_pancreas(tmp_path: Path) -> None:
    files = [tmp_path / "labelsTr" / "label0001.nii.gz", tmp_path / "imagesTr" / "img0001.nii.gz"]
    assert "BTCV" in looks_like(tmp_path, files)


def test_what_was_asked_for_is_not_advised_again(tmp_path: Path) -> None:
    files = [tmp_path / "x" / "laendo.nrrd"]
    assert "type" not in looks_like(tmp_path, files, "LA")
    assert "without the images" in looks_like(tmp_path, files, "LA")
    assert "convert LA" in looks_like(tmp_path, files, "BTCV")
    assert looks_like(tmp_path, []) == "the folder is empty; give the folder that holds the collection"


def test_the_order_of_files_does_not_depend_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path, "b/1", "a/2", "a/1", "c/3")
    expected = names(tmp_path)
    walk = os.walk

    def backwards(*args, **kwargs):
        for folder, folders, files in walk(*args, **kwargs):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert names(tmp_path) == expected
