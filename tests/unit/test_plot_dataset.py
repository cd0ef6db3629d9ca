"""The numbers of the picture of a data set, by hand and against a slow count, and whose labels it opens."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.pictures.canvas import save_figure
from nnunetv2_dycon.pictures.dataset import draw_dataset, pieces_of, plot_dataset
from tests.datasets import environment, make_dataset

DATASET = "Dataset901_Tiny"


def flood(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[list[float], float]:
    """Volumes and scatter by a walk from voxel to voxel."""
    left = {tuple(map(int, at)) for at in np.argwhere(mask)}
    volumes, centers = [], []
    while left:
        piece, edge = set(), [left.pop()]
        while edge:
            at = edge.pop()
            piece.add(at)
            near = {tuple(np.add(at, step)) for step in np.ndindex(*[3] * mask.ndim)}
            near = {tuple(int(i) - 1 for i in one) for one in near} & left
            left -= near
            edge += near
        volumes.append(len(piece) * math.prod(spacing) / 1000)
        centers.append(np.mean([np.multiply(at, spacing) for at in piece], axis=0))
    middle = np.mean(centers, axis=0)
    return sorted(volumes, reverse=True), float(np.mean([math.dist(center, middle) for center in centers]))


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_those_of_a_slow_count_on_anisotropic_voxels(seed: int) -> None:
    spacing = (5.0, 0.7, 1.3)
    mask = np.random.default_rng(seed).random((7, 9, 8)) < 0.06
    volumes, share, scatter = pieces_of(mask, spacing, 300)
    expected, mean = flood(mask, spacing)
    assert volumes == pytest.approx(expected)
    assert share == mask.sum() / 300
    assert scatter == pytest.approx(mean)


def test_volumes_in_ml_by_hand() -> None:
    """Three voxels of 2 x 3 x 5 mm are 0.09 ml, one is 0.03 ml; their centroids are 3 voxels of 3 mm apart."""
    mask = np.zeros((1, 5, 3), bool)
    mask[0, 0, :] = True
    mask[0, 3, 1] = True
    volumes, _, scatter = pieces_of(mask, (2.0, 3.0, 5.0), mask.size)
    assert volumes == pytest.approx((0.09, 0.03))
    assert scatter == pytest.approx(4.5)
    none = pieces_of(np.zeros((2, 2), bool), (1.0, 1.0), 4)
    assert none[:2] == ((), 0.0)
    assert math.isnan(none[2])


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_dataset(tmp_path, shape=(8, 10, 12))
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    return tmp_path / "nnUNet_raw" / DATASET


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_the_table_has_a_line_for_each_labelled_case_and_structure(raw: Path, tmp_path: Path) -> None:
    (figure,), files = plot_dataset(901, tmp_path / "out", processes=1)
    assert sorted(path.name for path in files) == [
        *("dataset.csv", "dataset.png", "dataset.svg", "dataset_pieces.csv"),
    ]
    assert all(path.stat().st_size for path in files)
    table = rows(tmp_path / "out" / "dataset.csv")
    assert [(row["case"], row["structure"]) for row in table] == [
        (f"l_0{i}", name) for i in range(4) for name in ("class1", "class2")
    ]
    for row in table[:2]:
        label = sitk.ReadImage(str(raw / "labelsTr" / "l_00.nii.gz"))
        voxels = int((sitk.GetArrayFromImage(label) == int(row["structure"][-1])).sum())
        assert float(row["volume (ml)"]) == pytest.approx(voxels * math.prod(label.GetSpacing()) / 1000, rel=1e-4)
        assert float(row["share of the image (%)"]) == pytest.approx(100 * voxels / (8 * 10 * 12), rel=1e-4)
    assert len(figure.axes) == 4


def test_no_label_of_a_case_without_one_is_opened(raw: Path, tmp_path: Path) -> None:
    """Of test cases and of cases that a fold uses without labels, and of no unlabelled case, whatever lies there."""
    fold = {"train": ["l_00"], "val": ["l_01"], "unlabeled": ["l_02", "l_03"]}
    (raw / "splits_final.json").write_text(json.dumps([fold]))
    for case in ("l_02", "l_03"):
        (raw / "labelsTr" / f"{case}.nii.gz").write_bytes(b"not to be opened")
    plot_dataset(901, tmp_path / "out", processes=1)
    assert {row["case"] for row in rows(tmp_path / "out" / "dataset.csv")} == {"l_00", "l_01"}


def test_a_data_set_without_labels_is_one_line(raw: Path, tmp_path: Path) -> None:
    for path in (raw / "labelsTr").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="labelsTr has no label map of a labelled case"):
        plot_dataset(901, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_and_many_structures_can_be_drawn(tmp_path: Path) -> None:
    from nnunetv2_dycon.pictures.dataset import Pieces

    nothing = [Pieces("a", "x", (), 0.0, math.nan)]
    many = [Pieces(f"c{i}", f"organ_{n}", (0.1 * (n + 1), 0.01), 0.01 * n, 3.0) for n in range(15) for i in range(3)]
    for name, pieces in (("nothing", nothing), ("many", many)):
        assert len(save_figure(draw_dataset(pieces, "D_$x$"), tmp_path, name)) == 2


def test_pictures_are_the_same_each_time(raw: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        plot_dataset(901, tmp_path / name, processes=1)
    for ending in ("png", "svg", "csv"):
        path = f"dataset.{ending}"
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
