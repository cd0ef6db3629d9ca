"""The one place that knows how nnU-Net trains. Every trainer name is this class with a method and its settings.

Verified against nnunetv2 2.8.1. Each override says what it adds to stock.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from torch import Tensor, nn

import nnunetv2_dycon
from nnunetv2_dycon.checkpoint import KEY, read_checkpoint, write_checkpoint
from nnunetv2_dycon.data.loader import (
    IsolatedLoader,
    MixedLoader,
    inner_loader,
    replace_loader,
    unlabeled_loader,
)
from nnunetv2_dycon.data.ready import UnlabeledCases, ready_cases
from nnunetv2_dycon.data.roles import (
    SPLITS_FILE,
    STOCK_FOLDS,
    adopt_splits,
    check_fold,
    check_training_cases,
    read_roles,
    read_splits,
    write_small_splits,
)
from nnunetv2_dycon.errors import ConfigError, DataError, DivergedError
from nnunetv2_dycon.folders import environment_folder, raw_folder
from nnunetv2_dycon.methods.base import Batch, Group, Method, Outputs, Task
from nnunetv2_dycon.networks import unwrap
from nnunetv2_dycon.options import Settings
from nnunetv2_dycon.precision import require_bf16
from nnunetv2_dycon.randomness import (
    global_states,
    process_seed,
    seed_everything,
    seed_from_here,
    set_global_states,
)
from nnunetv2_dycon.trainers.history import History, epoch_means, unseen_classes
from nnunetv2_dycon.trainers.ranks import (
    average_gradients,
    finite_everywhere,
    mean_row,
    share_weights,
    sum_counts,
    world_size,
)
from nnunetv2_dycon.trainers.state import compare_settings, restore, restore_random_states, state_of

CLIP_NORM = 12.0  # as stock
SKIPS_TO_STOP = 5


class nnUNetTrainerSSL(nnUNetTrainer):
    """Stock nnU-Net training with a semi-supervised method in the step. Not a `-tr` name itself."""

    method_type: ClassVar[type[Method]]
    settings: ClassVar[Settings]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        for variable in ("nnUNet_preprocessed", "nnUNet_results"):
            environment_folder(variable)
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            raise DataError(
                f"cannot write {error.filename}: {error.strerror}; let nnUNet_results name a folder of yours: "
                "export nnUNet_results=/path/to/nnUNet_results"
            ) from error
        s = self.settings
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = (
            s.epochs,
            s.iters,
            s.valiters,
        )
        self.save_every, self.initial_lr = s.save, s.lr
        self.method: Method | None = None
        self.method_optimizer: torch.optim.Optimizer | None = None
        self.generator: torch.Generator | None = None
        self.unlabeled: UnlabeledCases | None = None
        self.fold_cases: dict[str, list[str]] = {}
        self.history = History()
        self.step = 0
        self.skipped_in_a_row = 0
        self.restored: dict[str, Any] | None = None
        self.figures: list[dict[str, Any]] = []
        self.epoch_row: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------ set up
    def initialize(self) -> None:
        """As stock; then the method with its own modules and optimiser. Refuses what no term is defined for."""
        self._refuse_unsupported()
        if self.settings.seed is not None:
            seed_everything(self.settings.seed)
        super().initialize()
        seed = seed_from_here("method") if self.settings.seed is None else self.settings.seed
        task = Task(
            classes=self.label_manager.num_segmentation_heads,
            ignore_label=self.label_manager.ignore_label,
            seed=seed,
        )
        self.method = self.method_type(self.settings, task)
        self.method.build(unwrap(self.network))
        self.method.to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(process_seed(seed, self.local_rank, 0))
        parameters = self._method_parameters()
        share_weights(self.method.state_dict().values())
        if parameters:
            # An optimiser of its own, so that `optimizer_state` in the checkpoint stays stock's.
            self.method_optimizer = torch.optim.SGD(
                parameters, self.initial_lr, weight_decay=self.weight_decay, momentum=0.99, nesterov=True
            )

    def _refuse_unsupported(self) -> None:
        if self.settings.bf16:
            require_bf16(self.device)
        if self.label_manager.has_regions and getattr(self.settings, "paste", 0):
            raise ConfigError("option paste: region-based labels cannot be pasted; leave it out.")
        if not self.method_type.uses_unlabeled:
            return
        if self.label_manager.has_regions:
            raise ConfigError(
                "region-based labels (regions_class_order in dataset.json) cannot learn from unlabelled images: "
                "give dataset.json plain labels, or train -tr nnUNetTrainerLabeledOnly."
            )
        if self.is_cascaded:
            raise ConfigError(
                f"{self.configuration_name} is the second stage of a cascade, which has no input for unlabelled "
                "images: train 3d_fullres or 3d_lowres, or -tr nnUNetTrainerLabeledOnly."
            )

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
        preprocessed, raw = Path(self.preprocessed_dataset_folder_base), raw_folder(self.plans_manager.dataset_name)
        check_fold(read_splits(preprocessed, raw), self.fold)
        if self.fold != "all" and not (preprocessed / SPLITS_FILE).exists():
            cases = infer_dataset_class(self.preprocessed_dataset_folder).get_identifiers(
                self.preprocessed_dataset_folder
            )
            if len(cases) < STOCK_FOLDS:
                write_small_splits(preprocessed, cases)
                self.print_to_log_file(
                    f"{len(cases)} labelled cases are too few for {STOCK_FOLDS} folds: wrote "
                    f"{preprocessed / SPLITS_FILE}, each fold validates on one case. Fold 'all' trains on all of them."
                )
        train, val = super().do_split()
        unlabeled, test = (() if self.unlabeled is None else self.unlabeled.names), ()
        if raw is not None:
            roles = read_roles(raw, self.dataset_json)
            unlabeled, test = {*unlabeled, *roles.unlabeled}, roles.test
        number = convert_dataset_name_to_id(self.plans_manager.dataset_name)
        check_training_cases({*train, *val}, unlabeled, test, number, preprocessed)
        self.fold_cases = {"labeled": sorted(train), "validation": sorted(val)}
        return train, val

    def get_dataloaders(self) -> tuple[Any, Any]:
        """As stock, with the unlabelled patches drawn by the same workers.

        The validation loader gets random states of its own wherever it may not shift the training stream: its draws
        depend on validation labels. The control without option `seed` keeps stock's stream, draw for draw.
        """
        seed = self.settings.seed
        if seed is not None:  # a training that goes on in loader processes must not draw its first patches again
            seed = process_seed(seed, self.local_rank, self.step)
        apart = seed is not None or self.method_type.uses_unlabeled
        before = global_states()
        train, val = super().get_dataloaders()
        if seed is not None:
            seed_everything(seed)
        elif apart:
            set_global_states(before)
        labeled = inner_loader(train)
        mixed = MixedLoader(labeled, self._unlabeled_loader(labeled) if self.unlabeled else None)
        train = replace_loader(train, mixed, seed)
        if apart:
            val = replace_loader(val, IsolatedLoader(inner_loader(val), seed_from_here("validation")), seed)
        if hasattr(train, "num_processes"):  # fork the workers now, before the first forward pass, as stock does
            next(train)
            next(val)
        return train, val

    def _unlabeled_loader(self, labeled: Any) -> IsolatedLoader:
        wanted = self.settings.unlabeledbatch
        size = self.batch_size if not wanted else len(range(self.local_rank, wanted, world_size()))
        if size == 0:
            raise ConfigError(f"option unlabeledbatch{wanted} leaves no unlabelled patch for each of the GPUs.")
        dataset = self.dataset_class(str(self.unlabeled.folder), list(self.unlabeled.names))
        return unlabeled_loader(labeled, dataset, size, seed_from_here("unlabeled"), self.label_manager)

    # ------------------------------------------------------------------------------------------- life cycle
    def on_train_start(self) -> None:
        """As stock, after roles and unlabelled images were found in order; the teacher starts from the student."""
        self._check_data()
        super().on_train_start()
        if self.restored is None:
            self.method.start(unwrap(self.network))
        elif self.restored:
            restore_random_states(self, self.restored["random"])
        self._describe()

    def _check_data(self) -> None:
        """Check the roles of all cases, and prepare the unlabelled ones where that is needed."""
        preprocessed = Path(self.preprocessed_dataset_folder_base)
        raw = raw_folder(self.plans_manager.dataset_name)
        if raw is not None:
            read_roles(raw, self.dataset_json)
        if adopt_splits(preprocessed, raw):  # stock copies it when it plans, and passes over one that came later
            self.print_to_log_file(f"Copied {raw / SPLITS_FILE} to {preprocessed}")
        if self.method_type.uses_unlabeled:
            self.unlabeled = ready_cases(
                self.plans_manager.plans,
                self.configuration_name,
                self.fold,
                preprocessed,
                prepare=not self.is_ddp,
                processes=default_num_processes,
                log=self.print_to_log_file,
            )

    def _describe(self) -> None:
        unlabeled = f"{len(self.unlabeled.names)} unlabelled images" if self.unlabeled else "no unlabelled images"
        self.print_to_log_file(
            f"nnunetv2_dycon {nnunetv2_dycon.__version__}: {self.method_type.__name__}, {unlabeled}, "
            f"settings {asdict(self.settings)}"
        )

    def on_train_epoch_start(self) -> None:
        """As stock; the method's optimiser follows the same learning rate."""
        super().on_train_epoch_start()
        self.figures = []
        if self.method_optimizer is not None:
            for group in self.method_optimizer.param_groups:
                group["lr"] = self.optimizer.param_groups[0]["lr"]

    # --------------------------------------------------------------------------------------------- the step
    def train_step(self, batch: dict) -> dict:
        """One optimiser step: each student pass of the method with its own backward, gradients added up."""
        data = self._batch(batch)
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=True)
        figures: dict[str, Any] = dict(self.method.figures(data.t))
        groups = self.method.groups(self.network, data)
        total = torch.zeros((), device=self.device)
        for index, group in enumerate(groups):
            with self._no_sync(index + 1 < len(groups)):
                total = total + self._backward(group, figures)
        if finite_everywhere(total):
            self._optimize()
            self.method.after_step(unwrap(self.network), self.step)
            self.skipped_in_a_row = 0
        else:
            self._skip(batch)
        figures["skipped_steps"] = float(self.skipped_in_a_row > 0)
        self.figures.append(figures)
        self.step += 1
        return {"loss": total.cpu().numpy()}

    def _batch(self, batch: dict) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        target = batch["target"]
        target = [move(t) for t in target] if isinstance(target, list) else move(target)
        return Batch(
            x_l=move(batch["data"]),
            y_l=target[0] if isinstance(target, list) else target,
            x_u=move(batch["unlabeled"]) if self.method_type.uses_unlabeled else None,
            supervised=partial(self._supervised, target=target),
            t=min(1.0, self.step / (self.num_epochs * self.num_iterations_per_epoch)),
            generator=self.generator,
        )

    def _supervised(self, outputs: Outputs, *, target: Any) -> Tensor:
        if not self.settings.bf16:
            return self.loss(outputs, target)
        with torch.autocast(self.device.type, enabled=False):  # a loss in bf16 keeps three digits
            single = isinstance(outputs, Tensor)
            return self.loss(outputs.float() if single else [output.float() for output in outputs], target)

    def _backward(self, group: Callable[[], Group], figures: dict[str, Any]) -> Tensor:
        """Run one student pass and its backward; only numbers outlive it, so the graph is freed."""
        with self._autocast():
            terms, stats = group()
            loss = sum(term.weight * term.value for term in terms.values())
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        for name, term in terms.items():
            figures[name] = term.value.detach()
            if name != "supervised":
                figures[f"{name}_weight"] = term.weight
                figures[f"{name}_weighted"] = term.weight * term.value.detach()
        figures.update(stats)
        return loss.detach()

    def _optimize(self) -> None:
        average_gradients(self._method_parameters())
        scaler = self.grad_scaler
        if scaler is not None:
            for optimizer in self._optimizers():
                scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        for module in self.method.children():  # each on its own: a joint norm would couple them
            nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        for optimizer in self._optimizers():
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()

    def _skip(self, batch: dict) -> None:
        """Leave weights as they are; stop with the case ids when it does not pass."""
        self.skipped_in_a_row += 1
        cases = f"labelled {', '.join(batch['keys'])}; unlabelled {', '.join(batch.get('unlabeled_keys', ['none']))}"
        self.print_to_log_file(f"WARNING: loss not finite, step {self.step} skipped. Patches from {cases}")
        if self.skipped_in_a_row >= SKIPS_TO_STOP:
            raise DivergedError(
                f"loss not finite in {SKIPS_TO_STOP} steps in a row, last with patches from {cases}. Look at these "
                "images, or lower the learning rate, e.g. _lr0p001 in the trainer name."
            )

    # --------------------------------------------------------------------------------------------- the epoch
    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As stock; the series of this epoch are averaged over steps (and ranks)."""
        super().on_train_epoch_end(train_outputs)
        steps = [{name: float(value) for name, value in figures.items()} for figures in self.figures]
        row = epoch_means(steps)
        row["skipped_steps"] = sum(step["skipped_steps"] for step in steps)
        self.epoch_row = mean_row(row)

    def validation_step(self, batch: dict) -> dict:
        """As stock for the student, and once more for the teacher."""
        target = batch["target"]
        if self.label_manager.has_ignore_label:  # stock overwrites the ignore label in place
            copy = [t.clone() for t in target] if isinstance(target, list) else target.clone()
        else:
            copy = target
        with self._autocast() if self.settings.bf16 else nullcontext():
            outputs = super().validation_step({**batch, "target": copy})
            with self._as_network(self.method.teacher.network):
                teacher = super().validation_step(batch)
        return {**outputs, **{f"teacher_{name}": teacher[name] for name in ("tp_hard", "fp_hard", "fn_hard")}}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As stock; adds the teacher's pseudo Dice per class beside the student's."""
        super().on_validation_epoch_end(val_outputs)
        collated = collate_outputs(val_outputs)
        counts = np.stack([np.sum(collated[f"teacher_{name}"], 0) for name in ("tp_hard", "fp_hard", "fn_hard")])
        tp, fp, fn = sum_counts(counts)
        with np.errstate(invalid="ignore"):  # a class that is absent from all patches has no Dice
            teacher = 2 * tp / (2 * tp + fp + fn)
        student = self.logger.get_value("dice_per_class_or_region", step=-1)
        for name, ours, theirs in zip(self._class_names(), student, teacher, strict=True):
            self.epoch_row[f"dice_student_{name}"] = float(ours)
            self.epoch_row[f"dice_teacher_{name}"] = float(theirs)

    def on_epoch_end(self) -> None:
        """As stock; the series go into the log, the CSV and the picture, before the checkpoint that holds them."""
        self.history.add(self.current_epoch, self.epoch_row)
        self._log_series()
        for name in unseen_classes(self.history, self._class_names()) if self.method_type.uses_unlabeled else ():
            self.print_to_log_file(
                f"WARNING: the teacher does not show class '{name}' (pseudo Dice 0). Its unlabelled targets now "
                "teach the student that this class is absent. Where this stays, train anew with a slower start: "
                "_ramp0p6 in the name (BCP: _pretrain0p4)."
            )
        super().on_epoch_end()
        if self.local_rank == 0:
            folder = Path(self.output_folder)
            self.history.write_csv(folder / "ssl_history.csv")
            self.history.plot(folder / "ssl_progress.png")

    def _log_series(self) -> None:
        """Give every figure to nnU-Net's logger (and through it to W&B), one value per epoch."""
        store = self.logger.local_logger.my_fantastic_logging
        for name in self.history.columns[1:]:
            series = store.setdefault(f"ssl_{name}", [])
            series.extend([float("nan")] * (self.current_epoch - len(series)))
            self.logger.log(f"ssl_{name}", self.epoch_row.get(name, float("nan")), self.current_epoch)
        figures = " ".join(f"{name} {value:.4g}" for name, value in self.epoch_row.items())
        self.print_to_log_file(f"ssl {figures}")

    def _class_names(self) -> list[str]:
        regions = self.label_manager.has_regions
        kept = self.label_manager.foreground_regions if regions else self.label_manager.foreground_labels
        names = {str(value): name for name, value in self.dataset_json["labels"].items()}
        return [names.get(str(list(k) if isinstance(k, tuple) else int(k)), str(k)) for k in kept]

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As stock for the student; then for the method's other models, each in a sub-folder of its name."""
        super().perform_actual_validation(save_probabilities)
        folders = self.output_folder, self.output_folder_base
        for name, network in self.method.models(unwrap(self.network)).items():
            self.print_to_log_file(f"Final validation, {name}:")
            # Both, since a cascade's first stage writes its predictions below the second.
            self.output_folder = self.output_folder_base = os.path.join(folders[0], name)
            try:
                with self._as_network(network):
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
        decoder = getattr(network, "decoder", None)
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
        write_checkpoint(checkpoint, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As stock, then our key; a checkpoint without it starts the method anew."""
        checkpoint = read_checkpoint(Path(filename_or_checkpoint))
        state = checkpoint.get(KEY)
        if state is not None:
            compare_settings(state["settings"], asdict(self.settings), self.output_folder)
        super().load_checkpoint(filename_or_checkpoint)
        if state is None:
            self.print_to_log_file(
                f"WARNING: {filename_or_checkpoint} has no '{KEY}' entry (another trainer wrote it): network, "
                "optimiser, epoch and schedules go on; teacher and all that the method adds start anew."
            )
            self.step = self.current_epoch * self.num_iterations_per_epoch
            self.method.start(unwrap(self.network))
        else:
            restore(self, state)
        self.restored = state or {}

    # ------------------------------------------------------------------------------------------------- helpers
    def _method_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.method.parameters() if parameter.requires_grad]

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self.method_optimizer is None else [self.optimizer, self.method_optimizer]

    def _no_sync(self, wanted: bool) -> AbstractContextManager:
        return self.network.no_sync() if wanted and self.is_ddp else nullcontext()

    def _autocast(self) -> AbstractContextManager:
        """As stock on CUDA; bf16 where option `bf16` asks for it, on CUDA and CPU."""
        if self.settings.bf16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()
