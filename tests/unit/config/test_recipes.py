"""Every experiment says, before anything starts, what it will sample, train and hold in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import elpo_ray.main
import elpo_ray.sft
from elpo_ray.config import CONF_DIR, Config, algebra, memory
from elpo_ray.config.learner import LrSchedule
from elpo_ray.config.rollout import Transfer
from elpo_ray.config.run import ClusterConfig
from elpo_ray.config.shapes import shape_of
from elpo_ray.config.task import RewardName, TaskName

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
GIB_OF_80 = 60.0
"""Model states that leave room for activations on an 80 GB GPU."""


def config_of(experiment: str, *overrides: str) -> Config:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("config", [f"+experiment={experiment}", "check_only=true", *overrides])
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def rows(text: str) -> dict[str, str]:
    pairs = (line.strip().split("  ", 1) for line in text.splitlines())
    return {name: value.strip() for name, value in pairs}


@pytest.mark.parametrize("run", [elpo_ray.main.run, elpo_ray.sft.run])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_check_only_prints_batch_and_memory(
    experiment: str,
    run: Callable[[Config], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the machine lacks what the run needs, which is said afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("elpo_ray.training.checks.gpus_here", lambda: 0)
    config = config_of(experiment)
    if config.cluster.gpus:
        with pytest.raises(ValueError, match=r"cluster\.gpus=True: .* this machine has 0"):
            run(config)
    else:
        assert run(config) == 0
    said = rows(capsys.readouterr().out)
    assert said["experiment"].startswith(experiment)
    assert "GiB of model states" in said["learner memory"]
    gib = float(said["learner memory"].split()[0].replace(",", ""))
    assert 0 < gib < GIB_OF_80
    assert {"tokens a step", "packs a rank"} <= said.keys()


@pytest.mark.parametrize(("experiment", "parameters"), [("paper_7b", 7.6e9), ("paper_4b", 4.0e9)])
def test_the_papers_recipe(experiment: str, parameters: float) -> None:
    """Section 5.3 and Appendix C."""
    config = config_of(experiment)
    shape = shape_of(config.model)
    assert shape is not None and shape.parameters == pytest.approx(parameters, rel=0.01)
    assert config.model.max_context == 20480
    assert (config.trainer.steps, config.trainer.inputs_per_step) == (235, 128)
    assert config.trainer.steps * config.trainer.inputs_per_step == 30_080, "one epoch"
    assert config.learner.minibatch_inputs == 16 and config.optimizer_steps == 235 * 8
    optimizer = config.learner.optimizer
    assert (optimizer.lr, optimizer.grad_norm) == (1e-6, 1.0)
    assert optimizer.schedule is LrSchedule.constant
    assert (config.sampling.temperature, config.sampling.top_p) == (1.0, 1.0)
    assert config.algorithm.growth.n_total == 16 and config.algorithm.name == "elpo"
    task = config.task
    assert (task.name, task.reward.name) == (TaskName.open_agentrl, RewardName.demyagent_as_run)
    assert (task.max_turns, task.max_observation_chars) == (16, 256)
    assert (task.reward.overlong_buffer, task.reward.overlong_limit) == (4096, 20480)
    start = config.cold_start
    assert start.enabled and (start.epochs, start.batch_size, start.max_tokens) == (5, 32, 32768)
    tuned = start.optimizer
    assert (tuned.lr, tuned.schedule, tuned.warmup_ratio) == (1e-5, LrSchedule.cosine, 0.1)
    assert (tuple(tuned.betas), tuned.weight_decay) == ((0.9, 0.95), 0.01)
    assert algebra.gpus_asked(config) == 8


def test_the_everyday_recipe_differs_where_it_says() -> None:
    paper, ours = config_of("paper_7b"), config_of("aime")
    assert ours.task.reward.name is RewardName.verify and not ours.cold_start.enabled
    ours.task.reward, ours.cold_start, ours.experiment, ours.sandbox = (
        paper.task.reward, paper.cold_start, paper.experiment, paper.sandbox,
    )  # fmt: skip
    assert ours == paper


def test_gpus_are_counted() -> None:
    for experiment, count in (("aime_2gpu", 2), ("aime_1gpu", 1), ("aime_lora", 1)):
        config = config_of(experiment)
        assert algebra.gpus_asked(config) == count
        expected = Transfer.ipc if count == 1 else Transfer.nccl
        assert config.transfer is expected, "NCCL cannot reach its own GPU"


def test_adapters_spare_gradients_and_optimizer() -> None:
    whole, adapters = config_of("aime"), config_of("aime_lora")
    assert adapters.model == whole.model and adapters.learner.adapters is not None
    states = memory.model_states(adapters)
    assert states is not None
    weights = 2 * 7.6e9
    assert weights < states.rank < 1.15 * weights
    # Qwen2.5-7B: 28 layers of 3584, 18944 wide inside, 512 for keys and values; rank 32.
    sides = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    exact = 28 * 32 * sides
    assert 0.7 < memory.adapter_share(7.6e9, 32) * 7.6e9 / exact < 1.5


def test_whoever_shares_a_gpu_takes_turns() -> None:
    with pytest.raises(ValueError, match=r"cluster\.colocated=True: needs as many rollout workers"):
        ClusterConfig(colocated=True, learner_ranks=2)
    for section, key, value in (
        ("engine", "tensor_parallel_size", 2),
        ("schedule", "staleness", 1),
        ("learner", "zero_stage", 1),
        ("learner", "zero_stage", 0),
    ):
        config = config_of("aime_1gpu")
        setattr(getattr(config, section), key, value)
        with pytest.raises(ValueError, match=rf"{section}\.{key}={value}: cluster\.colocated=true"):
            replace(config)
    config = config_of("aime_lora")
    config.learner.zero_stage = 3
    with pytest.raises(ValueError, match=r"learner\.zero_stage=3: .* use 2"):
        replace(config)


@pytest.mark.parametrize(
    ("experiment", "transfer", "fits"),
    [
        ("aime_1gpu", Transfer.host, True),
        ("aime_1gpu", Transfer.nccl, False),
        ("aime_2gpu", Transfer.ipc, False),
        ("aime_2gpu", Transfer.host, True),
        ("quickstart", Transfer.nccl, False),
        ("quickstart", Transfer.ipc, False),
    ],
)
def test_weights_travel_only_where_there_is_a_way(
    experiment: str, transfer: Transfer, fits: bool
) -> None:
    config = config_of(experiment)
    config.engine.transfer = transfer
    if fits:
        assert replace(config).transfer is transfer
    else:
        with pytest.raises(ValueError, match=rf"engine\.transfer='?{transfer.value}"):
            replace(config)


def test_eight_shared_gpus() -> None:
    config = config_of("aime", "cluster=gpu8_colocated")
    assert algebra.gpus_asked(config) == 8 and config.transfer is Transfer.ipc
