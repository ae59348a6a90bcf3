"""Every credit rule, on random trees, against its formula written out leaf by leaf.

The formulas are computed here in exact fractions where they are sums, from plain lists of leaves
and paths that the test made itself: nothing of `elpo_ray.credit` takes part in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config.algorithm import (
    AfterIrrecoverable,
    Aggregation,
    AlgorithmConfig,
    Attribution,
    ClipConfig,
    CreditConfig,
    CreditRule,
    ElcScope,
    LossConfig,
    StepGroupConfig,
    Weighting,
)
from elpo_ray.credit import Credit, assign
from elpo_ray.tree import Localization, RolloutTree
from elpo_ray.types import UNGRADED, FinishReason, Score, Step, ToolKind, ToolResult, Turn

REWARDS = [-1.1, -1.0, -0.5, 0.0, 0.25, 1.0, 1.1]
OBSERVATIONS = ["", "1", "1 \n", " 1", "2", "2  3", "2 3"]


@dataclass
class Plain:
    """A tree as the test knows it. Node 0 is the prompt; lists are indexed by node."""

    parent: list[int] = field(default_factory=lambda: [-1])
    tokens: list[int] = field(default_factory=lambda: [0])
    seen: list[str] = field(default_factory=lambda: [""])
    reward: dict[int, float] = field(default_factory=dict)
    """The rewards of the leaves with a verdict."""
    success: dict[int, bool] = field(default_factory=dict)
    ungraded: set[int] = field(default_factory=set)
    group: dict[int, int | None] = field(default_factory=dict)
    searched: list[tuple[int, int, bool]] = field(default_factory=list)
    """Leaf, critical node, confirmed."""

    @property
    def size(self) -> int:
        return len(self.parent)

    def path(self, node: int) -> list[int]:
        """From the first step to `node`."""
        path = []
        while node > 0:
            path.insert(0, node)
            node = self.parent[node]
        return path

    def children(self, node: int) -> list[int]:
        return [child for child in range(1, self.size) if self.parent[child] == node]

    def leaves_at(self, node: int) -> list[int]:
        """All leaves at or below `node`."""
        leaves = sorted([*self.reward, *self.ungraded])
        return [leaf for leaf in leaves if node == 0 or node in self.path(leaf)]

    def graded_at(self, node: int) -> list[int]:
        return [leaf for leaf in self.leaves_at(node) if leaf in self.reward]


@st.composite
def plains(draw: st.DrawFn) -> Plain:
    """Chains from the prompt or from any inner node, as growth rules make them."""
    plain = Plain()
    for _ in range(draw(st.integers(1, 7))):
        inner = [n for n in range(plain.size) if n not in plain.reward | plain.success
                 and n not in plain.ungraded]  # fmt: skip
        at = draw(st.sampled_from(inner))
        for _ in range(draw(st.integers(1, 3))):
            plain.parent.append(at)
            plain.tokens.append(draw(st.integers(1, 9)))
            plain.seen.append(draw(st.sampled_from(OBSERVATIONS)))
            at = plain.size - 1
        plain.group[at] = draw(st.sampled_from([None, 0, 1]))
        if draw(st.integers(0, 7)) == 0:
            plain.ungraded.add(at)
            continue
        plain.reward[at] = draw(st.sampled_from(REWARDS))
        plain.success[at] = draw(st.booleans())
    for leaf, success in plain.success.items():
        if not success and draw(st.booleans()):
            critical = draw(st.sampled_from(plain.path(leaf)))
            plain.searched.append((leaf, critical, draw(st.booleans())))
    return plain


def built(plain: Plain, task_id: str = "t") -> RolloutTree:
    tree = RolloutTree(task_id, max(1, len(plain.reward)))
    for node in range(1, plain.size):
        count = plain.tokens[node]
        turn = Turn((1,) * count, (0.0,) * count, (0.0,) * count, FinishReason.STOP, 0)
        step = Step(turn)
        if plain.children(node):
            result = ToolResult(ToolKind.OK, plain.seen[node])
            step = Step(turn, observation_text=plain.seen[node], result=result)
        tree.add(plain.parent[node], step)
    for leaf in (*plain.reward, *plain.ungraded):
        given = leaf in plain.reward
        score = Score(plain.reward[leaf], plain.success[leaf]) if given else UNGRADED
        tree.nodes[leaf].score, tree.nodes[leaf].group = score, plain.group[leaf]
    for leaf, critical, confirmed in plain.searched:
        at = plain.path(leaf).index(critical) + 1
        tree.localizations.append(Localization(leaf, critical, confirmed, (at, at), []))
    return tree


batches = st.lists(plains(), min_size=1, max_size=3)
knobs = st.fixed_dictionaries(
    {
        "eps": st.sampled_from([0.0, 1e-6, 0.1]),
        "ddof": st.sampled_from([0, 1]),
        "divide_by_std": st.booleans(),
    }
)


def z(values: list[float], value: float, eps: float, ddof: int, divide_by_std: bool) -> float:
    """(x - mean) / (σ + ε) of one of `values`; 0 without spread."""
    exact = [Fraction(each) for each in values]
    mean = sum(exact) / len(exact)
    if all(each == exact[0] for each in exact):
        return 0.0
    variance = sum((each - mean) ** 2 for each in exact) / (len(exact) - ddof)
    sigma = math.sqrt(variance) + eps if divide_by_std else 1.0
    return float(Fraction(value) - mean) / sigma


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# --- the formulas: the advantage of leaf l on its step n ------------------------------------------

Formula = Callable[[Plain, dict[str, Any], int, int], float]


def group(plain: Plain, s: dict[str, Any], leaf: int, node: int) -> float:
    """GRPO: A_i = (R_i - mean R) / (std R + ε), the same on every token of the leaf."""
    return z(list(plain.reward.values()), plain.reward[leaf], **s)


def tree_group(plain: Plain, s: dict[str, Any], leaf: int, node: int) -> float:
    """Tree-GRPO: the same, and once more among the leaves of the leaf's own tree."""
    own = [r for other, r in plain.reward.items() if plain.group[other] == plain.group[leaf]]
    return group(plain, s, leaf, node) + z(own, plain.reward[leaf], **s)


