"""Unlabelled images are prepared as stock prepares labelled ones, whole or not at all, without labels."""

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_dycon.data import manifest, unlabeled
from nnunetv2_dycon.data.manifest import unlabeled_folder, unlabeled_status
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.errors import DataError, SplitError
from tests.datasets import environment, leave, make_dataset, plan_and_preprocess

ID = 901
NAME = "Dataset901_Tiny"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    make_dataset(root, dataset_id=ID)
    plan_and_preprocess(ID, root=root)
    return root


class Place:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw = root / "nnUNet_raw" / NAME
        self.preprocessed = root / "nnUNet_preprocessed" / NAME
        self.folder, self.manifest = unlabeled_folder(self.preprocessed, "nnUNetPlans_3d_fullres")
        self.plans = self.preprocessed / "nnUNetPlans.json"

    def image(self, case: str) -> Path:
        return self.raw / "imagesUn" / f"{case}_0000.nii.gz"

    def change_plans(self, change: Callable[[dict, dict], None]) -> None:
        plans = json.loads(self.plans.read_text())
        change(plans, plans["configurations"]["3d_fullres"])
        self.plans.write_text(json.dumps(plans))

    def benchmark(self) -> list[dict]:
        splits = [
            {"train": ["l_00"], "val": ["l_01"], "unlabeled": ["l_02", "l_03"]},
            {"train": ["l_03"], "val": ["l_02"], "unlabeled": ["l_01"]},
        ]
        (self.preprocessed / "splits_final.json").write_text(json.dumps(splits))
        return splits


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return Place(tmp_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cases that are prepared, in order."""
    cases: list[str] = []
    original = unlabeled.prepare_case

    def record(task: Any) -> str | None:
        cases.append(task.case)
        return original(task)

    monkeypatch.setattr(unlabeled, "prepare_case", record)
    return cases


def prepare(**options: Any) -> list[Path]:
    return preprocess_unlabeled(ID, processes=1, **options)


def tree(place: Place) -> dict[str, str]:
    """Content of everything that preparation writes, hidden files too."""
    paths = [p for p in place.preprocessed.rglob("*unlabeled*/*") if p.is_file()]
    paths += [p for p in place.preprocessed.glob("*unlabeled*") if p.is_file()]
    return {str(path.relative_to(place.preprocessed)): content(path) for path in paths}


def content(path: Path) -> str:
    if path.suffix != ".b2nd":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    array = blosc2.open(str(path), mode="r")  # compressed bytes depend on the order in which threads finish
    digest = hashlib.sha256(array[:].tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {array.chunks} {array.blocks} {digest}"


def load(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray, dict]:
    data, seg, _, properties = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)
    return data[:], seg[:], properties


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


def test_a_second_run_makes_nothing(place: Place, made: list[str]) -> None:
    assert unlabeled_status(ID).state == "missing"
    prepare()
    before = tree(place)
    status = unlabeled_status(ID)
    assert (status.state, status.reason, status.notes) == ("ok", "", ())
    assert (status.unlabeled, status.benchmark) == (("u_00", "u_01", "u_02"), ())
    made.clear()
    prepare()
    assert made == []
    assert tree(place) == before
    prepare(overwrite=True)
    assert made == ["u_00", "u_01", "u_02"]
    assert tree(place) == before


def test_only_a_changed_image_is_made_again(place: Place, made: list[str]) -> None:
    prepare()
    old = load(place.folder, "u_01")[0]
    image = sitk.ReadImage(str(place.image("u_01")))
    changed = sitk.GetImageFromArray(sitk.GetArrayFromImage(image)[:, ::-1].copy())
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(place.image("u_01")))
    status = unlabeled_status(ID)
    assert (status.state, status.reason) == ("stale", "1 case with changed images (u_01)")
    made.clear()
    prepare()
    assert made == ["u_01"]
    assert unlabeled_status(ID).state == "ok"
    assert not np.array_equal(load(place.folder, "u_01")[0], old)


def test_same_size_and_another_time_is_a_change(place: Place) -> None:
    prepare()
    stat = place.image("u_00").stat()
    os.utime(place.image("u_00"), ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert unlabeled_status(ID).state == "stale"


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("spacing", lambda p, c: c.update(spacing=[2.0, 2.0, 2.0])),
        ("normalization_schemes", lambda p, c: c.update(normalization_schemes=["CTNormalization"])),
        ("use_mask_for_norm", lambda p, c: c.update(use_mask_for_norm=[not c["use_mask_for_norm"][0]])),
        ("transpose_forward", lambda p, c: p.update(transpose_forward=[1, 0, 2])),
        ("image_reader_writer", lambda p, c: p.update(image_reader_writer="NibabelIO")),
        (
            "foreground_intensity_properties_per_channel",
            lambda p, c: p["foreground_intensity_properties_per_channel"]["0"].update(mean=1.0),
        ),
    ],
)
def test_changed_plans_are_noticed_and_all_is_made_again(
    place: Place, made: list[str], entry: str, change: Callable[[dict, dict], None]
) -> None:
    prepare()
    place.change_plans(change)
    status = unlabeled_status(ID)
    assert status.state == "stale"
    assert f"plans changed ({entry})" in status.reason
    made.clear()
    prepare()
    assert made == ["u_00", "u_01", "u_02"]
    again = tree(place)
    shutil.rmtree(place.folder)
    place.manifest.unlink()
    prepare()
    assert tree(place) == again


def test_plans_entries_that_change_no_image_do_not_matter(place: Place) -> None:
    prepare()
    place.change_plans(lambda p, c: c.update(batch_size=7, patch_size=[8, 8, 8], batch_dice=True))
    place.change_plans(lambda p, c: c["architecture"]["arch_kwargs"].update(features_per_stage=[1, 2, 3]))
    assert unlabeled_status(ID).state == "ok"


def test_new_and_removed_images_change_just_these_cases(place: Place, made: list[str]) -> None:
    prepare()
    place.image("u_00").rename(place.image("new"))
    status = unlabeled_status(ID)
    assert status.state == "stale"
    assert status.reason == "1 case to prepare (new); 1 case removed (u_00)"
    made.clear()
    prepare()
    assert made == ["new"]
    assert {name.split(".")[0] for name in os.listdir(place.folder)} - {
        "new_seg",
        "u_01_seg",
        "u_02_seg",
    } == {
        "new",
        "u_01",
        "u_02",
    }
    assert unlabeled_status(ID).state == "ok"


@pytest.mark.parametrize("suffix", [".b2nd", "_seg.b2nd", ".pkl"])
def test_a_case_without_one_of_its_files_is_missing(place: Place, made: list[str], suffix: str) -> None:
    prepare()
    before = tree(place)
    (place.folder / f"u_02{suffix}").unlink()
    assert unlabeled_status(ID).state == "missing"
    made.clear()
    prepare()
    assert made == ["u_02"]
    assert tree(place) == before


def test_a_broken_manifest_means_all_again(place: Place, made: list[str]) -> None:
    prepare()
    before = tree(place)
    for text in ("{", '{"format": 99, "cases": {}}', "[]"):
        place.manifest.write_text(text)
        assert unlabeled_status(ID).state == "missing"
        made.clear()
        prepare()
        assert len(made) == 3
        assert tree(place) == before


def prepare_until_killed(root: Path, moment: int, overwrite: bool) -> None:
    os.environ.update(environment(root))
    unlabeled._SAVE_INTERVAL = 0.0
    replace, calls = os.replace, iter(range(100))

    def replace_or_die(*paths: Any) -> None:
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    prepare(overwrite=overwrite)


# 3 replacements a case and 1 of the manifest before the first, after each and at the end
@pytest.mark.parametrize(
    ("overwrite", "moment"), [*((False, m) for m in (0, 1, 2, 3, 4, 5, 13)), *((True, m) for m in (0, 1, 2))]
)
def test_killed_at_any_write_and_started_again_gives_the_same_files(
    place: Place, made: list[str], monkeypatch: pytest.MonkeyPatch, overwrite: bool, moment: int
) -> None:
    monkeypatch.setattr(unlabeled, "_SAVE_INTERVAL", 0.0)
    prepare()
    expected = tree(place)
    if not overwrite:
        shutil.rmtree(place.folder)
        place.manifest.unlink()

    # a plain fork inherits the thread pools of blosc2, and then hangs now and then
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload([__name__, *(m for m in sys.modules if m.startswith("nnunetv2."))])
    child = clean.Process(target=prepare_until_killed, args=(place.root, moment, overwrite))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    for path in place.folder.glob("*.pkl"):  # every case that is there is complete
        data, seg, _ = load(place.folder, path.stem)
        assert data.shape[1:] == seg.shape[1:]
    if overwrite and moment > 0:  # half old and half new is not whole
        assert not (place.folder / "u_00.pkl").exists()
    finished = json.loads(place.manifest.read_text())["cases"] if place.manifest.exists() else {}
    if not overwrite:
        assert len(finished) == max(0, (moment - 1) // 4)
    made.clear()
    prepare()
    assert not set(made) & set(finished) or moment == 0
    assert tree(place) == expected


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
    (place.raw / "splits_final.json").write_text('[{"train": ["l_00"], "val": [], "unlabeled": ["u_00"]}]')
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
def test_workers_end_when_their_parent_is_killed() -> None:
    program = """
        import multiprocessing, os, time
        from nnunetv2_dycon.parallel import _end_with_parent
        if __name__ == "__main__":
            pool = multiprocessing.get_context("spawn").Pool(1, _end_with_parent)
            print(pool.apply(os.getpid), flush=True)
            time.sleep(600)
    """
    folder = Path(__file__).parents[2]
    script = ["-c", textwrap.dedent(program)]
    with subprocess.Popen([sys.executable, *script], stdout=subprocess.PIPE, text=True, cwd=folder) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker is still there")
