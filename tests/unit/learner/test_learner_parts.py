"""The learner's parts that need no process group: head, batching, learning rate."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from elpo_ray.config.learner import AttentionBackend, LrSchedule, OptimizerConfig
from elpo_ray.forest.items import CostModel
from elpo_ray.forest.planning import Rules, plan
from elpo_ray.forest.trees import TrainForest, demonstrations
from elpo_ray.learner import policy, speed
from elpo_ray.learner.backend import learning_rate, restart
from elpo_ray.learner.batching import BatchLayout, Pack, collate
from elpo_ray.learner.policy import LogProbHead
from elpo_ray.learner.stats import entropy_moments


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 8])
def test_chunked_head_equals_full_logits(
    monkeypatch: pytest.MonkeyPatch, bias: bool, rows: int
) -> None:
    monkeypatch.setitem(policy.CHUNK_ELEMENTS, "cpu", 3 * 11)  # 3 rows a chunk
    torch.manual_seed(0)
    linear = nn.Linear(5, 11, bias=bias).double()
    hidden = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (rows,))
    coefficients = torch.randn(rows, dtype=torch.float64)
    parameters = [hidden, *linear.parameters()]

    logp, entropy = LogProbHead(linear)(hidden, targets, 1 / 0.7)
    found = torch.autograd.grad((logp * coefficients).sum(), parameters)
    full = torch.log_softmax(linear(hidden) / 0.7, -1)
    expected = torch.autograd.grad(
        (full[torch.arange(rows), targets] * coefficients).sum(), parameters
    )
    torch.testing.assert_close(logp, full[torch.arange(rows), targets])
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    assert not entropy.requires_grad
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def forest(lengths: list[int]) -> TrainForest:
    conversations = [
        (list(range(10, 10 + n)), [False] + [i % 3 != 0 for i in range(1, n)]) for n in lengths
    ]
    return demonstrations(conversations, batch_size=len(conversations))


def peak_bytes() -> int:
    """This program's peak: `ru_maxrss` would begin with what the parent held when it started it."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def send_head_peak(sender: Connection, rows: int) -> None:
    """Send the bytes that a head of 150k entries adds to this process's peak, both ways."""
    head = LogProbHead(nn.Linear(64, 150_000, bias=False))
    hidden = torch.randn(rows, 64, requires_grad=True)
    targets = torch.randint(150_000, (rows,))
    head.weight.grad = torch.zeros_like(head.weight)
    before = peak_bytes()
    head(hidden, targets, 1.0)[0].sum().backward()
    sender.send(peak_bytes() - before)


