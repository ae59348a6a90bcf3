"""Rewards: presets and shaping in numbers, no verdict where there is none."""

import asyncio
import json
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from elpo_ray.config.task import RewardConfig, RewardName
from elpo_ray.interfaces import ToolSession
from elpo_ray.tasks.grading.pool import Verdict
from elpo_ray.tasks.rewards import ANSWER_LINE, KIND, Reward, overlong
from elpo_ray.types import (
    UNGRADED,
    FinishReason,
    InfrastructureError,
    Problem,
    Score,
    Step,
    ToolCall,
    ToolKind,
    ToolResult,
    Turn,
)

SUMS = {"inputs": ["1 2", "3 4", "5 6", "7 8"], "outputs": ["3", "7", "11", "15"]}
ADD = "```python\nprint(sum(map(int, input().split())))\n```"


class OpenTools:
    """Tools whose sessions run one cell in a bare interpreter: for harmless programs."""

    def __init__(self, fault: bool = False) -> None:
        self.fault = fault
        self.live = 0

    @property
    def state(self) -> None:
        return None

    async def open(self, *, branches: bool) -> ToolSession:
        self.live += 1
        return self

    async def call(self, call: ToolCall) -> ToolResult:
        if self.fault:
            raise InfrastructureError("injected")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-I", "-c", call.arguments["code"]]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert not done.stderr
        return ToolResult(ToolKind.OK, done.stdout)

    async def close(self) -> None:
        self.live -= 1


def tool_step(kind: ToolKind = ToolKind.OK, tokens: int = 1) -> Step:
    turn = Turn((1,) * tokens, (), (), FinishReason.STOP, 0)
    return Step(turn, call=ToolCall("t", {}), result=ToolResult(kind, ""), observation_ids=(1, 1))


def answer(text: str, finish: FinishReason = FinishReason.STOP) -> Step:
    return Step(Turn((1,), (0.0,), (0.0,), finish, 0), action_text=text)


def score(
    text: str,
    *,
    truth: Any = "7",
    kind: str = "math",
    before: tuple[Step, ...] = (),
    tools: OpenTools | None = None,
    finish: FinishReason = FinishReason.STOP,
    **config: Any,
) -> Score:
    reward = Reward(RewardConfig(**config))
    problem = Problem("p", (), truth, extra={KIND: kind})
    steps = [*before, answer(text, finish)]
    return asyncio.run(reward.score(problem, steps, tools or OpenTools()))


@pytest.mark.parametrize(
    ("name", "calls", "failure"),
    [
        ("verify", 3, -1.0),
        ("strict_box", 3, -1.0),
        ("demyagent_as_run", 0, -1.1),
        ("demyagent_as_run", 4, -1.1),
        ("demyagent_intended", 0, -1.0),
        ("demyagent_intended", 1, -0.9),
        ("demyagent_intended", 3, -0.7),
        ("demyagent_intended", 4, -0.6),
        ("demyagent_intended", 9, -0.6),
    ],
)
def test_presets(name: str, calls: int, failure: float) -> None:
    before, preset = (tool_step(),) * calls, RewardName[name]
    assert score(r"\boxed{7}", before=before, name=preset) == Score(1.0, True)
    wrong = score(r"so \boxed{8}", before=before, name=preset)
    assert (wrong.reward, wrong.success) == (pytest.approx(failure), False)
    assert not score("7", before=before, name=preset).success


def test_only_verify_reads_mathematics_and_far_boxes() -> None:
    text = r"\boxed{\frac{14}{2}}"
    assert score(text).success
    assert not score(text, name=RewardName.strict_box).success
    assert score(r"\boxed{7}" + " " * 200).success
    assert not score(r"\boxed{7}" + " " * 200, name=RewardName.strict_box).success


def test_a_cut_off_turn_answers_nothing() -> None:
    assert not score(r"\boxed{7}", finish=FinishReason.LENGTH).success
    assert not asyncio.run(
        Reward(RewardConfig()).score(
            Problem("p", (), "7", extra={KIND: "math"}), [tool_step()], OpenTools()
        )
    ).success


def test_no_verdict_is_neither_success_nor_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def undecided(self: object, gold: str, answer: str) -> Verdict:
        return Verdict.UNDECIDED

    monkeypatch.setattr("elpo_ray.tasks.grading.pool.MathGrader.compare", undecided)
    assert score(r"\boxed{9^{9^{9}}}", overlong_buffer=1, overlong_limit=1) == UNGRADED


@pytest.mark.parametrize(("given", "right"), [("B", True), (r"\text{B}", True), ("C", False)])
def test_choice(given: str, right: bool) -> None:
    assert score(rf"\boxed{{{given}}}", truth="B", kind="choice").success is right


