"""A credit rule: the rank of a leaf among those of its input, not its standardized reward."""

from collections.abc import Sequence

from scipy.stats import rankdata

from elpo_ray.config.algorithm import CreditConfig
from elpo_ray.credit.parts import Parts, rewards
from elpo_ray.tree import RolloutTree


def parts(
    trees: Sequence[RolloutTree], config: CreditConfig, *, ties: str = "average"
) -> list[Parts]:
    """A_t of every leaf, between -1 and 1; `ties` as in `scipy.stats.rankdata`."""
    found = []
    for tree in trees:
        reward = rewards(tree)
        ranks = rankdata(list(reward.values()), method=ties)
        most = max(1, len(reward) - 1)
        pairs = zip(reward, ranks, strict=True)
        level = {leaf: (2 * rank - len(reward) - 1) / most for leaf, rank in pairs}
        found.append(Parts(leaf=level, node=[0.0] * len(tree.nodes)))
    return found
