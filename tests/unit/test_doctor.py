import os
import tempfile

import pytest

from nnunetv2_dycon import _register, doctor


@pytest.fixture
def folders(monkeypatch, tmp_path):
    for name in doctor.FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def named(checks):
    return {check.name: check for check in checks}


@pytest.mark.parametrize("name", doctor.FOLDERS)
def test_a_folder_that_is_not_set_or_not_there_is_a_finding_with_the_command_to_type(folders, monkeypatch, name):
    assert doctor._folder(name) == (name, True, str(folders / name))
    (folders / name).rmdir()
    assert doctor._folder(name) == (
        name,
        False,
        f"{folders / name} does not exist; type: mkdir -p '{folders / name}'",
    )
    monkeypatch.delenv(name)
    assert doctor._folder(name) == (name, False, f"not set; type: export {name}=/path/to/{name}")


@pytest.mark.parametrize(("name", "ok"), [*zip(doctor.FOLDERS, (True, False, False), strict=True)])
def test_a_folder_without_write_permission_is_wrong_where_training_writes(folders, monkeypatch, name, ok):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert doctor._folder(name) == (name, ok, f"{folders / name} is not writable (Permission denied)")


@pytest.mark.parametrize(("version", "ok"), [("2.8.1", True), ("2.8.3", True), ("2.8.0", False), ("2.9", False)])
def test_nnunet_must_be_of_the_versions_that_this_was_verified_with(monkeypatch, version, ok):
    monkeypatch.setattr(doctor.metadata, "version", lambda _: version)
    check = named(doctor._versions())["nnunetv2"]
    assert check.ok is ok
    assert ("pip install" in check.text) is not ok


def test_a_missing_distribution_is_a_finding(monkeypatch):
    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    checks = list(doctor._versions())
    assert not any(check.ok for check in checks)
    assert all("pip install" in check.text for check in checks)


@pytest.fixture
def site_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_site_folders", lambda: [str(tmp_path)])
    return tmp_path


def test_a_start_up_file_that_ran_is_named(monkeypatch, site_folder):
    (site_folder / doctor.START_UP_FILE).touch()
    monkeypatch.setenv(_register.VARIABLE, os.pathsep.join(["/no/such", _register.FOLDER]))
    checks = named(doctor._registration())
    assert all(check.ok for check in checks.values())
    assert checks["start-up file"].text == str(site_folder / doctor.START_UP_FILE)
    assert "/no/such (does not exist)" in checks[_register.VARIABLE].text


@pytest.mark.parametrize(
    ("present", "off", "text"),
    [
        (True, False, "there but did not run"),
        (True, True, "switched off by NNUNETV2_DYCON_NO_AUTOREGISTER=1"),
        (False, False, "no nnunetv2_dycon_ext.pth in"),
    ],
)
def test_a_start_up_file_that_did_not_run_is_a_finding(monkeypatch, site_folder, present, off, text):
    if present:
        (site_folder / doctor.START_UP_FILE).touch()
    monkeypatch.delenv(_register.VARIABLE, raising=False)
    monkeypatch.setenv(_register.SWITCH_OFF, "1" if off else "")
    checks = named(doctor._registration())
    assert not checks["start-up file"].ok
    assert not checks[_register.VARIABLE].ok
    assert text in checks["start-up file"].text


@pytest.mark.parametrize("before", [None, "", "/mine", "/mine:/theirs"])
def test_the_line_to_type_does_what_the_start_up_file_does(monkeypatch, before):
    monkeypatch.delenv(_register.VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(_register.VARIABLE, before)
    by_hand = os.popen(f'{doctor.export_line()}; printf %s "${_register.VARIABLE}"').read()
    _register.register()
    assert by_hand == os.environ[_register.VARIABLE]


def test_a_torchvision_of_another_torch_is_explained_in_one_line(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\n(more)")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    check = doctor._torchvision()
    assert not check.ok
    assert "operator torchvision::nms does not exist" in check.text
    assert "pip install --force-reinstall torch torchvision" in check.text
    assert "\n" not in check.text


def test_a_search_that_fails_is_a_finding_and_not_an_end(monkeypatch):
    def broken(name):
        raise RuntimeError("no such trainer")

    monkeypatch.setattr(doctor, "_found_by_nnunet", broken)
    checks = list(doctor._trainers())
    assert checks
    assert all(not check.ok and "no such trainer" in check.text for check in checks)


@pytest.mark.parametrize(
    ("processes", "free", "ok", "said"),
    [
        ("2", 64 * 1024**2, False, "64 MB of shared memory are free in /dev/shm, "),
        ("2", 8 * 1024**3, True, "8.0 GB free, enough for 2 loader processes"),
        ("2", None, True, "no limit, enough for 2 loader processes"),
        ("0", 0, True, "nnUNet_n_proc_DA=0 (for trainings alone: nnU-Net's planning fails with it)"),
        ("-2", 8 * 1024**3, False, "nnUNet_n_proc_DA is -2, not a number of processes"),
    ],
)
def test_shared_memory_is_compared_with_what_loader_processes_need(monkeypatch, processes, free, ok, said):
    monkeypatch.setenv("nnUNet_n_proc_DA", processes)
    monkeypatch.setattr(doctor, "free_bytes", lambda: free)
    check = doctor._shared_memory()
    assert (check.name, check.ok) == ("shared memory", ok)
    assert said in check.text
    if "are free" in said:
        assert "docker run --shm-size=8g" in check.text


def test_usual_batches_are_those_of_patches_of_128():
    """Two patches in float32 with targets in int16 of five resolutions, and in training two patches without."""
    patch, targets = 128**3 * 4, sum((128 >> halvings) ** 3 * 2 for halvings in range(5))
    assert (2 * (patch + targets) + 2 * patch, 2 * (patch + targets)) == doctor.USUAL_BATCHES


def test_the_check_of_shared_memory_is_among_the_findings(monkeypatch):
    for name in ("_versions", "_registration", "_trainers", "_machine"):
        monkeypatch.setattr(doctor, name, lambda: ())
    assert "shared memory" in named(doctor.doctor())
