"""Prepared unlabelled images: nnU-Net reads them, no label is opened, benchmark mode."""

import fcntl
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_dycon.data import manifest, unlabeled
from nnunetv2_dycon.data.manifest import unlabeled_status
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.errors import DataError, SplitError
from tests.datasets import environment, leave, make_dataset, plan_and_preprocess
from tests.prepared import ID, NAME, Place, load, prepare, tree
from tests.processes import left_after, with_shared_memory


def test_the_folder_holds_exactly_what_nnunet_reads(place: Place) -> None:
    assert prepare() == [place.folder]
    names = {f"u_0{i}{suffix}" for i in range(3) for suffix in (".b2nd", "_seg.b2nd", ".pkl")}
    assert set(os.listdir(place.folder)) == names
    assert place.manifest == place.folder.with_name("nnUNetPlans_3d_fullres_unlabeled.json")
    hidden = {p.name for p in place.preprocessed.glob(".*")}
    assert hidden == {".nnUNetPlans_3d_fullres_unlabeled.lock"}
    data, seg, properties = load(place.folder, "u_01")
    assert (data.dtype, seg.dtype) == (np.float32, np.int16)
    assert data.shape == seg.shape
    assert len(data) == 1
    assert set(np.unique(seg)) <= {0, -1}
    assert properties["class_locations"] == {}


def test_the_image_is_bit_identical_to_stock_for_the_same_image_with_a_label(place: Place) -> None:
    for i in range(4):
        shutil.copy(place.raw / f"imagesTr/l_0{i}_0000.nii.gz", place.image(f"copy_{i}"))
    prepare()
    for i in range(4):
        data, seg, properties = load(place.folder, f"copy_{i}")
        stock, stock_seg, stock_properties = load(place.preprocessed / "nnUNetPlans_3d_fullres", f"l_0{i}")
        np.testing.assert_array_equal(data, stock)
        np.testing.assert_array_equal(seg == -1, stock_seg == -1)
        stock_properties["class_locations"] = {}
        assert pickle.dumps(properties) == pickle.dumps(stock_properties)


@pytest.mark.parametrize("ignore", [False, True])
def test_nnunets_loader_draws_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignore: bool) -> None:
    make_dataset(tmp_path, dataset_id=ID, labeled=2, channels=2, ignore=ignore)
    plan_and_preprocess(ID, root=tmp_path)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    place = Place(tmp_path)
    prepare()
    dataset_json = json.loads((place.raw / "dataset.json").read_text())
    manager = PlansManager(str(place.plans)).get_label_manager(dataset_json)
    dataset = infer_dataset_class(str(place.folder))(str(place.folder))
    loader = nnUNetDataLoader(dataset, 4, (16, 16, 16), (16, 16, 16), manager)
    loader.has_ignore = False
    batch = next(loader)
    assert batch["data"].shape == (4, 2, 16, 16, 16)
    assert set(batch["keys"]) <= {"u_00", "u_01", "u_02"}
    assert set(np.unique(batch["target"])) <= {-1, 0}


_opened: list[str] = []
_listening = threading.Event()


