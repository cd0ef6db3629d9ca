"""Commands of the workflow in a real shell, with names that a shell would take apart or run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.workflow import experiments

NASTY = 'a  b\'s "c" `touch ran` $(touch ran) $HOME ; touch ran & * \\ {x}'
PROGRAMS = (
    *("nnUNetv2_dycon", "nnUNetv2_extract_fingerprint", "nnUNetv2_plan_experiment", "nnUNetv2_preprocess", "python"),
    "nnUNetv2_move_plans_between_datasets",
)


@pytest.fixture
def typed(tmp_path: Path) -> Callable[[str], list[list[str]]]:
    """Run a command line in bash with programs that only note their words; returns the words of each."""
    programs, ran = tmp_path / "bin", tmp_path / "ran"
    programs.mkdir()
    note = programs / "note.py"
    note.write_text(f"import json, sys; open({str(tmp_path / 'words')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')")
    for program in PROGRAMS:
        (programs / program).write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "{note}" {program} "$@"\n')
        (programs / program).chmod(0o755)

    def run(command: str) -> list[list[str]]:
        variables = {"nnUNet_raw": f"{tmp_path}/{NASTY} raw", "nnUNet_results": f"{tmp_path}/{NASTY} results"}
        environment = {**os.environ, **variables, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(["bash", "-euo", "pipefail", "-c", f"( {command} )"], env=environment, check=True, cwd=tmp_path)
        assert not ran.exists()
        words = tmp_path / "words"
        lines = words.read_text().splitlines()
        words.unlink()
        return [json.loads(line) for line in lines]

    return run


def nasty_configuration() -> dict:
    quoted = experiments.shlex.quote(NASTY)
    return {
        "output": NASTY,
        "configuration": NASTY,
        "plans": NASTY,
        "planner": f"-pl {quoted}",
        "reduce": {"patch": 16},
        "seeds": [0],
        "datasets": {
            "A": {"convert": ["LA", NASTY], "labeled": {4: 610}, "options": f"--groups {quoted}"},
            "B": {"split": 4, "phantom": f"--seed {quoted}", "labeled": {4: 710, 10: 711}},
        },
        "methods": {
            "first": {
                "command": f"do {quoted.replace('{x}', '{plans}')} -p {{plans}}",
                "training": NASTY.replace("{x}", "{seed}"),
            },
            "second": {"command": "do", "training": "T"},
        },
    }


def test_every_word_arrives_as_it_was_written(tmp_path: Path, typed) -> None:
    found = experiments.read(nasty_configuration())
    converted, split, shared = found.datasets.values()
    run = next(run for run in found.runs.values() if run.dataset is converted)
    report = next(iter(found.reports.values()))
    raw, results = (f"{tmp_path}/{NASTY} {name}" for name in ("raw", "results"))
    training = NASTY.replace("{x}", "0")

    assert typed(found.generate(split))[0][-3:] == ["--seed", NASTY, "--overwrite"]
    (write,) = typed(found.write(converted))
    assert write[write.index("--") + 1 : write.index("--") + 5] == ["nnUNetv2_dycon", "convert", "LA", NASTY]
    assert write[-2:] == ["--groups", NASTY]
    _, plan, reduce = typed(found.plan(converted))
    assert plan[-2:] == ["-pl", NASTY]
    assert [reduce[reduce.index(flag) + 1] for flag in ("-p", "-c", "--name")] == [NASTY, NASTY, found.configuration]
    assert typed(found.plan(shared))[-1][-2:] == ["-sp", NASTY]
    assert NASTY in typed(found.preprocess(converted))[0]
    assert NASTY in typed(found.preprocess_unlabeled(converted))[0]
    (train,) = typed(found.train(run, f"{NASTY}/x.lock"))
    assert [train[train.index(flag) + 1] for flag in ("--training", "--lock")] == [training, f"{NASTY}/x.lock"]
    assert train[train.index("--") + 1 :] == ["do", NASTY.replace("{x}", NASTY), "-p", NASTY]
    (predict,) = typed(found.predict(run, "student"))
    assert predict[predict.index("--training") + 1] == training
    (evaluate,) = typed(found.evaluate(run, "student", NASTY))
    assert evaluate[2] == f"{raw}/{converted.folder}/labelsTs"
    assert evaluate[3] == f"{results}/{training}/test/checkpoint_final_student"
    assert evaluate[evaluate.index("-djfile") + 1] == f"{raw}/{converted.folder}/dataset.json"
    assert evaluate[evaluate.index("-o") + 1] == NASTY
    (compare,) = typed(found.compare(report, NASTY))
    assert [compare[compare.index(flag) + 1] for flag in ("-c", "-p", "-o")] == [found.configuration, NASTY, NASTY]
    assert compare[compare.index("--runs") + 1 :] == [f"{results}/{training}", f"{results}/T"]


@pytest.mark.parametrize("key", ["planner", "datasets/A/options", "datasets/B/phantom", "methods/second/command"])
def test_a_quotation_mark_that_is_left_open_is_named(key: str) -> None:
    config = nasty_configuration()
    *parents, last = key.split("/")
    place = config
    for parent in parents:
        place = place[parent]
    place[last] = "--x 'open"
    with pytest.raises(experiments.ConfigurationError, match="No closing quotation; close every") as caught:
        experiments.read(config)
    assert str(caught.value).startswith(": ".join([*parents, last]))
