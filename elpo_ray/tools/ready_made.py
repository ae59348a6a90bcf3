"""What the ready-made tools share: how their entries in `task.tools` are read.

An entry is a mapping whose first key says which tool it is, as in `{search: corpus.jsonl, k: 5}`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from elpo_ray.tools.schemas import NAME


def read_entry(where: str, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The entry's values over the defaults of its keys. A key whose default is a type must be
    given. ValueError, which begins with `where`, for an unknown key and for a value of another type
    than the default's (null stands for any)."""
    values: dict[str, Any] = {}
    for key in entry:
        if key not in defaults:
            raise ValueError(f"{where}: no key {key}; it has {', '.join(defaults)}")
    for key, default in defaults.items():
        kind = default if isinstance(default, type) else type(default)
        value = entry.get(key, default)
        known = default is None or isinstance(value, kind)
        if not known or (kind is int and (isinstance(value, bool) or value < 1)):
            wanted = {str: "a text", int: "a whole number of 1 or more", bool: "true or false"}
            raise ValueError(f"{where}: {key} must be {wanted.get(kind, f'a {kind.__name__}')}")
        values[key] = value
    return values


def needs(where: str, package: str) -> None:
    """ValueError unless an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{where}: the package {package} is missing; pip install 'elpo_ray[tools]'"
        )


def check_name(where: str, name: str) -> None:
    """ValueError unless a tool can be called so."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{where}: {name!r} is no name of a tool; use letters, digits, _ and -, at most 64"
        )
