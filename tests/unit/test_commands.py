import importlib
import importlib.util
import inspect
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from nnunetv2_dycon import commands
from nnunetv2_dycon.conversion.job import Conversion
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.options import Settings, describe

# The least that each verb must be given.
REQUIRED = {
    "doctor": [],
    "trainers": [],
    "convert": ["LA"],
    "split": ["-d", "4", "--as", "604", "--labeled", "10"],
    "check": ["-d", "604"],
    "preprocess_unlabeled": ["-d", "501"],
    "phantom": ["-d", "501"],
    "self_train": ["-d", "501", "--as", "601"],
    "export": ["-d", "501", "-tr", "nnUNetTrainerDyCON", "-o", "out"],
    "evaluate": ["labelsTs", "predictions"],
    "compare": ["-d", "501", "--runs", "nnUNetTrainer", "-o", "out"],
    "rank": ["-d", "501", "-tr", "nnUNetTrainerDyCON"],
    "annotate": ["-d", "501", "case_1", "case_1.nii.gz"],
    "plot dataset": ["-d", "501"],
    "plot uncertainty": ["-d", "501", "-tr", "nnUNetTrainerDyCON"],
    "plot gradcam": ["-d", "501", "-tr", "nnUNetTrainerDyCON"],
    "plot landscape": ["-d", "501", "-tr", "nnUNetTrainerDyCON"],
    "plot overlay": ["-d", "501", "--runs", "predictions"],
}


FINDINGS = [types.SimpleNamespace(name="a", ok=True, text="b")]
CONVERSION = Conversion(Path("raw/Dataset604_X"), "written", "X", rows=())
RESULTS = {
    "doctor": FINDINGS,
    "check": FINDINGS,
    "convert": CONVERSION,
    "split": CONVERSION,
    "export": Path("no such folder"),
    "self_train": types.SimpleNamespace(folder="fold_0", then="nnUNetv2_predict -d 601"),
    "rank": types.SimpleNamespace(cases=("case_7",)),
    "annotate": types.SimpleNamespace(commands=("nnUNetv2_preprocess -d 501",)),
    "plot dataset": types.SimpleNamespace(files=[]),
    "plot uncertainty": types.SimpleNamespace(files=[]),
    "plot gradcam": types.SimpleNamespace(files=[]),
    "plot landscape": types.SimpleNamespace(files=[]),
    "plot overlay": types.SimpleNamespace(files=[]),
}


@pytest.fixture
def called(monkeypatch):
    """Put stand-ins in the place of all functions; return what they are called with."""
    calls = []

    def stand_in(name, result):
        def function(**arguments):
            calls.append((name, arguments))
            return result

        return function

    for name, verb in commands.VERBS.items():
        module, function = verb.function.split(":")
        result = RESULTS.get(name, [])
        fake = types.ModuleType(module)
        fake.__spec__ = importlib.util.find_spec(module)  # help reads its source text
        setattr(fake, function, stand_in(name, result))
        monkeypatch.setitem(sys.modules, module, fake)
    return calls


