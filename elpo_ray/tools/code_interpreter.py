"""The one tool of the built-in tasks, as the policy sees it: a stateful Python session."""

from __future__ import annotations

import re
from typing import Any

from elpo_ray.config.task import CODE_INTERPRETER
from elpo_ray.types import Message, ToolCall

NAME = CODE_INTERPRETER

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

STATELESS_SCHEMA: dict[str, Any] = {
    **SCHEMA,
    "function": {
        **SCHEMA["function"],
        "description": "Run Python code. Every call starts anew: names and files of earlier calls "
        "are gone.",
    },
}
"""The same where `sandbox.stateless`."""


def code_of(call: ToolCall | None) -> str | None:
    """The code of a `code_interpreter` call; None for anything else."""
    if call is None or call.name != NAME:
        return None
    code = call.arguments.get("code")
    return code if isinstance(code, str) else None


def called(code: str, response: str) -> list[Message]:
    """A turn that runs `code`, and the tool's response, as messages of a demonstration."""
    function = {"name": NAME, "arguments": {"code": code}}
    calls = [{"type": "function", "function": function}]
    return [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": response},
    ]


_FENCED = re.compile(r"```python(.*?)```", re.DOTALL)


def printing_last_line(code: str) -> str:
    """The code as the recipes over SandboxFusion run it: taken out of its Markdown fence, the last
    line that is not empty wrapped in `print(...)` unless it begins with "print". By text."""
    fenced = _FENCED.search(code)
    lines = (fenced[1].strip() if fenced else code).split("\n")
    last = next((at for at in range(len(lines) - 1, -1, -1) if lines[at]), None)
    if last is not None and not lines[last].startswith("print"):
        lines[last] = f"print({lines[last]})"
    return "\n".join(lines)
