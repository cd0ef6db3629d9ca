"""A raw data set made from another one by links: some training cases keep their labels, the others lose them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2_dycon import __version__
from nnunetv2_dycon.conversion import dataset
from nnunetv2_dycon.conversion.assign import Known, Request, assign, draw, labeled_number, parse_labeled
from nnunetv2_dycon.conversion.cases import link_case
from nnunetv2_dycon.conversion.convert import plan_of, role_notes, role_rows, training_cases
from nnunetv2_dycon.conversion.groups import read_groups
from nnunetv2_dycon.conversion.job import Conversion, Job, carry_out
from nnunetv2_dycon.conversion.protocols import Protocol, find_protocol
from nnunetv2_dycon.conversion.raw import find_raw
from nnunetv2_dycon.data.datasets import dataset_title
from nnunetv2_dycon.data.roles import Roles, label_paths, read_roles
from nnunetv2_dycon.errors import ConfigError, DataError, SplitError
from nnunetv2_dycon.files import write_json

TEST_SEED = 12345  # test cases are the same for every draw of labelled ones


@dataclass(frozen=True)
class _Data:
    """The data set to split."""

    folder: Path
    json: Mapping[str, Any]
    roles: Roles
    labels: Mapping[str, Path]

    @property
    def ending(self) -> str:
        """File ending of images and labels."""
        return self.json["file_ending"]


def split(
    dataset_id: int | str,
    new_id: int,
    labeled: str | float | Path,
    *,
    labeled_seed: int | None = None,
    test: str | float | None = None,
    groups: str | Path | None = None,
    protocol: str | Path | None = None,
    processes: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write a raw data set with the files of another one, by links, in new roles.

    Labels of cases that become unlabelled are not linked, and no image or label is opened. Cases in imagesUn stay
    unlabelled, and those in imagesTs stay test cases unless `test` draws others.

    Parameters
    ----------
    dataset_id : int or str
        The data set, by id or name.
    new_id : int
        Id of the new one, which gets the same name.
    labeled : str, float or Path
        Fraction or number of the training cases, 'all', or a file that names them.
    labeled_seed : int, optional
        Seed of the draw; 0 by default, unless a protocol lists the labelled cases.
    test : str or float, optional
        Fraction or number of training cases to draw as test cases; the same ones for every `labeled_seed`.
    groups : path, optional
        JSON ``{case: subject}`` or a table with columns "case" and "subject": scans of one subject stay on one side of
        training (labelled or not), validation and test.
    protocol : path, optional
        JSON file with "labeled", "train", "val", "test", in place of draws.
    processes, dry_run, overwrite
        See `nnunetv2_dycon.conversion.convert.convert`.

    Raises
    ------
    ConfigError, DataError, SplitError
        One line with the problem, its place and its remedy.
    """
    data = _read(dataset_id)
    subjects = _subjects(Path(groups), data) if groups is not None else {}
    chosen = _protocol(data, test, subjects, protocol)
    request = Request(parse_labeled(labeled), 0 if labeled_seed is None and protocol is None else labeled_seed)
    training = {case: data.labels[case].is_file() for case in data.roles.labeled}
    roles = assign(chosen, request, Known(with_label=training, groups=subjects), partial(_case_name, data.ending))
    role_of = {**roles.role_of, **dict.fromkeys(data.roles.unlabeled, "unlabeled")}
    kept_tests = not roles.protocol.test
    if kept_tests:
        role_of |= dict.fromkeys(data.roles.test, "test")
    _check_subjects(role_of, subjects)
    folder = dataset.new_folder(new_id, dataset_title(data.folder.name), "--as")
    work = dataset.workspace(folder).work
    tasks = [
        link_case(case, role, data.roles.files[case], data.labels.get(case), data.ending, work)
        for case, role in sorted(role_of.items())
    ]
    counts = {role: sum(r == role for r in role_of.values()) for role in dataset.IMAGES}
    rows = tuple(
        (word, max(named, counts[role]), counts[role])
        for (word, named, _), role in zip(role_rows(roles), dataset.IMAGES, strict=True)
    )
    job = Job(
        folder=folder,
        tasks=tasks,
        plan={
            "converter": "split",
            "request": {
                "labeled": Path(str(labeled)).name,
                "labeled_seed": request.seed,
                "test": test,
                "groups": bool(groups),
            },
            **plan_of(tasks, roles, data.folder),
        },
        folds=roles.folds,
        describe=partial(_write_dataset_json, data, dataset_title(folder.name), training_cases(tasks)),
        title=f"{data.folder.name} as {folder.name}, --labeled {Path(str(labeled)).name}",
        rows=rows,
        notes=(*role_notes(roles), *_left_out(data, kept_tests)),
        dated=True,
    )
    return carry_out(job, processes=processes, dry_run=dry_run, overwrite=overwrite)


