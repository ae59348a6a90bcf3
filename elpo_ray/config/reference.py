"""Every key of a schema with its type, default and explanation, read from the schema's source.

The explanation of a key is the string below its field; Python does not keep it, so the source is
parsed. `markdown` is the configuration reference of the documentation.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from itertools import groupby
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from elpo_ray.config import Config
from elpo_ray.config.rules import Names


@dataclass(frozen=True, slots=True)
class Key:
    """One key as a user writes it."""

    name: str
    """The name with its sections: `learner.optimizer.lr`."""
    type: str
    """The type with its bounds: `float > 0`."""
    default: str
    explanation: str


def keys(schema: type[Any] = Config, prefix: str = "", owner: Any = None) -> Iterator[Key]:
    """The keys of a dataclass and of the dataclasses in it, in order. Where `owner`, an object of
    the class, is given, its values are the defaults."""
    hints, texts = get_type_hints(schema, include_extras=True), explanations(schema)
    for field in fields(schema):
        kind, name = hints[field.name], prefix + field.name
        default = _default(field) if owner is None else getattr(owner, field.name)
        if is_dataclass(kind) and isinstance(kind, type):
            yield from keys(kind, f"{name}.", default)
        else:
            text = " ".join(part for part in (texts.get(field.name), _options(kind)) if part)
            yield Key(name, _name(kind), _written(default), text)


def markdown(**schemas: type[Any]) -> str:
    """A page with one table for each section of a run's configuration, and one for each of the
    further `schemas`, whose title is the command that reads it. A key of a further schema is left
    out where a run has a key of the same name and explanation."""
    lines = [
        "# Configuration reference",
        "",
        "These are all keys of a run, as the schema in `elpo_ray/config/` has them. On the command",
        "line `key=value` overrides a key. The defaults are the schema's; the files in `conf/`",
        "hold what an experiment sets.",
    ]
    of_a_run = list(keys())
    for section, found in groupby(of_a_run, _section):
        lines += _table(section, found)
    known = {(key.name, key.explanation) for key in of_a_run}
    for command, schema in schemas.items():
        own = (key for key in keys(schema) if (key.name, key.explanation) not in known)
        lines += _table(f"Further keys of `elpo {command.replace('_', ' ')}`", own)
    return "\n".join(lines) + "\n"


def _section(key: Key) -> str:
    first, dot, _ = key.name.partition(".")
    return first if dot else "run"


def _table(title: str, rows: Iterable[Key]) -> list[str]:
    lines = ["", f"## {title}", "", "| key | type | default | |", "|---|---|---|---|"]
    for key in rows:
        cells = (f"`{key.name}`", f"`{key.type}`", f"`{key.default}`", key.explanation)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return lines


def explanations(schema: type[Any]) -> dict[str, str]:
    """The strings below the fields of a class, inherited ones included, or below the options of a
    choice, by name."""
    inherited = [each for each in schema.__bases__ if is_dataclass(each)]
    texts = {name: text for each in inherited for name, text in explanations(each).items()}
    (node,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(node, ast.ClassDef)
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case (
                (ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)])),
                ast.Expr(ast.Constant(value=str(text))),
            ):
                texts[name] = " ".join(text.split())
    return texts


def _options(kind: Any) -> str:
    """What a choice is about, and what its options mean."""
    kind = next((names.builtin for names in _names(kind)), kind)
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        return ""
    about = " ".join((kind.__doc__ or "").split())
    return " ".join([about, *(f"`{name}`: {text}" for name, text in explanations(kind).items())])


def _name(kind: Any) -> str:
    """A type as a user thinks of it, with its bound; a choice is given by its options."""
    for names in _names(kind):
        known = f"{names} or module:attribute" if names.dotted else str(names)
        return f"{known} or null" if type(None) in get_args(kind) else known
    if get_origin(kind) is Annotated:
        return f"{_name(get_args(kind)[0])} {get_args(kind)[1]}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(option.value) for option in kind)
    if isinstance(kind, type):
        return kind.__name__
    inner = [_name(each) for each in get_args(kind)]
    if get_origin(kind) is list:
        return f"list of {inner[0]}"
    if get_origin(kind) is tuple:
        return f"list of {len(inner)} {inner[0]}"
    if get_origin(kind) is dict:
        return f"{inner[0]} -> {inner[1]}"
    return " or ".join("null" if each == "NoneType" else each for each in inner) or str(kind)


def _names(kind: Any) -> list[Names]:
    """The built-in names among which a key, or one that may be null, chooses."""
    own = [each for each in get_args(kind) if isinstance(each, Names)]
    optional = type(None) in get_args(kind)
    return own or [names for each in get_args(kind) if optional for names in _names(each)]


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    assert field.default_factory is not MISSING, f"{field.name} has no default"
    return field.default_factory()


def _written(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
        case _:
            return str(value)
