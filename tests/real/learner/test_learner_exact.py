"""Trees against flat sequences under real DeepSpeed: float64 over two ranks of ZeRO-3, and the loss
curve of a run.

DeepSpeed computes in fp32 at most and says so. The float64 rank lifts its checks and has gradients
summed, instead of scattered, in float64; its master weights stay fp32, so that one step is as far
as this goes. Everything of ours runs as it is: plan, dummies, attention, head, loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from elpo_ray.config.learner import Packing
from elpo_ray.config.model import Precision
from elpo_ray.forest.layout import lay_out
from elpo_ray.forest.planning import plan
from elpo_ray.learner import backend, policy
from elpo_ray.learner.backend import RankProcess
from elpo_ray.learner.batching import Pack
from elpo_ray.learner.loss import Objective
from elpo_ray.learner.rank import LearnerRank
from tests.real.ranks import (
    TOTAL_STEPS,
    Plain,
    build_forest,
    build_model,
    run_ranks,
    settings,
    timeless,
    updated,
)

pytestmark = pytest.mark.real


def norm_as_is(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm without the model's detour over fp32."""
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    normed: torch.Tensor = self.weight * hidden * scale
    return normed


def allow_float64() -> None:
    """In a process that ends afterwards."""
    from deepspeed.runtime.engine import DeepSpeedEngine as Engine

    Engine.get_data_types = lambda self: (torch.float64, torch.float64)
    Engine.communication_data_type = property(lambda self: torch.float64)
    Engine._DeepSpeedEngine__check_params = lambda self, module, dtype: None
    configured = backend.deepspeed_config

    def config(*arguments: Any) -> dict[str, Any]:
        config = configured(*arguments)
        config["zero_optimization"]["reduce_scatter"] = False  # it knows no float64
        return config

    backend.deepspeed_config = config
    policy.DTYPES[Precision.fp32] = torch.float64
    Qwen2RMSNorm.forward = norm_as_is


class Watched(LearnerRank):
    """Keeps this rank's piece of each gradient, as they are before clipping."""

    gradients: dict[str, torch.Tensor]

    def _apply(self, rate: float) -> float | None:
        pieces = self._engine.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        self.gradients = {n: pieces[p.ds_id].clone() for n, p in self.model.named_parameters()}
        return super()._apply(rate)


def in_float64(process: RankProcess, folder: Path) -> dict[Any, Any]:
    allow_float64()
    out: dict[Any, Any] = {}
    for packing in Packing:
        learner = Watched(folder, settings(3, packing=packing), process, total_steps=TOTAL_STEPS)
        forest = build_forest(trees=3)
        (trees,) = forest.minibatches
        packs = plan(trees, learner._passes.rules(Objective.surrogate)).ranks[process.rank]
        logp: dict[tuple[int, int], float] = {}
        with torch.no_grad():
            for items in packs:
                values = learner._passes.log_probs(learner._engine, Pack(items)).tolist()
                places = [
                    (next(i for i, tree in enumerate(trees) if tree is item.tree), int(token))
                    for item in items
                    for token in lay_out([item]).scored
                ]
                # A dummy scores one token, which is in no tree.
                logp |= dict(zip(places, values, strict=bool(items)))
        stats = updated(learner, forest)
        out[packing] = {
            "dtypes": {p.dtype for p in learner.model.parameters()},
            "logp": logp,
            "loss": stats.loss,
            "gradients": learner.gradients,
            "packs": [len(items) for items in packs],
        }
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(in_float64, 2, tmp_path_factory.mktemp("work"), folder)


@pytest.fixture
def plain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plain:
    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm_as_is)
    return Plain(folder, torch.float64)


@pytest.mark.parametrize("packing", Packing)
def test_log_probabilities_in_float64(
    ranks: list[dict[Any, Any]], plain: Plain, packing: Packing
) -> None:
    (trees,) = build_forest(trees=3).minibatches
    found = ranks[0][packing]["logp"] | ranks[1][packing]["logp"]
    assert all(rank[packing]["dtypes"] == {torch.float64} for rank in ranks)
    expected: dict[tuple[int, int], float] = {}
    for number, tree in enumerate(trees):
        for tokens, logp in zip(tree.sequences(), plain.old([tree]), strict=True):
            agents = tokens[tree.agent[tokens]].tolist()
            expected |= {(number, t): v for t, v in zip(agents, logp.tolist(), strict=True)}
    assert found.keys() == expected.keys(), "every agent token once"
    if packing is Packing.tree:
        assert not ranks[0][packing]["logp"].keys() & ranks[1][packing]["logp"].keys()
    assert max(abs(found[place] - value) for place, value in expected.items()) < 1e-12


@pytest.mark.parametrize("packing", Packing)
def test_gradients_in_float64_over_two_ranks(
    ranks: list[dict[Any, Any]], plain: Plain, packing: Packing
) -> None:
    """Also where one rank had nothing but a dummy in its last pack."""
    (trees,) = build_forest(trees=3).minibatches
    loss = plain.loss(trees, plain.old(trees))
    loss.backward()
    assert ranks[0][packing]["loss"] == pytest.approx(loss.item(), abs=1e-13)
    for name, parameter in plain.model.named_parameters():
        pieces = [rank[packing]["gradients"][name] for rank in ranks]
        assert {piece.dtype for piece in pieces} == {torch.float64}
        whole = torch.cat([piece.flatten() for piece in pieces])[: parameter.numel()]
        expected = parameter.grad
        assert expected is not None
        error = (whole.view_as(expected) - expected).norm() / expected.norm()
        assert error < 1e-10, f"{name}: {error}"


def curve(process: RankProcess, folder: Path) -> dict[Any, Any]:
    """Ten updates of two optimizer steps; every rank meets packs of several trees and dummies."""
    losses: dict[Any, Any] = {}
    for packing in Packing:
        chosen = settings(2, packing=packing)
        learner = LearnerRank(folder, chosen, process, total_steps=TOTAL_STEPS)
        losses[packing] = [
            timeless(vars(updated(learner, build_forest(seed=seed)))) for seed in range(10)
        ]
    return losses


def test_loss_curves_with_and_without_shared_prefixes(folder: Path, tmp_path: Path) -> None:
    """fp32: differences stay rounding over 20 optimizer steps."""
    found = run_ranks(curve, 2, tmp_path, folder)[0]
    for tree, flat in zip(found[Packing.tree], found[Packing.flat], strict=True):
        assert tree["r_tok"] > 1.5 and flat["speedup_predicted"] == 1
        assert tree["forward_tokens"] < 0.7 * flat["forward_tokens"]
        for key in ("loss", "grad_norm", "entropy", "ratio_mean", "mismatch_k3"):
            assert tree[key] == pytest.approx(flat[key], rel=1e-4, abs=1e-6), key
    assert abs(found[Packing.tree][-1]["entropy"] - found[Packing.tree][0]["entropy"]) > 1e-3
