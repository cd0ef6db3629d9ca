import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.facts import (
    Facts,
    plans_digest,
    read_run_file,
    read_training,
    resolved_plans,
    write_run_file,
)
from nnunetv2_dycon.evaluation.likeness import check_alike, find_baseline, short_names
from nnunetv2_dycon.evaluation.runs import Place, Run, find_runs
from tests.madeup_runs import (
    CASES,
    DATASET,
    LABELED,
    PLANS,
    VALIDATION,
    a_run,
    make_dataset,
    make_predictions,
    make_training,
    write_splits,
)

PLACE = Place(DATASET)
DYCON = "nnUNetTrainerDyCON_epochs4"


@pytest.fixture
def root(tmp_path, monkeypatch):
    make_dataset(tmp_path, monkeypatch)
    return tmp_path


def find(text, weights=("student",), mirroring=True, place=PLACE):
    return find_runs(text, place, weights, mirroring)


# ---- facts


def test_facts_of_our_trainer_are_those_of_its_files(root):
    facts = read_training(make_training(root, DYCON, seed=7, unlabeled="12"))
    assert (facts.trainer, facts.dataset, facts.configuration, facts.fold) == (DYCON, DATASET, "3d_fullres", "0")
    assert (facts.labeled, facts.validation, facts.labeled_count) == (LABELED, VALIDATION, 3)
    assert (facts.unlabeled, facts.epochs, facts.steps, facts.batch, facts.patches) == (12, 4, 20, 2, 40)
    assert (facts.checkpoint, facts.seed, facts.has_teacher, facts.hardware) == ("checkpoint_final.pth", 7, True, "cpu")
    assert facts.settings == {"epochs": 4, "iters": 5, "batch": 0, "seed": 7}
    assert facts.seconds_per_step == pytest.approx(4 / 5)  # epochs take 2, 3, 4 and 5 s
    assert facts.versions == {"nnunetv2_dycon": "0.1.0", "nnunetv2": "2.8.1", "torch": "2.0"}
    assert facts.curves["pseudo Dice"] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert facts.curves["teacher's pseudo Dice"] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_steps_and_batch_are_those_that_the_trainer_recorded(root):
    folder = make_training(root, DYCON)
    state = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    state["ssl"]["step"] = 17  # some were skipped
    state["ssl"]["settings"]["batch"] = 6
    torch.save(state, folder / "checkpoint_final.pth")
    facts = read_training(folder)
    assert (facts.steps, facts.batch, facts.patches) == (17, 6, 102)


def test_facts_of_a_stock_trainer_leave_open_what_it_does_not_record(root):
    facts = read_training(make_training(root, "nnUNetTrainer", ours=False))
    assert (facts.unlabeled, facts.steps, facts.seed, facts.has_teacher) == (0, 20, None, False)
    assert facts.versions == {"torch": "2.0"}
    assert facts.settings is None


def test_a_self_training_counts_true_labels_and_the_steps_of_all_rounds(root):
    """Its data set lists pseudo-labelled cases as training cases, and some cases twice."""
    folder = make_training(root, "nnUNetTrainer", ours=False)
    own = read_training(folder)
    entry = {"round": 2, "labeled": ["l_2", "l_1"], "pseudo_labeled": ["u_1", "u_2", "u_3"], "total_epochs": 12}
    conversion = root / "nnUNet_raw" / own.dataset / "conversion.json"
    conversion.write_text(json.dumps({"converter": "self_train", "self_train": entry}))
    facts = read_training(folder)
    assert (facts.labeled, facts.labeled_count, facts.unlabeled) == (("l_1", "l_2"), 2, 3)
    assert facts.steps == 12 * 5
    assert Run("x", facts, folder).method == Run("x", own, folder).method + "_self2"


def test_a_later_log_does_not_hide_the_number_of_unlabelled_images(root):
    folder = make_training(root, DYCON, unlabeled="12")
    (folder / "training_log_2026_1_1_00_00_00.txt").write_text("validation again\n")
    assert read_training(folder).unlabeled == 12