def _read(dataset_id: int | str) -> _Data:
    folder, content = find_raw(dataset_id)
    roles = read_roles(folder, content)
    if not roles.labeled:
        raise DataError(f"{folder} has no training cases; put them into imagesTr and labelsTr")
    return _Data(folder, content, roles, label_paths(folder, content, roles))


def _case_name(ending: str, text: str) -> str:
    return text.strip().removesuffix(ending)


def _protocol(
    data: _Data, test: str | float | None, subjects: Mapping[str, str], protocol: str | Path | None
) -> Protocol:
    name = f"split of {data.folder.name}"
    if protocol is not None:
        if test is not None:
            raise ConfigError("--test and --protocol: a protocol names its own test cases; leave --test out")
        return find_protocol(protocol, (), partial(_case_name, data.ending))
    tests = () if test is None else _drawn_tests(data, test, subjects)
    train = tuple(case for case in data.roles.labeled if case not in set(tests))
    return Protocol(name, data.folder.name, "", train, (), tests, {})


def _drawn_tests(data: _Data, test: str | float, subjects: Mapping[str, str]) -> tuple[str, ...]:
    number = parse_labeled(test, "--test")
    cases = data.roles.labeled
    if not isinstance(number, float | int):
        raise ConfigError(f"--test {test}: give a fraction (0.2) or a number of cases")
    count = labeled_number(number, len(cases), "--test")
    if count == len(cases):
        least = "one annotated case is" if count == 1 else f"type --test 1 to {count - 1}: {count} annotated cases are"
        raise ConfigError(f"--test {test} leaves no case to train on; {least} there")
    # scans in imagesUn stay training cases
    trained = {subjects[case] for case in data.roles.unlabeled if case in subjects}
    free = [case for case in cases if subjects.get(case) not in trained]
    tests = draw(cases, TEST_SEED, subjects, count, among=free)
    if not tests:
        raise SplitError(
            f"--test {test}: no subject without a scan in imagesUn has {count} annotated scans or fewer; type a larger "
            f"number, or move the other scans of some subjects out of {data.folder / 'imagesUn'}"
        )
    return tests


def _subjects(path: Path, data: _Data) -> dict[str, str]:
    groups = read_groups(path, partial(_case_name, data.ending), data.roles.labeled)
    known = {*data.roles.labeled, *data.roles.unlabeled, *data.roles.test}
    return {case: subject for case, subject in groups.items() if case in known}


def _check_subjects(role_of: Mapping[str, str], subjects: Mapping[str, str]) -> None:
    """Refuse a subject with scans in two of training (labelled or not), validation and test."""
    sides = {role: "training" if role in ("labeled", "unlabeled") else role for role in dataset.IMAGES}
    seen: dict[str, str] = {}
    for case, role in sorted(role_of.items()):
        if case not in subjects:
            continue
        other = seen.setdefault(subjects[case], case)
        if sides[role_of[other]] != sides[role]:
            raise SplitError(
                f"subject {subjects[case]!r} has {other!r} as {role_of[other]} and {case!r} as {role}; name its scans "
                "in one list (--protocol FILE), or move one of them out of the data set"
            )


def _write_dataset_json(data: _Data, name: str, number: int, folder: Path) -> None:
    content = {key: value for key, value in data.json.items() if key != "dataset"}
    content |= {"name": name, "numTraining": number, "converted_by": f"nnunetv2_dycon {__version__}"}
    write_json(folder / "dataset.json", content, elsewhere=dataset.ELSEWHERE)


def _left_out(data: _Data, kept_tests: bool) -> list[str]:
    if kept_tests or not data.roles.test:
        return []
    return [f"the {len(data.roles.test)} cases of {data.folder / 'imagesTs'} are left out: other test cases were named"]
