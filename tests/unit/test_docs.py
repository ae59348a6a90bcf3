"""The documentation builds without a warning, and its examples run."""

from __future__ import annotations

import asyncio
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from fakes import FakeTools, Plan, make_config, make_worker, planted
from test_architecture import ORDER

from elpo_ray.config import Config
from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.config.dotted import load_object
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.modules import use_modules
from elpo_ray.config.reference import explanations, keys, markdown
from elpo_ray.config.rules import Names
from elpo_ray.config.task import TaskConfig
from elpo_ray.credit.parts import leaf_mean
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Score, Step, Turn
from tests import gpu_page

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r'```python title="([^"]+)"\n(.*?)```', re.DOTALL)


def block(name: str) -> dict[str, Any]:
    """What the block of that title in docs/extending.md defines."""
    code = dict(BLOCK.findall((ROOT / "docs" / "extending.md").read_text()))[f"{name}.py"]
    defined: dict[str, Any] = {"__name__": name}
    exec(compile(code, f"{name}.py", "exec"), defined)
    return defined


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],  # -q finds none
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "learner.optimizer.lr" in (tmp_path / "configuration" / "index.html").read_text()


def test_the_home_page_begins_with_a_picture_that_exists() -> None:
    home = (ROOT / "docs" / "index.md").read_text().split("\n## ")[0]
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", home)
    assert pictures and all((ROOT / "docs" / picture).is_file() for picture in pictures)


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in nav]
    assert not missing


DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/*.md", "docs/images/*.svg", "sandbox/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it names what is gone
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_paths_that_a_document_names_exist(document: Path) -> None:
    folders = "elpo_ray|sandbox|launch|conf|tests|benchmarks|docs|docker|requirements|examples"
    named = re.findall(rf"(?<![\w./])(?:{folders})/[\w./-]*+(?![*{{])", document.read_text())
    names = {name.rstrip(".") for name in named if "NAME" not in name}
    assert not [name for name in sorted(names) if not (ROOT / name).exists()]


def test_the_table_of_what_fits_is_that_of_check_only() -> None:
    text = gpu_page.PAGE.read_text()
    assert gpu_page.written(text, gpu_page.fits()) == text, "python -m tests.gpu_page writes it"


LIST = re.compile(r"(?:(?<=\s)|(?<=`)|^)[a-z_]+(?:\.[a-z_]+)*=\[[^\]\s]*\](?![),])", re.MULTILINE)
"""A list on a command line without quotes: zsh takes it for a pattern of file names."""
HELPS = [*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("launch/conf/**/*.yaml")]


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, *HELPS, *ROOT.glob("examples/**/*.md")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_lists_on_command_lines_are_quoted(document: Path) -> None:
    if document.suffix != ".svg":
        assert not LIST.findall(document.read_text())


def test_the_map_for_contributors_has_the_order_of_the_imports() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"^ ([a-z]+)  +\S", page, re.MULTILINE)
    assert names == ["commands", *reversed(ORDER)]


def test_the_reference_has_every_key_with_its_explanation() -> None:
    found = {key.name: key for key in keys(Config)}
    assert found["learner.optimizer.lr"].default == "1e-06"
    assert found["cold_start.optimizer.lr"].default == "1e-05"
    assert found["learner.optimizer.lr"].type == "float > 0"
    assert found["learner.lora.rank"].type == "int ≥ 1 or null"
    assert found["learner.optimizer.betas"].type == "list of 2 float in [0, 1)"
    assert found["algorithm.clip.scope"].type.startswith("none, critical_subtree")
    assert "Eq. 11" in found["algorithm.clip.scope"].explanation
    assert found["task.train_file"].type == "str or null"
    page = markdown()
    for name in found:
        assert f"| `{name}` |" in page


