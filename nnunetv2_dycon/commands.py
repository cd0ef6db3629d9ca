"""The command `nnUNetv2_dycon VERB`: each verb parses its arguments, calls one function and prints its result.

Names of arguments are nnU-Net's. A verb's module is imported only when the verb runs, so that `--help` is quick.
"""

import argparse
import ast
import importlib
import importlib.util
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_dycon import command_lines
from nnunetv2_dycon.exit_codes import exit_code
from nnunetv2_dycon.options import Settings, describe

Argument = tuple[tuple[str, ...], dict[str, Any]]


class Verb(NamedTuple):
    """One verb: `arguments` name parameters of `function`; `show` prints its result.

    Only typed arguments are passed, so the defaults are those of the function. `show` returns the exit code. `next`
    takes what was typed and the result, and returns what a user would type next; it is printed apart from the result.
    """

    help: str
    function: str  # "module:function"
    arguments: Sequence[Argument]
    show: Callable[[Any], int]
    next: Callable[[dict[str, Any], Any], str | None] = lambda typed, result: None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 success, 1 a finding of `doctor` or `check`, else as `exit_code`."""
    return exit_code(partial(_run, argv))


def _run(argv: Sequence[str] | None) -> int:
    verb, arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    module, name = verb.function.split(":")
    result = getattr(importlib.import_module(module), name)(**arguments)
    code = verb.show(result)
    sys.stdout.flush()  # before the line on stderr
    then = None if code else verb.next({**defaults_of(verb.function), **arguments}, result)
    if then:
        print(f"next: {then}", file=sys.stderr)
    return code


def parse(argv: Sequence[str] | None = None) -> tuple[Verb, dict[str, Any]]:
    """Return the verb and the arguments of its function; argparse ends the program after --help or an error."""
    parser = argparse.ArgumentParser("nnUNetv2_dycon", description="Semi-supervised training inside nnU-Net.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    of_groups: dict[str, Any] = {}
    for name, verb in VERBS.items():
        group, _, word = name.rpartition(" ")
        if group and group not in of_groups:
            text = GROUPS[group]
            inner = verbs.add_parser(group, help=text, description=text)
            of_groups[group] = inner.add_subparsers(dest="word", required=True, metavar=group.upper())
        formatter = partial(_Formatter, function=verb.function)
        among = of_groups[group] if group else verbs
        of_verb = among.add_parser(word, help=verb.help, description=verb.help, formatter_class=formatter)
        for flags, keywords in verb.arguments:
            of_verb.add_argument(*flags, **keywords)
    arguments = vars(parser.parse_args(argv))
    words = [arguments.pop("verb"), *([arguments.pop("word")] if "word" in arguments else [])]
    return VERBS[" ".join(words)], arguments


class _Formatter(argparse.HelpFormatter):
    """Adds the defaults of the verb's function, read from its source text, since importing it takes seconds."""

    def __init__(self, prog: str, *, function: str) -> None:
        super().__init__(prog)
        self._function = function

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = defaults_of(self._function).get(action.dest)
        if action.help is None or default is None or isinstance(default, bool) or "default" in action.help:
            return action.help
        words = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        return f"{action.help} (default: {words})" if words else action.help


@cache
def defaults_of(function: str) -> dict[str, Any]:
    """Return the defaults of a function's parameters, where they are literals, without importing its module.

    Parameters
    ----------
    function : str
        "module:function".
    """
    module, name = function.split(":")
    spec: Any = importlib.util.find_spec(module)
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (node,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    constants = {
        place.id: node.value
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for place in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(place, ast.Name)
    }
    positional = [*node.args.posonlyargs, *node.args.args]
    values = [
        *zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True),
        *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
    ]
    found = {}
    for parameter, value in values:
        value = constants.get(value.id) if isinstance(value, ast.Name) else value
        with suppress(ValueError, TypeError):  # not a literal, or no default
            found[parameter.arg] = ast.literal_eval(value)  # type: ignore[arg-type]
    return found


def _argument(*flags: str, **keywords: Any) -> Argument:
    return flags, {"default": argparse.SUPPRESS, **keywords}


def _number_or_word(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _show(result: Any) -> int:
    print(result)
    return 0


def _show_paths(paths: Sequence[Any]) -> int:
    for path in paths:
        print(path)
    return 0


def _show_findings(findings: Sequence[Any]) -> int:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<{width}}  {finding.text}")
    return 0 if all(finding.ok for finding in findings) else 1


