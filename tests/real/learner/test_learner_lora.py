"""Adapters under real DeepSpeed, two gloo ranks and every ZeRO stage, against plain torch and PEFT;
their merged weights in a running vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from elpo_ray.config.algorithm import LossConfig
from elpo_ray.config.learner import LoraConfig, Packing
from elpo_ray.config.model import Precision
from elpo_ray.learner.backend import RankProcess
from elpo_ray.learner.batching import Pack
from elpo_ray.learner.export import convert_checkpoint
from elpo_ray.learner.loss import Objective
from elpo_ray.learner.masters import Masters, state_tensors
from elpo_ray.learner.rank import LearnerRank
from elpo_ray.rollout.engine import Engine
from elpo_ray.weights.host import HostPublisher
from tests.real.engines import GREEDY, PREFIX, Handles, assert_serves, exact
from tests.real.ranks import (
    OPTIMIZER,
    TOTAL_STEPS,
    Plain,
    build_forest,
    error_of,
    one_row,
    run_ranks,
    settings,
    timeless,
    updated,
    weights,
)

pytestmark = pytest.mark.real

STAGES = (0, 1, 2, 3)
LORA = LoraConfig(rank=4, alpha=8)


# --- what the ranks run -------------------------------------------------------------------------


def state(learner: LearnerRank) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in state_tensors(learner._engine)}


def logp(learner: LearnerRank) -> torch.Tensor:
    """Log-probabilities of the scored tokens of one demonstration."""
    from elpo_ray.forest.planning import plan

    rules = learner._passes.rules(Objective.nll)
    (packs, *_) = plan(one_row().minibatches[0], rules).ranks
    with torch.no_grad():
        return learner._passes.log_probs(learner._engine, Pack(packs[0]))


def every_stage(process: RankProcess, folder: Path, work: Path) -> dict[Any, Any]:
    return {stage: run_stage(stage, folder, work, process) for stage in STAGES}


def run_stage(stage: int, folder: Path, work: Path, process: RankProcess) -> dict[str, Any]:
    def new(**changes: Any) -> LearnerRank:
        chosen = settings(stage, **{"lora": LORA} | changes)
        return LearnerRank(folder, chosen, process, total_steps=TOTAL_STEPS, seed=7)

    learner = new(gradient_checkpointing=True)
    out: dict[str, Any] = {"before": state(learner), "logp_before": logp(learner)}
    out["update"] = vars(updated(learner, build_forest()))
    out["after"], out["weights"] = state(learner), weights(learner)
    pieces = Masters(learner._engine)._pieces()
    out["optimizer_numel"] = sum(piece.numel() for piece in pieces)
    out["logp"] = logp(learner)
    with learner._reference_policy():
        out["logp_reference"] = logp(learner)
    flat = new(packing=Packing.flat)
    out["flat"] = vars(updated(flat, build_forest()))
    kl = new(loss=LossConfig(kl_coef=0.1), epochs=2)
    out["kl"] = vars(updated(kl, build_forest(trees=3)))
    half = new(precision=Precision.bf16)
    out["bf16"] = vars(updated(half, build_forest()))
    resume_and_restart(learner, new(), work / f"stage_{stage}", out)
    full = LearnerRank(folder, settings(stage), process, total_steps=TOTAL_STEPS)
    out["refused"] = error_of(lambda: full.load(work / f"stage_{stage}" / "checkpoint"))
    return out


def resume_and_restart(
    learner: LearnerRank, resumed: LearnerRank, work: Path, out: dict[str, Any]
) -> None:
    if learner._process.rank == 0:
        work.mkdir(exist_ok=True)
    learner.save(work / "checkpoint")
    learner.export(work / "export")
    out["continued"] = timeless(vars(updated(learner, build_forest(seed=1))))
    out["continued_state"] = state(learner)
    resumed.load(work / "checkpoint")
    out["resumed"] = timeless(vars(updated(resumed, build_forest(seed=1))))
    out["resumed_state"] = state(resumed)
    # Another phase: the merged weights become the frozen ones, under new adapters.
    learner.export(work / "second")
    out["logp_second"] = logp(learner)
    learner.reset_optimizer(OPTIMIZER, 5, work / "second")
    out["second"], out["logp_restarted"] = state(learner), logp(learner)
    out["second_update"] = vars(updated(learner, build_forest(trees=3)))
    out["step"] = learner._step


def publish_parts(process: RankProcess, folder: Path, target: Path) -> list[dict[str, Any]]:
    """Buckets after some large steps; the merged model goes to `target`."""
    chosen = settings(3, max_tokens=500, lora=LORA)
    chosen.learner.optimizer.lr = 0.1
    learner = LearnerRank(folder, chosen, process, total_steps=TOTAL_STEPS)
    for seed in range(3):
        updated(learner, build_forest(seed=seed))
    learner.export(target)
    return [{n: t.clone() for n, t in b.items()} for b in learner.weight_buckets(20_000)]


# --- tests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(folder: Path, work: Path) -> list[dict[Any, Any]]:
    return run_ranks(every_stage, 2, work, folder, work)


def adapters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("weight/"): t for k, t in tensors.items()
            if k.startswith("weight/") and ".lora_" in k}  # fmt: skip


@pytest.fixture(scope="module")
def plain(folder: Path, ranks: list[dict[Any, Any]]) -> Iterator[Plain]:
    """PEFT's own model from the learner's first adapters, in plain torch."""
    reference = Plain(folder)
    targets = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    peft.inject_adapter_in_model(targets, reference.model)
    trained = [p for p in reference.model.parameters() if p.requires_grad]
    reference.adam = torch.optim.AdamW(
        trained, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay
    )
    missing = reference.model.load_state_dict(adapters(ranks[0][0]["before"]), strict=False)
    assert not missing.unexpected_keys
    reference.update(build_forest())
    yield reference


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_take_the_steps_of_plain_torch(
    ranks: list[dict[Any, Any]], plain: Plain, stage: int
) -> None:
    result = ranks[0][stage]
    assert result["update"]["loss"] == pytest.approx(sum(plain.losses) / 2, rel=1e-5)
    assert result["update"]["grad_norm"] == pytest.approx(sum(plain.norms) / 2, rel=1e-4)
    found, expected = adapters(result["after"]), dict(plain.model.named_parameters())
    assert len(found) == 2 * 2 * 7, "two layers of seven linear modules"
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-6)
    assert any(".lora_B." in name and tensor.any() for name, tensor in found.items())


@pytest.mark.parametrize("stage", STAGES)
def test_only_adapters_move_and_have_a_state(
    ranks: list[dict[Any, Any]], folder: Path, stage: int
) -> None:
    saved = load_file(folder / "model.safetensors")
    after = ranks[0][stage]["after"]
    for key, tensor in after.items():
        kind, name = key.split("/")
        if ".lora_" in name:
            assert {f"{moment}/{name}" for moment in ("exp_avg", "exp_avg_sq")} <= after.keys()
        else:
            assert kind == "weight", f"{key}: a frozen weight has no moments"
            assert torch.equal(tensor, saved[name.replace(".base_layer.", ".")]), name
    numel = sum(tensor.numel() for tensor in adapters(after).values())
    held = [rank[stage]["optimizer_numel"] for rank in ranks]
    whole = sum(held) if stage else held[0]
    assert numel <= whole <= 1.1 * numel, "padding only"


@pytest.mark.parametrize("stage", STAGES)
def test_trees_and_flat_sequences_agree(ranks: list[dict[Any, Any]], stage: int) -> None:
    tree, flat = ranks[0][stage]["update"], ranks[0][stage]["flat"]
    for key in ("loss", "grad_norm", "entropy", "clip_low", "clip_high", "ratio_mean"):
        assert flat[key] == pytest.approx(tree[key], rel=1e-4, abs=1e-6), key
    assert flat["forward_tokens"] > 1.5 * tree["forward_tokens"]
    assert ranks[0][stage]["bf16"]["grad_norm"] == pytest.approx(tree["grad_norm"], rel=0.1)


@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_is_the_model_without_adapters(
    ranks: list[dict[Any, Any]], stage: int
) -> None:
    for rank in ranks:
        result = rank[stage]
        torch.testing.assert_close(result["logp_reference"], result["logp_before"])
        assert (result["logp"] - result["logp_before"]).abs().max() > 1e-3
        # Two epochs: the first equals the reference, the second has moved away.
        assert 0 < result["kl"]["ref_k3"] < 0.1
        assert result["kl"]["optimizer_steps"] == 2


@pytest.mark.parametrize("stage", STAGES)
def test_merged_weights_are_the_policy(
    ranks: list[dict[Any, Any]], folder: Path, work: Path, tmp_path: Path, stage: int
) -> None:
    """Buckets, exported folder and converted checkpoint; under Hugging Face names."""
    buckets = ranks[0][stage]["weights"]
    assert buckets.keys() == load_file(folder / "model.safetensors").keys()
    assert ranks[1][stage]["weights"] == {}
    exported = work / f"stage_{stage}" / "export"
    assert not list(exported.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(exported)
    for name, tensor in model.state_dict().items():
        if name in buckets:
            assert torch.equal(tensor, buckets[name]), name
    ids = torch.arange(9)[None]
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, ids[0, 1:, None])[3:, 0]
    torch.testing.assert_close(ranks[0][stage]["logp"], expected, rtol=1e-5, atol=1e-5)
    convert_checkpoint(work / f"stage_{stage}" / "checkpoint", folder, tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(t, converted[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_is_bit_identical(ranks: list[dict[Any, Any]], stage: int) -> None:
    for rank in ranks:
        assert rank[stage]["resumed"] == rank[stage]["continued"]
        there, here = rank[stage]["continued_state"], rank[stage]["resumed_state"]
        assert there.keys() == here.keys()
        assert all(torch.equal(tensor, here[key]) for key, tensor in there.items())
        assert rank[stage]["refused"].startswith("ValueError")
        assert "lora {'rank': 4" in rank[stage]["refused"]


@pytest.mark.parametrize("stage", STAGES)
def test_another_phase_starts_new_adapters_on_the_merged_weights(
    ranks: list[dict[Any, Any]], work: Path, stage: int
) -> None:
    """As a run does that finds its cold start in the cache."""
    result = ranks[0][stage]
    merged = load_file(work / f"stage_{stage}" / "second" / "model.safetensors")
    for key, tensor in result["second"].items():
        kind, name = key.split("/")
        if kind != "weight" or ".lora_B." in name:
            assert not tensor.any(), key
        elif ".lora_A." not in name:
            assert torch.equal(tensor, merged[name.replace(".base_layer.", ".")]), name
    torch.testing.assert_close(result["logp_restarted"], result["logp_second"])
    assert result["step"] == 1
    assert result["second_update"]["grad_norm"] > 0


@pytest.mark.asyncio(loop_scope="session")
async def test_an_engine_serves_the_merged_weights(
    tmp_path: Path, engine: Engine, qwen2: tuple[Path, Qwen2ForCausalLM]
) -> None:
    target, version = tmp_path / "merged", engine.version + 1
    parts = run_ranks(publish_parts, 2, tmp_path / "work", qwen2[0], target)
    model = AutoModelForCausalLM.from_pretrained(target)
    before = await engine.generate(PREFIX, GREEDY)
    publisher = HostPublisher(0, Handles(engine), lambda _: iter(parts[0]), 1)
    await asyncio.to_thread(publisher.publish, version)
    await assert_serves(engine, model, version)
    moved, _ = exact(model, PREFIX, before.token_ids, 1.0)
    assert max(abs(a - b) for a, b in zip(before.logprobs, moved, strict=True)) > 0.05
