"""What a run takes of its devices, by arithmetic: states, activations, cache, and hours.

The bytes of a parameter and of a token were counted in the tensors of real updates
(`tests/gpu/test_gpu_learner.py` compares the sum with a peak that is measured).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from elpo_ray.config import Config
from elpo_ray.config.model import Precision
from elpo_ray.config.shapes import ModelShape, shape_of

RESERVE = 3 << 29
"""Bytes that a process takes of a GPU beside its tensors: CUDA itself, NCCL, gaps; also what an
engine keeps while it sleeps."""
HEAD_CHUNK = 3 * 4 * (1 << 26)
"""Bytes of the logits that the learner's output head holds at once on a GPU, three copies in fp32
(`learner.policy.CHUNK_ELEMENTS`)."""
REDUCED_AT_ONCE = 500_000_000
"""Most numbers in DeepSpeed's buffer of gradients."""
ENGINE_TOKENS = 8192
"""Tokens of one step of vLLM while a prompt is read."""
GPU_GIB = {"24 GB": 23.5, "40 GB": 39.4, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.8}
"""GiB that torch finds on cards that are sold with so much: RTX 4090, A100, L40S, H100, H200."""

PEAK = 989e12
"""Dense bf16 FLOP/s of an H100."""
UPDATE_SHARE, SAMPLING_SHARE = 0.35, 0.10
"""Shares of it on which `hours` counts; stated with the result, not measured."""


@dataclass(frozen=True, slots=True)
class ModelStates:
    """Bytes of weights, gradients and optimizer between two steps."""

    rank: float
    """Bytes on each learner rank's device."""
    engine: float
    """Bytes on each device of an engine."""
    host: float
    """Bytes of host memory that all actors take together, were they on one node."""
    checkpoint: float
    """Bytes of one checkpoint on disk."""


def number_bytes(config: Config) -> int:
    """Bytes of a number in the model's precision."""
    return 2 if config.model.precision is Precision.bf16 else 4


def model_states(config: Config) -> ModelStates | None:
    """None where the number of parameters is not known."""
    shape = shape_of(config.model)
    if shape is None:
        return None
    count, width = shape.parameters, number_bytes(config)
    cluster, ranks = config.cluster, config.cluster.learner_ranks
    trained = _trained(config, count)
    offload = config.learner.offload_optimizer
    optimizer = trained * (12 if width == 2 else 8)
    rank = _weights_a_rank(config, trained) + _gradients_kept(config, trained)
    rank += 0 if offload else optimizer / (ranks if config.learner.zero_stage >= 1 else 1)
    engine = width / config.engine.tensor_parallel_size
    host: float = ranks * width + offload * optimizer  # each rank loads the whole model once
    if cluster.colocated:  # the states of the side that is not on the GPU
        host += ranks * max(rank, width)
    if not cluster.gpus:
        host = ranks * rank + cluster.rollout_workers * width
    cache = 0 if cluster.gpus else (cluster.rollout_workers * config.engine.kv_cache_gib) << 30
    adapters = config.learner.adapters is not None
    return ModelStates(
        rank=count * rank,
        engine=count * engine,
        host=count * host + cache,
        checkpoint=count * (12 * trained + width * adapters),
    )


def adapter_share(count: float, rank: int) -> float:
    """Adapters' parameters over the model's, about: rank * (in + out) over in * out, for a
    transformer of 12 * width**2 parameters a layer and as many layers as width / 128."""
    width = math.cbrt(count * 128 / 12)
    return 2 * rank / width


def _trained(config: Config, count: float) -> float:
    adapters = config.learner.adapters
    return 1.0 if adapters is None else adapter_share(count, adapters.rank or 0)


def _weights_a_rank(config: Config, trained: float) -> float:
    """Bytes a parameter."""
    ranks = config.cluster.learner_ranks if config.learner.zero_stage >= 3 else 1
    return (1 + trained * (config.learner.adapters is not None)) * number_bytes(config) / ranks


def _gradients_kept(config: Config, trained: float) -> float:
    """Bytes a parameter that DeepSpeed does not give back between two steps: in bf16 the fp32 sums
    of stages 1 and 3, and stage 3's own gradients."""
    stage, ranks = config.learner.zero_stage, config.cluster.learner_ranks
    if number_bytes(config) == 4:
        return 4.0 * trained / (ranks if stage >= 2 else 1)
    return trained * {0: 0.0, 1: 4.0, 2: 0.0, 3: 6.0 / ranks}[stage]


# --- one learner rank at its peak -----------------------------------------------------------------


def token_bytes(shape: ModelShape, width: int) -> float:
    """Bytes that one layer keeps of one token for its backward pass: four times the MLP's neurons,
    the hidden state and its normed copies, queries, keys, values and what attention returned."""
    hidden = 16 if width == 2 else 26
    return 4 * width * shape.intermediate + hidden * shape.hidden + 2 * width * (
        shape.query + shape.key
    )  # fmt: skip


