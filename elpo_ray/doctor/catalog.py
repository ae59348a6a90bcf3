"""Which checks a configuration calls for.

Three lists: what every node must have, what needs looking at once because all nodes share it, and
the engines themselves, which take half a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from elpo_ray.config import Config
from elpo_ray.config.algebra import gpus_asked
from elpo_ray.config.memory import model_states
from elpo_ray.doctor import gpus, machine, network, policy, software
from elpo_ray.doctor.finding import Check, Finding
from elpo_ray.learner.saved import starting_folder
from elpo_ray.models.folder import local_folder
from elpo_ray.tasks import make_task

KEPT_AT_ONCE = 1
"""Checkpoints beyond `trainer.keep_checkpoints`: the new one is written before an old one goes."""


def node_checks(config: Config, *, gpu_count: int | None = None, nodes: int = 1) -> list[Check]:
    """What must hold on every one of the `nodes` of a run; `gpu_count`: this node's GPUs, None =
    all that the configuration asks for."""
    states = model_states(config)
    wanted = gpus_asked(config) if gpu_count is None else gpu_count
    with_gpus = config.cluster.gpus
    host = int(states.host / nodes) if states else 0
    weights = int(states.engine) * config.engine.tensor_parallel_size if states else 0
    checks = [
        Check("python", software.interpreter),
        Check("packages", partial(software.packages, with_gpus)),
        Check("vllm plug-in", software.plugin),
        Check("GPUs", partial(gpus.gpus, wanted if with_gpus else 0)),
        Check("memory", partial(machine.memory, host)),
        Check("shared memory", partial(machine.shared_memory, 0 if with_gpus else weights)),
        Check("open files", partial(machine.limits, with_gpus)),
        Check("scratch disk", partial(machine.disk, "scratch disk", machine.ray_folder(), 0)),
        Check("ports", network.own_ports),
        Check("sandbox", partial(policy.sandbox, config)),
        Check("model", partial(policy.model_files, config.model.path)),
    ]
    if not with_gpus:
        checks.insert(4, Check("processor", machine.processor))
    return checks


def shared_checks(config: Config) -> list[Check]:
    """What one look settles for all nodes: the run folder, the data, the chat template."""
    states, trainer = model_states(config), config.trainer
    kept = trainer.keep_checkpoints + KEPT_AT_ONCE
    needed = int(states.checkpoint) * kept if states else 0
    folder = Path(trainer.resume or trainer.run_dir)
    key = "trainer.resume" if trainer.resume else "trainer.run_dir"
    return [
        Check("run folder", partial(machine.writable, "run folder", folder, key)),
        Check("disk", partial(machine.disk, "disk", folder, needed)),
        Check("Ray address", partial(network.ray_address, config.cluster.address)),
        Check("data", partial(policy.data, config)),
        Check("chat template", partial(_template, config)),
    ]


def engine_checks(config: Config) -> list[Check]:
    """Ray, vLLM, DeepSpeed, a sync of weights: the smallest run of the real stack."""
    return [Check("engines", partial(_smallest_run, config))]


def _smallest_run(config: Config) -> Iterator[Finding]:
    # Only now: an import that fails must not hide what the other checks find.
    from elpo_ray.doctor.engines import smallest_run

    yield from smallest_run(config)


def _template(config: Config) -> Iterator[Finding]:
    task = make_task(config.task, config.trainer.seed)
    with tempfile.TemporaryDirectory(prefix="elpo-doctor-") as scratch:  # of the tiny model
        config = replace(config, cold_start=replace(config.cold_start, cache=scratch))
        folder = local_folder(starting_folder(config, task))
        yield from policy.template(config, folder)
        yield from policy.architecture(config, folder)
