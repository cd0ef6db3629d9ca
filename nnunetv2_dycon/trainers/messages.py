"""The last line of a training that could not go on: what to type, in place of a traceback."""

import errno
import os
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

from nnunetv2_dycon.checkpoint import read_checkpoint
from nnunetv2_dycon.data.dataset_json import FILE
from nnunetv2_dycon.errors import UserError
from nnunetv2_dycon.files import cannot_write, first_few
from nnunetv2_dycon.trainers.names import nearest_trainer
from nnunetv2_dycon.trainers.planned import copy_again, unreadable
from nnunetv2_dycon.trainers.results import GO_ON

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

_STOPPED = "stopped by Ctrl-C; to go on, type the same command with --c"
# How errors of nnU-Net begin that are understood as they are; only their traceback goes.
_CLEAR = (
    "Requested configuration",
    "dataset_name_or_id must",
    "Cannot set --c and --val",
    "Cannot both continue",
    "More than one dataset name",
)


def end_in_one_line() -> None:
    """Let this process end in one line after an error that a user can mend. Other errors keep their traceback.

    nnU-Net's commands catch nothing. Does nothing when called again.
    """
    if not isinstance(sys.excepthook, partial) or sys.excepthook.func is not _show:
        sys.excepthook = partial(_show, sys.excepthook)


def _show(before: Hook, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    stopped = isinstance(error, KeyboardInterrupt)
    line = _STOPPED if stopped else explain(error)
    if line is None:
        before(kind, error, traceback)
        return
    sys.stdout.flush()  # what a training prints would follow in a file that has both
    sys.stderr.write(f"{'' if stopped else 'error: '}{line}\n")
    # As the process ends, threads of nnU-Net's loaders complain that their workers are gone.
    threading.excepthook = lambda _: None


def explain(error: BaseException) -> str | None:
    """Return one line that says what a user can do about an error; None for one that needs its traceback.

    Parameters
    ----------
    error : BaseException
        One of ours, or of nnU-Net.
    """
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if text.startswith(_CLEAR):
        return text
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return str(cannot_write(Path(error.filename or os.environ.get("nnUNet_results", "")), error, GO_ON))
    return _of_planning(error) or _of_pretrained_weights(error, text) or _of_names(error, text)


def _of_planning(error: BaseException) -> str | None:
    """Return what is wrong with the plans or dataset.json, which nnU-Net's command reads before it makes a trainer."""
    from nnunetv2.run.run_training import get_trainer_from_args

    if isinstance(error, FileNotFoundError):  # of a name that was mistyped, or of what was not planned
        return None
    traceback = walk_tb(error.__traceback__)
    frames = [frame for frame, _ in traceback if frame.f_code is get_trainer_from_args.__code__]
    return unreadable(Path(frames[0].f_locals["plans_file"])) if frames and "plans_file" in frames[0].f_locals else None


def _of_pretrained_weights(error: BaseException, text: str) -> str | None:
    """Return what is wrong with the file of -pretrained_weights."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code is load_pretrained_weights.__code__]
    if not frames:
        return None
    path, mend = Path(frames[0].f_locals["fname"]), "give -pretrained_weights another file"
    try:
        read_checkpoint(path, "network_weights", mend=mend)
    except UserError as reason:
        return str(reason)
    key = re.search(r"[Kk]ey (\S+) is", text) or re.search(r"key (\S+)", text)
    where = f" ({key[1]})" if key else ""
    return f"the network in {path} is not the one that is trained{where}; {mend}, or plan with its plans"


def _of_names(error: BaseException, text: str) -> str | None:
    """Return what to type in place of a name, or of a flag, that nnU-Net did not find."""
    if found := re.match(r"Could not find requested nnunet trainer (\S+)", text):
        near = nearest_trainer(found[1])
        return near and f"there is no trainer {found[1]}: type -tr {near}"
    if text.startswith("Cannot run validation because the training is not finished"):
        return "--val is for a finished training, and this one is not; type the same command with --c in its place"
    if found := re.match(r"Could not find a dataset with the ID (\d+)", text):
        return f"there is no data set {found[1]}; {_data_sets()}"
    preprocessed = Path(os.environ.get("nnUNet_preprocessed", ""))
    if isinstance(error, FileNotFoundError) and preprocessed in Path(error.filename or "").parents:
        return _of_plans(Path(error.filename), preprocessed)
    return None


def _data_sets() -> str:
    variables = ("nnUNet_raw", "nnUNet_preprocessed")
    there = {path.name for name in variables for path in Path(os.environ.get(name) or "none").glob("Dataset*_*")}
    known = f"there are {first_few(sorted(there))}" if there else "there is none"
    return f"{known} in nnUNet_raw={os.environ.get('nnUNet_raw')}; correct the number or the variable"


def _of_plans(path: Path, preprocessed: Path) -> str:
    dataset = path.relative_to(preprocessed).parts[0]
    number = re.match(r"Dataset(\d+)_", dataset)
    if number is None or not any(
        Path(os.environ.get(name) or "none", dataset).is_dir() for name in ("nnUNet_raw", "nnUNet_preprocessed")
    ):
        return f"there is no data set {dataset}; {_data_sets()}"
    files = sorted(path.parent.glob("*.json"))
    plans = [file.stem for file in files if '"plans_name"' in file.read_text(errors="replace")]
    if path.name == FILE and plans:
        return f"{path} does not exist; {copy_again(path.parent)}"
    if path.suffix == ".json" and plans:
        return f"{path} does not exist; the plans there are {first_few(plans)}: give -p one of them"
    return f"{path} does not exist; type: nnUNetv2_plan_and_preprocess -d {int(number[1])}"
