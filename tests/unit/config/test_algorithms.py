"""Every algorithm is its choices: what each preset takes, and that its budget and weights hold."""

import asyncio
import random
from typing import Any

import pytest
from fakes import FakeTask, Word, make_worker
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from elpo_ray.config import CONF_DIR, Config
from elpo_ray.credit import assign
from elpo_ray.credit.__main__ import compose as compose_credit
from elpo_ray.forest.trees import pack

ALGORITHMS = sorted(path.stem for path in (CONF_DIR / "algorithm").glob("*.yaml"))
TOKEN, SEQUENCE = "token_mean", "seq_mean_token_mean"

TABLE: dict[str, tuple[str, str, tuple[float, float, float], str]] = {
    "elpo": ("bel", "hierarchical", (0.2, 0.315, 0.115), SEQUENCE),
    "elpo_posterior": ("posterior", "hierarchical", (0.2, 0.315, 0.115), SEQUENCE),
    "elpo_no_bel": ("random_branch", "hierarchical", (0.2, 0.315, 0.0), SEQUENCE),
    "elpo_no_hier": ("bel", "group", (0.2, 0.315, 0.115), SEQUENCE),
    "elpo_no_elc": ("bel", "hierarchical", (0.2, 0.315, 0.0), SEQUENCE),
    "grpo": ("independent", "group", (0.2, 0.2, 0.0), SEQUENCE),
    "reinforce_pp": ("independent", "whitened", (0.2, 0.2, 0.0), TOKEN),
    "reinforce_pp_baseline": ("independent", "whitened", (0.2, 0.2, 0.0), TOKEN),
    "dapo": ("independent", "group", (0.2, 0.28, 0.0), TOKEN),
    "dapo_nofilter": ("independent", "group", (0.2, 0.28, 0.0), TOKEN),
    "torl": ("independent", "group", (0.2, 0.2, 0.0), TOKEN),
    "arpo": ("entropy_branch", "group", (0.2, 0.2, 0.0), TOKEN),
    "aepo": ("entropy_branch", "group", (0.2, 0.2, 0.0), TOKEN),
    "cir": ("independent", "whitened", (0.2, 0.28, 0.0), TOKEN),
    "gigpo": ("independent", "step_group", (0.2, 0.2, 0.0), TOKEN),
    "tree_grpo": ("random_branch", "tree_group", (0.2, 0.2, 0.0), TOKEN),
    "demyagent": ("independent", "group", (0.2, 0.28, 0.0), TOKEN),
    "deep_grpo": ("pivot", "group_each", (0.2, 0.2, 0.0), TOKEN),
    "branpo": ("contrast", "contrast", (0.2, 0.28, 0.0), TOKEN),
    "srpo": ("reset", "group_each", (0.2, 0.2, 0.0), SEQUENCE),
    "rrpo": ("reset", "group_each", (0.2, 0.2, 0.0), SEQUENCE),
    "srpo_clip": ("reset", "group_each", (0.2, 0.2, 0.0), TOKEN),
}
"""Growth, credit, (ε_low, ε_high, ε_elc), aggregation."""

RESET: dict[str, Any] = {
    "growth.reset.roots": 8,
    "growth.reset.resets": 8,
    "growth.reset.temperature": 0.3,
    "growth.reset.top_p": 0.95,
    "growth.reset.max_tokens": 4096,
    "credit.train": "own",
    "credit.parent": "drop",
    "credit.ddof": 0,
    "credit.eps": 0.0,
}
"""What SRPO and its variants have in common."""

