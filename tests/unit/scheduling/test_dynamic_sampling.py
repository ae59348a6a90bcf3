"""Which inputs a step trains on, and how many tool calls its episodes may make."""

import asyncio

import pytest
from fakes import FakeTask, make_config, make_worker, planted

from elpo_ray.config.growth import DynamicSamplingConfig, GrowthConfig, GrowthRule
from elpo_ray.config.task import CountdownConfig
from elpo_ray.scheduling.dynamic_sampling import Grown, collect, has_contrast
from elpo_ray.tree import RolloutTree
from elpo_ray.types import EndReason, FinishReason, Score, Step, Turn

PROBLEM = FakeTask().train_problem(0)
ANSWER = Step(Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0))


# --- bounded tool calls ---


def test_an_episode_ends_when_its_tool_calls_are_used_up() -> None:
    growth = GrowthConfig(rule=GrowthRule.independent, n_total=2, max_tool_calls=[1, 3])
    config = make_config(growth, countdown=CountdownConfig(numbers=2))
    config.trainer.steps = 4
    worker = make_worker(planted(3, 4), config)
    for step, turns in ((0, 2), (1, 2), (2, 4), (3, 4)):
        tree = asyncio.run(worker.grow(PROBLEM, step))
        assert {len(tree.path(leaf.id)) for leaf in tree.leaves()} == {turns}
        ends = {leaf.end for leaf in tree.leaves()}
        assert ends == {EndReason.ANSWER if turns == 4 else EndReason.MAX_TURNS}


@pytest.mark.parametrize(
    ("limits", "numbers", "turns"),
    [
        ([], 5, [9, 9, 9, 9, 9, 9]),
        ([1], 2, [2, 2, 2, 2, 2, 2]),
        ([1], 5, [5, 5, 5, 5, 5, 5]),
        ([2, 4, 8], 2, [3, 3, 5, 5, 9, 9]),
        ([2, 4, 80], 5, [5, 5, 5, 5, 9, 9]),
    ],
)
def test_turns_by_stage_never_fewer_than_the_task_needs(
    limits: list[int], numbers: int, turns: list[int]
) -> None:
    """N numbers need N - 1 tool calls; task.max_turns=9 bounds from above."""
    growth = GrowthConfig(max_tool_calls=limits)
    config = make_config(growth, max_turns=9, countdown=CountdownConfig(numbers=numbers))
    config.trainer.steps = 6
    assert [config.train_turns(step) for step in range(6)] == turns


# --- dynamic sampling ---


def grown(index: int, outcomes: str) -> Grown:
    tree = RolloutTree(f"p{index}", len(outcomes))
    for outcome in outcomes:
        reward = Score(0.25 * index, outcome == "1", graded=outcome != "?")
        tree.add_trajectory(0, [ANSWER], reward)
    return FakeTask().train_problem(index), tree


def stream(outcomes: list[str], asked: list[tuple[int, int]]) -> object:
    def grow(first: int, count: int) -> list[Grown]:
        asked.append((first, count))
        return [grown(first + i, outcomes[first + i]) for i in range(count)]

    return grow


@pytest.mark.parametrize(("outcomes", "kept"), [("01", True), ("00", False), ("11", False)])
def test_success_and_not_reward_is_the_contrast(outcomes: str, kept: bool) -> None:
    assert has_contrast(grown(1, outcomes)[1]) == kept
    assert not has_contrast(grown(1, "0?")[1])


def test_inputs_are_replaced_until_enough_have_contrast() -> None:
    outcomes, asked = ["00", "01", "11", "00", "10", "01", "01", "01"], []
    cfg = DynamicSamplingConfig(max_batches=10, batch_factor=2)
    batch = collect(stream(outcomes, asked), 2, cfg)  # type: ignore[arg-type]
    assert asked == [(0, 4), (4, 4)]
    assert [tree.task_id for tree in batch.trained] == ["p1", "p4"]
    assert [problem.id for problem in batch.inputs] == [f"p{i}" for i in range(8)]
    assert sum(len(tree.leaves()) for tree in batch.trees) == 16  # all of it is charged


def test_at_the_last_batch_what_was_kept_is_trained_on() -> None:
    outcomes, asked = ["00", "01", "11", "00", "01", "01"], []
    batch = collect(stream(outcomes, asked), 2, DynamicSamplingConfig(max_batches=2))  # type: ignore[arg-type]
    assert asked == [(0, 2), (2, 2)]
    assert [tree.task_id for tree in batch.trained] == ["p1"]


def test_without_the_filter_every_input_is_trained_on() -> None:
    asked: list[tuple[int, int]] = []
    batch = collect(stream(["00", "11"], asked), 2, DynamicSamplingConfig())  # type: ignore[arg-type]
    assert asked == [(0, 2)] and batch.trained == batch.trees
