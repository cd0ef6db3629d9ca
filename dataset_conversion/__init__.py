"""One converter for each public collection; installed as `nnunetv2_dycon.dataset_conversion`."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from nnunetv2_dycon.errors import ConfigError

CONVERTERS = {
    "ISLES22": "Dataset501_ISLES22",
    "BraTS19": "Dataset502_BraTS19",
    "LA": "Dataset503_LA",
    "PancreasNIH": "Dataset504_PancreasNIH",
    "BTCV": "Dataset505_BTCV",
}


def converter(collection: str) -> ModuleType:
    """Return the module of a collection's converter; upper and lower case make no difference.

    Raises
    ------
    ConfigError
        If the collection has no converter.
    """
    for name, module in CONVERTERS.items():
        if name.lower() == collection.lower():
            return importlib.import_module(f"nnunetv2_dycon.dataset_conversion.{module}")
    raise ConfigError(
        f"no converter is called {collection!r}; there are {', '.join(CONVERTERS)}; for any other data set type: "
        "nnUNetv2_dycon split --help"
    )


def convert_collection(collection: str, arguments: Sequence[str]) -> Any:
    """Run the converter of a collection with the arguments of its command line; returns its `Conversion`."""
    module = converter(collection)
    return module.convert_collection(**vars(module.parser().parse_args(arguments)))
