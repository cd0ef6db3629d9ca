"""A configuration of experiments as data sets, trainings and the command of every stage.

Nothing here runs anything or imports nnU-Net: the Snakefile reads it in Snakemake's environment, which may be another
one than that of the trainings. docs/experiments.md says what the keys of a configuration mean.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.workflow.configuration import SCHEMA, ConfigurationError, check, filled, method_of, words_of

STEPS = Path(__file__).with_name("steps.py")
WEIGHTS = ("student", "teacher")
HIGHEST_ID = 999
_REDUCIBLE = tuple(SCHEMA["properties"]["reduce"]["properties"])


@dataclass(frozen=True)
class Dataset:
    """One labelled draw: a raw data set of its own.

    Attributes
    ----------
    name, id : str, int
        nnU-Net's name and id.
    labeled : str
        What --labeled is given: a number, a fraction or "all".
    draw : int or "published"
        Seed of the draw, or the list that was published with the collection.
    fold : str
        The fold that every method trains.
    writer : tuple of str
        The command that writes the raw data set.
    source : int, optional
        Id of the data set that is split.
    phantom : str, optional
        Arguments of the command that generates the source.
    planner : Dataset, optional
        The data set whose plans this one takes over; None where it is planned itself.
    """

    name: str
    id: int
    labeled: str
    draw: int | str
    fold: str
    writer: tuple[str, ...]
    source: int | None = None
    phantom: str | None = None
    planner: "Dataset | None" = None

    @property
    def folder(self) -> str:
        """Name of its folder in each of nnU-Net's three."""
        return f"Dataset{self.id:03d}_{self.name}"

    @property
    def key(self) -> str:
        """Name of its folder in the output; another draw or number under the same id has another."""
        return f"{self.folder}_labeled{self.labeled}_draw{self.draw}"


@dataclass(frozen=True)
class Run:
    """One training: a method on a labelled draw with a seed.

    Attributes
    ----------
    key : str
        Trainer name with all options, or method and seed where a command of the user trains.
    training : str
        Folder of the fold, below nnUNet_results.
    command : tuple of str
        What trains, where it is not nnU-Net's training; else empty.
    new : int, optional
        Id of the first data set that the command makes.
    """

    dataset: Dataset
    method: str
    seed: int
    key: str
    training: str
    weights: tuple[str, ...]
    command: tuple[str, ...] = ()
    new: int | None = None


