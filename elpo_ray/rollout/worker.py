"""One rollout worker: many trees at once over an engine and tools.

A plain class on one event loop; callers await many `grow` at once. Invariants: a tree holds only
completed trajectories; each of them is one spend of its ledger; an attempt that the infrastructure
destroyed is repeated with the same seed and never shows in the tree; a trajectory whose sandbox
failed for good is kept without a verdict; the caller gets every completed trajectory at once, and a
tree can be taken up again from them (`rollout.journal`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random

from elpo_ray import growth
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.config.rollout import SamplingConfig
from elpo_ray.growth.budget import Cost, Ledger, can_teach
from elpo_ray.interfaces import Chat, Policy, Task, Tools
from elpo_ray.rollout.episode import Agent, Episode, Start, derive_seed, run_episode
from elpo_ray.rollout.journal import Completion, Reply, enter_replies, replay
from elpo_ray.rollout.sample import Sample
from elpo_ray.rollout.settings import RolloutSettings
from elpo_ray.tree import RolloutTree
from elpo_ray.types import (
    UNGRADED,
    EndReason,
    InfrastructureError,
    Message,
    Problem,
    Sampling,
    Score,
    ToolsLost,
)


class RolloutWorker:
    """Grows trees and evaluates, on one policy and its tools."""

    def __init__(
        self,
        policy: Policy,
        tools: Tools,
        chat: Chat,
        task: Task,
        settings: RolloutSettings,
        graders: Tools | None = None,
    ) -> None:
        """`graders`: where submitted programs run; the agent's tools without it."""
        self.graders = graders or tools
        self.agent = Agent(
            policy=policy,
            tools=tools,
            chat=chat,
            max_context=settings.max_context,
            max_turns=settings.max_turns,
            max_observation_chars=settings.max_observation_chars,
        )
        self.task = task
        self.settings = settings
        self.counters = self.agent.counters

    async def grow(
        self,
        problem: Problem,
        step: int,
        budget: int | None = None,
        journal: Sequence[Completion] = (),
        on_complete: Callable[[Completion], None] = lambda done: None,
        config: GrowthConfig | None = None,
    ) -> RolloutTree:
        """Spend one input's budget, the configured n_total without it, by the configured rule.

        `step` is the training step, part of every seed. `journal`: what an earlier attempt has
        completed, in order; `on_complete` gets every further completion. `config` is the step's,
        where it has what was fitted to earlier steps. Raises InfrastructureError once one was lost
        `sandbox.retries` + 1 times, ValueError if the prompt does not fit.
        """
        rollout = TreeRollout(self, problem, step, budget, journal, on_complete)
        try:
            await rollout.begin()
            await growth.grow(rollout, config or self.settings.growth)
        finally:
            await rollout.close()
        tree, ledger = rollout.tree, rollout.ledger
        assert ledger.spent == len(tree.leaves()), "spends and leaves differ"
        assert rollout.remaining == 0 or rollout.enough, "the budget was not spent"
        tree.ledger, tree.budget = ledger.entries, ledger.spent
        return tree

    async def evaluate(
        self, problem: Problem, index: int = 0, sampling: SamplingConfig | None = None
    ) -> Sample:
        """The `index`-th independent trajectory; at temperature 1 without `sampling`."""
        tree = uuid.uuid4().hex
        drawn = self.sampling(sampling or SamplingConfig(), "evaluate", problem.id, index)
        try:
            _, prompt_ids = await self.begin(problem, tree, alone=True)
            start = Start(prompt_ids, tree=tree)
            episode, score, cost = await self.attempt(self.agent, problem, drawn, start)
        finally:
            await self.agent.tools.release(tree)
        answer = self.task.answer(problem, episode.steps)
        return Sample.of(problem, index, episode, score, answer, cost)

    async def answer(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """What the policy says to messages, without tools. Raises InfrastructureError once it was
        lost `sandbox.retries` + 1 times."""
        ids = self.agent.chat.prompt_ids(messages, tools=False)
        room = min(sampling.max_tokens, self.agent.max_context - len(ids))
        if room < 1:
            return Reply("", Cost())
        lost: list[Cost] = []
        while True:
            try:
                turn = await self.agent.policy.generate(ids, replace(sampling, max_tokens=room))
            except InfrastructureError:
                lost.append(Cost())
                if len(lost) > self.settings.retries:
                    raise
            else:
                text = self.agent.chat.parse(turn.token_ids).text
                return Reply(text, Cost(tokens=len(turn.token_ids)), lost)

    async def begin(
        self, problem: Problem, tree: str, *, alone: bool = False
    ) -> tuple[Sequence[Message], list[int]]:
        """Make the tools ready for `tree`; returns the prompt as messages and as ids."""
        opening = await self.agent.tools.begin(problem, tree, alone=alone)
        messages = opened_by(problem.messages, opening)
        return messages, self.agent.chat.prompt_ids(messages)

    def sampling(self, config: SamplingConfig, *key: int | str) -> Sampling:
        """How to sample the episode named by `key`; its seed depends on the run's and on `key`."""
        return Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=self.settings.max_turn_tokens,
            seed=derive_seed(self.settings.seed, *key),
        )

    async def attempt(
        self,
        agent: Agent,
        problem: Problem,
        sampling: Sampling,
        start: Start,
        on_lost: Callable[[Cost], None] = lambda cost: None,
    ) -> tuple[Episode, Score, Cost]:
        """Run and score one episode. An attempt that the infrastructure destroyed is repeated, its
        cost given to `on_lost`; raises InfrastructureError when the last one is lost."""
        attempts_left = self.settings.retries + 1
        while True:
            cost = Cost()
            self.counters.episode(1)
            try:
                episode = await run_episode(agent, problem, sampling, start, cost)
                score = UNGRADED
                if episode.end is not EndReason.SANDBOX:
                    steps = [*start.steps, *episode.steps]
                    # Tasks of users who have no environments need not know of their rewards.
                    given = () if episode.reward is None else (episode.reward,)
                    with suppress(ToolsLost):
                        score = await self.task.score(problem, steps, self.graders, *given)
            except InfrastructureError:
                on_lost(cost)
                attempts_left -= 1
                if attempts_left == 0:
                    raise
            else:
                self.counters.completed += 1
                self.counters.tokens += cost.tokens
                return episode, score, cost
            finally:
                self.counters.episode(-1)


