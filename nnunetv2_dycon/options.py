"""Options in trainer names: declared as fields of a frozen dataclass, parsed from a name, printed back to it.

`_epochs100_beta0p5to0p05_bf16` is `Settings` text: at each `_` the name of an option, then its value. `p` is
the decimal point, `AtoB` a value that moves from A to B during training, a switch has no value. Names of
options hold no underscore; only the words of a choice may.
"""

import dataclasses
import difflib
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args, get_type_hints

from nnunetv2_dycon.errors import ConfigError

_WHOLE = r"\d{1,40}"  # what int() and float() take without complaint
_NUMBER = rf"{_WHOLE}(?:p\d+)?"


@dataclass(frozen=True)
class Schedule:
    """A value that moves from `start` to `end` over the training; constant where `end` is not given."""

    start: float
    end: float = None  # type: ignore[assignment]  # `start`

    def __post_init__(self) -> None:
        if self.end is None:
            object.__setattr__(self, "end", self.start)


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    flag: bool = False,
    schedule: bool = False,
    none_text: str | None = None,
    neutral: Any = ...,
    help: str = "",
) -> Any:
    """Declare one option: a dataclass field with its default and all that the parser needs.

    Parameters
    ----------
    default : int, float, str, bool, Schedule or None
        Value where the name does not say otherwise. None cannot be written in a name.
    low, high : float, optional
        Smallest and largest value, both allowed; for a schedule they hold at both ends.
    choices : tuple of str, optional
        The words that the option takes.
    flag : bool
        The option is a switch: off, and on where its name occurs.
    schedule : bool
        The option takes `A` or `AtoB` and its value is a `Schedule`.
    none_text : str, optional
        Meaning of the default None, for the printed table.
    neutral : object, optional
        The value with which training is as it was before there was the option; the default if not given. It is that of
        a checkpoint that does not know the option.
    help : str
        One line for the printed table.
    """
    kind = "flag" if flag else "schedule" if schedule else "choice" if choices else "number"
    words = tuple(choices or ())
    metadata = {"kind": kind, "low": low, "high": high, "choices": words, "none": none_text, "help": help}
    metadata["neutral"] = default if neutral is ... else neutral
    return dataclasses.field(default=default, metadata=metadata)


class Row(NamedTuple):
    """One line of the printed table: name, default, allowed values and meaning of an option."""

    option: str
    default: str
    allowed: str
    help: str


class _Option(NamedTuple):
    """One field of a settings class."""

    name: str
    kind: str  # flag, schedule, choice, int or float
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    none: str | None
    help: str
    neutral: Any

    @property
    def pattern(self) -> str:
        """Return the regular expression of the value as written in a name."""
        words = "|".join(sorted(map(re.escape, self.choices), key=len, reverse=True))
        return {
            "flag": "",
            "schedule": rf"{_NUMBER}(?:to{_NUMBER})?",
            "choice": words,
            "int": _WHOLE,
            "float": _NUMBER,
        }[self.kind]

    def read(self, text: str) -> Any:
        """Return the value of a text that matches the pattern."""
        if self.kind == "schedule":
            return Schedule(*(_read_number(part) for part in text.split("to")))
        readers: dict[str, Callable[[str], Any]] = {"choice": str, "int": int, "float": _read_number}
        return True if self.kind == "flag" else readers[self.kind](text)

    def write(self, value: Any) -> str:
        """Return the value as written in a name; the inverse of `read`."""
        if self.kind == "schedule":
            ends = (value.start,) if value.start == value.end else (value.start, value.end)
            return "to".join(map(_write_number, ends))
        return "" if self.kind == "flag" else _write_number(value) if self.kind == "float" else str(value)

    def show(self, value: Any) -> str:
        """Return the value for a person to read."""
        if value is None:
            return self.none or "none"
        if self.kind == "flag":
            return "on" if value else "off"
        return self.write(value)

    @property
    def allowed(self) -> str:
        """Return the allowed values in words."""
        if self.kind == "flag":
            return "no value"
        if self.kind == "choice":
            return " | ".join(self.choices)
        kind = {"int": "whole number", "float": "number", "schedule": "number or AtoB"}[self.kind]
        low, high = (None if end is None else _write_number(end) for end in (self.low, self.high))
        if low is not None and high is not None:
            return f"{kind} from {low} to {high}"
        return f"{kind}{f' >= {low}' if low is not None else ''}{f' <= {high}' if high is not None else ''}"

    def check(self, value: Any) -> None:
        """Raise ConfigError where the value is not allowed; None is for the declaring class to allow."""
        if value is None:
            return
        if self.kind == "choice":
            if value not in self.choices:
                raise ConfigError(f"option {self.name}: {value!r} is not one of {self.allowed}.")
            return
        if self.kind == "flag":
            return
        for end in (value.start, value.end) if self.kind == "schedule" else (value,):
            if not (self.low is None or end >= self.low) or not (self.high is None or end <= self.high):
                raise ConfigError(f"option {self.name}: {self.write(value)} is out of range: {self.allowed}.")


