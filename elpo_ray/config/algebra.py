"""The numbers that follow from a configuration: leaves, tokens, passes, devices, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elpo_ray.config import Config
from elpo_ray.config.model import Precision, TinyModelConfig


def batch_algebra(config: Config) -> str:
    """The numbers that follow from a configuration, for a person to read."""
    trainer, learner, cluster, task = config.trainer, config.learner, config.cluster, config.task
    growth = config.algorithm.growth
    leaves = trainer.inputs_per_step * growth.n_total
    tokens = leaves * min(task.expected_episode_tokens, config.model.max_context)
    optimizer_steps = trainer.inputs_per_step // learner.minibatch_inputs * learner.epochs
    ranks = cluster.learner_ranks
    packs = -(-tokens // (learner.max_tokens_per_pack * ranks))
    rows = [
        ("experiment", config.experiment),
        ("algorithm", f"{config.algorithm.name}: growth {growth.rule}, credit "
         f"{config.algorithm.credit.rule}, ELC scope {config.algorithm.clip.scope.value}"),
        ("inputs a step", f"{trainer.inputs_per_step}"),
        *_sampling(config),
        ("leaves a step", f"{trainer.inputs_per_step} inputs x {growth.n_total} = {leaves}"),
        ("tokens a step", f"{leaves} leaves x {tokens // leaves} expected = {tokens:,} "
         f"(at most {leaves * config.model.max_context:,})"),
        ("packs a rank", f"{tokens:,} tokens / {ranks} ranks / {learner.max_tokens_per_pack:,} "
         f"= {packs} forward passes"),
        ("optimizer steps", f"{trainer.inputs_per_step} inputs / {learner.minibatch_inputs} a "
         f"mini-batch x {learner.epochs} epochs = {optimizer_steps} a step, "
         f"{optimizer_steps * trainer.steps} in {trainer.steps} steps"),
        ("run", f"{trainer.steps} steps = {trainer.steps * leaves:,} rollouts of "
         f"{trainer.steps * trainer.inputs_per_step:,} inputs"),
        *_devices(config),
        *_memory(config),
    ]  # fmt: skip
    return "\n".join(f"{name:>16}  {text}" for name, text in rows)


def gpus_asked(config: Config, *, learner: bool = True, engines: bool = True) -> int:
    """GPUs of the parts that are there: one a learner rank, `tensor_parallel_size` an engine."""
    if not config.cluster.gpus:
        return 0
    if config.cluster.colocated:
        return config.cluster.learner_ranks
    serving = config.cluster.rollout_workers * config.engine.tensor_parallel_size
    return serving * engines + config.cluster.learner_ranks * learner


def cold_start_algebra(config: Config) -> str:
    """The numbers of a supervised run, for a person to read."""
    settings, learner = config.cold_start, config.learner
    longest = settings.max_tokens or config.model.max_context
    optimizer = settings.optimizer
    ranks = config.cluster.learner_ranks
    rows = [
        ("experiment", f"{config.experiment}, cold start"),
        ("data", f"demonstrations of task {config.task.name}, {settings.epochs} epochs"),
        ("batch", f"{settings.batch_size} conversations an optimizer step, loss on the assistant's "
         "tokens"),
        ("tokens a step", f"at most {settings.batch_size} x {longest:,} = "
         f"{settings.batch_size * longest:,}, {'cut' if settings.cut_longer else 'left out'} if "
         "longer"),
        ("packs a rank", f"at most {settings.batch_size * longest:,} tokens / {ranks} ranks / "
         f"{learner.max_tokens_per_pack:,} = "
         f"{-(-settings.batch_size * longest // (learner.max_tokens_per_pack * ranks))}"),
        ("optimizer", f"AdamW, lr {optimizer.lr:g} {optimizer.schedule.value}, warm-up "
         f"{optimizer.warmup_ratio:.0%}, betas {tuple(optimizer.betas)}, weight decay "
         f"{optimizer.weight_decay:g}"),
        ("learner", f"{ranks} ranks (ZeRO-{learner.zero_stage}), "
         f"{gpus_asked(config, engines=False) or 'no'} GPUs"),
        *_memory(config)[:1],
    ]  # fmt: skip
    return "\n".join(f"{name:>16}  {text}" for name, text in rows)


def _sampling(config: Config) -> list[tuple[str, str]]:
    """What an algorithm changes of how inputs and episodes are sampled."""
    growth, wanted, rows = config.algorithm.growth, config.trainer.inputs_per_step, []
    if growth.dynamic.max_batches:
        batch = growth.dynamic.batch_factor * wanted
        most = growth.dynamic.max_batches * batch
        rows.append(("dynamic sampling", f"{batch} inputs at a time until {wanted} have contrast, "
                     f"at most {most} inputs = {most * growth.n_total:,} leaves a step; below: of "
                     f"the {wanted} that are trained on"))  # fmt: skip
    if growth.max_tool_calls:
        stages = len(growth.max_tool_calls)
        steps = [-(-i * config.trainer.steps // stages) for i in range(stages)]
        turns = ", ".join(f"{config.train_turns(s) - 1} from step {s + 1}" for s in steps)
        rows.append(("tool calls", f"at most {turns} (the algorithm's {growth.max_tool_calls}, the "
                     f"task needs {config.task.tool_calls_needed})"))  # fmt: skip
    return rows


def _devices(config: Config) -> list[tuple[str, str]]:
    cluster = config.cluster
    actors = (
        f"{cluster.rollout_workers} rollout workers, {cluster.learner_ranks} learner ranks "
        f"(ZeRO-{config.learner.zero_stage}), {cluster.sandbox_actors} sandbox actors"
    )
    if not cluster.gpus:
        return [("actors", actors), ("GPUs", "none: engines and learner run on CPU")]
    tensor = config.engine.tensor_parallel_size
    if cluster.colocated:
        share = config.engine.gpu_memory_utilization
        return [
            ("actors", actors),
            (
                "GPUs",
                f"{gpus_asked(config)}, each of an engine (with {share:.0%} of the memory) "
                "and a learner rank in turns",
            ),
        ]
    return [
        ("actors", actors),
        ("GPUs", f"{gpus_asked(config)} = {cluster.rollout_workers} engines x {tensor} "
         f"+ {cluster.learner_ranks} learner ranks x 1"),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelStates:
    """Bytes of weights, gradients and optimizer; activations and KV cache come on top."""

    rank: float
    """Bytes on each learner rank's device."""
    engine: float
    """Bytes on each device of an engine."""
    host: float
    """Bytes of host memory that all actors take together, were they on one node."""
    checkpoint: float
    """Bytes of one checkpoint on disk."""


