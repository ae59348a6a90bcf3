"""The analyses on scripted policies whose critical step is planted, and their sums by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes import (
    TURN,
    FakeTask,
    ScriptedPolicy,
    Word,
    bel,
    decode,
    encode,
    make_config,
    make_worker,
    planted,
)

from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.growth import GrowthConfig, GrowthRule, PosteriorConfig, Prior
from elpo_ray.config.measure import AnalysisName, AnalyzeConfig
from elpo_ray.evaluation.analysis import localization, ranking, recovery
from elpo_ray.evaluation.analysis.catalog import AnalyzeJob, Record
from elpo_ray.interfaces import Tools
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.tree import RolloutTree
from elpo_ray.types import UNGRADED, FinishReason, Problem, Sampling, Score, Step, Turn

TOOL_STEPS = 4


def settings(name: AnalysisName, **changes: Any) -> AnalyzeConfig:
    return AnalyzeConfig(model="m", tasks=["t"], analysis=name, **changes)


async def examine(worker: RolloutWorker, config: AnalyzeConfig) -> list[Record]:
    job = AnalyzeJob(problem=worker.task.train_problem(0), config=config)
    return await job.run(worker, lambda done: None)


@pytest.mark.parametrize("critical", range(1, TOOL_STEPS + 2))
async def test_sure_probes_always_agree_and_are_right(critical: int) -> None:
    worker = make_worker(planted(TOOL_STEPS, critical))
    config = settings(AnalysisName.localization, rollouts=2, failures=1, xs=[1, 3], repeats=2)
    records = await examine(worker, config)
    assert [(r["x"], r["repeat"]) for r in records] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert {record["named"] for record in records} == {record["truth"] for record in records}
    assert records[0]["truth"] == critical
    rows = localization.summarize(records)
    assert [row["success rate"] for row in rows] == ["all", "all", "0", "0"]
    for row in rows:
        assert (row["agree"], row["right"], row["steps apart"]) == (1.0, 1.0, 0.0)
        assert row["false irrecoverable"] in (0.0, None)


@pytest.mark.parametrize("critical", range(1, TOOL_STEPS + 2))
async def test_searches_by_evidence_are_analyzed_too(critical: int) -> None:
    belief = PosteriorConfig(prior=Prior.uniform, beta=(50.0, 0.5), max_probes=9)
    algorithm = AlgorithmConfig(growth=GrowthConfig(rule=GrowthRule.posterior, posterior=belief))
    worker = make_worker(planted(TOOL_STEPS, critical))
    config = settings(
        AnalysisName.localization, rollouts=1, failures=1, xs=[1, 3], repeats=2, algorithm=algorithm
    )
    records = await examine(worker, config)
    assert [(r["x"], r["repeat"]) for r in records] == [(1, 0), (1, 1)]
    assert {record["named"] for record in records} == {critical}
    assert localization.summarize(records)[0]["right"] == 1.0


async def test_a_budget_caps_what_a_search_may_spend() -> None:
    worker = make_worker(planted(TOOL_STEPS, 2))
    config = settings(
        AnalysisName.localization, rollouts=1, failures=1, xs=[2], repeats=1, budgets=[1, 3]
    )
    records = await examine(worker, config)
    assert [(r["budget"], r["spent"], r["named"]) for r in records] == [(1, 1, None), (3, 3, 2)]
    cut, enough = (row for row in localization.summarize(records) if row["success rate"] == "all")
    assert (cut["named"], cut["agree"], cut["right"]) == (0.0, None, None)
    assert (enough["named"], enough["agree"], enough["right"]) == (1.0, None, 1.0)


def search_record(**changes: Any) -> dict[str, Any]:
    record = {
        "problem": "p", "trajectory": 1, "success_rate": 0.3, "tool_steps": 3, "truth": 3, "x": 2,
        "budget": None, "repeat": 0, "named": 3, "spent": 4, "probes": [[2, 2, 1], [3, 2, 0]],
    }  # fmt: skip
    return record | changes


def test_consistency_and_accuracy_by_hand() -> None:
    records = [
        search_record(),
        search_record(repeat=1, named=1, probes=[[2, 2, 0], [1, 2, 0]]),
        search_record(repeat=2, named=None, probes=[[2, 1, 0]]),
    ]
    [row, binned] = localization.summarize(records)
    assert binned["success rate"] == "0.25–0.5"
    assert row["named"] == pytest.approx(2 / 3)
    assert (row["agree"], row["steps apart"], row["right"]) == (0.0, 2.0, 0.5)
    # complete probes of anchors before step 3: [2: 1 success], [2: none], [1: none]
    assert row["false irrecoverable"] == pytest.approx(2 / 3)
    assert localization.success_by_anchor(records) == {0: 0.3, 1: 0.0, 2: 0.2}
    blind = [record | {"truth": None} for record in records]
    assert localization.summarize(blind)[0]["right"] is None
    assert localization.success_by_anchor(blind) == {}


async def test_editing_the_critical_step_recovers_and_editing_a_later_one_does_not() -> None:
    worker = make_worker(planted(TOOL_STEPS, 2))
    config = settings(AnalysisName.recovery, rollouts=1, failures=1, completions=3)
    records = await examine(worker, config)
    found = {record["kind"]: record for record in records}
    assert set(found) == set(recovery.KINDS)
    assert [found[kind]["step"] for kind in recovery.IRRECOVERABLE] == [2, 3, 4]
    first = found["1st irrecoverable"]
    assert (first["completions"], first["successes"], first["sound"]) == (3, 3, True)
    assert found["first error"]["step"] == 2
    for kind in recovery.IRRECOVERABLE[1:]:
        assert (found[kind]["successes"], found[kind]["sound"]) == (0, False)
    rows = {row["edited step"]: row for row in recovery.summarize(records)}
    assert list(rows) == list(recovery.KINDS)
    assert rows["1st irrecoverable"]["recovered"] == 1.0
    assert rows["1st irrecoverable"]["recovered after sound edits"] == 1.0
    assert rows["2nd irrecoverable"]["recovered after sound edits"] is None


async def test_only_problems_that_no_attempt_solves_are_examined() -> None:
    def plan(number: int, before: list[str]) -> list[Word]:
        words = ["g", "b", "g", "=ok"] if number < 3 else ["g", "g", "g", "=ok"]
        return words[len(before) :]  # type: ignore[return-value]

    lost = settings(AnalysisName.recovery, rollouts=3, failures=1, completions=2)
    assert await examine(make_worker(plan), lost)
    assert not await examine(make_worker(plan), replace(lost, rollouts=4))


async def test_a_step_that_the_policy_always_takes_is_not_edited() -> None:
    worker = make_worker(planted(TOOL_STEPS, 2))
    always = SameWords(lambda seed, before: (["g", "b", "g", "=ok"])[len(before) :])
    worker.agent = replace(worker.agent, policy=always)
    config = settings(AnalysisName.recovery, rollouts=1, failures=1, completions=3)
    records = await examine(worker, config)
    assert {record["completions"] for record in records} == {0}
    assert not recovery.summarize(records)


def test_recovery_by_hand() -> None:
    def record(successes: int, sound: bool | None, completions: int = 4) -> Record:
        return {
            "kind": "first error", "step": 2, "completions": completions,
            "successes": successes, "sound": sound,
        }  # fmt: skip

    [row] = recovery.summarize(
        [record(4, True), record(1, True), record(0, True), record(0, False), record(0, None, 0)]
    )
    assert (row["trajectories"], row["no other step"], row["sound edits"]) == (4, 1, 3)
    assert row["recovered"] == 0.5 and row["recovered after sound edits"] == pytest.approx(2 / 3)
    assert row["completions that succeed"] == pytest.approx(5 / 16)
    assert row["standard error"] == pytest.approx((1 / 12) ** 0.5)


class Blind(FakeTask):
    """Knows who succeeded, not who still can."""

    async def score(self, problem: Problem, steps: Sequence[Step], tools: Tools) -> Score:
        return await FakeTask().score(problem, steps, tools)

    def recoverable(self, problem: Problem, steps: Sequence[Step]) -> None:  # type: ignore[override]
        return None


async def test_without_an_oracle_a_search_with_large_probes_finds_the_step() -> None:
    worker = make_worker(planted(TOOL_STEPS, 3))
    worker.task = Blind()
    config = settings(AnalysisName.recovery, rollouts=1, failures=1, completions=2, scan=2)
    records = await examine(worker, config)
    steps = {record["kind"]: record["step"] for record in records}
    assert steps["1st irrecoverable"] == 3
    assert all(record["sound"] is None for record in records)


async def test_siblings_are_ranked_against_fresh_completions() -> None:
    def plan(number: int, before: list[str]) -> list[Word]:
        """Trajectories from the prompt go wrong in step 2; what follows a prefix does not."""
        words = ["g", "b" if not before else "g", "g", "=ok"]
        return words[len(before) :]  # type: ignore[return-value]

    algorithm = AlgorithmConfig(growth=bel(n_total=6))
    worker = make_worker(plan, make_config(algorithm.growth))
    config = settings(AnalysisName.ranking, algorithm=algorithm, fresh=2)
    records = await examine(worker, config)
    inside = [record for record in records if record["depth"] > 0]
    ordered = [ranking.pairwise(r["scores"], r["means"]) for r in inside]
    assert 1.0 in ordered and set(ordered) <= {1.0, None}
    rows = {row["branching"]: row for row in ranking.summarize(records)}
    assert rows["inside"]["pairwise accuracy"] == 1.0 and rows["inside"]["Kendall τ"] == 1.0


class SameWords(ScriptedPolicy):
    """All of its turns say that they are of completion 0, so that equal words are equal tokens. The
    plan gets the seed instead of the completion's number."""

    async def generate(self, prefix: Sequence[int], sampling: Sampling) -> Turn:
        before = [match[1] for match in TURN.finditer(decode(prefix))]
        ids = tuple(encode(f"{self._plan(sampling.seed or 0, before)[0]}~0;"))
        zeros = (0.0,) * len(ids)
        return Turn(ids, zeros, zeros, FinishReason.STOP, weight_version=0)


