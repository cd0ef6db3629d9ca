"""Trainings of two processes on the CPU, where nnU-Net wraps networks for CUDA alone: a few lines are stood in for.

`by_halves` lets one process draw for a double batch what two processes draw for their halves of it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_dycon import step as step_module
from nnunetv2_dycon.errors import DataError
from nnunetv2_dycon.methods import dycon, magicnet, uamt
from nnunetv2_dycon.trainers.engine import nnUNetTrainerSSL
from nnunetv2_dycon.views import View
from tests.datasets import environment
from tests.training import make_trainer

RANKS = 2


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let nnU-Net's trainers in a process group train on the CPU."""
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock

    made = stock.nnUNetTrainer.__init__

    @wraps(made)  # nnU-Net looks at the signature
    def make(trainer: Any, *arguments: Any, **more: Any) -> None:
        made(trainer, *arguments, **more)
        trainer.device, trainer.grad_scaler = torch.device("cpu"), None

    with ExitStack() as stack:
        for place, name, value in (
            (stock, "DDP", lambda network, device_ids: DistributedDataParallel(network)),
            (stock, "device_count", lambda: RANKS),
            (stock.nnUNetTrainer, "__init__", make),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        yield


def run_ranks(work: Callable[..., Any], root: Path, *arguments: Any, backend: str = "gloo") -> list[Any]:
    """Run `work(rank, *arguments)` in two processes of one group; returns what each gives, in order of ranks.

    Parameters
    ----------
    work : callable
        A function at the top of a module.
    root : Path
        Folder of `make_dataset`.
    backend : {"gloo", "nccl"}
        On the CPU, or each on a GPU of its own.
    """
    (root / "rendezvous").unlink(missing_ok=True)  # a stale one would never let the processes meet
    torch.multiprocessing.spawn(_rank, args=(str(root), work, arguments, backend), nprocs=RANKS)
    return [torch.load(root / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _rank(rank: int, root: str, work: Callable[..., Any], arguments: tuple, backend: str) -> None:
    os.environ.update(environment(Path(root)))
    os.environ.update(nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1", nnUNet_compile="f")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{root}/rendezvous", rank=rank, world_size=RANKS)
    try:
        with on_cpu() if backend == "gloo" else nullcontext():
            torch.save(work(rank, *arguments), f"{root}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def trainer_of(name: str, *, deep_supervision: bool = True, **how: Any) -> Any:
    """Return the trainer of a name, with or without deep supervision."""
    trainer = make_trainer(name, **how)
    trainer.enable_deep_supervision = deep_supervision
    return trainer


def patches(step: int, rank: int, shape: tuple[int, ...] = (16, 16, 16), *, deep_supervision: bool = True) -> dict:
    """What a loader gives a rank at a step: two labelled and two unlabelled patches with blobs of two classes."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    low = torch.rand((4, 1, *(n // 4 for n in shape)), generator=generator)
    y = torch.nn.functional.interpolate(low, shape, mode="trilinear").mul(3).long().clamp(max=2)
    x = y.float() + torch.randn(y.shape, generator=generator).mul(0.3) - 1
    target: Any = y[:2].short()
    if deep_supervision:
        target = [target, target[..., ::2, ::2, ::2]]
    keys = [f"{rank}{kind}{i}" for kind in "lu" for i in range(2)]
    return {"data": x[:2], "target": target, "unlabeled": x[2:], "keys": keys[:2], "unlabeled_keys": keys[2:]}


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of one process that has the patches of all ranks."""
    return {key: _cat([batch[key] for batch in batches]) for key in batches[0]}


def _cat(values: list[Any]) -> Any:
    if torch.is_tensor(values[0]):
        return torch.cat(values)
    if torch.is_tensor(values[0][0]):
        return [torch.cat(each) for each in zip(*values, strict=True)]
    return [key for each in values for key in each]


@contextmanager
def by_halves() -> Iterator[None]:
    """Draw for each half of a batch from its own generator: a step's `generator` is a tuple of them."""
    draw_views, paste_labeled, noisy, sample = (
        step_module.draw_views,
        step_module.paste_labeled,
        uamt.noisy,
        dycon.sample_anchors,
    )

    def views(name: str, x_u: Tensor, x_l: Tensor, y_l: Tensor, ignore: Any, *, generator: Any) -> Iterator[View]:
        halves = zip(*(tensor.chunk(RANKS) for tensor in (x_u, x_l, y_l)), generator, strict=True)
        makers = [draw_views(name, u, x, y, ignore, generator=g) for u, x, y, g in halves]
        yield from map(_joined_views, zip(*makers, strict=True), (x_u for _ in iter(int, 1)))

    def paste(x_l: Tensor, y_l: Tensor, ignore: Any, side: Any, *, generator: Any) -> View:
        halves = zip(x_l.chunk(RANKS), y_l.chunk(RANKS), generator, strict=True)
        return _joined_views([paste_labeled(x, y, ignore, side, generator=g) for x, y, g in halves], None)

    def noise(x: Tensor, generator: Any) -> Tensor:
        return torch.cat([noisy(half, g) for half, g in zip(x.chunk(RANKS), generator, strict=True)])

    def anchors(labels: Tensor, most: int, generator: Any) -> Any:
        chosen = [sample(half, most, g) for half, g in zip(labels.chunk(RANKS), generator, strict=True)]
        return type(chosen[0])(*(torch.cat(part) for part in zip(*chosen, strict=True)))

    draw = magicnet.draw_exchange

    def origins(patches: int, number: int, device: Any, generator: Any) -> Tensor:
        """Cubes change places among the labelled and unlabelled patches of one half."""
        all_patches = torch.arange(patches).view(2, RANKS, -1)  # labelled or not, half, patch
        whole = torch.empty((patches, number), dtype=torch.long)
        for half, g in enumerate(generator):
            mine = all_patches[:, half].flatten()
            whole[mine] = mine[draw(len(mine), number, device, g)]
        return whole

    with ExitStack() as stack:
        for place, name, value in (
            (magicnet, "draw_exchange", origins),
            (step_module, "draw_views", views),
            (step_module, "paste_labeled", paste),
            (uamt, "noisy", noise),
            (dycon, "noisy", noise),
            (dycon, "sample_anchors", anchors),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        yield


def _joined_views(views: Any, whole: Tensor | None) -> View:
    """One view of a batch from those of its halves; a teacher is asked once for all that show it the batch `whole`."""
    first = views[0]

    def cat(name: str) -> Any:
        return None if getattr(first, name) is None else torch.cat([getattr(view, name) for view in views])

    def by_half(name: str) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            parts = zip(views, x.chunk(RANKS), strict=True)
            return torch.cat([getattr(view, name)(part) for view, part in parts])

        return function

    same = whole is not None and all(torch.equal(a, b) for a, b in zip(cat("teacher"), whole, strict=True))
    return View(
        student=cat("student"),
        teacher=whole if same else cat("teacher"),
        mix=by_half("mix"),
        restore=by_half("restore"),
        mixes=first.mixes,
        pasted=cat("pasted"),
        truth=cat("truth"),
        name=first.name,
        share=first.share,
    )


def _fail(trainer: Any, outputs: Any) -> None:
    raise DataError("case u_01 cannot be read; restore it")


def run_nnunet(name: str, **options: Any) -> None:
    """Train as `nnUNetv2_train -num_gpus 2` does: nnU-Net's own start of processes, on the CPU."""
    from nnunetv2.run import run_training

    with mock.patch.object(run_training, "run_ddp", run_ddp):
        run_training.run_training("901", "3d_fullres", 0, name, num_gpus=RANKS, device=torch.device("cuda"), **options)


def run_ddp(rank: int, *arguments: Any) -> None:
    """nnU-Net's process of a rank, which notes every file that it opens for writing or renames."""
    from nnunetv2.run import run_training

    torch.set_num_threads(1)
    results = os.environ["nnUNet_results"]

    def note(event: str, details: tuple) -> None:
        path = None
        if event == "open" and isinstance(details[0], str) and set(details[1] or "") & set("wax+"):
            path = details[0]
        elif event == "os.rename":
            path = os.fspath(details[1])
        if path is not None and path.startswith(results):
            written.append(path)

    written: list[str] = []
    sys.addaudithook(note)
    stand_ins = (
        mock.patch.object(
            run_training, "setup_ddp", lambda r, n: dist.init_process_group("gloo", rank=r, world_size=n)
        ),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch("nnunetv2_dycon.trainers.engine.check_machine"),  # it would ask for the missing GPU
    )
    with on_cpu(), stand_ins[0], stand_ins[1], stand_ins[2]:
        if rank == int(os.environ.get("FAILING_RANK", "-1")):
            nnUNetTrainerSSL.on_train_epoch_end = _fail
        run_training.run_ddp(rank, *arguments)
    Path(results, f"written_{rank}.txt").write_text("\n".join(written))