def run(*arguments):
    script = f"""
import sys
from nnunetv2_dycon.commands import main
try:
    main({list(arguments)!r})
finally:
    print("heavy:", sorted({{"torch", "numpy", "nnunetv2"}} & set(sys.modules)), file=sys.stderr)
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["phantom", "--help"], ["doctor", "--no_such"]])
def test_help_and_refusals_import_nothing_heavy(arguments):
    done = run(*arguments)
    assert "usage: nnUNetv2_dycon" in done.stdout + done.stderr
    assert "heavy: []" in done.stderr


@pytest.mark.parametrize("verb", commands.VERBS)
def test_every_verb_has_parameters_of_its_function_and_passes_what_was_typed_alone(verb):
    _, arguments = commands.parse([*verb.split(), *REQUIRED[verb]])
    module, function = commands.VERBS[verb].function.split(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    declared = {keywords.get("dest", flags[-1].lstrip("-")) for flags, keywords in commands.VERBS[verb].arguments}
    assert declared <= set(parameters)
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    typed = {
        keywords.get("dest", flags[-1].lstrip("-"))
        for flags, keywords in commands.VERBS[verb].arguments
        if set(flags) & set(REQUIRED[verb]) or not (flags[0].startswith("-") or keywords.get("nargs") in ("*", "?"))
    }
    assert needed <= set(arguments) == typed


@pytest.mark.parametrize("verb", commands.VERBS)
def test_help_has_the_defaults_of_the_function_without_importing_it(verb, capsys):
    target = commands.VERBS[verb].function
    module, function = target.split(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    read = commands.defaults_of(target)
    for name, parameter in parameters.items():
        if parameter.default is None or isinstance(parameter.default, (int, float, str, tuple)):
            assert read[name] == parameter.default
    with pytest.raises(SystemExit):
        commands.parse([*verb.split(), "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for _, keywords in commands.VERBS[verb].arguments:
        default = read.get(keywords.get("dest"))
        if isinstance(default, str) and default:
            assert f"(default: {default})" in printed


def test_long_options_have_one_spelling_and_np_one_default():
    flags = [flag for verb in commands.VERBS.values() for names, _ in verb.arguments for flag in names]
    assert all("-" not in flag.lstrip("-") for flag in flags)
    for verb in commands.VERBS.values():
        for names, keywords in verb.arguments:
            assert "-np" not in names or (keywords["help"], keywords["type"]) == (commands._PROCESSES, int)
            assert "-np" not in names or commands.defaults_of(verb.function)["processes"] is None


def test_help_of_convert_says_how_to_see_the_arguments_of_a_collection(capsys):
    with pytest.raises(SystemExit):
        commands.main(["convert", "--help"])
    assert "nnUNetv2_dycon convert LA --help" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        commands.main(["convert", "LA", "--help"])
    printed = capsys.readouterr().out
    assert "usage: nnUNetv2_dycon convert LA" in printed
    assert "--labeled_seed" in printed
    assert "--dry_run" in printed


def test_arguments_arrive_as_nnunet_would_read_them(called):
    commands.main(["preprocess_unlabeled", "-d", "Dataset501_X", "-c", "2d", "3d_fullres", "-np", "3"])
    commands.main(["phantom", "-d", "501", "-n", "9", "--labeled_scanner", "all", "--hard"])
    commands.main(["export", "-d", "501", "-tr", "T", "-f", "0", "all", "-o", "out", "--weights", "student"])
    preprocess, phantom, export = (arguments for _, arguments in called)
    assert preprocess["dataset"] == "Dataset501_X"
    assert preprocess["configurations"] == ["2d", "3d_fullres"]
    assert preprocess["processes"] == 3
    assert "overwrite" not in preprocess
    assert (phantom["dataset_id"], phantom["cases"], phantom["labeled_scanner"]) == (501, 9, "all")
    assert phantom["hard"]
    assert (export["dataset_id"], export["folds"], export["weights"]) == (501, [0, "all"], "student")


def test_an_error_of_the_user_is_one_line_on_stderr_and_exit_code_2(called, monkeypatch, capsys):
    def fail(**_):
        raise DataError("no imagesUn in Dataset501_X: put the images there")

    monkeypatch.setattr(sys.modules["nnunetv2_dycon.data.unlabeled"], "preprocess_unlabeled", fail)
    assert commands.main(["preprocess_unlabeled", "-d", "501"]) == 2
    assert capsys.readouterr() == ("", "error: no imagesUn in Dataset501_X: put the images there\n")


def test_an_error_of_ours_keeps_its_traceback(called, monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["nnunetv2_dycon.doctor"], "doctor", fail)
    with pytest.raises(ZeroDivisionError):
        commands.main(["doctor"])


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_exits_with_1_where_something_is_wrong(called, monkeypatch, capsys, ok, code):
    checks = [
        types.SimpleNamespace(name="torch", ok=True, text="2"),
        types.SimpleNamespace(name="x", ok=ok, text="y"),
    ]
    monkeypatch.setattr(sys.modules["nnunetv2_dycon.doctor"], "doctor", lambda: checks)
    assert commands.main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines()[1] == f"{'ok  ' if ok else 'FAIL'}  x      y"


def test_trainers_prints_common_options_once_and_those_of_each_trainer(capsys):
    assert commands.main(["trainers"]) == 0
    printed = capsys.readouterr().out
    common, _, _ = printed.partition("\nnnUNetTrainerLabeledOnly")  # a preset names what it changes once more
    for row in describe(Settings):
        assert sum(line.split()[:1] == [row.option] for line in common.splitlines()) == 1
    from nnunetv2_dycon.trainers.names import TRAINERS

    for name in TRAINERS:
        assert f"\n{name}: " in printed
    assert printed.count("0p5to0p05") == 4  # beta of DyCON in four frameworks
    assert printed.count("5to0p5 ") == 1  # beta of the preset


@pytest.mark.parametrize(
    ("arguments", "then"),
    [
        (["convert", "LA", "x"], "nnUNetv2_dycon check -d 604"),
        (["split", *REQUIRED["split"]], "nnUNetv2_dycon check -d 604"),
        (["phantom", "-d", "501"], "nnUNetv2_dycon check -d 501"),
        (["preprocess_unlabeled", "-d", "501"], "nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerDyCON -device x"),
        (
            ["preprocess_unlabeled", "-d", "Dataset501_X", "-c", "2d", "-p", "My Plans"],
            "nnUNetv2_train Dataset501_X 2d 0 -tr nnUNetTrainerDyCON -p 'My Plans' -device x",
        ),
        (["self_train", *REQUIRED["self_train"]], "nnUNetv2_predict -d 601"),
        (["compare", *REQUIRED["compare"]], "open 'a b/report.html' in a browser"),
        (["rank", *REQUIRED["rank"]], "nnUNetv2_dycon annotate -d 501 case_7 LABEL"),
        (["annotate", *REQUIRED["annotate"]], "nnUNetv2_preprocess -d 501"),
        (["evaluate", "a", "b"], None),
        (["doctor"], None),
    ],
)
def test_a_verb_ends_with_what_to_type_next_apart_from_its_result(called, monkeypatch, capsys, arguments, then):
    name = arguments[0]
    module, function = commands.VERBS[name].function.split(":")
    if name == "compare":
        monkeypatch.setattr(sys.modules[module], function, lambda **_: Path("a b/report.html"))
    monkeypatch.setitem(commands.VERBS, name, commands.VERBS[name]._replace(show=commands._show))
    monkeypatch.setattr("nnunetv2_dycon.command_lines.device_flag", lambda: ("-device", "x"))
    assert commands.main(arguments) == 0
    printed, said = capsys.readouterr()
    assert "next" not in printed
    assert said == (f"next: {then}\n" if then else "")


def test_after_a_dry_run_the_same_command_is_next(called, monkeypatch, capsys):
    planned = replace(CONVERSION, state="planned")
    monkeypatch.setattr(sys.modules["nnunetv2_dycon.conversion.split"], "split", lambda **_: planned)
    commands.main(["split", *REQUIRED["split"], "--dry_run"])
    assert capsys.readouterr().err == "next: the same command without --dry_run\n"


def test_an_exported_model_is_predicted_with_all_of_its_folds(called, monkeypatch, capsys, tmp_path):
    for fold in ("fold_0", "fold_1"):
        (tmp_path / fold).mkdir()
    monkeypatch.setattr(sys.modules["nnunetv2_dycon.export"], "export_model", lambda **_: tmp_path)
    for flag, typed in (((), ""), (("-device", "cpu"), " -device cpu")):  # with a GPU and without
        monkeypatch.setattr("nnunetv2_dycon.command_lines.device_flag", lambda flag=flag: flag)
        commands.main(["export", *REQUIRED["export"]])
        command = f"nnUNetv2_predict_from_modelfolder -m {tmp_path} -f 0 1 -i IN -o OUT{typed}"
        assert f"next: {command}\n" in capsys.readouterr().err


def test_after_a_finding_nothing_is_next(called, monkeypatch, capsys):
    verb = commands.VERBS["check"]._replace(next=lambda typed, result: "more")
    monkeypatch.setitem(commands.VERBS, "check", verb)
    monkeypatch.setattr(sys.modules["nnunetv2_dycon.conversion.check"], "check", lambda **_: [FINDINGS[0]])
    assert commands.main(["check", "-d", "604"]) == 0
    assert capsys.readouterr().err == "next: more\n"
    bad = types.SimpleNamespace(name="a", ok=False, text="b")
    monkeypatch.setattr(sys.modules["nnunetv2_dycon.conversion.check"], "check", lambda **_: [bad])
    assert commands.main(["check", "-d", "604"]) == 1
    assert capsys.readouterr().err == ""


def test_the_console_script_is_this_main():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'nnUNetv2_dycon = "nnunetv2_dycon.commands:main"' in project
