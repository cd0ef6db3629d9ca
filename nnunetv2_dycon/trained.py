"""What a checkpoint holds, and its networks, for all that predicts: export, pictures, and what to annotate next."""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_dycon.checkpoint import KEY, read_checkpoint
from nnunetv2_dycon.command_lines import Model
from nnunetv2_dycon.data.dataset_json import read_dataset_json
from nnunetv2_dycon.errors import ConfigError, DataError
from nnunetv2_dycon.files import read_json_object
from nnunetv2_dycon.trainers.planned import check_entries
from nnunetv2_dycon.trainers.results import checkpoints, model_folder, trained_checkpoint
from nnunetv2_dycon.trainers.snapshots import snapshots_of

Weights = Literal["student", "teacher"]
NEEDED = ("network_weights", "init_args", "inference_allowed_mirroring_axes")
RESTORE = "restore what nnUNetv2_train wrote there"


def weights_of(checkpoint: Mapping[str, Any], weights: str, path: Path) -> Mapping[str, torch.Tensor]:
    """Return the weights of one network of a checkpoint.

    Parameters
    ----------
    checkpoint : mapping
        Its content.
    weights : {"student", "teacher"}
        In co-training the first and the second network.
    path : Path
        Its file, for the message.

    Raises
    ------
    DataError
        If another trainer wrote it, which has no teacher.
    """
    if weights == "student":
        return checkpoint["network_weights"]
    if KEY not in checkpoint:
        raise DataError(f"{path} holds no teacher (another trainer wrote it); use --weights student")
    return checkpoint[KEY]["teacher"]