def test_cases_that_a_checkpoint_names_need_no_split_file(root, monkeypatch):
    folder = make_training(root, DYCON)
    state = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    state["ssl"]["cases"] = {"labeled": ["b", "c"], "validation": ["v"], "unlabeled": ["u", "w", "x"]}
    torch.save(state, folder / "checkpoint_final.pth")
    write_splits(root, [{"train": ["changed", "since", "then", "or"], "val": []}])
    facts = read_training(folder)
    assert (facts.labeled, facts.validation, facts.labeled_count, facts.unlabeled) == (("b", "c"), ("v",), 2, 3)


def test_without_a_split_file_numbers_come_from_the_log_and_names_are_open(root, monkeypatch):
    folder = make_training(root, DYCON)
    monkeypatch.delenv("nnUNet_preprocessed")
    facts = read_training(folder)
    assert (facts.labeled, facts.labeled_count) == (None, 3)


# ---- names


def test_a_run_is_found_by_trainer_name_results_folder_and_fold_folder(root):
    folder = make_training(root, DYCON)
    for text in (DYCON, str(folder.parent), str(folder)):
        (run,) = find(text)
        assert run.training == folder
        assert run.predictions == folder / "test" / "checkpoint_final_student"


def test_a_star_stands_for_all_seeds_which_are_one_method(root):
    for seed in range(3):
        make_training(root, f"nnUNetTrainerDyCON_seed{seed}_bf16", seed=seed)
    runs = find("nnUNetTrainerDyCON_seed*_bf16")
    assert [run.facts.seed for run in runs] == [0, 1, 2]
    assert {run.method for run in runs} == {"nnUNetTrainerDyCON_bf16 (student)"}


def test_a_folder_of_predictions_is_a_run_of_which_nothing_is_known(tmp_path):
    folder = make_predictions(tmp_path / "theirs")
    (run,) = find(str(folder))
    assert (run.training, run.predictions, run.method) == (None, folder, "theirs")
    assert run.facts == Facts(dataset=DATASET)


def test_predictions_made_elsewhere_are_given_to_their_run(root, tmp_path):
    folder = make_training(root, DYCON)
    theirs = make_predictions(tmp_path / "theirs")
    (run,) = find(f"{DYCON}={theirs}")
    assert (run.training, run.predictions, run.facts.steps, run.facts.mirroring) == (folder, theirs, 20, None)
    with pytest.raises(DataError, match="several runs"):
        find(f"{DYCON}={theirs}", ("student", "teacher"))


def test_predictions_with_and_without_mirroring_lie_apart(root):
    make_training(root, DYCON)
    assert find(DYCON, mirroring=False)[0].predictions.name == "checkpoint_final_student_nomirror"


def test_a_wrong_name_is_refused_with_the_nearest(root):
    make_training(root, DYCON)
    with pytest.raises(DataError, match=f"the nearest there is {DYCON}"):
        find("nnUNetTrainerDyCON_epoch4")
    with pytest.raises(DataError, match="is not a folder"):
        find("no/such")
    with pytest.raises(DataError, match=f"--runs {DYCON}=misspelt: misspelt is not a folder; name the folder"):
        find(f"{DYCON}=misspelt")


def test_student_and_teacher_are_two_runs_and_stock_has_one(root):
    make_training(root, DYCON)
    make_training(root, "nnUNetTrainer", ours=False)
    both = ("student", "teacher")
    assert [run.facts.weights for run in find(DYCON, both)] == ["student", "teacher"]
    assert [run.facts.weights for run in find("nnUNetTrainer", both)] == ["student"]
    with pytest.raises(DataError, match="holds no teacher"):
        find("nnUNetTrainer", ("teacher",))