def choices(kind: Any) -> Iterator[type[Enum]]:
    """The choices among the keys of a schema, or within a type."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        yield kind
    elif isinstance(kind, Names):
        yield kind.builtin
    elif isinstance(kind, type) and is_dataclass(kind):
        for hint in get_type_hints(kind, include_extras=True).values():
            yield from choices(hint)
    for part in get_args(kind):
        yield from choices(part)


HOOK = runpy.run_path(str(ROOT / "docs" / "hooks" / "reference.py"))


@pytest.mark.parametrize("schema", [Config, *HOOK["COMMANDS"].values()])
def test_every_key_and_option_is_described(schema: type[Any]) -> None:
    for key in keys(schema):
        assert key.explanation, f"write what {key.name} is below its field"
    silent = [
        f"{choice.__name__}.{option.name}"
        for choice in choices(schema)
        for option in choice
        if option.name not in explanations(choice)
    ]
    assert not silent


def test_a_key_without_a_description_is_found() -> None:
    found = {key.name: key.explanation for key in keys(Silent)}
    assert found == {"spoken": "It is described.", "silent": "", "inherited": ""}


@dataclass
class Parent:
    inherited: int = 0


@dataclass
class Silent(Parent):
    spoken: int = 0
    """It is described."""
    silent: int = 0


def step(text: str) -> Step:
    return Step(Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0), action_text=text)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of the examples with rules can be imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    use_modules([str(ROOT / "examples" / name) for name in ("credit_rule", "growth_rule")])
    yield
    use_modules([])


@pytest.mark.usefixtures("examples")
def test_the_credit_rule_ranks_leaves() -> None:
    parts_of = load_object("algorithm.credit.rule", "ranked:parts")
    tree = RolloutTree("t", 3)
    for reward in (5.0, -1.0, 0.0):
        tree.add_trajectory(0, [step("x")], Score(reward, reward > 0))
    (parts,) = parts_of([tree], CreditConfig())
    assert leaf_mean(tree, parts.leaf) == [0.0, 1.0, -1.0, 0.0]
    lone = RolloutTree("t", 1)
    leaf = lone.add_trajectory(0, [step("x")], Score(-1.0, False))
    assert parts_of([lone], CreditConfig())[0].leaf == {leaf: 0.0}


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("plan", [planted(3, 2), planted(1, 1), lambda number, before: ["=ok"]])
def test_the_growth_rule_spends_the_budget(plan: Plan) -> None:
    config = make_config(GrowthConfig(rule="twice:grow", n_total=9))
    worker = make_worker(plan, config)
    tree = asyncio.run(worker.grow(worker.task.train_problem(0), 0))
    assert len(tree.leaves()) == 9
    branched = [entry for entry in tree.ledger if entry["anchor"] == 1]
    assert len(branched) == (4 if len(plan(0, [])) > 1 else 0)


async def test_the_task_scores_its_own_answers() -> None:
    task = block("sums")["Sums"](TaskConfig(), 0)
    problem = task.train_problem(3)
    right = step(f"the sum = {problem.ground_truth}")
    assert await task.score(problem, [right], FakeTools()) == Score(1.0, True)
    assert await task.score(problem, [step("= 0")], FakeTools()) == Score(-1.0, False)
    held_out = {held.messages[0]["content"] for held in task.eval_problems(5)}
    assert problem.messages[0]["content"] not in held_out and len(held_out) == 5


def test_what_the_page_on_isolation_names_for_a_promise_exists() -> None:
    page = (ROOT / "docs/isolation.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests/real/sandbox").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 5 and not [name for name in named if f"def {name}(" not in tests]
    sources = "".join(path.read_text() for path in (ROOT / "tests/attack").glob("against_*.py"))
    made = set(map(int, re.findall(r"(?:@attack\(|denied\(\s*|ends\(\s*)(\d+),", sources)))
    assert f"makes {len(made)} attacks" in page
    cells = [row.split("|")[-2].strip() for row in page.splitlines() if row.startswith("|")]
    proof = re.compile(r"(?:(?:\d+(?: to \d+)?|`test_\w+`)(?:, |$))+")
    spans = re.findall(r"\b(\d+)(?: to (\d+))?", " ".join(filter(proof.fullmatch, cells)))
    shown = {n for low, high in spans for n in range(int(low), int(high or low) + 1)}
    assert shown <= made
    assert not {number for number in made - shown if number > 61}, "an attack that shows nothing"
