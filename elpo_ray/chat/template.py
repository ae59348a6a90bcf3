"""A model's own chat template as token ids: prompts, parsed turns, observations, SFT targets.

Invariants:

* What was sampled is never re-tokenised. A trajectory is `prompt_ids`, then per step the sampled
  ids and `observation_ids`; `conversation_ids` of the same conversation gives the same tokens.
* Glue is never written by hand: it is what the template renders after the end of a turn. A template
  that rewrites earlier text when a tool message is added is refused, or replaced by ours
  (`training_templates`).
* A tool's output cannot forge a turn: a special token in it is broken up before it is tokenised.
* A call that the template renders is read back as the same call, or the template is refused
  (`round_trip`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from elpo_ray.chat.calls import check_schemas, checked_call
from elpo_ray.chat.families import call_format
from elpo_ray.chat.reading import CallFormat
from elpo_ray.chat.rendering import Rendering, alike
from elpo_ray.chat.round_trip import check_round_trip
from elpo_ray.chat.turns import Turns
from elpo_ray.config.model import ModelConfig
from elpo_ray.types import Message, Parsed

_REMEMBERED = 4096
"""Observations whose ids are kept."""


class Chat:
    """Template, tool schemas and tokenizer of one model, as `interfaces.Chat` and for SFT."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[dict[str, Any]],
        *,
        tool_parser: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`tool_parser` and `options` are `model.tool_parser` and `model.template_options`.
        ValueError if the template is missing, loses tools, cannot be stitched or cannot be read."""
        check_schemas(tools)
        self.tokenizer = tokenizer
        self._schemas = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._rendering = Rendering(tokenizer, tools, options or {})
        self._without_tools = self._rendering.without_tools()
        self._turns = Turns.of(self._rendering)
        self.end_of_turn_ids: tuple[int, ...] = tuple(
            self._end_id(end) for end in {self._turns.call_end, self._turns.answer_end}
        )
        """Ids that end an assistant turn; the last token of a turn that was not cut off."""
        # Trajectories of one input see the same observations again and again.
        self._observation_ids = lru_cache(_REMEMBERED)(self._encode_observation)
        self._response = lru_cache(_REMEMBERED)(partial(self._turns.response, self._rendering))
        self.format: CallFormat | None = None
        """How calls are written; None without tools, where every turn is an answer."""
        if self._turns.call is not None:
            self.format = call_format(self._turns.call, tool_parser, tokenizer, tools)
            if self.format is None:
                raise self._rendering.refused(
                    f"no parser reads its calls, as in {self._turns.call.turn.strip()!r}",
                    "use a model whose calls are read (docs/models.md lists some), or name one of "
                    "vLLM's tool parsers with model.tool_parser",
                )
            self._check_boundary(self._turns.call.turn)
            check_round_trip(self, tools, self._rendering.refused)

    @classmethod
    def from_folder(
        cls, path: str, tools: Sequence[dict[str, Any]], model: ModelConfig | None = None
    ) -> Chat:
        """Load the tokenizer of a folder or hub name. ValueError if there is no usable one."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise _no_tokenizer(path, str(fault).strip().split("\n")[0]) from None
        if not tokenizer("question")["input_ids"]:  # an empty one, made up from config.json
            raise _no_tokenizer(path, "it knows no tokens")
        model = model or ModelConfig()
        return cls(tokenizer, tools, tool_parser=model.tool_parser, options=model.template_options)

    def prompt_ids(self, messages: Sequence[Message], *, tools: bool = True) -> list[int]:
        """Ids of the conversation so far, the tool schemas and the generation prompt; without
        `tools` no schema is shown."""
        rendering = self._rendering if tools else self._without_tools
        return self._encode(rendering.render(messages, generate=True))

    def observation_ids(self, text: str, tool: str | None = None) -> Sequence[int]:
        """Ids that follow a turn's end-of-turn token: glue, tool response, generation prompt.
        `tool` is the one that was called; None where the call could not be read."""
        return self._observation_ids(text, tool)

    def parse(self, token_ids: Sequence[int]) -> Parsed:
        """Read one sampled turn; a malformed call becomes `Parsed.error`, never an exception."""
        ids = list(token_ids)
        if ids and ids[-1] in self.end_of_turn_ids:
            del ids[-1]
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        if self.format is None:
            return Parsed(text=text)
        reading = self.format.read(text)
        if len(reading.calls) > 1:
            return Parsed(
                text=reading.text, error=f"{len(reading.calls)} calls in one turn; send one"
            )
        for raw in reading.calls:
            call = (
                raw
                if isinstance(raw, str)
                else checked_call(raw.name, raw.arguments, self._schemas)
            )
            if isinstance(call, str):
                return Parsed(text=reading.text, error=call)
            return Parsed(text=reading.text, call=call)
        return Parsed(text=reading.text)

    def conversation_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a finished conversation, and which of them the agent wrote (SFT targets: the
        assistant turns with their end-of-turn token). ValueError if the two look alike, or if the
        template renders a turn in another way than a rollout would have it."""
        texts, agent = self._pieces(messages)
        ids: list[int] = []
        mask: list[bool] = []
        # Each turn is encoded on its own, as it is sampled: a merge across the boundary would
        # make the SFT tokens differ from those of a rollout.
        for piece, by_agent in zip(self._encode_all(texts), agent, strict=True):
            ids += piece
            mask += [by_agent] * len(piece)
        return ids, mask

    def _pieces(self, messages: Sequence[Message]) -> tuple[list[str], list[bool]]:
        """The rendered conversation in pieces, and which of them the agent wrote."""
        clean = [
            {**message, "content": self._rendering.neutral(message["content"])}
            if message["role"] == "tool"
            else message
            for message in messages
        ]
        whole = self._rendering.render(clean)
        texts, agent, done = [], [], 0
        for number, message in enumerate(clean):
            if message["role"] != "assistant":
                continue
            begin = self._begin(clean[:number], whole, done)
            end = self._turns.call_end if message.get("tool_calls") else self._turns.answer_end
            turn, ended, _ = whole[begin:].partition(end)
            texts += [whole[done:begin], turn + end]
            agent += [False, True]
            done = begin + len(turn) + len(ended)
        if clean[-1]["role"] != "assistant":  # nothing follows the last answer
            texts, agent = [*texts, whole[done:]], [*agent, False]
        return texts, agent

    def _begin(self, before: Sequence[Message], whole: str, done: int) -> int:
        """Where the turn after the messages `before` begins; `done` is where the last one ended.
        ValueError unless a rollout would have come there too."""
        last = before[-2] if len(before) > 1 and before[-1]["role"] == "tool" else {}
        if calls := last.get("tool_calls"):
            glue = self._response(before[-1]["content"], calls[0]["function"]["name"])
            if whole.startswith(glue, done):
                return done + len(glue)
        prefix = self._rendering.render(before, generate=True)
        if not whole.startswith(prefix):
            raise self._rendering.refused(
                "its chat template rewrites earlier turns"
                if alike(whole, prefix) < done
                else "its chat template renders turns unlike its generation prompt"
            )
        if len(prefix) < done or (calls and len(calls) == 1):
            raise self._rendering.refused(
                f"the end of the turn before message {len(before)} cannot be found in a rendered "
                "conversation",
                "give it one question, and remove template tokens from its messages",
            )
        return len(prefix)

    def _check_boundary(self, turn: str) -> None:
        """Refuse a tokenizer that encodes the end of a turn and what follows it as one text in
        another way than apart, as a rollout does."""
        parts = [turn + self._turns.call_end, self._response("response", None)]
        if self._encode("".join(parts)) != [id for ids in self._encode_all(parts) for id in ids]:
            raise self._rendering.refused("its tokenizer joins text across the end of a turn")

    def _encode_observation(self, text: str, tool: str | None) -> tuple[int, ...]:
        return tuple(self._encode(self._response(self._rendering.neutral(text), tool)))

    def _end_id(self, end: str) -> int:
        ids = self._encode(end)
        if len(ids) != 1:
            raise self._rendering.refused(f"its end of turn {end} is no single token")
        return ids[0]

    def _encode(self, text: str) -> list[int]:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


def _no_tokenizer(path: str, reason: str) -> ValueError:
    return ValueError(
        f"model.path={path!r}: no usable tokenizer ({reason}); give a folder with tokenizer.json "
        "and tokenizer_config.json, or a hub name"
    )
