"""How a template frames turns: generation prompts, ends of turns, glue, learnt by rendering.

Glue is never written by hand: it is what the template renders after the end of a turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elpo_ray.chat.families import Rendered
from elpo_ray.chat.rendering import Rendering, alike
from elpo_ray.types import Message

SENTINEL = "Sentinel"
"""Stands for an argument or a tool response in the dummy conversations."""
QUESTION: Message = {"role": "user", "content": "question"}
RESPONSE: Message = {"role": "tool", "content": SENTINEL}


@dataclass(frozen=True, slots=True)
class Turns:
    """The frame of turns in one template."""

    answer_end: str
    """The special token that ends a turn without a call."""
    call_end: str
    """The special token that ends a turn with a call: often, but not always, the same."""
    call: Rendered | None
    """A turn that does nothing but call; None without tools."""

    def response(self, rendering: Rendering, text: str, tool: str | None) -> str:
        """The template's text after a turn that called `tool` (the first if None) and got `text`:
        glue, response and the next generation prompt."""
        called = dummy_call(rendering, tool)
        prompt = rendering.render(called[:1], generate=True)
        response: Message = {"role": "tool", "content": text}
        after = rendering.render([*called, response], generate=True)
        if not after.startswith(prompt):
            raise rendering.refused("its chat template rewrites earlier turns when a tool responds")
        return after[len(prompt) :].partition(self.call_end)[2]

    @classmethod
    def of(cls, rendering: Rendering) -> Turns:
        """Learn them, with the first tool. ValueError for a template that no rollout can use."""
        prompt = rendering.render([QUESTION], generate=True)
        _check_schemas(rendering, prompt)
        answer_end = _end_of_answer(rendering, prompt)
        if not rendering.tools:
            return cls(answer_end, answer_end, None)
        for text in ("text", ""):
            call = dummy_call(rendering, text=text)
            called = rendering.render(call)
            if not called.startswith(prompt) or SENTINEL not in called[len(prompt) :]:
                raise rendering.refused("its chat template loses tool calls")
            after = rendering.render([*call, RESPONSE], generate=True)
            if not after.startswith(called.rstrip()):
                raise rendering.refused(
                    "its chat template rewrites earlier turns when a tool responds"
                )
        end = _end_of_call(rendering, called.rstrip(), after, answer_end)
        turn = after[len(prompt) :].partition(end)[0]
        response = after[len(prompt) + len(turn) + len(end) :]
        if SENTINEL not in response:
            raise rendering.refused("its chat template loses tool responses")
        function = rendering.tools[0]["function"]
        prompts = (_generation(rendering), response.rpartition(SENTINEL)[2])
        alone = Rendered(turn, function["name"], _key(function), SENTINEL, prompts)
        return cls(answer_end, end, alone)


def dummy_call(rendering: Rendering, tool: str | None = None, *, text: str = "") -> list[Message]:
    """A dummy conversation that ends with a call of a tool, the first if none is named."""
    functions = {entry["function"]["name"]: entry["function"] for entry in rendering.tools}
    name = tool if tool in functions else next(iter(functions))
    function = {"name": name, "arguments": {_key(functions[name]): SENTINEL}}
    return [
        QUESTION,
        {
            "role": "assistant",
            "content": text,
            "tool_calls": [{"type": "function", "function": function}],
        },
    ]


def _key(function: dict[str, Any]) -> str:
    """The parameter that a dummy call gives."""
    return next(iter((function.get("parameters") or {}).get("properties", {})), "argument")


def _generation(rendering: Rendering) -> str:
    """The generation prompt: what is rendered only if it is asked for."""
    prompt = rendering.render([QUESTION], generate=True)
    return prompt[alike(rendering.render([QUESTION]), prompt) :]


def _end_of_answer(rendering: Rendering, prompt: str) -> str:
    """The special token after an answer; where the template writes none, the one that follows it
    when the user speaks again, which is what the model then samples."""
    answer: Message = {"role": "assistant", "content": SENTINEL}
    text = rendering.render([QUESTION, answer])
    if not text.startswith(prompt) or SENTINEL not in text[len(prompt) :]:
        raise rendering.refused("its chat template renders turns unlike its generation prompt")
    header = text[len(prompt) :].partition(SENTINEL)[0]
    if not _generation(rendering) and rendering.special.search(header):
        raise rendering.refused("its chat template has no generation prompt")
    rest = text.rpartition(SENTINEL)[2]
    if not rest:
        rest = rendering.render([QUESTION, answer, QUESTION]).rpartition(SENTINEL)[2]
    end = rendering.special.match(rest)
    if end is None:
        raise rendering.refused("its chat template closes no turn with a special token")
    return end.group()


def _check_schemas(rendering: Rendering, prompt: str) -> None:
    """Refuse a template that does not show the model every tool with its parameters."""
    lost = []
    for tool in rendering.tools:
        function = tool["function"]
        properties = (function.get("parameters") or {}).get("properties", {})
        lost += [name for name in (function["name"], *properties) if name not in prompt]
    if lost:
        raise rendering.refused(f"its chat template loses the tool schemas ({', '.join(lost)})")


def _end_of_call(rendering: Rendering, called: str, after: str, answer_end: str) -> str:
    """The special token that ends a turn with a call: that of an answer if the turn has it, else
    the last of the turn, or the one that follows it where the turn ends with a closing tag."""
    rest = called.rpartition(SENTINEL)[2]
    if answer_end in rest:
        return answer_end
    last = [token.group() for token in rendering.special.finditer(rest)]
    if last and rest.endswith(last[-1]) and not last[-1].startswith("</"):
        return last[-1]
    follows = rendering.special.match(after[len(called) :].lstrip())
    if follows is None:
        raise rendering.refused("its chat template closes no call with a special token")
    return follows.group()
