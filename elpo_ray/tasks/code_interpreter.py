"""The one tool of the built-in tasks, as the policy sees it: a stateful Python session."""

from __future__ import annotations

from typing import Any

from elpo_ray.types import ToolCall

NAME = "code_interpreter"

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Run Python code in a session that keeps its state.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
        },
    },
}
"""OpenAI function schema, rendered into the prompt by the chat template."""


def code_of(call: ToolCall | None) -> str | None:
    """The code of a `code_interpreter` call; None for anything else."""
    if call is None or call.name != NAME:
        return None
    code = call.arguments.get("code")
    return code if isinstance(code, str) else None
