import dataclasses
import pickle
import sys
import types

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nnunetv2_dycon import options
from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.options import Schedule
from nnunetv2_dycon.trainers import names

PRESETS = {
    "nnUNetTrainerDyCONPaper": "nnUNetTrainerDyCON",
    "nnUNetTrainerGAMagicNet": "nnUNetTrainerMagicNet",
    "nnUNetTrainerDyCONGAMagicNet": "nnUNetTrainerDyCONMagicNet",
}


class StandInEngine:
    """Takes the place of the engine, whose import takes nnU-Net's ten seconds."""


@pytest.fixture(autouse=True)
def stand_in_engine(monkeypatch):
    engine = types.ModuleType("nnunetv2_dycon.trainers.engine")
    engine.nnUNetTrainerSSL = StandInEngine
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    names.trainer_class.cache_clear()
    yield
    names.trainer_class.cache_clear()


@pytest.mark.parametrize("name", names.TRAINERS)
def test_every_trainer_has_a_class_with_its_method_and_settings(name):
    method, settings = names.TRAINERS[name]
    assert issubclass(names.trainer_class(name), StandInEngine)
    assert names.trainer_class(name).method_type is method
    assert names.trainer_class(name).settings == settings
    assert type(settings) is method.settings_type
    assert "_" not in name


def test_a_name_with_options_is_a_class_of_exactly_that_name():
    name = "nnUNetTrainerDyCON_nomirror_epochs5_beta0p25"
    found = names.trainer_class(name)
    assert (found.__name__, found.__qualname__, found.__module__) == (name, name, names.__name__)
    assert found.settings.epochs == 5
    assert found.settings.nomirror
    assert found.settings.beta == Schedule(0.25, 0.25)
    assert names.trainer_class("nnUNetTrainerDyCON").settings.epochs == 1000


def test_a_preset_keeps_its_values_under_further_options():
    preset = names.TRAINERS["nnUNetTrainerDyCONPaper"][1]
    assert preset != names.TRAINERS["nnUNetTrainerDyCON"][1]
    found = names.trainer_class("nnUNetTrainerDyCONPaper_epochs5").settings
    assert found == dataclasses.replace(preset, epochs=5)


def test_a_class_is_made_once_and_pickled_by_name():
    for name in ("nnUNetTrainerDyCON", "nnUNetTrainerMeanTeacher_epochs3_lr0p5"):
        found = names.trainer_class(name)
        assert names.trainer_class(name) is found
        assert getattr(names, name) is found
        assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainer",
        "nnUNetTrainer_5epochs",
        "nnUNetTrainerDyCONX",
        "nnUNetTrainerDyC",
        "DyCON",
        "__path__",
        "_",
    ],
)
def test_a_name_of_somebody_else_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=name):
        names.trainer_class(name)


def test_a_name_of_ours_in_other_capital_letters_is_corrected():
    with pytest.raises(ConfigError, match=r"no trainer nnUNetTrainerDycon: type nnUNetTrainerDyCON_epochs5$"):
        names.trainer_class("nnUNetTrainerDycon_epochs5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nnUNetTrainerDyCON_beta0.25", "type _beta0p25"),
        ("nnUNetTrainerDyCON_epoch5", "the nearest is epochs"),
        ("nnUNetTrainerDyCON__epochs5", "no double underscore"),
        ("nnUNetTrainerLabeledOnly_beta1", "unknown option 'beta1'"),
        ("nnUNetTrainerDyCONPaper_epochs0", "out of range"),
    ],
)
def test_a_name_of_ours_with_bad_options_is_an_error_that_names_it(name, message):
    with pytest.raises(ConfigError) as caught:
        names.trainer_class(name)
    assert str(caught.value).startswith(f"{name}: ")
    assert message in str(caught.value)


def numbers(low, high, *, whole):
    if whole:
        return st.integers(int(low or 0), int(high) if high is not None else 10**9)
    return st.floats(low or 0.0, high if high is not None else 1e9)


def values(field):
    """Return a strategy for the values of one option, from its declaration."""
    low, high = field.metadata["low"], field.metadata["high"]
    if field.metadata["kind"] == "flag":
        return st.booleans()
    if field.metadata["kind"] == "choice":
        return st.sampled_from(field.metadata["choices"])
    if field.metadata["kind"] == "schedule":
        ends = numbers(low, high, whole=False)
        return st.builds(Schedule, ends) | st.builds(Schedule, ends, ends)
    return numbers(low, high, whole=field.type in (int, int | None, "int", "int | None"))


@pytest.mark.parametrize("name", names.TRAINERS)
@given(data=st.data())
def test_every_name_reads_back_to_the_settings_it_was_written_from(name, data):
    base = names.TRAINERS[name][1]
    fields = {
        field.name: values(field)
        for field in dataclasses.fields(base)
        if getattr(base, field.name) is not True  # a preset's switch cannot be named off
    }
    changes = data.draw(st.fixed_dictionaries({}, optional=fields))
    try:
        settings = dataclasses.replace(base, **changes)
    except ConfigError:  # options that contradict each other
        assume(False)
    assert options.parse(options.format(settings, base), base) == settings


def test_the_list_names_every_trainer_with_all_its_options():
    listed = names.list_trainers()
    assert [info.name for info in listed] == list(names.TRAINERS)
    for info in listed:
        method, settings = names.TRAINERS[info.name]
        assert info.preset_of == PRESETS.get(info.name)
        assert info.summary
        assert info.summary in method.__doc__
        assert [row.option for row in info.options] == [field.name for field in dataclasses.fields(settings)]
        assert all(row.help for row in info.options)
