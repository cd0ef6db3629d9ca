"""The passes of a method's step, to be run one at a time in a test."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from nnunetv2_dycon.step import Batch, Cost, Method, Pass, run_pass


def costs_of(method: Method, student: nn.Module, batch: Batch, t: float = 1.0) -> tuple[Callable[[], Cost], ...]:
    """Return one callable per pass, in order; each runs its pass with the teacher's answer to the one run before.

    `t` is the fraction of the training that is done.
    """
    batch = replace(batch, now={name: value(t) for name, value in method.settings.schedules().items()})
    answers = [None]

    def run(p: Pass) -> Cost:
        cost, answer = run_pass(p, batch, answers[-1])
        answers.append(answer)
        return cost

    return tuple(partial(run, p) for p in method.passes(student, batch))
