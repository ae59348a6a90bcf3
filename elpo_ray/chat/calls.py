"""The check of a tool call: a known function with the arguments that its schema asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match

from elpo_ray.types import ToolCall

LITERALS = {"true": True, "false": False, "null": None, "none": None}
"""Values that some templates write as Python does, by their text in lower case."""
SHOWN = 160
"""Characters of a validator's message that the policy is shown."""


def checked_call(name: Any, arguments: Any, schemas: Mapping[str, Any]) -> ToolCall | str:
    """The call, or what is wrong with it in words meant for the policy. `schemas` are the function
    schemas in the OpenAI form, by name.

    An argument that came as text where the schema admits none is read as JSON: several formats
    write every argument as text.
    """
    if not isinstance(name, str):
        return "call has no name"
    if name not in schemas:
        return f"unknown tool {name[:40]}; use {', '.join(schemas)}"
    if not isinstance(arguments, dict):
        return "arguments must be an object"
    parameters = schemas[name].get("parameters") or {}
    properties = parameters.get("properties", {})
    for key in parameters.get("required", ()):
        if key not in arguments:
            return f"argument {key} is missing or no {properties.get(key, {}).get('type', 'value')}"
    arguments = {key: _typed(value, properties.get(key, {})) for key, value in arguments.items()}
    for key, value in arguments.items():
        if properties.get(key, {}).get("type") == "string" and not isinstance(value, str):
            return f"argument {key} is missing or no string"
    fault = best_match(Draft202012Validator(parameters).iter_errors(arguments))
    if fault is not None:
        where = "".join(f"[{part!r}]" if i else str(part) for i, part in enumerate(fault.path))
        return f"argument {where}: {fault.message}"[:SHOWN] if where else fault.message[:SHOWN]
    return ToolCall(name=name, arguments=arguments)


def check_schemas(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if two tools have one name or if parameters are no JSON schema."""
    names = [tool["function"]["name"] for tool in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tools: {', '.join(twice)} appears twice; give each tool its own name")
    for tool in tools:
        function = tool["function"]
        try:
            Draft202012Validator.check_schema(function.get("parameters") or {})
        except SchemaError as fault:
            raise ValueError(
                f"tool {function['name']!r}: its parameters are no JSON schema ({fault.message}); "
                "correct the schema"
            ) from None


def _typed(value: Any, schema: Mapping[str, Any]) -> Any:
    """`value`, read as JSON where it is text that the schema does not admit; a float without
    fraction as an integer where the schema wants one."""
    if isinstance(value, float) and value.is_integer() and schema.get("type") == "integer":
        return int(value)
    if not isinstance(value, str) or _admits_text(schema):
        return value
    if value.strip().lower() in LITERALS:
        read = LITERALS[value.strip().lower()]
    else:
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            return value
    return read if Draft202012Validator(schema).is_valid(read) else value


def _admits_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value of this schema may be a string."""
    kinds = schema.get("type")
    if kinds is not None:
        return "string" in ([kinds] if isinstance(kinds, str) else kinds)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return any(_admits_text(part) for part in schema[key])
    return "enum" not in schema or any(isinstance(value, str) for value in schema["enum"])
