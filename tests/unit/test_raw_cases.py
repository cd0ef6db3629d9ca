"""Which labels may be opened, and what a mistyped case is answered with."""

import json
from pathlib import Path

import pytest

from nnunetv2_dycon.data.raw_cases import raw_cases
from nnunetv2_dycon.errors import DataError
from tests.datasets import make_dataset


def test_truth_is_that_of_labelled_and_test_cases_but_not_of_those_used_without(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    make_dataset(tmp_path, shape=(8, 8, 8))
    raw = tmp_path / "nnUNet_raw" / "Dataset901_Tiny"
    content = json.loads((raw / "dataset.json").read_text())
    assert raw_cases(raw, content).truth("l_02") == raw / "labelsTr" / "l_02.nii.gz"
    folds = [{"train": ["l_00"], "val": ["l_01"], "unlabeled": ["l_02"]}, {"train": ["l_00"], "val": ["l_03"]}]
    (raw / "splits_final.json").write_text(json.dumps(folds))
    cases = raw_cases(raw, content)
    assert cases.truth("l_00") == raw / "labelsTr" / "l_00.nii.gz"
    assert cases.truth("t_01") == raw / "labelsTs" / "t_01.nii.gz"
    assert cases.truth("l_02") is None
    assert cases.truth("u_00") is None
    assert cases.labeled == ("l_00", "l_01", "l_03")
    (raw / "labelsTs" / "t_01.nii.gz").unlink()
    assert cases.truth("t_01") is None
    assert cases.check(["u_00", "t_00"]) == ("u_00", "t_00")
    with pytest.raises(DataError, match=r"has no case 'u_0'; the nearest names are u_0\d, u_0\d, u_0\d$"):
        cases.check(["u_0"])
