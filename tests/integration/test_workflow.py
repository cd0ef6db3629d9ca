"""The Snakemake workflow on generated images: killed in the middle, started again, finished; and its SLURM profile."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).parents[2] / "scripts" / "workflow"
SMOKE = WORKFLOW / "config" / "phantom_smoke.yaml"
# In the environment of the tests, or one of its own that is in PATH.
SNAKEMAKE = (
    [sys.executable, "-m", "snakemake"] if importlib.util.find_spec("snakemake") else [shutil.which("snakemake")]
)
DATA, RUN = "Dataset901_Phantom", "nnUNetTrainerDyCON_epochs3_iters2_valiters1_save1_seed0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SNAKEMAKE[0] is None, reason="snakemake is not there; type: pip install 'snakemake>=9,<10'"),
]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder whose name a shell would take apart, or run."""
    folder = tmp_path / 'it\'s "a"  $(touch ran)'
    folder.mkdir()
    yield folder
    assert not list(tmp_path.rglob("ran"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **folders, "PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def command(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    def run(*words: str, profile: str = "local", config: Path = SMOKE) -> subprocess.CompletedProcess:
        return subprocess.run(
            words_of(*words, profile=profile, config=config),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=1800,
        )

    return run


def words_of(*words: str, profile: str = "local", config: Path = SMOKE) -> list[str]:
    files = ["-s", str(WORKFLOW / "Snakefile"), "--configfile", str(config)]
    return [*SNAKEMAKE, *files, "--profile", str(WORKFLOW / "profiles" / profile), *words]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 1800
    while not path.exists():
        assert process.poll() is None, "the workflow ended before the training had a checkpoint"
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_workflow_goes_on_where_it_was(tmp_path, environment, command):
    name = f"{RUN}__nnUNetPlans__3d_fullres_patch16_features4_stages3_batch2"
    fold = tmp_path / "nnUNet_results" / DATA / name / "fold_all"
    with open(tmp_path / "first.log", "w") as log:
        first = subprocess.Popen(
            words_of("--cores", "2"), cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    wait_for(fold / "checkpoint_latest.pth", first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (fold / "checkpoint_final.pth").exists()
    raw = tmp_path / "nnUNet_raw" / DATA / "dataset.json"
    written = raw.stat().st_mtime_ns

    assert command("--unlock").returncode == 0
    replanned = tmp_path / "replanned.yaml"
    replanned.write_text(SMOKE.read_text() + "\nplanner: -gpu_memory_target 7\n")
    planned = command("--dry-run", config=replanned).stdout
    assert re.search(r"^plan +1$", planned, re.MULTILINE)
    assert re.search(r"^summary +1$", planned, re.MULTILINE), planned  # and all that comes after the preparation
    second = command("--cores", "2")
    assert second.returncode == 0, second.stdout
    out = tmp_path / "experiments" / "phantom_smoke"
    assert "2 methods in 2 runs on 2 test cases" in (out / "reports" / "Phantom_labeled2" / "report.md").read_text()
    assert f"| Phantom_labeled2 | {RUN.removesuffix('_seed0')} | student | 1 |" in (out / "results.md").read_text()
    assert raw.stat().st_mtime_ns == written  # what was done is not done again
    logs = [path.read_text() for path in sorted(fold.glob("training_log_*.txt"))]
    assert len(logs) == 2
    assert "Epoch 0" in logs[0]
    assert "Epoch 0" not in logs[1]  # continued from its checkpoint
    losses = re.findall(r"train_loss (\S+)", logs[1])
    assert losses
    assert "nan" not in losses
    assert "Nothing to be done" in command().stdout


def test_a_cluster_gets_one_gpu_for_a_training_and_none_for_the_rest(tmp_path, command):
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm") and SNAKEMAKE[0] == sys.executable:
        pytest.skip("the SLURM plugin is not there; type: pip install 'snakemake-executor-plugin-slurm>=2'")
    config = tmp_path / "cuda.yaml"
    config.write_text(SMOKE.read_text().replace("device: cpu", "device: cuda"))
    done = command("--dry-run", profile="slurm", config=config)
    assert done.returncode == 0, done.stdout
    resources = dict(re.findall(r"^rule (\w+):(?:\n    .*)*?\n    resources: (.*)", done.stdout, re.MULTILINE))
    assert {rule for rule, asked in resources.items() if "gpu=1" in asked} == {"train", "predict"}
    assert "slurm_partition=gpu, runtime=1440" in resources["train"]
    assert "slurm_partition=cpu" in resources["preprocess"]
    assert not (tmp_path / "experiments").exists()


def test_a_wrong_configuration_ends_with_one_line(tmp_path, command):
    config = tmp_path / "wrong.yaml"
    config.write_text(SMOKE.read_text().replace("seeds: [0]", "seed: [0]"))
    done = command("--dry-run", config=config)
    assert done.returncode == 1
    assert "error: the configuration has the unknown key 'seed'; did you mean seeds?" in done.stdout
    assert "Traceback" not in done.stdout
