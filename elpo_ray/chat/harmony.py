"""The harmony format of gpt-oss: a turn is a row of messages, each with a header.

vLLM's reader of this format (`vllm.parser.harmony`) takes token ids of one vocabulary only, which
it downloads, and returns a malformed message as an answer. The format itself is small, so it is
read here from the text, whatever the tokenizer:

    <|channel|>analysis<|message|>…<|end|><|start|>assistant to=functions.NAME<|channel|>commentary
    json<|message|>{…}<|call|>

A message to a function is a call, on any channel; the channel `analysis` is thinking.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from elpo_ray.chat.reading import RawCall, Reading
from elpo_ray.chat.thinking import Thinking

START, MESSAGE = "<|start|>", "<|message|>"
ENDS = re.compile(r"<\|(?:end|call|return)\|>")
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
NOBODY = ("assistant", "user", "all")
"""Recipients that are no functions."""


@dataclass(frozen=True, slots=True)
class Harmony:
    """`reading.CallFormat` of gpt-oss. `Reading.text` has thoughts between `<think>` tags and no
    headers."""

    thinking: Thinking
    parser: str = "harmony"

    def read(self, turn: str) -> Reading:
        """See `reading.CallFormat`."""
        texts: list[str] = []
        calls: list[RawCall | str] = []
        for message in turn.split(START):
            header, marked, rest = message.partition(MESSAGE)
            recipient, channel = RECIPIENT.search(header), CHANNEL.search(header)
            if not marked and recipient is None:  # a turn without any header
                texts.append(ENDS.sub("", header if channel is None else rest))
                continue
            body = ENDS.split(rest, maxsplit=1)[0]
            if recipient is None or recipient[1] in NOBODY:
                thought = channel is not None and channel[1] == "analysis"
                texts.append(f"<think>\n{body}\n</think>" if thought else body)
                continue
            name = recipient[1].removeprefix("functions.")
            texts.append(f"to={recipient[1]} {body}")
            calls.append(_call(name, body) if marked else f"a call without {MESSAGE}")
        return Reading("\n".join(text for text in texts if text), calls)


def _call(name: str, body: str) -> RawCall | str:
    try:
        return RawCall(name, json.loads(body))
    except RecursionError:
        return "call is nested too deeply"
    except ValueError as fault:
        return f"arguments are not JSON: {fault}"
