"""Self-training on data of every file ending that nnU-Net reads."""

import json
from pathlib import Path

import pytest

from tests.datasets import environment, make_dataset, plan_and_preprocess, reformat, write_splits
from tests.rounds import NAME, ROUNDS, Commands, Killed, raw, splits, start

FORMATS = {  # ending, whether 2-D, and the reader in dataset.json
    "nii.gz": (".nii.gz", False, None),
    "nii.gz by nibabel": (".nii.gz", False, "NibabelIO"),
    "nii": (".nii", False, None),
    "nii reoriented": (".nii", False, "NibabelIOWithReorient"),
    "nrrd": (".nrrd", False, None),
    "mha": (".mha", False, None),
    "gipl": (".gipl", False, None),
    "tif 3-D": (".tif", False, None),
    "tiff 3-D": (".tiff", False, None),
    "tif 2-D": (".tif", True, None),
    "png": (".png", True, None),
    "bmp": (".bmp", True, None),
}


@pytest.fixture
def planned(tmp_path, monkeypatch, request):
    """A planned and preprocessed data set in another format."""
    ending, flat, reader = FORMATS[request.param]
    names = make_dataset(tmp_path, shape=(16, 16, 16), test=1)
    write_splits(tmp_path, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    if (ending, reader) != (".nii.gz", "SimpleITKIO"):
        reformat(tmp_path, ending, flat=flat, reader=reader)
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    configuration = "2d" if flat else "3d_fullres"
    plan_and_preprocess(configurations=(configuration,))
    return tmp_path, configuration, ending


def plans(root: Path, name: str = NAME) -> dict:
    return json.loads((root / "nnUNet_preprocessed" / name / "nnUNetPlans.json").read_text())


@pytest.mark.parametrize("planned", FORMATS, indirect=True)
def test_a_round_keeps_the_reader_of_the_data_set_and_makes_half_written_pseudo_labels_again(planned, monkeypatch):
    root, configuration, ending = planned
    with pytest.raises(Killed):
        start(monkeypatch, root, commands=Commands(root, kill_at=1), configuration=configuration)
    _, commands = start(monkeypatch, root, configuration=configuration)
    assert [words[0].removeprefix("nnUNetv2_") for words in commands.seen] == [
        *("predict", "move_plans_between_datasets", "preprocess", "train")
    ]
    assert plans(root, ROUNDS[0]) == {**plans(root), "dataset_name": ROUNDS[0]}
    assert splits(root)[0]["train"] == ["l_00", "l_01", "l_02", "u_00", "u_01", "u_02"]
    labels = raw(root) / "labelsTr"
    assert {path.name for path in labels.glob(f"*{ending}")} >= {f"u_{number:02d}{ending}" for number in range(3)}
    if "tif" in ending and configuration != "2d":
        assert (labels / "u_00.json").is_file()
        assert (raw(root) / "imagesTr" / "u_00.json").is_file()
