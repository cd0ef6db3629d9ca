import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_dycon.errors import ConfigError
from nnunetv2_dycon.evaluation import tables
from nnunetv2_dycon.evaluation.comparison import make_comparison
from nnunetv2_dycon.evaluation.facts import Facts
from nnunetv2_dycon.evaluation.forms import latex
from nnunetv2_dycon.evaluation.runs import Run
from nnunetv2_dycon.evaluation.tables import (
    choose_published,
    class_table,
    difference_table,
    facts_table,
    main_table,
    read_published,
    results_csv,
)
from tests.madeup_runs import a_run
from tests.unit.test_comparison import DICE, score, scores


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


@pytest.fixture
def compared():
    better = [d + 0.05 + 0.001 * i for i, d in enumerate(DICE)]
    runs = [(a_run("nnUNetTrainer", seed=s), scores([d + 0.01 * s for d in DICE])) for s in (0, 1)]
    runs += [(a_run("nnUNetTrainerDyCON", seed=s, unlabeled=72), scores(better, distance=1.5)) for s in (0, 1)]
    return make_comparison(runs, "nnUNetTrainer (student)")


def test_the_main_table_has_the_papers_columns(compared):
    table = main_table(compared)
    expected = ("Method", "Labelled", "Unlabelled", "Runs", "Dice (%) ↑", "IoU (%) ↑", "HD95 (mm) ↓", "ASD (mm) ↓")
    assert table.header == expected
    # 0.675 and 0.685: mean 68.00, deviation 0.01 / sqrt 2
    one, other = (np.mean([d / (2 - d) for d in np.add(DICE, shift)]) for shift in (0.0, 0.01))
    iou = f"{50 * (one + other):.2f} ± {100 * (other - one) / 2**0.5:.2f}"
    assert texts(table)[0] == ["nnU-Net", "3", "0", "2", "68.00 ± 0.71", iou, "2.00 ± 0.00", "1.00 ± 0.00"]
    assert texts(table)[1][:5] == ["DyCON", "3", "72", "2", "72.85 ± 0.00"]
    assert (table.rows[1][4].best, table.rows[1][4].star) == (True, True)
    assert (table.rows[0][4].best, table.rows[0][4].star) == (False, False)


def test_with_an_upper_bound_the_table_says_how_much_of_the_gap_is_closed():
    better, best = ([d + shift + 0.001 * i for i, d in enumerate(DICE)] for shift in (0.04, 0.09))
    level, worse = ([d - loss for d in DICE] for loss in (0.0001, 0.0045))
    runs = [(a_run("nnUNetTrainer"), scores(DICE)), (a_run("nnUNetTrainerDyCON"), scores(better))]
    losing = [(a_run("nnUNetTrainerCPS"), scores(level)), (a_run("nnUNetTrainerBCP"), scores(worse))]
    table = main_table(
        make_comparison([*runs, *losing, (a_run("nnUNetTrainer", upper=True), scores(best))], "nnUNetTrainer (student)")
    )
    assert table.header[4:6] == ("Dice (%) ↑", "Gap closed (%)")
    assert [(row[0], row[5]) for row in texts(table)] == [
        ("nnU-Net", "0"),
        ("DyCON", "47 (46 to 47)"),
        ("CPS", "0"),
        ("BCP", "−5"),
        ("nnU-Net_upper-bound", "100"),
    ]
    assert "nnU-Net_upper-bound is an upper bound" in table.notes[-1]
    published = main_table(
        make_comparison([*runs, (a_run("u", upper=True), scores(best))], "nnUNetTrainer (student)"),
        choose_published("LA", [8]),
    )
    assert all(len(row) == len(published.header) and row[5].text == "–" for row in published.rows[3:])


def test_one_run_has_no_spread_and_voxels_are_not_called_mm():
    one = [(a_run(name), scores(DICE, convention="literature")) for name in "ab"]
    table = main_table(make_comparison(one, "a (student)"))
    assert table.rows[0][4].text == "67.50"
    assert "HD95 (voxels) ↓" in table.header
    assert "MedPy" in " ".join(table.notes)


