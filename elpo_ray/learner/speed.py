"""What sharing prefixes saves, predicted from the shapes and measured now and then; MFU."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import numpy as np
import torch
import torch.distributed as dist

from elpo_ray.config.learner import AttentionBackend
from elpo_ray.forest.items import CostModel, Item, PassSize
from elpo_ray.forest.planning import Plan
from elpo_ray.learner.batching import BatchLayout, Inputs, Pack, collate

SHARE_GAIN = {
    AttentionBackend.blocks: 1.05,
    AttentionBackend.paths: 1.1,
    AttentionBackend.flex: 1.1,
}
"""Predicted speed-up from which prefixes are shared; below, the gathering of keys eats it up."""

MEASURE_EVERY = 25
"""Updates between two measurements of the speed-up; each costs four forward passes of a pack."""

PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "H20": 148e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}
"""Dense bf16 FLOP/s by a word of the device's name; the SXM variants'."""


def savings(plans: Sequence[Plan], cost: CostModel) -> dict[str, float]:
    """How much of the flat sequences' work the plans of one update avoid.

    r_tok, r_attn, r_agent: tokens, visible pairs and scored tokens of the flat sequences over those
    of the trees; speedup_predicted: FLOPs of the flat sequences over what is run; repetition:
    share of tokens forwarded more than once.
    """
    flat, unique, actual = (
        reduce(add, (getattr(plan, name) for plan in plans), PassSize())
        for name in ("flat", "unique", "actual")
    )
    if not actual.tokens:
        return {}
    return {
        "r_tok": flat.tokens / unique.tokens,
        "r_attn": flat.pairs / unique.pairs,
        "r_agent": flat.scored / unique.scored,
        "speedup_predicted": cost(flat) / cost(actual),
        "repetition": 1 - unique.tokens / actual.tokens,
    }


def training_flops(plans: Sequence[Plan], cost: CostModel, *, frozen: bool) -> float:
    """FLOPs of one forward and backward pass over the plans, nothing computed twice.

    A matrix product takes as many again for each of the gradients of its factors; `frozen` weights
    (under adapters, whose own share is left out) need none.
    """
    weights = 2.0 if frozen else 3.0
    total = reduce(add, (plan.actual for plan in plans), PassSize())
    products = cost.token * total.tokens + cost.scored * total.scored
    return weights * products + 3.0 * cost.pair * total.pairs


def mfu(flops: float, seconds: float, world_size: int) -> float:
    """Share of the GPUs' peak; 0 where the peak is not known, as on CPU."""
    if not torch.cuda.is_available():
        return 0.0
    words = re.split(r"[\s-]+", torch.cuda.get_device_name())
    peak = next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)
    return 0.0 if peak is None else flops / (seconds * peak * world_size)


def measure(
    forward: Callable[[Inputs], object], packs: Sequence[Pack], layout: BatchLayout, max_tokens: int
) -> float:
    """Seconds of flat sequences over seconds of their tree, forward passes, all ranks together.

    Every rank takes one of its shared items (or a dummy) and must call this. 0 if none has any.
    """
    shared = next((i for pack in packs for i in pack.items if len(i.leaves) > 1), None)
    tree, flat = Pack(), Pack()
    if shared is not None:
        flat.items = _fitting(shared, max_tokens)
        leaves = np.concatenate([item.leaves for item in flat.items])
        here = shared.tree.trains[leaves].any(axis=0)
        tree.items = [Item(shared.shape, leaves, here, leaves)]
    seconds = torch.zeros(2, dtype=torch.float64, device=layout.device)
    for _ in range(2):  # the second time counts
        for i, pack in enumerate((flat, tree)):
            seconds[i] = _seconds(forward, pack, layout)
    if shared is None:
        seconds.zero_()
    dist.all_reduce(seconds)
    return float(seconds[0] / seconds[1]) if seconds[1] > 0 else 0.0


def _fitting(shared: Item, max_tokens: int) -> list[Item]:
    """Leaves of an item as flat sequences, as many as one pack holds."""
    chosen: list[Item] = []
    size = 0
    for leaf in shared.leaves:
        leaves = np.array([leaf])
        item = Item(shared.shape, leaves, shared.tree.trains[leaf], leaves)
        size += item.size.tokens
        if chosen and size > max_tokens:
            break
        chosen.append(item)
    return chosen


def _seconds(forward: Callable[[Inputs], object], pack: Pack, layout: BatchLayout) -> float:
    # On CPU the processor's own time: others' work on the same cores is not ours.
    clock = time.perf_counter if layout.device.type == "cuda" else time.process_time
    _synchronize(layout.device)
    start = clock()
    with torch.no_grad():
        forward(collate(pack, layout).inputs)
    _synchronize(layout.device)
    return clock() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
