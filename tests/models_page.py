"""Makes docs/models.md: `python -m tests.models_page > docs/models.md`.

Every row is what was checked: the template of a family is given to `Chat`, which makes its round
trip or says why not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from elpo_ray.chat.template import Chat
from elpo_ray.chat.training_templates import TRAINING_TEMPLATES, change_of
from elpo_ray.models.architectures import architecture_rows
from elpo_ray.types import Message
from tests import templates

FAMILIES: dict[str, Sequence[str]] = {
    "Qwen2.5": ("qwen2_5",),
    "Qwen3": ("qwen3",),
    "Qwen3-2507": ("qwen3_instruct_2507",),
    "Qwen3-VL": ("qwen3_vl",),
    "Qwen3.5": ("qwen3_5_think", "qwen3_5_nothink"),
    "Qwen3.6": ("qwen3_6",),
    "Qwen3.8": ("qwen3_8",),
    "Llama 3.1, 3.2": ("llama3_1", "llama3_2"),
    "gpt-oss": ("gptoss",),
    "GLM-4-MoE": ("glm4moe",),
    "DeepSeek-V3": ("deepseekv3",),
    "Gemma 4": ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"),
    "Nemotron 3": (
        "nemotron_3_nano",
        "nemotron_3_super",
        "nemotron_3_ultra",
        "nemotron_3_5_lightning",
    ),
    "LFM2, LFM2.5": ("lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"),
    "Muse Glimmer": ("muse_glimmer",),
}
"""Families by the names of their templates in trl; a `_training` variant belongs to them too."""

TOOL = {
    "type": "function",
    "function": {
        "name": "add_item",
        "description": "Put something into the cart.",
        "parameters": {
            "type": "object",
            "properties": {
                "item": {"type": "string", "description": "What to add."},
                "count": {"type": "integer", "description": "How many."},
                "price": {"type": "number", "description": "At most this much."},
                "gift": {"type": "boolean", "description": "Whether to wrap it."},
                "tags": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "Labels.",
                },
                "options": {
                    "type": "object",
                    "properties": {"deep": {"type": "boolean"}},
                    "description": "More.",
                },
            },
            "required": ["item"],
        },
    },
}
SEARCH = {
    "type": "function",
    "function": {
        "name": "search_shop",
        "description": "Search the shop.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "Words."}},
            "required": ["query"],
        },
    },
}
TOOLS = [TOOL, SEARCH]

HEAD = """\
# Models

<!-- Made by `python -m tests.models_page > docs/models.md`; a test keeps it up to date. -->

A model is used if its chat template makes a round trip, which happens before anything starts:

* a call of every tool is rendered and read back as the same call, with arguments that hold quotes,
  braces, line ends and tags;
* a conversation of several turns gives the same tokens, rendered as a whole or piece by piece as a
  rollout builds it;
* the targets of a demonstration are the agent's turns, each with the token that ends it.

A template that fails is refused with the reason. No model is downloaded for this page: the
templates are those that `trl` 1.16 carries, with tokenizers that have their special tokens.

## Call formats

The chat template shows which format a model uses. `model.tool_parser` names another one: `hermes`,
`harmony`, or one of vLLM's tool parsers. Hermes and harmony are read without vLLM. The others are
read by vLLM's parsers, whose import takes some ten seconds in each process.

`model.template_options` sets variables of the template. If the template knows the variable
`enable_thinking`, `'model.template_options={enable_thinking: false}'` switches thinking off.
"""

CALLS = """
## What is a call

* **Thinking** stays in the context as it was sampled, and calls are not looked for in it. A draft
  inside a thought is no call. A turn that never ends its thought has no call.
* **A tag in prose is no call.** The opening tag of a call counts in two cases: the parts of a call
  follow it, or it begins a line and its closing tag ends the line or the turn. Any other tag is a
  word of an answer, also one directly behind a backtick. Llama's format has no tags. There a call
  is a line that begins with `{"name": "`, followed by the name of a tool or by parameters.
* **A malformed call** has a tag that counts, but cannot be read. The policy gets a response of the
  tool that says what is wrong.
* **Arguments may contain the tags**, also the closing one.
* **Two or more calls in one turn** get an error as response: one call is allowed.
* **Arguments are checked** against the tool's JSON schema. If an argument is text but the schema
  does not allow text (`"3"` for an integer), it is read as JSON first.

Mistral's format is read too, if the template shows the model its tools. `trl` has no such template,
so only one that was written for the test has been tried.

gpt-oss is read by our own reader of harmony, because vLLM's reader works with one vocabulary only,
which it downloads. Rewards and dumps see the text of its turns without headers, with thoughts
between `<think>` tags.
"""

TRAINING = """
## Templates that are changed for training

