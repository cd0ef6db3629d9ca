import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.methods.bcp import BCPSettings
from nnunetv2_dycon.methods.dycon import DyCONSettings
from nnunetv2_dycon.methods.dycon_bcp import DyCONBCPSettings
from nnunetv2_dycon.methods.mean_teacher import MeanTeacherSettings
from nnunetv2_dycon.options import Row, Schedule, Settings, describe, format, option, parse, stored_values


@dataclass(frozen=True)
class ToySettings(Settings):
    """One option of every kind, with names and words that begin alike."""

    beta: Schedule = option(Schedule(0.5, 0.05), schedule=True, low=0.001, high=20, help="entropy scale")
    w: float = option(1, low=0, high=1000, help="weight")
    wfecl: float = option(0.1, low=0, high=1000)
    target: str = option("mse", choices=("mse", "ce", "ce_dice"))
    stage: int | None = option(None, low=0, high=20, none_text="stride nearest 8")
    hard: bool = option(False, flag=True)


@dataclass(frozen=True)
class LaterSettings(Settings):
    """An option that came later, one that was renamed, and a schedule."""

    renamed: ClassVar[Mapping[str, str]] = {"heat": "warmth"}

    warmth: float = option(2.5, neutral=0.0)
    ends: Schedule = option(Schedule(3.0, 2.0), schedule=True, neutral=Schedule(1.0))


PRESET = ToySettings(epochs=7, target="ce", beta=Schedule(5.0), seed=3)

ends = st.floats(0.001, 20, allow_nan=False)
toy_values = {
    "epochs": st.integers(1, 10**12),
    "lr": st.floats(1e-6, 10),
    "seed": st.integers(0, 2**32 - 1),
    "bf16": st.booleans(),
    "beta": st.builds(Schedule, ends) | st.builds(Schedule, ends, ends),
    "w": st.floats(0, 1000),
    "wfecl": st.floats(0, 1000),
    "target": st.sampled_from(["mse", "ce", "ce_dice"]),
    "stage": st.integers(0, 20),
    "hard": st.booleans(),
}
toy_settings = st.fixed_dictionaries({}, optional=toy_values).map(lambda values: ToySettings(**values))


@given(toy_settings)
def test_a_name_reads_back_to_the_settings_it_was_written_from(settings):
    text = format(settings)
    assert parse(text, ToySettings) == settings
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")
    assert "__" not in text
    assert not text.endswith("_")


@given(st.fixed_dictionaries({}, optional=toy_values).map(lambda values: dataclasses.replace(PRESET, **values)))
def test_a_preset_is_the_base_that_a_name_departs_from(settings):
    assert parse(format(settings, PRESET), PRESET) == settings
    assert format(PRESET, PRESET) == ""
    assert parse("", PRESET) == PRESET


@given(st.text(alphabet="_p.0123456789abehilorstuw", max_size=25))
def test_any_text_is_settings_or_one_line_of_error(text):
    try:
        settings = parse(text, ToySettings)
    except ConfigError as error:
        message = str(error)
    else:
        assert parse(format(settings), ToySettings) == settings
        message = "fine"
    assert len(message.splitlines()) == 1


def test_options_may_come_in_any_order_and_are_printed_in_the_order_of_declaration():
    parts = ["_epochs100", "_bf16", "_beta0p25", "_w2p5", "_targetce_dice"]
    orders = {parse("".join(order), ToySettings) for order in itertools.permutations(parts)}
    expected = ToySettings(epochs=100, bf16=True, beta=Schedule(0.25), w=2.5, target="ce_dice")
    assert orders == {expected}
    assert format(expected) == "".join(parts)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("_epochs5", "epochs", 5),
        ("_lr0p005", "lr", 0.005),
        ("_lr1", "lr", 1.0),
        ("_lr0p00001", "lr", 1e-5),
        ("_seed0", "seed", 0),
        ("_bf16", "bf16", True),
        ("_beta0p5to0p05", "beta", Schedule(0.5, 0.05)),
        ("_beta2", "beta", Schedule(2.0, 2.0)),
        ("_beta5to0p5", "beta", Schedule(5.0, 0.5)),
        ("_w3", "w", 3.0),
        ("_wfecl3", "wfecl", 3.0),
        ("_targetce", "target", "ce"),
        ("_targetce_dice", "target", "ce_dice"),
        ("_stage0", "stage", 0),
    ],
)
def test_each_kind_of_value_is_read(text, field, value):
    settings = parse(text, ToySettings)
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(value)
    assert dataclasses.replace(settings, **{field: getattr(ToySettings(), field)}) == ToySettings()