@dataclass(frozen=True)
class Settings:
    """Options of every trainer. A method adds its own in a frozen dataclass that inherits from this one.

    Raises
    ------
    ConfigError
        If a value is out of its range or not one of its choices.
    """

    renamed: ClassVar[Mapping[str, str]] = {}  # former name of an option -> today's

    epochs: int = option(1000, low=1, help="epochs")
    iters: int = option(250, low=1, help="training steps per epoch")
    valiters: int = option(50, low=1, help="validation steps per epoch")
    save: int = option(50, low=1, help="epochs between two checkpoints")
    snapshots: int = option(0, low=0, help="epochs between two kept snapshots of the networks; 0 = none")
    lr: float = option(0.01, low=0.000001, high=10.0, help="learning rate at the start")
    batch: int = option(0, low=0, help="labelled patches per step; 0 = as planned")
    unlabeledbatch: int = option(0, low=0, help="unlabelled patches per step; 0 = as many as labelled")
    seed: int | None = option(None, low=0, high=2**32 - 1, none_text="not set", help="seed of everything random")
    bf16: bool = option(False, flag=True, help="bfloat16 autocast, on a CPU too")
    nomirror: bool = option(False, flag=True, help="no mirroring, in training and in prediction")
    ga: bool = option(
        False, flag=True, help="GADice and GACE in place of Dice and cross-entropy, with true and pseudo-labels"
    )
    gahardest: float = option(
        1.0, low=0.001, high=1.0, help="share of the voxels with true labels in GACE, those of largest cross-entropy"
    )

    def __post_init__(self) -> None:
        for known in _options(type(self)).values():
            known.check(getattr(self, known.name))
        if self.gahardest < 1 and not self.ga:
            raise ConfigError("option gahardest: GACE alone has it; add _ga, or leave gahardest out.")

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.epochs * self.iters

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """Return the numbers that change during training, by name, as functions of the fraction of it that is done."""
        return {}

    @classmethod
    def translated(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """Return settings of a checkpoint (as `dataclasses.asdict` wrote them) in today's names and words.

        Before there was an option, GACE took a tenth of the voxels.
        """
        hardest = 0.1 if stored.get("ga") else 1.0
        return {"gahardest": hardest} | {cls.renamed.get(name, name): value for name, value in stored.items()}


S = TypeVar("S", bound=Settings)


def parse(text: str, settings_type: type[S] | S) -> S:
    """Return the settings that a trainer name carries.

    Parameters
    ----------
    text : str
        What follows the method in the name: empty, or `_` and options.
    settings_type : type or instance of Settings
        The method's settings class, or the values of a preset, from which the text departs.

    Raises
    ------
    ConfigError
        If the text cannot be read; the message is one line and says what to type.

    Examples
    --------
    >>> parse("_lr0p02_epochs5", Settings).epochs
    5
    """
    base = settings_type() if isinstance(settings_type, type) else settings_type
    if "." in text:
        spelled = re.sub(r"(?<!\d)\.", "0.", text).replace(".", "p")
        raise ConfigError(f"a decimal point is written p in a trainer name: type {spelled}")
    known = _options(type(base))
    longest_first = sorted(known.values(), key=lambda item: len(item.name), reverse=True)
    found: dict[str, Any] = {}
    rest = text
    while rest:
        for item in longest_first:
            match = re.match(rf"_{item.name}({item.pattern})(?=_|\Z)", rest, re.ASCII)
            if match:
                break
        else:
            raise ConfigError(_why_not(rest, longest_first, type(base).renamed))
        if item.name in found:
            raise ConfigError(f"option {item.name} occurs twice; leave one out.")
        found[item.name] = item.read(match[1])
        rest = rest[match.end() :]
    return dataclasses.replace(base, **found)


def format(settings: Settings, base: Settings | None = None) -> str:
    """Return the text that `parse` reads back to `settings`, options in the order of their declaration.

    Parameters
    ----------
    settings : Settings
        What to write.
    base : Settings, optional
        Values that need no mention: those of a preset; without it the defaults of the class.

    Raises
    ------
    ConfigError
        If a value cannot be written in a name: None, or a switch that the base has on.
    """
    base = type(settings)() if base is None else base
    parts = []
    for item in _options(type(settings)).values():
        value = getattr(settings, item.name)
        if value == getattr(base, item.name):
            continue
        if value is None or value is False:
            raise ConfigError(f"option {item.name}: {item.show(value)} cannot be written in a trainer name.")
        parts.append(f"_{item.name}{item.write(value)}")
    return "".join(parts)


def stored_values(settings_type: type[Settings], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint in today's options, as `dataclasses.asdict` writes them.

    Parameters
    ----------
    settings_type : type of Settings
        The class of the trainer that reads the checkpoint.
    stored : mapping
        The settings in the checkpoint. A renamed option is translated, a missing one has its neutral value; unknown
        ones stay as they are.
    """
    neutral = {item.name: _plain(item.neutral) for item in _options(settings_type).values()}
    return neutral | settings_type.translated(dict(stored))


def describe(settings_type: type[Settings] | Settings) -> list[Row]:
    """Return one row per option, in canonical order, with the defaults of a class or of a preset."""
    base = settings_type() if isinstance(settings_type, type) else settings_type
    return [
        Row(item.name, item.show(getattr(base, item.name)), item.allowed, item.help)
        for item in _options(type(base)).values()
    ]


def _options(settings_type: Any) -> dict[str, _Option]:
    """Return the options of a class by name."""
    return _declared(settings_type)


@cache
def _declared(settings_type: Any) -> dict[str, _Option]:
    """Return the options of a class by name; TypeError where one is declared in a way no name can carry."""
    hints = get_type_hints(settings_type)
    known = {}
    for field in dataclasses.fields(settings_type):
        if not re.fullmatch("[a-z][a-z0-9]*", field.name) or "kind" not in field.metadata:
            raise TypeError(
                f"{settings_type.__name__}.{field.name}: declare it with option(), lower case, no underscore"
            )
        values = dict(field.metadata)
        if values["kind"] == "number":
            values["kind"] = "float" if float in (hints[field.name], *get_args(hints[field.name])) else "int"
        known[field.name] = _Option(field.name, **values)
    return known


def _why_not(rest: str, longest_first: list[_Option], renamed: Mapping[str, str]) -> str:
    """Return one line that says why no option matches the start of `rest`, and what to type."""
    part = rest[1:].split("_")[0]
    if not part:
        return "a trainer name has no double underscore and none at its end: write _option, then its value."
    for item in longest_first:
        value = part.removeprefix(item.name)
        if value == part or (item.kind in ("int", "float", "schedule") and value[:1].isalpha()):
            continue
        if item.kind == "flag":
            return f"option {item.name} is a switch and takes no value: type _{item.name}"
        return f"option {item.name} has no value {value!r}: type _{item.name} and then {item.allowed}."
    for former, today in renamed.items():
        if part.startswith(former):
            return f"option {former} is called {today} now: type _{today}{part.removeprefix(former)}"
    names = [item.name for item in longest_first]
    word = part[: len(part) - len(part.lstrip(string.ascii_letters))].lower() or part
    nearest = "".join(f"; the nearest is {name}" for name in difflib.get_close_matches(word, names, n=1))
    return f"unknown option {part!r} of this trainer{nearest}. Run: nnUNetv2_dycon trainers"


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Schedule) else value


def _read_number(text: str) -> float:
    return float(text.replace("p", "."))


def _write_number(value: float) -> str:
    """Return the shortest digits that read back to the same number, without an exponent or a final `.0`."""
    text = f"{Decimal(repr(value)):f}"
    whole, _, fraction = text.partition(".")
    return whole if fraction.strip("0") == "" else f"{whole}p{fraction}"
