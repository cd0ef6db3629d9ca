"""Prepared cases in any of nnU-Net's formats, whole, damaged and malicious, as a training reads them."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunetv2_dycon.data.checked_cases import CaseReader, CheckedCases, check_properties, folder_reader
from nnunetv2_dycon.errors import DataError
from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits
from tests.training import begin, make_trainer, steps

NAME = "nnUNetTrainerMeanTeacher_epochs1_iters2_valiters1"
COMMAND = "type: nnUNetv2_preprocess -d 901 -c 3d_fullres (then train on with --c)"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reading")
    names = make_dataset(root)
    write_splits(root, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=root)
    return root


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared labelled cases of a copy of the data set, with nnU-Net's folders set."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "nnUNet_preprocessed" / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres"


def as_numpy(folder: Path, *, unpacked: bool = False) -> None:
    """Write the cases as nnU-Net before 2.6 did: .npz, and .npy after a first training."""
    for case in nnUNetDatasetBlosc2.get_identifiers(str(folder)):
        data, seg, _, properties = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
        nnUNetDatasetNumpy.save_case(data[:], seg[:], properties, str(folder / case))
        if unpacked:
            np.save(folder / f"{case}.npy", data[:])
            np.save(folder / f"{case}_seg.npy", seg[:])
    for path in folder.glob("*.b2nd"):
        path.unlink()


def replace(path: Path, change: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(change(content))


def one_line(caught: pytest.ExceptionInfo[DataError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "halved": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: np.random.default_rng(0).bytes(len(content)),
}


@pytest.mark.parametrize("unpacked", [False, True])
def test_labelled_cases_of_an_older_nnunet_train_with_unlabelled_ones_of_this(folder: Path, unpacked: bool) -> None:
    same_patches = steps(begin(make_trainer(f"{NAME}_seed3")), 1)
    as_numpy(folder, unpacked=unpacked)
    t = make_trainer(f"{NAME}_seed3")
    t.initialize()
    t.dataset_class.unpack_dataset = lambda *_, **__: None  # starts a process
    done = steps(begin(t), 1)
    for key in ("data", "unlabeled"):
        assert (done[0][key] == same_patches[0][key]).all()


@pytest.mark.parametrize("format_", ["b2nd", "npz", "npy"])
def test_what_is_cut_out_of_a_case_may_be_written_to(folder: Path, format_: str) -> None:
    """nnU-Net's transforms do so; with the files of an older nnU-Net that ended the process."""
    whole = nnUNetDatasetBlosc2(str(folder), ["l_00"]).load_case("l_00")[0][:]
    if format_ != "b2nd":
        as_numpy(folder, unpacked=format_ == "npy")
    data, seg, previous, _ = folder_reader(folder, "x")(str(folder)).load_case("l_00")
    assert previous is None
    for array in (data, seg):
        part = array[:, 2:5, 3:6]
        assert part.flags.writeable
    assert (data[:, 2:5, 3:6] == whole[:, 2:5, 3:6]).all()
    data[:, 2:5, 3:6][:] = 0


