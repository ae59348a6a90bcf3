"""Solved conversations for the cold start, as Gen-Verse/Open-AgentRL-SFT-3K writes them.

A row has `messages`: an optional system message, a question, then assistant turns, each call
answered by a `tool` message, and an answer at the end. Only assistant turns are trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from elpo_ray.chat.calls import checked_call
from elpo_ray.tasks.sources import Row
from elpo_ray.types import Message

AFTER: dict[str, set[str | None]] = {
    "system": {None},
    "user": {None, "system"},
    "assistant": {"user", "tool"},
    "tool": {"assistant"},
}
"""What a message of each role may follow; None is the beginning."""


def read_demonstration(row: Row) -> list[Message]:
    """The conversation of a row, in the form that chat templates want. ValueError if it is none."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('messages is not a list; use [{"role": "user", "content": "…"}, …]')
    clean: list[Message] = []
    for number, message in enumerate(messages, start=1):
        before = clean[-1] if clean else None
        try:
            clean.append(_message(message, before))
        except ValueError as fault:
            raise ValueError(f"message {number}: {fault}") from None
    if clean[-1]["role"] != "assistant" or "tool_calls" in clean[-1]:
        raise ValueError("the last message is no assistant answer")
    return clean


def _message(message: Any, before: Message | None) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in AFTER:
        raise ValueError(f"role {role!r}; use one of {', '.join(AFTER)}")
    previous = before["role"] if before else None
    if previous not in AFTER[role]:
        raise ValueError(f"a {role} message after {previous or 'nothing'}")
    if role == "tool" and before is not None and "tool_calls" not in before:
        raise ValueError("a tool response to a turn that called no tool")
    content = message.get("content") or ""  # parquet writes null for a turn that only calls
    if not isinstance(content, str):
        raise ValueError("content is not text")
    calls = message.get("tool_calls") or []
    if role != "assistant" or not calls:
        return {"role": role, "content": content}
    if not isinstance(calls, list) or len(calls) != 1:
        raise ValueError("more than one call in a turn; an episode makes one at a time")
    return {"role": role, "content": content, "tool_calls": [_call(calls[0])]}


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError("a call's arguments are not JSON") from None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError('a call without a name; use {"function": {"name": …, "arguments": {…}}}')
    if not isinstance(arguments, dict):
        raise ValueError(f"the call of {function['name']} has no arguments; use an object, or {{}}")
    # Parquet gives every call all keys that any call has, those that are not its own as null.
    given = {key: value for key, value in arguments.items() if value is not None}
    return {"type": "function", "function": {"name": function["name"], "arguments": given}}


def check_calls(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a call that no tool of the task understands."""
    known = {tool["function"]["name"]: tool["function"] for tool in tools}
    for message in messages:
        for call in message.get("tool_calls", []):
            fault = checked_call(call["function"]["name"], call["function"]["arguments"], known)
            if isinstance(fault, str):
                raise ValueError(fault)