def test_the_facts_travel_with_the_predictions(root, tmp_path):
    facts = read_training(make_training(root, DYCON))
    away = make_predictions(tmp_path / "away")
    write_run_file(away, facts)
    assert read_run_file(away) == facts
    assert find(str(away))[0].facts == facts
    (away / "run.json").write_text('{"other": 1}')
    with pytest.raises(DataError, match="was not written by"):
        read_run_file(away)


def test_predictions_of_an_older_training_are_refused(root):
    folder = make_training(root, DYCON)
    (run,) = find(DYCON)
    write_run_file(make_predictions(run.predictions), run.facts)
    find(DYCON)
    state = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    torch.save({**state, "network_weights": {"w": torch.ones(1)}}, folder / "checkpoint_final.pth")
    with pytest.raises(DataError, match=r"predicted with another state of .*; delete it and type --predict"):
        find(DYCON)
    with pytest.raises(DataError, match=f"; name other predictions of {DYCON}, or none and type --predict"):
        find(f"{DYCON}={run.predictions}")


def test_predictions_of_the_other_weights_are_refused(root):
    make_training(root, DYCON)
    student, teacher = find(DYCON, ("student", "teacher"))
    write_run_file(make_predictions(teacher.predictions), student.facts)
    with pytest.raises(DataError, match="was predicted by the student; type --weights student"):
        find(DYCON, ("teacher",))


# ---- refusals of one run


def test_the_best_checkpoint_of_a_training_that_goes_on_is_refused(root):
    folder = make_training(root, DYCON, checkpoint="checkpoint_best.pth", done=2)
    assert read_training(folder, "checkpoint_best.pth").steps == 10
    (folder / "checkpoint_final.pth").unlink()
    with pytest.raises(DataError, match=r"not a finished training \(no checkpoint_final\.pth, only checkpoint_best"):
        read_training(folder, "checkpoint_best.pth")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"checkpoint": "checkpoint_latest.pth"}, "no checkpoint_final.pth, only checkpoint_latest"),
        ({"done": 3}, "epoch 3 of 4"),
    ],
)
def test_a_training_that_is_not_finished_is_refused_with_the_command(root, options, reason):
    make_training(root, DYCON, **options)
    with pytest.raises(DataError, match=rf"not a finished training \({reason}.*nnUNetv2_train .* -tr {DYCON} .*--c"):
        find(DYCON)


@pytest.mark.parametrize(
    "content", [None, b"", b"<html>not found</html>", b"version https://git-lfs", pickle.dumps([1])]
)
def test_an_unreadable_checkpoint_is_refused(root, content):
    path = make_training(root, DYCON) / "checkpoint_final.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=r"checkpoint_final\.pth cannot be read as a checkpoint"):
        find(DYCON)


def test_a_checkpoint_with_foreign_objects_is_refused(root):
    path = make_training(root, DYCON) / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "extra": Path("x")}, path)
    with pytest.raises(DataError, match=r"checkpoint_final\.pth was not opened: to read its pathlib"):
        find(DYCON)


def test_a_missing_plans_file_and_a_missing_length_are_refused(root):
    folder = make_training(root, "nnUNetTrainer", ours=False)
    (folder / "debug.json").unlink()
    with pytest.raises(DataError, match="does not record the training length"):
        read_training(folder)
    (folder.parent / "plans.json").write_text("{")
    with pytest.raises(DataError, match=r"plans\.json cannot be read"):
        read_training(folder)


