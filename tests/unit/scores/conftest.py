"""Truth and predictions of a made-up data set."""

from pathlib import Path

import pytest

from tests.label_maps import label_map, write, write_dataset


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Truth and prediction of three cases, and the dataset.json next to the truth."""
    write_dataset(tmp_path)
    truth, prediction = tmp_path / "labelsTs", tmp_path / "predicted"
    for number, case in enumerate("abc"):
        write(truth / f"{case}.nii.gz", label_map(number))
        write(prediction / f"{case}.nii.gz", label_map(number + 10))
    return truth, prediction
