"""Findings of a check, as `doctor` and `check` print them."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One finding: its subject, whether all is well, and one line for the user."""

    name: str
    ok: bool
    text: str