@pytest.mark.parametrize(
    ("text", "reward", "success"),
    [
        (ADD, 1.0, True),
        ("```python\nprint(3)\n```", 0.25, False),
        ("```python\nprint(0)\n```", 0.0, False),
        ("```python\nprint(\n```", -1.1, False),
        ("no program", -1.1, False),
    ],
)
def test_programs_earn_their_share_of_tests(text: str, reward: float, success: bool) -> None:
    tools = OpenTools()
    for truth in (SUMS, json.dumps(SUMS)):
        scored = score(
            text, truth=truth, kind="code", tools=tools, name=RewardName.demyagent_as_run
        )
        assert (scored.reward, scored.success) == (reward, success)
    assert tools.live == 0


def test_a_failing_sandbox_is_no_failed_test() -> None:
    tools = OpenTools(fault=True)
    with pytest.raises(InfrastructureError):
        score(ADD, truth=SUMS, kind="code", tools=tools)
    assert tools.live == 0


@pytest.mark.parametrize(
    ("tokens", "shaped"), [(0, 0.0), (16384, 0.0), (18432, -0.5), (20480, -1.0), (24576, -2.0)]
)
def test_overlong_shaping(tokens: int, shaped: float) -> None:
    config = RewardConfig(overlong_buffer=4096, overlong_limit=20480)
    assert overlong(tokens, config) == pytest.approx(shaped)
    assert overlong(tokens, RewardConfig()) == 0.0


def test_shaping_terms_add_up_and_leave_success_alone() -> None:
    shaping = {"format_penalty": 0.25, "tool_error_penalty": 0.5, "tool_bonus": 0.1}
    failed = tool_step(ToolKind.ERROR)
    assert score(r"\boxed{7}", **shaping).reward == 1.0
    assert score(r"\boxed{7}", before=(tool_step(),), **shaping).reward == pytest.approx(1.1)
    scored = score(r"\boxed{7}", before=(tool_step(), failed), **shaping)
    assert (scored.reward, scored.success) == (pytest.approx(0.6), True)
    assert score("7", before=(failed, tool_step()), **shaping).reward == pytest.approx(-1.25)
    long = score(
        r"\boxed{7}", before=(tool_step(tokens=17),), overlong_buffer=10, overlong_limit=20
    )
    assert long == Score(pytest.approx(0.0), True)  # 17 + 2 observed + 1 answer = the limit


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"name": "verfy"}, "name='verfy': did you mean verify"),
        ({"name": "function"}, "name='function': .*your own as module:attribute"),
        ({"options": {"a": 1}}, "options=.*name=None has none"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"grader_cpu_s": 0}, "grader_cpu_s=0"),
        ({"overlong_buffer": 30000}, "overlong_buffer=30000"),
        ({"tool_bonus": -1.0}, "tool_bonus=-1.0"),
        ({"graders": 0}, "graders=0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"task\.reward\.{key}"):
        RewardConfig(**settings)


def test_two_boxes_are_one_answer_only_for_mathematics_that_is_verified() -> None:
    text = r"so $x=\boxed{3}$ and $y=\boxed{4}$"
    assert score(text, truth="4, 3").success and score(text, truth="(3,4)").success
    assert not score(text, truth="4").success
    assert score(text, truth="4", name=RewardName.strict_box).success
    assert not score(r"\boxed{A} or \boxed{B}", truth="A", kind="choice").success


@pytest.mark.parametrize("preset", [RewardName.verify, RewardName.demyagent_as_run])
def test_the_answer_is_read_where_the_prompt_asks_for_it(preset: RewardName) -> None:
    reward = Reward(RewardConfig(name=preset))
    problem = Problem("p", (), "7", extra={KIND: "math", ANSWER_LINE: True})

    def right(text: str) -> bool:
        return asyncio.run(reward.score(problem, [answer(text)], OpenTools())).success

    assert right("So it is.\nAnswer: 7") and right("Answer: \\boxed{7}") and right(r"\boxed{7}")
    assert not right("Answer: 8") and not right("7") and not right("\\boxed{7}\nAnswer: 8")


def test_equal_answers_are_those_that_grade_alike() -> None:
    def same(first: str, second: str, kind: str = "math", **config: Any) -> bool:
        problem = Problem("p", (), "7", extra={KIND: kind})
        return asyncio.run(Reward(RewardConfig(**config)).same_answer(problem, first, second))

    assert same(r"\frac{1}{2}", "0.5") and same("073", "$73$") and not same("73", "74")
    assert not same("073", "73", name=RewardName.strict_box)
    assert same("A", "A", kind="choice") and not same("A", "B", kind="choice")
