"""The numbers that follow from a configuration: leaves, tokens, passes, devices, memory."""

from __future__ import annotations

from elpo_ray.config import Config
from elpo_ray.config.memory import (
    GPU_GIB,
    PEAK,
    SAMPLING_SHARE,
    UPDATE_SHARE,
    activations,
    fit,
    hours,
    model_states,
    number_bytes,
    rank_peak,
)
from elpo_ray.config.remedies import remedy
from elpo_ray.config.shapes import ModelShape, shape_of

GIB = 1 << 30
CARD = "80 GB"
"""The kind of GPU that `check_only` speaks of."""


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


def _memory(config: Config) -> list[tuple[str, str]]:
    """What a device holds, and on GPUs whether it fits and how long the run takes."""
    shape, states = shape_of(config.model), model_states(config)
    if shape is None or states is None:
        remedy = "name a local folder with model.path, or set model.num_parameters"
        return [("memory", f"unknown: {remedy}")]
    guessed = "" if shape.exact else ", other sizes guessed from them"
    rows = [
        ("learner memory", f"{states.rank / GIB:,.2f} GiB of model states a rank, "
         f"{activations(config, shape) / GIB:,.2f} GiB of activations in a full pack, "
         f"{rank_peak(config, shape) / GIB:,.2f} GiB at the peak"),
        ("engine memory", f"{states.engine / GIB:,.2f} GiB of weights a device, "
         f"{shape.cache_bytes(number_bytes(config)) / 1024:,.1f} KiB of cache a token"),
        ("parameters", f"{shape.parameters:.4g}{guessed}"),
    ]  # fmt: skip
    return [*rows, *_on_gpus(config, shape)] if config.cluster.gpus else rows


def _on_gpus(config: Config, shape: ModelShape) -> list[tuple[str, str]]:
    rows = [(f"fits {CARD}", fits(config, shape, CARD))]
    needed = hours(config, shape)
    long = f"about {needed:,.1f} hours" if needed >= 1 else f"about {60 * needed:.0f} minutes"
    if needed < 1 / 60:
        long = "less than a minute"
    rows.append(
        ("time", f"{long} of arithmetic in updates and sampling, at {UPDATE_SHARE:.0%} and "
         f"{SAMPLING_SHARE:.0%} of an H100's {PEAK / 1e12:.0f} TFLOP/s; starts, turns of small "
         "batches, tools, evaluations and shared prefixes are not counted")
    )  # fmt: skip
    return rows


def fits(config: Config, shape: ModelShape, card: str) -> str:
    """Whether the run fits on GPUs of this kind of `GPU_GIB`, and how, for a person to read."""
    total = GPU_GIB[card]
    lies = fit(config, shape, total * GIB)
    sizes = (
        f"a learner rank takes {lies.rank / GIB:.1f} GiB of {total}, an engine "
        f"{lies.engine / GIB:.1f} GiB"
    )
    if not lies.missing:
        return f"yes: {sizes}, its cache holds {lies.contexts:,.1f} whole contexts"
    told = (f"{name}: {remedy(name, config, shape, total * GIB)}" for name in lies.missing)
    return f"no: {sizes}; too little for {'; and for '.join(told)}"
