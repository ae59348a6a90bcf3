"""Calls in the formats that vLLM's parsers read; nothing here imports vLLM before it is needed.

vLLM's parsers look for calls only. What a mere word is, and what a malformed call, is told by the
frame of a call: the text around name and arguments in a call that the template has rendered.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from elpo_ray.chat.reading import RawCall, Reading
from elpo_ray.chat.thinking import Thinking

TAG = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
"""A special token or tag of a template."""
NAME = r"""[^\s<>(){}\[\]"'=]+"""
"""The name of a function."""
HIDDEN = "\ue000"
"""Stands for a closing tag inside an argument while a parser reads (a private-use character)."""
ABSENT = -1
"""The id of a marker that the tokenizer has not as one token; parsers read text, not ids."""


@dataclass(frozen=True, slots=True)
class Frame:
    """How a call begins and ends in a format."""

    marker: re.Pattern[str]
    """Its first tag; where the format has none, its beginning at the start of a line."""
    begins: re.Pattern[str]
    """From the marker to the name of the function, or to its first argument where nothing stands
    between marker and name; what follows the marker where the format has no tags."""
    open: str
    close: str
    """First and last tag; empty where the format has none."""
    example: str
    """A call, for the policy to see what is expected."""

    @classmethod
    def of(cls, turn: str, name: str, key: str, value: str) -> Frame:
        """The frame in a rendered turn that does nothing but call `name` with `key` = `value`."""
        argument = turn.rindex(value)
        named = turn.rindex(name, 0, argument)
        body = max(turn.find(key, named + len(name), argument), named)
        head = turn[:named].lstrip()
        tags = TAG.findall(turn[argument:])
        close = tags[-1] if tags else ""
        example = turn.strip().replace(value, "…")
        first = TAG.search(head)
        if first is None:
            marker = re.compile(rf"(?:^|\n|(?<=>))\s*{_loose(head, name)}")
            return cls(marker, re.compile(_loose(turn[named:body], name)), "", "", example)
        begins = turn[:body] if head == first.group() else head
        return cls(
            re.compile(_loose(head[: first.end()], name)),
            re.compile(_loose(begins, name)),
            first.group(),
            close,
            example,
        )


def _loose(text: str, name: str) -> str:
    """A pattern of `text` with any white space between its parts, and any name for `name`."""
    parts = re.findall(rf"{re.escape(name)}|\w+|[^\w\s]", text)
    return r"\s*".join(NAME if part == name else re.escape(part) for part in parts)


class VllmCalls:
    """`reading.CallFormat` over one of vLLM's tool parsers."""

    def __init__(
        self,
        parser: str,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[dict[str, Any]],
        thinking: Thinking,
        frame: Frame,
    ) -> None:
        """`parser` is one of vLLM's (`check_parser`), which may raise if it lacks a token."""
        from vllm.entrypoints.openai.chat_completion.protocol import (
            ChatCompletionRequest,
            ChatCompletionToolsParam,
        )
        from vllm.tool_parsers import ToolParserManager

        for noisy in ("vllm.tool_parsers", "vllm.parser"):  # a malformed call is no error of ours
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        self.parser = parser
        self._thinking = thinking
        self._frame = frame
        self._names = re.compile("|".join(re.escape(tool["function"]["name"]) for tool in tools))
        typed: list[Any] = [ChatCompletionToolsParam(**tool) for tool in tools]
        self._parser = ToolParserManager.get_tool_parser(parser)(_vocabulary(tokenizer), typed)
        request = {"messages": [{"role": "user", "content": ""}], "tools": list(tools)}
        self._request = ChatCompletionRequest.model_validate(request)

    def read(self, turn: str) -> Reading:
        """See `reading.CallFormat`."""
        begins = self._beginnings(turn)
        if not begins:
            return Reading(turn)
        text, frame = turn[begins[0] :], self._frame
        if frame.close and frame.close not in text:
            return Reading(turn, [f"{frame.open} without {frame.close}"])
        calls = self._parsed(text)
        if len(begins) > len(calls) and len(begins) > 1:  # some parsers read the first call only
            ends = [*begins[1:], len(turn)]
            parts = [self._parsed(turn[a:b]) for a, b in zip(begins, ends, strict=True)]
            calls = [call for part in parts for call in part] if all(parts) else calls
        elif frame.close and text.count(frame.close) > 1 == len(begins):
            calls = self._with_tag_inside(text) or calls
        return Reading(turn, calls or [f"call cannot be read; write it as in {frame.example}"])

    def _parsed(self, text: str) -> list[RawCall | str]:
        """The calls that vLLM's parser finds."""
        try:
            found = self._parser.extract_tool_calls(text, self._request).tool_calls
        except Exception as fault:  # a parser may fail in any way on what a policy writes
            return [f"call cannot be read: {fault}"]
        return [_raw(call.function) for call in found]

    def _with_tag_inside(self, text: str) -> list[RawCall | str]:
        """The one call of a text with several closing tags, if those before the last are inside its
        arguments: parsers would end it at the first."""
        inner, _, rest = text.rpartition(self._frame.close)
        hidden = inner.replace(self._frame.close, HIDDEN) + self._frame.close + rest
        calls = self._parsed(hidden)
        if len(calls) != 1 or isinstance(calls[0], str):
            return []
        arguments = json.dumps(calls[0].arguments, ensure_ascii=False)
        if HIDDEN not in arguments:
            return []
        close = json.dumps(self._frame.close, ensure_ascii=False)[1:-1]
        return [RawCall(calls[0].name, json.loads(arguments.replace(HIDDEN, close)))]

    def _beginnings(self, turn: str) -> list[int]:
        """Where calls begin, well formed or not."""
        begins: list[int] = []
        start, frame = self._thinking.end(turn), self._frame
        while start is not None and (marker := self._thinking.search(frame.marker, turn, start)):
            if self._calls(turn, marker):
                begins.append(marker.start())
            start = marker.end()
        return begins

    def _calls(self, turn: str, marker: re.Match[str]) -> bool:
        """Whether a marker opens a call: what belongs to a call follows, or the marker begins a
        line and the name of a tool follows or its closing tag ends the turn."""
        frame = self._frame
        if frame.begins.match(turn, marker.start() if frame.open else marker.end()):
            return True
        begins_line = not turn[: marker.start()].rpartition("\n")[2].strip()
        follows = turn[marker.end() :].lstrip()
        ends_turn = bool(frame.open) and turn.rstrip().endswith(frame.close)
        return begins_line and (ends_turn or self._names.match(follows) is not None)


def _raw(function: Any) -> RawCall | str:
    try:
        return RawCall(function.name, json.loads(function.arguments or "{}"))
    except (ValueError, RecursionError) as fault:
        return f"arguments are not JSON: {fault}"


def check_parser(name: str) -> None:
    """Raise ValueError if vLLM has no tool parser of that name."""
    from vllm.tool_parsers import ToolParserManager

    names = ToolParserManager.list_registered()
    if name not in names:
        raise ValueError(
            f"model.tool_parser={name!r}: no such parser; use hermes, harmony or one of vLLM's: "
            f"{', '.join(sorted(names))}"
        )


def tags_of(parser: str, tokenizer: PreTrainedTokenizerBase) -> Thinking:
    """The thinking tags that vLLM's reasoning parser of the same family knows, else `<think>`."""
    from vllm.reasoning import ReasoningParserManager

    name = {"qwen3_coder": "qwen3", "qwen3_xml": "qwen3", "deepseek_v3": "deepseek_r1"}.get(
        parser, parser
    )
    if name == "muse_glimmer":  # thinks in a message to itself
        return Thinking("to=self<|message|>", "<|eom|>")
    if name not in ReasoningParserManager.list_registered():
        return Thinking()
    kind = ReasoningParserManager.get_reasoning_parser(name)
    reasoning = kind(_vocabulary(tokenizer))
    start, end = reasoning.reasoning_start_str, reasoning.reasoning_end_str
    return Thinking(start, end) if start and end else Thinking()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    return _Vocabulary(tokenizer)


class _Vocabulary:
    """The tokenizer as vLLM's parsers ask for it: markers that it lacks have an id too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @cache  # noqa: B019 - lives as long as its parser
    def get_vocab(self) -> dict[str, int]:
        return _Ids(self._tokenizer.get_vocab())

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()


class _Ids(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return ABSENT

    def get(self, key: str, default: Any = None) -> Any:
        return self[key]
