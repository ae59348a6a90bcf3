"""The schema of a tool from its function: type hints and a docstring, checked before a run."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from elpo_ray.tools.sources import Schema

NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{0,63}")
"""What model servers and chat templates take for a tool's name."""
PLAIN = (str, int, float, bool, type(None), list, tuple, dict, Any)
EXAMPLE = 'use str, int, float, bool, list, dict, Literal["a", "b"] or "X | None"'


def schema_of(where: str, function: Callable[..., Any]) -> Schema:
    """The OpenAI schema of a function or a bound method. ValueError, in one line that begins with
    `where` and names the tool, if docstring or types do not say what a schema needs."""
    name = getattr(function, "__name__", "")  # a partial and an object with __call__ have none
    start = f"{where}: tool {name or type(function).__name__}"
    if not NAME.fullmatch(name):
        raise ValueError(f"{start} has no usable name; use a function defined with def")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"{start} yields; collect what it yields, and return that")
    if not (inspect.getdoc(function) or "").strip():
        raise ValueError(f"{start} has no docstring; say what it does, with an Args: section")
    _check_parameters(start, function)
    from transformers.utils.chat_template_utils import (  # seconds to import
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        made: dict[str, Any] = get_json_schema(function)["function"]
    except DocstringParsingException as error:
        missing = re.search(r"argument '(\w+)'", str(error))
        lacks = f"no line for {missing[1]}" if missing else "no description"
        raise ValueError(
            f"{start}: its docstring has {lacks}; add `{missing[1] if missing else 'name'}: what "
            "it is` under Args:, without the type"
        ) from None
    except (TypeHintParsingException, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{start}: its types or docstring make no schema ({reason})") from None
    if not made["description"]:
        raise ValueError(f"{start}: its docstring has no description; begin with what it does")
    made.pop("return", None)
    return {"type": "function", "function": made}


def _check_parameters(start: str, function: Callable[..., Any]) -> None:
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, AttributeError) as error:
        raise ValueError(f"{start}: its type hints cannot be read ({error}); mend them") from None
    for parameter in parameters_of(start, function):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{start} takes {parameter}; name each parameter, with its type")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"{start}: parameter {parameter.name} cannot be given by name; remove the /"
            )
        if parameter.name == "self" and not inspect.ismethod(function):
            raise ValueError(f"{start} is a method; name its class, whose methods are tools")
        if parameter.name not in hints:
            raise ValueError(f"{start}: parameter {parameter.name} has no type; {EXAMPLE}")
        wrong = _not_json(hints[parameter.name])
        if wrong is not None:
            named = isinstance(wrong, type) and get_origin(wrong) is None
            shown = wrong.__name__ if named else str(wrong)
            raise ValueError(
                f"{start}: parameter {parameter.name} has type {shown}, which JSON does not have; "
                f"{EXAMPLE}"
            )


def parameters_of(start: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    """What a function or a bound method takes. ValueError, which begins with `start`, if it does
    not say so, as a method without `self` and some functions of C extensions."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise ValueError(
            f"{start}: its parameters cannot be read ({error}); define it with def, a method with "
            "self first"
        ) from None


def _not_json(hint: Any) -> Any:
    """The part of a type hint that JSON cannot hold; None if it can hold all of it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is None:
        return None if any(hint is plain for plain in PLAIN) else hint
    if origin is Literal:
        return next((hint for part in parts if not isinstance(part, str | int | None)), None)
    if origin is dict:
        return hint if parts[0] is not str else _not_json(parts[1])
    if origin in (Union, types.UnionType, list, tuple):
        wrong = (_not_json(part) for part in parts if part is not Ellipsis)
        return hint if Ellipsis in parts else next((w for w in wrong if w is not None), None)
    return hint
