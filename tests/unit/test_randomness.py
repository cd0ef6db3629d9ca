"""Seeds of processes: where several draw at the same time, none draws what another does."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.data_loader import DataLoader

from nnunetv2_dycon.data.loader import IsolatedLoader, MixedLoader
from nnunetv2_dycon.data.processes import LoaderProcesses
from nnunetv2_dycon.randomness import derived_seed, process_seed, seed_from_here
from tests.training import begin

# batchgenerators' thread that collects results ends so when its workers are stopped
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Numbers(DataLoader):
    """Draws from the global states of numpy, Python and torch, as nnU-Net's loader and transforms do."""

    def __init__(self) -> None:
        super().__init__(None, 1, 1, None, True, False, True)
        self.transforms = None

    def generate_train_batch(self) -> dict[str, np.ndarray]:
        numbers = [np.random.random(), random.random(), torch.rand(1, dtype=torch.float64).item()]
        return {"data": np.array(numbers), "keys": ["a"]}


def drawn(seed: int | None, batches: int) -> list[float]:
    """All numbers of some batches that four processes draw, labelled and unlabelled."""
    mixed = MixedLoader(Numbers(), IsolatedLoader(Numbers(), seed_from_here("unlabeled")))
    seeds = None if seed is None else [derived_seed(seed, worker) for worker in range(4)]
    augmenter = LoaderProcesses(mixed, 4, 2, seeds, pin_memory=False)
    try:
        found = [next(augmenter) for _ in range(batches)]
        return [float(number) for batch in found for part in ("data", "unlabeled") for number in batch[part]]
    finally:
        augmenter._finish()


def test_workers_of_neighboring_seeds_draw_nothing_in_common() -> None:
    one, other = drawn(0, 40), drawn(1, 40)
    assert len(set(one)) == len(set(other)) == 40 * 6  # nor do two workers of one seed, in any of the states
    assert not set(one) & set(other)


def test_workers_of_a_training_without_a_seed_draw_nothing_in_common() -> None:
    assert len(set(drawn(None, 40))) == 40 * 6


def test_seeds_of_processes_differ_and_the_first_is_the_users() -> None:
    starts = list(product(range(5), range(4), (0, 1, 250)))
    seeds = [process_seed(*start) for start in starts]
    assert len(set(seeds)) == len(seeds)
    assert [process_seed(seed, 0, 0) for seed in range(5)] == list(range(5))
    assert len({derived_seed(seed, worker) for seed in seeds for worker in range(4)}) == 4 * len(seeds)
    assert all(0 <= derived_seed(seed) < 2**32 for seed in (0, 2**32 - 1, 2**40))


def test_a_training_that_goes_on_in_loader_processes_draws_new_patches(trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")

    def patches(t, number: int = 12) -> list[np.ndarray]:
        begin(t)
        try:
            return [next(t.dataloader_train)["data"].numpy() for _ in range(number)]
        finally:
            t.dataloader_train._finish()
            t.dataloader_val._finish()

    name = "nnUNetTrainerMeanTeacher_epochs2_iters3_valiters1_seed1"
    first = trainer(name)
    before = patches(first)
    first.step.number = 3
    path = tmp_path / "checkpoint.pth"
    first.save_checkpoint(str(path))
    again = patches(trainer(name))
    second = trainer(name, resume=True)
    second.load_checkpoint(str(path))
    after = patches(second)

    def common(some, others) -> int:
        return sum(any(np.array_equal(a, b) for b in others) for a in some)

    assert common(again, before) > 6  # the same start gives the same patches, in whatever order
    assert common(after, before) == 0


class Marked:
    """Transforms whose last act writes a draw of torch's and one of Python's random state into a corner."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __call__(self, **sample):
        sample = self.inner(**sample)
        sample["image"][0, 0, 0, :2] = torch.tensor([torch.rand(()), random.random()])
        return sample


def patches_and_draws(t, number: int) -> tuple[dict[str, list[bytes]], list[float]]:
    """Return the patches of each half of some batches, and what their augmentation drew."""
    begin(t)
    try:
        batches = [next(t.dataloader_train) for _ in range(number)]
    finally:
        t.dataloader_train._finish()
        t.dataloader_val._finish()
    patches, draws = {}, []
    for half in ("data", "unlabeled"):
        arrays = [patch.numpy() for batch in batches for patch in batch[half]]
        draws += [float(draw) for array in arrays for draw in array[0, 0, 0, :2]]
        for array in arrays:
            array[0, 0, 0, :2] = 0
        patches[half] = [array.tobytes() for array in arrays]
    return patches, draws


@pytest.mark.parametrize("seed", ["", "_seed1"])
def test_two_loader_processes_draw_and_augment_nothing_alike(trainer, monkeypatch, seed: str) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    stock = nnUNetTrainer.get_training_transforms
    monkeypatch.setattr(nnUNetTrainer, "get_training_transforms", staticmethod(lambda *a, **k: Marked(stock(*a, **k))))
    t = trainer(f"nnUNetTrainerMeanTeacher_epochs2_iters2{seed}")
    patches, draws = patches_and_draws(t, 16)
    assert t.dataloader_train.num_processes == 2
    assert {half: len(set(found)) for half, found in patches.items()} == {"data": 32, "unlabeled": 32}
    assert len(set(draws)) == len(draws) == 2 * 2 * 32
    if seed:  # the same seed draws the same, from every random state and in whatever order
        assert len({*draws} & {*patches_and_draws(trainer(type(t).__name__), 16)[1]}) > len(draws) / 2