def activations(config: Config, shape: ModelShape) -> float:
    """Bytes of a rank's activations and of its output head, in a pack of `max_tokens_per_pack`."""
    width, tokens = number_bytes(config), config.learner.max_tokens_per_pack
    layer = token_bytes(shape, width) * tokens
    head = min(HEAD_CHUNK, 12 * tokens * shape.vocabulary) + shape.vocabulary * shape.hidden * (
        (4 + width) if config.learner.adapters is None else 0
    )
    if not config.gradient_checkpointing:
        return shape.layers * layer + head
    kept = shape.layers * tokens * shape.hidden * width
    backward = tokens * width * (3 * shape.intermediate + 4 * shape.hidden)
    return kept + max(head, layer + backward)


def step_bytes(config: Config, shape: ModelShape) -> float:
    """Bytes that an optimizer step needs for a moment: gradients as they come, and in fp32."""
    width, stage = number_bytes(config), config.learner.zero_stage
    count, ranks = shape.parameters, config.cluster.learner_ranks
    trained = count * _trained(config, count)
    arriving = min(trained, REDUCED_AT_ONCE) * width
    if width == 4:
        return arriving + 4 * trained / (ranks if stage >= 1 else 1)
    return {
        0: 6 * trained,
        1: arriving,
        2: 8 * trained / ranks + arriving,
        3: 4 * trained / ranks + arriving,
    }[stage]


def rank_peak(config: Config, shape: ModelShape) -> float:
    """Most bytes of tensors on a learner rank's device."""
    states = model_states(config)
    assert states is not None, "its shape is known"
    gathered = 0.0
    if config.learner.zero_stage == 3 and config.cluster.learner_ranks > 1:
        largest = max(shape.vocabulary * shape.hidden, shape.parameters / shape.layers)
        gathered = 2 * number_bytes(config) * largest
    return states.rank + gathered + max(activations(config, shape), step_bytes(config, shape))


# --- whether it fits ------------------------------------------------------------------------------


class Shortage(StrEnum):
    """What may be too large for a GPU."""

    rank = "a learner rank"
    cache = "an engine's weights and cache"
    beside = "an engine beside the resting learner"


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run lies on GPUs of one size."""

    rank: float
    """Bytes of a learner rank at its peak, with what it takes beside its tensors."""
    engine: float
    """Bytes that an engine may take."""
    cache: float
    """Bytes of them for keys and values; below 0 if not even the weights fit."""
    contexts: float
    """Whole contexts that the cache holds."""
    missing: tuple[Shortage, ...]
    """What does not fit; empty if all does."""


def fit(config: Config, shape: ModelShape, gpu_bytes: float) -> Fit:
    """How the run lies on GPUs with so many bytes."""
    width, shared = number_bytes(config), config.cluster.colocated
    tensor = config.engine.tensor_parallel_size
    rank = rank_peak(config, shape) + RESERVE
    engine = config.engine.gpu_memory_utilization * gpu_bytes
    reading = ENGINE_TOKENS * width * (4 * shape.intermediate + 4 * shape.hidden) / tensor
    logits = 3 * 4 * config.engine.max_num_seqs * shape.vocabulary
    cache = engine - shape.parameters * width / tensor - reading - logits - RESERVE
    context = config.model.max_context * shape.cache_bytes(width) / tensor
    missing = {
        Shortage.rank: rank + (RESERVE if shared else 0) > gpu_bytes,
        Shortage.cache: cache < context,
        Shortage.beside: shared and engine + RESERVE > gpu_bytes,
    }
    return Fit(rank, engine, cache, cache / context, tuple(k for k, v in missing.items() if v))


# --- how long it takes ----------------------------------------------------------------------------


def hours(config: Config, shape: ModelShape) -> float:
    """Hours of updates and sampling on H100s at `UPDATE_SHARE` and `SAMPLING_SHARE` of their peak,
    without shared prefixes, tool calls and evaluations."""
    cluster, task = config.cluster, config.task
    leaves = config.trainer.inputs_per_step * config.algorithm.growth.n_total
    tokens = leaves * min(task.expected_episode_tokens, config.model.max_context)
    engines = cluster.rollout_workers * config.engine.tensor_parallel_size
    sampling = 2 * shape.active * tokens / (engines * SAMPLING_SHARE * PEAK)
    passes = 4 + (2 if config.gradient_checkpointing else 0)
    if config.learner.adapters is None:
        passes += 2
    old = 2 if config.optimizer_steps > config.trainer.steps else 0
    updates = (passes * config.learner.epochs + old) * shape.active * tokens
    updates /= cluster.learner_ranks * UPDATE_SHARE * PEAK
    return config.trainer.steps * (sampling + updates) / 3600
