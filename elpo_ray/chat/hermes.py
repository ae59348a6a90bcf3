"""The Hermes format: calls as JSON between `<tool_call>` and `</tool_call>`.

A tag opens a call if a JSON object with a name follows it, or if it stands like a call: it begins
a line and JSON follows or its closing tag ends a line. Any other tag is a word of the text: prose
may speak of the format, as in `write <tool_call>{…}</tool_call>, then wait`. Where the JSON is
whole, the call ends with it, so that its strings may contain the tags.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from elpo_ray.chat.reading import RawCall, Reading
from elpo_ray.chat.thinking import Thinking

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAG = re.compile(re.escape(OPEN))
JSON_BEGINS = re.compile(r"\s*(?=[{\[])")
LINE_BEGINS = re.compile(r"(?:^|\n)[ \t]*$")
NAMED = re.compile(r"""\s*\{\s*["']?name["']?\s*:\s*["']?\w""")
"""The beginning of a call whose JSON may be broken."""
LINE_ENDS = re.compile(r"[ \t]*(?:\n|$)")


@dataclass(frozen=True, slots=True)
class Hermes:
    """`reading.CallFormat` of Qwen2.5, Qwen3 and the Hermes fine-tunes."""

    thinking: Thinking
    parser: str = "hermes"

    def read(self, turn: str) -> Reading:
        """See `reading.CallFormat`."""
        calls: list[RawCall | str] = []
        start = self.thinking.end(turn)
        while start is not None and (tag := self.thinking.search(TAG, turn, start)):
            call, start = _call_at(turn, tag)
            if call is not None:
                calls.append(call)
        return Reading(turn, calls)


def _call_at(turn: str, tag: re.Match[str]) -> tuple[RawCall | str | None, int]:
    """The call that `tag` opens, or what is wrong with it, or None if the tag is a mere word; and
    where to read on."""
    body, closed, rest = turn[tag.end() :].partition(CLOSE)
    after = tag.end() + len(body) + len(closed)
    begin = JSON_BEGINS.match(turn, tag.end())
    begins_line = LINE_BEGINS.search(turn[: tag.start()]) is not None
    ends_line = bool(closed) and LINE_ENDS.match(rest) is not None
    if begin is None:
        alone = begins_line and ends_line and OPEN not in body
        return (_not_json(body), after) if alone else (None, tag.end())
    if not (begins_line or ends_line or NAMED.match(turn, tag.end())):
        return None, tag.end()
    try:
        value, end = json.JSONDecoder().raw_decode(turn, begin.end())
    except RecursionError:
        return "call is nested too deeply", after
    except ValueError:
        return _not_json(body) if closed else f"{OPEN} without {CLOSE}", after
    tail = turn[end:].lstrip()
    if not tail.startswith(CLOSE):
        return _not_json(body) if closed else f"{OPEN} without {CLOSE}", after
    after = len(turn) - len(tail) + len(CLOSE)
    if not isinstance(value, dict):
        return 'call must be {"name": …, "arguments": {…}}', after
    return RawCall(value.get("name"), value.get("arguments")), after


def _not_json(body: str) -> str:
    try:
        json.loads(body)
    except (ValueError, RecursionError) as fault:
        return f"call is not JSON: {fault}"
    return "call is not JSON alone"