def test_a_word_with_an_underscore_does_not_swallow_the_option_behind_it():
    assert parse("_targetce_hard", ToySettings) == ToySettings(target="ce", hard=True)
    assert parse("_targetce_dice_hard", ToySettings) == ToySettings(target="ce_dice", hard=True)


def test_the_longest_name_that_fits_is_meant():
    @dataclass(frozen=True)
    class Alike(Settings):
        on: str = option("all", choices=("all", "ly"))
        only: bool = option(False, flag=True)

    assert parse("_only", Alike) == Alike(only=True)
    assert parse("_onall_only", Alike) == Alike(only=True)


def test_only_what_differs_is_printed():
    assert format(ToySettings()) == ""
    assert format(parse("_w1p0_epochs1000_beta0p50to0p05_lr0p02", ToySettings)) == "_lr0p02"
    assert format(ToySettings(lr=1e-5, beta=Schedule(5, 5), w=100)) == "_lr0p00001_beta5_w100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_epoch5", "unknown option 'epoch5' of this trainer; the nearest is epochs."),
        ("_Epochs5", "unknown option 'Epochs5' of this trainer; the nearest is epochs."),
        ("_betta5", "unknown option 'betta5' of this trainer; the nearest is beta."),
        ("_targett", "option target has no value 't': type _target and then mse | ce | ce_dice."),
        ("_wfec5", "unknown option 'wfec5' of this trainer; the nearest is wfecl."),
        ("_epochs0", "option epochs: 0 is out of range: whole number >= 1."),
        ("_w1001", "option w: 1001 is out of range: number from 0 to 1000."),
        ("_beta0p5to0", "option beta: 0p5to0 is out of range: number or AtoB from 0p001 to 20."),
        ("_beta21to1", "option beta: 21to1 is out of range: number or AtoB from 0p001 to 20."),
        ("_stage21", "option stage: 21 is out of range: whole number from 0 to 20."),
        ("_epochs", "option epochs has no value '': type _epochs and then whole number >= 1."),
        ("_epochs1p5", "option epochs has no value '1p5'"),
        ("_viewbcp", "unknown option 'viewbcp' of this trainer. Run"),  # nothing near it
        ("_betato5", "unknown option 'betato5' of this trainer; the nearest is beta."),
        ("_beta1to", "option beta has no value '1to'"),
        ("_epochs5_w1_epochs5", "option epochs occurs twice"),
        ("_hard_hard", "option hard occurs twice"),
        ("_beta0.25_w.5", "type _beta0p25_w0p5"),
        ("__epochs5", "no double underscore"),
        ("_epochs5__w1", "no double underscore"),
        ("_epochs5_", "none at its end"),
        ("_", "none at its end"),
        ("_bf161", "option bf16 is a switch and takes no value: type _bf16"),
        ("_hardtrue", "option hard is a switch and takes no value: type _hard"),
        ("_epochs٣", "option epochs has no value"),
        ("_lr1e-3", "option lr has no value '1e-3'"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_line_that_says_what_to_type(text, message):
    with pytest.raises(ConfigError) as caught:
        parse(text, ToySettings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_checked_wherever_settings_are_made():
    with pytest.raises(ConfigError, match="option epochs: 0 is out of range"):
        Settings(epochs=0)
    with pytest.raises(ConfigError, match=r"'l1' is not one of mse \| ce \| ce_dice"):
        ToySettings(target="l1")
    with pytest.raises(ConfigError, match="option w: NaN is out of range"):
        ToySettings(w=float("nan"))


def test_what_no_name_can_say_is_refused_when_printing():
    for settings in (dataclasses.replace(PRESET, seed=None), dataclasses.replace(PRESET, hard=False)):
        with pytest.raises(ConfigError, match="cannot be written in a trainer name"):
            format(settings, dataclasses.replace(PRESET, hard=True))


def test_the_table_has_one_row_per_option_in_order_with_the_defaults_of_class_or_preset():
    rows = describe(ToySettings)
    assert [row.option for row in rows] == [field.name for field in dataclasses.fields(ToySettings)]
    table = {row.option: row for row in rows}
    assert table["beta"] == Row("beta", "0p5to0p05", "number or AtoB from 0p001 to 20", "entropy scale")
    assert table["target"].allowed == "mse | ce | ce_dice"
    assert table["stage"].default == "stride nearest 8"
    assert table["hard"][1:3] == ("off", "no value")
    assert {row.option: row.default for row in describe(PRESET)}["beta"] == "5"


def test_the_options_of_every_trainer_have_nnunets_defaults():
    assert dataclasses.asdict(Settings()) == {
        "epochs": 1000,
        "iters": 250,
        "valiters": 50,
        "save": 50,
        "snapshots": 0,
        "lr": 0.01,
        "batch": 0,
        "unlabeledbatch": 0,
        "seed": None,
        "bf16": False,
        "nomirror": False,
        "ga": False,
        "gahardest": 1.0,
    }


def test_a_field_that_no_name_can_carry_is_refused():
    @dataclass(frozen=True)
    class Underscore(Settings):
        two_words: int = option(1)

    @dataclass(frozen=True)
    class Bare(Settings):
        bare: int = 1

    for broken in (Underscore, Bare):
        with pytest.raises(TypeError, match=r"declare it with option\(\)"):
            broken()


# --- settings of checkpoints


@pytest.mark.parametrize("kind", [BCPSettings, DyCONBCPSettings])
def test_a_checkpoint_of_the_former_copy_paste_mixed_both_ways_next_to_the_labelled_patches(kind) -> None:
    stored = {name: value for name, value in dataclasses.asdict(kind()).items() if name not in ("view", "truth")}
    assert stored_values(kind, stored) == dataclasses.asdict(kind(view="bcp", truth="both"))


@pytest.mark.parametrize(("unmixed", "truth"), [(True, "both"), (False, "mixes")])
@pytest.mark.parametrize("kind", [BCPSettings, DyCONBCPSettings])
def test_the_former_switch_of_copy_paste_says_where_true_labels_are_taught(kind, unmixed: bool, truth: str) -> None:
    stored = {name: value for name, value in dataclasses.asdict(kind()).items() if name != "truth"}
    stored["unmixed"] = unmixed
    kept = dict(stored)
    assert stored_values(kind, stored) == dataclasses.asdict(kind(truth=truth))
    assert stored == kept
    with pytest.raises(ConfigError, match=r"option unmixed is called truthboth now: type _truthboth$"):
        parse("_unmixed", kind)


def test_an_option_that_a_checkpoint_does_not_know_has_its_neutral_value() -> None:
    stored = {"epochs": 7}
    found = stored_values(LaterSettings, stored)
    assert stored == {"epochs": 7}
    assert (found["epochs"], found["warmth"], found["ends"]) == (7, 0.0, {"start": 1.0, "end": 1.0})
    assert LaterSettings().warmth == 2.5  # the default is another one


def test_a_renamed_option_is_read_under_its_name_of_today_and_an_unknown_one_stays() -> None:
    found = stored_values(LaterSettings, {"heat": 4.0, "gone": 1})
    assert found["warmth"] == 4.0
    assert found["gone"] == 1
    assert "heat" not in found


def test_a_name_with_a_renamed_option_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"option heat is called warmth now: type _warmth1p5$"):
        parse("_heat1p5", LaterSettings)


@pytest.mark.parametrize(
    ("stored", "loss", "target"),
    [
        ({"target": None, "uncl": None, "labels": None}, "ce_dice", None),
        ({"target": "mse", "uncl": None, "labels": "soft"}, "literal", "soft"),
        ({"target": None, "uncl": "guarded", "labels": None}, "guarded", None),
        ({"target": "mse", "uncl": "literal", "labels": None}, "literal", None),
        ({"target": "ce_dice", "uncl": None, "labels": "hard"}, "ce_dice", "hard"),
    ],
)
def test_the_options_of_uncl_are_translated(stored: dict, loss: str, target: str | None) -> None:
    found = stored_values(DyCONSettings, {**stored, "ramp": 0.2})
    assert (found["loss"], found["target"], found["rampup"]) == (loss, target, 0.2)
    assert not {"uncl", "labels", "ramp"} & set(found)


def test_the_option_of_mean_teacher_is_translated() -> None:
    found = stored_values(MeanTeacherSettings, {"target": "ce_dice", "ramp": 0.1})
    assert (found["loss"], found["rampup"]) == ("ce_dice", 0.1)
