"""One trajectory: what is appended, what ends it, and that its session is closed."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fakes import (
    FakeChat,
    FakeTask,
    FakeTools,
    Faults,
    ScriptedPolicy,
    Word,
    decode,
    encode,
)

from elpo_ray.growth.budget import Cost
from elpo_ray.rollout.episode import CUT, Agent, Episode, Start, derive_seed, run_episode, shorten
from elpo_ray.types import EndReason, InfrastructureError, Sampling, Step, ToolKind

PROBLEM = FakeTask().train_problem(0)
PROMPT = FakeChat().prompt_ids(PROBLEM.messages)
SAMPLING = Sampling(max_tokens=50, seed=1)


class World:
    """An agent whose every completion plays `words`, from where its prefix ends."""

    def __init__(self, *words: Word, tools: FakeTools | None = None, **limits: int) -> None:
        self.policy = ScriptedPolicy(lambda number, before: words[len(before) :])
        self.tools = tools or FakeTools()
        self.cost = Cost()
        bounds = {"max_context": 1000, "max_turns": 16, "max_observation_chars": 256} | limits
        self.agent = Agent(self.policy, self.tools, FakeChat(), **bounds)

    def run(self, steps: Sequence[Step] = (), sampling: Sampling = SAMPLING) -> Episode:
        ids = list(PROMPT)
        for step in steps:
            ids += [*step.turn.token_ids, *step.observation_ids]
        start = Start(ids, steps)
        episode = asyncio.run(run_episode(self.agent, PROBLEM, sampling, start, self.cost))
        assert self.tools.live == 0
        return episode


def test_turns_and_observations_are_appended_as_they_came() -> None:
    world = World("left", "right", "=ok")
    episode = world.run()
    assert episode.end is EndReason.ANSWER
    assert world.policy.prefixes == [
        "Q:go 0|",
        "Q:go 0|left~0;[1]",
        "Q:go 0|left~0;[1]right~0;[2]",
    ]
    first, _, answer = episode.steps
    assert decode(first.turn.token_ids) == "left~0;" and decode(first.observation_ids) == "[1]"
    assert first.call is not None and first.call.arguments == {"move": "left"}
    assert first.state == ("left",)
    assert (answer.call, answer.result, answer.observation_ids) == (None, None, ())
    assert (world.cost.tokens, world.cost.tool_seconds) == (7 + 8 + 6, 0.5)


def test_branch_continues_from_exactly_the_tokens_and_the_state_of_its_prefix() -> None:
    world = World("left", "right", "up", "=ok")
    whole = world.run()
    branch = world.run(whole.steps[:2])
    assert world.tools.opened_at == [None, ("left", "right")]
    assert world.policy.prefixes[4] == "Q:go 0|left~0;[1]right~0;[2]"
    assert [step.action_text for step in branch.steps] == ["up~1;", "=ok~1;"]
    assert branch.steps[0].state == ("left", "right", "up")
    assert decode(branch.steps[0].observation_ids) == "[3]"


def test_each_turn_has_its_own_seed_and_none_stays_none() -> None:
    world = World("g", "g", "=ok")
    whole = world.run()
    world.run(whole.steps[:1])
    seeds = world.policy.seeds
    assert len(set(seeds[:3])) == 3
    assert seeds[3:] == seeds[1:3]  # a turn's seed is its episode's and its number
    world.run(sampling=Sampling(max_tokens=50))
    assert world.policy.seeds[5:] == [None, None, None]


def test_all_turns_but_the_first_after_the_prompt_are_warm() -> None:
    world = World("g", "g", "=ok")
    whole = world.run()
    world.run(whole.steps[:1])
    assert world.policy.warm == [False, True, True, True, True]


def test_last_allowed_turn_is_not_called() -> None:
    world = World("g", "g", "g", "=ok", max_turns=2)
    episode = world.run()
    assert episode.end is EndReason.MAX_TURNS and len(episode.steps) == 2
    assert episode.steps[1].call is not None and episode.steps[1].result is None
    assert world.cost.tool_seconds == 0.25


def test_turns_of_the_prefix_count() -> None:
    world = World("g", "g", "g", "=ok")
    whole = world.run()
    world.agent = replace(world.agent, max_turns=3)
    branch = world.run(whole.steps[:2])
    assert branch.end is EndReason.MAX_TURNS and len(branch.steps) == 1


def test_answer_in_the_last_allowed_turn_is_an_answer() -> None:
    assert World("g", "=ok", max_turns=2).run().end is EndReason.ANSWER


def test_turn_that_hits_its_limit_ends_the_episode() -> None:
    episode = World("g", "a-long-word", "=ok").run(sampling=Sampling(max_tokens=5))
    assert episode.end is EndReason.TURN_LENGTH
    assert [len(step.turn.token_ids) for step in episode.steps] == [4, 5]
    assert episode.steps[-1].result is None


def test_turn_is_bounded_by_the_context_left() -> None:
    # the prompt has 7 tokens, turn and observation 4 and 3: two tokens are left for the answer
    episode = World("g", "=ok", max_context=16).run()
    assert episode.end is EndReason.TURN_LENGTH
    assert len(episode.steps[-1].turn.token_ids) == 2


def test_observation_that_fills_the_context_is_dropped() -> None:
    world = World("g", "=ok", max_context=14)
    episode = world.run()
    assert episode.end is EndReason.CONTEXT
    (step,) = episode.steps
    assert step.call is not None
    assert (step.result, step.observation_ids, step.observation_text) == (None, (), "")
    assert world.cost.tool_seconds == 0.25  # the call was made all the same


def test_prompt_without_room_is_the_users_error() -> None:
    with pytest.raises(ValueError, match=r"model\.max_context=7: problem 'p0' already has 7"):
        World("=ok", max_context=7).run()


def test_malformed_call_is_observed_and_calls_nothing() -> None:
    world = World("?", "g", "=ok")
    first, second, _ = world.run().steps
    assert first.result is not None and first.result.kind is ToolKind.MALFORMED
    assert first.call is None and first.observation_text == (
        "Malformed tool call: a question mark is no call"
    )
    assert first.observation_ids == tuple(encode(f"[{first.observation_text}]"))
    assert (first.state, second.state) == ((), ("g",))


def test_long_observation_is_cut_in_the_middle() -> None:
    tools = FakeTools(reply=lambda moves: "a" * 300 + "b" * 300)
    step = World("g", "=ok", tools=tools, max_observation_chars=8).run().steps[0]
    assert step.observation_text == f"aaaa{CUT}bbbb"
    assert decode(step.observation_ids) == f"[aaaa{CUT}bbbb]"
    assert step.result is not None and len(step.result.text) == 600


@pytest.mark.parametrize(
    ("text", "limit", "short"),
    [("abcd", 4, "abcd"), ("abcde", 4, f"ab{CUT}de"), ("abcdef", 5, f"ab{CUT}ef"), ("", 32, "")],
)
def test_shorten(text: str, limit: int, short: str) -> None:
    assert shorten(text, limit) == short


@pytest.mark.parametrize("pattern", [[True], [False, True], [False, False, True]])
def test_infrastructure_failure_closes_the_session(pattern: list[bool]) -> None:
    tools = FakeTools(faults=Faults(pattern))
    world = World("g", "g", "=ok", tools=tools)
    with pytest.raises(InfrastructureError):
        world.run()
    assert tools.live == 0
    assert world.cost.tool_seconds == 0.25 * max(len(pattern) - 2, 0)


async def test_cancelled_episode_closes_its_session() -> None:
    world = World(*["g"] * 1000, max_turns=2000, max_context=10**6)
    running = asyncio.ensure_future(
        run_episode(world.agent, PROBLEM, SAMPLING, Start(PROMPT), Cost())
    )
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.tools.live == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert world.tools.live == 0


def test_derived_seeds_are_stable_and_spread() -> None:
    assert derive_seed(0, "grow", "p0", 3, 7) == derive_seed(0, "grow", "p0", 3, 7)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    seeds = {derive_seed(0, i) for i in range(1000)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "grow", "p0", 0, 0) == 129127576501889491
