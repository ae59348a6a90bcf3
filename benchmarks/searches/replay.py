"""Growth rules on a bank: thousands of trees a minute, from what a real policy did.

Trajectories from the prompt come in a random order, the same one for every rule; a completion of a
prefix has one of the outcomes that the bank holds for it, and fails where the prefix is
irrecoverable. Time is counted in turns: completions that run at once take as long as the longest.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.searches.bank import Bank, Trajectory
from elpo_ray import growth
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.growth.bel import known_sound
from elpo_ray.tree import RolloutTree
from elpo_ray.types import FinishReason, Score, Step, Turn

ANSWER = Step(Turn((0,), (0.0,), (0.0,), FinishReason.STOP, weight_version=0))
"""What follows a prefix is not in the bank, only whether it succeeds."""


class Clock(selectors.DefaultSelector):
    """Makes an event loop that never waits: time jumps to what happens next."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class BankRollout:
    """`interfaces.Rollout` for one input."""

    enough, fixed = False, True

    def __init__(
        self, trajectories: Sequence[Trajectory], n_total: int, seed: str, *, waits: bool = True
    ) -> None:
        """With `waits` a completion takes as many seconds of the loop's time as it has turns."""
        self.tree = RolloutTree("bank", n_total)
        self.random = random.Random(seed)
        self.remaining = n_total
        self.of_leaf: dict[int, Trajectory] = {}
        """The trajectories from the prompt by leaf."""
        self._order = self.random.sample(range(len(trajectories)), len(trajectories))
        self._trajectories = trajectories
        self._waits = waits
        self._of_node: dict[int, int] = {}
        self._pools: dict[tuple[int, int], list[bool]] = {}

    async def complete(self, at: int = 0, *, anchor: int | None = None) -> int:
        """See `interfaces.Rollout`."""
        assert self.remaining > 0
        self.remaining -= 1
        if at == 0:
            number = self._order.pop(0)
            self._order.append(number)
            trajectory = self._trajectories[number]
            steps, success, turns = trajectory.steps, trajectory.success, len(trajectory.steps)
        else:
            assert anchor is not None, "a prefix has its length"
            number = self._of_node[at]
            steps, success = [ANSWER], self._outcome(number, anchor)
            turns = len(self._trajectories[number].steps) - anchor
        await asyncio.sleep(turns if self._waits else 0)
        leaf = self.tree.add_trajectory(at, list(steps), Score(float(success), success))
        if at == 0:
            self.of_leaf[leaf] = self._trajectories[number]
            self._of_node |= dict.fromkeys(self.tree.path(leaf), number)
        return leaf

    def _outcome(self, number: int, anchor: int) -> bool:
        """One of the completions of this prefix; each is taken once before any is taken again."""
        trajectory = self._trajectories[number]
        if trajectory.truth is None or anchor >= trajectory.truth:
            return False
        pool = self._pools.setdefault((number, anchor), [])
        if not pool:
            outcomes = trajectory.pools[anchor - 1]
            pool += self.random.sample(outcomes, len(outcomes))
        return pool.pop()


@dataclass(slots=True)
class Tally:
    """Sums over trees of one problem."""

    trees: int = 0
    searches: int = 0
    named: int = 0
    right: int = 0
    located: int = 0
    """Trees with at least one rightly named step."""
    contradicted: int = 0
    """Named steps that a successful trajectory from the prompt of the same tree has too, with all
    steps before, token for token."""
    probes: int = 0
    turns: float = 0.0
    """From the first completion's begin to the last one's end."""
    beliefs: list[tuple[float, bool]] = field(default_factory=list)
    """(posterior of the named step, whether it was right), of searches by evidence."""

    def add(self, rollout: BankRollout, turns: float) -> None:
        right = 0
        for found in rollout.tree.localizations:
            path, truth = rollout.tree.path(found.leaf), rollout.of_leaf[found.leaf].truth
            assert truth is not None, "only failed trajectories are searched"
            hit = found.critical == path[truth - 1]
            right += hit
            self.named += found.critical is not None
            self.probes += len(found.probes)
            if found.critical is not None:
                successes = [leaf for leaf, one in rollout.of_leaf.items() if one.success]
                known = known_sound(rollout.tree, found.leaf, successes)
                self.contradicted += known > path.index(found.critical)
            if found.posterior is not None and found.critical is not None:
                self.beliefs.append((max(found.posterior.last), hit))
        self.trees += 1
        self.searches += len(rollout.tree.localizations)
        self.right += right
        self.located += right > 0
        self.turns += turns


def replay(bank: Bank, config: GrowthConfig, seeds: int) -> list[Tally]:
    """Grow `seeds` trees of every problem; one tally a problem."""
    tallies = []
    clock = Clock()
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        for number, trajectories in enumerate(bank):
            tally = Tally()
            for seed in range(seeds):
                rollout = BankRollout(trajectories, config.n_total, f"{number}/{seed}")
                begun = clock.now
                runner.run(growth.grow(rollout, config))
                assert rollout.remaining == 0, "a rule spends its whole budget"
                tally.add(rollout, clock.now - begun)
            tallies.append(tally)
    return tallies


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a `Clock`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._clock = clock

    def time(self) -> float:
        """The clock's time, in turns."""
        return self._clock.now
