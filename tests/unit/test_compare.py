import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.evaluation import compare as module
from nnunetv2_dycon.evaluation.compare import compare
from nnunetv2_dycon.evaluation.facts import read_run_file, write_run_file
from nnunetv2_dycon.evaluation.predict import predict
from nnunetv2_dycon.evaluation.runs import Place, find_runs
from nnunetv2_dycon.evaluation.scores import evaluate, read_scores
from nnunetv2_dycon.evaluation.tables import choose_published
from tests.madeup_runs import (
    CASES,
    DATASET,
    LABELED,
    PLANS,
    VALIDATION,
    dataset_json,
    make_dataset,
    make_predictions,
    make_training,
    make_truth,
    write_splits,
)

STOCK, OURS = "nnUNetTrainer_seed{}", "nnUNetTrainerDyCON_seed{}"


@pytest.fixture
def root(tmp_path, monkeypatch):
    make_dataset(tmp_path, monkeypatch)
    return tmp_path


def trained(root, name, shift, **options):
    """Write a training with predictions of its test cases."""
    folder = make_training(root, name, **options)
    for weights in ("student", "teacher"):
        make_predictions(folder / "test" / f"checkpoint_final_{weights}", shift)
    return folder


def report(root, *runs, **options):
    return compare(501, runs, output=root / "report", processes=1, **options)