@pytest.mark.parametrize("format_", ["b2nd", "npz", "npy"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_labelled_cases_stop_a_training_before_it_begins(folder: Path, format_: str, kind: str) -> None:
    suffixes = {"b2nd": (".b2nd", "_seg.b2nd", ".pkl"), "npz": (".npz", ".pkl"), "npy": (".npy", "_seg.npy", ".pkl")}
    if format_ != "b2nd":
        as_numpy(folder, unpacked=format_ == "npy")
    t = make_trainer(NAME)
    t.initialize()
    for case in ("l_01", "l_03"):  # of training and of validation
        for suffix in suffixes[format_]:
            path = folder / f"{case}{suffix}"
            whole = path.read_bytes()
            replace(path, DAMAGE[kind])
            with pytest.raises(DataError) as caught:
                t.get_dataloaders()
            path.write_bytes(whole)
            text = one_line(caught)
            assert text.startswith(f"{folder / case}: the prepared case cannot be read (")
            assert text.endswith(COMMAND)


@pytest.mark.parametrize("suffix", [".b2nd", "_seg.b2nd", ".pkl"])
def test_a_case_that_goes_in_mid_training_is_named(folder: Path, suffix: str) -> None:
    t = begin(make_trainer(NAME))
    (folder / f"l_02{suffix}").unlink()
    with pytest.raises(DataError) as caught:
        steps(t, 50)
    assert "l_02: the prepared case cannot be read (" in one_line(caught)
    assert f"l_02{suffix}" in one_line(caught).split("(")[1]
    assert "--c" in one_line(caught)


def test_a_damaged_case_stops_the_final_validation_with_its_name(folder: Path) -> None:
    t = begin(make_trainer(NAME))
    replace(folder / "l_03.b2nd", DAMAGE["halved"])
    with pytest.raises(DataError, match=r"l_03: the prepared case cannot be read"):
        t.perform_actual_validation()


def test_a_case_whose_parts_do_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    data, seg, _, properties = nnUNetDatasetBlosc2(str(folder), ["l_00"]).load_case("l_00")
    (tmp_path / "mixed").mkdir()
    nnUNetDatasetNumpy.save_case(data[:], seg[:, 1:], properties, str(tmp_path / "mixed" / "a"))
    nnUNetDatasetNumpy.save_case(data[:], seg[:], {"spacing": (1, 1, 1)}, str(tmp_path / "mixed" / "b"))
    cases = CaseReader(nnUNetDatasetNumpy, "x")(str(tmp_path / "mixed"))
    with pytest.raises(DataError, match="differ in shape"):
        cases.load_case("a")
    with pytest.raises(DataError, match="no class_locations"):
        cases.load_case("b")


def test_cases_are_opened_for_as_long_as_is_said(folder: Path) -> None:
    cases = folder_reader(folder, "x")(str(folder))
    assert cases.open_some(60) == 4
    replace(folder / "l_01.b2nd", DAMAGE["empty"])
    assert cases.open_some(-1) == 0


def test_cases_of_training_and_validation_are_opened_before_a_training(folder: Path, monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(CheckedCases, "open_some", lambda self, seconds: opened.extend(self.identifiers))
    begin(make_trainer(NAME))
    assert sorted(opened) == ["l_00", "l_01", "l_02", "l_03"]


def test_the_command_can_be_typed_whatever_the_name_of_the_case(folder: Path) -> None:
    cases = CaseReader(nnUNetDatasetBlosc2, "mend CASE")(str(folder), ["l 00"])
    with pytest.raises(DataError, match=r"type: mend 'l 00' \("):
        cases.load_case("l 00")


def test_too_little_memory_is_no_fault_of_a_case(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr("nnunetv2_dycon.data.checked_cases.check_properties", refuse)
    with pytest.raises(MemoryError):
        CaseReader(nnUNetDatasetBlosc2, "x")(str(folder)).load_case("l_00")


def test_a_file_that_may_not_be_read_is_not_prepared_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("nnunetv2_dycon.data.checked_cases.check_properties", refuse)
    with pytest.raises(DataError, match=r"l_00\.pkl: Permission denied; mend that, and train on with --c") as caught:
        CaseReader(nnUNetDatasetBlosc2, "command CASE")(str(folder)).load_case("l_00")
    assert "command" not in one_line(caught)


def test_unpacking_an_older_format_names_the_damaged_case(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_numpy(folder)
    replace(folder / "l_02.npz", DAMAGE["halved"])

    def unpack(*_: object, **__: object) -> None:
        raise ValueError("as from a process of nnU-Net's pool")

    monkeypatch.setattr(nnUNetDatasetNumpy, "unpack_dataset", unpack)
    reader = CaseReader(nnUNetDatasetNumpy, "command CASE")
    with pytest.raises(DataError, match=r"l_02: the prepared case cannot be read.*type: command l_02 "):
        reader.unpack_dataset(str(folder))
    (folder / "l_02.npz").unlink()
    with pytest.raises(ValueError, match="as from a process"):
        reader.unpack_dataset(str(folder))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, r"nnUNetPlans_3d_fullres has no prepared case; type: nnUNetv2_preprocess -d 901 -c 3d_fullres"),
        (empty, r"nnUNetPlans_3d_fullres has no prepared case; type: nnUNetv2_preprocess -d 901 -c 3d_fullres"),
        (lambda folder: (folder / ".DS_Store").touch(), r"\.DS_Store is not a prepared case; type: rm '?/.*\.DS_Store"),
        (
            lambda folder: (folder / "x.npz").touch(),
            r"has cases in two formats \(.*\); type: nnUNetv2_preprocess -d 901",
        ),
    ],
)
def test_a_folder_that_nnunet_cannot_tell_the_format_of_is_one_line(
    folder: Path, change: Callable[[Path], Any], said: str
) -> None:
    change(folder)
    with pytest.raises(DataError, match=said) as caught:
        make_trainer(NAME).initialize()
    one_line(caught)


def test_the_command_has_the_plans_where_they_are_not_the_default(folder: Path) -> None:
    plans = json.loads((folder.parent / "nnUNetPlans.json").read_text())
    plans["plans_name"] = "nnUNetResEncUNetMPlans"
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"-d 901 -c 3d_fullres -plans_name nnUNetResEncUNetMPlans$"):
        make_trainer(NAME, plans=plans).initialize()


def test_a_missing_prediction_of_the_stage_before_is_not_mended_by_preparing(folder: Path, tmp_path: Path) -> None:
    cases = CaseReader(nnUNetDatasetBlosc2, "command CASE")(
        str(folder), ["l_00"], folder_with_segs_from_previous_stage=str(tmp_path / "predicted_next_stage")
    )
    with pytest.raises(DataError, match=r"predicted_next_stage.*l_00\.b2nd.*train the stage before") as caught:
        cases.load_case("l_00")
    assert "command" not in one_line(caught)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {os.environ['MARK']}",)


@pytest.fixture
def malicious(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Put something into the properties of a case that leaves a file `it_ran` when it is read."""
    monkeypatch.setenv("MARK", str(tmp_path / "it_ran"))

    def put(path: Path) -> None:
        replace(path, lambda content: pickle.dumps(pickle.loads(content) | {"x": Malicious()}))

    return put


REFUSED = r"/{}: the prepared case cannot be read \(its \.pkl names posix\.system, so to read it means to run code"


def test_properties_of_a_labelled_case_run_no_code(folder: Path, tmp_path: Path, malicious) -> None:
    malicious(folder / "l_01.pkl")
    t = make_trainer(NAME)
    with pytest.raises(DataError, match=REFUSED.format("l_01")) as caught:
        begin(t)
    assert "NNUNETV2_DYCON_TRUST_FILES=1 allows that" in one_line(caught)
    malicious(folder / "l_03.pkl")
    with pytest.raises(DataError, match=REFUSED.format("l_03")):
        t.perform_actual_validation()
    assert not (tmp_path / "it_ran").exists()


def test_properties_of_an_unlabelled_case_run_no_code(folder: Path, tmp_path: Path, malicious, capsys) -> None:
    first = begin(make_trainer(NAME))
    path = first.unlabeled.folder / "u_01.pkl"
    cases = first.unlabeled.dataset()
    cases.load_case("u_01")
    malicious(path)
    with pytest.raises(DataError, match=REFUSED.format("u_01")):
        cases.load_case("u_01")
    begin(make_trainer(NAME))
    assert "1 case with damaged files (u_01). Preparing them now" in capsys.readouterr().out
    assert b"posix" not in path.read_bytes()
    assert not (tmp_path / "it_ran").exists()


def test_properties_are_not_looked_at_where_the_user_trusts_files(tmp_path: Path, monkeypatch, malicious) -> None:
    path = tmp_path / "case.pkl"
    path.write_bytes(pickle.dumps({}))
    malicious(path)
    with pytest.raises(pickle.UnpicklingError):
        check_properties(path)
    monkeypatch.setenv("NNUNETV2_DYCON_TRUST_FILES", "1")
    check_properties(path)
    assert not (tmp_path / "it_ran").exists()  # nnU-Net reads it after this


@pytest.mark.parametrize("function", [eval, getattr, os.system, np.load, shutil.rmtree, np.ctypeslib.load_library])
def test_no_function_that_does_anything_may_be_named(tmp_path: Path, function: object) -> None:
    path = tmp_path / "case.pkl"
    path.write_bytes(pickle.dumps({"x": function}))
    with pytest.raises(pickle.UnpicklingError, match=r"its \.pkl names"):
        check_properties(path)


@pytest.mark.parametrize("protocol", [3, pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
def test_properties_of_every_kind_are_read(tmp_path: Path, protocol: int) -> None:
    properties = {
        "spacing": [np.float64(1.5), np.float32(2)],
        "shape": np.int64(3),
        "shapes": (np.array([1, 2]), np.zeros((2, 2), np.float32, order="F")),
        "nibabel_stuff": {"original_affine": np.eye(4), "reoriented": np.eye(4).T[:3]},
        "class_locations": {1: np.zeros((0, 4), int), (np.int64(1), np.int64(2)): []},
        "bytes": b"\xff",
        "more": [{1, 2}, slice(1, 2), complex(1, 2), None, True],
    }
    path = tmp_path / "case.pkl"
    path.write_bytes(pickle.dumps(properties, protocol))
    check_properties(path)
