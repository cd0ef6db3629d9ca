"""Command line of a converter: as `nnUNetv2_dycon convert`, and by path from a checkout."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nnunetv2_dycon.exit_codes import exit_code


def converter_parser(name: str, dataset_id: int, protocols: Sequence[str]) -> argparse.ArgumentParser:
    """Return the arguments that all converters share; a converter adds its own.

    Parameters
    ----------
    name : str
        Name of the collection.
    dataset_id : int
        Default id.
    protocols : sequence of str
        Published protocols, the default first.
    """
    parser = argparse.ArgumentParser(
        f"nnUNetv2_dycon convert {name}",
        description=f"Write {name} as an nnU-Net raw data set with labelled, unlabelled and test cases.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the downloaded collection")
    parser.add_argument(
        "-d", dest="dataset_id", type=int, default=dataset_id, help=f"dataset id (default: {dataset_id})"
    )
    parser.add_argument(
        "--labeled",
        required=True,
        help="labelled cases: a fraction (0.1), a number (8), all, or a file with one id per line",
    )
    parser.add_argument("--labeled_seed", type=int, help="draw them with this seed, instead of the published ones")
    parser.add_argument(
        "--protocol",
        help=f"lists of training, validation and test cases: {', '.join(protocols)} or a JSON file "
        f"(default: {protocols[0]})",
    )
    parser.add_argument(
        "-np", dest="processes", type=int, help="worker processes (default: one per processor, at most 8)"
    )
    parser.add_argument("--dry_run", action="store_true", help="only report the plan, write nothing")
    parser.add_argument("--strict", action="store_true", help="refuse a collection that lacks cases of the protocol")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that this converter made")
    return parser


def run_script(function: Callable[..., Any], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse, convert, print; returns the exit code, as `exit_code`.

    Parameters
    ----------
    function : callable
        The converter.
    parser : argparse.ArgumentParser
        Its arguments.
    argv : sequence of str, optional
        Command line; that of the process by default.
    """

    def convert() -> int:
        arguments = vars(parser.parse_args(argv))
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        result = function(**arguments)
        print(result, flush=True)  # before the line on stderr
        print(f"next: {result.then}", file=sys.stderr)
        return 0

    return exit_code(convert)
