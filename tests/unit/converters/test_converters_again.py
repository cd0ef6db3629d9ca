"""Converters that run again: up to date, forced, killed, over changed sources."""

import locale
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_dycon.errors import DataError
from tests import collections
from tests.converting import AN_IMAGE, FORMS, ONE_EACH, find, lay_out, refused, run, tree

# ---- runs again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_repeated_run_is_up_to_date_and_one_that_is_forced_gives_the_same_bytes(raw, source, name) -> None:
    form = FORMS[name]
    lay_out(name, source)
    first = tree(run(form, source).folder)
    times = {p: p.stat().st_mtime_ns for p in raw.rglob("*")}
    again = run(form, source)
    assert again.state == "up to date"
    assert times == {p: p.stat().st_mtime_ns for p in raw.rglob("*")}
    forced = run(form, source, overwrite=True)
    assert (forced.state, tree(forced.folder)) == ("written", first)


def test_a_dry_run_says_the_same_and_writes_nothing(raw, source) -> None:
    form = FORMS["brats-grades"]
    lay_out("brats-grades", source)
    planned = run(form, source, dry_run=True)
    assert (planned.state, list(raw.iterdir())) == ("planned", [])
    assert "nothing was written" in str(planned)
    written = run(form, source)
    assert (written.rows, written.title) == (planned.rows, planned.title)
    assert set(planned.notes) <= set(written.notes)


def test_strict_refuses_what_is_incomplete_and_names_cases(raw, source) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    refused(raw, form, source, "--strict: 21 cases of btcv_dhc_v1", "validation img0025", strict=True)
    everything = collections.btcv(source / "all", "msd", [f"{n:04d}" for n in (*range(1, 11), *range(21, 41))])
    assert len(everything) == 30
    report = run(form, source / "all", strict=True)
    assert [row[1:] for row in report.rows] == [(4, 4), (4, 4), (16, 16), (6, 6)]


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("survivor", ["image", "whole case"])
def test_what_a_killed_run_left_is_continued_to_the_same_tree(raw, source, monkeypatch, name, survivor) -> None:
    form = FORMS[name]
    lay_out(name, source)
    clean = tree(run(form, source, dataset_id=700).folder)
    shutil.rmtree(raw)
    raw.mkdir()

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    # `building` does not catch this either, so it removes nothing, as after a kill
    place = (
        "nnunetv2_dycon.conversion.cases.CaseTask._write_label"
        if survivor == "image"
        else ("nnunetv2_dycon.conversion.job._describe")
    )
    with monkeypatch.context() as patched:
        patched.setattr(place, kill)
        with pytest.raises(Killed):
            run(form, source, dataset_id=700)
    left = list(raw.glob(".*.converting/data/*/*"))
    assert left
    half = left[0].with_name(f".0123abcd.part.{left[0].name}")
    half.write_bytes(b"half")
    assert tree(run(form, source, dataset_id=700).folder) == clean
    assert [p.name for p in raw.iterdir()] == [f"Dataset700_{form.collection}"]


def test_a_source_that_was_changed_after_a_kill_is_read_again(raw, source, monkeypatch) -> None:
    form = FORMS["pancreas-dicom"]
    lay_out("pancreas-dicom", source)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("nnunetv2_dycon.conversion.job._describe", kill)
        with pytest.raises(Killed):
            run(form, source)
    path = find(source, AN_IMAGE["pancreas-dicom"])
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes((content[-2] ^ 1, content[-1])))  # one voxel, in place
    run(form, source)
    changed = tree(raw)
    run(form, source, overwrite=True)
    assert tree(raw) == changed


class Killed(BaseException):
    """What ends a run as a kill does: nothing is removed."""


def killed_at_rename(number: int, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> None:
    """Run a conversion that ends in place of a rename of a whole folder: the first, the second, or after them."""
    rename, rmtree, calls = os.rename, shutil.rmtree, []

    def counted(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) > number:
            raise Killed
        rename(*paths)

    def remove(folder: Path, **more: Any) -> None:
        if Path(folder).name.endswith(".converting"):
            raise Killed
        rmtree(folder, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", counted)
        patched.setattr(shutil, "rmtree", remove)
        with pytest.raises(Killed):
            run(*args, **options)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_run_that_is_killed_while_it_replaces_a_data_set_loses_neither(raw, source, monkeypatch, number) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    run(form, source, dataset_id=701, labeled=2)
    new = tree(raw / "Dataset701_BTCV")
    shutil.rmtree(raw / "Dataset701_BTCV")
    run(form, source, dataset_id=700)
    old = tree(raw / "Dataset700_BTCV")
    killed_at_rename(number, monkeypatch, form, source, dataset_id=700, labeled=2, overwrite=True)
    if number < 2:  # another command does not profit from the kill
        with pytest.raises(DataError, match="--overwrite"):
            run(form, source, dataset_id=700, labeled=8)
        assert tree(raw / "Dataset700_BTCV") == old
    run(form, source, dataset_id=700, labeled=2, overwrite=True)
    assert tree(raw / "Dataset700_BTCV") == new
    assert [p.name for p in raw.iterdir()] == ["Dataset700_BTCV"]


def test_a_dry_run_leaves_what_a_killed_run_left(raw, source, monkeypatch) -> None:
    form = FORMS["btcv-raw"]
    lay_out("btcv-raw", source)
    run(form, source, dataset_id=700)
    killed_at_rename(0, monkeypatch, form, source, dataset_id=700, labeled=2, overwrite=True)
    before = tree(raw)
    run(form, source, dataset_id=700, dry_run=True)
    run(form, source, dataset_id=700, dry_run=True, overwrite=True)
    assert tree(raw) == before


def test_descriptions_are_read_in_the_encoding_in_which_they_were_written(raw, source) -> None:
    form = FORMS["la-h5"]
    lay_out("la-h5", source)
    run(form, source)
    kept = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "C")
        assert run(form, source).state == "up to date"
        assert run(form, source, overwrite=True).state == "written"
    finally:
        locale.setlocale(locale.LC_ALL, kept)
