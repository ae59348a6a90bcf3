"""The README's commands, typed in a fresh folder; what would take long is made small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from documents import ROOT, Block, Reader, blocks

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
PAGE = list(blocks("README.md"))
TINY = [
    "model.tiny.hidden_size=64", "model.tiny.intermediate_size=128", "model.tiny.num_layers=2",
    "model.tiny.num_heads=2", "model.tiny.num_kv_heads=2", "trainer.steps=1",
    "trainer.inputs_per_step=2", "learner.minibatch_inputs=2", "algorithm.growth.n_total=6",
    "task.eval_problems=4", "task.eval_samples=1", "logging.wandb=disabled",
    "logging.progress=false",
]  # fmt: skip
QUICKSTART = [
    *TINY,
    "model.max_context=512",
    "task.countdown.demonstrations=200",
    "trainer.run_name=NAME",
]
SHOP = [*TINY, "cold_start.epochs=1"]
NO_GPUS = re.compile(r"cluster\.gpus=True: \d GPUs asked for .* but this machine has 0")
LINES = [
    line.split(" #")[0].strip()
    for block in PAGE
    if not block.language
    for line in block.text.splitlines()
]
LEFT = {
    "view": ["runs/NAME/view.html"],
    "compare": ["compare.html"],
    "export": ["out/config.json", "out/tokenizer.json"],
}
"""What a command leaves, by its name."""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Somebody who has trained once, and so has runs, and who has the small data that the hub would
    give."""
    reader = Reader.beginning(tmp_path_factory.mktemp("readme"), {})
    reader.types(f"elpo train +experiment=quickstart {' '.join(QUICKSTART)}")
    for name in ("A", "B"):
        shutil.copytree(reader.folder / "runs" / "NAME", reader.folder / "runs" / name)
    for name in ("aime24", "aime25"):
        row = {"problem": f"What is 1 + 1, for {name}?", "answer": "2"}
        reader.writes(f"{name}.jsonl", json.dumps(row) + "\n")
    return reader


def made_small(line: str) -> str | None:
    """A command as it is tried here; None for one that another test tries, or that installs."""
    words = line.split()
    match words[:2]:
        case ["make", target]:
            return f"make --dry-run --directory {ROOT} {target}"
        case ["source", _] | ["elpo", "new"]:
            return None
        case ["elpo", "train"] if "--help" in words:
            return f"{line} > help.txt"
        case ["elpo", "train" | "sft"] if "agent.yaml" in words:
            return None
        case ["elpo", "train" | "sft"]:
            again = " ".join(QUICKSTART) if "trainer.resume=runs/NAME" in words else ""
            return f"{line} {again} check_only=true"
        case ["elpo", "evaluate"]:
            return f"{line} data_dir=. check_only=true"
        case ["elpo", "analyze"]:
            return f"{line} check_only=true"
        case ["elpo", "doctor"]:
            return f"{line} --quick || test $? = 1"
        case ["elpo", "view" | "compare" | "grade" | "export" | "credit" | "simulate" | "launch"]:
            return line
    raise AssertionError(f"{line}: say here how this is tried")


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_readme_does_what_it_says(line: str, reader: Reader) -> None:
    command = made_small(line)
    if command is None:
        return
    try:
        reader.types(command)
    except AssertionError as failed:
        big = re.search(r"experiment=(aime|paper)", line)
        assert big and NO_GPUS.search(str(failed)), failed
    for left in LEFT.get(line.split()[1], ()):
        assert (reader.folder / left).is_file(), left


def test_the_project_of_the_readme_trains(tmp_path: Path) -> None:
    (line,) = (line for line in LINES if line.startswith("elpo new"))
    reader = Reader.beginning(tmp_path, {"train": SHOP})
    reader.types(line)
    (run,) = (reader.folder / "demo" / "runs").glob("agent-*")
    assert (run / "summary.json").is_file()
    (line,) = (line for line in LINES if "train agent.yaml algorithm" in line)
    reader.types(f"cd demo && {line} check_only=true")


def titled(title: str) -> Block:
    (found,) = (block for block in PAGE if block.title == title)
    return found


def test_the_agent_of_twelve_lines_is_one(tmp_path: Path) -> None:
    code = titled("shop.py").text
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    reader = Reader.beginning(tmp_path, {})
    for title in ("shop.py", "agent.yaml"):
        reader.writes(title, titled(title).text)
    (row,) = re.findall(r'`(\{"prompt": .*?\})`', (ROOT / "README.md").read_text())
    reader.writes("train.jsonl", row + "\n")
    reader.writes("eval.jsonl", row.replace("exactly 10", "exactly 14") + "\n")
    reader.writes("demonstrate.py", DEMONSTRATE)
    reader.types("python demonstrate.py")
    tiny = "model.path=null task.demonstrations_file=demonstrations.jsonl model.max_context=512"
    said = reader.types(f"elpo train agent.yaml {tiny} cluster=local check_only=true")
    assert "elpo: growth bel" in said


DEMONSTRATE = """
import json
from shop import Cart

row = json.loads(open("train.jsonl").read())
cart = Cart()
cart.reset(**row)
messages = [{"role": "user", "content": row["prompt"]}]
for thing in ("milk", "bread", "bread"):
    call = {"type": "function", "function": {"name": "add", "arguments": {"thing": thing}}}
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    messages.append({"role": "tool", "content": cart.add(thing)})
assert cart.reward()
messages.append({"role": "assistant", "content": "done"})
open("demonstrations.jsonl", "w").write(json.dumps({"messages": messages}) + "\\n")
"""


def test_the_makefile_has_what_the_readme_names() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"make (?:[A-Z]+=\S+ )?([a-z][a-z-]+)`?", text))
    known = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"quickstart", "test", "install", "docs"} <= targets
    for target in targets & {"quickstart", "test", "install", "docs", "lint"}:
        assert re.search(rf"^{target}\b", known.stdout, re.MULTILINE), target