def _listen(event: str, arguments: tuple) -> None:
    if _listening.is_set() and event == "open":
        _opened.append(str(arguments[0]))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Files opened by Python or read by SimpleITK, whose C++ no audit hook sees."""
    if not hasattr(sys, "_unlabeled_test_hook"):
        sys._unlabeled_test_hook = True
        sys.addaudithook(_listen)
    read = sitk.ReadImage
    monkeypatch.setattr(sitk, "ReadImage", lambda path, *a: (_opened.append(str(path)), read(path, *a))[1])
    _opened.clear()
    _listening.set()
    yield _opened
    _listening.clear()


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_no_label_is_opened_and_none_is_needed(place: Place, opened: list[str], reader: str) -> None:
    place.benchmark()
    place.change_plans(lambda p, c: p.update(image_reader_writer=reader))
    prepare()
    images = {Path(path).parent.name for path in opened if path.endswith(".nii.gz")}
    assert images == {"imagesUn", "imagesTr"}
    labelled = [path for path in opened if re.search(r"labels|gt_segm|nnUNetPlans_3d_fullres/|imagesTs", path)]
    assert labelled == []
    before = tree(place)
    for folder in (place.raw / "labelsTr", place.raw / "labelsTs", place.preprocessed / "gt_segmentations"):
        shutil.rmtree(folder)
    shutil.rmtree(place.preprocessed / "nnUNetPlans_3d_fullres")
    prepare(overwrite=True)
    assert tree(place) == before


def test_benchmark_mode_prepares_copies_without_class_locations(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    splits = place.benchmark()
    prepare()
    assert "planning saw the labels" in caplog.text
    status = unlabeled_status(ID)
    assert status.state == "ok"
    assert (status.unlabeled, status.benchmark) == (("u_00", "u_01", "u_02"), ("l_01", "l_02", "l_03"))
    assert manifest.BENCHMARK_NOTE in status.notes
    assert status.cases(splits, 0) == ("u_00", "u_01", "u_02", "l_02", "l_03")
    assert status.cases(splits, 1) == ("u_00", "u_01", "u_02", "l_01")
    data, seg, properties = load(place.folder, "l_02")
    stock, stock_seg, _ = load(place.preprocessed / "nnUNetPlans_3d_fullres", "l_02")
    np.testing.assert_array_equal(data, stock)
    assert (stock_seg.max(), seg.max()) == (2, 0)
    assert properties["class_locations"] == {}
    with pytest.raises(DataError, match=r"'l_00'.*type: nnUNetv2_dycon preprocess_unlabeled -d 901 -c 3d_fullres"):
        status.cases([{"train": [], "val": [], "unlabeled": ["l_00"]}], 0)


def test_benchmark_mode_needs_no_images_un_and_forgets_cases_of_no_list(place: Place) -> None:
    place.benchmark()
    shutil.rmtree(place.raw / "imagesUn")
    prepare()
    assert unlabeled_status(ID).unlabeled == ()
    splits = [{"train": ["l_00"], "val": ["l_01"], "unlabeled": ["l_02"]}]
    (place.preprocessed / "splits_final.json").write_text(json.dumps(splits))
    assert unlabeled_status(ID).reason == "2 cases removed (l_01, l_03)"
    prepare()
    assert {name[:4] for name in os.listdir(place.folder)} == {"l_02"}


def test_benchmark_lists_are_checked(place: Place) -> None:
    (place.raw / "splits_final.json").write_text('[{"train": ["l_00"], "val": ["l_01"], "unlabeled": ["u_00"]}]')
    for function in (prepare, lambda: unlabeled_status(ID)):
        with pytest.raises(SplitError, match="'u_00', not in imagesTr"):
            function()


def test_without_raw_data_whole_cases_are_fine_and_a_note_says_unchecked(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = place.benchmark()
    prepare()
    expected = unlabeled_status(ID).cases(splits, 0)
    shutil.rmtree(place.raw)
    for _ in range(2):
        status = unlabeled_status(NAME)
        assert status.state == "ok"
        assert manifest.UNCHECKED_NOTE in status.notes
        assert status.cases(splits, 0) == expected
        monkeypatch.delenv("nnUNet_raw")
        monkeypatch.setenv("nnUNet_raw", "")
    (place.folder / "l_02.pkl").unlink()
    assert unlabeled_status(NAME).state == "missing"


def test_configurations_with_the_same_data_share_one_folder(place: Place, made: list[str]) -> None:
    place.change_plans(lambda p, c: p["configurations"].update(big={"inherits_from": "3d_fullres", "batch_size": 9}))
    assert preprocess_unlabeled(ID, ("3d_fullres", "big"), processes=1) == [place.folder]
    assert made == ["u_00", "u_01", "u_02"]
    assert unlabeled_status(ID, "big").state == "ok"


def test_other_plans_and_plans_given_as_a_dictionary_have_their_own_folder(place: Place) -> None:
    plans = json.loads(place.plans.read_text())
    plans["plans_name"] = "other"
    plans["configurations"]["3d_fullres"]["data_identifier"] = "other_3d_fullres"
    (place.preprocessed / "other.json").write_text(json.dumps(plans))
    folder = place.preprocessed / "other_3d_fullres_unlabeled"
    assert prepare(plans="other") == [folder]
    status = unlabeled_status(ID, plans=plans)
    assert (status.state, status.folder) == ("ok", folder)
    assert status.command == "nnUNetv2_dycon preprocess_unlabeled -d 901 -c 3d_fullres -p other"


def test_good_cases_are_kept_when_others_are_bad(place: Place, made: list[str]) -> None:
    place.image("u_01").write_bytes(b"")
    with pytest.raises(DataError, match="u_01_0000"):
        prepare()
    made.clear()
    shutil.copy(place.image("u_00"), place.image("u_01"))
    prepare()
    assert made == ["u_01"]


def test_a_second_run_waits_for_the_first(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    lock = place.preprocessed / ".nnUNetPlans_3d_fullres_unlabeled.lock"
    thread = threading.Thread(target=prepare)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert not place.folder.exists()
    thread.join(30)
    assert "waiting" in caplog.text
    assert unlabeled_status(ID).state == "ok"


def test_what_is_done_is_said(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prepare()
    assert "3 cases to prepare (u_00, u_01, u_02)" in caplog.text
    prepare()
    assert "3 cases are up to date" in caplog.text


@pytest.mark.slow
def test_worker_processes_give_the_same_files(place: Place) -> None:
    prepare()
    expected = tree(place)
    assert preprocess_unlabeled(ID, processes=2, overwrite=True) == [place.folder]
    assert tree(place) == expected


@pytest.mark.slow
def test_a_dead_worker_is_one_line_with_the_remedy(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unlabeled, "prepare_case", leave)
    with pytest.raises(DataError, match=r"worker process died.*-np 1"):
        preprocess_unlabeled(ID, processes=2)
    monkeypatch.undo()


@pytest.mark.slow
def test_worker_processes_without_shared_memory_are_one_line(place: Place) -> None:
    fill = 'head -c 1M /dev/zero > /dev/shm/full; exec "$@"'
    program = "import sys; from nnunetv2_dycon.commands import main; sys.exit(main())"
    words = [*with_shared_memory("64k"), "sh", "-c", fill, "sh", sys.executable, "-c", program]
    command = [*words, "preprocess_unlabeled", "-d", str(ID), "-np", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "worker processes cannot be started (No space left on device)" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("-np 1")
    preprocess_unlabeled(ID, processes=1)


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed() -> None:
    program = """
        import multiprocessing, os, time
        from nnunetv2_dycon.parallel import end_with_parent
        if __name__ == "__main__":
            pool = multiprocessing.get_context("spawn").Pool(1, end_with_parent)
            print(pool.apply(os.getpid), flush=True)
            time.sleep(600)
    """
    folder = Path(__file__).parents[3]
    script = ["-c", textwrap.dedent(program)]
    with subprocess.Popen([sys.executable, *script], stdout=subprocess.PIPE, text=True, cwd=folder) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    assert not left_after([worker], 10)
