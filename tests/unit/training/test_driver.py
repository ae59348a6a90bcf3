"""The loop of RL over a learner and rollout workers that write down what they are asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTask, sample_of
from rich.console import Console
from run_folders import grow

from elpo_ray.cluster.waits import LearnerLost
from elpo_ray.config import Config
from elpo_ray.config.growth import GrowthConfig, GrowthRule, PosteriorConfig
from elpo_ray.config.learner import LearnerConfig
from elpo_ray.config.model import ModelConfig
from elpo_ray.config.run import LoggingConfig, TrainerConfig, WandbMode
from elpo_ray.forest.trees import TrainForest
from elpo_ray.growth.recoverability import PivotFit
from elpo_ray.runs.folder import RunFolder, RunState, read_state
from elpo_ray.runs.metrics import Metrics
from elpo_ray.training.driver import Trainer
from elpo_ray.training.loop import nothing_left
from elpo_ray.types import Fault, Problem


class TaskWithoutOracle(FakeTask):
    def recoverable(self, *_: Any) -> Any:
        return None


class FakeLearner:
    """Its weights are the number of updates behind them; it fails at its `fails_at`-th update."""

    def __init__(self, fails_at: int = -1, error: BaseException | None = None) -> None:
        self.weights, self.updates, self.published = 0, 0, list[int]()
        self._fails_at, self._error = fails_at, error
        self._saving: tuple[Path, int] | None = None

    def connect(self, rollouts: Any) -> None: ...

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        yield

    def update(self, forest: TrainForest, advance: Callable[..., None]) -> dict[str, float]:
        assert self._saving is None, "a checkpoint is complete before the next update"
        self.updates += 1
        if self.updates == self._fails_at and self._error is not None:
            raise self._error
        self.weights += 1
        return {"loss": 0.5}

    def publish(self, version: int) -> None:
        assert version == self.weights
        self.published.append(version)

    def save(self, path: Path, *, background: bool = False) -> None:
        self._saving = path, self.weights
        if not background:
            self.finish_save()

    def finish_save(self) -> None:
        assert self._saving is not None
        path, weights = self._saving
        path.write_text(str(weights))
        self._saving = None

    def load(self, path: Path) -> None:
        self.weights = int(path.read_text())


class FakeRollouts:
    completed = 0

    def __init__(self, config: Config) -> None:
        self._config, self.inputs = config, list[str]()

    def grow(self, inputs: list[Problem], step: int, config: Any = None) -> list[Any]:
        self.inputs += [problem.id for problem in inputs]
        return [grow(int(problem.id[1:]), self._config, words=4) for problem in inputs]

    def evaluate(self, problems: Any, samples: int, advance: Any) -> list[Any]:
        return []  # nothing came to a verdict

    def describe(self) -> str:
        return ""

    def metrics(self) -> dict[str, float]:
        return {"faults/restarts": 0.0}

    def abandon(self) -> None: ...


class FakeGauges:
    def set(self, values: dict[str, float]) -> None: ...


def make_config(folder: Path, **trainer: Any) -> Config:
    return Config(
        model=ModelConfig(path="some/model"),
        learner=LearnerConfig(minibatch_inputs=2),
        trainer=TrainerConfig(
            steps=4, inputs_per_step=2, checkpoint_every=2, run_dir=str(folder), **trainer
        ),
        logging=LoggingConfig(wandb=WandbMode.disabled),
    )


def make_trainer(config: Config, *learners: FakeLearner) -> Trainer:
    """A trainer with the first of `learners`; the others replace it when it is lost."""
    run = RunFolder.of(config)
    run.begin(config)
    console, rest = Console(quiet=True), iter(learners)
    return Trainer(
        config=config,
        steps=config.trainer.steps,
        task=TaskWithoutOracle(),
        learner=next(rest),
        new_learner=lambda: next(rest),
        rollouts=FakeRollouts(config),
        run=run,
        metrics=Metrics(run.path, config, console),
        console=console,
        gauges=FakeGauges(),
    )  # type: ignore[arg-type]


def steps_of(run: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").open()]


@pytest.mark.parametrize("background", [False, True])
def test_every_step_updates_publishes_and_reports(tmp_path: Path, background: bool) -> None:
    config = make_config(tmp_path, run_name="run", background_checkpoints=background)
    learner = FakeLearner()
    trainer = make_trainer(config, learner)
    assert not trainer.train().interrupted
    assert learner.published == [1, 2, 3, 4] == steps_of(trainer.run)
    assert trainer.rollouts.inputs == [f"p{i}" for i in range(8)]
    assert sorted(p.name for p in trainer.run.checkpoints.iterdir()) == ["step_00002", "step_00004"]
    for step in (2, 4):
        checkpoint = trainer.run.checkpoints / f"step_{step:05d}"
        assert (checkpoint / "learner").read_text() == str(step)
        assert (read_state(checkpoint).step, read_state(checkpoint).cursor) == (step, 2 * step)
    last = json.loads((trainer.run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["weight_version"], last["inputs_trained"], last["loss"]) == (4, 2, 0.5)
    assert last["total/leaves"] == 4 * 2 * 16 and last["seconds/grow"] > 0
    summary = json.loads((trainer.run.path / "summary.json").read_text())
    assert (summary["steps"], summary["inputs"], summary["rollouts"]) == (4, 8, 128)


def test_a_second_interrupt_says_which_checkpoint_is_kept(tmp_path: Path) -> None:
    class Impatient(FakeLearner):
        def save(self, path: Path, *, background: bool = False) -> None:
            if self.weights == 3:
                raise KeyboardInterrupt
            super().save(path, background=background)

    learner = Impatient(fails_at=4, error=KeyboardInterrupt())
    trainer = make_trainer(make_config(tmp_path, run_name="run"), learner)
    with pytest.raises(
        KeyboardInterrupt, match=r"step_00002 is kept; continue with trainer\.resum"
    ):
        trainer.train()
    assert trainer.run.newest_checkpoint() == trainer.run.checkpoints / "step_00002"
    early = make_trainer(make_config(tmp_path, run_name="early"), Impatient())
    early.learner.weights = 3
    early.take_steps = interrupted
    with pytest.raises(KeyboardInterrupt, match="nothing is kept"):
        early.train()


def test_an_interrupt_after_the_last_step_loses_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, run_name="run"), FakeLearner())
    trainer.finish = interrupted
    with pytest.raises(KeyboardInterrupt, match=r"after the last step; .*step_00004 is kept"):
        trainer.train()


def interrupted() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_with_the_next_inputs(tmp_path: Path) -> None:
    stopped = make_trainer(
        make_config(tmp_path, run_name="run"), FakeLearner(fails_at=4, error=KeyboardInterrupt())
    )
    assert stopped.train().interrupted and stopped.state.step == 3
    learner = FakeLearner()
    resumed = make_trainer(make_config(tmp_path, resume=str(stopped.run.path)), learner)
    assert not resumed.train().interrupted
    assert learner.published == [3, 4] and resumed.rollouts.inputs == ["p6", "p7"]
    assert steps_of(resumed.run) == [1, 2, 3, 4]


@pytest.mark.parametrize("background", [False, True])
def test_a_new_learner_goes_on_from_the_newest_checkpoint(tmp_path: Path, background: bool) -> None:
    config = make_config(tmp_path, run_name="run", background_checkpoints=background)
    second = FakeLearner()
    trainer = make_trainer(config, FakeLearner(fails_at=4, error=LearnerLost("gone")), second)
    assert not trainer.train().interrupted
    assert second.published == [2, 3, 4], "the third step is made again"
    assert trainer.rollouts.inputs == [f"p{i}" for i in (*range(8), *range(4, 8))]
    assert steps_of(trainer.run) == [1, 2, 3, 4]


def test_a_learner_that_is_lost_before_any_checkpoint_ends_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(
        make_config(tmp_path, run_name="run"), FakeLearner(fails_at=1, error=LearnerLost("gone"))
    )
    with pytest.raises(Fault, match="step 1: gone; start the run anew"):
        trainer.train()


def test_the_chances_of_branchings_are_kept_in_the_checkpoint(tmp_path: Path) -> None:
    known = PivotFit(feedback=[(0.5, 0), (1.0, 1)], fitted={"2": (1.0, 0.0)})
    state = RunState(step=2, pivot_fit=known)
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    again = read_state(tmp_path)
    growth = GrowthConfig(rule=GrowthRule.pivot)
    (now, before) = (again.fitted(growth, 2, staleness) for staleness in (0, 1))
    assert now is not None and now.pivot.coefficients == (1, 0)
    assert before is not None and before.pivot.coefficients is None
    given = replace(growth, pivot=replace(growth.pivot, coefficients=(2.0, 0.0)))
    assert again.fitted(given, 2, 0) is None
    assert again.fitted(GrowthConfig(rule=GrowthRule.bel), 2, 0) is None


def test_beta_is_fitted_between_steps_and_kept_in_the_checkpoint(tmp_path: Path) -> None:
    """A resumed run grows its next step with the values that the whole run used."""

    class Recording(FakeRollouts):
        used: list[Any] = []  # noqa: RUF012

        def grow(self, inputs: list[Problem], step: int, config: Any = None) -> list[Any]:
            self.used.append((step, config.posterior.beta))
            return super().grow(inputs, step)

    def trainer_of(config: Config) -> Trainer:
        config.algorithm.growth = GrowthConfig(
            rule=GrowthRule.posterior, posterior=PosteriorConfig(fit_beta=True)
        )
        trainer = make_trainer(config, FakeLearner())
        trainer.rollouts = Recording(config)  # type: ignore[assignment]
        return trainer

    trainer = trainer_of(make_config(tmp_path, run_name="run", keep_checkpoints=4))
    trainer.train()
    whole = list(Recording.used)
    assert [step for step, _ in whole] == [0, 1, 2, 3]
    assert whole[0][1] == (0.6, 1.0) and len({beta for _, beta in whole}) > 1
    for name in ("step_00004",):
        shutil.rmtree(trainer.run.checkpoints / name)
    Recording.used.clear()
    trainer_of(make_config(tmp_path, resume=str(trainer.run.path))).train()
    assert Recording.used == whole[2:]


class EvaluatingRollouts(FakeRollouts):
    """What it finds of every problem is its share of successes, which grows with each call."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.asked: list[int] = []

    def evaluate(self, problems: Any, samples: int, advance: Any) -> list[Any]:
        self.asked.append(len(problems))
        share = len(self.asked) / 10
        return [sample_of(p.id, success=i < share * len(problems)) for i, p in enumerate(problems)]


