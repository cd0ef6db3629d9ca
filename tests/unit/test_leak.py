"""No label of an unlabelled, validation or test case takes part in training (T1, T7)."""

import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled
from nnunetv2_dycon.errors import ConfigError, SplitError
from nnunetv2_dycon.networks import unwrap
from tests.datasets import environment, make_dataset, plan_and_preprocess, write_image, write_splits
from tests.recipes import all_learned
from tests.training import begin, make_trainer, same, seed_all

METHODS = (
    "nnUNetTrainerLabeledOnly_seed1",  # without a seed the control shares stock's random stream with validation
    "nnUNetTrainerMeanTeacher",
    "nnUNetTrainerDyCON",
    "nnUNetTrainerDyCON_onall",
    "nnUNetTrainerDyCONBCP",
    "nnUNetTrainerPseudoLabel",
    "nnUNetTrainerUAMT",
    "nnUNetTrainerBCP",
    "nnUNetTrainerCPS",
    "nnUNetTrainerDyCONCPS",
    "nnUNetTrainerMagicNet",
    "nnUNetTrainerDyCONGAMagicNet",
    "nnUNetTrainerDHC",
)
HIDDEN = ("l_03", "l_04")
VALIDATION = ("l_02",)

opened: list[str] | None = None


def _note_opened_files(event: str, arguments: tuple) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])


