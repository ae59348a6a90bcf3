"""Trees against flat sequences through every architecture that is checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import tiny_model
from test_tree_packing import ROWS, RULES, TREE, build, weighted

from elpo_ray.config.algorithm import Aggregation
from elpo_ray.config.model import TinyArchitecture
from elpo_ray.forest.items import Item
from elpo_ray.forest.planning import plan
from elpo_ray.learner.attention import IMPLEMENTATION
from elpo_ray.learner.batching import BatchLayout, Pack, collate
from elpo_ray.learner.policy import PolicyModule

CONTEXT = 64
"""The longest path has more tokens than the windows, a quarter of this."""


def gradient(
    model: Any, packs: list[list[Item]], layout: BatchLayout
) -> tuple[float, torch.Tensor]:
    """Value and gradient of the weighted negative log-likelihood, over all packs."""
    model.set_attn_implementation("sdpa" if layout.backend is None else IMPLEMENTATION)
    policy = PolicyModule(model)
    policy.zero_grad()
    total = 0.0
    for items in packs:
        batch = collate(Pack(items), layout)
        loss = -(policy(batch.inputs, 0.7)[0] * batch.columns.weight).sum()
        loss.backward()
        total += loss.item()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert len(grads) == sum(1 for _ in model.parameters())
    return total, torch.cat(grads)


def compare(model: Any, dtype: torch.dtype) -> None:
    model = model.to(dtype).train()
    trees = weighted([build(i) for i in range(3)], Aggregation.seq_mean_token_mean)
    (packs,) = plan(trees, replace(RULES, max_tokens=75)).ranks
    flat = replace(RULES, share_gain=None, padded=True, max_tokens=100)
    alone = [[item] for pack in plan(trees, flat).ranks[0] for item in pack]
    assert max(item.size.tokens for (item,) in alone) > CONTEXT // 4
    loss, found = gradient(model, packs, replace(TREE, dtype=dtype))
    want_loss, want = gradient(model, alone, replace(ROWS, dtype=dtype))
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert (found - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("architecture", TinyArchitecture)
def test_trees_equal_flat_sequences(architecture: TinyArchitecture) -> None:
    """float64, but for the norms, which detour over fp32, and for experts, whose kernel has fp32 at
    most."""
    experts = architecture is TinyArchitecture.qwen3_moe
    compare(tiny_model(architecture, CONTEXT), torch.float32 if experts else torch.float64)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "phi3"])
def test_architectures_that_may_slide(architecture: str) -> None:
    """Some layers of a Qwen, all of a Phi-3."""
    slides: dict[str, Any] = {"sliding_window": CONTEXT // 4}
    if architecture != "phi3":
        slides |= {"use_sliding_window": True, "max_window_layers": 1}
    compare(tiny_model(TinyArchitecture(architecture), CONTEXT, **slides), torch.float64)


def test_a_window_changes_the_gradient() -> None:
    """Hence the test above sees whether it is obeyed."""
    (tree,) = weighted([build(0)], Aggregation.token_mean)
    (packs,) = plan([tree], RULES).ranks
    found = []
    for context in (CONTEXT, 100 * CONTEXT):
        model = tiny_model(TinyArchitecture.gemma3, context).double().train()
        found.append(gradient(model, packs, TREE)[1])
    assert (found[0] - found[1]).norm() / found[1].norm() > 1e-2


def test_a_layer_that_hides_its_window_is_refused() -> None:
    (tree,) = weighted([build(0)], Aggregation.token_mean)
    (packs,) = plan([tree], RULES).ranks
    model: Any = tiny_model(TinyArchitecture.gemma3, CONTEXT).double()
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(ValueError, match=r"asks for a window of None tokens where .* says 16"):
        gradient(model, packs, TREE)
