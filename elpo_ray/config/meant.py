"""Which key a user meant by one that does not exist: a key of the same name in another section, the
name that another framework has for it, or a near spelling.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

ELSEWHERE: dict[str, tuple[str, ...]] = {
    # the length of a run and its batches
    "max_steps": ("trainer.steps",),
    "steps": ("trainer.steps",),
    "num_train_epochs": ("trainer.steps",),
    "total_epochs": ("trainer.steps",),
    "total_training_steps": ("trainer.steps",),
    "train_batch_size": ("trainer.inputs_per_step",),
    "limit": ("problems", "task.eval_problems"),
    "num_problems": ("problems", "task.eval_problems"),
    "batch_size": ("trainer.inputs_per_step", "cold_start.batch_size"),
    "gradient_accumulation_steps": ("learner.minibatch_inputs",),
    "ppo_mini_batch_size": ("learner.minibatch_inputs",),
    "ppo_max_token_len_per_gpu": ("learner.max_tokens_per_pack",),
    "num_iterations": ("learner.epochs",),
    "ppo_epochs": ("learner.epochs",),
    "num_generations": ("algorithm.growth.n_total", "growth.n_total", "n"),
    "rollouts_per_example": ("algorithm.growth.n_total", "growth.n_total", "n"),
    "group_size": ("algorithm.growth.n_total", "growth.n_total"),
    "rollout.n": ("algorithm.growth.n_total", "growth.n_total"),
    "num_samples": ("n",),
    "n_samples": ("n",),
    # models and lengths
    "model_name_or_path": ("model.path", "model"),
    "model_name": ("model.path", "model"),
    "pretrained": ("model.path", "model"),
    "dtype": ("model.precision", "precision"),
    "bf16": ("model.precision", "precision"),
    "max_completion_length": ("model.max_context", "max_context"),
    "max_prompt_length": ("model.max_context", "max_context"),
    "max_response_length": ("model.max_context", "max_context"),
    "max_model_len": ("model.max_context", "max_context"),
    "seq_len": ("model.max_context", "max_context"),
    "max_tokens": ("task.max_turn_tokens", "cold_start.max_tokens"),
    "max_new_tokens": ("task.max_turn_tokens",),
    "max_assistant_turns": ("task.max_turns",),
    "lora_r": ("learner.lora.rank",),
    "lora_rank": ("learner.lora.rank",),
    "lora_alpha": ("learner.lora.alpha",),
    # optimizer and loss
    "learning_rate": ("learner.optimizer.lr",),
    "lr_scheduler_type": ("learner.optimizer.schedule",),
    "max_grad_norm": ("learner.optimizer.grad_norm",),
    "grad_clip": ("learner.optimizer.grad_norm",),
    "beta": ("algorithm.loss.kl_coef", "loss.kl_coef"),
    "kl_loss_coef": ("algorithm.loss.kl_coef", "loss.kl_coef"),
    "epsilon": ("algorithm.clip.eps_low", "clip.eps_low"),
    "clip_ratio_low": ("algorithm.clip.eps_low", "clip.eps_low"),
    "clip_ratio": ("algorithm.clip.eps_low", "clip.eps_low"),
    "epsilon_high": ("algorithm.clip.eps_high", "clip.eps_high"),
    "clip_ratio_high": ("algorithm.clip.eps_high", "clip.eps_high"),
    "loss_type": ("algorithm.loss.aggregation", "loss.aggregation"),
    "loss_agg_mode": ("algorithm.loss.aggregation", "loss.aggregation"),
    "max_async_level": ("schedule.staleness",),
    # data and rewards
    "dataset_name": ("task.train_file", "tasks"),
    "train_files": ("task.train_file",),
    "val_files": ("task.eval_file",),
    "test_files": ("task.eval_file",),
    "reward_funcs": ("task.reward.name",),
    "reward_function": ("task.reward.name",),
    "custom_reward_function": ("task.reward.name",),
    "benchmarks": ("tasks",),
    # what is kept, and who watches
    "output_dir": ("trainer.run_dir", "out"),
    "default_local_dir": ("trainer.run_dir", "out"),
    "save_steps": ("trainer.checkpoint_every",),
    "save_freq": ("trainer.checkpoint_every",),
    "save_total_limit": ("trainer.keep_checkpoints",),
    "eval_steps": ("trainer.eval_every",),
    "test_freq": ("trainer.eval_every",),
    "experiment_name": ("trainer.run_name",),
    "project_name": ("logging.project",),
    "report_to": ("logging.trackers",),
    "logger": ("logging.trackers",),
    "resume_from_checkpoint": ("trainer.resume",),
    "resume_from": ("trainer.resume",),
    "dry_run": ("check_only",),
    # machines
    "tensor_model_parallel_size": ("engine.tensor_parallel_size",),
    "vllm_tensor_parallel_size": ("engine.tensor_parallel_size",),
    "vllm_gpu_memory_utilization": ("engine.gpu_memory_utilization",),
    "n_gpus_per_node": ("cluster.learner_ranks", "gpus_per_node"),
    "num_gpus": ("cluster.learner_ranks", "gpus_per_node"),
    "num_workers": ("cluster.rollout_workers", "workers"),
    "cpus_per_task": ("cpus_per_node",),
    "mem": ("memory",),
    "gres": ("gpus_per_node",),
    "job_name": ("name",),
}
"""Keys of TRL, verl, prime-rl and Slurm, by their last part or the last two, and what they are
called here: the first of these names that a schema has."""


SAID = {
    "reward.function": "write task.reward=module:function",
    "use_vllm": "every engine is vLLM already; leave it out",
    "deepspeed": "the learner runs under DeepSpeed already; instead of its file choose "
    "learner.zero_stage and learner.offload_optimizer",
    "adv_estimator": "choose an algorithm as a whole, as in algorithm=grpo (docs/algorithms.md)",
    "per_device_train_batch_size": "in problems, not completions, learner.minibatch_inputs is an "
    "optimizer step, trainer.inputs_per_step a training step",
}
"""Keys of others and of earlier versions that no one key stands for, by their last part or the last
two, and what to do instead."""


def said(key: str) -> str | None:
    """What to do instead of a key that no one key stands for."""
    *parents, name = key.split(".")
    return SAID.get(".".join([*parents[-1:], name]), SAID.get(name))


def example(root: type) -> str:
    """A key with a value, as a command with this schema takes them."""
    return "trainer.steps=20" if "trainer.steps" in keys(root) else "problems=5"


@cache
def keys(root: type) -> tuple[str, ...]:
    """Every key of a schema that takes a value, dotted."""
    return tuple(_keys(root, ""))


def meant(key: str, root: type) -> list[str]:
    """The keys of a schema that an unknown one may stand for, the likeliest first; at most three,
    none if nothing is like it."""
    *parents, name = key.split(".")
    known = keys(root)
    for part in (".".join([*parents[-1:], name]), name):
        there = [target for target in ELSEWHERE.get(part, ()) if target in known]
        if there:
            return there[:1]
    same = [each for each in known if each.rpartition(".")[2] == name]
    within = [each for each in same if parents and each.startswith(f"{parents[0]}.")]
    if same:
        return (within or same)[:3]
    prefix = "".join(f"{part}." for part in parents)
    here = {each[len(prefix) :].split(".")[0] for each in known if each.startswith(prefix)}
    near = difflib.get_close_matches(name, sorted(here), n=3)
    if near or here:
        return [prefix + each for each in near] or _spelled_like(name, known)
    return _spelled_like(name, known)


def kind_of(key: str, root: type) -> Any:
    """The type of a key; None for one that the schema does not have."""
    kind: Any = root
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return kind


def _spelled_like(name: str, known: tuple[str, ...]) -> list[str]:
    """The keys, anywhere in a schema, whose last part is nearly `name`."""
    lasts = sorted({each.rpartition(".")[2] for each in known})
    near = difflib.get_close_matches(name, lasts, n=1, cutoff=0.8)
    return [each for each in known if each.rpartition(".")[2] in near][:3]


def _keys(section: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(section)
    for field in fields(section):
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name
