"""The one place that knows how nnU-Net trains. Every trainer name is this class with a method and its settings.

Verified against nnunetv2 2.8.1. Each override says what it adds to stock.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import nn

import nnunetv2_dycon
from nnunetv2_dycon.checkpoint import KEY, write_checkpoint
from nnunetv2_dycon.data.processes import ending_with_this_process
from nnunetv2_dycon.data.ready import UnlabeledCases
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.options import Settings
from nnunetv2_dycon.precision import autocast_of, in_float32, require_bf16
from nnunetv2_dycon.randomness import process_seed, seed_everything, seed_from_here
from nnunetv2_dycon.ranks import gathered, share_weights
from nnunetv2_dycon.step import DataInfo, Method, Step
from nnunetv2_dycon.trainers.cases import check_cases, find_unlabeled, labeled_reader, write_missing_splits
from nnunetv2_dycon.trainers.history import History, class_names, epoch_means, unseen_classes
from nnunetv2_dycon.trainers.loaders import dataloaders
from nnunetv2_dycon.trainers.lock import lock_training
from nnunetv2_dycon.trainers.planned import check_fingerprint, check_plans
from nnunetv2_dycon.trainers.results import GO_ON
from nnunetv2_dycon.trainers.resume import checkpoint_file, choose_checkpoint, end_guard, guard_files, take_over
from nnunetv2_dycon.trainers.snapshots import keep_snapshot
from nnunetv2_dycon.trainers.start import check_machine, check_start, limit_threads
from nnunetv2_dycon.trainers.state import restore_random_states, state_of


class nnUNetTrainerSSL(nnUNetTrainer):
    """Stock nnU-Net training with a semi-supervised method in the step. Not a `-tr` name itself."""

    method_type: ClassVar[type[Method]]
    settings: ClassVar[Settings]
    # stock's, which makes them late
    network: nn.Module
    output_folder: str
    output_folder_base: str
    # ours, made by `initialize`
    method: Method
    step: Step

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        check_machine(device)
        check_plans(plans, configuration, dataset_json)
        self.continues = plans.get("continue_training", False)
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            raise DataError(
                f"cannot write {error.filename}: {error.strerror}; let nnUNet_results name a folder of yours: "
                "export nnUNet_results=/path/to/nnUNet_results"
            ) from error
        labeled_reader(self)
        limit_threads(device)
        s = self.settings
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = (
            s.epochs,
            s.iters,
            s.valiters,
        )
        self.save_every, self.initial_lr = s.save, s.lr
        self.method_optimizer: torch.optim.Optimizer | None = None
        self.unlabeled: UnlabeledCases | None = None
        self.fold_cases: dict[str, list[str]] = {}
        self.history = History()
        self.restored: dict[str, Any] | None = None
        self.epoch_row: dict[str, float] = {}
        self.class_names = class_names(self.label_manager, dataset_json)

    # ------------------------------------------------------------------------------------------------ set up
    def initialize(self) -> None:
        """As stock; then the method with its own modules and optimiser, and the step.

        Raises ConfigError for data, or a device, that the method and its options are not defined for.
        """
        if self.settings.bf16:
            require_bf16(self.device)
        if self.settings.seed is not None:
            seed_everything(self.settings.seed)
        reader = labeled_reader(self)
        super().initialize()
        self.dataset_class = reader
        seed = seed_from_here("method") if self.settings.seed is None else self.settings.seed
        labels = self.label_manager
        data = DataInfo(
            classes=labels.num_segmentation_heads,
            ignore_label=labels.ignore_label,
            regions=labels.has_regions,
            cascaded=self.is_cascaded,
            patch=tuple(self.configuration_manager.patch_size),
            names=tuple(self.class_names),
        )
        self.method = self.method_type(self.settings, data, seed)
        self.method.build(unwrap(self.network))
        self.method.to(self.device)
        share_weights(self.method.state_dict().values())
        optimizers = [self.optimizer]
        parameters = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        if parameters:
            # An optimiser of its own, so that `optimizer_state` in the checkpoint stays stock's.
            self.method_optimizer = torch.optim.SGD(
                parameters, self.initial_lr, weight_decay=self.weight_decay, momentum=0.99, nesterov=True
            )
            optimizers.append(self.method_optimizer)
        self.step = self.train_step = Step(  # nnU-Net calls it by the second name
            self.network,
            self.method,
            optimizers,
            in_float32(self.loss, self.device) if self.settings.bf16 else self.loss,
            device=self.device,
            generator=torch.Generator(self.device).manual_seed(process_seed(seed, self.local_rank, 0)),
            autocast=autocast_of(self.device, bf16=self.settings.bf16),
            scaler=self.grad_scaler,
            warn=self.print_to_log_file,
            weights=getattr(self.loss, "weight_factors", () if self.enable_deep_supervision else (1.0,)),
        )
        guard_files()

    def _set_batch_size_and_oversample(self) -> None:
        """As stock, with the labelled batch of option `batch` in place of the planned one."""
        if self.settings.batch:
            self.configuration_manager.configuration["batch_size"] = self.settings.batch
            # Stock forces foreground on the last third of the positions, which is none of one.
            self.probabilistic_oversampling = self.settings.batch == 1
        super()._set_batch_size_and_oversample()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """As stock; option `nomirror` takes mirroring out of training and prediction."""
        rotation, dummy_2d, initial_patch_size, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if self.settings.nomirror:
            axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, axes

    def do_split(self) -> tuple[list[str], list[str]]:
        """As stock; refuses a fold that would use the labels of cases that serve unlabelled, or for the test.

        Stock's five folds need five cases: with fewer there are as many folds as cases.
        """
        write_missing_splits(self)
        train, val = super().do_split()
        check_cases(self, train, val)
        self.fold_cases = {"labeled": sorted(train), "validation": sorted(val)}
        return train, val

    def get_dataloaders(self) -> tuple[Any, Any]:
        """As stock, with the unlabelled patches drawn by the same workers."""
        return dataloaders(self, super().get_dataloaders)

    # ------------------------------------------------------------------------------------------- life cycle
    def on_train_start(self) -> None:
        """As stock, once no other process trains here and roles and unlabelled images are in order."""
        if self.local_rank == 0:
            lock_training(Path(self.output_folder))
            check_start(self)
            check_fingerprint(Path(self.preprocessed_dataset_folder_base))
        self.unlabeled = find_unlabeled(self, default_num_processes)
        super().on_train_start()
        end_guard()
        if self.restored is None:
            self.method.start(unwrap(self.network))
        elif self.restored:
            restore_random_states(self, self.restored["random"])
        self._describe()

    def _describe(self) -> None:
        unlabeled = f"{len(self.unlabeled.names)} unlabelled images" if self.unlabeled else "no unlabelled images"
        parts = [self.method_type.__name__, unlabeled, self.method.describe(), f"settings {asdict(self.settings)}"]
        self.print_to_log_file(f"nnunetv2_dycon {nnunetv2_dycon.__version__}: {', '.join(filter(None, parts))}")

    def on_train_epoch_start(self) -> None:
        """As stock; the method's optimiser follows the same learning rate."""
        super().on_train_epoch_start()
        self.step.log.clear()
        if self.method_optimizer is not None:
            for group in self.method_optimizer.param_groups:
                group["lr"] = self.optimizer.param_groups[0]["lr"]

    # --------------------------------------------------------------------------------------------- the epoch
    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As stock; the series of this epoch are averaged over steps (and ranks)."""
        super().on_train_epoch_end(train_outputs)
        steps = [{name: float(value) for name, value in log.items()} for log in self.step.log]
        row = epoch_means(steps)
        row["skipped_steps"] = sum(step["skipped_steps"] for step in steps)
        self.epoch_row = epoch_means(gathered(row))

    def validation_step(self, batch: dict) -> dict:
        """As stock for the student, and once more for the teacher."""
        target = batch["target"]
        if self.label_manager.has_ignore_label:  # stock overwrites the ignore label in place
            copy = [t.clone() for t in target] if isinstance(target, list) else target.clone()
        else:
            copy = target
        with self.step.autocast() if self.settings.bf16 else nullcontext():
            outputs = super().validation_step({**batch, "target": copy})
            with self._as_network(self.method.teacher.network):
                teacher = super().validation_step(batch)
        return {**outputs, **{f"teacher_{name}": teacher[name] for name in ("tp_hard", "fp_hard", "fn_hard")}}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As stock; adds the teacher's pseudo Dice per class next to the student's."""
        super().on_validation_epoch_end(val_outputs)
        collated = collate_outputs(val_outputs)
        counts = np.stack([np.sum(collated[f"teacher_{name}"], 0) for name in ("tp_hard", "fp_hard", "fn_hard")])
        tp, fp, fn = np.sum(gathered(counts), 0)
        with np.errstate(invalid="ignore"):  # a class that is absent from all patches has no Dice
            teacher = 2 * tp / (2 * tp + fp + fn)
        student = self.logger.get_value("dice_per_class_or_region", step=-1)
        for name, ours, theirs in zip(self.class_names, student, teacher, strict=True):
            self.epoch_row[f"dice_student_{name}"] = float(ours)
            self.epoch_row[f"dice_teacher_{name}"] = float(theirs)

    def on_epoch_end(self) -> None:
        """As stock; the series go into the log, the CSV and the picture, before the checkpoint that holds them."""
        self.history.add(self.current_epoch, self.epoch_row)
        self._log_series()
        if self.method_type.uses_unlabeled:
            self._report_classes()
        if self.local_rank == 0 and self.settings.snapshots:
            keep_snapshot(self)
        super().on_epoch_end()
        if self.local_rank == 0:
            folder = Path(self.output_folder)
            self.history.write_csv(folder / "ssl_history.csv")
            self.history.plot(folder / "ssl_progress.png")

    def _report_classes(self) -> None:
        """Name the classes that unlabelled images do not teach yet, and warn of those that they may teach away."""
        learned = dict(zip(self.class_names, self.method.learned.learned[1:].tolist(), strict=True))
        threshold = self.method.settings.learned
        waiting = [name for name, is_learned in learned.items() if not is_learned]
        if waiting:
            self.print_to_log_file(
                f"Not learnt from the labels yet, so that unlabelled images do not teach it: {', '.join(waiting)} "
                f"({len(waiting)} of {len(learned)} classes; Dice on labelled patches below {threshold})"
            )
        for name in unseen_classes(self.history, [name for name in self.class_names if learned[name]]):
            self.print_to_log_file(
                f"WARNING: the teacher does not show class '{name}' (pseudo Dice 0). Its unlabelled targets now "
                "teach the student that this class is absent. Where this stays, train anew with a slower start: "
                "_rampup0p6 in the name (BCP: _pretrain0p4)."
            )

    def _log_series(self) -> None:
        """Give every figure to nnU-Net's logger (and through it to W&B), one value per epoch."""
        store = self.logger.local_logger.my_fantastic_logging
        for name in self.history.columns[1:]:
            series = store.setdefault(f"ssl_{name}", [])
            series.extend([float("nan")] * (self.current_epoch - len(series)))
            self.logger.log(f"ssl_{name}", self.epoch_row.get(name, float("nan")), self.current_epoch)
        figures = " ".join(f"{name} {value:.4g}" for name, value in self.epoch_row.items())
        self.print_to_log_file(f"ssl {figures}")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As stock for the student; then for the method's other models, each in a sub-folder of its name."""
        if self.local_rank == 0:
            lock_training(Path(self.output_folder))  # --val has no training that did it
        with ending_with_this_process():
            super().perform_actual_validation(save_probabilities)
        folders = self.output_folder, self.output_folder_base
        for name, network in self.method.models(unwrap(self.network)).items():
            self.print_to_log_file(f"Final validation, {name}:")
            # Both, since a cascade's first stage writes its predictions below the second.
            self.output_folder = self.output_folder_base = os.path.join(folders[0], name)
            try:
                with self._as_network(network), ending_with_this_process():
                    super().perform_actual_validation(save_probabilities)
            finally:
                self.output_folder, self.output_folder_base = folders

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As stock, also for a network that is not wrapped where the student is."""
        unwrap(self.network).decoder.deep_supervision = enabled

    @contextmanager
    def _as_network(self, network: nn.Module) -> Iterator[None]:
        """Put a plain network in the student's place, to predict; it is left as it was."""
        student, training = self.network, network.training
        decoder: Any = getattr(network, "decoder", None)
        deep = getattr(decoder, "deep_supervision", None)
        self.network = network.eval()
        if deep is not None:
            decoder.deep_supervision = self.enable_deep_supervision
        try:
            yield
        finally:
            self.network = student
            network.train(training)
            if deep is not None:
                decoder.deep_supervision = deep

    # -------------------------------------------------------------------------------------------- checkpoints
    def save_checkpoint(self, filename: str) -> None:
        """As stock, plus our key, written whole or not at all."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        buffer = BytesIO()
        super().save_checkpoint(buffer)
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)  # written a line above
        checkpoint[KEY] = state_of(self)
        write_checkpoint(checkpoint, Path(filename), GO_ON)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As stock, from a file or its content; then our key. A checkpoint without it starts the method anew.

        Where the training continues and the file is damaged, the newest whole checkpoint takes its place.
        """
        with checkpoint_file(filename_or_checkpoint) as given:
            path, state = choose_checkpoint(self, given)
            super().load_checkpoint(str(path))
            take_over(self, state, path)
