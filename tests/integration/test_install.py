"""Both ways to install, in new virtual environments: what is in the wheels, and what nnU-Net then finds.

Nothing is downloaded: the environments see the packages of the interpreter that runs the tests.
"""

import base64
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = ("nnUNetTrainerDyCON", "nnUNetTrainerLabeledOnly_epochs3", "nnUNetTrainerDyCON_epochs2_beta0p25_bf16")
START_UP = {"nnunetv2_dycon_ext.pth", "nnunetv2_dycon_ext.start"}

# Runs in the new environment. A spawned child is what data loaders and distributed training start.
LOOK_UP = """
import json, multiprocessing, pickle, sys

def find(name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    return recursive_find_trainer_class_by_name(name)

def in_child(name, pickled, queue):
    queue.put(pickle.loads(pickled) is find(name))

if __name__ == "__main__":
    import nnunetv2_dycon
    said = {"file": nnunetv2_dycon.__file__, "names": {}}
    for name in sys.argv[1:]:
        found = find(name)
        unpickled = pickle.loads(pickle.dumps(found))
        said["names"][name] = [found.__name__, found is find(name), unpickled is found, found.settings.epochs]

    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=in_child, args=(name, pickle.dumps(found), queue))
        child.start()
        said[method] = queue.get(timeout=900)
        child.join()
    print("SAID " + json.dumps(said))
"""


def clean_environment(**more: str) -> dict[str, str]:
    """Return the environment of a new shell, without what the tests' own interpreter was started with."""
    hidden = {"nnUNet_extTrainer", "NNUNETV2_DYCON_NO_AUTOREGISTER", "PYTHONPATH", "VIRTUAL_ENV"}
    return {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"} | more


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a copy of what is built, so that building leaves nothing in the repository."""
    target = tmp_path / "source"
    target.mkdir()
    for name in ("nnunetv2_dycon", "dataset_conversion", "tests", "scripts"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, target)
    return target


class Environment:
    """A virtual environment that sees the packages of the tests' interpreter, not its start-up files."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
        (self.packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments: object) -> None:
        run([sys.executable, "-m", "pip", "--python", self.python, *arguments], self.folder)

    def says(self, script: str, *options: str, **environment: str) -> str:
        return run([self.python, *options, "-c", script], self.folder, **environment).stdout.strip()

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def check_record(wheel: zipfile.ZipFile) -> None:
    """Every file is in the wheel's RECORD, with its digest and size: pip removes what is listed there."""
    (record,) = (name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
    rows = {name: (digest, size) for name, digest, size in csv.reader(io.StringIO(wheel.read(record).decode()))}
    assert sorted(rows) == sorted(wheel.namelist())
    for name, (digest, size) in rows.items():
        if name != record:
            data = wheel.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={expected}", len(data)), name


def test_a_regular_wheel_holds_the_package_and_the_start_up_files_and_nothing_else(source, tmp_path):
    run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        tmp_path,
    )
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        check_record(wheel)
        metadata = next(wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nnunetv2_dycon"} | START_UP
    for package, folder in (("nnunetv2_dycon", ROOT / "nnunetv2_dycon"), ("", ROOT / "dataset_conversion")):
        target = package or "nnunetv2_dycon/dataset_conversion"
        assert {f"{target}/{file.relative_to(folder)}" for file in folder.rglob("*.py")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Requires-Dist: nnunetv2<2.9,>=2.8.1" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_an_editable_wheel_holds_the_start_up_files_behind_its_finder(source, tmp_path):
    script = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    run([sys.executable, "-c", script], source)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        check_record(wheel)
    assert set(names) >= START_UP
    path_files = sorted(name for name in names if name.endswith(".pth"))
    assert len(path_files) == 2
    assert path_files[-1] == "nnunetv2_dycon_ext.pth"  # read in this order


@pytest.mark.parametrize("mode", [[], ["--editable"]], ids=["regular", "editable"])
def test_nnunet_finds_our_trainers_after_an_installation_and_nothing_is_left_of_it(source, environment, tmp_path, mode):
    before = environment.files()
    environment.pip("install", "--no-deps", "--no-build-isolation", *mode, source)
    home = source if mode else environment.packages
    ours = str(home / "nnunetv2_dycon" / "_nnunet_ext")
    variable = "import os; print(os.environ.get('nnUNet_extTrainer'))"
    assert environment.says(variable) == ours
    assert environment.says(variable, "-I") == ours
    assert environment.says(variable, nnUNet_extTrainer="/mine") == f"/mine{os.pathsep}{ours}"
    assert environment.says(variable, NNUNETV2_DYCON_NO_AUTOREGISTER="1") == "None"
    where = environment.says("import nnunetv2_dycon.dataset_conversion as d; print(d.__file__)")
    assert Path(where).parent == (source if mode else home / "nnunetv2_dycon") / "dataset_conversion"

    script = tmp_path / "look_up.py"
    script.write_text(LOOK_UP)
    output = run([environment.python, script, *NAMES], tmp_path).stdout
    said = json.loads(output.split("SAID ")[1])
    assert Path(said["file"]).parent == home / "nnunetv2_dycon"
    assert said["names"] == {name: [name, True, True, epochs] for name, epochs in zip(NAMES, (1000, 3, 2), strict=True)}
    assert said["fork"]
    assert said["spawn"]
    assert "phantom" in run([environment.folder / "bin" / "nnUNetv2_dycon", "--help"], tmp_path).stdout

    environment.pip("uninstall", "--yes", "nnunetv2-dycon")
    left = environment.files() - before
    assert {name for name in left if "dycon" in name.lower()} == set()
    assert environment.says(variable) == "None"


def test_a_checkout_that_is_gone_does_not_disturb_the_start(source, environment):
    environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", source)
    shutil.rmtree(source)
    done = run([environment.python, "-c", "print('started')"], environment.folder)
    assert (done.stdout, done.stderr) == ("started\n", "")


def test_doctor_finds_a_good_installation_good_and_names_what_shadows_a_trainer(source, environment, tmp_path):
    environment.pip("install", "--no-deps", "--no-build-isolation", source)
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "mine")}
    for folder in folders.values():
        Path(folder).mkdir()
    mine = folders.pop("mine")
    doctor = [str(environment.folder / "bin" / "nnUNetv2_dycon"), "doctor"]
    good = run(doctor, tmp_path, **folders)
    assert "FAIL" not in good.stdout

    text = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
    (Path(mine) / "my_trainers.py").write_text(text + "class nnUNetTrainerDyCON(nnUNetTrainer):\n    pass\n")
    env = clean_environment(nnUNet_extTrainer=mine, **folders)
    bad = subprocess.run(doctor, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert bad.returncode == 1
    (finding,) = (line for line in bad.stdout.splitlines() if line.startswith("FAIL"))
    assert finding.split()[1] == "nnUNetTrainerDyCON"
    assert "shadowed" in finding
    assert mine in finding
