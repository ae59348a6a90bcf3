"""The attention backends against each other, and what they refuse."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_tree_packing import ROWS, RULES, TREE, build, weighted
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3NextConfig,
)

from elpo_ray.config.algorithm import Aggregation
from elpo_ray.config.learner import AttentionBackend
from elpo_ray.config.model import Precision
from elpo_ray.forest.layout import PackedForest, lay_out
from elpo_ray.forest.planning import plan
from elpo_ray.learner.attention import IMPLEMENTATION, choose_backend, why_not
from elpo_ray.learner.attention.blocks import BlockPlan
from elpo_ray.learner.attention.flex import FlexPlan, block_mask
from elpo_ray.learner.attention.paths import PathPlan
from elpo_ray.learner.batching import Pack, collate
from elpo_ray.learner.policy import PolicyModule, load_policy

CPU = torch.device("cpu")


def forest() -> PackedForest:
    trees = weighted([build(0), build(1), build(2)], Aggregation.token_mean)
    ((items,),) = plan(trees, RULES).ranks
    return lay_out(items)


def tensors(packed: PackedForest, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query with 4 heads, key and value with 2, of width 8."""
    torch.manual_seed(0)
    count = len(packed.ids)
    return [torch.randn(count, n, 8, dtype=dtype, requires_grad=True) for n in (4, 2, 2)]


def dense(packed: PackedForest) -> torch.Tensor:
    """The mask by its definition. Shape: [T, T]."""
    place = np.arange(len(packed.ids))
    query, key = place[:, None], place[None]
    return torch.from_numpy((key <= query) & (query < packed.subtree_end[key]))


def reference(packed: PackedForest, qkv: list[torch.Tensor], scale: float) -> torch.Tensor:
    query, key, value = (t.transpose(0, 1) for t in qkv)
    key, value = (t.repeat_interleave(2, 0) for t in (key, value))
    scores = (query @ key.transpose(1, 2)) * scale
    weights = scores.masked_fill(~dense(packed), float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1)


