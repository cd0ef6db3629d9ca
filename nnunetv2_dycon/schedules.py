"""Schedules as plain numbers; time is the fraction of the training done, so that a short run reaches every end."""

import math

from nnunetv2_dycon.errors import ConfigError


def gaussian_ramp(t: float, *, rampup: float = 0.4, delay: float = 0.02) -> float:
    """Weight in [0, 1] that rises as `exp(-5 (1 - min(1, t / rampup))^2)` and is exactly 0 while `t < delay`.

    Parameters
    ----------
    t : float
        Fraction of the training done, in [0, 1].
    rampup : float
        Fraction of the training at which the weight reaches 1, in [0, 1]; 0 means there is no ramp.
    delay : float
        Fraction of the training without any weight, in [0, 1].

    Raises
    ------
    ConfigError
        If an argument is outside [0, 1].

    Examples
    --------
    >>> gaussian_ramp(0.01), gaussian_ramp(0.4), gaussian_ramp(1.0)
    (0.0, 1.0, 1.0)
    >>> round(gaussian_ramp(0.2), 4)     # half-way up: exp(-5 / 4)
    0.2865
    """
    _check_fraction("t", t)
    _check_fraction("rampup", rampup)
    _check_fraction("delay", delay)
    if t < delay:
        return 0.0
    if t >= rampup:
        return 1.0
    return math.exp(-5.0 * (1.0 - t / rampup) ** 2)


def exponential(t: float, start: float, end: float) -> float:
    """Value that goes from `start` (t = 0) to `end` (t = 1) by equal factors, `start (end / start)^t`.

    Parameters
    ----------
    t : float
        Fraction of the training done, in [0, 1].
    start, end : float
        Positive values, or two equal ones (0 included) for a constant.

    Raises
    ------
    ConfigError
        If t is outside [0, 1], or a value is negative, not finite, or only one of them is 0.

    Examples
    --------
    >>> exponential(0.0, 8.0, 2.0), exponential(0.5, 8.0, 2.0), exponential(1.0, 8.0, 2.0)
    (8.0, 4.0, 2.0)
    """
    _check_fraction("t", t)
    if not (math.isfinite(start) and math.isfinite(end) and start >= 0 and end >= 0):
        raise ConfigError(f"start {start} and end {end} of a schedule: give two finite numbers, none below 0.")
    if start == end:
        return start
    if start == 0 or end == 0:
        raise ConfigError(f"start {start} and end {end} of a schedule: 0 is never reached; give two positive numbers.")
    return start * (end / start) ** t


def _check_fraction(name: str, value: float) -> None:
    """Raise ConfigError unless value is in [0, 1]; NaN is not."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} {value} of a schedule: give a fraction of the training, from 0 to 1.")
