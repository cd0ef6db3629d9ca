import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.schedules import exponential, gaussian_ramp

FRACTIONS = st.floats(0.0, 1.0)


def test_the_ramp_is_zero_before_the_delay_and_on_its_curve_from_there():
    assert gaussian_ramp(0.0199) == 0.0
    assert gaussian_ramp(0.02) == pytest.approx(math.exp(-5 * 0.95**2))
    assert gaussian_ramp(0.1) == pytest.approx(math.exp(-5 * 0.75**2))


def test_the_ramp_is_one_from_the_end_of_its_rise():
    assert gaussian_ramp(0.4) == gaussian_ramp(0.7) == gaussian_ramp(1.0) == 1.0


def test_a_ramp_without_rise_and_delay_is_one_from_the_start():
    assert gaussian_ramp(0.0, rampup=0.0, delay=0.0) == 1.0


def test_a_ramp_shorter_than_its_delay_starts_at_one():
    assert gaussian_ramp(0.2, rampup=0.1, delay=0.3) == 0.0
    assert gaussian_ramp(0.3, rampup=0.1, delay=0.3) == 1.0


@given(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS)
def test_the_ramp_never_falls_and_stays_in_the_unit_interval(t, u, rampup, delay):
    low, high = (gaussian_ramp(x, rampup=rampup, delay=delay) for x in sorted((t, u)))
    assert 0.0 <= low <= high <= 1.0


@pytest.mark.parametrize(
    "arguments", [{"t": -0.1}, {"t": 1.1}, {"t": math.nan}, {"t": 0, "rampup": 2}, {"t": 0, "delay": -1}]
)
def test_the_ramp_refuses_what_is_no_fraction_and_names_it(arguments):
    wrong = list(arguments)[-1]
    with pytest.raises(ConfigError, match=rf"^{wrong} .* from 0 to 1\.$"):
        gaussian_ramp(**arguments)


def test_beta_goes_from_start_to_end_by_equal_factors():
    assert exponential(0.0, 5.0, 0.5) == 5.0
    assert exponential(1.0, 5.0, 0.5) == pytest.approx(0.5)
    assert exponential(0.25, 5.0, 0.5) / exponential(0.5, 5.0, 0.5) == pytest.approx(10**0.25)
    assert exponential(0.5, 0.01, 1.0) == pytest.approx(0.1)


def test_equal_ends_are_a_constant_and_may_be_zero():
    assert exponential(0.3, 0.7, 0.7) == 0.7
    assert exponential(0.3, 0.0, 0.0) == 0.0


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (-1.0, -1.0), (math.inf, math.inf), (math.nan, 1.0)])
def test_beta_refuses_ends_it_cannot_join(ends):
    with pytest.raises(ConfigError, match=r"start .* and end"):
        exponential(0.5, *ends)


def test_beta_refuses_a_time_outside_the_training():
    with pytest.raises(ConfigError, match=r"t 1\.5"):
        exponential(1.5, 1.0, 0.5)
