"""Which probes a configuration calls for.

Three lists: what every node must have, what needs looking at once because all nodes share it, and
the engines themselves, which take half a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from elpo_ray.checks import gpus_asked, model_states
from elpo_ray.config import Config
from elpo_ray.model_folder import local_folder
from elpo_ray.probes import gpus, machine, network, policy, software
from elpo_ray.probes.finding import Finding, Probe

KEPT_AT_ONCE = 1
"""Checkpoints beyond `trainer.keep_checkpoints`: the new one is written before an old one goes."""


def node_probes(config: Config, *, gpu_count: int | None = None, nodes: int = 1) -> list[Probe]:
    """What must hold on every one of the `nodes` of a run; `gpu_count`: this node's GPUs, None =
    all that the configuration asks for."""
    states = model_states(config)
    wanted = gpus_asked(config) if gpu_count is None else gpu_count
    with_gpus = config.cluster.gpus
    host = int(states.host / nodes) if states else 0
    weights = int(states.engine) * config.engine.tensor_parallel_size if states else 0
    probes = [
        Probe("python", software.interpreter),
        Probe("packages", partial(software.packages, with_gpus)),
        Probe("vllm plug-in", software.plugin),
        Probe("GPUs", partial(gpus.gpus, wanted if with_gpus else 0)),
        Probe("memory", partial(machine.memory, host)),
        Probe("shared memory", partial(machine.shared_memory, 0 if with_gpus else weights)),
        Probe("open files", partial(machine.limits, with_gpus)),
        Probe("scratch disk", partial(machine.disk, "scratch disk", machine.ray_folder(), 0)),
        Probe("ports", network.own_ports),
        Probe("sandbox", partial(policy.sandbox, config)),
        Probe("model", partial(policy.model_files, config.model.path)),
    ]
    if not with_gpus:
        probes.insert(4, Probe("processor", machine.processor))
    return probes


def shared_probes(config: Config) -> list[Probe]:
    """What one look settles for all nodes: the run folder, the data, the chat template."""
    states, trainer = model_states(config), config.trainer
    kept = trainer.keep_checkpoints + KEPT_AT_ONCE
    needed = int(states.checkpoint) * kept if states else 0
    folder = Path(trainer.resume or trainer.run_dir)
    key = "trainer.resume" if trainer.resume else "trainer.run_dir"
    return [
        Probe("run folder", partial(machine.writable, "run folder", folder, key)),
        Probe("disk", partial(machine.disk, "disk", folder, needed)),
        Probe("Ray address", partial(network.ray_address, config.cluster.address)),
        Probe("data", partial(policy.data, config)),
        Probe("chat template", partial(_template, config)),
    ]


def engine_probes(config: Config) -> list[Probe]:
    """Ray, vLLM, DeepSpeed, a sync of weights: the smallest run of the real stack."""
    return [Probe("engines", partial(_smallest_run, config))]


# What may be broken here is imported only when it is its turn.


def _smallest_run(config: Config) -> Iterator[Finding]:
    from elpo_ray.probes.engines import smallest_run

    yield from smallest_run(config)


def _template(config: Config) -> Iterator[Finding]:
    from elpo_ray.cold_start import base_model
    from elpo_ray.tasks import make_task

    task = make_task(config.task, config.trainer.seed)
    with tempfile.TemporaryDirectory(prefix="elpo-doctor-") as scratch:  # of the tiny model
        config = replace(config, cold_start=replace(config.cold_start, cache=scratch))
        yield from policy.template(config, local_folder(base_model(config, task)))
