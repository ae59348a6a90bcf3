"""One budget for all inputs of a step (`budget.scope=batch`).

An input that cannot teach any more ends early and hands over what it has left; one that has spent
its own and could still teach is granted more, a few rollouts at a time, those first that were
granted least. Invariant: what was granted plus what is left is inputs x N_total at every moment;
no input gets less than `min` or more than `max`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from elpo_ray.growth.budget import can_teach
from elpo_ray.tree import RolloutTree

CHUNKS = 4
"""A grant is N_total over this: about one search."""


def could_learn_more(tree: RolloutTree) -> bool:
    """`can_teach` of a finished tree."""
    scores = [leaf.score for leaf in tree.leaves() if leaf.score is not None]
    return can_teach(scores, tree.localizations)


@dataclass
class SharedBudget:
    """The rollouts of a step's inputs."""

    n_total: int
    most: int
    """The most rollouts that one input may get."""
    left: int = 0
    """Rollouts that were handed over and not granted again."""
    granted: dict[int, int] = field(default_factory=dict)
    """Rollouts that an input was granted beyond N_total."""
    _want_more: list[int] = field(default_factory=list)
    """Inputs that wait for a grant."""

    def total_of(self, index: int) -> int:
        """Rollouts that input `index` may spend now."""
        return self.n_total + self.granted.get(index, 0)

    def settle(self, index: int, spent: int, wants_more: bool) -> list[int]:
        """Input `index` has ended; returns the inputs that go on, with a larger `total_of`."""
        unspent = self.total_of(index) - spent
        assert unspent >= 0, f"input {index} spent {spent} of {self.total_of(index)}"
        if unspent:
            self.granted[index] = self.granted.get(index, 0) - unspent
            self.left += unspent
        elif wants_more and self.total_of(index) < self.most:
            self._want_more.append(index)
        return self._grant()

    def _grant(self) -> list[int]:
        given = []
        self._want_more.sort(key=lambda index: (self.granted.get(index, 0), index))
        while self.left and self._want_more:
            index = self._want_more.pop(0)
            chunk = max(1, self.n_total // CHUNKS)
            chunk = min(chunk, self.left, self.most - self.total_of(index))
            self.left -= chunk
            self.granted[index] = self.granted.get(index, 0) + chunk
            given.append(index)
        total = sum(self.granted.values()) + self.left
        assert total == 0, f"the books are off by {total} rollouts"
        return given
