"""One trajectory: the policy and its tools alternate, from the prompt or from a prefix.

Invariants: sampled ids are kept as they came, everything else is appended as ids; a trajectory ends
with its only step without observation, so that K tool steps mean K+1 steps; what the model does
wrong is data (`EndReason`, an observation), only an InfrastructureError leaves this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from elpo_ray.growth.budget import Cost
from elpo_ray.interfaces import Chat, Policy, Tools, ToolSession
from elpo_ray.rollout.counters import RolloutCounters
from elpo_ray.types import (
    EndReason,
    FinishReason,
    Problem,
    RewardValue,
    Sampling,
    Step,
    ToolKind,
    ToolResult,
    ToolsLost,
)

CUT = "...(truncated)..."


@dataclass(frozen=True, slots=True)
class Agent:
    """What an episode runs on, and what bounds it."""

    policy: Policy
    tools: Tools
    chat: Chat
    max_context: int
    """Tokens of prompt and episode together."""
    max_turns: int
    """Assistant turns, those of the prefix and the answer included."""
    max_observation_chars: int
    counters: RolloutCounters = field(default_factory=RolloutCounters)


@dataclass(frozen=True, slots=True)
class Start:
    """Where an episode starts: at the prompt, or after the steps of a prefix."""

    token_ids: Sequence[int]
    """Prompt and prefix; the next turn begins right after them."""
    steps: Sequence[Step] = ()
    """The prefix; its last step has an observation."""
    tree: str | None = None
    """Names the tree whose tool states the episode continues from, or adds to."""
    branches: bool = False
    """Whether other episodes may continue from its tool states."""


@dataclass(frozen=True, slots=True)
class Episode:
    """A completed trajectory, without the prefix it started from."""

    steps: list[Step]
    end: EndReason
    reward: RewardValue = None
    """What an environment among the tools says of it."""


async def run_episode(
    agent: Agent, problem: Problem, sampling: Sampling, start: Start, cost: Cost
) -> Episode:
    """Alternate turns and tool calls until the answer or a limit.

    `sampling.max_tokens` bounds one turn; `sampling.seed` is the episode's, each turn derives its
    own from it. `cost` is filled in as it arises, for an episode that fails halfway. Raises
    InfrastructureError, and ValueError if the prompt leaves no room in the context.
    """
    context = list(start.token_ids)
    if len(context) >= agent.max_context:
        raise ValueError(
            f"model.max_context={agent.max_context}: problem {problem.id!r} already has "
            f"{len(context)} tokens of prompt; raise it or shorten the problem"
        )
    state = start.steps[-1].state if start.steps else None
    session = await agent.tools.open(
        setup=problem.setup, at=state, tree=start.tree, branches=start.branches
    )
    try:
        steps: list[Step] = []
        while True:
            turn_number = len(start.steps) + len(steps) + 1
            drawn = replace(
                sampling,
                warm=turn_number > 1,
                max_tokens=min(sampling.max_tokens, agent.max_context - len(context)),
                seed=None if sampling.seed is None else derive_seed(sampling.seed, turn_number),
            )
            last = turn_number == agent.max_turns
            step, end = await _step(agent, session, context, drawn, cost, last=last)
            steps.append(step)
            if end is not None:
                lost = end is EndReason.SANDBOX
                return Episode(steps, end, None if lost else await session.reward())
            context += [*step.turn.token_ids, *step.observation_ids]
    finally:
        await session.close()


async def _step(
    agent: Agent,
    session: ToolSession,
    context: Sequence[int],
    sampling: Sampling,
    cost: Cost,
    *,
    last: bool,
) -> tuple[Step, EndReason | None]:
    """One turn and, unless it ends the episode, its observation. The last turn may not call."""
    agent.counters.turn(1)
    try:
        turn = await agent.policy.generate(context, sampling)
    finally:
        agent.counters.turn(-1)
    cost.tokens += len(turn.token_ids)
    parsed = agent.chat.parse(turn.token_ids)
    step = Step(turn, action_text=parsed.text, call=parsed.call)
    if turn.finish is FinishReason.LENGTH:
        return step, EndReason.TURN_LENGTH
    if parsed.call is None and parsed.error is None:
        return step, EndReason.ANSWER
    if last:
        return step, EndReason.MAX_TURNS
    if parsed.call is not None:
        try:
            result = await session.call(parsed.call)
        except ToolsLost:
            return step, EndReason.SANDBOX
        cost.tool_seconds += result.duration_s
    else:
        result = ToolResult(ToolKind.MALFORMED, f"Malformed tool call: {parsed.error}")
    text = shorten(result.text, agent.max_observation_chars)
    ids = agent.chat.observation_ids(text, None if parsed.call is None else parsed.call.name)
    if len(context) + len(turn.token_ids) + len(ids) >= agent.max_context:
        return step, EndReason.CONTEXT
    seen = replace(
        step, observation_ids=tuple(ids), observation_text=text, result=result, state=session.state
    )
    return seen, None


def shorten(text: str, limit: int) -> str:
    """`text`, or its first and last `limit // 2` characters if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return text[:half] + CUT + text[-half:]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on nothing but `parts`, on every machine."""
    key = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
