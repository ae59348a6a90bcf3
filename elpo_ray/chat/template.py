"""A model's own chat template as token ids: prompts, parsed turns, observations, SFT targets.

Invariants:

* What was sampled is never re-tokenised. A trajectory is `prompt_ids`, then per step the sampled
  ids and `observation_ids`; `conversation_ids` of the same conversation gives the same tokens.
* Glue is never written by hand: it is what the template renders after the assistant's end-of-turn
  token. A template that rewrites earlier text when a tool message is added is refused.
* A tool's output cannot forge a turn: a special token in it is broken up before it is tokenised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from elpo_ray.chat.calls import checked_call
from elpo_ray.types import Message, Parsed, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
SENTINEL = "Sentinel"
"""Stands for an argument or a tool response in the dummy conversations."""
_REMEMBERED = 4096
"""Observations whose ids are kept."""
REMEDY = "use a model whose template supports tools in the Hermes format, such as Qwen2.5-Instruct"


class Chat:
    """Template, tool schemas and tokenizer of one model, as `interfaces.Chat` and for SFT."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]]) -> None:
        """ValueError if the template is missing, loses tools or cannot be stitched."""
        self.tokenizer = tokenizer
        self._name = tokenizer.name_or_path
        self._tools: list[Any] = list(tools)
        self._schemas = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._special = _special_pattern(tokenizer)
        if tokenizer.chat_template is None:
            raise self._refused("it has no chat template", f"{REMEDY}, or add chat_template.jinja")
        self._question: Message = {"role": "user", "content": "question"}
        self._generation = self._find_generation_prompt()
        self._end = self._find_end_of_turn()
        self.end_of_turn_ids: tuple[int, ...] = tuple(self._encode(self._end))
        """Ids that end an assistant turn; the last token of a turn that was not cut off."""
        self._check_tools()
        # Trajectories of one input see the same observations again and again.
        self._observation_ids = lru_cache(_REMEMBERED)(self._encode_observation)

    @classmethod
    def from_folder(cls, path: str, tools: Sequence[dict[str, Any]]) -> Chat:
        """Load the tokenizer of a folder or hub name. ValueError if there is no usable one."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise _no_tokenizer(path, str(fault).strip().split("\n")[0]) from None
        if not tokenizer("question")["input_ids"]:  # an empty one, made up from config.json
            raise _no_tokenizer(path, "it knows no tokens")
        return cls(tokenizer, tools)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation so far, the tool schemas and the generation prompt."""
        return self._encode(self._render(messages, generate=True))

    def observation_ids(self, text: str) -> Sequence[int]:
        """Ids that follow a turn's end-of-turn token: glue, tool response, generation prompt."""
        return self._observation_ids(text)

    def parse(self, token_ids: Sequence[int]) -> Parsed:
        """Read one sampled turn; a malformed call becomes `Parsed.error`, never an exception."""
        ids = list(token_ids)
        if ids and ids[-1] in self.end_of_turn_ids:
            del ids[-1]
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        if OPEN not in text:
            return Parsed(text=text)
        bodies = text.split(OPEN)[1:]
        if len(bodies) > 1:
            return Parsed(text=text, error=f"{len(bodies)} calls in one turn; send one")
        body, closed, _ = bodies[0].partition(CLOSE)
        if not closed:
            return Parsed(text=text, error=f"{OPEN} without {CLOSE}")
        call = self._read_call(body)
        if isinstance(call, str):
            return Parsed(text=text, error=call)
        return Parsed(text=text, call=call)

    def conversation_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a finished conversation, and which of them the agent wrote (SFT targets: the
        assistant turns with their end-of-turn token). ValueError if the two look alike."""
        clean = [
            {**message, "content": self._neutral(message["content"])}
            if message["role"] == "tool"
            else message
            for message in messages
        ]
        # Each turn is encoded on its own, as it is sampled: a merge across the boundary would
        # make the SFT tokens differ from those of a rollout.
        head, *turns = self._render(clean, generate=False).split(self._generation)
        texts, agent = [head + self._generation], [False]
        for number, turn in enumerate(turns, start=1):
            action, end, rest = turn.partition(self._end)
            glue = rest + (self._generation if number < len(turns) else "")
            texts += [action + end, glue]
            agent += [True, False]
        if len(turns) != sum(message["role"] == "assistant" for message in messages):
            raise self._refused(
                "its turns cannot be found in a rendered conversation",
                "remove template tokens from the messages",
            )
        if clean[-1]["role"] == "assistant":  # nothing follows the last answer
            texts, agent = texts[:-1], agent[:-1]
        ids: list[int] = []
        mask: list[bool] = []
        for piece, by_agent in zip(self._encode_all(texts), agent, strict=True):
            ids += piece
            mask += [by_agent] * len(piece)
        return ids, mask

    def _read_call(self, body: str) -> ToolCall | str:
        """The call between the tags, or what is wrong with it."""
        try:
            call = json.loads(body)
        except RecursionError:
            return "call is nested too deeply"
        except ValueError as fault:
            return f"call is not JSON: {fault}"
        if not isinstance(call, dict):
            return 'call must be {"name": …, "arguments": {…}}'
        return checked_call(call.get("name"), call.get("arguments"), self._schemas)

    # --- the template ---

    def _encode_observation(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode(self._observation(self._neutral(text))))

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [_with_parsed_arguments(message) for message in messages],
                tools=self._tools or None,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except (TemplateError, TypeError) as fault:
            raise self._refused(f"its chat template fails on a conversation: {fault}") from None
        assert isinstance(text, str)
        return text

    def _observation(self, text: str) -> str:
        """The template's text after the end-of-turn token of a dummy turn that called a tool."""
        response: Message = {"role": "tool", "content": text}
        after = self._render([*self._called_messages, response], generate=True)
        if not after.startswith(self._called):
            raise self._refused("its chat template rewrites earlier turns when a tool responds")
        return after[len(self._called) :]

    @property
    def _called_messages(self) -> list[Message]:
        """A dummy conversation that ends with a call of the first tool."""
        name = next(iter(self._schemas), "tool")
        function = {"name": name, "arguments": {"argument": SENTINEL}}
        call: Message = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }
        return [self._question, call]

    def _find_generation_prompt(self) -> str:
        plain = self._render([self._question], generate=False)
        prompted = self._render([self._question], generate=True)
        if not prompted.startswith(plain) or prompted == plain:
            raise self._refused("its chat template has no generation prompt")
        return prompted[len(plain) :]

    def _find_end_of_turn(self) -> str:
        """The special token that closes an assistant turn."""
        turn: Message = {"role": "assistant", "content": SENTINEL}
        text = self._render([self._question, turn], generate=False)
        if self._generation + SENTINEL not in text:
            raise self._refused("its chat template renders turns unlike its generation prompt")
        end = self._special.match(text.rsplit(SENTINEL, 1)[1])
        if end is None:
            raise self._refused("its chat template closes no turn with a special token")
        return end.group()

    def _check_tools(self) -> None:
        """Keep the dummy conversation up to its call's end of turn; refuse what loses tools."""
        prompt = self._render([self._question], generate=True)
        lost = [name for name in self._schemas if name not in prompt]
        if lost:
            raise self._refused(f"its chat template loses the tool schemas ({', '.join(lost)})")
        called = self._render(self._called_messages, generate=False)
        turn = called[len(prompt) :] if called.startswith(prompt) else ""
        action = turn.partition(self._end)[0]
        if SENTINEL not in action:
            raise self._refused("its chat template loses tool calls")
        if OPEN not in action or CLOSE not in action:
            raise self._refused("its chat template writes tool calls in another format")
        self._called = prompt + action + self._end
        observation = self._observation(SENTINEL)
        if SENTINEL not in observation:
            raise self._refused("its chat template loses tool responses")
        whole = self._encode(self._called + observation)
        if whole != self._encode(self._called) + self._encode(observation):
            raise self._refused("its tokenizer joins text across the end of a turn")

    def _encode(self, text: str) -> list[int]:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _neutral(self, text: str) -> str:
        """`text` with a space inside each special token, so that it stays plain text."""
        return self._special.sub(lambda token: token[0][0] + " " + token[0][1:], text)

    def _refused(self, fault: str, remedy: str = REMEDY) -> ValueError:
        return ValueError(f"model.path={self._name!r}: {fault}; {remedy}")


def _no_tokenizer(path: str, reason: str) -> ValueError:
    return ValueError(
        f"model.path={path!r}: no usable tokenizer ({reason}); give a folder with tokenizer.json "
        "and tokenizer_config.json, or a hub name"
    )


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the tokens that structure a conversation: special ones and `<tag>`s."""
    tokens = {
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or re.fullmatch(r"<[^<>]*>", str(token))
    }
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _with_parsed_arguments(message: Message) -> Message:
    """The OpenAI form has a call's arguments as a JSON string, templates want the object."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}
