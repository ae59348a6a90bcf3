"""The check of a tool call: a known function with the arguments that its schema asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elpo_ray.types import ToolCall


def checked_call(name: Any, arguments: Any, schemas: Mapping[str, Any]) -> ToolCall | str:
    """The call, or what is wrong with it in words meant for the policy. `schemas` are the function
    schemas in the OpenAI form, by name."""
    if not isinstance(name, str):
        return "call has no name"
    if name not in schemas:
        return f"unknown tool {name[:40]}; use {', '.join(schemas)}"
    if not isinstance(arguments, dict):
        return "arguments must be an object"
    parameters = schemas[name].get("parameters", {})
    for key in parameters.get("required", ()):
        kind = parameters.get("properties", {}).get(key, {}).get("type")
        if key not in arguments or (kind == "string" and not isinstance(arguments[key], str)):
            return f"argument {key} is missing or no {kind or 'value'}"
    return ToolCall(name=name, arguments=arguments)