def test_missed_structures_are_counted_beside_the_distances():
    missed = [score("c0", status="missed"), *scores(DICE)[1:]]
    table = main_table(make_comparison([(a_run("a"), scores(DICE)), (a_run("b"), missed)], "a (student)"))
    assert table.header[8:] == ("HD95 with penalty (mm) ↓", "Missed per run", "False alarms per run")
    assert [row[6:] for row in texts(table)] == [
        ["2.00", "1.00", "2.00", "0", "0"],
        ["2.00", "1.00", "14.25", "1", "0"],
    ]


def test_missed_structures_are_counted_per_run():
    """Two methods that miss the same structure in each run have the same number, however many runs they have."""
    missed = [score("c0", status="missed"), *scores(DICE)[1:]]
    runs = [(a_run("a", seed=seed), missed) for seed in range(3)] + [(a_run("b", seed=seed), missed) for seed in (0, 1)]
    runs.append((a_run("b", seed=2), scores(DICE)))
    assert [row[-2] for row in texts(main_table(make_comparison(runs, "a (student)")))] == ["1", "0.7"]


def test_classes_have_a_column_each_and_one_class_has_no_table(compared):
    assert class_table(compared) is None
    both = [*scores(DICE), *scores([0.5] * 8, "2")]
    table = class_table(make_comparison([(a_run("a"), both), (a_run("b"), both)], "a (student)"))
    assert table.header[1:] == ("Average Dice (%) ↑", "Average ASD (mm) ↓", "name 1 (%) ↑", "name 2 (%) ↑")
    assert texts(table)[0] == ["a", "58.75", "1.00", "67.50", "50.00"]


ORGANS = (
    *("spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior_vena_cava", "portal_and_splenic_vein", "pancreas", "right_adrenal_gland", "left_adrenal_gland"),
)


def organ_scores(shift=0.0):
    """Scores of two cases with 13 organs."""
    return [
        replace(score(f"c{case}", dice=0.3 + 0.05 * number + shift), label=str(number), name=name.replace("_", " "))
        for case in range(2)
        for number, name in enumerate(ORGANS, 1)
    ]


def test_many_classes_fit_a_page_next_to_the_published_rows_of_the_same_organs():
    """The form of the supplement's Table 2; seeds have a spread, which the columns of organs leave out."""
    runs = [(a_run("a", seed=seed), organ_scores(0.01 * seed)) for seed in (0, 1)]
    compared = make_comparison([*runs, (a_run("b"), organ_scores(0.02))], "a (student)")
    table = class_table(compared, choose_published("BTCV", [4]))
    short = ["Sp", "RK", "LK", "Ga", "Es", "Li", "St", "Ao", "IVC", "PSV", "Pa", "RAG", "LAG"]
    assert list(table.header) == ["Method", "Average Dice (%) ↑", "Average ASD (mm) ↓", *short]
    rows = texts(table)
    assert rows[0][:3] == ["a", "65.50 ± 0.71", "1.00 ± 0.00"]
    assert rows[0][3:6] == ["35.5", "40.5", "45.5"]
    published = {row[0]: row for row in rows if row[0].endswith(tables.OTHER_PROTOCOL)}
    assert list(published) == ["DHC ‡", "GA+MagicNet ‡", "DyCON+GA+MagicNet ‡"]
    assert published["GA+MagicNet ‡"][1:6] == ["68.40", "3.10", "81.4", "92.4", "90.8"]
    assert published["DyCON+GA+MagicNet ‡"][-1] == "39.6"
    assert "PSV portal and splenic vein" in table.notes[0]
    assert "not comparable with the rows above" in table.notes[1]
    text = latex(table)
    assert r"\footnotesize" in text
    assert all(row.count(" & ") == 15 for row in text.splitlines() if row.endswith(r"\\"))


def test_published_rows_without_these_organs_are_not_in_the_table_of_classes():
    both = [*scores(DICE), *scores([0.5] * 8, "2")]
    compared = make_comparison([(a_run("a"), both), (a_run("b"), both)], "a (student)")
    table = class_table(compared, choose_published("BTCV", [4]))
    assert [row[0] for row in texts(table)] == ["a", "b"]
    assert len(table.notes) == 1


def test_published_classes_have_the_mean_that_was_published_with_them():
    rows = [row for row in read_published() if "classes" in row]
    assert len(rows) == 3
    for row in rows:
        assert set(row["classes"]) == set(ORGANS)
        assert sum(row["classes"].values()) / 13 == pytest.approx(row["dice"], abs=0.6)


