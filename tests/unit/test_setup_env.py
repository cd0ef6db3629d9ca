"""The set-up of a machine: what it offers where there is no GPU."""

import os
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

FOLDER = Path(__file__).parents[2]
COMMAND = "-m pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="the wheels of other systems have no CUDA")
@pytest.mark.parametrize("gpu", [True, False])
def test_without_a_gpu_the_command_of_the_cpu_build_is_printed_for_the_environment_in_use(tmp_path, gpu) -> None:
    venv, programs = tmp_path / "my env", tmp_path / "programs"
    program(venv / "bin" / "python", f'echo "$@" >> {shlex.quote(str(tmp_path / "calls"))}')
    for name in ("bash", "cat", "cksum", "uname", "rm"):
        found = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
        program(programs / name, f'exec {found} "$@"')
    if gpu:
        program(programs / "nvidia-smi", "true")
    script = f"source {shlex.quote(str(FOLDER / 'scripts/setup_env.sh'))}; setup_env {FOLDER} {shlex.quote(str(venv))}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
        check=True,
    )
    offered = [line.strip() for line in done.stdout.splitlines() if "index-url" in line]
    assert offered == ([] if gpu else [f"'{venv}/bin/python' {COMMAND}"])
    assert "pip install --editable" in (tmp_path / "calls").read_text()
    if not gpu:  # what it says can be typed
        (tmp_path / "calls").unlink()
        subprocess.run(["bash", "-c", offered[0]], check=True)
        assert (tmp_path / "calls").read_text().strip() == COMMAND


def test_the_readme_offers_the_same_index() -> None:
    index = COMMAND.split()[-1]
    assert index in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", ["torch", "torchvision"])
def test_a_cpu_build_meets_what_the_packages_require_so_that_pip_leaves_it(name: str) -> None:
    version = re.sub(r"\+.*", "", metadata.version(name)) + "+cpu"
    lines = [
        line
        for package in ("nnunetv2", "nnunetv2-dycon", "torchvision", "timm", "dynamic-network-architectures")
        for line in metadata.requires(package) or ()
    ]
    wanted = [one for one in map(Requirement, lines) if one.name.lower() == name]
    assert wanted
    assert all(one.specifier.contains(version) for one in wanted if one.marker is None or one.marker.evaluate())
