"""Plans that nnU-Net's own classes cannot use are one line."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from nnunetv2_dycon.errors import DataError, UserError

Result = TypeVar("Result")


def reads_plans(function: Callable[..., Result]) -> Callable[..., Result]:
    """Turn what nnU-Net raises over plans that lack an entry, or have one of another type, into one line.

    Parameters
    ----------
    function : callable
        Its first arguments are data set, configuration and plans, as in `find_configuration`.
    """

    @functools.wraps(function)
    def read(dataset: int | str, configuration: str, plans: Any, *args: Any, **keywords: Any) -> Result:
        try:
            return function(dataset, configuration, plans, *args, **keywords)
        except UserError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            name = plans if isinstance(plans, str) else "the plans"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"{name} of data set {dataset} cannot be used for {configuration} ({reason}); "
                f"type: nnUNetv2_plan_and_preprocess -d {dataset} -c {configuration}"
            ) from error

    return read