@dataclass(frozen=True)
class Report:
    """A comparison of all methods on all draws of one labelled number; its first run is one of the baseline.

    `weights` are those that all of its methods have; `upper` the baseline's runs on all labels, where there are any.
    """

    key: str
    runs: tuple[Run, ...]
    weights: tuple[str, ...]
    upper: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Experiments:
    """All that a configuration asks for.

    Attributes
    ----------
    settings : mapping
        The configuration with its defaults.
    datasets : dict of str to Dataset
        By key.
    runs : dict of (str, str) to Run
        By the key of the data set and of the run.
    reports : dict of str to Report
        By key.
    """

    settings: Mapping[str, Any]
    datasets: dict[str, Dataset]
    runs: dict[tuple[str, str], Run]
    reports: dict[str, Report] = field(default_factory=dict)

    @property
    def configuration(self) -> str:
        """The configuration that is trained; a reduced one is named after what it was reduced to."""
        reduced = self.settings["reduce"]
        parts = [f"{key}{_joined(reduced[key])}" for key in _REDUCIBLE if key in reduced]
        return "_".join([self.settings["configuration"], *parts])

    @property
    def scored(self) -> list[tuple[Run, str]]:
        """Every run with each choice of weights."""
        return [(run, weights) for run in self.runs.values() for weights in run.weights]

    # ---- commands ------------------------------------------------------------------------------------------

    def generate(self, dataset: Dataset) -> str:
        """Command that generates the source of a data set."""
        words = ["nnUNetv2_dycon", "phantom", "-d", str(dataset.source), *shlex.split(dataset.phantom or "")]
        return shlex.join([*words, "--overwrite"])  # it replaces phantoms alone; a killed run leaves half of one

    def write(self, dataset: Dataset) -> str:
        """Command that writes a raw data set, unless it is there with the same draw."""
        here = ["--folder", dataset.folder, "--labeled", dataset.labeled, "--draw", str(dataset.draw)]
        return _step("raw", *here, "--", *dataset.writer)

    def plan(self, dataset: Dataset) -> str:
        """Commands that plan a data set, or plan it and put the shared plans in place of its own.

        Also where plans are taken over, nnU-Net's planning runs: it copies splits_final.json and dataset.json.
        """
        settings, number = self.settings, str(dataset.id)
        commands = [
            shlex.join(["nnUNetv2_extract_fingerprint", "-d", number, "-np", str(settings["processes"])]),
            shlex.join(["nnUNetv2_plan_experiment", "-d", number, *shlex.split(str(settings["planner"]))]),
        ]
        plans = settings["plans"]
        if dataset.planner is not None:
            move = ["-s", str(dataset.planner.id), "-t", number, "-sp", plans]
            commands.append(shlex.join(["nnUNetv2_move_plans_between_datasets", *move]))
        elif settings["reduce"]:
            here = ["--folder", dataset.folder, "-p", plans, "-c", settings["configuration"]]
            here += ["--name", self.configuration, "--reduce", json.dumps(settings["reduce"])]
            commands.append(_step("reduce", *here))
        return " && ".join(commands)

    def preprocess(self, dataset: Dataset) -> str:
        """Command that preprocesses the labelled cases; a reduced configuration has the data of its parent."""
        words = ["-d", str(dataset.id), "-plans_name", self.settings["plans"], "-c", self.settings["configuration"]]
        return shlex.join(["nnUNetv2_preprocess", *words, "-np", str(self.settings["processes"])])

    def preprocess_unlabeled(self, dataset: Dataset) -> str:
        """Command that preprocesses the unlabelled images."""
        words = ["-d", str(dataset.id), "-c", self.configuration, "-p", self.settings["plans"]]
        return shlex.join(["nnUNetv2_dycon", "preprocess_unlabeled", *words, "-np", str(self.settings["processes"])])

    def train(self, run: Run, lock: str) -> str:
        """Command that trains, or goes on with a training, or sees that it is finished."""
        options = ["--training", run.training, "--lock", lock, "-device", self.settings["device"]]
        options += ["--threads", str(self.settings["threads"]), "--loaders", str(self.settings["loaders"])]
        command = ["--", *run.command] if run.command else []
        return _step("train", *options, *command)

    def predict(self, run: Run, weights: str) -> str:
        """Command that predicts the test cases with the weights of student or teacher."""
        words = ["--training", run.training, "--images", f"{run.dataset.folder}/imagesTs", "--weights", weights]
        return _step("predict", *words, "-device", self.settings["device"], *self._mirroring)

    def evaluate(self, run: Run, weights: str, output: str) -> str:
        """Command that scores the predictions of the test cases."""
        raw, predictions = run.dataset.folder, f"{run.training}/test/{self.predictions(weights)}"
        truth = _below("nnUNet_raw", f"{raw}/labelsTs")
        options = f"-djfile {_below('nnUNet_raw', f'{raw}/dataset.json')} -o {shlex.quote(output)}"
        where = f"{truth} {_below('nnUNet_results', predictions)} {options}"
        return f"nnUNetv2_dycon evaluate {where} -np {self.settings['processes']}"

    def compare(self, report: Report, output: str) -> str:
        """Command that writes the report."""
        runs, upper = (
            " ".join(_below("nnUNet_results", one.training) for one in own) for own in (report.runs, report.upper)
        )
        words = ["-d", str(report.runs[0].dataset.id), "-c", self.configuration, "-p", self.settings["plans"]]
        words += ["--weights", *report.weights, *self._mirroring]
        words += ["-np", str(self.settings["processes"]), "-o", output]
        return f"nnUNetv2_dycon compare {shlex.join(words)} --runs {runs}" + (f" --upper {upper}" if upper else "")

    def predictions(self, weights: str) -> str:
        """Return the name of the folder of predictions below `test/` of a training."""
        return f"checkpoint_final_{weights}{'' if self.settings['mirroring'] else '_nomirror'}"

    @property
    def _mirroring(self) -> list[str]:
        return [] if self.settings["mirroring"] else ["--disable_tta"]

    # ---- what is done --------------------------------------------------------------------------------------

    def forget_deleted(self, done: Path) -> list[Path]:
        """Remove notes of stages whose result is no longer on disk, and return them.

        Parameters
        ----------
        done : Path
            Folder of the notes.
        """
        raw, preprocessed, results = (
            Path(os.environ.get(name, "")) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        )
        places = {}
        for dataset in self.datasets.values():
            here = preprocessed / dataset.folder
            if dataset.phantom is not None:
                source = f"Dataset{dataset.source:03d}_{dataset.name}"
                places[done / f"source{dataset.source}"] = raw / source / "dataset.json"
            places[done / dataset.key / "raw"] = raw / dataset.folder / "dataset.json"
            places[done / dataset.key / "plan"] = here / f"{self.settings['plans']}.json"
            places[done / dataset.key / "preprocess"] = here / "gt_segmentations"
        for run in self.runs.values():
            training = results / run.training
            places[done / run.dataset.key / f"{run.key}.train"] = training / "checkpoint_final.pth"
            for weights in run.weights:
                places[done / run.dataset.key / f"{run.key}.{weights}"] = training / "test" / self.predictions(weights)
        gone = [note for note, result in places.items() if note.exists() and not result.exists()]
        for note in gone:
            note.unlink()
        return gone


