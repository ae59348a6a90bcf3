"""The tutorial, block by block, in an empty folder, with a smaller model and fewer steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from documents import Block, Reader, blocks

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
TRAIN = [
    "model.tiny.hidden_size=64", "model.tiny.intermediate_size=128", "model.tiny.num_layers=2",
    "model.tiny.num_heads=2", "model.tiny.num_kv_heads=2",
    "cold_start.epochs=2", "trainer.steps=2", "trainer.inputs_per_step=2",
    "learner.minibatch_inputs=2", "algorithm.growth.n_total=6", "task.eval_problems=4",
    "logging.wandb=disabled", "logging.progress=false",
]  # fmt: skip
MEASURE = ["problems=4", "progress=false"]
PAGE = list(blocks("docs/tutorial.md"))


def walk(reader: Reader, page: list[Block]) -> list[str]:
    """Write the files of a page and type its commands; what each of them printed is compared where
    the page says what is printed."""
    said: list[str] = []
    for block in page:
        if block.title:
            reader.writes(block.title, block.text)
        elif block.language == "sh":
            said.append(reader.types(block.text))
        elif block.language == "output":
            assert said[-1] == block.text
        else:
            assert block.language in ("console", "text"), f"a block that nothing runs: {block}"
    return said


def test_the_tutorial_works_from_an_empty_folder(tmp_path: Path) -> None:
    reader = Reader.beginning(tmp_path, {"train": TRAIN, "evaluate": MEASURE})
    walk(reader, PAGE)
    for run in ("first", "grpo"):
        assert (reader.folder / "runs" / run / "summary.json").is_file()
    assert (reader.folder / "runs" / "first" / "view.html").stat().st_size > 100_000
    assert (reader.folder / "model" / "config.json").is_file()
    lines = (reader.folder / "runs" / "first" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_a_tutorial_that_says_what_is_not_so_is_found(tmp_path: Path) -> None:
    reader = Reader.beginning(tmp_path, {})
    with pytest.raises(AssertionError):
        walk(reader, [Block("sh", "", "echo yes\n"), Block("output", "", "no\n")])
    with pytest.raises(AssertionError, match="nothing runs"):
        walk(reader, [Block("bash", "", "echo yes\n")])
    with pytest.raises(AssertionError):
        walk(reader, [Block("sh", "", "elpo view runs/none | cat\necho after\n")])


def test_the_tutorial_has_ten_steps() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "tutorial.md").read_text()
    assert re.findall(r"^## (\d+)\. ", text, re.MULTILINE) == [str(n) for n in range(1, 11)]
