"""Two ranks over gloo on the CPU: nnU-Net wraps the network for CUDA only, so three of its lines are stood in for."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.datasets import environment, make_dataset, plan_and_preprocess, write_splits
from tests.training import begin, make_trainer, same

pytestmark = pytest.mark.slow


def work(rank: int, root: str, method: str, poisoned: bool) -> None:
    """One rank: a few steps, then everything that must agree is written to a file."""
    os.environ.update(environment(Path(root)))
    os.environ.update(nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1", nnUNet_compile="f")
    torch.set_num_threads(1)
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock

    stock.DDP = lambda network, device_ids: torch.nn.parallel.DistributedDataParallel(network)
    stock.device_count = lambda: 2
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/rendezvous-{method}-{poisoned}", rank=rank, world_size=2
    )
    trainer = make_trainer(f"{method}_epochs2_iters3_valiters1_seed1")
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    trainer.disable_checkpointing = True
    begin(trainer)
    keys = []
    for step in range(3):
        batch = next(trainer.dataloader_train)
        assert len(batch["data"]) == len(batch["unlabeled"]) == 1
        if poisoned and step == 1 and rank == 1:  # one rank's loss is not finite: both must skip
            batch["unlabeled"] = batch["unlabeled"] * float("nan")
        keys.append(batch["data"].clone())
        trainer.train_step(batch)
    trainer.on_train_epoch_end([{"loss": torch.zeros(1).numpy()}])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    network = trainer.network.module.state_dict()
    left = {"student": network, "method": trainer.method.state_dict(), "row": trainer.epoch_row, "patches": keys}
    torch.save(left, f"{root}/{method}-{poisoned}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "poisoned"),
    [("nnUNetTrainerMeanTeacher", False), ("nnUNetTrainerDyCON", True), ("nnUNetTrainerCPS", True)],
)
def test_ranks_hold_the_same_weights_and_see_different_patches(tmp_path: Path, method: str, poisoned: bool) -> None:
    names = make_dataset(tmp_path)
    write_splits(tmp_path, names.dataset, train=names.labeled[:3], val=names.labeled[3:])
    plan_and_preprocess(root=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in environment(tmp_path).items():
            patch.setenv(name, folder)
        from nnunetv2_dycon.data.unlabeled import preprocess_unlabeled

        preprocess_unlabeled(901, processes=1)
    arguments = (str(tmp_path), method, poisoned)
    torch.multiprocessing.spawn(work, args=arguments, nprocs=2)
    one, other = (torch.load(tmp_path / f"{method}-{poisoned}-{rank}.pt", weights_only=False) for rank in (0, 1))
    assert same(one["student"], other["student"])
    assert same(one["method"], other["method"])
    assert same(one["row"], other["row"])
    assert one["row"]["skipped_steps"] == float(poisoned)
    assert not same(one["patches"], other["patches"])