def of_plans(**changed) -> str:
    return json.dumps({**PLANS, **changed})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        *(("plans.json", text, r"plans\.json is not a JSON object; restore it") for text in ("[]", "null", '"x"')),
        ("plans.json", "{}", r"plans\.json cannot be used \(KeyError: 'configurations'\); restore it"),
        ("plans.json", of_plans(configurations={"3d_fullres": {}}), r"cannot be used \(KeyError: 'batch_size'\)"),
        ("plans.json", of_plans(dataset_name=[]), r"plans\.json cannot be used \(TypeError: "),
        ("plans.json", of_plans(configurations=[]), "no configuration 3d_fullres"),
        ("plans.json", of_plans(configurations={"3d_fullres": {"inherits_from": "3d_fullres"}}), "RecursionError"),
        ("fold_0/debug.json", "[]", r"debug\.json is not a JSON object; restore it"),
        ("fold_0/ssl_history.csv", "epoch,dice_teacher_a\n0,much\n", r"history\.csv cannot be read \(.*'much'"),
        ("conversion.json", "[]", r"conversion\.json is not a JSON object; restore it"),
        ("conversion.json", '{"self_train": []}', r"conversion\.json is not as self_train wrote it \(TypeError: "),
        ("conversion.json", '{"self_train": {}}', r"as self_train wrote it \(KeyError: 'labeled'\); restore it"),
        ("run.json", "[]", r"run\.json was not written by --predict; delete it"),
        ("run.json", '{"labeled": 5}', r"run\.json was not written by --predict; delete it"),
        ("run.json", "{}", r"predicted with another state of checkpoint_final\.pth; delete it and type --predict"),
    ],
)
def test_a_file_of_another_form_is_one_line(root, name, content, said):
    folder = make_training(root, DYCON)
    (run,) = find(DYCON)
    make_predictions(run.predictions)
    place = {"conversion.json": root / "nnUNet_raw" / DATASET, "run.json": run.predictions}.get(name, folder.parent)
    (place / name).write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        find(DYCON)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null"])
def test_plans_of_another_form_next_to_predictions_from_elsewhere_are_one_line(root, tmp_path, content):
    (make_predictions(tmp_path / "away") / "plans.json").write_text(content)
    with pytest.raises(DataError, match=r"plans\.json is not a JSON object; restore it"):
        find(str(tmp_path / "away"))


def test_a_split_that_changed_after_the_training_is_refused(root):
    folder = make_training(root, DYCON)
    write_splits(root, [{"train": [*LABELED, "more"], "val": list(VALIDATION)}])
    with pytest.raises(DataError, match=r"trained on 3 .* has 4 and 1; restore the split file"):
        read_training(folder)


# ---- refusals of unlike runs


def alike(*runs, cases=CASES, predicted=None):
    check_alike(runs, cases, {str(run.predictions): predicted or cases for run in runs})


def test_like_runs_pass_with_seeds_and_draws():
    other = {"labeled": ("train_5",), "fold": "1", "plans": "bbbbbbbb"}
    alike(*(a_run(name, seed=s, **draw) for name in "ab" for s in (0, 1) for draw in ({}, other)))


def test_other_test_cases_are_refused():
    runs = (a_run("a"), a_run("b"))
    predicted = {str(runs[0].predictions): CASES, str(runs[1].predictions): CASES[:-1]}
    with pytest.raises(DataError, match=r"b has other test cases: .* lacks test_09"):
        check_alike(runs, CASES, predicted)
    own = replace(runs[0], training=Path("f"), predictions=Path("f/test/x"))
    with pytest.raises(DataError, match="lacks test_09; delete f/test/x and type --predict"):
        check_alike([own], CASES, {"f/test/x": CASES[:-1]})
    with pytest.raises(DataError, match="has extra, which has no truth; predict the same cases with every run"):
        alike(a_run("a"), predicted=[*CASES, "extra"])


def test_other_labelled_cases_are_refused():
    with pytest.raises(DataError, match=r"b \(fold 0\) was trained on 2 labelled cases that a .* was not trained on"):
        alike(a_run("a"), a_run("b", labeled=LABELED[:2]))
    with pytest.raises(DataError, match="was not trained on"):
        alike(a_run("a"), a_run("a", labeled=("x",), seed=1), a_run("b"))
    with pytest.raises(DataError, match="was not trained on"):
        alike(a_run("a", labeled=None), a_run("b", labeled=None, labeled_count=4))


