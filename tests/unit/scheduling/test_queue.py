"""Inputs pulled by workers, journals, deaths: every tree whole, every spend once."""

import asyncio
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from fakes import FakeTask, FakeTools, Word, bel, completion_of, make_config, make_worker, planted
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_ray.config import Config
from elpo_ray.config.growth import EntropyBranchConfig, GrowthConfig, GrowthRule, RandomBranchConfig
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.config.schedule import BudgetConfig, BudgetScope
from elpo_ray.credit import assign
from elpo_ray.forest.trees import pack
from elpo_ray.growth.budget import Totals, can_teach
from elpo_ray.rollout.journal import Completion, TreeEnd, assemble
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.scheduling.batches import Batch, GrowBatch, JobBatch
from elpo_ray.scheduling.jobs import GrowJob, Job, OnComplete, Report, SetAside, WorkerUnusable
from elpo_ray.scheduling.queue import InputQueue
from elpo_ray.scheduling.runner import JobRunner
from elpo_ray.scheduling.shared_budget import SharedBudget
from elpo_ray.tree import RolloutTree
from elpo_ray.types import InfrastructureError, Problem, Score

TASK = FakeTask()
PROBLEM = TASK.train_problem(0)


def jobs(count: int, budget: int = 16, kind: type[GrowJob] = GrowJob) -> list[GrowJob]:
    return [
        kind(problem=TASK.train_problem(i), width=3, step=0, budget=budget) for i in range(count)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo(Job[str]):
    """Returns its problem's name, or raises `error`."""

    error: Exception | None = None

    async def run(self, worker: RolloutWorker, on_complete: OnComplete) -> str:
        if self.error is not None:
            raise self.error
        return self.problem.id


def by_seed(draw: int) -> Callable[[int, list[str]], Sequence[Word]]:
    """A policy whose answers depend only on `draw` and how many words came before."""

    def plan(number: int, before: list[str]) -> list[Word]:
        rng = random.Random(f"{draw} {number}")
        words = [(rng.choice("gb"), rng.random()) for _ in range(rng.randint(0, 4))]
        return [*words, (rng.choice(["=ok", "=no"]), 0.0)]

    return plan


# --- journals ---


def recorded(config: Config, plan: Any, budget: int) -> tuple[RolloutTree, list[Completion]]:
    journal: list[Completion] = []
    worker = make_worker(plan, config)
    tree = asyncio.run(worker.grow(PROBLEM, 0, budget, on_complete=journal.append))
    return tree, journal


def outline(tree: RolloutTree) -> Any:
    return (
        [(node.parent, node.score, node.end, node.group) for node in tree.nodes],
        [node.step.turn.token_ids for node in tree.nodes if node.step],
        tree.localizations,
        tree.budget,
    )


RULES = [
    bel(16),
    bel(16, use_tree=True, early_stop=True),
    GrowthConfig(rule=GrowthRule.posterior),
    GrowthConfig(rule=GrowthRule.independent, n_total=16),
    GrowthConfig(rule=GrowthRule.entropy_branch, entropy=EntropyBranchConfig(initial=2)),
    GrowthConfig(rule=GrowthRule.random_branch, random=RandomBranchConfig(trees=2, rounds=2)),
]


@pytest.mark.parametrize("growth", RULES, ids=lambda growth: growth.rule.value)
@settings(max_examples=15, deadline=None)
@given(draw=st.integers(0, 2**32), kept=st.integers(0, 16))
def test_growth_is_taken_up_from_any_prefix_of_its_journal(
    growth: GrowthConfig, draw: int, kept: int
) -> None:
    config = make_config(growth)
    whole, journal = recorded(config, by_seed(draw), 16)
    assert outline(assemble(PROBLEM, 16, journal, TreeEnd.of(whole))) == outline(whole)
    worker, again = make_worker(by_seed(draw + 1), config, first=100), []
    tree = asyncio.run(worker.grow(PROBLEM, 0, 16, journal[:kept], again.append))
    assert len(tree.leaves()) == tree.budget == 16 == Totals.of(tree.ledger).rollouts
    assert worker.counters.completed == 16 - kept == len(again)
    numbers = [done.number for done in [*journal[:kept], *again]]
    assert sorted(numbers) == list(range(16))
    if kept == 16:
        assert outline(tree) == outline(whole)


@pytest.mark.parametrize(
    "growth",
    [bel(16), bel(16, use_tree=True, early_stop=True), GrowthConfig(rule=GrowthRule.posterior)],
    ids=["bel", "bel with its options", "posterior"],
)
@settings(max_examples=15, deadline=None)
@given(draw=st.integers(0, 2**32), less=st.integers(2, 15))
def test_a_larger_budget_goes_on_where_the_smaller_one_ended(
    growth: GrowthConfig, draw: int, less: int
) -> None:
    shared = BudgetConfig(scope=BudgetScope.batch, min=16)
    config = replace(make_config(growth), budget=shared)
    small, journal = recorded(config, by_seed(draw), less)
    assert small.budget == less
    worker = make_worker(by_seed(draw), config, first=100)
    tree = asyncio.run(worker.grow(PROBLEM, 0, 16, journal))
    assert worker.counters.completed == 16 - less and len(tree.leaves()) == 16
    assert [n.parent for n in tree.nodes[: len(small.nodes)]] == [n.parent for n in small.nodes]
    # a probe cut short that succeeded is now sampled to its end: the verdict stays
    named = {(found.leaf, found.critical) for found in small.localizations if found.confirmed}
    assert named <= {(f.leaf, f.critical) for f in tree.localizations if f.confirmed}


@pytest.mark.parametrize("protocol", [2, 5])
def test_completions_travel_whole(protocol: int) -> None:
    _, journal = recorded(make_config(bel(16)), planted(4, 2), 16)
    assert pickle.loads(pickle.dumps(journal, protocol)) == journal


# --- a queue and its workers ---


class Site:
    """Workers over fakes, driven round by round; they can be killed between two rounds."""

    def __init__(self, queue: InputQueue, config: Config, count: int, capacity: int = 64) -> None:
        self.queue, self.config, self.capacity = queue, config, capacity
        self.plan = planted(4, 2)
        self.runners: dict[int, JobRunner] = {}
        self.workers: list[RolloutWorker] = []
        self.given: dict[int, list[str]] = {}
        for number in range(count):
            self.begin(number)

    def begin(self, number: int) -> None:
        worker = make_worker(self.plan, self.config, first=1000 * len(self.workers))
        self.workers.append(worker)
        self.runners[number] = JobRunner(worker, self.capacity, lambda: None)
        self.queue.join(number)
        self.room = {n: self.capacity for n in self.runners}

    async def round(self, number: int) -> Report:
        taken = self.queue.give(number, self.room[number])
        self.given.setdefault(number, []).extend(job.problem.id for job in taken.values())
        report = await self.runners[number].exchange(taken, 0.001)
        self.room[number] = report.room
        self.queue.take(number, report)
        return report

    def kill(self, number: int, why: str = "killed") -> None:
        """Reports under way are lost with it."""
        for _, task in self.runners.pop(number)._running.values():
            task.cancel()
        self.queue.lost(number, why)


async def finish(site: Site, batch: Batch[Any]) -> dict[int, Any]:
    waiting = asyncio.ensure_future(asyncio.to_thread(lambda: dict(batch.results())))
    while not waiting.done():
        for number in list(site.runners):
            await site.round(number)
    return await waiting


async def test_workers_share_the_inputs_and_every_tree_comes_back_whole() -> None:
    queue = InputQueue()
    site, batch = Site(queue, make_config(), 2, capacity=12), GrowBatch(jobs(20))
    queue.submit(batch)
    trees = await finish(site, batch)
    assert [trees[i].task_id for i in range(20)] == [f"p{i}" for i in range(20)]
    for tree in trees.values():
        assert len(tree.leaves()) == tree.budget == 16 == Totals.of(tree.ledger).rollouts
        assert tree.localizations and tree.messages
    assert batch.completed == 20 * 16
    assert min(len(ids) for ids in site.given.values()) >= 8
    assert queue.pending() == {0: 0, 1: 0}


async def test_a_worker_takes_no_more_than_fits_and_no_more_than_its_share() -> None:
    queue = InputQueue()
    for number in (0, 1):
        queue.join(number)
    queue.submit(GrowBatch(jobs(8)))
    assert len(queue.give(0, 7)) == 2
    assert len(queue.give(0, 100)) == 2
    assert len(queue.give(1, 0)) == 1  # at least one, whatever its width
    assert len(queue.give(1, 100)) == 3


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), kills=st.integers(0, 6))
def test_deaths_repeat_only_what_was_unfinished(seed: int, kills: int) -> None:
    async def run() -> tuple[dict[int, Any], Site]:
        draw, queue = random.Random(seed), InputQueue()
        site, batch = Site(queue, make_config(), 2), GrowBatch(jobs(5))
        queue.submit(batch)
        for _ in range(kills):
            for _ in range(draw.randint(2, 8)):
                await site.round(draw.choice([0, 1]))
            victim = draw.choice([0, 1])
            site.kill(victim)
            site.begin(victim)
        return await finish(site, batch), site

    trees, site = asyncio.run(run())
    for tree in trees.values():
        if isinstance(tree, SetAside):  # its worker was killed twice while it ran alone
            continue
        assert len(tree.leaves()) == tree.budget == 16 == Totals.of(tree.ledger).rollouts
        numbers = [completion_of(leaf.step) for leaf in tree.leaves() if leaf.step]
        assert len(numbers) == 16
    if not kills:
        assert sum(worker.counters.completed for worker in site.workers) == 5 * 16


