"""Search by evidence: the critical step is named when its posterior probability is high enough.

Failures are collected and one is chosen as BEL does (`bel.search_failures`). The search of it asks
for one completion at a time, from the anchor that is expected to tell most (`belief`), and names
the step whose posterior reaches `threshold`; it names none after `max_probes` completions, or when
the budget is spent. Not in the paper; docs/localization.md says why it is here.

Free evidence is taken when the search starts, from the trajectories that the rule has been given
until then: each root trajectory that goes through the same prefix of the searched one counts as a
completion from every anchor they share. So what runs beside the search changes nothing.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from elpo_ray.config.growth import FreeEvidence, GrowthConfig
from elpo_ray.growth.bel import num_tool_steps, outcome, search_failures, sure_roots
from elpo_ray.growth.belief import Belief, credible_interval, prior_over, reaches
from elpo_ray.growth.common import common_steps, same_result, same_tokens
from elpo_ray.growth.independent import sample
from elpo_ray.interfaces import Rollout
from elpo_ray.tree import Localization, Posterior, Probe, RolloutTree


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """Algorithm 1 with another search."""

    def begin(leaf: int, roots: Sequence[int]) -> tuple[int, Coroutine[Any, Any, Localization]]:
        free = free_evidence(rollout.tree, leaf, roots, config.posterior.free_evidence)
        named = max(start(rollout.tree, leaf, free, config).posterior())
        most = 0 if reaches(named, config.posterior.threshold) else config.posterior.max_probes
        return most, search(rollout, leaf, free, config)

    await search_failures(rollout, config.bel, begin, config.posterior.max_probes)


def first_roots(config: GrowthConfig) -> int:
    """How many trajectories from the prompt are sampled at once at the beginning."""
    b_max = config.bel.b_max
    return sure_roots(config.n_total, b_max, b_max, config.posterior.max_probes)


async def search(
    rollout: Rollout, leaf: int, free: Sequence[Probe], config: GrowthConfig
) -> Localization:
    """Search the failed trajectory that ends in `leaf`, with what the tree knows already. A
    completion without a verdict is spent and shows nothing."""
    settings, tree, path = config.posterior, rollout.tree, rollout.tree.path(leaf)
    belief = start(tree, leaf, free, config)
    trail = [belief.posterior()]
    probes: list[Probe] = []
    while (
        not reaches(max(trail[-1]), settings.threshold)
        and len(probes) < settings.max_probes
        and rollout.remaining > 0
    ):
        anchor = belief.best_anchor()
        [child] = await sample(rollout, 1, at=path[anchor - 1], anchor=anchor)
        success = outcome(tree, child)
        if success is not None:
            belief = belief.seen(anchor, success)
        probes.append(
            Probe(anchor, attempts=int(success is not None), successes=int(bool(success)))
        )
        trail.append(belief.posterior())
    last = trail[-1]
    named = reaches(max(last), settings.threshold)
    return Localization(
        leaf=leaf,
        critical=path[last.index(max(last))] if named else None,
        confirmed=named,
        interval=credible_interval(last, settings.threshold),
        probes=probes,
        posterior=Posterior(list(belief.prior), belief.beta, list(free), trail),
    )


def start(tree: RolloutTree, leaf: int, free: Sequence[Probe], config: GrowthConfig) -> Belief:
    """The belief before the first probe."""
    belief = Belief.of(prior_over(tree.steps(leaf), config), config.posterior.beta)
    for known in free:
        for i in range(known.attempts):
            belief = belief.seen(known.anchor, success=i < known.successes)
    return belief


def free_evidence(
    tree: RolloutTree, leaf: int, roots: Sequence[int], kind: FreeEvidence
) -> list[Probe]:
    """What the graded trajectories in `roots`, other than the searched one, show of its anchors:
    one entry for each anchor that any of them went through."""
    if kind is FreeEvidence.none:
        return []
    steps = tree.steps(leaf)
    alike = same_tokens if kind is FreeEvidence.tokens else same_result
    attempts, successes = [0] * num_tool_steps(steps), [0] * num_tool_steps(steps)
    for root in roots:
        verdict = outcome(tree, root)
        if root == leaf or verdict is None:
            continue
        for place in range(common_steps(steps, tree.steps(root), alike)):
            attempts[place] += 1
            successes[place] += verdict
    return [
        Probe(place + 1, attempts[place], successes[place])
        for place in range(len(attempts))
        if attempts[place]
    ]
