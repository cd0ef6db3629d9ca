import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_dycon
from nnunetv2_dycon import _register

SHIM = Path(nnunetv2_dycon.__file__).parent / "_nnunet_ext" / "nnunetv2_dycon_trainers.py"


@pytest.fixture(autouse=True)
def fresh_variable(monkeypatch):
    monkeypatch.delenv(_register.VARIABLE, raising=False)
    monkeypatch.delenv(_register.SWITCH_OFF, raising=False)


def load_shim():
    """Import the shim as nnU-Net does: as a top-level module that is found in its folder."""
    spec = importlib.util.spec_from_file_location(SHIM.stem, SHIM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_holds_the_shim_and_nothing_else():
    assert Path(_register.FOLDER) == SHIM.parent
    assert [path.name for path in SHIM.parent.iterdir() if path.name != "__pycache__"] == [SHIM.name]


def test_our_folder_is_all_there_is_where_nothing_was_set():
    _register.register()
    assert os.environ["nnUNet_extTrainer"] == _register.FOLDER


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "")
    _register.register()
    assert os.environ["nnUNet_extTrainer"] == _register.FOLDER


def test_folders_of_the_user_stay_first(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/mine", "/theirs"]))
    _register.register()
    assert os.environ["nnUNet_extTrainer"].split(os.pathsep) == ["/mine", "/theirs", _register.FOLDER]


@pytest.mark.parametrize("before", [_register.FOLDER, os.pathsep.join([_register.FOLDER, "/mine"])])
def test_a_folder_that_is_listed_is_not_listed_again(monkeypatch, before):
    monkeypatch.setenv("nnUNet_extTrainer", before)
    _register.register()
    assert os.environ["nnUNet_extTrainer"] == before


def test_one_variable_switches_it_off(monkeypatch):
    monkeypatch.setenv("NNUNETV2_DYCON_NO_AUTOREGISTER", "1")
    _register.register()
    assert "nnUNet_extTrainer" not in os.environ


def modules_at_start(*words: str, **variables: str) -> str:
    """What the start of an interpreter imports."""
    script = (
        "import os, sys; before = set(sys.modules); import nnunetv2_dycon._register as r; r.register();"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('nnunetv2') or not words))"
    )
    root = Path(nnunetv2_dycon.__file__).parents[1]
    # -S: no start-up file may have imported it before; the path is given instead
    command = [sys.executable, "-S", "-c", f"words = {words!r}; {script}", *words]
    environment = {**os.environ, "PYTHONPATH": str(root), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_the_start_of_an_interpreter_imports_nothing_more_than_the_two_modules():
    two = "['nnunetv2_dycon', 'nnunetv2_dycon._register']"
    assert modules_at_start() == two
    assert modules_at_start(**{_register.TRAINING: "1"}) == two  # a process that another one started


def test_a_process_whose_training_was_killed_as_it_started_ends():
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    script = "from nnunetv2_dycon import _register; _register.register(); import time; time.sleep(60)"
    words = [sys.executable, "-S", "-c", script, "--multiprocessing-fork"]
    root = str(Path(nnunetv2_dycon.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, _register.TRAINING: str(gone.pid)}
    assert subprocess.run(words, env=environment, check=False, timeout=30).returncode == 1


def test_a_process_that_a_training_starts_follows_it():
    found = modules_at_start("--multiprocessing-fork", **{_register.TRAINING: str(os.getpid())})
    assert found == "['nnunetv2_dycon', 'nnunetv2_dycon._register', 'nnunetv2_dycon.errors', 'nnunetv2_dycon.parallel']"


@pytest.mark.parametrize(("words", "follows"), [(("--multiprocessing-fork",), True), ((), False)])
def test_a_worker_follows_its_starter_and_passes_over_ctrl_c_but_what_tidies_up_after_all_does_not(words, follows):
    script = (
        "import os, signal, threading; from nnunetv2_dycon.parallel import follow_starter;"
        "follow_starter(os.getppid());"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, threading.active_count())"
    )
    run = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ([str(True), "2"] if follows else [str(False), "1"])


def test_the_shim_hands_names_on(monkeypatch):
    from nnunetv2_dycon.trainers import names

    monkeypatch.setattr(names, "trainer_class", lambda name: f"class of {name}")
    assert load_shim().nnUNetTrainerDyCON_epochs5 == "class of nnUNetTrainerDyCON_epochs5"


def test_the_shim_has_no_other_names():
    shim = load_shim()
    for name in ("nnUNetTrainerNoSuch", "nnUNetTrainerDyCONNoSuch", "__path__"):
        assert not hasattr(shim, name)


def test_the_shim_is_skipped_in_an_environment_without_the_package(monkeypatch):
    gone = ModuleNotFoundError("No module named 'nnunetv2_dycon'", name="nnunetv2_dycon")

    class Gone:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("nnunetv2_dycon"):
                raise gone

    for name in [name for name in sys.modules if name.startswith("nnunetv2_dycon")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Gone(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError) as caught:
        load_shim()
    assert caught.value.name == "nnunetv2_dycon_trainers"  # nnU-Net's search skips a module that "is not there"