def read(config: Mapping[str, Any]) -> Experiments:
    """Expand a configuration into data sets x methods x labelled numbers x labelled draws x seeds.

    Parameters
    ----------
    config : mapping
        Content of the YAML file.

    Raises
    ------
    ConfigurationError
        If a key is unknown or missing, or a value cannot be used.
    """
    check(config)
    settings = {key: one["default"] for key, one in SCHEMA["properties"].items() if "default" in one} | dict(config)
    settings["reduce"] = settings["reduce"] or {}
    words_of(settings["planner"], "planner")
    datasets = [one for name, entry in config["datasets"].items() for one in _datasets(name, entry)]
    _check_ids(datasets)
    found = Experiments(settings, {dataset.key: dataset for dataset in datasets}, {})
    methods = {name: method_of(name, entry, settings) for name, entry in config["methods"].items()}
    for dataset in datasets:
        for name, method in methods.items():
            if dataset.labeled in (method["labeled"] or {dataset.labeled} - {"all"}):
                for seed in method["seeds"]:
                    _add(found.runs, _run(found, dataset, name, method, seed))
    _check_used(methods, datasets)
    _check_new(found)
    found.reports.update(_reports(found, settings.get("baseline"), methods))
    return found


# ---- parts of a configuration ------------------------------------------------------------------------------------


def _datasets(name: str, entry: Any) -> list[Dataset]:
    where = f"datasets: {name}"
    if ("split" in entry) == ("convert" in entry):
        raise ConfigurationError(f"{where}: give split: ID, or convert: [COLLECTION, FOLDER], and not both")
    if "phantom" in entry and "split" not in entry:
        raise ConfigurationError(f"{where}: phantom generates the data set that split: ID names; add split")
    words_of(entry.get("phantom", ""), f"{where}: phantom")
    bases, draws = entry["labeled"], entry.get("draws", [0])
    listed = "convert" in entry or "--protocol" in str(entry.get("options", ""))
    if "published" in draws and not listed:
        raise ConfigurationError(f"{where}: draws is {draws!r}; give seeds: only convert and --protocol have a list")
    found: list[Dataset] = []
    for at, draw in enumerate(draws):
        planner: Dataset | None = None
        for labeled, base in sorted(bases.items(), key=lambda pair: _size(pair[0])):
            if labeled == "all" and at:
                continue  # all labels are the same in every draw
            number = base + at
            one = Dataset(
                name=name,
                id=number,
                labeled=str(labeled),
                draw=draw,
                fold=str(entry.get("fold", "all")),
                writer=_writer(name, entry, number, str(labeled), draw),
                source=entry.get("split"),
                phantom=str(entry["phantom"]) if "phantom" in entry else None,
                planner=planner,
            )
            planner = planner or one
            found.append(one)
    return found


def _size(labeled: float | str) -> tuple[int, float]:
    """Order of labelled numbers: fractions and numbers are not mixed, since which is more needs the number of cases."""
    return (2, 0) if isinstance(labeled, str) else (int(labeled >= 1), labeled)


def _writer(name: str, entry: Mapping[str, Any], number: int, labeled: str, draw: int | str) -> tuple[str, ...]:
    options = words_of(entry.get("options", ""), f"datasets: {name}: options")
    if "split" in entry:
        words = ["split", "-d", str(entry["split"]), "--as", str(number)]
    else:
        words = ["convert", *map(str, entry["convert"]), "-d", str(number)]
    seed = [] if draw == "published" or labeled == "all" else ["--labeled_seed", str(draw)]
    return ("nnUNetv2_dycon", *words, "--labeled", labeled, *seed, *options)


