"""What a configuration of the workflow may hold, and errors about it in one line."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

SCHEMA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("configuration.schema.yaml").read_text("utf-8"))


class ConfigurationError(ValueError):
    """A configuration that cannot be used; one line says which key is wrong and what to write."""


def check(config: Mapping[str, Any]) -> None:
    """Raise ConfigurationError with one line about the first key that does not fit the schema."""
    found = best_match(Draft202012Validator(SCHEMA).iter_errors(dict(config)))
    if found is None:
        return
    where = ": ".join(map(str, found.absolute_path)) or "the configuration"
    if found.validator == "additionalProperties":
        key = next(key for key in found.instance if key not in found.schema["properties"])
        near = difflib.get_close_matches(str(key), sorted(found.schema["properties"]), n=1, cutoff=0.0)
        raise ConfigurationError(f"{where} has the unknown key {key!r}; did you mean {near[0]}?")
    if found.validator in ("required", "dependentRequired"):
        missing = re.findall(r"'([^']*)' is a (?:required property|dependency of)", found.message)[0]
        raise ConfigurationError(f"{where}: {missing} is missing; see docs/experiments.md")
    path = list(found.absolute_path)
    while path and "description" not in schema_of(path):  # then that of the list or mapping that holds it
        path.pop()
    where, value = ": ".join(map(str, path)) or "the configuration", config
    for key in path:
        value = value[key]
    said = f"has {found.instance!r}" if "propertyNames" in found.absolute_schema_path else f"is {value!r}"
    raise ConfigurationError(f"{where} {said}; {schema_of(path)['description']}")


def schema_of(path: Sequence[Any]) -> dict[str, Any]:
    """Return what the schema says of a place in the configuration."""
    schema = SCHEMA
    for key in path:
        schema = schema.get("properties", {}).get(key, schema.get("additionalProperties") or schema.get("items") or {})
        if "$ref" in schema:
            schema = {**SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]], **schema}
    return schema


def words_of(text: Any, where: str) -> list[str]:
    """Return the words of a text as a shell takes them.

    Raises
    ------
    ConfigurationError
        About `where`, if a quotation mark is left open.
    """
    try:
        return shlex.split(str(text))
    except ValueError as error:
        raise ConfigurationError(f"{where} is {text!r}: {error}; close every quotation mark") from None


def filled(text: str, known: Mapping[str, Any], where: str) -> str:
    """Return a text with each `{name}` replaced by what is known of this name.

    Raises
    ------
    ConfigurationError
        About `where`, for another name.
    """
    try:
        return text.format(**known)
    except (KeyError, IndexError, ValueError) as error:
        names = ", ".join(f"{{{name}}}" for name in known)
        raise ConfigurationError(f"{where} has the unknown {{{error.args[0]}}}; known are {names}") from None


def method_of(name: str, entry: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method with what it has from the whole configuration; raises ConfigurationError if it cannot be used."""
    where = f"methods: {name}"
    entry = {"trainer": entry} if isinstance(entry, str) else dict(entry)
    if ("trainer" in entry) == ("command" in entry):
        raise ConfigurationError(f"{where}: give a trainer, or a command with the folder training, and not both")
    method = {
        "ids": {},
        "options": settings["options"],
        "seeds": settings["seeds"],
        "weights": settings["weights"],
        **entry,
    }
    if "seed" in re.split(r"[_\d]", "_".join([str(method.get("trainer")), str(method["options"])])):
        raise ConfigurationError(f"{where}: the trainer's name has a seed; leave it to seeds")
    labeled = entry.get("labeled")
    method["labeled"] = (
        None if labeled is None else {str(n) for n in (labeled if isinstance(labeled, list) else [labeled])}
    )
    return method
