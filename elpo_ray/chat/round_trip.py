"""The round trip that every model makes before anything starts.

For each tool a conversation of two calls and an answer is rendered. Its calls must be read back as
they were, its pieces must be those of a rollout, token for token, and its targets must be what the
agent would have sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

from jsonschema import Draft202012Validator

from elpo_ray.types import Message, Parsed

TEXT = 'x = "a\\n" + \'b\'\nprint(f"{x} <tool_response> \\t", {1: [2]}) # ü'
"""Quotes, braces, escapes, a line end, a tag, a letter beyond ASCII: what formats are likely to
break."""
THOUGHT, ANSWER = "Sentinel thought", "Sentinel answer"


class Stitching(Protocol):
    """What is checked: `template.Chat`."""

    end_of_turn_ids: tuple[int, ...]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]: ...
    def observation_ids(self, text: str, tool: str | None = None) -> Sequence[int]: ...
    def parse(self, token_ids: Sequence[int]) -> Parsed: ...
    def conversation_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]: ...


def check_round_trip(
    chat: Stitching, tools: Sequence[dict[str, Any]], refused: Callable[[str], ValueError]
) -> None:
    """Raise `refused(reason)` unless a call of each tool comes back, alone and after some text."""
    for tool in tools:
        function = tool["function"]
        arguments = sample_arguments(function)
        if not Draft202012Validator(function.get("parameters") or {}).is_valid(arguments):
            continue  # its schema wants what only its user knows
        for text in ("", THOUGHT):
            fault = _fault(chat, function["name"], arguments, text)
            if fault is not None:
                raise refused(fault)


def conversation(name: str, arguments: Mapping[str, Any], text: str = "") -> list[Message]:
    """A question, two calls with their responses, and an answer."""
    called: Message = {
        "role": "assistant",
        "content": text,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    question: Message = {"role": "user", "content": "question"}
    responses: list[Message] = [{"role": "tool", "content": text} for text in ("7", TEXT)]
    answer: Message = {"role": "assistant", "content": ANSWER}
    return [question, called, responses[0], called, responses[1], answer]


def sample_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """An argument for each parameter of a function's schema, awkward where text is admitted. A
    parameter that nothing here fits is left out."""
    parameters = function.get("parameters") or {}
    return _sample_object(parameters, parameters.get("$defs", {}))


def _sample_object(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: _samples(kind, defs) for key, kind in schema.get("properties", {}).items()}
    return {key: values[0] for key, values in found.items() if values}


def _samples(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> list[Any]:
    """Values of a JSON schema."""
    items = _samples(schema["items"], defs) if isinstance(schema.get("items"), Mapping) else [2]
    values = [
        *schema.get("enum", ()),
        *(TEXT, "text", 2.5, 2, True),
        *(items[:1], _sample_object(schema, defs), schema.get("minimum"), schema.get("default")),
    ]
    validator = Draft202012Validator({**schema, "$defs": defs})
    return [value for value in values if validator.is_valid(value)]


def _fault(chat: Stitching, name: str, arguments: dict[str, Any], text: str) -> str | None:
    """What is wrong with a conversation that calls `name`, or None."""
    messages = conversation(name, arguments, text)
    ids, mask = chat.conversation_ids(messages)
    pieces = list(_pieces(ids, mask))
    rollout = [
        chat.prompt_ids(messages[:1]),
        *(list(chat.observation_ids(messages[i]["content"], name)) for i in (2, 4)),
    ]
    if [piece for piece, agent in pieces if not agent] != rollout:
        return "its chat template renders a tool's response unlike the one before"
    turns = [piece for piece, agent in pieces if agent]
    for turn in turns[:-1]:
        parsed = chat.parse(turn)
        if parsed.call is None:
            return f"its chat template writes a call of {name} that is not read ({parsed.error})"
        if parsed.call.name != name or parsed.call.arguments != arguments:
            return (
                f"a call of {name} with {arguments} comes back with {parsed.call.arguments} from "
                "its chat template"
            )
    answer = chat.parse(turns[-1])
    if answer.call is not None or answer.error is not None or ANSWER not in answer.text:
        return f"its chat template's answer is not read as one ({answer.error or answer.text!r})"
    if any(turn[-1] not in chat.end_of_turn_ids for turn in turns):
        return "its chat template ends a turn without its end-of-turn token"
    return None


def _pieces(ids: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[list[int], bool]]:
    for agent, group in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        yield [id for id, _ in group], agent