class TwentyHeldOut(TaskWithoutOracle):
    def eval_problems(self, count: int) -> list[Problem]:
        return [Problem(f"e{i}", (), None) for i in range(20)][:count]


def make_evaluated(config: Config, learner: FakeLearner) -> Trainer:
    trainer = make_trainer(config, learner)
    trainer.rollouts = EvaluatingRollouts(config)  # type: ignore[assignment]
    trainer.task = TwentyHeldOut()
    return trainer


def held_out_rows(run: RunFolder) -> dict[int, tuple[float, float]]:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return {
        row["step"]: (row["eval/pass_at_1"], row["eval/problems"])
        for row in rows
        if "eval/pass_at_1" in row
    }


def test_held_out_pass_at_1_is_logged_over_the_steps(tmp_path: Path) -> None:
    config = make_config(tmp_path, run_name="run", eval_every=2, eval_part=10)
    trainer = make_evaluated(config, FakeLearner())
    trainer.train()
    assert trainer.rollouts.asked == [20, 10, 20]  # type: ignore[attr-defined]
    found = held_out_rows(trainer.run)
    assert found == {
        0: (pytest.approx(0.1), 20), 2: (pytest.approx(0.2), 10), 4: (pytest.approx(0.3), 20)
    }  # fmt: skip
    rows = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").open()]
    assert rows[0]["total/leaves"] == 0 and rows[0].keys() & {"reward", "loss"} == set()
    assert rows[2]["loss"] == 0.5 and rows[2]["total/leaves"] == 2 * 2 * 16
    assert rows[2]["eval/pass_at_1_low"] < 0.2 < rows[2]["eval/pass_at_1_high"]
    summary = json.loads((trainer.run.path / "summary.json").read_text())
    assert (summary["pass_at_1_before"], summary["pass_at_1_after"]) == (0.1, 0.3)


