"""Check that runs can be compared; find the baseline; give methods short names."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.evaluation.advice import short
from nnunetv2_dycon.evaluation.facts import FINAL, Facts
from nnunetv2_dycon.evaluation.runs import Run
from nnunetv2_dycon.files import first_few

_PREFIX = "nnUNetTrainer"


def check_alike(runs: Sequence[Run], cases: Collection[str], predicted: Mapping[str, Collection[str]]) -> None:
    """Raise DataError if the runs cannot be compared.

    Parameters
    ----------
    runs : sequence of Run
        All runs of the comparison.
    cases : collection of str
        The test cases.
    predicted : mapping of str to collection of str
        Cases of each folder of predictions, by path.

    Raises
    ------
    DataError
        If a run has other test cases; was trained on test cases or chose its checkpoint on them; if runs differ in
        labelled cases, plans, checkpoint or mirroring; if runs of one method differ in other options than the seed, or
        in nothing. An upper bound must have all labelled cases of the others and more, and the plans of one of them.
        Facts that are not recorded are not checked.
    """
    for run in runs:
        _check_cases(run, set(cases), set(predicted[str(run.predictions)]))
    others = [run for run in runs if not run.upper]
    _check_draws(others)
    _check_settings(runs)
    _check_repeats(runs)
    for run in runs:
        if run.upper:
            _check_upper(run, others)
    by_draw: dict[Any, Run] = {}
    for run in others:
        first = by_draw.setdefault(_draw(run.facts), run)
        if None not in (run.facts.plans, first.facts.plans) and run.facts.plans != first.facts.plans:
            raise DataError(
                f"{run.name} was trained with other plans ({run.facts.plans}) than {first.name} "
                f"({first.facts.plans}); train both with the same -p and -c, planned once"
            )
    for key, mend in (
        ("checkpoint", "compare the final checkpoints of all: -chk checkpoint_final.pth"),
        ("mirroring", "predict all with it, or all with --disable_tta"),
    ):
        known = {getattr(run.facts, key): run for run in runs if getattr(run.facts, key) is not None}
        if len(known) > 1:
            (one, a), (other, b) = list(known.items())[:2]
            raise DataError(f"runs differ in {key}: {one} in {a.name}, {other} in {b.name}; {mend}")


def _check_cases(run: Run, cases: set[str], predicted: set[str]) -> None:
    if predicted != cases:
        missing, extra = sorted(cases - predicted), sorted(predicted - cases)
        what = f"lacks {first_few(missing)}" if missing else f"has {first_few(extra)}, which has no truth"
        own = run.training is not None and run.training in run.predictions.parents
        mend = f"delete {run.predictions} and type --predict" if own else "predict the same cases with every run"
        raise DataError(f"{run.name} has other test cases: {run.predictions} {what}; {mend}")
    trained = cases & set(run.facts.labeled or ())
    if trained:
        raise DataError(f"{run.name} was trained on the test cases {first_few(sorted(trained))}; test on others")
    seen = cases & set(run.facts.unlabeled_cases or ())
    if seen:
        raise DataError(
            f"{run.name} was trained on images of the test cases {first_few(sorted(seen))}, as unlabelled ones; "
            "test on others"
        )
    chosen = cases & set(run.facts.validation or ())
    if chosen and run.facts.checkpoint != FINAL:
        raise DataError(
            f"{run.facts.checkpoint} of {run.name} was chosen on the test cases {first_few(sorted(chosen))}; "
            f"use -chk {FINAL}"
        )


def _draw(facts: Facts) -> Any:
    return facts.labeled if facts.labeled is not None else facts.labeled_count


def _check_draws(runs: Sequence[Run]) -> None:
    """Raise DataError unless all methods were trained on the same labelled draws, one or several."""
    draws: dict[str, dict[Any, Run]] = {}
    for run in runs:
        if _draw(run.facts) is not None:
            draws.setdefault(run.method, {}).setdefault(_draw(run.facts), run)
    methods = list(draws.items())
    for method, own in methods[1:]:
        first, others = methods[0]
        if own.keys() != others.keys():
            only = next(iter((own.keys() - others.keys()) or (others.keys() - own.keys())))
            run = own.get(only) or others[only]
            raise DataError(
                f"{run.name} (fold {run.facts.fold}) was trained on {_count(run.facts)} labelled cases that "
                f"{first if only in own else method} was not trained on; compare runs of the same labelled cases"
            )


def _check_settings(runs: Sequence[Run]) -> None:
    """Raise DataError if runs of one method differ in an option: its default may have changed between versions."""
    known: dict[tuple[str, str], tuple[Run, Any]] = {}
    for run in runs:
        for option, value in (run.facts.settings or {}).items():
            first, before = known.setdefault((run.method, option), (run, value))
            if option != "seed" and value != before:
                raise DataError(
                    f"{run.training or run.predictions} and {first.training or first.predictions} have one trainer "
                    f"name, but {option} is {value} and {before}: its default changed between "
                    "them; train one of them anew"
                )


def _check_repeats(runs: Sequence[Run]) -> None:
    """Raise DataError unless runs of one method differ in seed or labelled draw, and in nothing else."""
    known: dict[Any, Run] = {}
    images: dict[Any, Run] = {}
    for run in runs:
        facts = run.facts
        # a folder of predictions may record nothing; then its name must differ
        own = run.predictions.name if facts.trainer is None else (facts.seed, facts.fold, _draw(facts))
        first = known.setdefault((run.method, own), run)
        if first is not run:
            raise DataError(
                f"{run.training or run.predictions} and {first.training or first.predictions} would be two runs of "
                f"{run.method}, but neither seed nor labelled cases tell them apart; leave one out, or rename a folder "
                "of predictions"
            )
        if facts.unlabeled is not None:
            first = images.setdefault((run.method, _draw(facts)), run)
            if facts.unlabeled != first.facts.unlabeled:
                raise DataError(
                    f"{run.training or run.predictions} and {first.training or first.predictions} would be runs of "
                    f"{run.method}, but with {facts.unlabeled} and {first.facts.unlabeled} unlabelled images; compare "
                    "them in two reports"
                )


def _check_upper(upper: Run, others: Sequence[Run]) -> None:
    for run in others:
        ours, bound = run.facts.labeled, upper.facts.labeled
        if ours is not None and bound is not None and not set(ours) < set(bound):
            raise DataError(
                f"--upper {upper.name} was trained on {_count(upper.facts)} labelled cases, which are not those of "
                f"{run.name} and more; give a training on all labels of the same data"
            )
    plans = {run.facts.plans for run in others}
    if upper.facts.plans is not None and None not in plans and upper.facts.plans not in plans:
        raise DataError(
            f"--upper {upper.name} was trained with other plans ({upper.facts.plans}) than {others[0].name} "
            f"({others[0].facts.plans}); {_same_plans(others[0], upper)}"
        )


def _same_plans(run: Run, upper: Run) -> str:
    ours, theirs = (short(one.facts.dataset or "") for one in (run, upper))
    if ours == theirs or not (ours and theirs):
        return "train it anew with the same -p and -c"
    plans = run.training.parent.name.split("__")[1] if run.training else "nnUNetPlans"
    new = f"{plans}_of_{ours}"
    command = f"nnUNetv2_move_plans_between_datasets -s {ours} -t {theirs} -sp {plans} -tp {new}"
    return f"move those to its data set, then preprocess and train it anew with -p {new}: {command}"


def _count(facts: Facts) -> int | None:
    return len(facts.labeled) if facts.labeled is not None else facts.labeled_count


def find_baseline(text: str, runs: Sequence[Run]) -> str:
    """Return the method with the given name.

    Raises
    ------
    DataError
        If no run has this name, or several methods have it.
    """
    named = [run.method for run in runs if text in (run.name, run.facts.trainer, run.method)]
    if not named:
        named = [run.method for run in runs if run.method.split(" (")[0] == text]
    trainers = {method.split(" (")[0] for method in named}
    if len(trainers) != 1:
        names = ", ".join(dict.fromkeys(run.method.split(" (")[0] for run in runs))
        many = "names several methods" if trainers else "names none of the runs"
        raise DataError(f"--baseline {text} {many}; give one of {names}")
    return named[0]


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """Return a short name for each method: without nnU-Net's prefix and what all trainers share.

    A folder of predictions keeps its name.

    Examples
    --------
    >>> short_names(["nnUNetTrainer_epochs5", "nnUNetTrainerDyCON_epochs5", "of others"])
    {'nnUNetTrainer_epochs5': 'nnU-Net', 'nnUNetTrainerDyCON_epochs5': 'DyCON', 'of others': 'of others'}
    """
    parts = {method: _name_and_weights(method) for method in methods}
    options = [set(name.split("_")[1:]) for name, _ in parts.values() if name.startswith(_PREFIX)]
    shared = set.intersection(*options) if len(options) > 1 else set()
    of_weights = {weights for name, weights in parts.values() if name.startswith(_PREFIX)}
    names = {}
    for method, (name, weights) in parts.items():
        if name.startswith(_PREFIX):
            base, *own = name.removeprefix(_PREFIX).split("_")
            name = "_".join([base or "nnU-Net", *(option for option in own if option not in shared)])
        names[method] = name + (weights if len(of_weights) > 1 or not name else "")
    return names if len(set(names.values())) == len(methods) else {method: method for method in methods}


def _name_and_weights(method: str) -> tuple[str, str]:
    fit = re.fullmatch(r"(.*?)( \((?:student|teacher)\))?", method, re.DOTALL)
    return (fit[1], fit[2] or "") if fit else (method, "")
