"""Rules whose branches train their own steps only: DEEP-GRPO, BranPO, SRPO and RRPO."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from fakes import FakeTask, Plan, ScriptedPolicy, Word, completion_of, make_config, make_worker

from elpo_ray.config.growth import (
    ContrastConfig,
    GrowthConfig,
    GrowthRule,
    Locate,
    PivotConfig,
    PivotModel,
    ResetConfig,
)
from elpo_ray.growth.contrast import depths, preference
from elpo_ray.growth.pivot import weights
from elpo_ray.growth.recoverability import PivotFit, fit
from elpo_ray.growth.reset import named_step
from elpo_ray.rollout.journal import Completion, TreeEnd, assemble
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.tree import Branch, RolloutTree
from elpo_ray.types import UNGRADED, EndReason, InfrastructureError, Score, Step

PROBLEM = FakeTask().train_problem(0)


def worker_of(plan: Plan, growth: GrowthConfig, **more: Any) -> RolloutWorker:
    return make_worker(plan, make_config(growth, retries=5), **more)


def grow(plan: Plan, growth: GrowthConfig, **more: Any) -> RolloutTree:
    return asyncio.run(worker_of(plan, growth, **more).grow(PROBLEM, 0))


def number(tree: RolloutTree, leaf: int) -> int:
    """The number of the completion that ended in a leaf."""
    step = tree.nodes[leaf].step
    assert step is not None
    return completion_of(step)


def scripted(outcomes: Sequence[str], length: int = 3) -> Plan:
    """Completion i ends with outcome i; every trajectory has `length` tool steps in all."""

    def plan(number: int, before: list[str]) -> list[Word]:
        end = outcomes[number] if number < len(outcomes) else "=no"
        return [*["g"] * (length - len(before)), end]

    return plan


def pivot(**settings: Any) -> GrowthConfig:
    return GrowthConfig(rule=GrowthRule.pivot, n_total=16, pivot=PivotConfig(**settings))


# --- DEEP-GRPO ---


def test_eight_branches_grow_at_one_prefix_of_the_first_failure() -> None:
    tree = grow(scripted(["=ok", "=no", "=no"]), pivot())
    (branch,) = tree.branches
    assert number(tree, branch.parent) == 1
    assert len(branch.leaves) == 8 and branch.kept == branch.leaves
    below = tree.path(branch.parent)[branch.anchor - 1] if branch.anchor else 0
    starts = {tree.path(leaf)[branch.anchor] for leaf in branch.leaves}
    assert len(starts) == 8 and all(tree.nodes[node].parent == below for node in starts)
    assert len(tree.leaves()) == 16


def test_without_a_failure_all_start_at_the_prompt() -> None:
    tree = grow(scripted(["=ok"] * 16), pivot())
    assert tree.branches == [] and len(tree.nodes[0].children) == 16


def test_several_failures_share_the_budget_first_come_first_served() -> None:
    tree = grow(scripted(["=no"] * 16), pivot(roots=4, chains=3, branches=5))
    assert [len(branch.leaves) for branch in tree.branches] == [5, 5, 2]
    assert [number(tree, branch.parent) for branch in tree.branches] == [0, 1, 2]


def test_prefixes_are_drawn_by_place_and_recoverability() -> None:
    assert [30 * w / sum(weights(3, PivotConfig())) for w in weights(3, PivotConfig())] == (
        pytest.approx([1, 4, 9, 16])
    )
    fitted = weights(2, PivotConfig(coefficients=(3.0, -2.0), gamma=1.0))
    places = [(m + 1) / 4 for m in range(3)]
    assert fitted == pytest.approx([r / (1 + math.exp(2 - 3 * r)) for r in places])
    assert weights(2, PivotConfig(model=PivotModel.random, coefficients=(9.0, 0.0))) == [1, 1, 1]
    uniform = PivotConfig(model=PivotModel.uniform, coefficients=(9.0, 0.0), gamma=0.0)
    assert weights(2, uniform) == [1, 1, 1]
    drawn = Counter(
        asyncio.run(worker_of(scripted(["=no"] * 16), pivot()).grow(PROBLEM, step))
        .branches[0]
        .anchor
        for step in range(300)
    )
    for anchor, share in enumerate((1, 4, 9, 16)):
        assert drawn[anchor] / 300 == pytest.approx(share / 30, abs=0.09)


def test_the_regression_is_the_minimum_of_its_objective() -> None:
    """Against a search that knows nothing of gradients."""
    from scipy.optimize import minimize

    draw = random.Random(3)
    for size in (12, 400):
        data = [(r := draw.random(), int(draw.random() < 0.2 + 0.6 * r)) for _ in range(size)]

        def loss(at: Any, data: Any = data) -> float:
            terms = ((at[0] * r + at[1], y) for r, y in data)
            return at[0] ** 2 / 2 + math.fsum(math.log1p(math.exp(z)) - y * z for z, y in terms)

        best = minimize(
            loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
        )
        assert fit(data) == pytest.approx(best.x, abs=1e-4)


def test_the_regression_is_used_once_both_kinds_are_known_often_enough() -> None:
    known = PivotFit()
    failing = [branched([False] * 8)] * 11
    known.add(1, failing, PivotConfig())
    assert known.before(1, 0) is None and len(known.feedback) == 11
    known.add(2, [branched([False, True])], PivotConfig(window=11))
    assert len(known.feedback) == 11 and known.before(2, 0) is not None
    assert known.before(2, 1) is None, "growth ahead knows one step less"
    known.add(3, [branched([None])], PivotConfig())
    assert len(known.feedback) == 11, "a branching without a verdict shows nothing"


def branched(outcomes: Sequence[bool | None]) -> RolloutTree:
    tree = grow(scripted(["=no"] * 16), pivot(roots=8, branches=8))
    (old,) = tree.branches
    for leaf, success in zip(old.leaves, outcomes, strict=False):
        score = UNGRADED if success is None else Score(float(success), success)
        tree.nodes[leaf].score = score
    tree.branches[0] = Branch(old.parent, old.anchor, old.leaves[: len(outcomes)], [])
    return tree


# --- BranPO ---


def contrast(n_total: int = 16, **settings: Any) -> GrowthConfig:
    return GrowthConfig(
        rule=GrowthRule.contrast, n_total=n_total, contrast=ContrastConfig(**settings)
    )


def ended(outcomes: Sequence[tuple[bool | None, int]]) -> tuple[RolloutTree, list[int]]:
    """Trajectories of (success, steps) from the prompt."""
    tree = RolloutTree("t", len(outcomes))
    blank = grow(scripted([]), pivot()).nodes[1].step
    assert isinstance(blank, Step)
    leaves = []
    for success, length in outcomes:
        score = UNGRADED if success is None else Score(float(success), success)
        end = EndReason.SANDBOX if success is None else EndReason.ANSWER
        leaves.append(tree.add_trajectory(0, [blank] * length, score, end))
    return tree, leaves


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([(True, 3)] * 4, [[1]] * 4),
        ([(True, 3), (False, 3), (False, 3)], [[1, 1, 2, 2], *[[1, 1, 2, 2, 3, 3]] * 2]),
        ([(True, 3), (False, 3)], [[1, 1, 2, 2]] * 2),
        ([(True, 2)] * 3 + [(False, 2)], [[1, 1, 2, 2]] * 4),
        ([(True, 2)] * 4 + [(False, 2)], [*[[]] * 4, [1, 1, 2, 2]]),
        ([(True, 2), (True, 3), (False, 2)], [[1, 1, 2, 2], [2] * 5, [1, 1, 2, 2]]),
        ([(True, 3), (None, 3)], [[1], []]),
        ([(None, 3)], [[]]),
    ],
)
def test_how_often_and_how_deep_a_base_is_continued(
    outcomes: list[tuple[bool | None, int]], expected: list[list[int]]
) -> None:
    tree, leaves = ended(outcomes)
    assert [depths(tree, leaf, leaves, ContrastConfig()) for leaf in leaves] == expected
    tree.nodes[leaves[0]].end = EndReason.TURN_LENGTH
    assert depths(tree, leaves[0], leaves, ContrastConfig()) == []


@pytest.mark.parametrize(
    ("base", "completion", "rate", "expected"),
    [
        ((False, 3), (True, 5), 0.1, 1),
        ((True, 3), (False, 3), 1.0, -1),
        ((False, 3), (False, 2), 0.6, 0),
        ((True, 3), (True, 4), 0.6, -1),
        ((True, 3), (True, 2), 0.6, 1),
        ((True, 3), (True, 3), 0.6, 0),
        ((True, 3), (True, 2), 1.0, 0),
        ((True, 3), (True, 2), 0.5, 0),
        ((False, 3), (None, 2), 0.1, 0),
    ],
)
def test_what_a_completion_says_of_its_base(
    base: tuple[bool, int], completion: tuple[bool | None, int], rate: float, expected: int
) -> None:
    tree, (first, second) = ended([base, completion])
    assert preference(tree, first, second, rate) == expected
    tree.nodes[second].end = EndReason.MAX_TURNS
    assert preference(tree, first, second, rate) == 0


def test_a_base_is_continued_until_a_completion_is_kept() -> None:
    """Three of four bases fail. Round one: base 1 (completion 4) fails again, base 2 (5) succeeds,
    base 3 (6) fails, and base 0, a success, fails (7 asked in order of bases)."""
    outcomes = ["=ok", "=no", "=no", "=no", *["=no", "=no", "=ok", "=no"], *["=no", "=ok"]]
    tree = grow(scripted(outcomes), contrast(12, bases=4))
    tried = [
        (number(tree, b.parent), b.anchor, [number(tree, leaf) for leaf in b.leaves], bool(b.kept))
        for b in tree.branches
    ]
    assert tried == [
        (0, 3, [4], True), (1, 3, [5], False), (2, 3, [6], True), (3, 3, [7], False),
        (1, 3, [8], False), (3, 3, [9], True),
        (1, 2, [10], False), (1, 2, [11], False),
    ]  # fmt: skip


def test_what_is_left_starts_at_the_prompt() -> None:
    tree = grow(scripted(["=ok"] * 16), contrast(16, bases=4))
    assert len(tree.branches) == 4 and not any(branch.kept for branch in tree.branches)
    assert len(tree.nodes[0].children) == 12


# --- SRPO and RRPO ---


def reset(**settings: Any) -> GrowthConfig:
    return GrowthConfig(rule=GrowthRule.reset, n_total=16, reset=ResetConfig(**settings))


def asking(growth: GrowthConfig, reply: str, **more: Any) -> tuple[RolloutWorker, ScriptedPolicy]:
    worker = worker_of(scripted(["=ok", "=no"]), growth, **more)
    policy = worker.agent.policy
    assert isinstance(policy, ScriptedPolicy)
    policy.reply = reply
    return worker, policy


@pytest.mark.parametrize(("reply", "wrong"), [("It is \\boxed{3}.", 3), ("no idea", 1)])
def test_the_policy_names_the_step_before_which_resets_start(reply: str, wrong: int) -> None:
    worker, policy = asking(reset(), reply)
    tree = asyncio.run(worker.grow(PROBLEM, 0))
    (branch,), (found,) = tree.branches, tree.localizations
    assert (number(tree, branch.parent), branch.anchor, len(branch.kept)) == (1, wrong - 1, 8)
    assert (found.interval, found.confirmed) == ((wrong, wrong), False)
    assert found.critical == tree.path(branch.parent)[wrong - 1]
    (question,) = policy.questions
    assert PROBLEM.messages[0]["content"] in question and "Step 4: =no~1;" in question
    asked = [entry for entry in tree.ledger if entry["kind"] == "ask"]
    assert [(e["charged"], e["leaf"], e["tokens"]) for e in asked] == [(False, None, len(reply))]
    assert sum(entry["charged"] for entry in tree.ledger) == 16


def test_a_random_step_needs_no_question() -> None:
    worker, policy = asking(reset(locate=Locate.random), "")
    anchors = {asyncio.run(worker.grow(PROBLEM, s)).branches[0].anchor for s in range(40)}
    assert anchors == {0, 1, 2, 3} and policy.questions == []


def test_without_a_failure_nothing_is_asked() -> None:
    worker = worker_of(scripted(["=ok"] * 16), reset())
    tree = asyncio.run(worker.grow(PROBLEM, 0))
    assert tree.branches == [] and len(tree.nodes[0].children) == 16


@pytest.mark.parametrize(
    ("reply", "step"),
    [
        ("\\boxed{2}", 2),
        ("Step 1 … \\boxed{2}, no: \\boxed{ 3 }", 3),
        ("\\boxed{9} because of Step 4", 4),
        ("Step 2, then step 3.", 3),
        ("Step 9", 1),
        ("\\boxed{0}", 1),
        ("\\boxed{two}", 1),
        ("", 1),
    ],
)
def test_the_reply_is_read(reply: str, step: int) -> None:
    assert named_step(reply, 4) == step


@pytest.mark.parametrize("kept", [0, 5, 8, 11, 16])
def test_a_tree_is_taken_up_again_without_asking_again(kept: int) -> None:
    """A reply on which a completion depends is in the journal; the tree is the same, and so is what
    the driver makes of the journal."""
    journal: list[Completion] = []
    worker, _ = asking(reset(), "\\boxed{3}")
    whole = asyncio.run(worker.grow(PROBLEM, 0, on_complete=journal.append))
    again, policy = asking(reset(), "\\boxed{2}" if kept > 8 else "\\boxed{3}")
    policy._first = kept
    more = list(journal[:kept])
    tree = asyncio.run(again.grow(PROBLEM, 0, journal=journal[:kept], on_complete=more.append))
    assert len(policy.questions) == (kept <= 8)
    assert tree.branches[0].anchor == whole.branches[0].anchor == 2
    made = assemble(PROBLEM, 16, more, TreeEnd.of(tree))
    assert (made.ledger, made.branches) == (tree.ledger, tree.branches)
    assert sum(entry["kind"] == "ask" for entry in made.ledger) == 1


def test_a_question_that_is_lost_is_asked_again_and_counted() -> None:
    worker, policy = asking(reset(), "\\boxed{3}")
    generate, lost = policy.generate, iter([True, True])

    async def faulty(prefix: Any, sampling: Any) -> Any:
        if policy.questions == [] and len(policy.seeds) > 8 * 4 - 1 and next(lost, False):
            raise InfrastructureError("injected")
        return await generate(prefix, sampling)

    policy.generate = faulty  # type: ignore[method-assign]
    tree = asyncio.run(worker.grow(PROBLEM, 0))
    assert tree.branches[0].anchor == 2
    assert sum(not e["charged"] and e["kind"] != "ask" for e in tree.ledger) == 2
