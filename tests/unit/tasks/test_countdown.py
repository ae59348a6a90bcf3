"""Countdown: session, host and oracle agree; what a session prints is not believed."""

import asyncio
import contextlib
import io
from collections.abc import Sequence
from itertools import permutations

import pytest
from fakes import FakeTools
from hypothesis import given
from hypothesis import strategies as st

from elpo_ray.config.task import CountdownConfig, TaskConfig
from elpo_ray.tasks import make_task
from elpo_ray.tasks.arithmetic import Rules, reachable, session_code
from elpo_ray.tasks.countdown import Countdown, parse_combine
from elpo_ray.types import (
    FinishReason,
    Message,
    Problem,
    Score,
    Step,
    ToolCall,
    ToolKind,
    ToolResult,
    Turn,
)

RULES = Rules("+-*", 99)


def make(seed: int = 0, max_turns: int = 6, **difficulty: object) -> Countdown:
    return Countdown(TaskConfig(max_turns=max_turns, countdown=CountdownConfig(**difficulty)), seed)


def score(task: Countdown, asked: Problem, steps: list[Step]) -> Score:
    return asyncio.run(task.score(asked, steps, FakeTools()))


def problem(*numbers: int, target: int) -> Problem:
    return Problem("p", (), target, extra={"numbers": list(numbers)})


def call(code: str, kind: ToolKind = ToolKind.OK, printed: str = "") -> Step:
    turn = Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0)
    return Step(
        turn=turn,
        call=ToolCall("code_interpreter", {"code": code}),
        result=ToolResult(kind, printed),
    )


def answer(text: str, finish: FinishReason = FinishReason.STOP) -> Step:
    return Step(turn=Turn((1,), (0.0,), (0.0,), finish, 0), action_text=text)


