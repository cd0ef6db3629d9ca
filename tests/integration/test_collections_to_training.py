"""Each converted collection through nnU-Net's own check, planning and preprocessing; one of them through a training."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.dataset_conversion import converter
from tests import collections
from tests.datasets import environment, no_pools, plan_and_preprocess
from tests.training import begin, make_trainer, steps

pytestmark = pytest.mark.slow

COLLECTIONS = {
    "ISLES22": (collections.isles, {"labeled": 10, "modalities": ("dwi", "adc")}),
    "BraTS19": (collections.brats, {"labeled": 25, "modalities": (), "labels": "multi"}),
    "LA": (collections.la_h5, {"labeled": 8}),
    "PancreasNIH": (collections.pancreas_dicom, {"labeled": 6}),
    "BTCV": (collections.btcv, {"labeled": 4}),
}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in environment(tmp_path).items():
        Path(folder).mkdir()
        monkeypatch.setenv(name, folder)
    return tmp_path / "nnUNet_raw"


def convert(name: str, source: Path) -> Path:
    generate, options = COLLECTIONS[name]
    generate(source)
    return converter(name).convert_collection(source, processes=1, **options).folder


@pytest.mark.parametrize("name", COLLECTIONS)
def test_nnunet_and_the_unlabeled_preprocessing_take_what_is_written(raw, tmp_path, name) -> None:
    folder = convert(name, tmp_path / "source")
    number = int(folder.name[7:10])
    assert [one for one in check(number, processes=1) if not one.ok] == []
    with no_pools(), contextlib.redirect_stdout(io.StringIO()):
        verify_dataset_integrity(str(folder), 1)
    preprocessed = plan_and_preprocess(number)
    assert json.loads((preprocessed / "splits_final.json").read_text()) == json.loads(
        (folder / "splits_final.json").read_text()
    )
    (unlabeled,) = preprocess_unlabeled(number, processes=1)
    hidden = {path.name.removesuffix("_0000.nii.gz") for path in (folder / "imagesUn").glob("*_0000.nii.gz")}
    assert hidden
    assert {path.stem for path in unlabeled.glob("*.pkl")} == hidden


def test_a_converted_collection_trains(raw, tmp_path) -> None:
    folder = convert("ISLES22", tmp_path / "source")
    plan_and_preprocess(501)
    preprocess_unlabeled(501, processes=1)
    run = begin(make_trainer("nnUNetTrainerDyCON_epochs2_iters2_seed0", dataset=folder.name))
    losses = [step["loss"] for step in steps(run, 3)]
    assert np.isfinite(losses).all()
    run.on_train_end()