def test_blocks_equal_the_dense_mask_forward_and_backward() -> None:
    packed = forest()
    qkv = tensors(packed)
    out = BlockPlan.of(packed, CPU, torch.float64).attend(*qkv, 0.3)
    want = reference(packed, qkv, 0.3)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    above = torch.randn_like(out)
    found = torch.autograd.grad(out, qkv, above)
    for mine, theirs in zip(found, torch.autograd.grad(want, qkv, above), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_gathered_paths_under_a_causal_mask_are_tree_attention(shared: bool) -> None:
    """What flash attention computes of the path plan, one segment at a time."""
    packed = forest()
    if not shared:
        ((items,),) = plan([build_chain()], RULES).ranks
        packed = lay_out(items)
    paths = PathPlan.of(packed, CPU)
    assert (paths.keys is None) != shared
    qkv = tensors(packed)
    query, key, value = qkv[0], paths.gather(qkv[1]), paths.gather(qkv[2])
    parts = []
    spans = zip(paths.query_starts.tolist(), paths.key_starts.tolist(), strict=True)
    for (q0, k0), (q1, k1) in pairwise(spans):
        part = [t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1])]
        part[1:] = [t.repeat_interleave(2, 0) for t in part[1:]]
        causal = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        scores = (part[0] @ part[1].transpose(1, 2) * 0.3).masked_fill(~causal, float("-inf"))
        parts.append((scores.softmax(-1) @ part[2]).transpose(0, 1))
        assert q1 - q0 <= paths.longest_query
        assert k1 - k0 <= paths.longest_key
    out, want = torch.cat(parts), reference(packed, qkv, 0.3)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    above = torch.randn_like(out)
    found = torch.autograd.grad(out, qkv, above)
    for mine, theirs in zip(found, torch.autograd.grad(want, qkv, above), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def build_chain() -> object:
    return weighted([build(2)], Aggregation.token_mean)[0]


def test_copies_of_a_key_add_up_in_full_precision() -> None:
    """In bf16, 1 + 300 * 2^-9 would stay 1 if summed one by one."""
    keys = np.array([0] + [1] * 301, dtype=np.int32)
    paths = PathPlan(np.array([0, 1, 2], np.int32), keys, np.array([0, 1, 302], np.int32))
    tokens = torch.zeros(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    above = torch.full((302, 1, 1), 2.0**-9, dtype=torch.bfloat16)
    above[1] = 1
    (grad,) = torch.autograd.grad(paths.gather(tokens), tokens, above)
    assert grad.flatten().tolist() == [2.0**-9, 1.5859375]


def test_flex_mask_and_its_blocks() -> None:
    trees = weighted([build(0), build(1), build(2)] * 3, Aggregation.token_mean)
    ((items,),) = plan(trees, RULES).ranks
    packed = lay_out(items)
    assert len(packed.ids) > 3 * 128
    mine = block_mask(packed, CPU)
    seen = dense(packed)
    count = len(packed.ids)
    theirs = create_block_mask(lambda b, h, q, k: seen[q, k], None, None, count, count, "cpu")
    for name in ("kv", "full_kv"):
        counts = getattr(theirs, f"{name}_num_blocks")
        torch.testing.assert_close(getattr(mine, f"{name}_num_blocks"), counts)
        for row, number in enumerate(counts[0, 0].tolist()):
            rows = (getattr(m, f"{name}_indices")[0, 0, row, :number] for m in (mine, theirs))
            assert len({tuple(sorted(r.tolist())) for r in rows}) == 1
    qkv = [t.detach() for t in tensors(packed, torch.float32)]
    out = FlexPlan.of(packed, CPU).attend(*qkv, 0.3)
    torch.testing.assert_close(out, reference(packed, qkv, 0.3), rtol=1e-4, atol=1e-5)


def small() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def test_trees_under_a_stock_attention_are_refused() -> None:
    (tree,) = weighted([build(0)], Aggregation.token_mean)
    ((items,),) = plan([tree], RULES).ranks
    model = small().double()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="'sdpa': cannot read tree positions"):
        PolicyModule(model)(collate(Pack(items), TREE).inputs, 1.0)
    model.set_attn_implementation(IMPLEMENTATION)
    chain = build_chain()
    ((items,),) = plan([chain], RULES).ranks  # type: ignore[list-item]
    with pytest.raises(ValueError, match="needs a forest"):
        PolicyModule(model)(collate(Pack(items), ROWS).inputs, 1.0)
    with pytest.raises(ValueError, match="needs a tree_plan"):
        model(torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen2Config(), None),
        (Qwen3Config(), None),
        (Qwen3NextConfig(), "linear_attention layers"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=1), "sliding_attention layers"),
        (MistralConfig(sliding_window=4096), "slides over 4096 tokens"),
        (BloomConfig(), "attention cannot be replaced"),
        (MambaConfig(), "linear_attention layers"),
        (
            Qwen2Config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "longest sequence",
        ),
    ],
)
def test_models_that_cannot_be_trained_on_trees_say_why(
    config: PretrainedConfig, reason: str | None
) -> None:
    found = why_not(AutoModelForCausalLM._model_mapping[type(config)], config)
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and reason in found)


def test_such_a_model_is_loaded_with_its_own_attention(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "sliding")
    small().save_pretrained(tmp_path / "plain")
    plain = load_policy(tmp_path / "plain", Precision.fp32, checkpointing=False)
    assert plain.takes_trees
    assert not caplog.records
    sliding = load_policy(tmp_path / "sliding", Precision.fp32, checkpointing=False)
    assert not sliding.takes_trees
    assert "its attention slides over 8 tokens" in caplog.text


def test_backends_are_chosen_by_what_can_run() -> None:
    cuda, half, full = torch.device("cuda"), torch.bfloat16, torch.float32
    auto, paths, flex = AttentionBackend.auto, AttentionBackend.paths, AttentionBackend.flex
    assert choose_backend(auto, 128, cuda, half) is paths
    assert choose_backend(auto, 512, cuda, half) is AttentionBackend.blocks
    assert choose_backend(auto, 128, cuda, full) is AttentionBackend.blocks
    assert choose_backend(auto, 128, CPU, full) is AttentionBackend.blocks
    assert choose_backend(flex, 128, cuda, full) is flex
    with pytest.raises(ValueError, match=r"learner\.attention='paths': .* use auto"):
        choose_backend(paths, 128, CPU, half)
    with pytest.raises(ValueError, match=r"learner\.attention='flex': .* use auto"):
        choose_backend(flex, 128, CPU, half)