def test_a_report_of_seeds_and_two_methods_is_whole(root):
    for seed in (0, 1):
        trained(root, STOCK.format(seed), 2, seed=seed)
        trained(root, OURS.format(seed), 0, seed=seed, unlabeled="12")
    page = report(root, STOCK.format("*"), OURS.format("*"))
    assert page == root / "report" / "report.html"
    names = {str(path.relative_to(page.parent)) for path in page.parent.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.png" for name in ("boxes", "pairs", "overlays", "curves")}
    assert {"report.html", "report.md", "tables.tex", "results.csv"} | figures <= names
    assert page.stat().st_size < 10e6
    text = (page.parent / "report.md").read_text()
    assert "2 methods in 4 runs on 10 test cases of Dataset501_Made; baseline: nnU-Net." in text
    assert "| DyCON | 3 | 12 | 2 | **100.00 ± 0.00**\\* |" in text
    assert "\n## Classes\n" in text
    assert "\n## Size and gain\n" in text
    tables = sorted((page.parent / "scores").glob("*/scores.csv"))
    assert [len(read_scores(table)) for table in tables] == [20] * 4
    with pytest.raises(DataError, match="holds a report; type --overwrite"):
        report(root, STOCK.format("*"), OURS.format("*"))


def test_folders_of_predictions_alone_can_be_compared_and_replace_a_report(root, monkeypatch):
    monkeypatch.setattr(module, "write_report", lambda folder, *_: (folder / "report.html").write_text("new"))
    runs = [str(make_predictions(root / name, shift)) for name, shift in (("a", 0), ("b", 1))]
    report(root, *runs)
    (root / "report" / "old").write_text("")
    report(root, *runs, overwrite=True)
    assert not (root / "report" / "old").exists()


def test_the_report_that_a_killed_run_was_replacing_is_not_replaced_unasked(root, monkeypatch):
    monkeypatch.setattr(module, "write_report", lambda folder, *_: (folder / "report.html").write_text("new"))
    runs = [str(make_predictions(root / name, shift)) for name, shift in (("a", 0), ("b", 1))]
    report(root, *runs)
    (root / "report").rename(root / ".01234567.old.report")
    with pytest.raises(DataError, match="holds a report; type --overwrite"):
        report(root, *runs)
    assert (root / "report" / "report.html").read_text() == "new"
    assert not list(root.glob(".*"))


def test_a_report_that_another_run_wrote_meanwhile_is_kept(root, monkeypatch):
    def slow(folder, *_):
        (folder / "report.html").write_text("ours")
        (root / "report").mkdir()
        (root / "report" / "report.html").write_text("theirs")

    monkeypatch.setattr(module, "write_report", slow)
    runs = [str(make_predictions(root / name, shift)) for name, shift in (("a", 0), ("b", 1))]
    with pytest.raises(DataError, match="holds a report; type --overwrite"):
        report(root, *runs)
    assert (root / "report" / "report.html").read_text() == "theirs"
    assert not list(root.glob(".*"))


def test_the_baseline_is_the_first_run_unless_one_is_named(root, monkeypatch):
    found = []
    monkeypatch.setattr(module, "write_report", lambda folder, title, comparison, *_: found.append(comparison))
    for name, shift in (("a", 0), ("b", 1)):
        make_predictions(root / name, shift)
    for baseline in (None, str(root / "b")):
        shutil.rmtree(root / "report", ignore_errors=True)
        report(root, str(root / "a"), str(root / "b"), baseline=baseline)
    assert [comparison.methods[0].name for comparison in found] == ["a", "b"]


def test_student_and_teacher_are_rows_of_their_own(root, monkeypatch):
    found = []
    monkeypatch.setattr(module, "write_report", lambda folder, title, comparison, *_: found.append(comparison))
    trained(root, OURS.format(0), 0)
    report(root, OURS.format(0), weights=("student", "teacher"))
    assert [method.short for method in found[0].methods] == ["DyCON (student)", "DyCON (teacher)"]


def test_missing_predictions_are_made_where_they_are_asked_for(root, monkeypatch):
    trained(root, STOCK.format(0), 0)
    make_training(root, OURS.format(0))
    with pytest.raises(DataError, match=r"nnUNetTrainerDyCON_seed0 has no predictions in .*; type --predict"):
        report(root, STOCK.format(0), OURS.format(0))
    calls = []

    def stand_in(run, images, **options):
        calls.append((run.method, Path(images).name, options))
        make_predictions(run.predictions, 1)

    monkeypatch.setattr(module, "predict_run", stand_in)
    monkeypatch.setattr(module, "write_report", lambda *_: None)
    report(root, STOCK.format(0), OURS.format(0), predict=True)
    options = {"mirroring": True, "device": None, "save_probabilities": False}
    assert calls == [("nnUNetTrainerDyCON (student)", "imagesTs", options)]
    shutil.rmtree(root / "report")
    given = {"mirroring": False, "device": "cpu", "save_probabilities": True}
    report(root, STOCK.format(0), OURS.format(0), predict=True, **given)
    assert [call[2] for call in calls[1:]] == [given, given]


def test_compare_looks_for_trainings_where_it_is_told(root, monkeypatch):
    places = []
    monkeypatch.setattr(module, "find_runs", lambda text, *rest: places.append((text, *rest)) or [])
    options = {"configuration": "2d", "folds": (0, 1), "plans": "P", "checkpoint": "checkpoint_best.pth"}
    with pytest.raises(DataError, match="names none of the runs"):
        report(root, "a", upper=["b"], weights=("teacher",), mirroring=False, **options)
    place = Place(DATASET, "2d", "P", (0, 1), "checkpoint_best.pth")
    assert places == [(text, place, ("teacher",), False) for text in "ab"]


@pytest.fixture
def written(monkeypatch):
    """Arguments of `write_report`, which writes nothing."""
    calls = []
    monkeypatch.setattr(module, "write_report", lambda *arguments: calls.append(arguments))
    return calls


def test_compare_scores_by_the_data_sets_own_labels_and_the_convention_given(root, written):
    folders = [make_predictions(root / name, shift) for name, shift in (("a", 1), ("b", 2))]
    for folder in folders:  # nnU-Net leaves a copy of the training's, whose names may differ
        (folder / "dataset.json").write_text(json.dumps(dataset_json() | {"labels": {"background": 0, "x": 1, "y": 2}}))
    report(root, *map(str, folders), convention="literature")
    ((_, title, comparison, images, published),) = written
    assert (title, comparison.convention, comparison.unit) == ("Comparison on Made", "literature", "voxels")
    assert comparison.labels == {"1": "left", "2": "right"}
    assert (images.images, published) == (root / "nnUNet_raw" / DATASET / "imagesTs", [])
    expected = evaluate(
        images.truth, folders[0], root / "nnUNet_raw" / DATASET / "dataset.json", root / "s", 1, convention="literature"
    )
    assert list(comparison.methods[0].scores[0].values()) == expected


def test_nnunets_predictions_are_compared_where_sform_and_qform_of_images_differ(root):
    raw = root / "nnUNet_raw" / DATASET
    elsewhere = np.diag([-1.0, 1, 2, 1])
    elsewhere[:3, 3] = 40
    for path in (*(raw / "labelsTs").iterdir(), *(raw / "imagesTs").iterdir()):
        image = nibabel.load(path, mmap=False)
        image.set_qform(image.affine, 1)
        image.set_sform(elsewhere, 2)
        nibabel.save(image, path)
    for shift, folder in ((0, root / "a"), (1, root / "b")):
        folder.mkdir()
        for case in CASES:
            _, properties = SimpleITKIO().read_images([str(raw / "imagesTs" / f"{case}_0000.nii.gz")])
            SimpleITKIO().write_seg(np.roll(make_truth(case).T, shift, 1), str(folder / f"{case}.nii.gz"), properties)
    text = (report(root, str(root / "a"), str(root / "b")).parent / "report.md").read_text()
    assert "| a | not recorded | not recorded | 1 | **100.00** |" in text


def test_pictures_show_files_as_the_reader_of_the_predictions_plans_sees_them(root, written):
    runs = [make_predictions(root / name, shift) for name, shift in (("a", 0), ("b", 1))]
    for folder in runs:
        (folder / "plans.json").write_text(json.dumps(PLANS | {"image_reader_writer": "NibabelIOWithReorient"}))
    report(root, *map(str, runs))
    assert written[0][3].labels.reader is NibabelIOWithReorient


def test_the_truth_may_be_in_another_folder(root, written):
    truth = make_predictions(root / "truth", 2)
    runs = [str(make_predictions(root / name, shift)) for name, shift in (("a", 2), ("b", 0))]
    report(root, *runs, truth_folder=truth)
    ((_, _, comparison, images, _),) = written
    assert images.truth == truth
    assert {score.dice for score in comparison.methods[0].scores[0].values()} == {1.0}


def test_published_rows_are_chosen_by_the_runs_labelled_cases_and_reported(root, monkeypatch):
    asked, row = [], choose_published("LA", [8])[:1]
    monkeypatch.setattr(module, "choose_published", lambda *arguments: asked.append(arguments) or row)
    trained(root, STOCK.format(0), 1)
    trained(root, OURS.format(0), 0)
    page = report(root, STOCK.format(0), OURS.format(0), published="LA")
    assert asked == [("LA", [3, 3])]
    assert f"| {row[0]['method']} ‡ | 8 | 72 |" in (page.parent / "report.md").read_text()
    assert (page.parent / "tables.tex").read_text().count(r"\begin{tabular}") == 5


# ---- prediction by nnU-Net's commands, with a stand-in for the process


def test_a_prediction_is_nnunets_command_and_is_whole_or_absent(root, monkeypatch):
    commands = []

    def call(script, arguments, run, by_hand, environment=None):
        commands.append((script, arguments, environment))
        if "-i" in arguments:
            make_predictions(Path(arguments[arguments.index("-o") + 1]))

    monkeypatch.setattr("nnunetv2_dycon.evaluation.predict._call", call)
    folder = make_training(root, OURS.format(0))
    student, teacher = find_runs(OURS.format(0), Place(DATASET), ("student", "teacher"), False)
    predict(student, root / "imagesTs", mirroring=False, device="cpu", save_probabilities=True)
    ((_, arguments, _),) = commands
    for part in (["-m", str(folder.parent)], ["-f", "0"], ["-chk", "checkpoint_final.pth"], ["-npp", "1", "-nps", "1"]):
        assert " ".join(part) in " ".join(arguments)
    assert {"--disable_tta", "--save_probabilities", "-device"} <= set(arguments)
    assert read_run_file(student.predictions) == student.facts
    predict(teacher, root / "imagesTs", mirroring=True)
    export = commands[1]
    assert " ".join(export[1][:6]) == f"nnUNetv2_dycon export -d {DATASET} -tr {OURS.format(0)}"
    assert " ".join(export[1]).count("--weights teacher") == 1
    assert export[2] == {"nnUNet_results": str(root / "nnUNet_results")}
    assert "--disable_tta" not in commands[2][1]
    best = make_training(root, STOCK.format(0), ours=False, checkpoint="checkpoint_best.pth")
    (run,) = find_runs(str(best), Place(DATASET, checkpoint="checkpoint_best.pth"), ("student",), True)
    predict(run, root / "imagesTs", mirroring=True)
    assert "-chk checkpoint_best.pth" in " ".join(commands[3][1])
    assert str(folder.parent) not in commands[2][1]  # but the exported model


def test_a_failed_prediction_says_why_and_leaves_nothing(root, monkeypatch):
    monkeypatch.setattr("nnunetv2_dycon.evaluation.predict._PREDICT", "raise SystemExit('no memory')")
    folder = make_training(root, OURS.format(0))
    (run,) = find_runs(OURS.format(0), Place(DATASET), ("student",), True)
    with pytest.raises(DataError, match=r"prediction with nnUNetTrainerDyCON .* failed \(no memory\)"):
        predict(run, root / "imagesTs", mirroring=True)
    assert not list((folder / "test").iterdir())


def test_a_folder_of_predictions_cannot_be_predicted(root):
    (run,) = find_runs(str(make_predictions(root / "a")), Place(DATASET), ("student",), True)
    with pytest.raises(DataError, match="is a folder of predictions"):
        predict(run, root, mirroring=True)


# ---- refusals, before anything is scored or written


def test_refusals_come_before_any_work(root, monkeypatch):
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("scored"))
    good = str(make_predictions(root / "good"))
    few = str(make_predictions(root / "few", cases=CASES[:-1]))
    with pytest.raises(DataError, match=r"few has other test cases: .* lacks test_09"):
        report(root, good, few)
    with pytest.raises(ConfigError, match="one method only"):
        report(root, good, good)
    for seed in (4, 5):
        make_training(root, STOCK.format(seed))
    with pytest.raises(ConfigError, match=r"one method only \(seeds of it"):
        report(root, *map(STOCK.format, (4, 5)))
    (root / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*file: it is a file;"):
        compare(501, [good, few], output=root / "file" / "report")
    with pytest.raises(DataError, match="names none of the runs"):
        report(root, good, few, baseline="nnUNetTrainer")
    with pytest.raises(ConfigError, match="there are results of"):
        report(root, good, few, published="auto")
    make_training(root, STOCK.format(0), done=1)
    with pytest.raises(DataError, match="not a finished training"):
        report(root, good, STOCK.format(0))
    (root / "report").mkdir()
    (root / "report" / "mine").write_text("")
    with pytest.raises(DataError, match="is not a report"):
        report(root, good, few, overwrite=True)
    assert (root / "report" / "mine").exists()


def test_a_fold_with_other_labelled_cases_is_refused(root):
    write_splits(root, [{"train": list(LABELED), "val": list(VALIDATION)}, {"train": ["x", "y", "z"], "val": ["w"]}])
    trained(root, STOCK.format(0), 0)
    other = trained(root, OURS.format(0), 0, fold=1)
    with pytest.raises(DataError, match="compare runs of the same labelled cases"):
        report(root, STOCK.format(0), str(other))


def test_an_upper_bound_may_have_more_labelled_cases_and_closes_the_table(root):
    write_splits(root, [{"train": list(folds), "val": list(VALIDATION)} for folds in (LABELED, (*LABELED, "more"))])
    trained(root, STOCK.format(0), 2)
    trained(root, OURS.format(0), 1)
    bound = trained(root, STOCK.format(0), 0, fold=1)  # the baseline's own trainer, as it usually is
    (log,) = bound.glob("training_log_*.txt")
    log.write_text(log.read_text().replace("3 training", "4 training"))
    page = report(root, STOCK.format(0), OURS.format(0), upper=[str(bound)])
    lines = (page.parent / "report.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[lines.index("## Test cases") + 4 :][:3]] == [
        "| nnU-Net",
        "| DyCON",
        "| nnU-Net_upper-bound",
    ]
    assert "of the mean Dice from nnU-Net (0) to nnU-Net_upper-bound (100)" in "".join(lines)


def test_a_best_checkpoint_that_was_chosen_on_the_test_cases_is_refused(root):
    write_splits(root, [{"train": list(LABELED), "val": [CASES[0]]}])
    for name in (STOCK, OURS):
        folder = make_training(root, name.format(0), checkpoint="checkpoint_best.pth")
        make_predictions(folder / "test" / "checkpoint_best_student")
    with pytest.raises(DataError, match=r"checkpoint_best\.pth of .* was chosen on the test cases test_00"):
        report(root, STOCK.format(0), OURS.format(0), checkpoint="checkpoint_best.pth")


def test_predictions_with_mirroring_in_one_arm_only_are_refused(root):
    folders = [trained(root, name.format(0), 0) for name in (STOCK, OURS)]
    (run,) = find_runs(OURS.format(0), Place(DATASET), ("student",), False)
    away = make_predictions(root / "away")
    write_run_file(away, run.facts)
    with pytest.raises(DataError, match="differ in mirroring"):
        report(root, str(folders[0]), str(away))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:100]), "cannot be read"),
        (lambda f: nibabel.save(nibabel.Nifti1Image(np.full((16, 14, 12), 9, np.uint8), np.eye(4)), f), "value 9"),
        (
            lambda f: nibabel.save(nibabel.Nifti1Image(np.full((16, 14, 12), 0.5, np.float32), np.eye(4)), f),
            "probabilities",
        ),
        (lambda f: nibabel.save(nibabel.Nifti1Image(np.zeros((16, 14, 9), np.uint8), np.eye(4)), f), "shape"),
    ],
)
def test_bad_predictions_are_refused_with_their_file_and_leave_no_report(root, break_it, reason):
    good, bad = make_predictions(root / "good"), make_predictions(root / "bad")
    break_it(bad / "test_02.nii.gz")
    with pytest.raises(DataError, match=f"bad/test_02.nii.gz .*{reason}"):
        report(root, str(good), str(bad))
    assert not (root / "report").exists()
    assert not list(root.glob(".report*"))


def test_a_folder_without_label_maps_and_an_unknown_data_set_are_refused(root):
    good = str(make_predictions(root / "good"))
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file ending in \.nii\.gz"):
        report(root, good, str(root / "empty"))
    with pytest.raises(
        DataError, match=r"-d 777: no data set has this id; .* has Dataset501_Made; correct the id, or nnUNet_raw"
    ):
        compare(777, [good, good], output=root / "report")