def test_classes_have_the_marks_of_their_own_differences():
    low = [*scores(DICE), *scores(DICE, "2")]
    high = [*scores([d + 0.1 + 0.001 * i for i, d in enumerate(DICE)]), *scores(DICE, "2")]
    middle = [*scores([d + 0.05 for d in DICE]), *scores(DICE, "2")]
    names = [f"c{i}" for i in range(8, 16)]  # p of twelve comparisons is small enough with sixteen cases
    low, middle, high = (
        [*run, *(replace(s, case=c) for s, c in zip(run, names * 2, strict=True))] for run in (low, middle, high)
    )
    runs = [(a_run(name), run) for name, run in (("a", low), ("b", middle), ("c", high))]
    table = class_table(make_comparison(runs, "a (student)"))
    assert [[cell.star for cell in row[1:]] for row in table.rows] == [
        [False] * 4,
        [True, False, True, False],
        [True, False, True, False],
    ]
    assert [[cell.best for cell in row[1:]] for row in table.rows] == [
        [False] * 4,
        [False] * 4,
        [True, False, True, False],
    ]


def test_differences_have_interval_p_and_verdict(compared):
    row = texts(difference_table(compared))[0]
    assert row[:3] == ["DyCON", "Dice (%) ↑", "+4.85"]
    assert row[4] == "0.031"  # the smallest p of eight cases, 2 / 256, times four metrics
    assert row[5:] == ["yes", "8", "0"]
    assert texts(difference_table(compared))[2][2] == "−0.50"


def test_the_table_of_differences_names_the_methods_whose_runs_are_not_all_used():
    runs = [(a_run("a", seed=s), scores(DICE)) for s in (0, 1, 2)]
    runs += [(a_run(name, seed=s), scores(DICE)) for name, seeds in (("b", (0, 1, 2)), ("c", (0, 1))) for s in seeds]
    notes = difference_table(make_comparison(runs, "a (student)")).notes
    assert [note for note in notes if note.startswith("c: the difference is of the runs whose seed")] == [notes[-1]]
    notes = difference_table(make_comparison(runs[:6], "a (student)")).notes
    assert not any("whose seed" in note for note in notes)


def test_under_six_cases_p_is_left_open():
    few = [(a_run(name), scores(DICE)[:5]) for name in "ab"]
    assert texts(difference_table(make_comparison(few, "a (student)")))[0][2:6] == ["0.00", "0.00 to 0.00", "–", "no"]


def test_the_interval_goes_from_its_lower_to_its_upper_end():
    uneven = [d + 0.02 + 0.01 * i for i, d in enumerate(DICE)]
    compared = make_comparison([(a_run("a"), scores(DICE)), (a_run("b"), scores(uneven))], "a (student)")
    found = compared.results["b (student)", "", "dice"].difference
    assert texts(difference_table(compared))[0][3] == f"+{100 * found.low:.2f} to +{100 * found.high:.2f}"
    assert found.low < found.high


def test_each_fact_is_in_its_column():
    facts = {"steps": 20, "batch": 2, "seconds_per_step": 0.25, "hardware": "GPU", "versions": {"torch": "2"}}
    names = ("nnUNetTrainershort_seed7", "nnUNetTrainerother_seed7")
    runs = [(a_run(name, fold="3", seed=7, **facts), scores(DICE)) for name in names]
    table = facts_table(make_comparison(runs, "nnUNetTrainershort (student)"))
    assert table.header[:2] == ("Method", "Trainer or folder")
    assert texts(table)[0][:2] == ["short", "nnUNetTrainershort_seed7"]
    assert table.header[2:8] == (
        *("Weights", "Labelled", "Unlabelled", "Steps", "Labelled patches seen", "Checkpoint"),
    )
    assert texts(table)[0][2:8] == ["student", "3", "0", "20", "40", "checkpoint_final.pth"]
    assert table.header[8:] == ("Mirroring", "Seed", "Seconds per step", "Hardware", "Fold", "Plans", "Versions")
    assert texts(table)[0][8:] == ["yes", "7", "0.25", "GPU", "3", "aaaaaaaa", "torch 2"]


