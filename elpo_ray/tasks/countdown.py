"""Stepwise Countdown: combine all the numbers, two at a time, into the target.

Each tool step calls `combine(a, op, b)` in a stateful session, which consumes the operands and
prints what is left; the last turn answers. The first step after which the target is out of reach
is the irrecoverable one, and an exact solver knows it.

Invariant: nothing that the session printed is believed. Reward and oracle replay the *calls*: a
call whose result is OK and whose code is exactly one `combine(a, op, b)` of literals takes effect
if the rules allow it; everything else leaves the numbers as they are.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import count, islice

from elpo_ray.config.task import TaskConfig
from elpo_ray.interfaces import Tools
from elpo_ray.tasks.arithmetic import Left, Move, Rules, describe, reachable, session_code
from elpo_ray.tasks.rewards import all_or_nothing, answer_turn
from elpo_ray.tools import code_interpreter
from elpo_ray.types import Message, Problem, RewardValue, Score, Step, ToolKind

SYSTEM = (
    "Make the target from all the numbers. Each step, call combine(a, op, b) on two of them. "
    "Then give the answer."
)
ANSWER = re.compile(r"answer: (\d{1,9})")
CALL = re.compile(
    r"\s*combine\(\s*(?P<a>[0-9]{1,9})\s*,\s*(['\"])(?P<op>.)\2\s*,\s*(?P<b>[0-9]{1,9})\s*\)\s*"
)
"""Read as text: no code of the policy is parsed, let alone run, on the host."""
PARTS = 10
"""All problems are divided into so many parts; the first one is held out from training."""
DEMONSTRATED_PARTS = 7
"""So many parts are demonstrated where demonstrations and training are kept apart; training has the
others."""
EVAL_SEED = 0
"""Held-out problems are the same for every training seed."""
HELD_OUT = range(1)
MAX_DRAWS = 100_000
"""Draws in a row without a usable problem after which the difficulty is called impossible."""


class Countdown:
    """The embedded default task; see `CountdownConfig` for its difficulty."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self._config = config.countdown
        self._max_turns = config.max_turns
        self._seed = seed
        self._rules = Rules(config.countdown.operators, config.countdown.max_value)
        border = 1 + DEMONSTRATED_PARTS
        disjoint = config.countdown.disjoint
        self._demonstrated = range(1, border if disjoint else PARTS)
        self._trained = range(border if disjoint else 1, PARTS)
        if config.max_turns < self._config.numbers:
            raise ValueError(
                f"task.max_turns={config.max_turns}: {self._config.numbers} numbers need "
                f"{self._config.numbers} turns; raise it or lower task.countdown.numbers"
            )

    def train_problem(self, index: int) -> Problem:
        """The `index`-th problem of the training stream; ValueError if none can be drawn."""
        rng = random.Random(f"train/{self._seed}/{index}")
        return self._problem(f"train-{index}", *self._draw(rng, self._trained))

    def eval_problems(self, count: int) -> list[Problem]:
        """`count` different held-out problems; ValueError if the difficulty has fewer."""
        drawn = list(islice(self._distinct_held_out(), count))
        return [self._problem(f"eval-{i}", *drawn[i]) for i in range(count)]

    def demonstration(self, index: int) -> list[Message] | None:
        """A problem solved. Without `any_order` it always joins the largest numbers that can be
        joined: what is left to learn is the choice of the operator. With `disjoint` it is no
        training problem."""
        if index >= self._config.demonstrations:
            return None
        rng = random.Random(f"demonstration/{self._seed}/{index}")
        numbers, target = self._draw(rng, self._demonstrated)
        messages: list[Message] = [*_prompt(numbers, target)]
        left = numbers
        for a, op, b in self._solution(rng, numbers, target):
            left = self._rules.step(left, a, op, b)
            messages += code_interpreter.called(f"combine({a}, '{op}', {b})", describe(list(left)))
        messages.append({"role": "assistant", "content": f"answer: {target}"})
        return messages

    async def score(
        self,
        problem: Problem,
        steps: Sequence[Step],
        tools: Tools,
        environment: RewardValue = None,
    ) -> Score:
        """Success iff the calls leave the target alone and the answer turn names it."""
        return all_or_nothing(self._succeeded(problem, steps))

    def answer(self, problem: Problem, steps: Sequence[Step]) -> str | None:
        """None: the problem names the target, there is nothing to vote on."""
        return None

    def recoverable(self, problem: Problem, steps: Sequence[Step]) -> bool | None:
        """Exact: whether some continuation within `task.max_turns` still succeeds."""
        if steps and steps[-1].result is None:
            return self._succeeded(problem, steps)
        left = self._replay(problem, steps)
        turns_needed = len(left)  # one step fewer than numbers, and the answer
        if len(steps) + turns_needed > self._max_turns:
            return False
        return problem.ground_truth in reachable(left, self._rules)

    def _succeeded(self, problem: Problem, steps: Sequence[Step]) -> bool:
        text = answer_turn(steps)
        answer = None if text is None else ANSWER.fullmatch(text.strip())
        target = problem.ground_truth
        return (
            answer is not None
            and int(answer[1]) == target
            and self._replay(problem, steps) == (target,)
        )

    def _replay(self, problem: Problem, steps: Sequence[Step]) -> Left:
        """The numbers left after the effective calls of `steps`."""
        left: Left = tuple(problem.extra["numbers"])
        for step in steps:
            if step.result is None or step.result.kind is not ToolKind.OK:
                continue
            parsed = parse_combine(code_interpreter.code_of(step.call))
            if parsed is None:
                continue
            try:
                left = self._rules.step(left, *parsed)
            except ValueError:
                continue
        return left

    def _problem(self, id: str, numbers: Left, target: int) -> Problem:
        return Problem(
            id=id,
            messages=_prompt(numbers, target),
            ground_truth=target,
            setup=session_code(numbers, self._rules),
            extra={"numbers": list(numbers)},
        )

    def _draw(self, rng: random.Random, parts: range) -> tuple[Left, int]:
        """A solvable problem from these parts of all problems."""
        config = self._config
        for _ in range(MAX_DRAWS):
            numbers = tuple(
                sorted(rng.randint(config.low, config.high) for _ in range(config.numbers))
            )
            target = self._play(rng, numbers)
            if target is not None and _part_of(numbers, target) in parts:
                return numbers, target
        raise ValueError(
            f"task.countdown={config}: no solvable problem found; widen low..high, raise "
            "max_value or allow more operators"
        )

    def _play(self, rng: random.Random, left: Left) -> int | None:
        """The outcome of random allowed steps: a reachable target, likelier the more ways lead
        to it; None if the play got stuck."""
        while len(left) > 1:
            moves = self._rules.moves(left)
            if not moves:
                return None
            left = self._rules.step(left, *rng.choice(moves))
        return left[0]

    def _distinct_held_out(self) -> Iterator[tuple[Left, int]]:
        seen: set[tuple[Left, int]] = set()
        repeats = 0
        for index in count():
            drawn = self._draw(random.Random(f"eval/{EVAL_SEED}/{index}"), HELD_OUT)
            if drawn not in seen:
                seen.add(drawn)
                repeats = 0
                yield drawn
            elif (repeats := repeats + 1) > MAX_DRAWS // 10:
                raise ValueError(
                    f"task.eval_problems: only {len(seen)} held-out problems exist at this "
                    "difficulty; lower it or widen task.countdown.low..high"
                )

    def _solution(self, rng: random.Random, left: Left, target: int) -> Iterator[Move]:
        """At each turn a recoverable step: with `any_order` any of them, all equally likely, else
        the one with the largest operands, `+` before `-`, `*`."""
        while len(left) > 1:
            moves = self._rules.moves(left)
            if self._config.any_order:
                rng.shuffle(moves)
            for move in moves:
                after = self._rules.step(left, *move)
                if target in reachable(after, self._rules):
                    break
            left = after
            yield move


def parse_combine(code: str | None) -> Move | None:
    """The literals of code that is exactly one `combine(a, op, b)` call, else None."""
    call = CALL.fullmatch(code) if code is not None else None
    return (int(call["a"]), call["op"], int(call["b"])) if call else None


def _part_of(numbers: Left, target: int) -> int:
    """The part of all problems that one belongs to, whatever the seed."""
    return zlib.crc32(f"{numbers}={target}".encode()) % PARTS


def _prompt(numbers: Left, target: int) -> tuple[Message, ...]:
    question = f"target: {target}\n{describe(list(numbers))}"
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": question})
