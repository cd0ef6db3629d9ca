"""How a command ends: an error of the user and Ctrl-C in one line, a reader that has gone without a word."""

import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from nnunetv2_dycon.errors import UserError

OF_THE_USER = 2
INTERRUPTED = 130  # as shells say it: 128 and the number of the signal, SIGINT or SIGPIPE
NOBODY_READS = 141


def exit_code(command: Callable[[], int]) -> int:
    """Run a command to its end and return its exit code.

    Parameters
    ----------
    command : callable
        Returns 0 for success, or 1 for a finding.

    Returns
    -------
    int
        What `command` returns; 2 after an error that the user can mend, 130 after Ctrl-C, 141 where what it prints goes
        into a closed pipe, as in `nnUNetv2_dycon trainers | head`.
    """
    try:
        try:
            return _interruptible(command)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return OF_THE_USER
        except KeyboardInterrupt:
            print("stopped by Ctrl-C; to go on, type the same command again", file=sys.stderr)
            return INTERRUPTED
        finally:
            sys.stdout.flush()  # also after --help, whose error would otherwise come when Python ends
    except BrokenPipeError:
        if not _leave_closed_pipes():
            raise
        return NOBODY_READS


def _interruptible(command: Callable[[], int]) -> int:
    """Run a command; KeyboardInterrupt after Ctrl-C, also where it came in an import, which makes ImportError of it."""
    received = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    try:
        # not where Ctrl-C is ignored, as in a job in the background, and not in a thread, which cannot set it
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with suppress(ValueError):
                signal.signal(signal.SIGINT, interrupt)
        return command()
    except Exception:
        if received:
            raise KeyboardInterrupt from None
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave_closed_pipes() -> bool:
    """Let the streams that nobody reads write to nowhere, and return whether there are any."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed_pipe(stream.fileno())]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _is_closed_pipe(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)  # errors are always reported
    return any(events & select.POLLERR for _, events in poll.poll(0))
