"""The learner under real DeepSpeed on CPU, two gloo ranks, against plain torch in this process.

One pair of processes runs every ZeRO stage, since starting one costs more than all its work.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from elpo_ray.config.algorithm import LossConfig
from elpo_ray.config.learner import Packing
from elpo_ray.config.model import Precision
from elpo_ray.forest.trees import TrainForest
from elpo_ray.learner.backend import RankProcess
from elpo_ray.learner.loss import Objective
from elpo_ray.learner.rank import LearnerRank
from tests.real.ranks import (
    OPTIMIZER,
    TOTAL_STEPS,
    VOCAB,
    Plain,
    build_forest,
    build_model,
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


# --- what the ranks run -------------------------------------------------------------------------


def first_moments(learner: LearnerRank) -> dict[str, torch.Tensor]:
    """Adam's first moments: after one step, 0.1 times the clipped gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state = learner._engine.basic_optimizer.state
    return {
        name: (
            state[p]["exp_avg"] if p in state else safe_get_full_optimizer_state(p, "exp_avg")
        ).clone()
        for name, p in learner.model.named_parameters()
    }


def run_stage(stage: int, folder: Path, work: Path, process: RankProcess) -> dict[str, Any]:
    def new(**changes: Any) -> LearnerRank:
        return LearnerRank(folder, settings(stage, **changes), process, total_steps=TOTAL_STEPS)

    out: dict[str, Any] = {}
    learner = new()
    out["exported"] = weights(learner)
    out["update"] = vars(updated(learner, build_forest()))
    out["weights"] = weights(learner)

    single = new(max_tokens=60, gradient_checkpointing=True)
    out["single"] = vars(updated(single, build_forest(trees=3)))
    out["moments"] = first_moments(single)
    out["nll"] = vars(updated(single, one_row(), Objective.nll))

    path = work / f"checkpoint_{stage}"
    learner.save(path)
    out["continued"] = timeless(vars(updated(learner, build_forest(seed=1))))
    out["continued_weights"] = weights(learner)
    out["full_disk"] = full_disk(learner, path)
    resumed = new()
    resumed.load(path)
    out["resumed"] = timeless(vars(updated(resumed, build_forest(seed=1))))
    out["resumed_weights"] = weights(resumed)
    resumed.export(work / f"export_{stage}")
    if stage:
        out["onloaded"] = after_offloads(new(), path, resumed)
    return out | edges(resumed) | variants(new)


def after_offloads(learner: LearnerRank, path: Path, other: LearnerRank) -> dict[str, Any]:
    """The step that `other` took from the checkpoint `path`, by one that is offloaded before and
    after."""
    learner.load(path)
    learner.offload()
    learner.onload()
    out: dict[str, Any] = {"update": timeless(vars(updated(learner, build_forest(seed=1))))}
    learner.offload()
    learner.onload()
    out["weights"] = weights(learner)
    saved = []
    for rank, name in ((learner, "offloaded"), (other, "kept")):
        target = path.with_name(f"{name}_{path.name}")
        rank.save(target)
        saved.append({f.name: f.read_bytes() for f in target.rglob("*") if f.is_file()})
    return out | {"same checkpoint": saved[0] == saved[1] and len(saved[0]) > 2}


