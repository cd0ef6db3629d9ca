"""The generated data set: its statistics, its determinism, and who gets which file."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from scipy.ndimage import binary_dilation, binary_erosion, label

from nnunetv2_dycon import phantom
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.phantom import make_case, write_phantom

SMALL = {"shape": (20, 24, 18), "processes": 1, "seed": 2000}


@pytest.fixture(scope="module")
def thirty() -> list[tuple[np.ndarray, np.ndarray]]:
    return [make_case(1000 + i, i % 3) for i in range(30)]


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_raw"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def volume(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


# ---- a case ----------------------------------------------------------------------------------------------


def test_lesion_volumes_have_the_intended_distribution(thirty):
    volumes = np.array([mask.sum() for _, mask in thirty])
    assert 200 < np.median(volumes) < 700
    assert 900 < np.percentile(volumes, 95) < 3500
    assert volumes.max() < 5500
    assert 0.003 < np.mean([mask.mean() for _, mask in thirty]) < 0.010


def test_lesions_are_few_to_many_and_mostly_small(thirty):
    counts, sizes = [], []
    for _, mask in thirty:
        parts, count = label(mask)
        counts.append(count)
        sizes += np.bincount(parts.ravel())[1:].tolist()
    assert 2 <= np.median(counts) <= 6
    assert 5 <= max(counts) <= 30
    assert 8 < np.median(sizes) < 80
    assert np.percentile(sizes, 95) > 300


def test_about_three_of_a_hundred_cases_have_no_lesion():
    empty = sum(not make_case(seed, 0, shape=(16, 16, 16))[1].any() for seed in range(300))
    assert 2 <= empty <= 20


def test_images_are_int16_and_zero_outside_the_head(thirty):
    for image, mask in thirty[:6]:
        assert (image.dtype, mask.dtype, image.shape) == (np.int16, np.uint8, (1, 48, 56, 40))
        assert image.min() == 0
        assert (image[0][:3, :3, :3] == 0).all()
        assert (image[0][mask > 0] > 0).mean() > 0.99
        assert 0.25 < (image > 0).mean() < 0.5
        assert set(np.unique(mask)) <= {0, 1}


def test_lesions_are_brighter_than_their_surroundings(thirty):
    for image, mask in (case for case in thirty if case[1].sum() > 100):
        around = binary_dilation(mask, iterations=5) & ~binary_dilation(mask, iterations=3)
        assert image[0][mask > 0].mean() > 1.2 * image[0][around & (image[0] > 0)].mean()


def test_scanners_differ_in_scale(thirty):
    level = [np.mean([np.median(im[im > 0]) for im, _ in thirty[s::3]]) for s in range(3)]
    assert 1.5 * level[1] < level[0] < level[2]


def test_a_case_is_a_function_of_its_arguments():
    first, again, other = make_case(7, 0), make_case(7, 0), make_case(8, 0)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).any()
    assert (first[0] != make_case(7, 1)[0]).any()


def test_the_second_channel_changes_nothing_in_the_first():
    (one, label_one), (two, label_two) = make_case(1012, 0), make_case(1012, 0, channels=2)
    assert two.shape == (2, 48, 56, 40)
    assert (two[0] == one[0]).all()
    assert (label_one == label_two).all()


def test_diffusion_is_restricted_in_lesions_and_free_in_fluid():
    image, mask = make_case(1012, 0, channels=2)
    inside = binary_erosion(mask, iterations=2)
    tissue = binary_erosion(image[0] > 0, iterations=8) & ~binary_dilation(mask, iterations=4)
    assert image[1][inside].mean() < 0.6 * np.median(image[1][tissue])
    assert np.percentile(image[1][tissue], 99.5) > 1.5 * np.median(image[1][tissue])


def test_hard_cases_have_smaller_and_fainter_lesions():
    def gap(image, mask):
        return image[0][mask > 0].mean() / np.median(image[0][image[0] > 0])

    pairs = [(make_case(s, 0), make_case(s, 0, hard=True)) for s in range(1000, 1018, 3)]
    assert np.median([h[1].sum() for _, h in pairs]) < np.median([n[1].sum() for n, _ in pairs])
    assert np.mean([gap(*h) for _, h in pairs]) < np.mean([gap(*n) for n, _ in pairs])


# ---- a data set ------------------------------------------------------------------------------------------


def test_every_role_has_its_files_and_unlabeled_cases_have_no_label(raw):
    folder = write_phantom(7, cases=12, labeled=2, test=4, channels=2, **SMALL)
    assert folder == raw / "Dataset007_Phantom"
    roles = {k: v["role"] for k, v in json.loads((folder / "conversion.json").read_text())["cases"].items()}
    expected = {"dataset.json", "splits_final.json", "conversion.json"}
    for case, role in roles.items():
        sub = {"labeled": "Tr", "unlabeled": "Un", "test": "Ts"}[role]
        expected |= {f"images{sub}/{case}_{channel:04d}.nii.gz" for channel in range(2)}
        expected |= {f"labels{sub}/{case}.nii.gz"} if role != "unlabeled" else set()
    assert set(files(folder)) == expected
    assert sorted(roles.values()) == ["labeled"] * 2 + ["test"] * 4 + ["unlabeled"] * 6
    assert [case for case, role in roles.items() if role == "test"] == [f"phantom_{i:03d}" for i in range(8, 12)]
    assert [p.name for p in raw.iterdir()] == [folder.name]


def test_files_hold_the_case_of_that_seed_on_a_3_mm_grid(raw):
    folder = write_phantom(7, cases=9, labeled=2, test=3, **SMALL)
    image, mask = make_case(2007, 1, shape=SMALL["shape"])
    stored = nib.load(folder / "imagesTs/phantom_007_0000.nii.gz")
    assert (np.asanyarray(stored.dataobj) == image[0]).all()
    assert stored.get_data_dtype() == np.int16
    assert (stored.affine == np.diag([3, 3, 3, 1])).all()
    assert (volume(folder / "labelsTs/phantom_007.nii.gz") == mask).all()


def test_labeled_cases_come_from_one_scanner_and_have_a_lesion(raw):
    folder = write_phantom(7, cases=40, labeled=6, labeled_scanner=2, test=4, **SMALL)
    labels = sorted((folder / "labelsTr").iterdir())
    assert len(labels) == 6
    assert {int(p.name[8:11]) % 3 for p in labels} == {2}
    assert all(volume(p).any() for p in labels)


def test_a_case_without_lesion_is_never_labeled():
    settings = phantom.Phantom(cases=12, test=0, labeled=2, seed=1000, shape=(20, 24, 18))
    empty = {i for i in range(0, 12, 3) if not settings.make(i)[1].any()}
    assert len(empty) == 2
    assert {i for i, role in enumerate(settings.roles()) if role == "labeled"} == {0, 3, 6, 9} - empty


def test_labeled_cases_of_all_scanners_are_taken_in_turn(raw):
    folder = write_phantom(7, cases=30, labeled=6, labeled_scanner="all", test=3, **SMALL)
    scanners = sorted(int(p.name[8:11]) % 3 for p in (folder / "labelsTr").iterdir())
    assert scanners == [0, 0, 1, 1, 2, 2]


def test_a_case_does_not_depend_on_how_many_are_made(raw):
    few = write_phantom(7, cases=9, labeled=2, test=1, **SMALL)
    many = write_phantom(8, cases=15, labeled=2, test=7, **SMALL)
    few_images, many_images = ({p.name: p for p in d.glob("images*/*.gz")} for d in (few, many))
    assert len(few_images) == 9
    assert all((volume(p) == volume(many_images[name])).all() for name, p in few_images.items())


def test_more_labels_keep_the_earlier_ones():
    chosen = [
        {i for i, role in enumerate(phantom.Phantom(labeled=n, shape=(16, 16, 16)).roles()) if role == "labeled"}
        for n in (2, 4, 8)
    ]
    assert chosen[0] < chosen[1] < chosen[2]


def test_the_number_of_processes_changes_no_byte(raw):
    options = {"cases": 6, "labeled": 2, "test": 2, "labeled_scanner": "all", "shape": (16, 16, 16)}
    one, two = write_phantom(7, processes=1, **options), write_phantom(8, processes=2, **options)
    assert files(one) == files(two)


def test_stock_nnunet_finds_the_labeled_cases_and_fold_0_uses_each_of_them(raw):
    folder = write_phantom(7, cases=9, labeled=3, test=2, labeled_scanner="all", **SMALL)
    found = get_filenames_of_train_images_and_targets(str(folder))
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    assert sorted(found) == sorted(fold["train"]) == sorted(fold["val"])
    assert len(found) == json.loads((folder / "dataset.json").read_text())["numTraining"] == 3


# ---- what can go wrong -----------------------------------------------------------------------------------


def test_a_failure_half_way_leaves_nothing_behind(raw, monkeypatch):
    monkeypatch.setattr(phantom, "_write_descriptions", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(DataError, match="disk full"):
        write_phantom(7, cases=6, labeled=2, test=2, labeled_scanner="all", **SMALL)
    assert list(raw.iterdir()) == []


def test_an_existing_phantom_is_replaced_only_when_asked(raw, caplog):
    options = {"cases": 6, "labeled": 2, "test": 2, "labeled_scanner": "all", **SMALL}
    folder = write_phantom(7, **options)
    before = files(folder)
    with pytest.raises(DataError, match=r"Dataset007_Phantom exists; .* --overwrite"):
        write_phantom(7, **options)
    assert files(folder) == before
    (raw.parent / "nnUNet_preprocessed" / folder.name).mkdir()
    write_phantom(7, overwrite=True, **{**options, "seed": 1})
    assert files(folder) != before
    assert "delete it and plan again" in caplog.text
    assert [p.name for p in raw.iterdir()] == [folder.name]


def test_a_folder_that_we_did_not_write_is_never_replaced(raw):
    mine = raw / "Dataset007_Phantom" / "precious.txt"
    mine.parent.mkdir()
    mine.write_text("scans")
    with pytest.raises(DataError, match="left alone"):
        write_phantom(7, overwrite=True, cases=6, labeled=2, test=2, labeled_scanner="all", **SMALL)
    assert mine.read_text() == "scans"


@pytest.mark.parametrize("where", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_an_id_of_another_data_set_is_refused(raw, where):
    (raw.parent / where / "Dataset007_Liver").mkdir()
    with pytest.raises(DataError, match=r"-d 7 belongs to .*Dataset007_Liver; choose a free id: -d 8$"):
        write_phantom(7, overwrite=True, **SMALL)


def test_an_unset_raw_folder_is_named_with_what_to_type(monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(DataError, match="nnUNet_raw is not set; type: export"):
        write_phantom(7)


def test_a_raw_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "file" / "raw"))
    with pytest.raises(DataError, match=r"cannot write .*file/raw"):
        write_phantom(7, cases=6, labeled=2, test=2, labeled_scanner="all", **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": 60}, "test is 60: give 0 to 59"),
        ({"labeled": 1}, "labeled is 1: give 2 or more"),
        ({"labeled_scanner": 3}, "give 0, 1, 2 or all"),
        ({"channels": 3}, "give 1 .DWI. or 2"),
        ({"shape": (8, 20, 20)}, "three numbers of 16 or more"),
        ({"seed": -1}, "give 0 or more"),
        (
            {"cases": 12, "test": 3, "labeled": 9, "shape": (16, 16, 16)},
            "labeled is 9, but of the 3 cases of scanner 0",
        ),
    ],
)
def test_a_bad_setting_is_one_line_that_says_what_to_give(raw, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        write_phantom(7, **options)
    assert "\n" not in str(caught.value)
    assert list(raw.iterdir()) == []


@pytest.mark.parametrize("dataset_id", [0, 1000])
def test_an_id_that_nnunet_cannot_number_is_refused(raw, dataset_id):
    with pytest.raises(ConfigError, match="a number from 1 to 999"):
        write_phantom(dataset_id)
