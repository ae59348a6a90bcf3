"""Run folders as training leaves them: trees that the real growth rule grew in a made-up world,
with texts, tools, tokens and entropies of the usual sizes, written by a run's own code."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from zlib import crc32

from elpo_ray import growth
from elpo_ray.config import Config
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.config.model import ModelConfig
from elpo_ray.config.run import TrainerConfig
from elpo_ray.growth.budget import Cost, Ledger
from elpo_ray.runs.folder import RunFolder
from elpo_ray.runs.metrics import tree_metrics
from elpo_ray.tree import RolloutTree
from elpo_ray.types import (
    EndReason,
    FinishReason,
    Score,
    Step,
    ToolCall,
    ToolKind,
    ToolResult,
    Turn,
)

PROSE = """the sum over all primes below n is checked first then we factor the remaining quotient
and compare with the bound from before so that only two cases are left to try by hand or by code"""
CHARS_PER_TOKEN, VOCABULARY = 4, 150_000


class MadeUpRollout:
    """`interfaces.Rollout` over coin tosses: each step dooms the trajectory with a small chance."""

    enough = False

    def __init__(self, number: int, config: Config, words: int) -> None:
        self.random = Random(number)
        self.ledger = Ledger(config.algorithm.growth.n_total)
        question = f"Problem {number}: {self._prose(25)}?"
        messages = [{"role": "user", "content": question}]
        self.tree = RolloutTree(f"train-{number}", self.ledger.n_total, (1, 2), messages)
        self._words = words
        self._doomed: dict[int, bool] = {0: False}
        self._danger = self.random.choice((0.05, 0.15, 0.3))
        self._calls = self.random.randint(2, 6)

    @property
    def remaining(self) -> int:
        return self.ledger.remaining

    fixed = True

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        draw, doomed, steps, fates = self.random, self._doomed[at], [], []
        for _ in range(max(self._calls - len(self.tree.path(at)), 0)):
            doomed = doomed or draw.random() < self._danger
            steps.append(self._call(doomed))
            fates.append(doomed)
        success = not doomed and draw.random() < 0.9
        steps.append(self._answer(success))
        with self.ledger.reserve(anchor) as reservation:
            score = Score(1.0 if success else -1.1, success)
            reservation.leaf = self.tree.add_trajectory(at, steps, score, EndReason.ANSWER)
            reservation.cost = Cost(tokens=sum(step.num_tokens for step in steps))
        path = self.tree.path(reservation.leaf)
        self._doomed |= dict(zip(path[-len(steps) :], [*fates, doomed], strict=True))
        return reservation.leaf

    def _prose(self, words: int) -> str:
        return " ".join(self.random.choices(PROSE.split(), k=words))

    def _turn(self, text: str) -> Turn:
        pieces = [text[i : i + CHARS_PER_TOKEN] for i in range(0, len(text), CHARS_PER_TOKEN)]
        count, draw = len(pieces), self.random
        return Turn(
            token_ids=tuple(crc32(piece.encode()) % VOCABULARY for piece in pieces),
            logprobs=tuple(-draw.expovariate(3) for _ in range(count)),
            entropies=tuple(draw.expovariate(2) for _ in range(count)),
            finish=FinishReason.STOP,
            weight_version=1,
        )

    def _call(self, doomed: bool) -> Step:
        a, b = self.random.randint(2, 99), self.random.randint(2, 99)
        code = f"# {self._prose(6)}\nx = [n for n in range({a}) if n % {b}]\nprint(sum(x))"
        text = (
            f"{self._prose(self._words)}.\n<tool_call>\n"
            f"{json.dumps({'name': 'code_interpreter', 'arguments': {'code': code}})}\n</tool_call>"
        )
        fault = doomed and self.random.random() < 0.4
        response = "NameError: name 'x' is not defined" if fault else str(a * b)
        return Step(
            turn=self._turn(text),
            observation_ids=(1,) * 12,
            action_text=text,
            observation_text=response,
            call=ToolCall("code_interpreter", {"code": code}),
            result=ToolResult(
                ToolKind.ERROR if fault else ToolKind.OK, response, 0.02, restored_by="fork"
            ),
        )

    def _answer(self, success: bool) -> Step:
        text = f"{self._prose(self._words)}. \\boxed{{{42 if success else 41}}}"
        return Step(turn=self._turn(text), action_text=text)


def grow(number: int, config: Config, words: int = 40) -> RolloutTree:
    """One input's tree, the same for the same number. `words` of prose in a turn."""
    rollout = MadeUpRollout(number, config, words)
    settings = config.algorithm.growth
    with ThreadPoolExecutor(1) as own:  # a test that drives a browser has a loop in this thread
        own.submit(asyncio.run, growth.grow(rollout, settings)).result()
    rollout.tree.ledger = rollout.ledger.entries
    return rollout.tree


def write_run(
    folder: Path,
    steps: int,
    inputs: int,
    *,
    planned: int | None = None,
    words: int = 40,
    growth: GrowthConfig | None = None,
) -> Path:
    """A run of `steps` steps so far, of `inputs` trees each; ended, unless more are planned."""
    config = Config(
        experiment="made_up",
        algorithm=AlgorithmConfig(growth=growth or GrowthConfig()),
        model=ModelConfig(path="some/model"),
        trainer=TrainerConfig(
            steps=planned or steps,
            inputs_per_step=inputs,
            run_dir=str(folder.parent),
            run_name=folder.name,
        ),
        learner=LearnerConfig(minibatch_inputs=inputs),
    )
    run = RunFolder.of(config)
    run.begin(config)
    lines = []
    for step in range(1, steps + 1):
        trees = [grow(1000 * step + i, config, words) for i in range(inputs)]
        run.write_trees(step, trees)
        values = tree_metrics(trees, config.algorithm.growth)
        lines.append(json.dumps({"step": step, **values}) + "\n")
    (run.path / "metrics.jsonl").write_text("".join(lines))
    if planned in (None, steps):
        run.write_summary(
            {"steps": steps, "rollouts": steps * inputs * 16, "pass_at_1_before": 0.4,
             "pass_at_1_after": 0.5, "wall_seconds": 60.0 * steps}
        )  # fmt: skip
    return run.path