def test_an_upper_bound_has_all_labelled_cases_and_more_of_the_same_plans():
    bound = {"upper": True, "labeled": (*LABELED, "train_9"), "plans": "aaaaaaaa"}
    alike(a_run("a"), a_run("a", **bound))
    alike(a_run("a"), a_run("a", **bound | {"labeled": None, "plans": None}))
    for labeled in (LABELED, (*LABELED[:2], "train_9")):
        with pytest.raises(DataError, match=r"--upper a was trained on 3 labelled cases, which are not those of a and"):
            alike(a_run("a"), a_run("a", **bound | {"labeled": labeled}))
    command = "nnUNetv2_move_plans_between_datasets -s 501 -t 7 -sp nnUNetPlans -tp nnUNetPlans_of_501"
    for dataset, mend in ((DATASET, "train it anew with the same -p"), ("Dataset007_Other", f"-p .*: {command}$")):
        with pytest.raises(DataError, match=rf"--upper a was trained with other plans \(bbbb\).*{mend}"):
            alike(a_run("a"), a_run("a", **bound | {"plans": "bbbb", "dataset": dataset}))
    with pytest.raises(DataError, match="trained on the test cases test_00"):
        alike(a_run("a"), a_run("a", **bound | {"labeled": (*LABELED, CASES[0])}))


def test_one_name_with_other_settings_is_refused():
    def seeds(*settings):
        return [a_run("a", seed=seed, settings=one) for seed, one in enumerate(settings)]

    one, other = {"seed": 0, "view": "bcp", "w": 1.0}, {"seed": 1, "view": "noise", "w": 1.0}
    alike(*seeds(one, one | {"seed": 1}, one | {"paste": 0.0}, None))
    alike(a_run("a", settings=one), a_run("b", settings=other))
    for runs in (seeds(one, other), seeds({"w": 1.0}, one, other)):
        with pytest.raises(DataError, match=r"one trainer name, but view is noise and bcp.* train one of them anew"):
            alike(*runs)


def test_a_run_that_learnt_from_images_of_test_cases_is_refused():
    with pytest.raises(DataError, match="b was trained on images of the test cases test_03, as unlabelled ones"):
        alike(a_run("a"), a_run("b", unlabeled=2, unlabeled_cases=("other", CASES[3])))


def test_what_would_be_averaged_as_seeds_but_is_none_is_refused():
    alike(a_run("a"), *(a_run("b", seed=seed) for seed in (0, 1)), a_run("b", "t", seed=0, weights="teacher"))
    with pytest.raises(DataError, match=r"twice and .*_0 would be two runs of b \(student\), but neither seed"):
        alike(a_run("a", seed=0), a_run("b", seed=0), a_run("b", "twice", seed=0))
    nothing = Facts()
    folders = [Run(name, nothing, Path(name)) for name in ("bcp/out", "dycon/out")]
    with pytest.raises(DataError, match=r"dycon/out and bcp/out would be two runs of out"):
        alike(*folders)
    alike(*(Run(name, nothing, Path(name)) for name in ("bcp_seed0", "bcp_seed1", "dycon")))
    other = {"labeled": ("x", "y"), "fold": "1"}  # a draw of fewer labelled cases leaves more unlabelled ones
    alike(*(a_run(name, seed=0, unlabeled=n, **draw) for name in "ab" for n, draw in ((9, {}), (10, other))))
    with pytest.raises(DataError, match=r"would be runs of b \(student\), but with 9 and 72 unlabelled images"):
        alike(a_run("a"), a_run("b", seed=0, unlabeled=72), a_run("b", seed=1, unlabeled=9))


def test_other_plans_are_refused():
    with pytest.raises(DataError, match=r"b was trained with other plans \(bbbb\) than a \(aaaaaaaa\)"):
        alike(a_run("a"), a_run("b", plans="bbbb"))