def step_group(plain: Plain, s: dict[str, Any], leaf: int, node: int) -> float:
    """GiGPO, Eq. 3-8: A^E + ω A^S; A^S compares G_t = γ^(T - t) R among all steps of the input that
    were taken in one state. A step that several leaves share is one sample of each; A^S of a node
    is the mean over these."""

    def taken() -> Iterator[tuple[int, str, float]]:
        for other, reward in plain.reward.items():
            path = plain.path(other)
            for t, step in enumerate(path, start=1):
                state = "prompt" if t == 1 else "after " + " ".join(plain.seen[path[t - 2]].split())
                yield step, state, GAMMA ** (len(path) - t) * reward

    everything = list(taken())
    scores = [
        z([g for _, state, g in everything if state == own], value, **s)
        for step, own, value in everything
        if step == node
    ]
    return group(plain, s, leaf, node) + OMEGA * mean(scores)


def hierarchical(plain: Plain, s: dict[str, Any], leaf: int, node: int) -> float:
    """ELPO, Eq. 6-10: λ A_b + (1 - λ) A_t."""

    def r(n: int) -> float:
        below = [child for child in plain.children(n) if plain.graded_at(child)]
        return mean([r(child) for child in below]) if below else plain.reward[n]

    def branch(n: int) -> float:
        if n == 0:
            return 0.0
        siblings = [c for c in plain.children(plain.parent[n]) if plain.graded_at(c)]
        if len(siblings) == 1:
            return branch(plain.parent[n])
        return z([r(sibling) for sibling in siblings], r(n), **s)

    return LAMBDA * branch(node) + (1 - LAMBDA) * group(plain, s, leaf, node)


GAMMA, OMEGA, LAMBDA = 0.9, 0.7, 0.3
FORMULAS: dict[CreditRule, Formula] = {
    CreditRule.group: group,
    CreditRule.tree_group: tree_group,
    CreditRule.step_group: step_group,
    CreditRule.hierarchical: hierarchical,
}


SUFFIX_FORMULAS = (CreditRule.group_each, CreditRule.contrast)
"""Rules under which a leaf trains its own steps only: test_suffix_formulas.py."""


def test_every_rule_has_a_formula_here() -> None:
    assert {*FORMULAS, CreditRule.whitened, *SUFFIX_FORMULAS} == set(CreditRule)


def credits_of(batch: list[Plain], rule: CreditRule, **more: Any) -> list[Credit]:
    config = CreditConfig(
        rule=rule, lam=LAMBDA, step=StepGroupConfig(omega=OMEGA, gamma=GAMMA), **more
    )
    loss = LossConfig(aggregation=Aggregation.token_mean)
    trees = [built(plain, f"t{number}") for number, plain in enumerate(batch)]
    return assign(trees, AlgorithmConfig(credit=config, loss=loss))


