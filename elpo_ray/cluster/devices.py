"""What a cluster has, looked at before anything is started on it."""

from __future__ import annotations

import os
import socket
from importlib.metadata import version

from elpo_ray.config import Config
from elpo_ray.config.algebra import gpus_asked
from elpo_ray.config.rules import require

PROCESSES_EACH, LEAST_PROCESSES = 4, 8
"""Processes of a run without GPUs, for each processor and on any machine, that are let start."""
ANSWER_S = 10.0
"""Seconds that a Ray cluster may take to accept a connection."""


def check_gpus(config: Config, there: int, *, learner: bool = True, engines: bool = True) -> None:
    """Raise ValueError if the run asks for more GPUs than `there` are."""
    cluster = config.cluster
    asked = gpus_asked(config, learner=learner, engines=engines)
    where = "this machine" if cluster.address is None else "the Ray cluster"
    remedy = "lower cluster.rollout_workers or cluster.learner_ranks, or use cluster=local"
    if there == 0:
        place = "on a machine" if cluster.address is None else "in a Ray cluster"
        remedy = f"run it {place} with NVIDIA GPUs and their driver, or on CPU with cluster=local"
    require(
        asked <= there,
        "cluster.gpus",
        cluster.gpus,
        f"{asked} GPUs asked for ({cluster.rollout_workers * engines} rollout workers, "
        f"{cluster.learner_ranks * learner} learner ranks) but {where} has {there}; "
        f"{remedy}",
    )


def check_build(config: Config) -> None:
    """Raise ValueError if the run uses this machine's GPUs and the packages here are those for CPU,
    which would be found only once the actors start."""
    if config.cluster.gpus and config.cluster.address is None:
        build = version("torch")
        require(
            not build.endswith("+cpu"),
            "cluster.gpus",
            config.cluster.gpus,
            f"torch {build} is built for CPU; make clean, then make TARGET=gpu install",
        )


def check_processors(
    config: Config, there: int, *, learner: bool = True, engines: bool = True
) -> None:
    """Raise ValueError if a run without GPUs asks for far more processes than `there` are
    processors: each would hold a model, and none would come to its turn."""
    cluster = config.cluster
    counts = {
        "learner_ranks": cluster.learner_ranks * learner,
        "rollout_workers": cluster.rollout_workers * engines,
    }
    key = max(counts, key=lambda name: counts[name])
    require(
        sum(counts.values()) <= max(LEAST_PROCESSES, PROCESSES_EACH * there),
        f"cluster.{key}",
        getattr(cluster, key),
        f"{counts['rollout_workers']} rollout workers and {counts['learner_ranks']} learner ranks "
        f"are too many for the {there} processors of this machine; lower it to {there} or less, or "
        "join a Ray cluster with cluster.address=HOST:PORT",
    )


def processors_here() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def check_address(address: str) -> None:
    """Raise ValueError if an address has no form that Ray knows, or if nothing answers at
    HOST:PORT, for which Ray would wait for minutes. What `auto` and URLs (ray://…) name is found
    when it is joined."""
    if address in ("auto", "local") or "://" in address:
        return
    host, colon, port = address.rpartition(":")
    known = host and colon and port.isdecimal() and "/" not in address
    form = "write HOST:PORT as ray start --head prints it, auto for the cluster that runs on this"
    require(bool(known), "cluster.address", address, f"{form} machine, or null for a new one")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as fault:
        raise ValueError(
            f"cluster.address={address!r}: nothing answers there ({fault}); start Ray with "
            "ray start --head and give the address that it prints, or leave the key out"
        ) from None


def gpus_here() -> int:
    """The GPUs that a Ray started on this machine would have; it looks in the same way."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    if manager is None:
        return 0
    count: int = manager.get_current_node_num_accelerators()
    visible = manager.get_current_process_visible_accelerator_ids()
    return count if visible is None else min(count, len(visible))
