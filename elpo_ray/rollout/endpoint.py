"""A model behind an OpenAI-compatible chat server, in the place of engine and chat template.

Here a token id stands for a message: the server renders the template and counts the tokens. A
sampled turn has as many ids as the server counted tokens, the first of which names the message and
the others are PAD, so that lengths and limits mean what they mean elsewhere; prompts and
observations have one id a message. Log-probabilities and entropies are not to be had, hence no
training and no search through an endpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import openai

from elpo_ray.chat.calls import checked_call
from elpo_ray.chat.hermes import OPEN, Hermes
from elpo_ray.chat.thinking import Thinking
from elpo_ray.types import (
    FinishReason,
    InfrastructureError,
    Message,
    Parsed,
    Sampling,
    ToolCall,
    Turn,
)

PAD = 0
SEEDS = 1 << 31
"""Servers take seeds of 31 bits."""
RETRIES = 6
"""Further attempts at a request that met a busy or failing server, with growing pauses."""
REQUEST_S = 1800.0
"""Seconds that one turn may take."""
HERMES = Hermes(Thinking())
"""Tells a call that the server did not read from a tag that an answer mentions."""
LISTING_S = 20.0
"""Seconds that a server has to say which models it serves."""


def served_model(url: str, name: str | None) -> str:
    """The model to ask for: `name`, or the only one that the server lists. ValueError if the server
    does not answer or does not have it."""
    client = openai.OpenAI(base_url=url, api_key=_key(), max_retries=1, timeout=LISTING_S)
    try:
        served = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        raise ValueError(
            f"model={url!r}: the server does not list its models ({error}); give the base URL of "
            "an OpenAI-compatible server, as in http://host:8000/v1, and its key in OPENAI_API_KEY"
        ) from None
    listed = ", ".join(served) or "none"
    if name is None:
        if len(served) != 1:
            raise ValueError(f"served_model=None: {url} serves {listed}; name one of them")
        return served[0]
    if name not in served:
        raise ValueError(f"served_model={name!r}: {url} serves {listed}; name one of them")
    return name


class Endpoint:
    """`interfaces.Policy` and `interfaces.Chat` over one server, for one set of tools."""

    def __init__(self, url: str, model: str, tools: Sequence[dict[str, Any]]) -> None:
        self._model = model
        self._tools = list(tools)
        self._schemas = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._messages: list[Message] = [{}]  # id 0 is PAD
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=_key(), max_retries=RETRIES, timeout=REQUEST_S
        )

    async def generate(self, prefix: Sequence[int], sampling: Sampling) -> Turn:
        """See `Policy`. A context that the server finds too long is a turn cut off at its start.
        Raises ValueError if the server refuses the request."""
        request: dict[str, Any] = {
            "model": self._model,
            "messages": self._conversation(prefix),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        if self._tools:
            request["tools"] = self._tools
        if sampling.seed is not None:
            request["seed"] = sampling.seed % SEEDS
        try:
            answer = await self._client.chat.completions.create(**request)
        except (
            openai.APIConnectionError,
            openai.RateLimitError,
            openai.InternalServerError,
        ) as error:
            raise InfrastructureError(f"the endpoint failed: {error}") from error
        except openai.BadRequestError as error:
            if "context" not in str(error):
                raise ValueError(f"model: the endpoint refuses the request: {error}") from None
            return self._turn({"role": "assistant", "content": ""}, 1, FinishReason.LENGTH)
        except openai.APIStatusError as error:
            raise ValueError(f"model: the endpoint refuses the request: {error}") from None
        if not answer.choices:
            raise InfrastructureError("the endpoint answered without a choice")
        choice = answer.choices[0]
        message = choice.message.model_dump(include={"role", "content", "tool_calls"})
        cut = choice.finish_reason == "length"
        return self._turn(
            {key: value for key, value in message.items() if value or key != "tool_calls"},
            answer.usage.completion_tokens if answer.usage else 1,
            FinishReason.LENGTH if cut else FinishReason.STOP,
        )

    def prompt_ids(self, messages: Sequence[Message], *, tools: bool = True) -> list[int]:
        """One id a message; which tools are shown is said with the request."""
        return [self._intern(message) for message in messages]

    def observation_ids(self, text: str, tool: str | None = None) -> list[int]:
        """One id: a tool message."""
        return [self._intern({"role": "tool", "content": text})]

    def parse(self, token_ids: Sequence[int]) -> Parsed:
        """Read one turn; calls are as the server parsed them."""
        message = self._messages[token_ids[0]]
        calls = message.get("tool_calls", [])
        text = _text(message)
        if len(calls) > 1:
            return Parsed(text, error=f"{len(calls)} calls in one turn; send one")
        if not calls:
            unread = HERMES.read(text).calls
            return Parsed(text, error="the call could not be read" if unread else None)
        call = self._read_call(calls[0]["function"])
        return Parsed(text, error=call) if isinstance(call, str) else Parsed(text, call=call)

    async def close(self) -> None:
        await self._client.close()

    def _read_call(self, function: dict[str, Any]) -> ToolCall | str:
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError) as fault:
            return f"arguments are not JSON: {fault}"
        return checked_call(function["name"], arguments, self._schemas)

    def _conversation(self, prefix: Sequence[int]) -> list[Message]:
        """The messages of a prefix. A tool's response answers every call of the turn before it; one
        to a turn in which the server saw no call becomes a message of the user."""
        conversation: list[Message] = []
        calls: list[dict[str, Any]] = []
        for message in (self._messages[i] for i in prefix if i != PAD):
            if message["role"] != "tool":
                conversation.append(message)
            elif calls:
                conversation += [{**message, "tool_call_id": call["id"]} for call in calls]
            else:
                conversation.append({**message, "role": "user"})
            calls = message.get("tool_calls", [])
        return conversation

    def _turn(self, message: Message, tokens: int, finish: FinishReason) -> Turn:
        ids = (self._intern(message), *[PAD] * (tokens - 1))
        return Turn(ids, logprobs=(), entropies=(), finish=finish, weight_version=0)

    def _intern(self, message: Message) -> int:
        self._messages.append(message)
        return len(self._messages) - 1


def _text(message: Message) -> str:
    """A turn for people: its content, then its calls."""
    parts = [message.get("content") or ""]
    for call in message.get("tool_calls", []):
        function = call["function"]
        parts.append(f"{OPEN}{function['name']}({function['arguments']})")
    return "\n".join(part for part in parts if part)


def _key() -> str:
    """Local servers want none, but the client insists on one."""
    return os.environ.get("OPENAI_API_KEY", "none")