PARTICULARS: dict[str, dict[str, Any]] = {
    "elpo": {"credit.ddof": 0, "credit.lam": 0.5, "clip.scope": "critical_subtree"},
    "elpo_posterior": {
        "growth.posterior.prior": "surprise",
        "growth.posterior.least_likely": 1,
        "growth.posterior.doubt": 0.25,
        "growth.posterior.beta": [0.5, 1.0],
        "growth.posterior.fit_beta": False,
        "growth.posterior.threshold": 0.7,
        "growth.posterior.free_evidence": "tokens",
        "growth.posterior.max_probes": 4,
        "clip.scope": "critical_subtree",
    },
    "elpo_no_bel": {"growth.random.trees": 1, "growth.random.chains": 4, "clip.scope": "none"},
    "elpo_no_hier": {"credit.ddof": 0, "clip.scope": "critical_subtree"},
    "elpo_no_elc": {"credit.lam": 0.5, "clip.scope": "none"},
    "grpo": {"credit.ddof": 1, "credit.eps": 1e-6},
    "reinforce_pp": {"credit.baseline": False, "credit.eps": 1e-8},
    "reinforce_pp_baseline": {"credit.baseline": True, "credit.eps": 1e-8},
    "dapo": {"growth.dynamic.max_batches": 10, "growth.dynamic.batch_factor": 3},
    "dapo_nofilter": {"growth.dynamic.max_batches": 0},
    "torl": {"growth.max_tool_calls": [1]},
    "arpo": {
        "growth.entropy.initial": 8,
        "growth.entropy.entropy_weight": 0.2,
        "growth.entropy.branch_probability": 0.5,
        "growth.entropy.penalty": 0.0,
        "credit.attribution": "each",
    },
    "aepo": {
        "growth.entropy.monitor": True,
        "growth.entropy.penalty": 0.05,
        "clip.keep_gradient": True,
        "loss.entropy_advantage": 0.2,
        "credit.attribution": "each",
    },
    "cir": {"growth.max_tool_calls": [2, 4, 8], "credit.baseline": True},
    "gigpo": {"credit.step.omega": 1.0, "credit.step.gamma": 0.95, "credit.divide_by_std": True},
    "tree_grpo": {"growth.random.trees": 4, "growth.random.rounds": 1, "credit.ddof": 1},
    "demyagent": {"credit.ddof": 1},
    "deep_grpo": {
        "growth.pivot.roots": 8,
        "growth.pivot.chains": 1,
        "growth.pivot.branches": 8,
        "growth.pivot.gamma": 2.0,
        "growth.pivot.window": 10_000,
        "growth.pivot.min_feedback": 11,
        "growth.pivot.model": "logistic",
        "credit.train": "own",
        "credit.divide_by_std": False,
        "credit.skip_zero": True,
        "loss.streams.branch": 1.0,
    },
    "branpo": {
        "growth.contrast.bases": 8,
        "growth.contrast.tries": 2,
        "growth.contrast.depth": 2,
        "growth.contrast.hard_depth": 3,
        "growth.contrast.solved_tries": 1,
        "growth.contrast.long_tries": 5,
        "growth.contrast.long_by": 0.1,
        "credit.train": "own",
        "credit.ddof": 1,
        "credit.norm": "input",
    },
    "srpo": {**RESET, "growth.reset.locate": "self", "loss.surrogate": "log"},
    "rrpo": {**RESET, "growth.reset.locate": "random", "loss.surrogate": "log"},
    "srpo_clip": {**RESET, "growth.reset.locate": "self", "loss.surrogate": "ratio"},
}
SHAPED = {"dapo", "dapo_nofilter", "demyagent"}
"""Those with overlong shaping of the reward."""


def config_of(name: str, *overrides: str) -> Config:
    ConfigStore.instance().store(name="config_schema", node=Config)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("config", ["+experiment=quickstart", f"algorithm={name}", *overrides])
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def test_the_table_has_every_preset() -> None:
    assert sorted(TABLE) == sorted(PARTICULARS) == ALGORITHMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_preset_is_its_row_of_the_table(name: str) -> None:
    config = config_of(name)
    algorithm = config.algorithm
    growth, credit, bounds, aggregation = TABLE[name]
    assert (algorithm.growth.rule.value, algorithm.credit.rule.value) == (growth, credit)
    assert (algorithm.clip.eps_low, algorithm.clip.eps_high, algorithm.clip.eps_elc) == bounds
    assert algorithm.loss.aggregation.value == aggregation
    assert (algorithm.growth.n_total, algorithm.loss.dual_clip, algorithm.loss.kl_coef) == (
        16,
        10,
        0,
    )
    assert algorithm.credit.weighting.value == "leaf"
    assert algorithm.credit.after_irrecoverable.value == "paper"
    plain = OmegaConf.to_container(OmegaConf.structured(algorithm), enum_to_str=True)
    for key, value in PARTICULARS[name].items():
        assert OmegaConf.select(OmegaConf.create(plain), key) == value, key
    shaping = config.task.reward
    assert (shaping.overlong_limit, shaping.overlong_buffer) == (20480, 4096 * (name in SHAPED))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_credit_command_reads_every_preset(name: str) -> None:
    assert compose_credit([f"algorithm={name}"]) == config_of(name).algorithm


@pytest.mark.parametrize("name", ALGORITHMS)
def test_sixteen_leaves_become_a_weighted_forest(name: str) -> None:
    """Growth, credit and packing of two inputs over the scripted policy."""
    config = config_of(name, "task.max_turns=8", "model.max_context=4096", "sandbox.retries=0")
    config.learner.max_tokens_per_pack = 4096
    draw = random.Random(0)

    def plan(number: int, before: list[str]) -> list[Word]:
        answer = draw.choice(["=ok", "=no"])
        words = [*["g"] * (3 - min(len(before), 3)), answer]
        return [(word, draw.uniform(0, 2)) for word in words]

    worker = make_worker(plan, config)
    problems = [FakeTask().train_problem(i) for i in range(2)]
    trees = [asyncio.run(worker.grow(problem, 0)) for problem in problems]
    assert [len(tree.leaves()) for tree in trees] == [16, 16]
    credits = assign(trees, config.algorithm)
    forest = pack(trees, credits, config.algorithm.loss, config.learner)
    assert sum(len(tree.leaves) for tree in forest.trees) == 32
    streams = 2 if config.algorithm.loss.streams.branch else 1
    assert sum(tree.token_weight.sum() for tree in forest.trees) == pytest.approx(streams)
    assert any(tree.advantage.any() for tree in forest.trees)
    assert all((tree.negative_advantage >= 0).all() for tree in forest.trees)
    assert all((tree.advantage + tree.negative_advantage >= -1e-12).all() for tree in forest.trees)