@dataclass(frozen=True)
class Trained:
    """A checkpoint on the CPU, with the plans and the dataset.json of its training."""

    path: Path
    checkpoint: Mapping[str, Any]
    plans: PlansManager
    configuration: ConfigurationManager
    dataset_json: dict[str, Any]

    @property
    def fold(self) -> Path:
        """Folder of the fold."""
        return self.path.parent

    @property
    def classes(self) -> dict[int, str]:
        """Value and name of each foreground class."""
        labels = self.plans.get_label_manager(self.dataset_json)
        names = {value: name for name, value in self.dataset_json["labels"].items() if isinstance(value, int | str)}
        names = {int(value): name for value, name in names.items()}
        return {int(value): names[int(value)] for value in labels.foreground_labels}

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher."""
        return KEY in self.checkpoint

    def refuse_regions(self) -> None:
        """Raise ConfigError for labels that are regions: a voxel then has no one class, and no entropy of classes."""
        if self.plans.get_label_manager(self.dataset_json).has_regions:
            raise ConfigError(
                f"{self.path.parents[1].name} was trained on regions (regions_class_order in dataset.json), which "
                "overlap and have no entropy of classes; give a training on plain labels"
            )

    def network(self, weights: Weights) -> nn.Module:
        """Return the planned network with the weights of student or teacher, ready to predict at full resolution.

        Raises
        ------
        DataError
            If there are no such weights, or they are of another network than the planned one.
        """
        network = nnUNetTrainer.build_network_architecture(
            self.plans,
            self.configuration,
            determine_num_input_channels(self.plans, self.configuration, self.dataset_json),
            self.plans.get_label_manager(self.dataset_json).num_segmentation_heads,
            enable_deep_supervision=False,
        )
        try:
            network.load_state_dict(weights_of(self.checkpoint, weights, self.path))
        except RuntimeError as error:
            raise DataError(
                f"{self.path} has weights of another network than the plans next to it; {RESTORE}"
            ) from error
        return network.eval()

    def predictor(self, weights: Weights, device: torch.device, *, mirroring: bool = True) -> nnUNetPredictor:
        """Return nnU-Net's own predictor for student or teacher.

        Parameters
        ----------
        weights : {"student", "teacher"}
            Whose.
        device : torch.device
            Where to compute.
        mirroring : bool
            Average over mirrored patches, if the training mirrored.
        """
        network = self.network(weights)
        with redirect_stdout(StringIO()):  # it says on a CPU what it does without
            predictor = nnUNetPredictor(use_mirroring=mirroring, device=device, allow_tqdm=False)
        predictor.manual_initialization(
            network,
            self.plans,
            self.configuration,
            [network.state_dict()],
            self.dataset_json,
            str(self.checkpoint.get("trainer_name", "nnUNetTrainer")),
            self.checkpoint["inference_allowed_mirroring_axes"],
        )
        return predictor


def find_trained(
    dataset: int | str, model: Model, fold: int | str, checkpoint: str = "checkpoint_final.pth"
) -> Trained:
    """Return a checkpoint of a training by name.

    Parameters
    ----------
    dataset : int or str
        Data set number or name.
    model : Model
        Trainer, plans and configuration.
    fold : int or 'all'
        The trained fold.
    checkpoint : str
        File name of the checkpoint, or of a snapshot.

    Raises
    ------
    DataError, ConfigError
        If it is not there or cannot be used; the message says what is there, or how to train it.
    """
    return open_trained(trained_checkpoint(dataset, model, fold, checkpoint))


def open_trained(path: Path) -> Trained:
    """Return the content of a checkpoint in its place in nnU-Net's results folder.

    Raises
    ------
    DataError
        If a file of the training is missing or cannot be used.
    """
    folder = path.parents[1]
    dataset_json = read_dataset_json(folder / "dataset.json", RESTORE)
    checkpoint = read_checkpoint(path, *NEEDED)
    name, planned = checkpoint["init_args"]["configuration"], folder / "plans.json"
    content = read_json_object(planned, RESTORE)
    check_entries(content, name, planned, RESTORE)
    if name not in content["configurations"]:
        raise DataError(f"{planned} has no configuration {name}; {RESTORE}")
    plans = PlansManager(content)
    return Trained(path, checkpoint, plans, plans.get_configuration(name), dataset_json)


class Moment(NamedTuple):
    """A checkpoint in the course of a training: epochs done, and its content."""

    epochs: int
    trained: Trained


def course_of(
    dataset: int | str, model: Model, fold: int | str, names: Sequence[str] = (), most: int = 5
) -> list[Moment]:
    """Return checkpoints of a training in the order of their epochs.

    Parameters
    ----------
    dataset, model, fold
        As `find_trained`.
    names : sequence of str
        File names of checkpoints and snapshots; by default all snapshots and the final checkpoint.
    most : int
        How many of the default ones, evenly spread, the last among them.

    Raises
    ------
    DataError, ConfigError
        If one is not there or cannot be used; the message says what is there.
    """
    final = trained_checkpoint(dataset, model, fold, "checkpoint_final.pth") if not names else None
    folder = model_folder(dataset, model) / f"fold_{fold}"
    there = [*snapshots_of(folder), *checkpoints(folder)]
    for name in names:
        if name not in there:
            raise DataError(f"{folder} has no {name}; give --checkpoints some of: {', '.join(there) or 'nothing yet'}")
    if final is not None:
        every = [*snapshots_of(folder), final.name]
        spread = {round(at * (len(every) - 1) / max(1, most - 1)) for at in range(most)}
        names = [every[at] for at in sorted(spread)]
    moments = [open_trained(folder / name) for name in dict.fromkeys(names)]
    course = [Moment(int(one.checkpoint.get("current_epoch", 0)), one) for one in moments]
    unique = {moment.epochs: moment for moment in course} if final is not None else dict(enumerate(course))
    return sorted(unique.values(), key=lambda moment: moment.epochs)


def device_of(name: str | None) -> torch.device:
    """Return a device by nnU-Net's word; without one CUDA if there is a device, else the CPU.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cuda", "cpu", "mps"):
        raise ConfigError(f"-device {name}: type cuda, cpu or mps")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there[name]:
        raise ConfigError(f"-device {name}: this machine has none; type -device cpu")
    return torch.device(name)
