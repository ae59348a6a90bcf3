"""Which call format a model's template writes: told by a call that the template has rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from elpo_ray.chat.harmony import Harmony
from elpo_ray.chat.hermes import Hermes
from elpo_ray.chat.reading import CallFormat
from elpo_ray.chat.thinking import Opened, Thinking
from elpo_ray.chat.vllm_calls import Frame, VllmCalls, check_parser, tags_of

MARKS = {
    "hermes": r"<tool_call>\s*{",
    "harmony": r"to=functions\.NAME<\|channel\|>",
    "qwen3_coder": "<tool_call>\\s*<function=NAME>",
    "glm45": r"<tool_call>NAME\s*<arg_key>",
    "llama3_json": '{"name": "NAME", "parameters": ',
    "gemma4": r"<\|tool_call>call:NAME{",
    "lfm2": r"<\|tool_call_start\|>\[NAME\(",
    "deepseek_v3": r"<｜tool▁sep｜>NAME\s*```json",
    "deepseek_v31": "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
    "muse_glimmer": '<atem:invoke name="NAME">',
    "mistral": r"\[TOOL_CALLS\]",
}
"""What a rendered call of each format looks like, NAME standing for the tool; the first that fits
is taken. The formats are vLLM's names for them, but for `hermes` and `harmony`, which are ours."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A turn that does nothing but call, as the template renders it, and the generation prompts."""

    turn: str
    """Between the generation prompt and the end-of-turn token."""
    name: str
    key: str
    """The called tool and its argument."""
    value: str
    prompts: tuple[str, str]
    """The generation prompts before the first turn and after a tool's response."""


def call_format(
    call: Rendered,
    tool_parser: str | None,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]],
) -> CallFormat | None:
    """The format named by `tool_parser` (`model.tool_parser`), else the one that the rendered call
    shows; None if it shows none. ValueError if no parser has that name."""
    name = tool_parser or next((name for name in MARKS if _fits(name, call)), None)
    if name is None:
        return None
    if name in ("hermes", "harmony"):
        thinking = _opened(Thinking(), call.prompts)
        return Hermes(thinking) if name == "hermes" else Harmony(thinking)
    check_parser(name)
    try:
        thinking = _opened(tags_of(name, tokenizer), call.prompts)
        turn = call.turn.rpartition(thinking.close)[2]
        frame = Frame.of(turn, call.name, call.key, call.value)
        return VllmCalls(name, tokenizer, tools, thinking, frame)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as fault:
        reason = " ".join(str(fault).split())
        raise ValueError(
            f"model.tool_parser={name!r}: vLLM's parser does not take this model ({reason}); use "
            "another parser or a model of docs/models.md"
        ) from None


def _fits(name: str, call: Rendered) -> bool:
    pattern = MARKS[name].replace("{", r"\{").replace("NAME", re.escape(call.name))
    return re.search(pattern, call.turn) is not None


def _opened(tags: Thinking, prompts: tuple[str, str]) -> Thinking:
    opens = [tags.is_open(prompt) for prompt in prompts]
    opened = Opened.ALWAYS if all(opens) else Opened.SOMETIMES if any(opens) else Opened.NEVER
    return replace(tags, opened=opened)
