"""What a job asks a node for where its configuration leaves it open: processors and memory that
suffice for the actors of the run, from the run's own configuration.
"""

from __future__ import annotations

import math

from elpo_ray.config import Config
from elpo_ray.config.memory import model_states

GIB = 1 << 30
PROCESS = 3 * GIB
"""Host memory of an engine's or a rank's process beside model states: libraries, buffers, trees."""
GPU_PROCESS = 8 * GIB
"""The same where CUDA is loaded and batches are long."""
SANDBOX = GIB // 2
GPU_SANDBOX = 2 * GIB
"""Host memory of a sandbox actor: its sessions and the states that it keeps."""
DRIVER = 2 * GIB
"""Host memory of the driver and of Ray's own processes."""
ENGINE_CPUS, RANK_CPUS = 2, 2
"""Processors beside an engine's GPUs, and beside a rank's."""


def processors(run: Config, nodes: int = 1) -> int:
    """Processors on each of `nodes`: without GPUs the threads of engines and ranks; with GPUs a few
    for each of them and one for each sandbox actor and the driver."""
    cluster = run.cluster
    engines, ranks = cluster.rollout_workers, cluster.learner_ranks
    if cluster.gpus:
        engine = ENGINE_CPUS + run.engine.tensor_parallel_size
        needed = engines * engine + ranks * RANK_CPUS + cluster.sandbox_actors + 1
    else:
        needed = engines * cluster.engine_threads + ranks * cluster.learner_threads
    return math.ceil(needed / nodes)


def memory_gib(run: Config) -> int:
    """GiB of memory for all actors on one node: states of the model, where its size is known, and
    the processes around them."""
    cluster = run.cluster
    process, sandbox = (GPU_PROCESS, GPU_SANDBOX) if cluster.gpus else (PROCESS, SANDBOX)
    states = model_states(run)
    needed = 0.0 if states is None else states.host
    needed += (cluster.rollout_workers + cluster.learner_ranks) * process
    return math.ceil((needed + cluster.sandbox_actors * sandbox + DRIVER) / GIB)