def test_evaluations_change_nothing_of_the_training(tmp_path: Path) -> None:
    kept = []
    for name, every in (("with", 1), ("without", 0)):
        config = make_config(tmp_path, run_name=name, eval_every=every)
        trainer = make_evaluated(config, FakeLearner())
        trainer.train()
        rows = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").open()]
        trees = [path.read_text() for path in sorted(trainer.run.trees.iterdir())]
        numbers = [
            {key: row[key] for key in row if not key.startswith(("eval/", "seconds", "total/"))}
            for row in rows
        ]
        for row in numbers:
            row.pop("tokens_per_second", None)
        kept.append((numbers, trees, trainer.rollouts.inputs))
    assert kept[0] == kept[1]


def test_an_evaluation_that_was_interrupted_is_made_up_for_and_none_is_made_twice(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path, run_name="run", eval_every=2)
    trainer = make_evaluated(config, FakeLearner())
    real = trainer.rollouts.evaluate

    def stop(*given: Any) -> list[Any]:
        if trainer.state.step == 2:
            raise KeyboardInterrupt
        return real(*given)

    trainer.rollouts.evaluate = stop  # type: ignore[method-assign]
    assert trainer.train().interrupted
    assert list(held_out_rows(trainer.run)) == [0] and steps_of(trainer.run) == [0, 1, 2]
    trainer.run.close()
    again = make_config(tmp_path, resume=str(trainer.run.path), eval_every=2)
    resumed = make_evaluated(again, FakeLearner())
    assert not resumed.train().interrupted
    assert list(held_out_rows(resumed.run)) == [0, 2, 4]
    assert len(resumed.rollouts.asked) == 2  # type: ignore[attr-defined]
    shutil.rmtree(resumed.run.checkpoints / "step_00004")
    third = make_evaluated(again, FakeLearner())
    third.train()
    assert third.rollouts.asked == [20], "that of step 2 stands in the log"  # type: ignore[attr-defined]


def test_a_run_that_has_ended_says_so_and_changes_nothing(tmp_path: Path) -> None:
    make_evaluated(make_config(tmp_path, run_name="run"), FakeLearner()).train()
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    console = Console(record=True, width=300)
    config = make_config(tmp_path, resume=str(run))
    assert nothing_left(RunFolder.of(config), config, config.trainer.steps, console)
    said = console.export_text()
    assert "has ended: its 4 steps are taken" in said and "trainer.steps=MORE" in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    more = make_config(tmp_path, resume=str(run))
    more.trainer.steps = 6
    assert not nothing_left(RunFolder.of(more), more, 6, console)