def model_states(config: Config) -> ModelStates | None:
    """None where the number of parameters is not known."""
    count = config.model.num_parameters
    if config.model.path is None:
        count = tiny_parameters(config.model.tiny)
    if count is None:
        return None
    weight_bytes = 2 if config.model.precision is Precision.bf16 else 4
    cluster, stage = config.cluster, config.learner.zero_stage
    ranks = cluster.learner_ranks
    adapters = config.learner.adapters
    trained = 1.0 if adapters is None else adapter_share(count, adapters.rank or 0)
    # Weights and gradients in the model's precision; master weights and two moments in fp32.
    optimizer = trained * (12 if weight_bytes == 2 else 8)
    offload = config.learner.offload_optimizer
    rank = (1 + trained * (adapters is not None)) * weight_bytes / (ranks if stage >= 3 else 1)
    rank += trained * weight_bytes / (ranks if stage >= 2 else 1)
    rank += 0 if offload else optimizer / (ranks if stage >= 1 else 1)
    engine = weight_bytes / config.engine.tensor_parallel_size
    host: float = ranks * weight_bytes + offload * optimizer  # each rank loads the whole model once
    if cluster.colocated:  # the states of the side that is not on the GPU
        host += ranks * max(rank, weight_bytes)
    if not cluster.gpus:
        host = ranks * rank + cluster.rollout_workers * weight_bytes
    cache = 0 if cluster.gpus else (cluster.rollout_workers * config.engine.kv_cache_gib) << 30
    return ModelStates(
        rank=count * rank,
        engine=count * engine,
        host=count * host + cache,
        checkpoint=count * (12 * trained + weight_bytes * (adapters is not None)),
    )


def adapter_share(count: float, rank: int) -> float:
    """Adapters' parameters over the model's, about: rank * (in + out) over in * out, for a
    transformer of 12 * width**2 parameters a layer and as many layers as width / 128."""
    width = math.cbrt(count * 128 / 12)
    return 2 * rank / width


def _memory(config: Config) -> list[tuple[str, str]]:
    """Model states only: activations and KV cache come on top."""
    states = model_states(config)
    if states is None:
        return [("memory", "unknown: set model.num_parameters to see model states a device")]
    learner, engine = states.rank / 2**30, states.engine / 2**30
    return [
        ("learner memory", f"{learner:,.2f} GiB of model states a rank, activations on top"),
        ("engine memory", f"{engine:,.2f} GiB of weights a device, KV cache on top"),
    ]


def tiny_parameters(shape: TinyModelConfig) -> int:
    """Parameters of a Qwen2 with tied embeddings and biases on query, key and value."""
    hidden = shape.hidden_size
    key_value = hidden // shape.num_heads * shape.num_kv_heads
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * key_value + key_value)
    block = attention + 3 * hidden * shape.intermediate_size + 2 * hidden
    return shape.vocab_size * hidden + shape.num_layers * block + hidden