A rollout only appends to what was sampled. Some templates render a turn in another way once a tool
has answered, or write calls that cannot be read. If such a template is known, by the hash of its
text, it is changed for training. The model's folder keeps the template as it was, so a program that
serves the trained model renders those turns in the old way.
"""


@cache
def outcome(name: str) -> Chat | str:
    """The chat of a template, or why it is refused."""
    try:
        return Chat(templates.tokenizer(templates.text(name)), TOOLS)
    except ValueError as fault:
        return str(fault)


def family_of(name: str) -> str | None:
    """The family that a template belongs to."""
    plain = name.removesuffix("_training")
    return next((family for family, names in FAMILIES.items() if plain in names), None)


def family_rows() -> list[list[str]]:
    """Family, templates that passed, format, thinking, ends of turns, and template trained with."""
    rows = []
    for family, names in FAMILIES.items():
        passed = [name for name in templates.names() if family_of(name) == family]
        chats = [chat for chat in map(outcome, passed) if isinstance(chat, Chat)]
        assert len(chats) == len(passed), family
        formats = {chat.format.parser for chat in chats if chat.format is not None}
        ends = sorted({end for chat in chats for end in _ends(chat)})
        changed = {change_of(templates.text(name)) is not None for name in names}
        ours = {True: "changed", False: "its own"}
        rows.append(
            [
                family,
                str(len(passed)),
                ", ".join(f"`{name}`" for name in sorted(formats)),
                _thinking(chats),
                ", ".join(f"`{end}`" for end in ends),
                " or ".join(ours[is_changed] for is_changed in sorted(changed)),
                " or ".join(sorted({_text_beside_a_call(chat) for chat in chats})),
            ]
        )
    return rows


def refused_rows() -> list[list[str]]:
    """Reason and templates that are refused for it."""
    reasons: dict[str, list[str]] = {}
    for name in templates.names():
        fault = outcome(name)
        if isinstance(fault, str):
            reason = re.sub(r" \([^;]*\)", "", fault.split(": ", 1)[1].split("; ")[0])
            reasons.setdefault(reason, []).append(f"`{name}`")
    return [[reason, ", ".join(names)] for reason, names in sorted(reasons.items())]


def changed_rows() -> list[list[str]]:
    """Family, template and what is changed in it."""
    rows = []
    for family, names in FAMILIES.items():
        for change in TRAINING_TEMPLATES:
            if mine := [f"`{n}`" for n in names if change_of(templates.text(n)) is change]:
                rows.append([family, ", ".join(mine), change.why])
    return rows


def _ends(chat: Chat) -> list[str]:
    return [str(chat.tokenizer.convert_ids_to_tokens(id)) for id in chat.end_of_turn_ids]


def _thinking(chats: Sequence[Chat]) -> str:
    """What the generation prompt of each template does about thinking."""
    words = set()
    for chat in chats:
        prompt = chat.tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "q"}]))
        tail = str(prompt).rpartition("q")[2]
        words.add(
            "off"
            if "</think>" in tail
            else "opened by the prompt"
            if "<think>" in tail
            else "left to the model"
        )
    return " or ".join(sorted(words))


def _text_beside_a_call(chat: Chat) -> str:
    """Whether a demonstration may have text in a turn that calls."""
    function = {"name": "search_shop", "arguments": {"query": "x"}}
    turn: Message = {
        "role": "assistant",
        "content": "Aside",
        "tool_calls": [{"function": function}],
    }
    ids, _ = chat.conversation_ids([{"role": "user", "content": "q"}, turn])
    return "kept" if "Aside" in str(chat.tokenizer.decode(ids)) else "dropped"


ARCHITECTURES = """
## Architectures

A tiny random model of each class is compared: the engine's log-probabilities with the learner's,
before and after new weights have been sent, and the gradients of trees with those of flat
sequences. `tree` means that a prefix which trajectories share goes through the model once. For any
other model the check before a run says what it can do.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def families_section() -> str:
    head = ["family", "templates", "format", "thinking", "turns end with", "template"]
    head += ["text beside a call in a demonstration"]
    return "\n".join([HEAD, table(head, family_rows()), CALLS])


def changed_section() -> str:
    return "\n".join([TRAINING, table(["family", "template", "why"], changed_rows())])


def refused_section() -> str:
    rows = table(["reason", "templates"], refused_rows())
    return "\n".join(["\n## Templates that are refused\n", rows, ""])


def architectures_section() -> str:
    head = ["class in transformers", "trained on", "test", "remarks"]
    rows = [[row.name, row.packing, row.checked_by, row.remarks] for row in architecture_rows()]
    return "\n".join([ARCHITECTURES, table(head, rows), ""])


SECTIONS = (families_section, changed_section, refused_section, architectures_section)
"""The parts of the page in order; each is made by a function of its own."""


def page() -> str:
    return "\n".join(section() for section in SECTIONS)


if __name__ == "__main__":
    print(page(), end="")
