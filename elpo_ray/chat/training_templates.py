"""Training templates: known templates, changed where they would not train as they sample.

A rollout appends to what was sampled, and a demonstration must give the same tokens. Some templates
render a turn in another way once something follows it, or cannot be read back. Those known here, by
the hash of their text, are changed in the places below and nowhere else. The model's folder keeps
its own template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HASH_LENGTH = 16
"""Hexadecimal digits of the SHA-256 of a template, white space at its ends left out."""


@dataclass(frozen=True, slots=True)
class TrainingTemplate:
    """What is changed in some templates, and why."""

    hashes: Sequence[str]
    why: str
    edits: Sequence[tuple[str, str]] = ()
    """Texts of the template, each replaced wherever it stands."""
    file: str | None = None
    """A template of our own in place of the model's."""

    def of(self, template: str) -> str:
        """The training template for a template with one of the hashes."""
        if self.file is not None:
            return (Path(__file__).parent / "templates" / self.file).read_text(encoding="utf-8")
        for old, new in self.edits:
            assert old in template, f"{old!r} is not in the template"
            template = template.replace(old, new)
        return template


GEMMA_4_WHY = (
    "It writes the text of a turn behind the turn's calls, and once a tool has answered behind the "
    "answer; ours writes it in front of the calls, where the model samples it."
)
GEMMA_4_TEXT = "{%- if message.get('tool_calls') -%}{%- elif message['content'] is string -%}"
GEMMA_4_TEXT_FIRST = (
    "{%- if message.get('tool_calls') and message.get('content') is string -%}"
    "{{- strip_thinking(message['content']) -}}{%- endif -%}"
)
LFM_QUOTED = (
    r"""{{- "'" + (arg_value | replace("\\", "\\\\") | replace("'", "\\'") """
    r"""| replace("\n", "\\n") | replace("\r", "\\r")) + "'" -}}"""
)

TRAINING_TEMPLATES = (
    TrainingTemplate(
        hashes=("a55ee1b1660128b7",),  # Qwen3
        why="It writes an empty thought into the last turn and takes it out again once a tool has "
        "answered; ours keeps it.",
        edits=[("loop.last or (not loop.last and reasoning_content)", "true")],
    ),
    TrainingTemplate(
        hashes=("a4c9919cbbd4acdd", "6adda7cea0f63ef1"),  # gpt-oss
        why="It takes the thoughts of all turns out again once the final answer is there; ours "
        "keeps them.",
        edits=[(" and not future_final_message.found", "")],
    ),
    TrainingTemplate(
        hashes=("33204f1acb5bd000", "55572b8d3c834204", "2f1b4d75d067bae3"),  # Gemma 4
        why=GEMMA_4_WHY,
        edits=[
            ("{%- if message['content'] is string -%}", GEMMA_4_TEXT),
            (
                "{%- if message['tool_calls'] -%}",
                GEMMA_4_TEXT_FIRST + "{%- if message['tool_calls'] -%}",
            ),
        ],
    ),
    TrainingTemplate(
        hashes=("781d10940fbc44be",),  # Gemma 4
        why=GEMMA_4_WHY,
        edits=[
            ("{%- if message['content'] is string -%}", GEMMA_4_TEXT),
            (
                "{%- if message['tool_calls'] -%}",
                GEMMA_4_TEXT_FIRST + "{%- if message['tool_calls'] -%}",
            ),
            ("(ns_tr_out.flag and not message.get('content'))", "ns_tr_out.flag"),
        ],
    ),
    TrainingTemplate(
        hashes=("603a42db292c2527",),  # Gemma 4
        why=GEMMA_4_WHY + " Where thinking is on, it also opens a thought after each answer of a "
        "tool; ours leaves that to the model, as before the first turn.",
        edits=[
            ("{%- if message.get('content') is string -%}", GEMMA_4_TEXT),
            (
                "{%- if message.get('tool_calls') -%}\n                {%- for",
                GEMMA_4_TEXT_FIRST
                + "{%- if message.get('tool_calls') -%}\n                {%- for",
            ),
            ("ns.prev_message_type == 'tool_response' and enable_thinking", "false"),
        ],
    ),
    TrainingTemplate(
        hashes=(
            "43a92aacc2e169bb",
            "27f60673625fd5c9",
            "3b74d76d8b903752",
            "419481c732d993ad",
            "82753bef5cedc493",
            "d61cca230ac4f813",
            "58933db77d3099b4",
            "a44efc49cf02e3de",
        ),  # Nemotron 3
        why="Where thinking is on, its generation prompt opens a thought that a turn without one "
        "does not contain; ours writes an empty thought into such a turn.",
        edits=[
            (
                '{%- set content = "<think></think>" ~ content -%}',
                '{%- set content = ("<think>\\n\\n</think>\\n" if enable_thinking else '
                '"<think></think>") ~ content -%}',
            )
        ],
    ),
    TrainingTemplate(
        hashes=("6d65c8804847ad74", "c5b67247c9f736f6"),  # LFM2.5
        why="It writes text arguments without escaping quotes and line ends, so that such a call "
        "cannot be read; ours escapes them.",
        edits=[("""{{- "'" + arg_value + "'" -}}""", LFM_QUOTED)],
    ),
    TrainingTemplate(
        hashes=("563b1ce7d61d50a9", "aadb4942004c186f"),  # DeepSeek-V3
        why="It has no place for tool schemas, writes a second call without its beginning and "
        "gives turns without a thought another beginning than its generation prompt; ours is "
        "written anew on the same special tokens, and opens a thought before every turn.",
        file="deepseek_v3.jinja",
    ),
)


def training_template(template: str) -> str:
    """The template to train with: ours where the model's is known to need one, else its own."""
    changed = change_of(template)
    return template if changed is None else changed.of(template)


def change_of(template: str) -> TrainingTemplate | None:
    """What is changed in a template; None if it is used as it is."""
    digest = hashlib.sha256(template.strip().encode()).hexdigest()[:HASH_LENGTH]
    return next((known for known in TRAINING_TEMPLATES if digest in known.hashes), None)