sys.addaudithook(_note_opened_files)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twice the same data set, in benchmark mode; in the second every label that may not be used is noise or gone."""
    root = tmp_path_factory.mktemp("leak") / "one"
    names = make_dataset(root, labeled=5, unlabeled=1)
    write_splits(root, names.dataset, train=names.labeled[:2], val=VALIDATION, unlabeled=HIDDEN)
    plan_and_preprocess(root=root)
    other = root.with_name("other")
    shutil.copytree(root, other)
    raw, pre = other / "nnUNet_raw" / names.dataset, other / "nnUNet_preprocessed" / names.dataset
    rng = np.random.default_rng(0)
    data = pre / "nnUNetPlans_3d_fullres"
    for case in (*VALIDATION, *HIDDEN):
        noise_preprocessed(data, case, rng)
        write_image(raw / "labelsTr" / f"{case}.nii.gz", rng.integers(0, 3, (24, 24, 24)).astype(np.uint8))
    for case in HIDDEN:
        (raw / "labelsTr" / f"{case}.nii.gz").unlink()
        (pre / "gt_segmentations" / f"{case}.nii.gz").unlink()
        (data / f"{case}_seg.b2nd").unlink()
        (data / f"{case}.pkl").unlink()
    shutil.rmtree(raw / "labelsTs")
    return root, other


def noise_preprocessed(folder: Path, case: str, rng: np.random.Generator) -> None:
    """Replace the label of a preprocessed case, and where its classes are, by noise."""
    dataset = nnUNetDatasetBlosc2(str(folder), [case])
    data, seg, _, properties = dataset.load_case(case)
    data, shape = data[:], seg.shape
    noise = rng.integers(0, 3, shape).astype(np.int16)
    properties["class_locations"] = {c: np.argwhere(noise == c)[:777] for c in (1, 2)}
    for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
        (folder / f"{case}{suffix}").unlink()
    whole = {"chunks": data.shape, "blocks": data.shape, "chunks_seg": shape, "blocks_seg": shape}
    dataset.save_case(data, noise, properties, str(folder / case), **whole)


def run(root: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> list:
    """Everything that 20 steps with validation in between see and make."""
    for name, folder in environment(root).items():
        monkeypatch.setenv(name, folder)
    seed_all(3)
    trainer = begin(make_trainer(f"{method}_epochs2_iters20_valiters1"))
    trainer.disable_checkpointing = True
    all_learned(trainer.method)  # every term acts from the first step
    seen = []
    for step in range(20):
        batch = next(trainer.dataloader_train)
        seen.append(
            {k: v for k, v in batch.items() if k != "target"} | {"target": [t.clone() for t in batch["target"]]}
        )
        seen.append(trainer.train_step(batch)["loss"])
        if step % 5 == 4:
            with torch.no_grad():
                trainer.on_validation_epoch_start()
                trainer.validation_step(next(trainer.dataloader_val))
            trainer.network.train()
    return [seen, dict(unwrap(trainer.network).state_dict()), dict(trainer.method.state_dict())]


@pytest.mark.parametrize("method", METHODS)
def test_hidden_labels_change_nothing_and_are_never_opened(benchmark, method: str, monkeypatch) -> None:
    global opened
    one, other = benchmark
    first = run(one, method, monkeypatch)
    opened = []
    try:
        second = run(other, method, monkeypatch)
    finally:
        files, opened = opened, None
    assert same(first[0], second[0])
    assert same(first[1:], second[1:])
    hidden = [
        f for f in files if any(c in Path(f).name for c in HIDDEN) and "_unlabeled" not in f and "imagesTr" not in f
    ]
    assert hidden == []
    assert not [f for f in files if "labelsTs" in f or "imagesTs" in f or Path(f).name.startswith("t_")]
    assert any(f.endswith(".pkl") for f in files)  # the hook sees what is opened


def test_cases_of_training_validation_and_unlabeled_are_the_splits_and_disjoint(benchmark, monkeypatch) -> None:
    for name, folder in environment(benchmark[0]).items():
        monkeypatch.setenv(name, folder)
    t = begin(make_trainer("nnUNetTrainerDyCON_epochs1_iters1_valiters1"))
    labeled, unlabeled = t.dataloader_train.data_loader.labeled, t.dataloader_train.data_loader.unlabeled
    found = [set(loader.indices) for loader in (labeled, unlabeled.inner, t.dataloader_val.data_loader.inner)]
    assert found == [{"l_00", "l_01"}, {"l_03", "l_04", "u_00"}, {"l_02"}]


def test_prepared_unlabeled_cases_carry_nothing_that_was_made_from_labels(benchmark, monkeypatch) -> None:
    for name, variable in environment(benchmark[0]).items():
        monkeypatch.setenv(name, variable)
    preprocess_unlabeled(901, processes=1)
    folder = benchmark[0] / "nnUNet_preprocessed" / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres_unlabeled"
    for path in folder.glob("*.pkl"):
        assert pickle.loads(path.read_bytes())["class_locations"] == {}
    dataset = nnUNetDatasetBlosc2(str(folder))
    assert set(dataset.identifiers) == {"l_03", "l_04", "u_00"}
    for case in dataset.identifiers:
        assert set(np.unique(dataset.load_case(case)[1][:])) <= {-1, 0}


def test_a_training_batch_has_no_targets_of_unlabeled_patches(benchmark, monkeypatch) -> None:
    for name, folder in environment(benchmark[0]).items():
        monkeypatch.setenv(name, folder)
    t = begin(make_trainer("nnUNetTrainerDyCON_epochs1_iters1"))
    batch = next(t.dataloader_train)
    assert set(batch) == {"data", "target", "keys", "unlabeled", "unlabeled_keys"}
    assert all(len(target) == len(batch["data"]) for target in batch["target"])


def test_fold_all_and_folds_beyond_the_file_are_refused_in_benchmark_mode(benchmark, monkeypatch) -> None:
    for name, folder in environment(benchmark[0]).items():
        monkeypatch.setenv(name, folder)
    for fold in ("all", 3):
        for method in ("nnUNetTrainerDyCON", "nnUNetTrainerLabeledOnly"):
            said = "would train on the labels" if fold == "all" else "splits_final.json has no fold 3; type -f 0"
            with pytest.raises(ConfigError, match=said):
                begin(make_trainer(f"{method}_epochs1", fold=fold))


@pytest.mark.parametrize("method", ["nnUNetTrainerLabeledOnly", "nnUNetTrainerDyCON"])
@pytest.mark.parametrize("role", ["imagesUn", "imagesTs"])
@pytest.mark.parametrize("fold", [0, "all"])
def test_cases_that_lost_their_label_after_the_preprocessing_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, role: str, fold: int | str
) -> None:
    names = make_dataset(tmp_path, labeled=5, unlabeled=1)
    plan_and_preprocess(root=tmp_path)
    for name, folder in environment(tmp_path).items():
        monkeypatch.setenv(name, folder)
    raw = tmp_path / "nnUNet_raw" / names.dataset
    moved = names.labeled[3]
    (raw / "labelsTr" / f"{moved}.nii.gz").unlink()
    (raw / "imagesTr" / f"{moved}_0000.nii.gz").rename(raw / role / f"{moved}_0000.nii.gz")
    what = "unlabelled" if role == "imagesUn" else "test"
    with pytest.raises(SplitError, match=rf"{moved}.*{what} case now.*{re.escape(str(tmp_path))}"):
        begin(make_trainer(f"{method}_epochs2_iters2_valiters1", fold=fold))
    if method == "nnUNetTrainerDyCON" and role == "imagesUn":
        preprocess_unlabeled(901, processes=1)
        shutil.rmtree(raw)  # as on a machine that only trains
        with pytest.raises(SplitError, match=rf"{moved}.*unlabelled case now"):
            begin(make_trainer(f"{method}_epochs2_iters2_valiters1", fold=fold))
