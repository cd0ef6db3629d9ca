"""Options that several methods share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from nnunetv2_dycon.options import Settings, option
from nnunetv2_dycon.schedules import gaussian_ramp
from nnunetv2_dycon.views import VIEWS


def paste_option(default: float) -> Any:
    """Declare option `paste`, whose best value depends on the method."""
    return option(
        default,
        low=0.0,
        high=1000.0,
        neutral=0.0,
        help="weight of a loss on labelled patches with a box from another labelled patch; next to unlabelled terms it "
        "has their ramp",
    )


@dataclass(frozen=True)
class TeacherSettings(Settings):
    """Options of every method that keeps an averaged copy of the student."""

    ema: float | None = option(
        None,
        low=0.0,
        high=0.99999,
        none_text="0p999, at most 1 - 10/steps",
        help="EMA decay of the teacher, approached as 1 - 1/(step + 1)",
    )
    paste: float = paste_option(0.0)


def learned_option(default: float) -> Any:
    """Declare option `learned`, whose best value depends on what a method teaches."""
    return option(
        default,
        low=0.0,
        high=1.0,
        neutral=0.0,
        help="Dice on labelled patches from which unlabelled ones teach a class; 0 = all classes from the start",
    )


@dataclass(frozen=True)
class UnlabeledSettings(Settings):
    """Options of every method that learns from unlabelled patches."""

    learned: float = learned_option(0.8)


@dataclass(frozen=True)
class ViewSettings(UnlabeledSettings):
    """Options of every method that compares two looks at an unlabelled patch; further bases come after this one."""

    renamed: ClassVar[Mapping[str, str]] = {"ramp": "rampup"}

    rampup: float = option(
        0.4, low=0.0, high=1.0, help="fraction of the training over which unlabelled terms rise to their weight"
    )
    delay: float = option(0.02, low=0.0, high=1.0, help="fraction of the training before unlabelled terms begin")
    view: str = option("noise", choices=tuple(VIEWS), help="what differs between student and teacher input")

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Add `ramp`, the factor in [0, 1] of all unlabelled terms."""
        ramp = partial(gaussian_ramp, rampup=self.rampup, delay=self.delay)
        return {**super().schedules(), "ramp": ramp}