async def test_an_input_that_kills_its_worker_is_set_aside_and_the_others_are_not() -> None:
    queue, deaths, begun = InputQueue(), 0, asyncio.Event()

    class Poisoned(GrowJob):
        async def run(self, worker: RolloutWorker, on_complete: OnComplete) -> TreeEnd:
            if self.problem.id == "p3":
                begun.set()
                await asyncio.sleep(60)
            return await GrowJob.run(self, worker, on_complete)

    batch = GrowBatch(jobs(6, kind=Poisoned))
    site = Site(queue, make_config(), 1)
    queue.submit(batch)
    waiting = asyncio.ensure_future(asyncio.to_thread(lambda: dict(batch.results())))
    while not waiting.done():
        await site.round(0)
        if begun.is_set():
            begun.clear()
            site.kill(0, "out of memory")
            deaths += 1
            site.begin(0)
    trees = await waiting
    assert 2 <= deaths <= 4  # at most two among others, two alone
    poisoned = trees.pop(3)
    assert isinstance(poisoned, SetAside) and "out of memory" in poisoned.why
    assert all(len(tree.leaves()) == 16 for tree in trees.values())
    assert queue.set_aside == 1


async def test_three_deaths_by_chance_set_nothing_aside() -> None:
    """Two among others and one alone may be chance: without a further death all is completed."""
    queue, batch = InputQueue(), GrowBatch(jobs(3))
    site = Site(queue, make_config(), 1)
    queue.submit(batch)
    for _ in range(3):
        site.queue.give(0, 64)
        site.kill(0)
        site.begin(0)
    trees = await finish(site, batch)
    assert all(len(tree.leaves()) == 16 for tree in trees.values()) and queue.set_aside == 0


