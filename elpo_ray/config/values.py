"""Conversions between a checked configuration and plain values with overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from elpo_ray.config.errors import explain

T = TypeVar("T")


SHORT = {"reward": "name"}
"""Keys of `task` that may be given as one value: what the value then is, below the key."""


def expanded(values: Any) -> Any:
    """Nested values of a configuration with their short forms written out: `task: {reward: NAME}`.
    What older run folders hold and no longer means anything is left out."""
    task = values.get("task") if isinstance(values, dict) else None
    if not isinstance(task, dict):
        return values
    task = dict(task)
    for key, below in SHORT.items():
        if isinstance(task.get(key), str):
            task[key] = {below: task[key]}
    if isinstance(task.get("reward"), dict) and task["reward"].get("function", "") is None:
        task["reward"] = {key: value for key, value in task["reward"].items() if key != "function"}
    return values | {"task": task}


def expanded_override(override: str) -> str:
    """The same for one `key=value` of a command line."""
    key, equals, value = override.partition("=")
    for short, below in SHORT.items():
        if key in (f"task.{short}", f"+task.{short}", f"++task.{short}") and value[:1] != "{":
            return f"{key}.{below}{equals}{value}"
    return override


def hydra_override(override: str, schema: type) -> str:
    """A word of a command line as Hydra wants it: short forms written out, and `++` before a key of
    a mapping that may have any keys, so that they need no sign (`task.options.size=3`)."""
    word = expanded_override(override)
    key, equals, _ = word.partition("=")
    owner: Any = schema
    for part in key.split(".") if equals else ():
        owner = get_type_hints(owner).get(part) if is_dataclass(owner) else None
        if get_origin(owner) is dict:
            return f"++{word}"
    return word


def hydra_value(text: str) -> str:
    """A text as the value of an override: in quotes where Hydra would read it in another way."""
    if re.fullmatch(r"[A-Za-z0-9_./:@%+-]+", text):
        return text
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", text) + '"'


def overridden(schema: type[T], values: Any, overrides: Sequence[str]) -> T:
    """The checked dataclass of `values`, then each `key=value` of `overrides`, over `schema`.

    Raises ValueError in one line, as a command over Hydra prints it.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        for override in map(expanded_override, overrides):
            try:
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
            except (OmegaConfBaseException, YAMLError) as error:
                done = "parsing" if isinstance(error, YAMLError) else "merging"
                raise ValueError(f"Error {done} override {override}") from error
        return typed(schema, merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(explain(error, schema)) from None


def typed(schema: type[T], composed: Any) -> T:
    """The checked dataclass. Merged into the schema once more: `+key=value` may have added a key
    that it does not have."""
    plain: Any = OmegaConf.create(expanded(OmegaConf.to_container(composed)))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    assert isinstance(config, schema)
    return config


def plain(config: Any) -> dict[str, Any]:
    """The values of a dataclass as JSON has them, choices by their names."""
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return dict(values)


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
