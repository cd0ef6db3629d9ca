"""What tests of real processes share."""

import signal


def hear_ctrl_c() -> None:
    """Let a process that is about to start hear Ctrl-C, as `preexec_fn` of `subprocess.Popen`.

    A shell without a terminal lets its background processes, and all that they start, ignore it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
