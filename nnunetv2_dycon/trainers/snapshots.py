"""Snapshots of the networks at chosen epochs of a training, for pictures of its course.

A snapshot is a checkpoint without what only a continuation needs. Its name is not that of a checkpoint, so that no
training continues from it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_dycon.checkpoint import KEY, write_checkpoint
from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.trainers.results import GO_ON
from nnunetv2_dycon.trainers.state import state_of

if TYPE_CHECKING:
    from nnunetv2_dycon.trainers.engine import nnUNetTrainerSSL

_KEPT = ("version", "settings", "step", "cases", "teacher", "method")


def snapshot_name(epochs: int) -> str:
    """Return the file name of the snapshot after so many epochs.

    Examples
    --------
    >>> snapshot_name(100)
    'snapshot_epoch0100.pth'
    """
    return f"snapshot_epoch{epochs:04d}.pth"


def snapshots_of(fold: Path) -> list[str]:
    """Return the names of the snapshots in a fold's folder, in the order of the training."""
    return sorted((path.name for path in fold.glob("snapshot_epoch*.pth")), key=lambda name: (len(name), name))


def keep_snapshot(trainer: "nnUNetTrainerSSL") -> None:
    """Write student and teacher at the end of an epoch, where option `snapshots` asks for it."""
    epochs = trainer.current_epoch + 1
    if epochs % trainer.settings.snapshots:
        return
    state = state_of(trainer)
    snapshot = {
        "network_weights": unwrap(trainer.network).state_dict(),
        "init_args": trainer.my_init_kwargs,
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        "current_epoch": epochs,
        KEY: {key: state[key] for key in _KEPT},
    }
    write_checkpoint(snapshot, Path(trainer.output_folder, snapshot_name(epochs)), GO_ON)