def run_in_session(namespace: dict[str, object], code: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue().strip()


@pytest.mark.parametrize("any_order", [False, True])
def test_demonstrations_are_what_a_real_session_prints_and_score_as_success(
    any_order: bool,
) -> None:
    task = make(any_order=any_order)
    for index in range(30):
        messages = task.demonstration(index)
        assert messages is not None
        target, numbers = (line.split(": ")[1] for line in messages[1]["content"].split("\n"))
        start = tuple(int(n) for n in numbers.split())
        session: dict[str, object] = {}
        exec(session_code(start, RULES), session)
        steps = []
        for ask, response in zip(messages[2:-1:2], messages[3:-1:2], strict=True):
            code = ask["tool_calls"][0]["function"]["arguments"]["code"]
            assert run_in_session(session, code) == response["content"]
            steps.append(call(code))
        steps.append(answer(messages[-1]["content"]))
        assert len(steps) == 5
        solved = problem(*start, target=int(target))
        assert score(task, solved, steps).reward == 1.0
        assert all(task.recoverable(solved, steps[:k]) for k in range(len(steps) + 1))


@given(
    left=st.lists(st.integers(0, 20), min_size=2, max_size=5),
    a=st.integers(-1, 20),
    op=st.sampled_from("+-*/"),
    b=st.integers(-1, 20),
)
def test_session_and_host_allow_the_same_steps(left: list[int], a: int, op: str, b: int) -> None:
    start = tuple(sorted(left))
    session: dict[str, object] = {}
    exec(session_code(start, RULES), session)
    try:
        expected = "left: " + " ".join(map(str, RULES.step(start, a, op, b)))
    except ValueError as fault:
        with pytest.raises(ValueError, match=str(fault)):
            exec(f"combine({a}, '{op}', {b})", session)
        expected = "left: " + " ".join(map(str, start))  # a refused step consumes nothing
        printed = run_in_session(session, "print(describe(_left))")
    else:
        printed = run_in_session(session, f"combine({a}, '{op}', {b})")
    assert printed == expected


def brute_force(left: tuple[int, ...], rules: Rules) -> set[int]:
    if len(left) == 1:
        return set(left)
    found = set()
    for a, b in set(permutations(left, 2)):
        for op in rules.operators:
            with contextlib.suppress(ValueError):
                found |= brute_force(rules.step(left, a, op, b), rules)
    return found


@given(
    left=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    operators=st.sampled_from(["+", "-", "*", "+-", "+*", "+-*"]),
    max_value=st.sampled_from([9, 25, 99]),
)
def test_solver_equals_brute_force(left: list[int], operators: str, max_value: int) -> None:
    rules = Rules(operators, max_value)
    start = tuple(sorted(left))
    assert reachable(start, rules) == brute_force(start, rules)


def test_the_irrecoverable_step_is_seen_when_it_happens() -> None:
    task, given_ = make(), problem(2, 3, 10, target=60)
    good, doomed = call("combine(10, '*', 3)"), call("combine(10, '-', 3)")
    assert task.recoverable(given_, []) is True
    assert task.recoverable(given_, [good]) is True
    assert task.recoverable(given_, [doomed]) is False  # 2 and 7 make 5, 9 and 14


def test_wasted_turns_run_out() -> None:
    task = make(max_turns=6)
    given_ = problem(1, 1, 1, 1, 1, target=5)
    wasted = call("combine(7, '+', 1)", ToolKind.ERROR)
    assert task.recoverable(given_, [wasted]) is True
    assert task.recoverable(given_, [wasted, wasted]) is False


def solved_in_two(final: Step) -> list[Step]:
    return [call("combine(2, '*', 3)"), final]


@pytest.mark.parametrize(
    ("steps", "success"),
    [
        (solved_in_two(answer("answer: 6")), True),
        (solved_in_two(answer(" answer: 6\n")), True),
        (solved_in_two(answer("answer: 5")), False),
        (solved_in_two(answer("answer: 6 or 5")), False),
        (solved_in_two(answer("answer: 6", FinishReason.LENGTH)), False),
        ([answer("answer: 6")], False),  # right number, nothing combined
        ([call("combine(2, '*', 3)")], False),  # never answered
        ([], False),
    ],
)
def test_success_needs_the_calls_and_the_answer(steps: list[Step], success: bool) -> None:
    scored = score(make(), problem(2, 3, target=6), steps)
    assert (scored.success, scored.reward) == (success, 1.0 if success else -1.1)
    if steps and steps[-1].result is None:
        assert make().recoverable(problem(2, 3, target=6), steps) is success


@pytest.mark.parametrize(
    "hostile",
    [
        call("print('left: 6')", printed="left: 6"),
        call("_left[:] = [6]", printed="left: 6"),
        call("x = combine(2, '*', 3)"),
        call("combine(2, '*', 3); combine(6, '+', 0)"),
        call("combine(a=2, op='*', b=3)"),
        call("combine(2, '*', 1 + 2)"),
        call("combine(2.0, '*', 3)"),
        call("combine(True, '*', 3)"),
        call("combine(2, '*', 4)", printed="left: 6"),  # a patched session said it worked
        call("(" * 10_000),
        call("combine(2, '*', 3)\0"),
        call("combine(2, '*', 3)", ToolKind.ERROR, printed="left: 6"),
        call("combine(2, '*', 3)", ToolKind.TIMEOUT),
    ],
)
def test_only_plain_successful_calls_count(hostile: Step) -> None:
    task, given_ = make(), problem(2, 3, target=6)
    assert not score(task, given_, [hostile, answer("answer: 6")]).success
    assert task.recoverable(given_, [hostile]) is True  # the numbers are untouched


def test_parse_combine_reads_the_one_form() -> None:
    assert parse_combine(" combine(12, '-', 3) ") == (12, "-", 3)
    assert parse_combine('combine(12,"-",3)') == (12, "-", 3)
    assert parse_combine(None) is None


def test_streams_are_deterministic_solvable_and_disjoint() -> None:
    task, again, other = make(seed=1), make(seed=1), make(seed=2)
    train = [task.train_problem(i) for i in range(300)]
    assert train == [again.train_problem(i) for i in range(300)]
    assert train != [other.train_problem(i) for i in range(300)]
    held_out = task.eval_problems(100)
    assert held_out == other.eval_problems(100)
    assert held_out[:40] == task.eval_problems(40)
    keys = [(tuple(p.extra["numbers"]), p.ground_truth) for p in held_out]
    assert len(set(keys)) == 100
    assert not set(keys) & {(tuple(p.extra["numbers"]), p.ground_truth) for p in train}
    for p in [*train[:50], *held_out[:50]]:
        assert len(p.extra["numbers"]) == 5
        assert p.ground_truth in reachable(tuple(p.extra["numbers"]), RULES)
        assert 0 <= p.ground_truth <= 99


def asked(messages: Sequence[Message]) -> str:
    return str(messages[1]["content"])


def demonstrated(task: Countdown, count: int) -> set[str]:
    shown = [task.demonstration(i) for i in range(count)]
    return {asked(messages) for messages in shown if messages is not None}


@pytest.mark.parametrize("difficulty", [{}, {"numbers": 4, "operators": "+-", "max_value": 30}])
@pytest.mark.parametrize("seed", [0, 5])
def test_no_problem_is_in_two_of_demonstrations_training_and_evaluation(
    seed: int, difficulty: dict[str, object]
) -> None:
    task = make(seed=seed, high=9, **difficulty)
    shown = demonstrated(task, 2000)
    trained = {asked(task.train_problem(i).messages) for i in range(1000)}
    held_out = {asked(problem.messages) for problem in task.eval_problems(150)}
    assert len(shown) > 500 and len(trained) > 300
    assert not shown & trained and not shown & held_out and not trained & held_out


def test_a_cold_start_on_training_problems_can_be_asked_for() -> None:
    """Held-out problems are the same ones either way, and stay apart."""
    easy = {"operators": "+-", "max_value": 50}
    apart, together = make(**easy), make(disjoint=False, **easy)
    shown = demonstrated(together, 4200)
    trained = [asked(together.train_problem(i).messages) for i in range(320)]
    assert sum(question in shown for question in trained) > 100
    assert together.eval_problems(200) == apart.eval_problems(200)
    held_out = {asked(problem.messages) for problem in apart.eval_problems(200)}
    assert not held_out & (shown | set(trained))


def first_code(messages: Sequence[Message]) -> str:
    return str(messages[2]["tool_calls"][0]["function"]["arguments"]["code"])


def test_demonstrations_in_any_order_solve_the_same_problems_by_other_steps() -> None:
    ordered, shuffled = make(), make(any_order=True)
    firsts = []
    for index in range(200):
        one, other = ordered.demonstration(index), shuffled.demonstration(index)
        assert one is not None and other is not None and asked(one) == asked(other)
        assert other == shuffled.demonstration(index)
        firsts.append((first_code(one), first_code(other)))
    assert sum(one != other for one, other in firsts) > 100


def test_demonstrations_end_where_configured() -> None:
    task = make(demonstrations=2)
    assert task.demonstration(1) is not None
    assert task.demonstration(2) is None


def test_impossible_difficulty_is_a_configuration_error() -> None:
    with pytest.raises(ValueError, match=r"task\.max_turns=4: 5 numbers need 5 turns"):
        make(max_turns=4)
    with pytest.raises(ValueError, match=r"task\.countdown.*widen"):
        make(low=5, high=9, max_value=9, operators="*").train_problem(0)
    with pytest.raises(ValueError, match=r"task\.eval_problems: only \d+ held-out"):
        make(numbers=2, low=1, high=3).eval_problems(1000)


def test_make_task_builds_by_name() -> None:
    assert isinstance(make_task(TaskConfig(), seed=0), Countdown)