def _show_trainers(trainers: Sequence[Any]) -> int:
    print("A name is a trainer and any options, for example nnUNetTrainerDyCON_epochs100_lr0p005_nomirror")
    print("(p is the decimal point; AtoB goes from A to B during training; a switch has no value).\n")
    common = describe(Settings)
    _show_rows("options of every trainer", common)
    rows = {trainer.name: trainer.options for trainer in trainers}
    for trainer in trainers:
        known = rows.get(trainer.preset_of, common)
        title = f"{trainer.preset_of} with other defaults" if trainer.preset_of else trainer.summary
        _show_rows(f"{trainer.name}: {title}", [row for row in trainer.options if row not in known])

    return 0


def _show_scores(rows: Sequence[Any]) -> int:
    from nnunetv2_dycon.evaluation.scores import summarize

    summary = summarize(rows)
    classes = list(summary["classes"].values())
    known = [key for key, entry in classes[0].items() if isinstance(entry, dict)]
    metrics = [key for key in known if any(of_class[key].get("mean") is not None for of_class in classes)]
    statuses = list(classes[0]["status"])
    table = [["label", "name", *statuses, *metrics]]
    for label, of_class in summary["classes"].items():
        means = (of_class[metric]["mean"] for metric in metrics)
        cells = ("-" if mean is None else f"{mean:.4g}" for mean in means)
        table.append([label, of_class["name"], *(str(of_class["status"][status]) for status in statuses), *cells])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for line in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"(means; convention {summary['convention']}, distances of cases with status ok)")
    return 0


def _next_of_preparation(typed: dict[str, Any], result: Any) -> str:
    plans = [] if typed["plans"] == "nnUNetPlans" else ["-p", typed["plans"]]
    words = ["nnUNetv2_train", str(typed["dataset"]), typed["configurations"][0], "0", "-tr", "nnUNetTrainerDyCON"]
    return shlex.join([*words, *plans, *command_lines.device_flag()])


def _next_of_export(typed: dict[str, Any], result: Any) -> str:
    folds = sorted(path.name.removeprefix("fold_") for path in result.glob("fold_*"))
    return shlex.join(
        [
            "nnUNetv2_predict_from_modelfolder",
            "-m",
            str(result),
            "-f",
            *folds,
            "-i",
            "IN",
            "-o",
            "OUT",
            *command_lines.device_flag(),
        ]
    )


def _next_of_comparison(typed: dict[str, Any], result: Any) -> str:
    return f"open {shlex.quote(str(result))} in a browser"


def _show_picture(result: Any) -> int:
    return _show_paths(result.files)


def _next_of_ranking(typed: dict[str, Any], result: Any) -> str:
    dataset = str(typed["dataset_id"])
    return shlex.join(["nnUNetv2_dycon", "annotate", "-d", dataset, result.cases[0], "LABEL"])


def _next_of_annotation(typed: dict[str, Any], result: Any) -> str:
    return " && ".join(result.commands)


def _show_rows(title: str, rows: Sequence[Any]) -> None:
    print(title)
    name, default = (max(len(row[column]) for row in rows) for column in range(2))
    for row in rows:  # allowed values come last, since some lists are long
        print(f"  {row.option:<{name}}  {row.default:<{default}}  {row.help} ({row.allowed})")
    print()


def _dataset(parameter: str) -> Argument:
    return _argument("-d", dest=parameter, required=True, type=_number_or_word, help="dataset id or name")


_PLANS = _argument("-p", dest="plans", help="plans identifier")
_OVERWRITE = _argument("--overwrite", action="store_true", help="replace existing results")

_PROCESSES = "worker processes (default: one per processor, at most 8)"
_TRAINER = _argument("-tr", dest="trainer", required=True, help="trainer name, options included")
_CONFIGURATION = _argument("-c", dest="configuration", help="configuration")
_FOLD = _argument("-f", dest="fold", type=_number_or_word, help="fold, or all")
_CHECKPOINT = _argument("-chk", dest="checkpoint", help="checkpoint file")
_DEVICE = _argument("-device", help="cuda, cpu or mps (default: cuda if there is a device)")
_NO_MIRRORING = _argument("--disable_tta", dest="mirroring", action="store_false", help="predictions without mirroring")

# Verbs of two words, by the first one.
GROUPS = {"plot": "Pictures of a data set or of a training, as PNG and SVG, and the numbers behind them as CSV."}

