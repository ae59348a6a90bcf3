"""The rollout worker: many trees at once, retries, seeds, evaluation, localization accuracy."""

import asyncio
from collections.abc import Sequence

import pytest
from fakes import (
    FakeTask,
    FakeTools,
    Faults,
    Word,
    bel,
    completion_of,
    make_config,
    make_worker,
    planted,
)

from elpo_ray.config import Config
from elpo_ray.config.growth import GrowthConfig, GrowthRule
from elpo_ray.config.rollout import SamplingConfig
from elpo_ray.config.run import TrainerConfig
from elpo_ray.evaluation.oracle import first_irrecoverable, localization_accuracy
from elpo_ray.tree import RolloutTree
from elpo_ray.types import (
    UNGRADED,
    EndReason,
    InfrastructureError,
    Problem,
    Step,
    ToolsLost,
)

TASK = FakeTask()
PROBLEM = TASK.train_problem(0)
INDEPENDENT = GrowthConfig(rule=GrowthRule.independent, n_total=8)


def spends(tree: RolloutTree) -> list[tuple[int, int, bool]]:
    """(anchor or 0, steps of the whole trajectory, success) of every leaf, sorted."""
    leaves = [(entry, tree.nodes[entry["leaf"]]) for entry in tree.ledger if entry["charged"]]
    return sorted(
        (entry["anchor"] or 0, len(tree.path(leaf.id)), leaf.score.success)
        for entry, leaf in leaves
        if leaf.score is not None
    )


async def test_many_trees_grow_at_once_and_do_not_mix() -> None:
    tools = FakeTools()
    worker = make_worker(planted(4, 2), tools=tools)
    problems = [TASK.train_problem(i) for i in range(20)]
    trees = await asyncio.gather(*(worker.grow(problem, 0) for problem in problems))
    for problem, tree in zip(problems, trees, strict=True):
        prompt = worker.agent.chat.prompt_ids(problem.messages)
        assert tree.task_id == problem.id and list(tree.prompt_ids) == prompt
        assert len(tree.leaves()) == tree.budget == 16
    numbers = [completion_of(leaf.step) for tree in trees for leaf in tree.leaves() if leaf.step]
    assert sorted(numbers) == list(range(20 * 16))
    assert worker.counters.completed == 20 * 16 and tools.live == 0


def test_probes_hang_below_their_anchor_beside_the_searched_trajectory() -> None:
    tree = asyncio.run(make_worker(planted(4, 2), make_config(bel(4, b_max=1))).grow(PROBLEM, 0))
    found = tree.localizations[0]
    path = tree.path(found.leaf)
    for entry in tree.ledger:
        if entry["anchor"] is not None:
            assert tree.path(entry["leaf"])[: entry["anchor"]] == path[: entry["anchor"]]
            assert entry["leaf"] != found.leaf
    assert len(tree.nodes[path[found.probes[0].anchor - 1]].children) > 1
    assert tree.nodes[found.leaf].end is EndReason.ANSWER


def test_independent_growth_branches_only_at_the_prompt() -> None:
    tree = asyncio.run(make_worker(planted(4, 2), make_config(INDEPENDENT)).grow(PROBLEM, 0))
    assert len(tree.nodes[0].children) == 8 and tree.localizations == []
    assert all(len(node.children) <= 1 for node in tree.nodes[1:])


def test_infrastructure_failures_never_show_in_the_tree() -> None:
    pattern = [False, False, True, False, False, False, True, True]
    sound = asyncio.run(make_worker(planted(4, 2)).grow(PROBLEM, 0))
    tools = FakeTools(faults=Faults(pattern))
    config = make_config(retries=10)
    worker = make_worker(planted(4, 2), config, policy_faults=pattern, tools=tools)
    struck = asyncio.run(worker.grow(PROBLEM, 0))
    assert sum(not entry["charged"] for entry in struck.ledger) >= 4
    assert spends(struck) == spends(sound) and len(spends(sound)) == 16


def test_completion_that_is_lost_too_often_raises_and_closes_everything() -> None:
    tools = FakeTools(faults=Faults([False] * 3 + [True] * 100))
    worker = make_worker(planted(4, 2), make_config(INDEPENDENT, retries=1), tools=tools)
    with pytest.raises(InfrastructureError, match="injected"):
        asyncio.run(worker.grow(PROBLEM, 0))
    assert tools.live == 0


def test_a_trajectory_whose_sandbox_failed_for_good_is_masked_and_charged() -> None:
    lost = [False] * 20 + [True, False, True]  # opening is a call too
    tools = FakeTools(faults=Faults(lost, ToolsLost))
    worker = make_worker(planted(4, 2), make_config(INDEPENDENT), tools=tools)
    tree = asyncio.run(worker.grow(PROBLEM, 0))
    masked = [leaf for leaf in tree.leaves() if leaf.end is EndReason.SANDBOX]
    assert len(masked) == 2 and len(tree.leaves()) == tree.budget
    assert all(leaf.score == UNGRADED and leaf.step and not leaf.step.result for leaf in masked)
    assert all(entry["charged"] for entry in tree.ledger)
    assert (tools.live, tools.trees) == (0, set())


def test_the_states_of_a_tree_are_released_also_when_it_fails() -> None:
    tools = FakeTools(faults=Faults([False] * 3 + [True] * 100))
    worker = make_worker(planted(4, 2), make_config(INDEPENDENT, retries=0), tools=tools)
    with pytest.raises(InfrastructureError):
        asyncio.run(worker.grow(PROBLEM, 0))
    assert tools.trees == set()