def test_a_checkpoint_chosen_on_test_cases_is_refused():
    best = {"checkpoint": "checkpoint_best.pth"}
    with pytest.raises(DataError, match=r"checkpoint_best\.pth of a was chosen on the test cases test_00"):
        alike(a_run("a", validation=("test_00",), **best))
    alike(a_run("a", **best))  # on others: allowed
    alike(a_run("a", validation=("test_00",)))  # the final one is not chosen


def test_a_run_trained_on_test_cases_is_refused():
    with pytest.raises(DataError, match="was trained on the test cases test_03"):
        alike(a_run("a", labeled=("test_03",)))


def test_other_checkpoints_and_mirroring_in_one_arm_are_refused():
    with pytest.raises(DataError, match=r"differ in checkpoint: checkpoint_final\.pth in a, checkpoint_best\.pth in b"):
        alike(a_run("a"), a_run("b", checkpoint="checkpoint_best.pth"))
    with pytest.raises(DataError, match=r"differ in mirroring: True in a, False in b; .*--disable_tta"):
        alike(a_run("a"), a_run("b", mirroring=False))


def test_what_is_not_recorded_is_not_refused():
    alike(a_run("a"), a_run("b", labeled=None, labeled_count=None, plans=None, checkpoint=None, mirroring=None))


# ---- plans and names


def test_the_digest_of_plans_sees_what_matters_alone():
    renamed = {**PLANS, "dataset_name": "Dataset999_Other"}
    assert plans_digest(PLANS, "3d_fullres") == plans_digest(renamed, "3d_fullres")
    other = json.loads(json.dumps(PLANS))
    other["configurations"]["3d_fullres"]["batch_size"] = 3
    assert plans_digest(PLANS, "3d_half") != plans_digest(other, "3d_half")  # inherited
    shifted = {**PLANS, "foreground_intensity_properties_per_channel": {"0": {"mean": 2.0}}}
    assert plans_digest(PLANS, "3d_fullres") != plans_digest(shifted, "3d_fullres")
    assert resolved_plans(PLANS, "3d_half") == {"batch_size": 2, "patch_size": [8, 8, 8]}
    with pytest.raises(DataError, match="has no configuration 2d, only 3d_fullres, 3d_half"):
        resolved_plans(PLANS, "2d")


def test_the_baseline_is_a_run_a_trainer_or_a_method():
    runs = [a_run("nnUNetTrainer_seed0"), a_run("nnUNetTrainerDyCON_seed0")]
    for text in ("nnUNetTrainer_seed0", "nnUNetTrainer", "nnUNetTrainer (student)"):
        assert find_baseline(text, runs) == "nnUNetTrainer (student)"
    with pytest.raises(DataError, match="names none of the runs; give one of nnUNetTrainer, nnUNetTrainerDyCON"):
        find_baseline("nnUNetTrainerMeanTeacher", runs)
    with pytest.raises(DataError, match="names several methods; give one of nnUNetTrainer, nnUNetTrainerDyCON"):
        find_baseline("nnUNetTrainer*", [replace(run, name="nnUNetTrainer*") for run in runs])


def test_short_names_keep_what_tells_methods_apart():
    names = ["nnUNetTrainerDyCON_bf16_beta1 (student)", "nnUNetTrainerDyCON_bf16_beta2 (student)"]
    assert list(short_names(names).values()) == ["DyCON_beta1", "DyCON_beta2"]
    both = ["nnUNetTrainer_bf16 (student)", "nnUNetTrainer_bf16 (teacher)"]
    assert list(short_names(both).values()) == ["nnU-Net (student)", "nnU-Net (teacher)"]
    for folders in (["a", "a_b"], ["of others", "of others_2"], ["two (1)", "two (2)"]):
        assert short_names(folders) == {name: name for name in folders}
    mixed = ["nnUNetTrainer_bf16_epochs5", "nnUNetTrainerCPS_bf16_epochs5_w1", "theirs_bf16"]
    assert list(short_names(mixed).values()) == ["nnU-Net", "CPS_w1", "theirs_bf16"]