VERBS: dict[str, Verb] = {
    "doctor": Verb(
        "Check the installation and name the remedies.",
        "nnunetv2_dycon.doctor:doctor",
        (),
        _show_findings,
    ),
    "trainers": Verb(
        "List the trainers for -tr, their options, defaults and ranges.",
        "nnunetv2_dycon.trainers.names:list_trainers",
        (),
        _show_trainers,
    ),
    "convert": Verb(
        "Write a public collection as nnU-Net raw data with labelled, unlabelled and test cases. "
        "For the arguments of a collection type, for example: nnUNetv2_dycon convert LA --help",
        "nnunetv2_dycon.dataset_conversion:convert_collection",
        (
            _argument("collection", metavar="COLLECTION", help="ISLES22, BraTS19, LA, PancreasNIH or BTCV"),
            _argument(
                "arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments: see COLLECTION --help"
            ),
        ),
        _show,
        lambda typed, result: result.then,
    ),
    "split": Verb(
        "Write a raw data set of links to the files of another one; some training cases lose their labels.",
        "nnunetv2_dycon.conversion.split:split",
        (
            _dataset("dataset_id"),
            _argument("--as", dest="new_id", required=True, type=int, help="id of the new data set"),
            _argument(
                "--labeled", required=True, help="a fraction (0.1), a number (8), all, or a file with one id per line"
            ),
            _argument("--labeled_seed", type=int, help="seed of the draw (default: 0)"),
            _argument("--test", help="fraction or number of training cases to draw as test cases"),
            _argument("--groups", help="JSON {case: subject} or a table: scans of a subject stay together"),
            _argument("--protocol", help="JSON file with labeled, train, val, test, instead of draws"),
            _argument("-np", dest="processes", type=int, help=_PROCESSES),
            _argument("--dry_run", action="store_true", help="only report the plan, write nothing"),
            _OVERWRITE,
        ),
        _show,
        lambda typed, result: result.then,
    ),
    "check": Verb(
        "Check a raw data set: roles, duplicates, geometry, channels, labels; prints the next command.",
        "nnunetv2_dycon.conversion.check:check",
        (
            _dataset("dataset_id"),
            _argument("-np", dest="processes", type=int, help=_PROCESSES),
            _argument("--fix", action="store_true", help='correct "numTraining" in dataset.json'),
        ),
        _show_findings,
    ),
    "preprocess_unlabeled": Verb(
        "Preprocess the images of imagesUn; no label is opened, and a stopped run continues.",
        "nnunetv2_dycon.data.unlabeled:preprocess_unlabeled",
        (
            _dataset("dataset"),
            _argument("-c", dest="configurations", nargs="+", help="configurations"),
            _PLANS,
            _argument("-np", dest="processes", type=int, help=_PROCESSES),
            _argument("--again", nargs="+", metavar="CASE", help="cases to prepare again"),
            _OVERWRITE,
        ),
        _show_paths,
        _next_of_preparation,
    ),
    "phantom": Verb(
        "Write a generated data set (labelled, unlabelled, test) as nnU-Net raw data.",
        "nnunetv2_dycon.phantom:write_phantom",
        (
            _argument("-d", dest="dataset_id", required=True, type=int, help="dataset id"),
            _argument("-n", "--cases", type=int, help="number of cases: labelled, unlabelled and test"),
            _argument("--labeled", type=int, help="number of labelled cases"),
            _argument("--labeled_scanner", type=_number_or_word, help="their scanner, or all"),
            _argument("--test", type=int, help="number of test cases"),
            _argument("--seed", type=int, help="seed"),
            _argument("--channels", type=int, help="image channels"),
            _argument("--shape", nargs=3, type=int, help="voxels along each axis"),
            _argument("--hard", action="store_true", help="the harder task"),
            _argument("-np", dest="processes", type=int, help=_PROCESSES),
            _OVERWRITE,
        ),
        _show,
        lambda typed, result: f"nnUNetv2_dycon check -d {typed['dataset_id']}",
    ),
    "self_train": Verb(
        "Train with stock nnU-Net, pseudo-label the unlabelled images, train again: the reference at equal compute.",
        "nnunetv2_dycon.self_training.steps:self_train",
        (
            _dataset("dataset_id"),
            _argument("--as", dest="new_ids", nargs="+", type=int, required=True, help="free ids, one for each round"),
            _argument("-tr", dest="trainer", help="nnUNetTrainer, or nnUNetTrainerLabeledOnly with options"),
            _argument("-c", dest="configuration", help="configuration"),
            _argument("-f", dest="fold", type=_number_or_word, help="fold, or all"),
            _PLANS,
            _argument("--epochs", nargs="+", type=int, help="total of all trainings, or one number for each"),
            _argument(
                "--repeat",
                type=_number_or_word,
                help="how often a round lists each labelled case; half: half of all patches are labelled; 1: pooled",
            ),
            _argument("--keep_empty", action="store_true", help="train on empty pseudo-labels too"),
            _argument("-device", help="cuda, cpu or mps (default: cuda if there is a device)"),
            _argument("-np", dest="processes", type=int, help=_PROCESSES),
            _argument("--dry_run", action="store_true", help="only report the plan, write nothing"),
        ),
        lambda result: _show(result.folder),
        lambda typed, result: result.then,
    ),
    "export": Verb(
        "Write a model folder that predicts with stock nnU-Net, on a machine without this package.",
        "nnunetv2_dycon.export:export_model",
        (
            _dataset("dataset_id"),
            _argument("-tr", dest="trainer", required=True, help="trainer name, options included"),
            _argument("-c", dest="configuration", help="configuration"),
            _argument("-f", dest="folds", nargs="+", type=_number_or_word, help="folds, or all"),
            _PLANS,
            _argument("--weights", choices=("teacher", "student", "mean"), help="whose weights"),
            _argument("-chk", dest="checkpoint", help="checkpoint file"),
            _argument("-o", dest="output", required=True, help="folder to write"),
        ),
        _show,
        _next_of_export,
    ),
    "evaluate": Verb(
        "Score predictions: overlap, surface distances, volumes and lesions of every case.",
        "nnunetv2_dycon.evaluation.scores:evaluate",
        (
            _argument("truth_folder", metavar="GT", help="folder of the true label maps"),
            _argument("prediction_folder", metavar="PRED", help="folder of the predicted label maps"),
            _argument(
                "-djfile",
                dest="dataset_json",
                help="the data set's dataset.json (default: that in PRED, else next to GT)",
            ),
            _argument("-o", dest="output", help="folder for scores.csv, scores.json and summary.json (default: PRED)"),
            _argument("-np", dest="processes", type=int, help=_PROCESSES),
            _argument(
                "--convention",
                choices=("mm", "literature"),
                help="literature: voxel units and MedPy's definitions, as most papers",
            ),
            _argument("--tolerance", type=float, help="of NSD, in mm; in voxels with literature"),
            _argument("--lesions", action="store_true", help="count lesions that are found, missed and false"),
            _argument("--disable_distances", dest="distances", action="store_false", help="overlap and volumes only"),
            _argument("--chill", action="store_true", help="score the predictions that are there if GT has more cases"),
        ),
        _show_scores,
    ),
    "compare": Verb(
        "Compare runs on the test cases: table, statistics and pictures in one report.",
        "nnunetv2_dycon.evaluation.compare:compare",
        (
            _dataset("dataset_id"),
            _argument("-c", dest="configuration", help="configuration"),
            _argument("-f", dest="folds", nargs="+", type=_number_or_word, help="folds: labelled draws, or all"),
            _PLANS,
            _argument(
                "--runs",
                nargs="+",
                required=True,
                help="trainer names (* for anything), results folders, prediction folders, RUN=FOLDER for its own",
            ),
            _argument("--baseline", help="the run to compare with (default: the first)"),
            _argument("--upper", nargs="+", help="runs on more labels, usually all: the upper bound"),
            _argument("-o", dest="output", required=True, help="folder to write"),
            _argument("--weights", nargs="+", choices=("student", "teacher"), help="whose weights"),
            _argument("-chk", dest="checkpoint", help="checkpoint file"),
            _argument("--predict", action="store_true", help="predict test cases where predictions are missing"),
            _argument("--disable_tta", dest="mirroring", action="store_false", help="predictions without mirroring"),
            _argument("--save_probabilities", action="store_true", help="with --predict: for calibration"),
            _argument("-device", help="for --predict: cuda, cpu or mps (default: cuda if there is a device)"),
            _argument(
                "--published",
                nargs="?",
                const="auto",
                help="add published results: the data set's name in published_results.json, or nothing to find it",
            ),
            _argument("--truth", dest="truth_folder", help="true label maps of the test cases (default: labelsTs)"),
            _argument(
                "--convention",
                choices=("mm", "literature"),
                help="literature: voxel units and MedPy's definitions, as most papers",
            ),
            _argument("-np", dest="processes", type=int, help=_PROCESSES),
            _OVERWRITE,
        ),
        _show,
        _next_of_comparison,
    ),
    "rank": Verb(
        "Rank the unlabelled cases by how much their annotation would tell, and keep drafts of their labels.",
        "nnunetv2_dycon.annotation.rank:rank",
        (
            _dataset("dataset_id"),
            _TRAINER,
            _CONFIGURATION,
            _FOLD,
            _PLANS,
            _CHECKPOINT,
            _argument("--by", choices=("entropy", "disagreement", "expected_ml"), help="what comes first"),
            _argument("--diverse", action="store_true", help="choose first cases that differ from each other"),
            _argument("-n", dest="number", type=int, help="cases on contact sheets"),
            _argument("-o", dest="output", help="folder to write (default: rank in the fold's folder)"),
            _NO_MIRRORING,
            _DEVICE,
        ),
        _show,
        _next_of_ranking,
    ),
    "annotate": Verb(
        "Move annotated cases from imagesUn to imagesTr and labelsTr, in dataset.json and the split too.",
        "nnunetv2_dycon.annotation.annotate:annotate",
        (
            _dataset("dataset_id"),
            _argument("pairs", nargs="+", metavar="CASE LABEL", help="a case and its label map, and so on"),
        ),
        _show,
        _next_of_annotation,
    ),
    "plot dataset": Verb(
        "Count, size and scatter of the structures in the labelled cases, and their share of the images.",
        "nnunetv2_dycon.pictures.dataset:plot_dataset",
        (
            _dataset("dataset_id"),
            _argument("-o", dest="output", help="folder to write (default: DATASET_pictures)"),
            _argument("-np", dest="processes", type=int, help=_PROCESSES),
        ),
        _show_picture,
    ),
    "plot overlay": Verb(
        "True positive, false negative and false positive voxels of several methods, in slices and as surfaces.",
        "nnunetv2_dycon.pictures.overlay:plot_overlay",
        (
            _dataset("dataset_id"),
            _argument("cases", nargs="*", metavar="CASE", help="cases (default: those on which methods differ most)"),
            _argument(
                "--runs",
                nargs="+",
                required=True,
                help="trainer names (* for anything), results folders, prediction folders, RUN=FOLDER for its own",
            ),
            _CONFIGURATION,
            _FOLD,
            _PLANS,
            _CHECKPOINT,
            _argument("--weights", nargs="+", choices=("student", "teacher"), help="whose weights"),
            _argument("--predict", action="store_true", help="predict test cases where predictions are missing"),
            _NO_MIRRORING,
            _DEVICE,
            _argument("-n", dest="number", type=int, help="number of cases"),
            _argument("-o", dest="output", help="folder to write (default: DATASET_pictures)"),
        ),
        _show_picture,
    ),
    "plot uncertainty": Verb(
        "Entropy of teacher, student and both in whole images, and the error rate that goes with it.",
        "nnunetv2_dycon.pictures.uncertainty:plot_uncertainty",
        (
            _dataset("dataset_id"),
            _TRAINER,
            _argument("cases", nargs="*", metavar="CASE", help="cases (default: the first test cases)"),
            _CONFIGURATION,
            _FOLD,
            _PLANS,
            _CHECKPOINT,
            _argument("-n", dest="number", type=int, help="number of cases"),
            _argument("-o", dest="output", help="folder to write (default: pictures in the fold's folder)"),
            _NO_MIRRORING,
            _DEVICE,
        ),
        _show_picture,
    ),
    "plot gradcam": Verb(
        "What a layer looks at for each class, over the course of a training (option snapshots of the trainer).",
        "nnunetv2_dycon.pictures.gradcam:plot_gradcam",
        (
            _dataset("dataset_id"),
            _TRAINER,
            _argument("case", nargs="?", metavar="CASE", help="a case (default: the first test case)"),
            _CONFIGURATION,
            _FOLD,
            _PLANS,
            _argument("--checkpoints", nargs="+", help="checkpoint files (default: snapshots and the final one)"),
            _argument("--layer", help="a module (default: the last but one stage of the decoder)"),
            _argument("--labels", nargs="+", help="names of classes (default: the first four)"),
            _argument("--weights", choices=("student", "teacher"), help="whose weights"),
            _argument("-o", dest="output", help="folder to write (default: pictures in the fold's folder)"),
            _DEVICE,
        ),
        _show_picture,
    ),
    "plot landscape": Verb(
        "The losses around the student along two random directions, over the course of a training.",
        "nnunetv2_dycon.pictures.landscape:plot_landscape",
        (
            _dataset("dataset_id"),
            _TRAINER,
            _CONFIGURATION,
            _FOLD,
            _PLANS,
            _argument("--checkpoints", nargs="+", help="checkpoint files (default: snapshots and the final one)"),
            _argument("--size", type=int, help="points along each direction"),
            _argument("--radius", type=float, help="largest distance; 1 is the norm of the weights"),
            _argument("--batches", type=int, help="batches of patches"),
            _argument("--seed", type=int, help="of directions, patches and draws"),
            _argument("-o", dest="output", help="folder to write (default: pictures in the fold's folder)"),
            _DEVICE,
        ),
        _show_picture,
    ),
}