def check(
    plain: Plain,
    credit: Credit,
    attribution: Attribution,
    value: Callable[[int, int], float],
) -> None:
    """Eq. 9: a shared step gets the mean over the leaves below it; with `each` it gets the positive
    and the negative parts by themselves. A leaf without a verdict takes part in nothing."""
    gain, loss = [0.0], [0.0]
    for node in range(1, plain.size):
        own = [value(leaf, node) for leaf in plain.graded_at(node)]
        if attribution is Attribution.mean:
            advantage = mean(own)
            gain.append(max(advantage, 0.0))
            loss.append(max(-advantage, 0.0))
        else:
            gain.append(mean([max(a, 0.0) for a in own]))
            loss.append(mean([max(-a, 0.0) for a in own]))
    np.testing.assert_allclose(credit.negative_advantage, loss, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(credit.advantage, np.subtract(gain, loss), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attribution", Attribution)
@pytest.mark.parametrize("rule", FORMULAS)
@settings(deadline=None)
@given(batch=batches, chosen=knobs)
def test_a_rule_is_its_formula(
    rule: CreditRule, attribution: Attribution, batch: list[Plain], chosen: dict[str, Any]
) -> None:
    credits = credits_of(batch, rule, attribution=attribution, **chosen)
    for plain, credit in zip(batch, credits, strict=True):
        check(
            plain,
            credit,
            attribution,
            lambda leaf, node, plain=plain: FORMULAS[rule](plain, chosen, leaf, node),  # type: ignore[misc]
        )


@pytest.mark.parametrize("attribution", Attribution)
@settings(deadline=None)
@given(batch=batches, baseline=st.booleans(), ddof=st.sampled_from([0, 1]))
def test_whitening_is_its_formula(
    attribution: Attribution, batch: list[Plain], baseline: bool, ddof: int
) -> None:
    """Reinforce++: (G - μ) / sqrt(σ² + ε), μ and σ² over every agent token of every leaf of the
    batch; with `baseline` G is the reward less the input's mean."""
    eps = 1e-8
    credits = credits_of(
        batch,
        CreditRule.whitened,
        attribution=attribution,
        baseline=baseline,
        eps=eps,
        ddof=ddof,
    )
    returns: list[dict[int, Fraction]] = []
    for plain in batch:
        exact = {leaf: Fraction(reward) for leaf, reward in plain.reward.items()}
        centre = sum(exact.values()) / len(exact) if baseline and exact else Fraction(0)
        returns.append({leaf: reward - centre for leaf, reward in exact.items()})
    tokens = [
        g
        for plain, own in zip(batch, returns, strict=True)
        for leaf, g in own.items()
        for node in plain.path(leaf)
        for _ in range(plain.tokens[node])
    ]
    if tokens and len(set(tokens)) > 1:
        mu = sum(tokens) / len(tokens)
        variance = sum((g - mu) ** 2 for g in tokens) / max(len(tokens) - ddof, 1)
        scale = 1 / math.sqrt(variance + Fraction(eps))
    else:
        mu, scale = Fraction(0), 0.0
    for plain, own, credit in zip(batch, returns, credits, strict=True):
        check(
            plain,
            credit,
            attribution,
            lambda leaf, node, own=own: float(own[leaf] - mu) * scale,  # type: ignore[misc]
        )


@settings(deadline=None)
@given(plain=plains(), chosen=knobs)
def test_what_works_with_every_rule_is_its_formula(plain: Plain, chosen: dict[str, Any]) -> None:
    """`neutral` takes the advantage of steps whose parent has no success below; `node` lets the
    leaves of a shared step count once together."""
    for rule in FORMULAS:
        paper = credits_of([plain], rule, **chosen)[0].advantage
        (neutral,) = credits_of(
            [plain],
            rule,
            after_irrecoverable=AfterIrrecoverable.neutral,
            weighting=Weighting.node,
            **chosen,
        )
        for node in range(1, plain.size):
            parent = plain.parent[node]
            alive = any(plain.success.get(leaf) for leaf in plain.leaves_at(parent))
            assert neutral.advantage[node] == (paper[node] if alive else 0.0)
            assert neutral.share[node] == 1 / max(len(plain.graded_at(node)), 1)


@pytest.mark.parametrize("scope", ElcScope)
@settings(deadline=None)
@given(plain=plains())
def test_the_lower_bound_is_its_formula(scope: ElcScope, plain: Plain) -> None:
    """Eq. 11: 1 - ε_low, and 1 - (ε_low + ε_ELC) on the critical step and its suffix, of failed
    leaves only. Where only the searched leaf's own terms are looser, each leaf has a row."""
    config = AlgorithmConfig(clip=ClipConfig(eps_low=0.2, eps_elc=0.1, scope=scope))
    (credit,) = assign([built(plain)], config)
    failed = [leaf for leaf, success in plain.success.items() if not success]
    confirmed = [(leaf, critical) for leaf, critical, sure in plain.searched if sure]

    if scope in (ElcScope.searched_only, ElcScope.posterior):
        # A binary search is certain of the step that it named: its interval has one step.
        named = plain.searched if scope is ElcScope.posterior else confirmed
        suffix = {leaf: plain.path(leaf)[plain.path(leaf).index(c) :] for leaf, c, *_ in named}
        rows = [
            [0.7 if node in suffix.get(leaf, ()) else 0.8 for node in range(plain.size)]
            for leaf in sorted([*plain.reward, *plain.ungraded])
        ]
        np.testing.assert_allclose(credit.clip_low, rows, rtol=1e-12)
        return

    def loose(node: int) -> bool:
        if scope is ElcScope.critical_subtree:
            critical = {c for _, c in confirmed}
            below = critical & set(plain.path(node))
            return bool(below) and any(leaf in failed for leaf in plain.leaves_at(node))
        if scope is ElcScope.first_wrong_all:
            here = plain.leaves_at(node)
            return any(leaf in failed for leaf in here) and not any(
                plain.success.get(leaf) for leaf in here
            )
        return False

    expected = [0.8] + [0.7 if loose(node) else 0.8 for node in range(1, plain.size)]
    np.testing.assert_allclose(credit.clip_low, expected, rtol=1e-12)
