"""The examples in docstrings are right."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules_with_examples() -> list[str]:
    """Modules of the package with `>>>` in a docstring."""
    found = []
    for path in sorted((ROOT / "nnunetv2_dycon").rglob("*.py")):
        if ">>>" in path.read_text(encoding="utf-8"):
            found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_of_a_module_are_right(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


def test_every_example_is_found_and_run() -> None:
    """A prompt outside of a docstring would never run."""
    for name in modules_with_examples():
        source = (ROOT / name.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
        assert sum(text.count(">>> ") for text in texts) == source.count(">>> "), name


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
