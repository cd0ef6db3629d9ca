"""Preparation that runs again: changes, kills, broken manifests."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_dycon.data import unlabeled
from nnunetv2_dycon.data.manifest import unlabeled_status
from tests.datasets import environment
from tests.prepared import ID, Place, load, prepare, tree


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