def test_the_head_of_a_large_vocabulary_takes_little_memory() -> None:
    """All logits of these rows would be 614 MB, and their gradient as much again."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_head_peak, args=(sender, 1024))
    process.start()
    process.join()
    assert 0 < receiver.recv() < 300e6


COST = CostModel(token=100.0, pair=1.0, scored=10.0)
ROWS = BatchLayout(torch.device("cpu"), None)


def rules(**changes: Any) -> Rules:
    base = Rules(
        max_tokens=100,
        world_size=1,
        cost=COST,
        share_gain=None,
        padded=True,
        needs_advantage=False,
    )
    return replace(base, **changes)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(1, 4))
def test_a_plan_holds_every_row_once_within_the_budget(lengths: list[int], world: int) -> None:
    trees = forest(lengths).minibatches[0]
    ranks = plan(trees, rules(max_tokens=40, world_size=world)).ranks
    assert len({len(packs) for packs in ranks}) == 1
    placed = [item for packs in ranks for pack in packs for item in pack]
    assert sorted(id(item.tree) for item in placed) == sorted(map(id, trees))
    for packs in ranks:
        for pack in packs:
            assert len(pack) * max((item.size.tokens for item in pack), default=0) <= 40
    loads = [sum(COST(i.size) for pack in packs for i in pack) for packs in ranks]
    assert max(loads) - min(loads) <= max(COST(item.size) for item in placed)


def test_a_row_over_the_budget_is_named() -> None:
    (trees,) = forest([30]).minibatches
    with pytest.raises(ValueError, match=r"learner\.max_tokens_per_pack=20: a sequence has 2\d"):
        plan(trees, rules(max_tokens=20))


def test_a_pack_of_rows_predicts_each_trained_token_from_the_one_before() -> None:
    ((items,),) = plan(forest([6, 4]).minibatches[0], rules()).ranks
    batch = collate(Pack(items), ROWS)
    # Agent tokens of the first are at 1, 2, 4, 5 and of the second at 1, 2; cut after the last.
    assert batch.inputs.ids.tolist() == [[10, 11, 12, 13, 14], [10, 11, 0, 0, 0]]
    assert batch.inputs.targets.tolist() == [11, 12, 14, 15, 11, 12]
    assert batch.inputs.predicted_from.tolist() == [0, 1, 3, 4, 5, 6]
    assert batch.columns.weight.tolist() == pytest.approx([1 / 6] * 6)


def test_sequences_without_advantage_are_left_out_only_where_it_matters() -> None:
    (trees,) = forest([6]).minibatches
    neutral = plan(trees, rules(needs_advantage=True))
    assert neutral.empty
    assert neutral.ranks == [[]]
    assert not plan(trees, rules()).empty


@pytest.mark.parametrize("backend", [None, AttentionBackend.blocks])
def test_a_dummy_has_no_weight(backend: AttentionBackend | None) -> None:
    ranks = plan(forest([6]).minibatches[0], rules(world_size=2)).ranks
    assert ranks[1] == [[]]
    dummy = collate(Pack(ranks[1][0]), BatchLayout(torch.device("cpu"), backend))
    assert dummy.columns.weight.tolist() == [0]
    assert len(dummy.inputs.predicted_from) == 1


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_mfu_by_hand(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    """One sequence of 5 forwarded tokens with 15 visible pairs, 4 of them scored."""
    planned = plan(forest([6]).minibatches[0], rules())
    assert vars(planned.actual) == {"tokens": 5, "pairs": 15, "scored": 4}
    whole = speed.training_flops([planned, planned], COST, frozen=False)
    assert whole == 2 * 3 * (100 * 5 + 15 + 10 * 4)
    frozen = speed.training_flops([planned], COST, frozen=True)
    assert frozen == 2 * (100 * 5 + 10 * 4) + 3 * 15
    assert speed.mfu(whole, 0.5, 4) == 0, "no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    expected = 0 if peak is None else whole / 2 / peak
    assert speed.mfu(whole, 0.5, 4) == pytest.approx(expected)


def test_learning_rates_by_hand() -> None:
    def rates(schedule: LrSchedule, warmup: float) -> list[float]:
        cfg = OptimizerConfig(lr=8.0, schedule=schedule, warmup_ratio=warmup)
        return [learning_rate(cfg, step, 4) for step in range(6)]

    assert rates(LrSchedule.constant, 0.0) == [8.0] * 6
    assert rates(LrSchedule.linear, 0.0) == [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]
    assert rates(LrSchedule.constant, 0.5) == pytest.approx([8 / 3, 16 / 3, 8, 8, 8, 8])
    cosine = rates(LrSchedule.cosine, 0.0)
    assert cosine == pytest.approx([4 * (1 + math.cos(math.pi * k / 4)) for k in range(4)] + [0, 0])


def test_an_optimizer_that_starts_again_steps_like_a_new_one() -> None:
    def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
        weight.grad = torch.tensor([0.3, -0.2])
        optimizer.step()

    cfg = OptimizerConfig(lr=0.1, betas=(0.8, 0.9))
    old, new = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    used = torch.optim.AdamW([old], lr=1.0)
    for _ in range(3):
        step(used, old)
    restart(used, cfg)
    with torch.no_grad():
        old.copy_(new)
    fresh = torch.optim.AdamW([new], lr=0.1, betas=(0.8, 0.9), weight_decay=cfg.weight_decay)
    step(used, old)
    step(fresh, new)
    np.testing.assert_allclose(old.detach(), new.detach(), rtol=1e-6)


def test_entropy_moments_over_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted mean and sample deviation; two ranks with equal packs count twice."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(2))
    entropy = [torch.tensor([0.5, 1.0, 9.0]), torch.tensor([3.0])]
    weight = [torch.tensor([0.1, 0.1, 0.0]), torch.tensor([0.1])]
    copies = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0])]
    mean, deviation = entropy_moments(list(zip(entropy, weight, copies, strict=True)))
    counted = np.array([0.5, 1.0, 3.0] * 2)
    assert float(mean) == pytest.approx(counted.mean())
    assert float(deviation) == pytest.approx(counted.std(ddof=1))
    flat = [(torch.full((4,), 0.7), torch.full((4,), 0.25), torch.ones(4))]
    assert [float(x) for x in entropy_moments(flat)] == pytest.approx([0.7, 1.0])
    # A token that two leaves share counts like two tokens.
    shared = [(torch.tensor([0.5, 1.0]), torch.tensor([0.2, 0.1]), torch.tensor([2.0, 1.0]))]
    apart = [(torch.tensor([0.5, 0.5, 1.0]), torch.full((3,), 0.1), torch.ones(3))]
    same = [[float(x) for x in entropy_moments(packs)] for packs in (shared, apart)]
    assert same[0] == pytest.approx(same[1])


def test_signed_parts_and_shares_reach_the_pack() -> None:
    (tree,) = forest([4]).minibatches[0]
    tree = replace(
        tree,
        advantage=np.array([0.0, 0.0]),
        negative_advantage=np.array([0.0, 2.0]),
        share=np.array([1.0, 0.25]),
    )
    # Pulled both ways is not untrained.
    ((items,),) = plan([tree], rules(needs_advantage=True)).ranks
    columns = collate(Pack(items), ROWS).columns
    assert columns.negative_advantage.tolist() == [2.0] * len(columns.weight)
    assert columns.weight.tolist() == pytest.approx([tree.leaf_weight[0] / 4] * len(columns.weight))