async def test_identical_siblings_are_one_sibling() -> None:
    """Every trajectory begins with one of two words, which decides about success: of six children
    of the prompt there are two to rank, where fifteen pairs would be mostly of equal ones."""

    def plan(seed: int, before: list[str]) -> list[Word]:
        if not before:
            return ["gb"[seed % 2]]
        return ["=ok"]

    algorithm = AlgorithmConfig(growth=GrowthConfig(rule=GrowthRule.independent, n_total=6))
    worker = make_worker(plan, make_config(algorithm.growth))
    worker.agent = replace(worker.agent, policy=SameWords(plan))
    config = settings(AnalysisName.ranking, algorithm=algorithm, fresh=2)
    [record] = await examine(worker, config)
    assert record["depth"] == 0
    assert sorted(zip(record["means"], record["scores"], strict=True)) == [
        (0.0, pytest.approx(min(record["scores"]))),
        (1.0, pytest.approx(max(record["scores"]))),
    ]
    assert ranking.pairwise(record["scores"], record["means"]) == 1.0


def test_a_sibling_without_a_verdict_is_no_sibling() -> None:
    tree = RolloutTree("t", 4)
    for verdict in (True, False, None, None):
        turn = Turn((7 + (verdict is None),), (0.0,), (0.0,), FinishReason.STOP, 0)
        score = UNGRADED if verdict is None else Score(float(verdict), verdict)
        tree.add_trajectory(0, [Step(turn)], score)
    assert ranking.siblings(tree, 0) == [[1, 2]]


def test_pairwise_accuracy_and_tau_by_hand() -> None:
    assert ranking.pairwise([1, 2, 3], [0.1, 0.2, 0.3]) == 1.0
    assert ranking.pairwise([3, 2, 1], [0.1, 0.2, 0.2]) == 0.0
    assert ranking.pairwise([1, 1, 2], [0.1, 0.2, 0.3]) == pytest.approx(2.5 / 3)
    assert ranking.pairwise([1, 2], [0.5, 0.5]) is None
    assert ranking.kendall([1, 2, 3], [0.1, 0.3, 0.2]) == pytest.approx(1 / 3)
    assert ranking.kendall([1, 1], [0.1, 0.3]) == 0.0
    assert ranking.kendall([1, 2], [0.5, 0.5]) is None
