"""What a cluster has, looked at before anything is started on it."""

from __future__ import annotations

import socket

from elpo_ray.config import Config
from elpo_ray.config.algebra import gpus_asked
from elpo_ray.config.rules import require

ANSWER_S = 10.0
"""Seconds that a Ray cluster may take to accept a connection."""


def check_gpus(config: Config, there: int, *, learner: bool = True, engines: bool = True) -> None:
    """Raise ValueError if the run asks for more GPUs than `there` are."""
    cluster = config.cluster
    asked = gpus_asked(config, learner=learner, engines=engines)
    where = "this machine" if cluster.address is None else "the Ray cluster"
    require(
        asked <= there,
        "cluster.gpus",
        cluster.gpus,
        f"{asked} GPUs asked for ({cluster.rollout_workers * engines} rollout workers, "
        f"{cluster.learner_ranks * learner} learner ranks) but {where} has {there}; "
        "lower cluster.rollout_workers or cluster.learner_ranks, or use cluster=local",
    )


def check_address(address: str) -> None:
    """Raise ValueError if nothing answers at HOST:PORT, for which Ray would wait for minutes. What
    other forms name is found when it is joined."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()) or "/" in address:
        return
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
