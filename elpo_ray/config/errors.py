"""What a user reads when a configuration is wrong: one line with key, value and remedy.

Hydra and OmegaConf spread these three over several lines and exceptions; the schema's own
`ValueError`s already have the form and pass through.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from elpo_ray.config import Config
from elpo_ray.config.meant import example, kind_of, meant, said


def explain(
    error: BaseException, root: type = Config, values: Mapping[str, Any] | None = None
) -> str | None:
    """The one line for a composition error or a `ValueError` of ours; None for any other error.
    `root` is the schema that the command line is checked against; `values` are what was checked,
    nested, where that was no command line."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = "\n".join(str(link) for link in chain)
    override = re.search(
        r"(?:Error merging override|Error parsing override|To append to your config use) "
        r"'?\+*([^'\n]+)",
        text,
    )
    key = _full_key(chain) or (override[1].partition("=")[0] if override else None)
    if match := re.search(
        r"Could not find '([^']+)'\s+Available options in '([^']+)':(.*)", text, re.S
    ):
        wanted, group, rest = match.groups()
        options = [line.strip() for line in rest.split("\n") if line.startswith("\t")]
        options = [o for o in options if "=" not in o]
        name = wanted.removeprefix(group + "/")
        other = f", or write model.path={name}" if group == "model" else ""
        return f"{group}={name}: no such option; choose one of {', '.join(options)}{other}"
    if match := re.search(r"Could not override '(\w+)'\.\s*No match in the defaults list", text):
        return f"{match[1]}: this group is added, not overridden; write +{match[1]}=OPTION"
    if re.search(r"Key '[^']*' (?:is )?not in", text) and key is not None:
        word, _, value = override[1].partition("=") if override else (key, "", "")
        if word.startswith(f"{key}."):
            key = word  # Hydra names the first part that is unknown
        given = value if override and word == key else _value_at(key, values or {})
        shown = isinstance(given, str | int | float) and given != ABSENT
        return unknown_key(key, root, given if shown else None)
    if match := re.search(r"Multiple values for (\w+)\.", text):
        return f"{match[1]}: chosen more than once; leave one {match[1]}=OPTION"
    unread = next((word for word in (getattr(e, "override", None) for e in chain) if word), None)
    if unread is not None:
        return _unreadable(unread, root)
    if "Error parsing override" in text and override:
        return f"{override[1]}: not of the form key=value; write for example {example(root)}"
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'\n", text):
        listed = shlex.quote(f"{match[1]}=[{match[2]}]")
        text_of_it = _quoted(match[1], match[2])
        return f"{match[1]}={match[2]}: for a list write {listed}, for a text {text_of_it}"
    if key is not None:
        value = override[1].partition("=")[2] if override else _value_at(key, values or {})
        if get_origin(kind_of(key, root)) is list and override:
            listed = shlex.quote(f"{key}=[{value}]")
            return f"{key}={value}: give a list, as in {listed}; [] is an empty one"
        reason = next(line for link in reversed(chain) for line in str(link).split("\n") if line)
        return f"{key}={value}: {reason[0].lower()}{reason[1:]}; give {_expected(key, root)}"
    if type(error) is ValueError:
        return " ".join(str(error).split("\n"))
    if error.__class__.__module__.split(".")[0] in ("hydra", "omegaconf"):
        return " ".join(text.split())
    return None


LIST = "a list, as in [a, b]; [] is an empty one"
MAPPING = "names with values, as in {name: value}"
PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
ABSENT = "?"
"""Stands for a value that is not known."""


def _unreadable(word: str, root: type) -> str:
    """The line for a word of a command line that Hydra cannot read."""
    key, equals, value = word.partition("=")
    shown = " ".join(word.lstrip("+").split())
    if not equals or not re.fullmatch(r"[+~]*[\w./@-]+", key):
        return f"{shown}: not of the form key=value; write for example {example(root)}"
    if not key.isascii():
        return unknown_key(key.lstrip("+~"), root, value)
    if not value.isprintable():
        return f"{shown}: the value has a line break or another control character; leave it out"
    if value[:1] in tuple("[{\"'"):
        return (
            f"{shown}: the value cannot be read; close every bracket and quote, and put texts in "
            "it in double quotes where they have other signs than letters, digits and ._/:-"
        )
    return (
        f"{shown}: the value has signs that must be quoted, once for the value and once for the "
        f"shell; write {_quoted(key, value)}"
    )


def _quoted(key: str, value: str) -> str:
    """An override whose value is text, as a shell reads it."""
    escaped = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def unknown_key(key: str, root: type = Config, value: Any = None) -> str:
    """The line for a key that the schema does not have, with the keys that may be meant."""
    shown = key if value in (None, "") else f"{key}={value}"
    if (instead := said(key)) is not None:
        return f"{shown}: unknown key; {instead}"
    if found := meant(key, root):
        return f"{shown}: unknown key; did you mean {' or '.join(found)}?"
    parent = key.rpartition(".")[0]
    while not is_dataclass(owner := kind_of(parent, root) if parent else root):
        parent = parent.rpartition(".")[0]
    names = ", ".join(field.name for field in fields(owner))
    return f"{shown}: unknown key; keys of {parent or 'the configuration'}: {names}"


def _full_key(chain: list[BaseException]) -> str | None:
    for link in reversed(chain):
        key = getattr(link, "full_key", None)
        if key:
            return str(key)
    return None


def _value_at(key: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found.get(part, ABSENT) if isinstance(found, Mapping) else ABSENT
    return found


def mismatch(kind: Any, value: Any) -> str | None:
    """The form that a key of type `kind` wants, if that is a list or a mapping and `value` is
    neither that nor a reference; else None."""
    if isinstance(value, str) and value.startswith("${"):
        return None
    wanted = get_origin(kind)
    if wanted is list and not isinstance(value, list | tuple):
        return LIST
    return MAPPING if wanted is dict and not isinstance(value, Mapping) else None


def _expected(key: str, root: type) -> str:
    kind = kind_of(key, root)
    if kind is None:
        return "a value of the type in elpo_ray/config/"
    if hasattr(kind, "__members__"):
        return "one of " + ", ".join(kind.__members__)
    if is_dataclass(kind):
        return "its keys one by one, as in " + f"{key}.{fields(kind)[0].name}=…"
    if (form := {list: LIST, dict: MAPPING}.get(get_origin(kind))) is not None:
        return form
    others = [each for each in get_args(kind) if each is not NoneType]
    if len(others) == 1 and others[0] in PLAIN:
        return f"{PLAIN[others[0]]}, or null"
    return PLAIN.get(kind, str(kind).replace("None", "null"))