async def test_progress_between_two_deaths_clears_an_input() -> None:
    queue, budget = InputQueue(), 160  # so many that each life leaves some to the next one
    site = Site(queue, make_config(bel(budget)), 1)
    batch = GrowBatch(jobs(1, budget))
    queue.submit(batch)
    for _ in range(3):
        while not (report := await site.round(0)).completions:
            pass
        assert not report.finished
        site.kill(0)
        site.begin(0)
    assert (await finish(site, batch))[0].budget == budget


async def test_an_input_lost_to_the_infrastructure_twice_is_set_aside() -> None:
    queue, lost = InputQueue(), InfrastructureError("no sandbox")
    site, batch = Site(queue, make_config(), 1), JobBatch([Echo(problem=PROBLEM, error=lost)])
    queue.submit(batch)
    assert "no sandbox" in (await finish(site, batch))[0].why


async def test_a_bug_is_raised_where_the_batch_is_waited_for() -> None:
    queue, bug = InputQueue(), KeyError("bug")
    site, batch = Site(queue, make_config(), 1), JobBatch([Echo(problem=PROBLEM, error=bug)])
    queue.submit(batch)
    with pytest.raises(KeyError, match="bug"):
        await finish(site, batch)


def test_after_the_end_no_batch_is_waited_for() -> None:
    queue, batch = InputQueue(), GrowBatch(jobs(2))
    queue.stop(RuntimeError("all workers are gone"))
    queue.submit(batch)
    with pytest.raises(RuntimeError, match="gone"):
        dict(batch.results())


async def test_a_worker_that_loses_too_much_is_unusable() -> None:
    def check() -> None:
        raise InfrastructureError("all calls are lost")

    runner = JobRunner(make_worker(planted(1, 1)), 8, check)
    await runner.exchange({}, 1.0)
    report = await runner.exchange({0: jobs(1)[0]}, 5.0)
    assert isinstance(report.failed[0][1], WorkerUnusable)


