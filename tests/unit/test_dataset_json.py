"""A dataset.json, plans or records of a wrong shape are one line wherever they are read, and nothing is written."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_dycon.conversion.check import check
from nnunetv2_dycon.conversion.split import split
from nnunetv2_dycon.data.dataset_json import channel_names, check_dataset_json, numbers_of
from nnunetv2_dycon.data.manifest import unlabeled_status
from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.errors import DataError, UserError
from nnunetv2_dycon.self_training.experiment import read_experiment
from tests.datasets import environment, make_dataset, plan_and_preprocess

GOOD: dict[str, Any] = {
    "labels": {"background": 0, "a": [1, 2], "b": 2},
    "channel_names": {"0": "MRI"},
    "file_ending": ".nii.gz",
    "numTraining": 3,
    "regions_class_order": [1, 2],
    "overwrite_image_reader_writer": "SimpleITKIO",
    "dataset": {"x": {"images": ["imagesTr/l_00_0000.nii.gz"], "label": "labelsTr/l_00.nii.gz"}},
}
VALUES = (
    *(None, [], {}, "x", 3, 3.5, True, -1, "", "../x", [1], ["a"], [[1]], [True]),
    *({"a": None}, {"a": []}, {"a": 1}, {"a": "b"}, {"a": 1.5}, {"a": True}, {"a": [1, None]}, {"0": {"a": 1}}),
    *({"x": {"images": "y", "label": "z"}}, {"x": {"images": [], "label": "z"}}, {"x": {"images": ["y"]}}),
)
FITTING: dict[str, list[Any]] = {
    "labels": [{"a": 1}],
    "channel_names": [{"a": "b"}],
    "regions_class_order": [[], [1]],
    "overwrite_image_reader_writer": ["x", "", "../x"],
    "dataset": [{}],
}


@pytest.mark.parametrize("key", [key for key in GOOD if key != "numTraining"])
def test_a_value_of_another_form_is_refused_with_the_right_one(key: str) -> None:
    for value in VALUES:
        content = {**GOOD, key: value}
        if json.dumps(value) in map(json.dumps, FITTING.get(key, [])):
            check_dataset_json(content)
            continue
        with pytest.raises(DataError, match=f'^here: "{key}" is .*; write ') as caught:
            check_dataset_json(content, "here")
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", GOOD)
def test_only_entries_that_are_needed_must_be_there(key: str) -> None:
    content = {name: value for name, value in GOOD.items() if name != key}
    if key in ("labels", "channel_names", "file_ending"):
        with pytest.raises(DataError, match=f'has no "{key}"; add '):
            check_dataset_json(content)
    else:
        check_dataset_json(content)


@pytest.mark.parametrize("content", [[], "x", 3, None, [GOOD]])
def test_a_file_that_holds_no_object_is_refused(content: Any) -> None:
    with pytest.raises(DataError, match=r"^dataset\.json must be \{"):
        check_dataset_json(content)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".TIF", ".png"])
def test_endings_in_use_pass(ending: str) -> None:
    check_dataset_json({**GOOD, "file_ending": ending})


@pytest.mark.parametrize("ending", ["nii.gz", ".", "..", "./x.nii", ".nii/../../x", "/.nii", ".nii gz", "\\.nii"])
def test_an_ending_that_could_lead_elsewhere_is_refused(ending: str) -> None:
    with pytest.raises(DataError, match='"file_ending" is '):
        check_dataset_json({**GOOD, "file_ending": ending})


def test_the_words_of_the_first_nnunet_are_understood_or_explained() -> None:
    old = {key: value for key, value in GOOD.items() if key != "channel_names"} | {"modality": {"0": "CT"}}
    check_dataset_json(old)
    assert channel_names(old) == {"0": "CT"}
    assert channel_names({**old, "channel_names": {"0": "MRI"}}) == {"0": "MRI"}
    with pytest.raises(DataError, match="run nnUNetv2_convert_old_nnUNet_dataset"):
        check_dataset_json({**GOOD, "labels": {"0": "background", "1": "a"}})


def test_a_label_is_a_number_a_text_of_one_or_a_region() -> None:
    assert [numbers_of(label) for label in (2, "2", [1, "2"])] == [{2}, {2}, {1, 2}]


# ---- by whom they are read ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    make_dataset(root, dataset_id=4, labeled=3, unlabeled=1, test=1, shape=(16, 16, 16))
    plan_and_preprocess(4, root=root)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


READERS: dict[str, Callable[[], Any]] = {
    "check": lambda: check(4, processes=1),
    "split": lambda: split(4, 604, 1, processes=1),
    "preparation": lambda: preprocess_unlabeled(4, processes=1),
    "status": lambda: unlabeled_status(4),
    "self-training": lambda: read_experiment(4, "3d_fullres", 0, "nnUNetPlans", 1, False, "cpu", 1),
}


def message(read: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_a_wrong_dataset_json_says_so_and_writes_nothing(root: Path, reader: str) -> None:
    paths = [root / folder / "Dataset004_Tiny/dataset.json" for folder in ("nnUNet_raw", "nnUNet_preprocessed")]
    good = json.loads(paths[0].read_text())
    before = sorted(root.rglob("*"))
    wrong = [{**good, key: [[1]]} for key in GOOD if key != "numTraining"]
    wrong += [{key: value for key, value in good.items() if key != lacking} for lacking in ("labels", "file_ending")]
    for content in (*wrong, [], None):
        for path in paths:
            path.write_text(json.dumps(content))
        assert "dataset.json" in message(READERS[reader])
    assert [path for path in sorted(root.rglob("*")) if not path.name.endswith(".lock")] == before


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a nest of objects and lists."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    new = copy.deepcopy(content)
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return new


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans")
@pytest.mark.parametrize("value", [..., None, [], {}, "x", 3, [1]], ids=str)
def test_plans_that_cannot_be_used_are_one_line_with_the_command_that_makes_them(root: Path, value: Any) -> None:
    path = root / "nnUNet_preprocessed/Dataset004_Tiny/nnUNetPlans.json"
    plans = json.loads(path.read_text())
    of_configuration = [("configurations", "3d_fullres", key) for key in plans["configurations"]["3d_fullres"]]
    for place in (*((key,) for key in plans), ("configurations", "3d_fullres"), *of_configuration):
        path.write_text(json.dumps(changed(plans, place, value)))
        try:
            unlabeled_status(4)
        except UserError as error:
            assert "plan" in str(error).lower()  # noqa: PT017 - what does not matter may be of any form
            assert "\n" not in str(error)  # noqa: PT017
    for content in ([], {}, None):
        path.write_text(json.dumps(content))
        assert message(lambda: unlabeled_status(4)).endswith("type: nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres")


@pytest.mark.parametrize("value", [None, [], {}, "x", 3, [[1]], {"a": 1}], ids=str)
def test_a_manifest_of_any_form_is_read_or_everything_is_prepared_again(root: Path, value: Any) -> None:
    preprocess_unlabeled(4, processes=1)
    path = root / "nnUNet_preprocessed/Dataset004_Tiny/nnUNetPlans_3d_fullres_unlabeled.json"
    manifest = json.loads(path.read_text())
    for place in places(manifest):
        path.write_text(json.dumps(changed(manifest, place, value)))
        assert unlabeled_status(4).state in ("ok", "missing", "stale")


@pytest.mark.parametrize("value", [None, [], {}, "x", 3, [[1]], {"a": 1}], ids=str)
def test_a_conversion_json_of_any_form_is_read_or_the_data_set_is_left_alone(root: Path, value: Any) -> None:
    folder = split(4, 604, 1, processes=1).folder
    path = folder / "conversion.json"
    conversion = json.loads(path.read_text())
    files = sorted(folder.rglob("*"))
    for place in places(conversion):
        if place[0] in ("protocol", "request", "notes") or (place[0] == "cases" and place[1:2] not in ((), ("l_00",))):
            continue  # one case stands for all
        path.write_text(json.dumps(changed(conversion, place, value)))
        for read in (
            lambda: check(604, processes=1),
            lambda: split(4, 604, 2, processes=1, dry_run=True),
            lambda: split(4, 604, 2, processes=1, dry_run=True, overwrite=True),
        ):
            try:
                read()
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017 - any of them may be fine
    assert sorted(folder.rglob("*")) == files
