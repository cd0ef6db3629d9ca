"""What loader processes hand their batches over with, shared memory and open files: how much there is and is needed."""

import os

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]  # a module or nothing

FOLDER = "/dev/shm"
# nnU-Net's planner crashes on 0 loader processes, so the variable must not stay for other commands.
TRAININGS_ONLY = "for trainings alone: nnU-Net's planning fails with it"
REMEDY = (
    "give a container more (docker run --shm-size=8g), or train without loader processes: type nnUNet_n_proc_DA=0 in "
    f"front of nnUNetv2_train ({TRAININGS_ONLY})"
)
_PAGE = 4096
_OTHER_FILES = 64  # that a training has open: libraries, pipes, the log


def free_bytes(folder: str = FOLDER) -> int | None:
    """Return the free bytes of shared memory, None where it has no size of its own (macOS, Windows)."""
    try:
        found = os.statvfs(folder)
    except (AttributeError, OSError):
        return None
    return found.f_bavail * found.f_frsize


def pages(size: int) -> int:
    """Return the bytes that an object of `size` bytes takes: whole pages.

    Examples
    --------
    >>> pages(1), pages(4096), pages(4097)
    (4096, 4096, 8192)
    """
    return -(-size // _PAGE) * _PAGE


def waiting_batches(processes: int, cached: int, *, pinned: bool) -> int:
    """Return how many batches wait in shared memory when the training is slower than its loader processes.

    Parameters
    ----------
    processes : int
        Loader processes; each holds a batch that it cannot hand over yet.
    cached : int
        Places of the queue of the processes, and as many of the one that the training takes its batches from.
    pinned : bool
        Whether they are copied to pinned memory, for a GPU, on the way to the second queue.

    Examples
    --------
    >>> waiting_batches(processes=2, cached=6, pinned=False)  # 6 + 6 queued, 2 behind, 1 between, 1 in use
    16
    >>> waiting_batches(processes=2, cached=6, pinned=True)
    10
    """
    return (1 if pinned else 2) * cached + processes + 2


def file_shortage(tensors: int) -> str | None:
    """Return what is wrong and what to type, in one line, if a training may not open a file for each waiting tensor.

    Parameters
    ----------
    tensors : int
        Tensors of all batches that wait at one time: each is an open file.
    """
    if resource is None:
        return None
    needed, allowed = tensors + _OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed in (-1, resource.RLIM_INFINITY) or allowed >= needed:
        return None
    return f"{allowed} files may be open, {needed} are needed; type: ulimit -n {max(4096, needed)}"


def memory_shortage(free: int | None, needed: int) -> str | None:
    """Return what is wrong and what to type, in one line, if less is free than needed; otherwise None.

    Parameters
    ----------
    free : int or None
        As `free_bytes`.
    needed : int
        Bytes.
    """
    if free is None or free >= needed:
        return None
    return f"{in_words(free)} of shared memory are free in {FOLDER}, {in_words(needed)} are needed; {REMEDY}"


def in_words(size: int) -> str:
    """Return a number of bytes for people.

    Examples
    --------
    >>> in_words(64 * 1024**2), in_words(1_500_000_000), in_words(3000)
    ('64 MB', '1.4 GB', '3 kB')
    """
    for unit, name, digits in ((1024**3, "GB", 1), (1024**2, "MB", 0)):
        if size >= unit:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size / 1024:.0f} kB"
