"""Imports go one way: read from the source text, against the table of layers."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "nnunetv2_dycon"

# "" is the package itself, for its version
BASE = {
    "",
    "errors",
    "exit_codes",
    "schedules",
    "options",
    "folders",
    "locks",
    "parallel",
    "files",
    "findings",
    "shared_memory",
    "command_lines",
}
TENSORS = {"losses", "networks", "views", "cubes", "ranks", "checkpoint", "precision", "randomness"}
# Part of the package -> the other parts that it may import.
MAY_IMPORT = {
    "": set(),
    "_register": {"parallel"},  # in processes that a training starts
    "errors": set(),
    "exit_codes": {"errors"},
    "schedules": {"errors"},
    "options": {"errors"},
    "folders": {"errors"},
    "locks": {"errors"},
    "parallel": {"errors"},
    "files": {"errors", "locks"},
    "findings": set(),
    "shared_memory": set(),
    "command_lines": set(),  # asks torch for a device
    **dict.fromkeys(TENSORS, BASE),
    "learned": BASE | TENSORS,
    "pieces": BASE | TENSORS,
    "step": BASE | TENSORS | {"learned"},
    "methods": BASE | TENSORS | {"learned", "pieces", "step"},
    "data": BASE | TENSORS | {"_register"},
    "trainers": BASE | TENSORS | {"step", "methods", "data"},
    "_nnunet_ext": {"trainers"},
    "trained": BASE | TENSORS | {"data", "trainers"},
    "inference": BASE | TENSORS | {"data", "trained"},
    "export": BASE | TENSORS | {"step", "methods", "data", "trainers", "trained"},
    "phantom": BASE | {"data", "conversion"},
    "doctor": BASE | {"_register", "precision", "trainers"},
    "conversion": BASE | {"data"},
    "dataset_conversion": BASE | {"conversion"},
    "evaluation": BASE | {"data", "checkpoint"},  # the facts of a run; torch is imported where one is read
    "pictures": BASE
    | TENSORS
    | {"data", "conversion", "evaluation", "methods", "step", "trainers", "trained", "inference"},
    "annotation": BASE | {"data", "conversion", "evaluation", "trainers", "trained", "inference", "pictures"},
    "self_training": BASE | {"data", "conversion", "evaluation", "trainers"},
    "commands": BASE
    | {"data", "trainers", "export", "phantom", "doctor", "conversion", "dataset_conversion", "evaluation"}
    | {"annotation", "pictures"},
}
STANDARD_LIBRARY_ONLY = {
    "",
    "_register",
    "errors",
    "exit_codes",
    "schedules",
    "options",
    "folders",
    "locks",
    "parallel",
    "files",
    "findings",
    "shared_memory",
    "commands",
}
WITHOUT_NNUNET = STANDARD_LIBRARY_ONLY | TENSORS | {"command_lines", "learned", "step", "methods", "_nnunet_ext"}


def sources() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "dataset_conversion").rglob("*.py")])


def part_of(module: str) -> str:
    """Return the part of a dotted module name that starts with the package."""
    return [*module.split("."), ""][1]


def part_of_file(path: Path) -> str:
    if ROOT / "dataset_conversion" in path.parents:
        return "dataset_conversion"
    first = path.relative_to(ROOT / PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # "from package import part" names a module as much as "import package.part" does
            inside = node.module == PACKAGE
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names] if inside else [node.module]
            yield from ((node.lineno, "" if name == f"{PACKAGE}.__version__" else name) for name in names)


def cases() -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sources()]


@pytest.mark.parametrize("path", cases())
def test_a_module_imports_only_parts_below_it(path):
    part = part_of_file(path)
    assert part in MAY_IMPORT, f"{path}: give its part a row in the table"
    for line, name in imported(path):
        if name.split(".")[0] == PACKAGE and part_of(name) != part:
            assert part_of(name) in MAY_IMPORT[part], f"{path}:{line}: {part} must not import {name}"


@pytest.mark.parametrize("path", cases())
def test_a_module_needs_no_more_than_its_layer_has(path):
    part = part_of_file(path)
    for line, name in imported(path):
        top = name.split(".")[0]
        if part in WITHOUT_NNUNET:
            assert not top.startswith(("nnunetv2", "batchgenerators")) or top == PACKAGE, f"{path}:{line}: {name}"
        if part in STANDARD_LIBRARY_ONLY:
            assert top in {PACKAGE, "", *sys.stdlib_module_names}, f"{path}:{line}: {name}"


def test_what_runs_at_every_start_imports_os_alone():
    assert list(imported(ROOT / PACKAGE / "__init__.py")) == []
    names = [name for _, name in imported(ROOT / PACKAGE / "_register.py")]
    assert names == ["os", "nnunetv2_dycon.parallel"]  # that one in processes of a training alone: see test_register


def test_the_shim_imports_names_and_messages_alone():
    (shim,) = (ROOT / PACKAGE / "_nnunet_ext").glob("*.py")
    assert [name for _, name in imported(shim)] == [f"{PACKAGE}.trainers.messages", f"{PACKAGE}.trainers.names"]


def test_commands_imports_nothing_heavy_before_a_verb_runs():
    """`--help` is quick: at the top of commands.py there is the base alone."""
    path = ROOT / PACKAGE / "commands.py"
    top = {node.lineno for node in ast.parse(path.read_text()).body}
    names = [name for line, name in imported(path) if line in top and name.startswith(PACKAGE)]
    assert {part_of(name) for name in names} <= BASE


def test_every_package_that_is_imported_is_declared_and_none_besides():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # these may be absent: h5py is for two of the collections' forms, captum for one picture
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *optional["convert"], *optional["pictures"]]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines}
    declared = {{"scikit_image": "skimage"}.get(name, name) for name in declared}
    tops = {name.split(".")[0] for path in sources() for _, name in imported(path)}
    tops = {{"mpl_toolkits": "matplotlib"}.get(top, top) for top in tops}  # a part of it
    third_party = {top.lower() for top in tops - {PACKAGE, ""} if top not in sys.stdlib_module_names}
    assert third_party == declared
