"""A training of the tiny data set that learnt nothing, in its place on disk: student and teacher differ."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.trainers.snapshots import keep_snapshot
from tests.training import make_trainer, seed_all

NAME = "nnUNetTrainerDyCON_epochs4_iters2_valiters1_seed3_snapshots2"


def write_training(name: str = NAME, *, snapshots: Sequence[int] = (), sharp: float = 4.0, **options: Any) -> Path:
    """Write the final checkpoint (and snapshots) of a trainer that has made no step; returns the fold's folder.

    `sharp` multiplies the output layer, so that the classes of a random network are not all alike.
    """
    seed_all(0)
    trainer = make_trainer(name, **options)
    trainer.initialize()
    trainer.method.start(unwrap(trainer.network))
    with torch.no_grad():
        for network, factor in ((unwrap(trainer.network), sharp), (trainer.method.teacher.network, 0.8 * sharp)):
            network.decoder.seg_layers[-1].weight.mul_(factor)
    fold = Path(trainer.output_folder)
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        (fold.parent / f"{name}.json").write_text(json.dumps(content))
    for epochs in snapshots:
        trainer.current_epoch = epochs - 1
        with torch.no_grad():
            for weight in trainer.network.parameters():
                weight.mul_(1.02)
        keep_snapshot(trainer)
    trainer.save_checkpoint(str(fold / "checkpoint_final.pth"))
    return fold