class TreeRollout:
    """`interfaces.Rollout` for one input: its tree and its ledger."""

    def __init__(
        self,
        worker: RolloutWorker,
        problem: Problem,
        step: int,
        budget: int | None = None,
        journal: Sequence[Completion] = (),
        on_complete: Callable[[Completion], None] = lambda done: None,
    ) -> None:
        """See `RolloutWorker.grow`."""
        settings = worker.settings
        budget = budget or settings.growth.n_total
        self.tree = RolloutTree(problem.id, budget, messages=problem.messages)
        self.ledger = Ledger(budget)
        self.random = Random(derive_seed(settings.seed, "branch", problem.id, step))
        turns = settings.train_turns[min(step, len(settings.train_turns) - 1)]
        self._agent = replace(worker.agent, max_turns=turns)
        self._worker = worker
        self._problem = problem
        self._step = step
        self._on_complete = on_complete
        self.fixed = settings.fixed_budget
        self._fewest = budget if self.fixed else settings.min_rollouts
        self._questions = 0
        self._told = [reply for done in journal for reply in done.replies]
        """Replies of the journal, in the order asked."""
        self._news: list[Reply] = []
        """Replies that are in no completion yet."""
        self._known = replay(self.tree, self.ledger, journal)
        """The leaf of every completion of the journal, by the completion's number."""
        self._asked: list[int] = []
        """Leaves that the rule has been given."""
        self._numbers = 0
        self._states = uuid.uuid4().hex
        """The name under which the tools keep this tree's states."""

    async def begin(self) -> None:
        """Ask the tools for the prompt's end. Comes first."""
        tree = self.tree
        messages, prompt_ids = await self._worker.begin(self._problem, self._states)
        tree.messages, tree.prompt_ids = list(messages), tuple(prompt_ids)

    @property
    def remaining(self) -> int:
        return self.ledger.n_total - self._numbers

    @property
    def enough(self) -> bool:
        if self._numbers < self._fewest or self.remaining == 0:
            return False
        nodes = self.tree.nodes
        scores = [score for leaf in self._asked if (score := nodes[leaf].score) is not None]
        return not can_teach(scores, self.tree.localizations)

    def extend(self, completions: int) -> None:
        """Allow so many further completions: an analysis adds them to a finished tree."""
        self.ledger.n_total += completions
        self._fewest += completions

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        """See `interfaces.Rollout`. Completions are numbered, hence seeded, in calling order."""
        worker, problem, number = self._worker, self._problem, self._numbers
        settings = worker.settings
        self._numbers += 1
        if number in self._known:
            leaf = self._known[number]
            self._asked.append(leaf)
            return leaf
        drawn = worker.sampling(settings.sampling, "grow", problem.id, self._step, number)
        branches = anchor is None and growth.branches(settings.growth)
        start = Start(self.tree.prefix_ids(at), self.tree.steps(at), self._states, branches)
        lost: list[Cost] = []
        with self.ledger.reserve(anchor) as reservation:
            episode, score, cost = await worker.attempt(
                self._agent, problem, drawn, start, lost.append
            )
            for wasted in lost:
                self.ledger.lost(anchor, wasted)
            news, self._news = self._news, []
            enter_replies(self.ledger, news)
            leaf = self.tree.add_trajectory(at, episode.steps, score, episode.end)
            reservation.leaf, reservation.cost = leaf, cost
        self._asked.append(leaf)
        self._on_complete(
            Completion(number, at, anchor, episode.steps, score, episode.end, cost, lost, news)
        )
        return leaf

    async def ask(
        self, messages: Sequence[Message], *, temperature: float, top_p: float, max_tokens: int
    ) -> str:
        """See `interfaces.Rollout`. Questions are numbered, hence seeded, in calling order."""
        worker, number = self._worker, self._questions
        self._questions += 1
        if number < len(self._told):
            return self._told[number].text
        config = SamplingConfig(temperature=temperature, top_p=top_p)
        drawn = worker.sampling(config, "ask", self._problem.id, self._step, number)
        reply = await worker.answer(messages, replace(drawn, max_tokens=max_tokens))
        self._news.append(reply)
        return reply.text

    async def close(self) -> None:
        """Give up the tree's tool states; it can still be completed, at the cost of replays."""
        await self._agent.tools.release(self._states)


def opened_by(messages: Sequence[Message], opening: str | None) -> list[Message]:
    """A prompt that ends with `opening`: within its last message, if that is the user's."""
    if opening is None:
        return list(messages)
    if messages and messages[-1]["role"] == "user" and isinstance(messages[-1]["content"], str):
        content = f"{messages[-1]['content']}\n\n{opening}"
        return [*messages[:-1], {**messages[-1], "content": content}]
    return [*messages, {"role": "user", "content": opening}]