def _run(found: Experiments, dataset: Dataset, name: str, method: Mapping[str, Any], seed: int) -> Run:
    plans, configuration, new = found.settings["plans"], found.configuration, None
    command: tuple[str, ...] = ()
    if "trainer" in method:
        key = "_".join(filter(None, [method["trainer"], str(method["options"]), f"seed{seed}"]))
        training = f"{dataset.folder}/{key}__{plans}__{configuration}/fold_{dataset.fold}"
    else:
        key = re.sub(r"[^\w-]+", "-", f"{name}_seed{seed}")
        known = {"id": dataset.id, "name": dataset.name, "fold": dataset.fold, "seed": seed, "plans": plans}
        known |= {"configuration": configuration, "options": method["options"], "device": found.settings["device"]}
        if seed in method["ids"]:
            first = min(one.id for one in found.datasets.values())
            known["new"] = new = method["ids"][seed] + dataset.id - first
        where = f"methods: {name}: command"
        command = tuple(filled(word, known, where) for word in words_of(method["command"], where))
        training = filled(str(method["training"]), known, f"methods: {name}: training")
    return Run(dataset, name, seed, key, training, tuple(method["weights"]), command, new)


def _reports(found: Experiments, baseline: Any, methods: Mapping[str, Any]) -> dict[str, Report]:
    if baseline is not None and baseline not in methods:
        raise ConfigurationError(f"baseline is {baseline!r}, which is not a method; give one of {', '.join(methods)}")
    groups: dict[str, list[Run]] = {}
    for run in found.runs.values():
        if not methods[run.method].get("report", True):
            continue
        groups.setdefault(f"{run.dataset.name}_labeled{run.dataset.labeled}", []).append(run)
    reports = {}
    for key, runs in groups.items():
        if len({run.method for run in runs}) > 1:
            weights = tuple(name for name in WEIGHTS if all(name in run.weights for run in runs))
            if not weights:
                raise ConfigurationError(f"the methods of {key} share no weights; give all of them student or teacher")
            runs.sort(key=lambda run: run.method != baseline)  # stable: others stay as written
            first = runs[0]
            upper = [
                one
                for one in found.runs.values()
                if one.dataset.labeled == "all" != first.dataset.labeled
                and (one.dataset.name, one.method) == (first.dataset.name, first.method)
            ]
            reports[key] = Report(key, tuple(runs), weights, tuple(upper))
    return reports


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_ids(datasets: Sequence[Dataset]) -> None:
    owner: dict[int, str] = {number: "split" for one in datasets if (number := one.source) is not None}
    for dataset in datasets:
        if not 1 <= dataset.id <= HIGHEST_ID:
            raise ConfigurationError(f"{dataset.key} would have the id {dataset.id}; give 1 to {HIGHEST_ID}")
        if dataset.id in owner:
            raise ConfigurationError(
                f"id {dataset.id} is used twice, by {owner[dataset.id]} and {dataset.key}; leave more room"
            )
        owner[dataset.id] = dataset.key


def _check_new(found: Experiments) -> None:
    owner = {dataset.id: dataset.key for dataset in found.datasets.values()}
    owner |= {dataset.source: "split" for dataset in found.datasets.values() if dataset.source is not None}
    for run in found.runs.values():
        if run.new in owner:
            raise ConfigurationError(
                f"methods: {run.method}: ids: {run.dataset.key} with seed {run.seed} would make id {run.new}, which is "
                f"of {owner[run.new]}; give each seed an id with room for every data set above it"
            )
        if run.new is not None:
            owner[run.new] = f"{run.method}, {run.dataset.key}, seed {run.seed}"


def _check_used(methods: Mapping[str, Any], datasets: Sequence[Dataset]) -> None:
    known = {dataset.labeled for dataset in datasets}
    for name, method in methods.items():
        unknown = sorted((method["labeled"] or set()) - known)
        if unknown:
            raise ConfigurationError(
                f"methods: {name}: labeled has {unknown[0]}, which no data set has ({', '.join(sorted(known))})"
            )


def _add(runs: dict[tuple[str, str], Run], run: Run) -> None:
    other = runs.setdefault((run.dataset.key, run.key), run)
    if other is not run:
        raise ConfigurationError(
            f"methods: {other.method} and {run.method} are the same training {run.key}; remove one"
        )


def _joined(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _below(variable: str, path: str) -> str:
    """Return a path below one of nnU-Net's folders as a word of a shell command; only the variable is expanded."""
    return f'"${variable}"/{shlex.quote(path)}'


def _step(name: str, *arguments: str) -> str:
    return shlex.join(["python", str(STEPS), name, *arguments])