async def test_evaluations_go_before_trees_that_wait() -> None:
    queue = InputQueue()
    queue.join(0)
    queue.submit(GrowBatch(jobs(2)))
    queue.submit(JobBatch([Echo(problem=TASK.train_problem(9))]), first=True)
    (job,) = queue.give(0, 1).values()
    assert job.problem.id == "p9"


async def test_a_withdrawn_batch_is_forgotten() -> None:
    queue = InputQueue()
    site, batch = Site(queue, make_config(), 1), GrowBatch(jobs(3))
    queue.submit(batch)
    await site.round(0)
    queue.withdraw(batch)
    other = GrowBatch(jobs(1))
    queue.submit(other)
    assert len(await finish(site, other)) == 1 and queue.pending() == {0: 0}


# --- one budget for the batch ---


def test_who_can_still_teach() -> None:
    won, lost = Score(1.0, True), Score(-1.0, False)
    tree = asyncio.run(make_worker(planted(4, 2)).grow(PROBLEM, 0))
    confirmed = [found for found in tree.localizations if found.confirmed]
    open_search = [f for f in tree.localizations if not f.confirmed]
    assert not can_teach([won, won], [])
    assert can_teach([lost, lost], []) and can_teach([lost, lost], confirmed)
    assert can_teach([won, lost], []) and can_teach([won, lost], open_search)
    assert not can_teach([won, lost], confirmed)


@given(
    n_total=st.integers(2, 16),
    ends=st.lists(st.tuples(st.integers(2, 40), st.booleans()), min_size=1, max_size=20),
)
def test_a_shared_budget_is_never_exceeded(n_total: int, ends: list[tuple[int, bool]]) -> None:
    shared = SharedBudget(n_total, 2 * n_total)
    spent, todo = {}, list(range(len(ends)))
    while todo:
        index = todo.pop()
        wants, wants_more = ends[index]
        spent[index] = min(max(wants, spent.get(index, 0)), shared.total_of(index))
        todo += shared.settle(index, spent[index], wants_more)
        assert shared.total_of(index) <= 2 * n_total
    assert sum(spent.values()) + shared.left == n_total * len(ends)


async def test_a_batch_hands_rollouts_from_solved_inputs_to_open_ones() -> None:
    def plan(number: int, before: list[str]) -> list[Word]:
        return ["g", "=ok"]

    config = make_config(bel(8))
    config.budget = BudgetConfig(scope=BudgetScope.batch)
    queue = InputQueue()
    site = Site(queue, config, 1)
    easy, hard = make_worker(plan, config), make_worker(planted(12, 11), config)

    class Both(RolloutWorker):
        async def grow(self, problem: Problem, *args: Any, **kwargs: Any) -> RolloutTree:  # type: ignore[override]
            worker = easy if int(problem.id[1:]) % 2 else hard
            return await worker.grow(problem, *args, **kwargs)

    both = Both(easy.agent.policy, FakeTools(), easy.agent.chat, TASK, easy.settings)
    site.runners[0].worker = both
    batch = GrowBatch(jobs(6, budget=8), SharedBudget(8, 16))
    queue.submit(batch)
    trees = await finish(site, batch)
    solved = [trees[i].budget for i in (1, 3, 5)]
    opened = [trees[i].budget for i in (0, 2, 4)]
    assert solved == [6, 6, 6] and sum(opened) == 3 * 8 + 6
    check_credit([trees[i] for i in range(6)], config)
    for tree in trees.values():
        assert len(tree.leaves()) == tree.budget == Totals.of(tree.ledger).rollouts


def check_credit(trees: list[RolloutTree], config: Config) -> None:
    """Trees of unequal size: every leaf of a mini-batch weighs alike (Eq. 1), nothing is lost."""
    learner = LearnerConfig(minibatch_inputs=6)
    forest = pack(trees, assign(trees, config.algorithm), config.loss, learner)
    (batch,) = forest.minibatches
    assert [len(tree.leaf_weight) for tree in batch] == [tree.budget for tree in trees]
    assert sum(tree.token_weight.sum() for tree in batch) == pytest.approx(1.0)
    for packed, tree in zip(batch, trees, strict=True):
        mixed = len({leaf.score.success for leaf in tree.leaves() if leaf.score}) == 2
        assert bool((packed.advantage != 0).any()) == mixed
