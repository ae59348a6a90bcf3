"""A model's chat template as text: it renders conversations with the tools' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from elpo_ray.chat.training_templates import training_template
from elpo_ray.types import Message

REMEDY = "use a model whose template supports tools (docs/models.md lists some)"


class Rendering:
    """The template that training uses, with the tools and the options that every prompt has."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        """`options` are variables of the template, as `enable_thinking`. ValueError without a
        template."""
        self.tokenizer = tokenizer
        self.tools = list(tools)
        self.special = _special_pattern(tokenizer)
        self._options = dict(options)
        self._arguments_as_text = False
        if not tokenizer.chat_template:
            raise self.refused("it has no chat template", f"{REMEDY}, or add chat_template.jinja")
        self._template = training_template(tokenizer.get_chat_template(tools=self.tools or None))

    def render(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        """The conversation as text, with the generation prompt if `generate`. ValueError if the
        template fails on it."""
        try:
            return self._render(messages, generate)
        except TypeError as fault:
            if self._arguments_as_text:
                raise self.refused(f"its chat template fails on a conversation: {fault}") from None
            self._arguments_as_text = True  # some templates want them so
            try:
                return self.render(messages, generate=generate)
            except ValueError:
                self._arguments_as_text = False
                raise
        except TemplateError as fault:
            raise self.refused(f"its chat template fails on a conversation: {fault}") from None

    def without_tools(self) -> Rendering:
        """The same template with no tool to show."""
        rendering = copy(self)
        rendering.tools = []
        return rendering

    def neutral(self, text: str) -> str:
        """`text` with a space inside each special token, so that it stays plain text."""
        return self.special.sub(lambda token: token[0][0] + " " + token[0][1:], text)

    def refused(self, fault: str, remedy: str = REMEDY) -> ValueError:
        return ValueError(f"model.path={self.tokenizer.name_or_path!r}: {fault}; {remedy}")

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            _completed(messages, as_text=self._arguments_as_text),
            tools=self.tools or None,  # type: ignore[arg-type]
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=generate,
            **self._options,
        )
        assert isinstance(text, str)
        return text


def alike(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _completed(messages: Sequence[Message], *, as_text: bool) -> list[Message]:
    """The messages with what one template or another asks for: calls with their arguments as an
    object (or `as_text`) and with ids, tool responses with the name and id of their call, thoughts
    by all the names that they have."""
    complete: list[Message] = []
    calls: Iterator[dict[str, Any]] = iter(())
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [
                _completed_call(call, number=i, as_text=as_text)
                for i, call in enumerate(message["tool_calls"])
            ]
            calls = iter(message["tool_calls"])
        elif message["role"] == "tool" and (call := next(calls, None)) is not None:
            message = {"name": call["function"]["name"], "tool_call_id": call["id"], **message}
        if message.get("reasoning_content"):
            thought = message["reasoning_content"]
            message = {"thinking": thought, "reasoning": thought, **message}
        complete.append(message)
    return complete


def _completed_call(call: dict[str, Any], *, number: int, as_text: bool) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function["arguments"]
    if isinstance(arguments, str) != as_text:
        function["arguments"] = json.dumps(arguments) if as_text else json.loads(arguments)
    return {"type": "function", "id": f"call{number:05d}", **call, "function": function}


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the tokens that structure a conversation: special ones and `<tag>`s."""
    tokens = {
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or re.fullmatch(r"<[^<>]*>", str(token))
    }
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
