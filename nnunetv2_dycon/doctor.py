"""Check an installation by nnU-Net's own search; each finding is one line with its remedy."""

import contextlib
import importlib
import io
import os
import re
import site
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import nnunetv2_dycon
from nnunetv2_dycon import _register
from nnunetv2_dycon.findings import Finding
from nnunetv2_dycon.shared_memory import TRAININGS_ONLY, free_bytes, in_words, memory_shortage, waiting_batches

START_UP_FILE = "nnunetv2_dycon_ext.pth"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
NNUNET_FROM, NNUNET_BELOW = (2, 8, 1), (2, 9)
# Bytes: two patches of 128 x 128 x 128 in float32, their targets of five resolutions in int16; in training as many
# unlabelled patches.
USUAL_BATCHES = (43_141_120, 26_363_904)
REINSTALL = "reinstall both in one command: pip install --force-reinstall torch torchvision"


def doctor() -> list[Finding]:
    """Return all findings; nothing is changed and no user data is read."""
    with warnings.catch_warnings():  # deprecations inside torch and nnU-Net are not findings
        warnings.simplefilter("ignore")
        return [
            *_versions(),
            *(_folder(name) for name in FOLDERS),
            *_registration(),
            _torchvision(),
            *_trainers(),
            *_machine(),
            _shared_memory(),
        ]


def export_line() -> str:
    """Return the shell command that replaces the start-up file."""
    variable = _register.VARIABLE
    return f'export {variable}="${{{variable}:+${variable}{os.pathsep}}}{_register.FOLDER}"'


def _versions() -> Iterator[Finding]:
    here = Path(nnunetv2_dycon.__file__).parent
    installed = _version("nnunetv2-dycon")
    note = "" if installed else "; runs from its folder but is not installed: pip install ."
    yield Finding("nnunetv2_dycon", installed is not None, f"{nnunetv2_dycon.__version__} in {here}{note}")
    version = _version("nnunetv2")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version or "")[:3])
    good = NNUNET_FROM <= numbers < NNUNET_BELOW
    yield Finding(
        "nnunetv2",
        good,
        (version or "missing") + ("" if good else "; type: pip install 'nnunetv2>=2.8.1,<2.9'"),
    )
    for name in ("torch", "torchvision"):
        version = _version(name)
        yield Finding(name, version is not None, version or f"missing; {REINSTALL}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _folder(name: str) -> Finding:
    path = os.environ.get(name)
    if not path:
        return Finding(name, False, f"not set; type: export {name}=/path/to/{name}")
    if not os.path.isdir(path):
        return Finding(name, False, f"{path} does not exist; type: mkdir -p '{path}'")
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        # Raw data are often shared and read-only, and training does not write there.
        return Finding(name, name == "nnUNet_raw", f"{path} is not writable ({error.strerror})")
    return Finding(name, True, path)


def _registration() -> Iterator[Finding]:
    variable, folder = _register.VARIABLE, _register.FOLDER
    listed = [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry]
    active = folder in listed
    shown = [entry if os.path.isdir(entry) else f"{entry} (does not exist)" for entry in listed]
    yield Finding(variable, active, f"{os.pathsep.join(shown) or 'empty'}{'' if active else '; ours is not in it'}")
    found = [str(Path(root, START_UP_FILE)) for root in _site_folders() if Path(root, START_UP_FILE).is_file()]
    where = found[0] if found else f"no {START_UP_FILE} in {', '.join(_site_folders())}"
    if os.environ.get(_register.SWITCH_OFF) == "1":
        where += f"; switched off by {_register.SWITCH_OFF}=1"
    elif found and not active:
        where += "; there but did not run (python -S?)"
    yield Finding("start-up file", active, where if active else f"{where}; type the next line")
    yield Finding("the same by hand", True, export_line())


def _site_folders() -> list[str]:
    """Return the folders whose start-up files Python reads."""
    return [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]


def _torchvision() -> Finding:
    """Import what nnU-Net's search imports on its way to any trainer that is not its default one."""
    try:
        importlib.import_module("timm")
    except Exception as error:  # a torchvision of another torch fails in many ways, RuntimeError among them
        why = f"cannot be imported ({_one_line(error)}), so only nnU-Net's default trainer is found"
        return Finding("timm and torchvision", False, f"{why}; {REINSTALL}")
    return Finding("timm and torchvision", True, "can be imported")


def _trainers() -> Iterator[Finding]:
    """Ask nnU-Net's own search for every trainer of ours."""
    try:
        from nnunetv2_dycon.trainers.names import TRAINERS
    except Exception as error:  # whatever is broken, the other findings are wanted too
        yield Finding("trainers", False, f"cannot be imported: {_one_line(error)}")
        return
    for name in TRAINERS:
        try:
            yield _found_by_nnunet(name)
        except Exception as error:
            yield Finding(name, False, f"nnU-Net's search fails: {_one_line(error)}")


def _found_by_nnunet(name: str) -> Finding:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_dycon.trainers.names import trainer_class

    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter):
        found = recursive_find_trainer_class_by_name(name)
    folder = re.search(r"^Using trainer .* from: (.*)$", chatter.getvalue(), re.MULTILINE)
    origin = folder[1] if folder else getattr(sys.modules.get(found.__module__), "__file__", found.__module__)
    if found is trainer_class(name):
        return Finding(name, True, f"found by nnU-Net in {origin}")
    return Finding(name, False, f"shadowed: nnU-Net takes the class of that name in {origin}; rename or remove it")


def _machine() -> Iterator[Finding]:
    try:
        import torch

        from nnunetv2_dycon.precision import cpu_has_bf16
    except Exception as error:
        yield Finding("devices", False, f"torch cannot be imported: {_one_line(error)}; {REINSTALL}")
        return
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Finding(
        "devices",
        True,
        ", ".join(cards) if cards else f"no CUDA device; CPU, {torch.get_num_threads()} threads",
    )
    text = "fast: option bf16 pays" if cpu_has_bf16() else "not in hardware: leave option bf16 out"
    yield Finding("bf16 on this CPU", True, text)


def _shared_memory() -> Finding:
    """Compare the free shared memory with what loader processes need for patches of nnU-Net's usual size."""
    name = "shared memory"
    try:
        import torch

        from nnunetv2_dycon.trainers.loaders import loader_processes, pool_sizes

        processes, pinned = loader_processes(), torch.cuda.is_available()
    except Exception as error:
        text = f"the number of loader processes is not known ({_one_line(error)}); correct nnUNet_n_proc_DA"
        return Finding(name, False, text)
    if not processes:
        return Finding(name, True, f"not needed: nnUNet_n_proc_DA=0 ({TRAININGS_ONLY})")
    pools = zip(USUAL_BATCHES, pool_sizes(processes), strict=True)
    needed = sum(size * waiting_batches(*pool, pinned=pinned) for size, pool in pools)
    free = free_bytes()
    found = memory_shortage(free, needed)
    if found:
        return Finding(name, False, f"{processes} loader processes and patches of 128 x 128 x 128: {found}")
    there = "no limit" if free is None else f"{in_words(free)} free"
    return Finding(name, True, f"{there}, enough for {processes} loader processes")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