@pytest.mark.parametrize(("retries", "lost", "succeeds"), [(2, 2, True), (2, 3, False)])
def test_retries_are_counted_per_completion(retries: int, lost: int, succeeds: bool) -> None:
    tools = FakeTools(faults=Faults([True] * lost))
    worker = make_worker(planted(2, 3), make_config(retries=retries), tools=tools)
    if succeeds:
        assert not asyncio.run(worker.evaluate(PROBLEM)).success
    else:
        with pytest.raises(InfrastructureError):
            asyncio.run(worker.evaluate(PROBLEM))


def seeds(config: Config, problem: Problem = PROBLEM, step: int = 0) -> Sequence[int | None]:
    worker = make_worker(planted(4, 2), config)
    asyncio.run(worker.grow(problem, step))
    return worker.agent.policy.seeds  # type: ignore[attr-defined, no-any-return]


def test_every_turn_of_every_completion_has_its_own_reproducible_seed() -> None:
    config = make_config()
    first = seeds(config)
    assert len(set(first)) == len(first) > 16
    assert first == seeds(config)
    assert not set(first) & set(seeds(config, TASK.train_problem(1)))
    assert not set(first) & set(seeds(config, step=1))
    config.trainer = TrainerConfig(seed=1)
    assert not set(first) & set(seeds(config))


def test_lost_attempt_is_repeated_with_its_seed() -> None:
    """What the infrastructure destroys must not depend on what was sampled, or the sample would."""
    worker = make_worker(planted(2, 3), policy_faults=[False, True])
    asyncio.run(worker.evaluate(PROBLEM))
    first, second, *again = worker.agent.policy.seeds  # type: ignore[attr-defined]
    assert again[:2] == [first, second]


async def test_evaluations_of_one_problem_differ_in_seed_and_are_scored() -> None:
    def plan(number: int, before: list[str]) -> list[Word]:
        return ["g", "=ok" if number else "=no"]

    worker = make_worker(plan)
    scores = [await worker.evaluate(PROBLEM, i) for i in range(3)]
    assert [score.success for score in scores] == [False, True, True]
    assert [score.reward for score in scores] == [-1.1, 1.0, 1.0]
    assert len(set(worker.agent.policy.seeds)) == 6  # type: ignore[attr-defined]


def test_evaluation_samples_at_temperature_one_unless_asked_otherwise() -> None:
    config = make_config()
    config.sampling = SamplingConfig(temperature=0.3)
    worker = make_worker(planted(1, 1), config)
    taken: list[tuple[float, float]] = []
    generate = worker.agent.policy.generate

    async def watch(prefix, sampling):  # type: ignore[no-untyped-def]
        taken.append((sampling.temperature, sampling.top_p))
        return await generate(prefix, sampling)

    worker.agent.policy.generate = watch  # type: ignore[method-assign]
    asyncio.run(worker.evaluate(PROBLEM))
    asyncio.run(worker.evaluate(PROBLEM, 0, SamplingConfig(temperature=0.6, top_p=0.9)))
    asyncio.run(worker.grow(PROBLEM, 0))
    assert set(taken[:2]) == {(1.0, 1.0)} and set(taken[2:4]) == {(0.6, 0.9)}
    assert set(taken[4:]) == {(0.3, 1.0)}


def test_prompt_without_room_is_refused_before_anything_is_sampled() -> None:
    config = make_config(max_turn_tokens=8)
    config.model.max_context = 16
    worker = make_worker(planted(1, 1), config)
    problem = Problem("long", ({"role": "user", "content": "x" * 20},), None)
    with pytest.raises(ValueError, match=r"model\.max_context=16: problem 'long'"):
        asyncio.run(worker.grow(problem, 0))
    assert worker.agent.policy.seeds == []  # type: ignore[attr-defined]


def searched_path(*words: Word) -> list[Step]:
    tree = asyncio.run(
        make_worker(lambda number, before: words, make_config(INDEPENDENT)).grow(PROBLEM, 0)
    )
    return tree.steps(tree.leaves()[0].id)


@pytest.mark.parametrize(
    ("words", "critical"),
    [(("b", "g", "=ok"), 1), (("g", "b", "=ok"), 2), (("g", "g", "=no"), 3), (("=no",), 1)],
)
def test_oracle_names_the_first_irrecoverable_step(words: tuple[str, ...], critical: int) -> None:
    assert first_irrecoverable(TASK, PROBLEM, searched_path(*words)) == critical


def test_localization_accuracy_counts_confirmed_searches_only() -> None:
    tree = asyncio.run(make_worker(planted(4, 2), make_config(bel(16))).grow(PROBLEM, 0))
    confirmed = [found for found in tree.localizations if found.confirmed]
    assert len(confirmed) >= 2
    count = len(confirmed)
    assert localization_accuracy(TASK, [PROBLEM, PROBLEM], [tree, tree]) == (2 * count, 2 * count)
    confirmed[0].critical = tree.path(confirmed[0].leaf)[2]
    assert localization_accuracy(TASK, [PROBLEM], [tree]) == (count - 1, count)
    confirmed[1].confirmed = False
    assert localization_accuracy(TASK, [PROBLEM], [tree]) == (count - 2, count - 1)


def test_task_without_oracle_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = asyncio.run(make_worker(planted(4, 2)).grow(PROBLEM, 0))
    assert any(found.confirmed for found in tree.localizations)
    monkeypatch.setattr(FakeTask, "recoverable", lambda *_: None)
    assert localization_accuracy(TASK, [PROBLEM], [tree]) == (0, 0)
