"""Experiments of the workflow: what a configuration expands to, and the stages that no single command does."""

import copy
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nnunetv2_dycon import locks
from nnunetv2_dycon.commands import parse as parse_command
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.trainers.names import trainer_class
from scripts.workflow import configuration, experiments, steps

FOLDER = Path(__file__).parents[2] / "scripts" / "workflow"
CONFIG = {
    "output": "out",
    "configuration": "3d_fullres",
    "options": "epochs3",
    "datasets": {
        "Blobs": {"split": 4, "labeled": {10: 620, 4: 610, "all": 630}, "draws": [0, 7], "options": "--test 2"}
    },
    "methods": {
        "control": {"trainer": "nnUNetTrainerLabeledOnly", "labeled": [4, 10, "all"]},
        "DyCON": {"trainer": "nnUNetTrainerDyCON_gamma0p5", "seeds": [5]},
    },
    "baseline": "control",
    "seeds": [0, 1],
}


def self_made(ids: dict[int, int]) -> dict:
    """A method that makes data sets of its own."""
    return {"command": "do --as {new}", "training": "Dataset{new}_{name}/{seed}", "ids": ids}


def changed(path: str, value: object) -> dict:
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split("/")
    place = config
    for key in parents:
        place = place[key]
    place[last] = value
    return config


def test_a_split_may_take_the_lists_of_a_protocol():
    config = changed("datasets/Blobs/options", "--protocol cases.json")
    config["datasets"]["Blobs"]["draws"] = ["published"]
    found = experiments.read(config)
    assert all("--labeled_seed" not in data.writer for data in found.datasets.values())
    assert {data.draw for data in found.datasets.values()} == {"published"}