def test_the_facts_are_folded_and_name_folders_of_predictions(compared):
    assert facts_table(compared).folded == "Full names and facts of the 4 runs"
    runs = [(Run(name, Facts(), Path("from", name)), scores(DICE)) for name in ("theirs", "ours")]
    table = facts_table(make_comparison(runs, "theirs"))
    assert [row[1] for row in texts(table)] == ["theirs", "ours"]


def test_facts_that_are_not_recorded_are_called_so(compared):
    table = facts_table(compared)
    row = dict(zip(table.header, texts(table)[0], strict=True))
    assert (row["Weights"], row["Labelled"], row["Mirroring"], row["Seed"]) == ("student", "3", "yes", "0")
    assert (row["Steps"], row["Seconds per step"], row["Versions"]) == ("not recorded",) * 3
    assert len(table.rows) == 4


def test_published_rows_are_marked_with_their_protocol_and_source(compared):
    published = choose_published("Dataset503_LA", [8])
    table = main_table(compared, published)
    added = table.rows[2:]
    assert len(added) == len(published) > 0
    assert all(row[0].text.endswith(" ‡") and not any(cell.best for cell in row) for row in added)
    assert {row[1].text for row in added} == {"8"}
    assert "another evaluation protocol" in table.notes[-1]
    assert all(row["protocol"] in table.notes[-1] and row["source"] in table.notes[-1] for row in published)
    assert {len(row) for row in table.rows} == {len(table.header)}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Dataset501_ISLES22", "ISLES22"),
        ("Dataset502_BraTS19_10pct", "BraTS19"),
        ("LA", "LA"),
        ("Dataset504_PancreasNIH", "Pancreas-CT"),
        ("Pancreas-CT", "Pancreas-CT"),
        ("btcv", "BTCV"),
    ],
)
def test_published_results_are_found_by_the_data_sets_name(name, found):
    assert {row["dataset"] for row in choose_published(name, [None])} == {found}


@pytest.mark.parametrize("name", ["Dataset604_Hippocampus", "Dataset600_Labeled", "Dataset7_Atlas"])
def test_a_data_set_without_published_results_is_refused_with_the_names(name):
    with pytest.raises(ConfigError, match="there are results of ISLES22, BraTS19, LA, "):
        choose_published(name, [8])


def test_every_published_number_has_a_source_and_a_protocol():
    for row in read_published():
        assert row["source"]
        assert row["protocol"]
        assert all(row[key] is None or 0 < row[key] <= 100 for key in ("dice", "jaccard"))
        assert {type(row["labelled"]), type(row["unlabelled"])} == {int}


def test_the_published_results_are_installed_with_the_package():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert '"evaluation/*.json"' in setup
    assert '"evaluation/*.html"' in setup
    assert json.loads((Path(tables.__file__).parent / "published_results.json").read_text())


def test_the_csv_has_all_digits_of_every_result(compared):
    rows = list(csv.DictReader(io.StringIO(results_csv(compared))))
    assert len(rows) == len(compared.results) == 8
    first = next(row for row in rows if row["method"] == "nnUNetTrainerDyCON" and row["metric"] == "dice")
    found = compared.results["nnUNetTrainerDyCON (student)", "", "dice"]
    assert float(first["mean"]) == found.mean.mean
    assert (float(first["low"]), float(first["p_holm"])) == (found.difference.low, found.p)
    assert (first["unit"], first["holds"], first["runs"], first["cases"]) == ("1", "True", "2", "8")
    assert {row["unit"] for row in rows if row["metric"] == "hd95"} == {"mm"}


def test_the_csv_tells_a_difference_that_holds_from_the_best_method():
    shifted = [scores([d + shift + 0.001 * i for i, d in enumerate(DICE)]) for shift in (0.0, 0.05, 0.1)]
    more = [[*run, *(replace(s, case=f"d{s.case}") for s in run)] for run in shifted]
    compared = make_comparison([(a_run(n), run) for n, run in zip("abc", more, strict=True)], "a (student)")
    rows = csv.DictReader(io.StringIO(results_csv(compared)))
    marks = {row["method"]: (row["holds"], row["best"]) for row in rows if row["metric"] == "dice"}
    assert marks == {"a": ("False", "False"), "b": ("True", "False"), "c": ("True", "True")}