def full_disk(learner: LearnerRank, path: Path) -> dict[str, Any]:
    """Files may not grow beyond a few KB while saving: checkpoint and export must fail whole."""
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
    try:
        errors = [error_of(lambda: learner.save(path))]
        errors.append(error_of(lambda: learner.export(path.with_name("never"))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    after = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    return {"errors": errors, "untouched": before == after and len(before) > 2}


def edges(learner: LearnerRank) -> dict[str, Any]:
    """Forests that are empty, neutral or poisoned."""
    before = weights(learner)
    forest = build_forest(trees=3)
    (trees,) = forest.minibatches
    flat = [
        replace(t, advantage=t.advantage * 0, negative_advantage=t.negative_advantage * 0)
        for t in trees
    ]
    out: dict[str, Any] = {
        "neutral": vars(updated(learner, TrainForest(minibatches=[flat]))),
        "empty": vars(updated(learner, TrainForest(minibatches=[]))),
    }
    broken = replace(trees[0], advantage=trees[0].advantage + np.nan)
    nan = TrainForest(minibatches=[[broken, *trees[1:]]])
    out["nan"] = error_of(lambda: updated(learner, nan))
    alien = replace(trees[0], ids=np.full_like(trees[0].ids, VOCAB))
    out["alien"] = error_of(lambda: updated(learner, TrainForest(minibatches=[[alien]])))
    after = weights(learner)
    out["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)
    out["after_nan"] = updated(learner, forest).grad_norm
    return out


def variants(new: Callable[..., LearnerRank]) -> dict[str, Any]:
    """KL to the reference, offload, several epochs, bf16, a fresh optimizer."""
    kl = new(loss=LossConfig(kl_coef=0.1), epochs=2)
    out: dict[str, Any] = {"kl": vars(updated(kl, build_forest(trees=3)))}
    start = weights(kl)
    kl.reset_optimizer(replace(OPTIMIZER, lr=1e-9), total_steps=5)
    updated(kl, build_forest(trees=3))
    out["reset_step"] = kl._step
    moved = weights(kl)
    out["reset_moved"] = max((float((moved[n] - start[n]).abs().max()) for n in start), default=0)
    offloaded = new(offload_optimizer=True)
    updated(offloaded, build_forest())
    out["offloaded"] = weights(offloaded)
    flat = new(packing=Packing.flat)
    out["flat"] = vars(updated(flat, build_forest()))
    out["flat_weights"] = weights(flat)
    half = new(precision=Precision.bf16)
    out["bf16"] = vars(updated(half, build_forest()))
    out["bf16_dtypes"] = {t.dtype for t in weights(half).values()}
    return out


def every_stage(process: RankProcess, folder: Path, work: Path) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for stage in STAGES:
        results[stage] = run_stage(stage, folder, work, process)
    other = LearnerRank(work / "other", settings(1), process, total_steps=TOTAL_STEPS)
    results["other_model"] = error_of(lambda: other.load(work / "checkpoint_1"))
    results["no_checkpoint"] = error_of(lambda: other.load(work / "nowhere"))
    half = LearnerRank(
        folder, settings(1, precision=Precision.bf16), process, total_steps=TOTAL_STEPS
    )
    results["other_precision"] = error_of(lambda: half.load(work / "checkpoint_1"))
    return results


@pytest.fixture(scope="module")
def ranks(folder: Path, work: Path) -> list[dict[Any, Any]]:
    build_model(work / "other", hidden=16)
    return run_ranks(every_stage, 2, work, folder, work)


# --- tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    reference = Plain(folder)
    reference.update(build_forest())
    return reference


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_plain_torch(ranks: list[dict[Any, Any]], plain: Plain, stage: int) -> None:
    stats = ranks[0][stage]["update"]
    assert stats["optimizer_steps"] == 2
    assert stats["packs"] > 4
    assert stats["loss"] == pytest.approx(np.mean(plain.losses), rel=1e-5)
    assert stats["grad_norm"] == pytest.approx(np.mean(plain.norms), rel=1e-5)
    assert min(plain.norms) > OPTIMIZER.grad_norm, "clipping must be active"
    assert stats["lr"] == pytest.approx(OPTIMIZER.lr * 2 / 7)
    found = ranks[0][stage]["weights"]
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_equal_plain_torch(ranks: list[dict[Any, Any]], folder: Path, stage: int) -> None:
    """Other micro-batches and gradient checkpointing too."""
    reference = Plain(folder)
    reference.update(build_forest(trees=3))
    for rank in ranks:
        for name, parameter in reference.model.named_parameters():
            moment = reference.adam.state[parameter]["exp_avg"]
            error = (rank[stage]["moments"][name] - moment).norm() / moment.norm()
            assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("stage", STAGES)
def test_statistics_agree_between_ranks_and_stages(ranks: list[dict[Any, Any]], stage: int) -> None:
    first = ranks[0][0]["update"]
    for rank in ranks:
        stats = rank[stage]["update"]
        for key in first.keys() - {"learner_seconds", "learner_tokens_per_s", "speedup_measured"}:
            assert stats[key] == pytest.approx(first[key], rel=1e-4, abs=1e-7), key
    assert 0 < first["elc_weight"] < 1
    assert first["ratio_mean"] == pytest.approx(1, abs=0.05)
    assert first["ratio_max"] > 1
    assert first["mismatch_k3"] > 0
    assert 0 < first["entropy"] < np.log(VOCAB)
    trees = build_forest().trees
    assert first["trained_tokens"] == sum(int(t.agent.sum()) for t in trees)
    # A dummy is one token.
    assert first["padded_tokens"] <= first["forward_tokens"] + first["packs"]
    assert first["speedup_measured"] > 0
    assert 0 < first["repetition"] < 0.1, "one tree is over the budget and divided"
    flat = sum(int(t.agent[s].sum()) for t in trees for s in t.sequences())
    assert first["r_agent"] == pytest.approx(flat / first["trained_tokens"])
    assert 1 < first["speedup_predicted"] < first["r_tok"]


@pytest.mark.parametrize("stage", STAGES)
def test_flat_packing_takes_the_same_steps(ranks: list[dict[Any, Any]], stage: int) -> None:
    tree, flat = ranks[0][stage]["update"], ranks[0][stage]["flat"]
    for key in (
        "loss",
        "grad_norm",
        "entropy",
        "clip_low",
        "clip_high",
        "elc_weight",
        "ratio_mean",
    ):
        assert flat[key] == pytest.approx(tree[key], rel=1e-5, abs=1e-6), key
    assert flat["forward_tokens"] > 1.5 * tree["forward_tokens"]
    assert flat["speedup_predicted"] == 1
    for name, tensor in ranks[0][stage]["weights"].items():
        torch.testing.assert_close(
            ranks[0][stage]["flat_weights"][name], tensor, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("stage", STAGES)
def test_one_step_on_its_own_policy_has_ratio_one(ranks: list[dict[Any, Any]], stage: int) -> None:
    stats = ranks[0][stage]["single"]
    assert (stats["ratio_mean"], stats["ratio_max"]) == (pytest.approx(1), 1)
    assert stats["clip_low"] == stats["clip_high"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_tokens_takes_part(ranks: list[dict[Any, Any]], stage: int) -> None:
    stats = ranks[1][stage]["nll"]
    assert (stats["optimizer_steps"], stats["packs"], stats["trained_tokens"]) == (1, 2, 5)
    assert stats["loss"] == pytest.approx(ranks[0][0]["nll"]["loss"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_is_bit_identical(ranks: list[dict[Any, Any]], stage: int) -> None:
    for rank in ranks:
        assert rank[stage]["resumed"] == rank[stage]["continued"]
    there, here = ranks[0][stage]["continued_weights"], ranks[0][stage]["resumed_weights"]
    assert any(not torch.equal(t, ranks[0][stage]["weights"][n]) for n, t in there.items())
    for name, tensor in there.items():
        assert torch.equal(tensor, here[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_changes_nothing(ranks: list[dict[Any, Any]], stage: int) -> None:
    for rank in ranks:
        assert rank[stage]["onloaded"]["update"] == rank[stage]["continued"]
        assert rank[stage]["onloaded"]["same checkpoint"]
    there, here = ranks[0][stage]["continued_weights"], ranks[0][stage]["onloaded"]["weights"]
    assert all(torch.equal(tensor, here[name]) for name, tensor in there.items())


@pytest.mark.parametrize("stage", STAGES)
def test_buckets_and_export_hold_the_whole_model(
    ranks: list[dict[Any, Any]], folder: Path, work: Path, stage: int
) -> None:
    assert ranks[1][stage]["exported"] == {}
    saved = load_file(folder / "model.safetensors")
    found = ranks[0][stage]["exported"]
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)

    target = work / f"export_{stage}"
    assert (target / "chat_template.jinja").read_text() == "a template"
    model = AutoModelForCausalLM.from_pretrained(target)
    after = ranks[0][stage]["resumed_weights"]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in after.items())
    assert torch.equal(state["lm_head.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_leaves_the_previous_checkpoint(
    ranks: list[dict[Any, Any]], work: Path, stage: int
) -> None:
    for rank in ranks:
        result = rank[stage]["full_disk"]
        assert all(e.startswith("OSError") and "was not written" in e for e in result["errors"])
        assert result["untouched"]
    assert not list(work.glob(".partial-*"))
    assert not (work / "never").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_to_learn_is_a_no_op_and_nan_an_error(
    ranks: list[dict[Any, Any]], stage: int
) -> None:
    for rank in ranks:
        result = rank[stage]
        assert result["neutral"]["skipped_steps"] == 1
        assert result["neutral"]["optimizer_steps"] == result["empty"]["optimizer_steps"] == 0
        assert result["nan"].startswith("FloatingPointError")
        assert "loss is not finite" in result["nan"]
        assert result["alien"].startswith(f"ValueError: token id {VOCAB}")
        assert result["unchanged"]
        assert 0 < result["after_nan"] < 10


@pytest.mark.parametrize("stage", STAGES)
def test_reference_reset_offload_and_bf16(ranks: list[dict[Any, Any]], stage: int) -> None:
    result = ranks[0][stage]
    # Two epochs: the first equals the reference, the second has moved away.
    assert 0 < result["kl"]["ref_k3"] < 0.1
    assert result["kl"]["optimizer_steps"] == 2
    assert result["reset_step"] == 2
    assert result["reset_moved"] < 1e-7
    for name, tensor in result["weights"].items():
        torch.testing.assert_close(result["offloaded"][name], tensor, rtol=1e-5, atol=1e-6)
    assert result["bf16"]["optimizer_steps"] == 2
    assert result["bf16"]["grad_norm"] == pytest.approx(result["update"]["grad_norm"], rel=0.05)
    assert result["bf16_dtypes"] == {torch.bfloat16}


def test_a_foreign_checkpoint_is_refused(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert rank["other_model"].startswith("ValueError")
        assert "[64, 32]" in rank["other_model"]
        assert "[64, 16]" in rank["other_model"]
        assert "precision fp32, but this learner has bf16" in rank["other_precision"]
        assert "no meta.json" in rank["no_checkpoint"]
