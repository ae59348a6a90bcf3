"""The tiny model of a task of the user's: what it is built from, and when it is built anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elpo_ray.config import Config
from elpo_ray.config.compose import composed
from elpo_ray.interfaces import Task
from elpo_ray.models.base import base_key, base_model, digest
from elpo_ray.tasks import make_task

TOOLS = '''
def look_up(word: str) -> str:
    """Look a word up.

    Args:
        word: the word
    """
    return word
'''


def conversation(name: str = "look_up", **arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": name, "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "What is a leaf?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "leaf"},
            {"role": "assistant", "content": "a leaf"},
        ]
    }


def made(folder: Path, *rows: dict[str, Any]) -> tuple[Config, Task]:
    """A run with these demonstrations."""
    (folder / "words_of_the_test.py").write_text(TOOLS)
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        "task: {tools: ['words_of_the_test:look_up'], demonstrations_file: talks.jsonl}\n"
        "cold_start: {cache: cache}\nmodel: {tiny: {hidden_size: 64, num_heads: 2,"
        " num_kv_heads: 2}}\n"
    )
    config = composed([str(folder / "run.yaml")])
    return config, make_task(config.task, 0)


def test_it_speaks_the_demonstrations_and_calls_the_tools(tmp_path: Path) -> None:
    config, task = made(tmp_path, *[conversation(word="leaf")] * 20)
    folder = base_model(config, task)
    assert (folder / "model.safetensors").is_file()
    vocabulary = (folder / "tokenizer.json").read_text()
    assert "What is a leaf?" in vocabulary and "Look a word up." in vocabulary


def test_other_demonstrations_make_another_model_under_the_same_name(tmp_path: Path) -> None:
    keys = []
    for word in ("leaf", "tree", "leaf"):
        keys.append(digest(base_key(*made(tmp_path, conversation(word=word)))))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (conversation("look", word="leaf"), "unknown tool look; use look_up"),
        (conversation(), "argument word is missing"),
    ],
)
def test_a_demonstration_that_no_tool_understands_is_named(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    config, task = made(tmp_path, conversation(word="leaf"), row)
    with pytest.raises(ValueError, match=rf"^demonstration 2: .*{said}"):
        base_model(config, task)


def test_without_demonstrations_there_is_no_tiny_model(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: {train_file: a.jsonl, eval_file: a.jsonl}\n")
    with pytest.raises(ValueError, match=r"model\.path=None: .*task\.demonstrations_file"):
        composed([str(tmp_path / "run.yaml")])


def test_it_is_built_for_the_kind_of_problems_of_reasoning_gym() -> None:
    """Another kind, or the same one with other settings, is another model."""

    def key(*overrides: str) -> str:
        words = ["task=reasoning_gym", "task.tools=[]", *overrides]
        config = composed(words)
        assert config.model.path is None
        return digest(base_key(config, make_task(config.task, 0)))

    keys = [
        key("task.dataset=chain_sum"),
        key("task.dataset=chain_sum", "task.options={max_terms: 3}"),
        key("task.dataset=basic_arithmetic"),
    ]
    assert len(set(keys)) == 3