@pytest.mark.parametrize("path", sorted((FOLDER / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_file_can_be_read_and_all_its_trainers_exist(path):
    found = experiments.read(yaml.safe_load(path.read_text()))
    assert found.runs
    assert found.reports
    for run in found.runs.values():
        if run.command is None:
            trainer_class(run.key)


def test_a_configuration_is_data_sets_by_draws_by_methods_by_seeds():
    found = experiments.read(CONFIG)
    folders = {data.folder: (data.labeled, data.draw) for data in found.datasets.values()}
    assert folders == {
        "Dataset610_Blobs": ("4", 0),
        "Dataset620_Blobs": ("10", 0),
        "Dataset630_Blobs": ("all", 0),  # all labels are the same in every draw
        "Dataset611_Blobs": ("4", 7),
        "Dataset621_Blobs": ("10", 7),
    }
    # 4 draws of (2 control + 1 DyCON), and 2 control on all labels, where other methods have nothing unlabelled
    assert len(found.runs) == 4 * 3 + 2
    names = {run.key for run in found.runs.values() if run.dataset.labeled == "all"}
    assert names == {f"nnUNetTrainerLabeledOnly_epochs3_seed{seed}" for seed in (0, 1)}
    assert {run.key for run in found.runs.values() if run.method == "DyCON"} == {
        "nnUNetTrainerDyCON_gamma0p5_epochs3_seed5"
    }
    for run in found.runs.values():
        trainer_class(run.key)


def test_more_draws_leave_the_ids_of_the_first_ones_alone():
    few = experiments.read(CONFIG).datasets.keys()
    many = experiments.read(changed("datasets/Blobs/draws", [0, 7, 3])).datasets.keys()
    assert few < many
    assert many - few == {"Dataset612_Blobs_labeled4_draw3", "Dataset622_Blobs_labeled10_draw3"}


def test_plans_come_from_the_fewest_labels_of_the_same_draw():
    found = experiments.read(CONFIG).datasets.values()
    source = {data.id: data.planner.id if data.planner else None for data in found}
    assert source == {610: None, 620: 610, 630: 610, 611: None, 621: 611}


def test_a_report_has_all_draws_of_one_number_and_begins_with_the_baseline():
    found = experiments.read({**CONFIG, "baseline": "DyCON"})
    assert found.reports.keys() == {"Blobs_labeled4", "Blobs_labeled10"}  # one method alone has nothing to compare
    runs = found.reports["Blobs_labeled4"].runs
    assert [run.method for run in runs] == ["DyCON"] * 2 + ["control"] * 4
    assert {run.dataset.id for run in runs} == {610, 611}
    assert not found.reports["Blobs_labeled4"].upper  # DyCON has no run on all labels
    without = experiments.read(changed("methods/DyCON/report", False))
    assert not without.reports
    assert len(without.runs) == len(found.runs)


def test_the_baseline_on_all_labels_is_the_upper_bound_of_a_report():
    report = (found := experiments.read(CONFIG)).reports["Blobs_labeled4"]
    assert [(run.dataset.id, run.seed) for run in report.upper] == [(630, 0), (630, 1)]
    _, arguments = parse_command(shlex.split(found.compare(report, "place"))[1:])
    assert len(arguments["upper"]) == 2
    assert all("Dataset630_Blobs" in folder for folder in arguments["upper"])


def test_commands_are_ones_that_the_package_has():
    found = experiments.read({**CONFIG, "mirroring": False, "weights": ["student", "teacher"]})
    data, run = found.datasets["Dataset621_Blobs_labeled10_draw7"], next(iter(found.runs.values()))
    written = shlex.split(found.write(data))
    _, arguments = parse_command(written[written.index("nnUNetv2_dycon") + 1 :])
    assert (arguments["new_id"], arguments["labeled"]) == (621, "10")
    assert (arguments["labeled_seed"], arguments["test"]) == (7, "2")
    report = found.reports["Blobs_labeled4"]
    for command in (
        found.preprocess_unlabeled(data),
        found.evaluate(run, "student", "place"),
        found.compare(report, "place"),
    ):
        words = shlex.split(command)
        assert words[0] == "nnUNetv2_dycon"
        parse_command(words[1:])
    _, arguments = parse_command(shlex.split(found.compare(report, "place"))[1:])
    assert arguments["weights"] == ["student", "teacher"]
    assert not arguments["mirroring"]


def test_steps_understand_the_commands_that_call_them():
    found = experiments.read(
        changed("methods/own", {"command": "echo -d {id}", "training": "{new}", "ids": {0: 700}, "seeds": [0]})
    )
    data = found.datasets["Dataset611_Blobs_labeled4_draw7"]
    own = found.runs[data.key, "own_seed0"]
    assert (own.command, own.training) == (("echo", "-d", "611"), "701")
    given = steps.parse(shlex.split(found.train(own, "lock"))[2:])
    assert given.command == ["--", "echo", "-d", "611"]
    run = found.runs[data.key, "nnUNetTrainerLabeledOnly_epochs3_seed0"]
    given = steps.parse(shlex.split(found.train(run, "lock"))[2:])
    assert (given.training, given.device, given.loaders) == (run.training, "cuda", 4)
    assert steps.parse(shlex.split(found.predict(run, "teacher"))[2:]).weights == "teacher"


def test_a_reduced_configuration_is_named_after_what_it_was_reduced_to():
    reduced = {"batch": 2, "patch": [32, 48, 32], "features": 16, "stages": 4}
    found = experiments.read({**CONFIG, "reduce": reduced})
    assert found.configuration == "3d_fullres_patch32x48x32_features16_stages4_batch2"
    data = found.datasets["Dataset610_Blobs_labeled4_draw0"]
    given = steps.parse(shlex.split(found.plan(data).split(" && ")[-1])[2:])
    assert json.loads(given.reduce) == reduced


@pytest.mark.parametrize("name", ["phantom_smoke", "hippocampus"])
def test_the_configurations_that_are_there_can_be_used(name):
    found = experiments.read(yaml.safe_load((FOLDER / "config" / f"{name}.yaml").read_text()))
    assert found.reports
    for run in found.runs.values():
        trainer_class(Path(run.training).parent.name.split("__")[0])


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("methds", {}, "unknown key 'methds'; did you mean methods?"),
        ("seeds", [], "seeds is []; give a list of whole numbers"),
        ("seeds", 0, "seeds is 0; give a list of whole numbers"),
        ("device", "gpu", "device is 'gpu'; give cuda, cpu or mps"),
        ("threads", 0, "threads is 0; give a whole number of 1 or more"),
        ("baseline", "nobody", "baseline is 'nobody', which is not a method; give one of control, DyCON"),
        ("reduce", {"stages": 2, "features": 4}, "give 3 or more"),
        ("reduce", {"patch": "32"}, "reduce: patch is '32'; give a whole number"),
        ("datasets/Blobs/labeled", [4, 10], "for example {4: 610, 10: 620}"),
        ("datasets/Blobs/labeled", {4: 610, 10: 611}, "id 611 is used twice"),
        ("datasets/Blobs/labeled", {4: 999}, "would have the id 1000"),
        ("datasets/Blobs/labeled", {4: 4}, "id 4 is used twice, by split"),
        ("datasets/Blobs/labeled", {"few": 4}, "labeled has 'few'"),
        ("datasets/Blobs/draws", ["published"], "draws is ['published']"),
        ("datasets/Blobs/convert", ["LA", "/data"], "and not both"),
        ("datasets/Blobs/phantom", 5, "phantom is 5; give its options"),
        ("datasets/Blobs/phantom", "-n 9", None),
        ("methods/DyCON/trainer", "nnUNetTrainerDyCON_seed3", "leave it to seeds"),
        ("methods/DyCON/command", "train", "methods: DyCON: training is missing"),
        ("methods/DyCON", {"trainer": "T", "command": "train", "training": "x"}, "and not both"),
        ("methods/DyCON/labeled", 5, "labeled has 5, which no data set has"),
        ("methods/DyCON/weights", ["both"], "give a list of student, teacher"),
        ("methods/more", "nnUNetTrainerDyCON_gamma0p5", None),
        ("methods/DyCON/weights", ["teacher"], "the methods of Blobs_labeled4 share no weights"),
        ("methods/more", "nnUNetTrainerLabeledOnly", "control and more are the same training"),
        ("methods/more", {"command": "do {it}", "training": "x"}, "has the unknown {it}; known are {id}"),
        ("methods/more", {"command": "do --as {new}", "training": "x"}, "has the unknown {new}"),
        ("methods/more", self_made({0: 700, 1: 750}), None),
        ("methods/more", 5, "methods: more is 5; give a trainer, or keys with values"),
        ("mirroring", "no", "mirroring is 'no'; give true or false"),
        ("datasets/Blobs/draws", [-1], "draws is [-1]; give a list of seeds"),
        ("datasets/Blobs/split", "4", "datasets: Blobs: split is '4'; give the id"),
        ("datasets/B lobs", {"split": 4, "labeled": {4: 700}}, "datasets has 'B lobs'; give each data set a name"),
        ("reduce", {"stages": 4}, "reduce: features is missing"),
        ("reduce", {"steps": 4}, "reduce has the unknown key 'steps'; did you mean stages?"),
        ("methods/more", self_made({0: 700, 1: 701}), "more: ids: Dataset611_Blobs"),  # 610 and 611 would share 701
        ("methods/more", self_made({0: 610, 1: 750}), "would make id 610, which is of Dataset610_Blobs"),
        ("methods/more", self_made({0: 4, 1: 750}), "would make id 4, which is of split"),
    ],
)
def test_a_wrong_configuration_is_one_line(path, value, said):
    config = changed(path, value)
    if said is None:
        experiments.read(config)
        return
    with pytest.raises(experiments.ConfigurationError) as error:
        experiments.read(config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["output", "datasets", "methods", "seeds"])
def test_a_missing_key_is_named(key):
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(experiments.ConfigurationError, match=f"{key} is missing; see docs/experiments.md"):
        experiments.read(config)


def test_every_part_of_the_schema_says_what_to_write():
    """An error names the nearest key above that has a description; at the top there is one for each key."""
    for key, schema in configuration.SCHEMA["properties"].items():
        described = configuration.schema_of([key])
        assert described.get("description"), key
        if "default" in schema:
            configuration.Draft202012Validator({**described, "$defs": configuration.SCHEMA["$defs"]}).validate(
                schema["default"]
            )


def test_notes_of_what_is_no_longer_on_disk_are_removed(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    found, done = experiments.read(CONFIG), tmp_path / "done"
    data = found.datasets["Dataset610_Blobs_labeled4_draw0"]
    run = found.runs[data.key, "nnUNetTrainerLabeledOnly_epochs3_seed0"]
    notes = [done / data.key / name for name in ("raw", "plan", f"{run.key}.train")]
    kept = tmp_path / "nnUNet_results" / run.training / "checkpoint_final.pth"
    for path in (*notes, kept, tmp_path / "nnUNet_raw" / data.folder / "dataset.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert found.forget_deleted(done) == [notes[1]]
    assert [note.exists() for note in notes] == [True, False, True]


# ---- stages ------------------------------------------------------------------------------------------------------
@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "nnUNet_raw" / "Dataset610_Blobs"
    folder.mkdir()
    request = {"labeled": "4", "labeled_seed": 7}
    (folder / "conversion.json").write_text(json.dumps({"request": request}))
    return folder


def test_a_raw_data_set_is_taken_over_only_with_its_own_draw(raw, capfd):
    steps.raw(raw.name, "4", "7", ["false"])  # the command is not run
    for labeled, draw in (("4", "0"), ("10", "7")):
        assert steps.main(["raw", "--folder", raw.name, "--labeled", labeled, "--draw", draw, "--", "false"]) == 2
        assert "has other labelled cases" in capfd.readouterr().err
    with pytest.raises(DataError, match="false ended with 1"):
        steps.raw("Dataset611_Blobs", "4", "7", ["false"])


def test_a_command_that_names_its_data_set_otherwise_is_one_line(raw, capfd):
    """`split` keeps the name of its source, whatever the configuration calls it."""
    place = raw.with_name("Dataset613_Blobs")
    command = [sys.executable, "-c", f"from pathlib import Path; Path({str(place)!r}).mkdir()"]
    assert steps.main(["raw", "--folder", "Dataset613_Mine", "--labeled", "4", "--draw", "7", "--", *command]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert "wrote Dataset613_Blobs in place of Dataset613_Mine: give the data set its name" in said
    assert list(place.parent.glob("Dataset613_Mine*")) == []


def test_a_published_list_is_not_a_draw_with_seed_0(raw, capfd):
    (raw / "conversion.json").write_text(json.dumps({"request": {"labeled": "4", "labeled_seed": 0}}))
    assert steps.main(["raw", "--folder", raw.name, "--labeled", "4", "--draw", "published", "--", "false"]) == 2
    assert "has other labelled cases" in capfd.readouterr().err
    steps.raw(raw.name, "4", "0", ["false"])


def test_a_raw_data_set_of_other_options_is_refused_though_its_draw_is_the_same(raw, capfd):
    request = json.dumps({"request": {"labeled": "4", "labeled_seed": 7}})
    place = raw.with_name("Dataset612_Blobs")
    write = f"from pathlib import Path; place = Path({str(place)!r}); place.mkdir(); "
    write += f"(place / 'conversion.json').write_text({request!r})"
    command = [sys.executable, "-c", write, "--test", "2"]
    steps.raw(place.name, "4", "7", command)
    steps.raw(place.name, "4", "7", command)  # is not run again: the folder is there
    wanted = ["raw", "--folder", place.name, "--labeled", "4", "--draw", "7", "--", *command[:-1], "40"]
    assert steps.main(wanted) == 2
    said = capfd.readouterr().err
    assert "written by another command" in said
    assert "--test 40" in said


@pytest.mark.parametrize(("device", "threads"), [("cpu", "3"), ("cuda", "1")])
def test_a_command_gets_loaders_and_threads_as_the_trainings(tmp_path, monkeypatch, device, threads):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    final = tmp_path / "checkpoint_final.pth"
    text = f"import os; open({str(final)!r}, 'w').write(os.environ['nnUNet_n_proc_DA'] + os.environ['OMP_NUM_THREADS'])"
    steps.train(tmp_path, tmp_path / "lock", device, 3, 4, [sys.executable, "-c", text])
    assert final.read_text() == f"4{threads}"
    found = experiments.read(changed("methods/more", self_made({0: 700, 1: 750})) | {"loaders": 4})
    words = shlex.split(found.train(next(run for run in found.runs.values() if run.command), "lock"))
    assert words[words.index("--loaders") + 1] == "4"


def test_reduction_keeps_the_first_stages_and_the_data_of_the_parent(raw, tmp_path):
    folder = tmp_path / "nnUNet_preprocessed" / raw.name
    folder.mkdir()
    kwargs = {"n_stages": 4, "features_per_stage": [32, 64, 128, 256], "strides": [1, 2, 2, 2]}
    kwargs |= {"n_conv_per_stage_decoder": [2, 2, 2], "conv_bias": True}
    network = {"network_class_name": "UNet", "arch_kwargs": kwargs}
    plans = {"configurations": {"3d_fullres": {"patch_size": [40, 56, 40], "batch_size": 9, "architecture": network}}}
    (folder / "P.json").write_text(json.dumps(plans))
    steps.reduce(raw.name, "P", "3d_fullres", "small", {"patch": 16, "features": 4, "stages": 3})
    content = json.loads((folder / "P.json").read_text())["configurations"]
    assert content["3d_fullres"] == plans["configurations"]["3d_fullres"]
    small = content["small"]
    assert (small["inherits_from"], small["patch_size"], "batch_size" in small) == ("3d_fullres", [16, 16, 16], False)
    assert small["architecture"]["arch_kwargs"] == {
        "n_stages": 3,
        "features_per_stage": [4, 8, 16],
        "strides": [1, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "conv_bias": True,
    }
    with pytest.raises(DataError, match="has no configuration 2d, only 3d_fullres, small"):
        steps.reduce(raw.name, "P", "2d", "small", {})


def test_a_training_that_is_there_is_not_done_again_and_a_command_must_make_its_checkpoint(tmp_path):
    final = tmp_path / "fold_0" / "checkpoint_final.pth"
    final.parent.mkdir()
    arguments = (final.parent, tmp_path / "lock", "cpu", 1, 0)
    with pytest.raises(DataError, match="ended without"):
        steps.train(*arguments, ["true"])
    steps.train(*arguments, ["touch", str(final)])
    steps.train(*arguments, ["false"])


@pytest.mark.parametrize("finished", [False, True])
def test_a_training_whose_plans_have_changed_is_not_gone_on_with(tmp_path, monkeypatch, finished):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    fold = tmp_path / "results" / "Dataset700_X" / "nnUNetTrainerDyCON__nnUNetPlans__3d_fullres_patch16" / "fold_all"
    planned, trained = tmp_path / "Dataset700_X" / "nnUNetPlans.json", fold.parent / "plans.json"
    for path, patch in ((planned, 16), (trained, 16)):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(plans_of(patch)))
    fold.mkdir()
    if finished:
        (fold / "checkpoint_final.pth").touch()
    steps.train(fold, tmp_path / "lock", "cpu", 1, 0, ["touch", str(fold / "checkpoint_final.pth")])
    if not finished:
        (fold / "checkpoint_final.pth").unlink()
    planned.write_text(json.dumps(plans_of(24)))
    with pytest.raises(DataError, match=r"_patch16 was trained with other plans than .*Plans\.json holds"):
        steps.train(fold, tmp_path / "lock", "cpu", 1, 0, ["touch", str(tmp_path / "trained")])
    assert not (tmp_path / "trained").exists()


def plans_of(patch: int) -> dict:
    """Plans of two configurations, the second with a patch of its own."""
    own = {"inherits_from": "3d_fullres", "patch_size": [patch] * 3}
    return {"configurations": {"3d_fullres": {"spacing": [1, 1, 1]}, "3d_fullres_patch16": own}}


def test_a_second_start_waits_for_the_first(tmp_path, monkeypatch):
    final, lock = tmp_path / "checkpoint_final.pth", tmp_path / "lock"
    hold = f"import fcntl, sys; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    hold += f"sys.stdin.readline(); open({str(final)!r}, 'w')"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], **pipes) as first:
        first.stdout.readline()
        said = []

        def release(text):
            said.append((text, first.poll()))
            first.stdin.write("\n")
            first.stdin.flush()

        monkeypatch.setattr(locks.logger, "warning", release)
        steps.train(tmp_path, lock, "cpu", 1, 0, ["false"])  # the first has trained meanwhile
    assert said == [(f"{tmp_path}: another process trains it; waiting for that", None)]


@pytest.mark.parametrize("name", ["acdc", "emidec", "mouse_brain"])
def test_cases_to_choose_on_are_none_of_the_test_cases_and_keep_the_labelled_ones(name: str) -> None:
    choosing, reporting = (
        json.loads((FOLDER / "config" / f"{name}{part}_cases.json").read_text()) for part in ("_validation", "")
    )
    (labeled,) = choosing["labeled"].items()
    assert labeled in reporting["labeled"].items()
    train, stand_ins = set(choosing["train"]), set(choosing["test"])
    assert train >= set(labeled[1])
    assert len(train) + len(stand_ins) == len(choosing["train"] + choosing["test"]) == len(reporting["train"])
    assert train | stand_ins == set(reporting["train"])
    assert not stand_ins & {case for cases in reporting["labeled"].values() for case in cases}
    assert not set(reporting["test"]) & (train | stand_ins)
    if name == "acdc":  # both frames of a patient
        assert not {case[:10] for case in train} & {case[:10] for case in stand_ins}
