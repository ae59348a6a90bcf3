"""Environments in trees: whichever way a state is copied, the same trees grow."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.task import Branching, TaskConfig
from elpo_ray.interfaces import Policy
from elpo_ray.rollout.journal import Completion
from elpo_ray.rollout.settings import RolloutSettings
from elpo_ray.rollout.worker import RolloutWorker, opened_by
from elpo_ray.tools import catalog
from elpo_ray.tools.agent import AgentTools
from elpo_ray.tools.caller import Caller
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Problem, RewardValue, Sampling, Score, Turn
from tests.fakes import FakeChat, FakeTask, ScriptedPolicy, bel, decode, encode, make_config


class Walk:
    """A walk whose every answer depends on all steps before it."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.place = 0

    def reset(self, start: int = 0) -> str:
        self.place = start
        return f"at {start}"

    def move(self, move: str) -> str:
        """Walk.

        Args:
            move: where to
        """
        if move == "x":
            raise ValueError(f"no way at {self.place}")
        self.path.append(move)
        self.place = (self.place * 31 + ord(move[0])) % 1009
        return f"{len(self.path)}:{self.place}"

    def reward(self) -> bool:
        return "b" not in self.path


class ForkedWalk(Walk):
    def fork(self) -> ForkedWalk:
        made = ForkedWalk()
        made.path, made.place = list(self.path), self.place
        return made


class LockedWalk(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Judged(FakeTask):
    """Succeeds as the environment says, and answers well."""

    async def score(
        self, problem: Problem, steps: Any, tools: Any, environment: RewardValue = None
    ) -> Score:
        assert isinstance(environment, bool)
        success = environment and steps[-1].action_text.startswith("=ok")
        return Score(1.0 if success else -1.0, success)


PROBLEM = Problem(
    "p", ({"role": "user", "content": "walk"},), None, extra={"row": {"start": 3, "further": 1}}
)
WAYS = [(ForkedWalk, "auto"), (Walk, "auto"), (ForkedWalk, "deepcopy"), (Walk, "replay"),
        (LockedWalk, "auto")]  # fmt: skip


def tools_of(kind: type[Walk], branching: str) -> AgentTools:
    entry = f"{__name__}:{kind.__name__}"
    task = TaskConfig(name="jsonl", tools=[entry], branching=Branching(branching))
    caller = Caller(5.0)
    made = catalog.sources(task, caller)
    return AgentTools(catalog.joined(task, SandboxConfig(), made), None, made, caller)


class SeededPolicy:
    """Draws each turn from the seed that it is given: random moves, some of them wrong, malformed
    or raising. So a completion does not depend on which others run beside it."""

    async def generate(self, prefix: Sequence[int], sampling: Sampling) -> Turn:
        rng = Random(sampling.seed)
        words = ["g", "h", "b", "x", "?", "=ok", "=no"]
        (word,) = rng.choices(words, [8, 6, 1, 1, 1, 3, 1])
        ids = tuple(encode(f"{word}~{rng.randrange(1000)};"))
        return Turn(ids, (-0.5,) * len(ids), (0.5,) * len(ids), FinishReason.STOP, 0)


def worker_of(policy: Policy, kind: type[Walk], branching: str, **growth: Any) -> RolloutWorker:
    config = RolloutSettings.of(make_config(GrowthConfig(**growth) if growth else bel(16)))
    return RolloutWorker(policy, tools_of(kind, branching), FakeChat(), Judged(), config)


def scripted(*words: str) -> ScriptedPolicy:
    return ScriptedPolicy(lambda number, before: words)


def shown(tree: RolloutTree, at: int = 0) -> list[Any]:
    """Everything below a node but clocks and names of kept states, in an order that does not depend
    on which completion was first."""
    below = []
    for child in tree.nodes[at].children:
        node = tree.nodes[child]
        assert node.step is not None
        step, result = node.step, node.step.result
        said = result and (result.kind.value, result.text)
        logs = step.state and [
            [(e.name, sorted(e.arguments.items()), e.digest) for e in source.log]
            for source in step.state.sources
        ]
        content = (decode(step.turn.token_ids), step.observation_text, said, logs, node.score,
                   node.end, [found.confirmed for found in tree.localizations
                              if found.critical == child])  # fmt: skip
        below.append([repr(content), shown(tree, child)])
    return sorted(below)


async def grown(problem: Problem, way: tuple[type[Walk], str], rule: str) -> list[Any]:
    worker = worker_of(SeededPolicy(), *way, rule=rule, n_total=12)
    tree = await worker.grow(problem, 0)
    assert tree.messages[-1]["content"] == "walk\n\nat 3" and len(tree.leaves()) == 12
    return shown(tree)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(["bel", "random_branch"]))
async def test_fork_deepcopy_and_replay_grow_the_same_trees(seed: int, rule: str) -> None:
    problem = replace(PROBLEM, id=f"p{seed}")
    first, *others = [await grown(problem, way, rule) for way in WAYS]
    for other in others:
        assert other == first


async def test_a_tree_is_taken_up_on_another_worker() -> None:
    """The copies are on the first one: states come back by replay, and the tree is the same."""
    whole: list[Completion] = []
    way = (Walk, "auto")
    problem = replace(PROBLEM, id="p3")
    first = await worker_of(SeededPolicy(), *way).grow(problem, 0, on_complete=whole.append)
    cut = next(index for index, done in enumerate(whole) if done.at)
    journal = pickle.loads(pickle.dumps(whole[:cut]))
    second = await worker_of(SeededPolicy(), *way).grow(problem, 0, journal=journal)
    assert shown(second) == shown(first)
    results = [node.step.result for node in second.nodes if node.step and node.step.result]
    assert "replay" in {result.restored_by for result in results}


async def test_evaluation_opens_and_judges_with_the_environment() -> None:
    worker = worker_of(scripted("g", "h", "=ok"), Walk, "auto")
    sample = await worker.evaluate(PROBLEM)
    assert sample.success and sample.tool_calls == 2
    tools = worker.agent.tools
    assert isinstance(tools, AgentTools) and not tools._trees, "all is released"
    bad = worker_of(scripted("g", "b", "=ok"), Walk, "auto")
    assert not (await bad.evaluate(PROBLEM)).success


async def test_a_prompt_ends_with_the_opening() -> None:
    system = {"role": "system", "content": "s"}
    user = {"role": "user", "content": "u"}
    assert opened_by([system, user], None) == [system, user]
    assert opened_by([system, user], "o")[-1] == {"role": "user", "content": "u\n\no"}
    assert opened_by([system], "o") == [system, {"role": "user", "content": "o"}]
