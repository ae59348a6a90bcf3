"""Learner ranks as processes, and what they are given: a tiny model, random trees."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from elpo_ray.config.algorithm import LossConfig
from elpo_ray.config.learner import LearnerConfig, LrSchedule, OptimizerConfig
from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.forest.trees import TrainForest, TrainTree, demonstrations, leaf_weights
from elpo_ray.learner.backend import LearnerSettings, RankProcess
from elpo_ray.learner.loss import Objective, TokenBatch, surrogate_loss
from elpo_ray.learner.rank import LearnerRank
from elpo_ray.learner.stats import UpdateStats
from tests.train_trees import token_columns, train_tree

VOCAB = 64
OPTIMIZER = OptimizerConfig(
    lr=1e-3, betas=(0.9, 0.99), grad_norm=0.05, schedule=LrSchedule.linear, warmup_ratio=0.3
)
TOTAL_STEPS = 20


def build_model(folder: Path, hidden: int = 32) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("a template")
    return folder


def build_tree(seed: int) -> TrainTree:
    """A random tree: prompt, two first steps, two leaves below each."""
    rng = np.random.default_rng(seed)
    return train_tree(rng, [-1, 0, 0, 1, 1, 2, 2], rng.integers(3, 17, 7).tolist(), vocab=VOCAB)


def build_forest(trees: int = 6, minibatch: int = 3, seed: int = 0) -> TrainForest:
    """Weighted per mini-batch, by Eq. 1."""
    minibatches = []
    for first in range(0, trees, minibatch):
        part = [build_tree(seed * 100 + i) for i in range(first, first + minibatch)]
        counts = [int(t.agent[s].sum()) for t in part for s in t.sequences()]
        weights = np.split(leaf_weights(counts, LossConfig()), len(part))
        minibatches.append([replace(t, leaf_weight=w) for t, w in zip(part, weights, strict=True)])
    return TrainForest(minibatches=minibatches)


def one_row() -> TrainForest:
    return demonstrations([(list(range(9)), [False] * 4 + [True] * 5)], batch_size=1)


def settings(stage: int, max_tokens: int = 80, **changes: Any) -> LearnerSettings:
    learner = LearnerConfig(
        zero_stage=stage, max_tokens_per_pack=max_tokens, minibatch_inputs=3, optimizer=OPTIMIZER
    )
    for key in ("gradient_checkpointing", "offload_optimizer", "epochs", "packing", "lora"):
        setattr(learner, key, changes.pop(key, getattr(learner, key)))
    precision = changes.pop("precision", Precision.fp32)
    return LearnerSettings(model=ModelConfig(precision=precision), learner=learner, **changes)


def updated(
    learner: LearnerRank, forest: TrainForest, objective: Objective = Objective.surrogate
) -> UpdateStats:
    """`LearnerRank.update` to its end."""
    *_, stats = learner.update(forest, objective)
    assert isinstance(stats, UpdateStats)
    return stats


def weights(learner: LearnerRank, max_bytes: int = 5000) -> dict[str, torch.Tensor]:
    """All buckets together; empty but on rank 0."""
    whole: dict[str, torch.Tensor] = {}
    for bucket in learner.weight_buckets(max_bytes):
        size = sum(t.numel() * t.element_size() for t in bucket.values())
        assert len(bucket) <= 1 or size <= max_bytes
        assert not whole.keys() & bucket.keys()
        whole |= {name: tensor.clone() for name, tensor in bucket.items()}
    return whole


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (ValueError, OSError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def timeless(stats: dict[str, Any]) -> dict[str, Any]:
    clocks = ("learner_seconds", "learner_tokens_per_s", "speedup_measured")
    return {key: value for key, value in stats.items() if key not in clocks}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


IMPORTED = [
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
    "peft",
    "transformers.models.qwen2.modeling_qwen2",
    __name__,
]
"""Imported once, by the process that ranks are forked from."""


def start_ranks(
    main: Callable[..., Any], world_size: int, work: Path, *arguments: Any
) -> list[BaseProcess]:
    """`main(process, *arguments)` on each of `world_size` ranks, each a process."""
    work.mkdir(parents=True, exist_ok=True)
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(IMPORTED)
    os.environ["DS_ACCELERATOR"] = "cpu"  # chosen when DeepSpeed is imported
    processes: list[BaseProcess] = [
        context.Process(target=rank_main, args=(main, rank, world_size, port, work, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    del os.environ["DS_ACCELERATOR"]
    return processes


def run_ranks(main: Callable[..., Any], world_size: int, work: Path, *arguments: Any) -> list[Any]:
    """What `main(process, *arguments)` returns on each of `world_size` ranks, each a process."""
    processes = start_ranks(main, world_size, work, *arguments)
    for process in processes:
        process.join(timeout=400)
        if process.is_alive():
            process.kill()
    errors = "\n".join(f.read_text() for f in sorted(work.glob("error_*.txt")))
    assert all(p.exitcode == 0 for p in processes), errors
    return [torch.load(work / f"results_{r}.pt", weights_only=False) for r in range(world_size)]


def rank_main(
    main: Callable[..., Any], rank: int, world_size: int, port: int, work: Path, arguments: Any
) -> None:
    gc.freeze()  # DeepSpeed collects garbage for each engine of stage 3: half a second of imports
    torch.set_num_threads(1)
    process = RankProcess(rank=rank, world_size=world_size, master_port=port, timeout_s=120)
    try:
        torch.save(main(process, *arguments), work / f"results_{rank}.pt")
        torch.distributed.barrier()  # nobody leaves while another one still talks
    except BaseException:
        (work / f"error_{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # in an orderly end threads of gloo now and then abort the process


# --- plain torch ------------------------------------------------------------------------------


class Plain:
    """The same updates in plain torch: one sequence at a time, full logits, whole loss at once."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.adam = torch.optim.AdamW(
            self.model.parameters(), betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay
        )
        self.norms: list[float] = []
        self.losses: list[float] = []

    def logp(self, tree: TrainTree, tokens: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(tree.ids[tokens].astype(np.int64))
        logits = self.model(ids[None]).logits[0, :-1].log_softmax(-1)
        picked = logits.gather(1, ids[1:, None])[:, 0]
        return picked[torch.from_numpy(tree.agent[tokens][1:])]

    def rows(self, trees: list[TrainTree]) -> list[tuple[TrainTree, np.ndarray, float]]:
        return [
            (t, s, float(w))
            for t in trees
            for s, w in zip(t.sequences(), t.leaf_weight, strict=True)
        ]

    def old(self, trees: list[TrainTree]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.logp(tree, tokens) for tree, tokens, _ in self.rows(trees)]

    def loss(self, trees: list[TrainTree], old: list[torch.Tensor]) -> torch.Tensor:
        cfg, losses = settings(0), []
        for (tree, tokens, weight), before in zip(self.rows(trees), old, strict=True):
            trained = tokens[tree.agent[tokens]]
            node = tree.token_node[trained]
            columns = token_columns(
                weight=torch.full((len(trained),), weight, dtype=self.dtype),
                advantage=torch.tensor(tree.advantage[node], dtype=self.dtype),
                clip_low=torch.tensor(tree.clip_low[node], dtype=self.dtype),
                rollout_logp=before,
            )
            batch = TokenBatch(columns=columns, old_logp=before, entropy=before)
            losses.append(surrogate_loss(self.logp(tree, tokens), batch, cfg.clip, cfg.loss)[0])
        return torch.stack(losses).sum()

    def update(self, forest: TrainForest, first_step: int = 0) -> None:
        old = [self.old(trees) for trees in forest.minibatches]
        for i, trees in enumerate(forest.minibatches):
            self.adam.zero_grad()
            loss = self.loss(trees, old[i])
            loss.backward()
            self.losses.append(loss.item())
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.grad_norm)
            self.norms.append(float(norm))
            step = first_step + i
            # Warm-up over 6 of 20 steps.
            self.adam.param_groups[0]["lr"] = OPTIMIZER.lr * (step + 1) / 7
            self.adam.step()
