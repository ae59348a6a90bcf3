"""The attention backends against each other, and what they refuse."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tree_packing import ROWS, RULES, TREE, build, weighted
from torch.nn.attention.flex_attention import create_block_mask
from train_trees import train_tree
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from elpo_ray.config.algorithm import Aggregation
from elpo_ray.config.learner import AttentionBackend
from elpo_ray.config.model import Precision
from elpo_ray.forest.layout import PackedForest, lay_out
from elpo_ray.forest.planning import plan
from elpo_ray.learner.attention import IMPLEMENTATION, choose_backend
from elpo_ray.learner.attention import paths as paths_module
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


def dense(packed: PackedForest, window: int | None = None) -> torch.Tensor:
    """The mask by its definition. Shape: [T, T]."""
    place = np.arange(len(packed.ids))
    query, key = place[:, None], place[None]
    seen = (key <= query) & (query < packed.subtree_end[key])
    if window is not None:
        seen &= packed.positions[query] < packed.positions[key] + window
    return torch.from_numpy(seen)


def reference(
    packed: PackedForest, qkv: list[torch.Tensor], scale: float, window: int | None = None
) -> torch.Tensor:
    query, key, value = (t.transpose(0, 1) for t in qkv)
    key, value = (t.repeat_interleave(2, 0) for t in (key, value))
    scores = (query @ key.transpose(1, 2)) * scale
    weights = scores.masked_fill(~dense(packed, window), float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1)


WINDOWS = [None, 1, 2, 17, 40, 1000]
"""Narrower than a node, wider than one, wider than the longest path."""


@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_equal_the_dense_mask_forward_and_backward(window: int | None) -> None:
    packed = forest()
    qkv = tensors(packed)
    out = BlockPlan(packed, CPU, torch.float64).attend(*qkv, 0.3, window)
    want = reference(packed, qkv, 0.3, window)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    above = torch.randn_like(out)
    found = torch.autograd.grad(out, qkv, above)
    for mine, theirs in zip(found, torch.autograd.grad(want, qkv, above), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_layers_of_one_pack_may_have_different_windows() -> None:
    packed = forest()
    qkv = tensors(packed)
    plans = BlockPlan(packed, CPU, torch.float64), FlexPlan(packed, CPU)
    for window in (17, None, 40, 17):
        for made in plans:
            out = made.attend(*(t.detach() for t in qkv), 0.3, window)
            torch.testing.assert_close(out, reference(packed, qkv, 0.3, window).detach())


def test_a_window_bounds_the_keys_that_are_gathered() -> None:
    """A long path costs what its window costs."""
    tree = train_tree(np.random.default_rng(0), [-1, 0], [3000, 40], vocab=50)
    ((items,),) = plan(weighted([tree], Aggregation.token_mean), RULES).ranks
    packed = lay_out(items)
    windowed = BlockPlan(packed, CPU, torch.float64, 64)
    assert sum(len(group.keys) for group in windowed.groups) < 10 * len(packed.ids)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float = 1.0,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """What `varlen_attn` of torch 2.11 computes, with its arguments, one segment at a time: causal,
    aligned to the last key, and with a window within so many keys of the query's own."""
    assert window_size[1] == 0
    parts = []
    for (q0, k0), (q1, k1) in pairwise(zip(cu_seq_q.tolist(), cu_seq_k.tolist(), strict=True)):
        part = [t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1])]
        part[1:] = [t.repeat_interleave(len(query[0]) // len(key[0]), 0) for t in part[1:]]
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        if window_size[0] >= 0:
            seen = seen.triu(k1 - k0 - (q1 - q0) - window_size[0])
        scores = (part[0] @ part[1].transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        parts.append((scores.softmax(-1) @ part[2]).transpose(0, 1))
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
    return torch.cat(parts)


def flash_of_2_13(*qkv_and_lengths: Any, enable_gqa: bool = False, **options: Any) -> torch.Tensor:
    """The same of torch 2.13, which asks whether heads are shared."""
    query, key = qkv_and_lengths[:2]
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return flash(*qkv_and_lengths, **options)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kernel", [flash, flash_of_2_13])
def test_gathered_paths_under_a_causal_mask_are_tree_attention(
    kernel: Any, shared: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths_module, "varlen_attn", kernel)
    packed = forest()
    if not shared:
        ((items,),) = plan([build_chain()], RULES).ranks
        packed = lay_out(items)
    paths = PathPlan.of(packed, CPU)
    assert (paths.keys is None) != shared
    qkv = tensors(packed)
    out, want = paths.attend(*qkv, 0.3, window), reference(packed, qkv, 0.3, window)
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
    flex = FlexPlan(packed, CPU)
    for window in (*WINDOWS, 130):
        out = flex.attend(*qkv, 0.3, window)
        torch.testing.assert_close(out, reference(packed, qkv, 0.3, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 40, 130, 1000])
def test_flex_blocks_of_a_window(window: int) -> None:
    """Whole blocks are seen whole, and nothing that is seen lies outside the chosen ones."""
    trees = weighted([build(0), build(1), build(2)] * 3, Aggregation.token_mean)
    ((items,),) = plan(trees, RULES).ranks
    packed = lay_out(items)
    mask = block_mask(packed, CPU, window)
    count = len(packed.ids)
    chosen = torch.zeros(count, count, dtype=torch.bool)
    whole = torch.zeros(count, count, dtype=torch.bool)
    for name, cover in (("kv", chosen), ("full_kv", whole)):
        for row, number in enumerate(getattr(mask, f"{name}_num_blocks")[0, 0].tolist()):
            for block in getattr(mask, f"{name}_indices")[0, 0, row, :number].tolist():
                cover[row * 128 : (row + 1) * 128, block * 128 : (block + 1) * 128] = True
    seen = dense(packed, window)
    assert not (seen & ~(chosen | whole)).any()
    assert not (whole & ~seen).any()
    assert window > 100 or chosen.sum() < 0.8 * seen.numel()


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


def test_a_model_of_another_attention_is_loaded_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    small().save_pretrained(tmp_path / "plain")
    options = {"max_context": 64, "checkpointing": False}
    plain = load_policy(tmp_path / "plain", Precision.fp32, **options)
    assert plain.takes_trees
    assert not caplog.records
    bloom = load_policy(tmp_path / "bloom", Precision.fp32, **options)
    assert not bloom.takes_trees
    assert "its attention cannot be replaced" in caplog.text


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
