"""Ray itself: started or joined, its actors placed, and gone at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from elpo_ray.cluster.devices import check_gpus
from elpo_ray.cluster.learner import LearnerActor, LearnerGroup
from elpo_ray.cluster.rollout_actor import RolloutActor
from elpo_ray.cluster.rollouts import RolloutGroup, Spawn
from elpo_ray.cluster.sandboxes import SandboxActor
from elpo_ray.cluster.sharing import DeviceSharing
from elpo_ray.cluster.tool_actors import ToolActor
from elpo_ray.cluster.user_code import UserCode, copies, packed
from elpo_ray.cluster.waits import learner_losses, wait_for
from elpo_ray.config import Config
from elpo_ray.tools.variables import named

Waiting = Callable[[str], AbstractContextManager[None]]
"""It takes what is waited for, and returns a context for the time of the wait."""
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""On CPU engine and learner share the cores: idle threads must sleep, not spin."""


class Cluster:
    """Ray for the length of a `with` block: started or joined, its actors gone at the end."""

    def __init__(self, config: Config, *, learner: bool = True, engines: bool = True) -> None:
        """`learner`, `engines`: which of them will be asked for. Raises ValueError if there is no
        cluster to join or, with Ray shut down again, if it has too few GPUs for them."""
        self.config = config
        self._actors: list[ActorHandle[Any]] = []
        self._placements: list[PlacementGroup] = []
        self._rollouts: RolloutGroup | None = None
        self._ranks: list[ActorHandle[Any]] = []
        self._spawn_rank: Spawn | None = None
        self._sharing = DeviceSharing(shared=config.cluster.colocated)
        self._placed: PlacementGroup | None = None
        """Where devices are shared: one place for each pair of an engine and a learner rank."""
        self._learners = 0
        """Groups of learner ranks so far."""
        cluster = config.cluster
        joins, variables = cluster.address is not None, {} if cluster.gpus else PATIENT_THREADS
        if not joins:  # a new Ray inherits them, and the workers that it starts beforehand serve us
            os.environ.update(variables)
        if ray.is_initialized():
            raise ValueError(
                "Ray runs in this process already; call ray.shutdown() first, and set "
                "cluster.address=auto to join a running cluster"
            )
        self._user = UserCode(objects=packed(config), variables=named(config.task.env))
        try:
            with copies(config.task.modules if joins else []) as modules:
                brought = {"env_vars": variables, "py_modules": modules}
                context = ray.init(
                    address=cluster.address or "local",  # None would join what RAY_ADDRESS names
                    include_dashboard=None if joins else cluster.dashboard,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    runtime_env={k: v for k, v in brought.items() if v} if joins else None,
                )
        except ConnectionError as fault:
            raise ValueError(
                f"cluster.address={cluster.address!r}: no Ray cluster there "
                f"({' '.join(str(fault).split())[:200]}); start one with ray start --head, or "
                "leave the key out"
            ) from fault
        self.watched = _watched(context.dashboard_url, ray.get_runtime_context().gcs_address)
        """How a person looks at the cluster, as a line."""
        try:
            there = int(ray.cluster_resources().get("GPU", 0))
            check_gpus(config, there, learner=learner, engines=engines)
        except ValueError:
            ray.shutdown()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rollouts is not None:
            self._rollouts.close()
        for actor in self._actors:
            ray.kill(actor)
        for group in self._placements:
            remove_placement_group(group)
        ray.shutdown()

    def _get(self, refs: Any, phase: str, actor: str) -> Any:
        return wait_for(refs, self.config.cluster.start_timeout_s, f"{phase} of {actor}")

    def learner(self, folder: Path, total_steps: int) -> LearnerGroup:
        """All learner ranks, with the weights of `folder`; earlier ones are ended. Raises
        LearnerLost if one dies."""
        config, count = self.config, self.config.cluster.learner_ranks
        for rank in self._ranks:
            ray.kill(rank)
        self._sharing.learner.is_gone()
        if self._spawn_rank is None:
            self._spawn_rank = self._spawner("learner", LearnerActor, count, 1.0, 1)
        ranks = [self._spawn_rank(rank, self._learners) for rank in range(count)]
        self._ranks, self._learners = ranks, self._learners + 1
        with self._sharing.for_learner(), learner_losses("start"):
            master = self._get(ranks[0].rendezvous.remote(), "start", "learner-0")
            starts = [
                actor.start.remote(config, str(folder), rank, master, total_steps)
                for rank, actor in enumerate(ranks)
            ]
            self._get(starts, "start", "the learner")
        return LearnerGroup(ranks, config.cluster.call_timeout_s, self._sharing)

    def rollouts(self, folder: Path) -> RolloutGroup:
        """All rollout workers, their engines serving `folder` as version 0, and the sandboxes."""
        with self._sharing.for_new_engine():
            return self._start_rollouts(folder)()

    def both(
        self, folder: Path, total_steps: int, learner: LearnerGroup | None, waiting: Waiting
    ) -> tuple[LearnerGroup, RolloutGroup]:
        """`learner` and `rollouts`, unless there is such a learner already: side by side, one after
        the other where they share devices. Each wait is inside `waiting(…)`."""
        ready = None if self._sharing.shared else self._start_rollouts(folder)
        with waiting("starting the learner"):
            learner = learner or self.learner(folder, total_steps)
        with waiting("starting the engines"):
            return learner, ready() if ready else self.rollouts(folder)

    def _start_rollouts(self, folder: Path) -> Callable[[], RolloutGroup]:
        """Have the workers start; what is returned waits for them."""
        config, cluster = self.config, self.config.cluster
        sandboxes = self._sandboxes()
        tool_starts = [actor.start.remote() for actor in sandboxes]
        heavy = self._tool_actors()
        tool_starts += [actor.start.remote() for actors in heavy.values() for actor in actors]
        user = replace(self._user, tool_actors=heavy)
        tensor = float(config.engine.tensor_parallel_size)
        spawn = self._spawner("rollout", RolloutActor, cluster.rollout_workers, tensor, 1000, user)
        workers = [spawn(number, 0) for number in range(cluster.rollout_workers)]
        starts = [actor.start.remote(config, str(folder), sandboxes) for actor in workers]

        def ready() -> RolloutGroup:
            self._get(tool_starts, "start", "a sandbox or a tool actor")
            self._get(starts, "start", "a rollout worker")
            self._rollouts = RolloutGroup(
                workers, sandboxes, config, str(folder), spawn, self._sharing
            )
            return self._rollouts

        return ready

    def _sandboxes(self) -> list[ActorHandle[Any]]:
        """The sandbox actors. One that dies comes back empty: its sessions are replayed."""
        remote: Any = ray.remote(SandboxActor)
        options = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1}
        actors: list[ActorHandle[Any]] = [
            remote.options(name=f"sandbox-{i}", **options).remote(self.config)
            for i in range(self.config.cluster.sandbox_actors)
        ]
        self._actors += actors
        return actors

    def _tool_actors(self) -> dict[str, list[ActorHandle[Any]]]:
        """The actors of heavy tools, by their entry in `task.tools`."""
        task = self.config.task
        remote: Any = ray.remote(ToolActor)
        options = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1}
        heavy: dict[str, list[ActorHandle[Any]]] = {}
        for entry, count in task.tool_actors.items():
            place = task.tools.index(entry)
            heavy[entry] = [
                remote.options(name=f"tool-{place}-{i}", **options).remote(
                    self.config, place, self._user
                )
                for i in range(count)
            ]
            self._actors += heavy[entry]
        return heavy

    def _spawner(
        self, title: str, kind: type, count: int, gpus: float, concurrency: int, *given: Any
    ) -> Spawn:
        """Makes actors named title-0, title-1, … and, in their second life, title-0.1, of `kind`
        with the arguments `given`; on GPUs in one placement group, packed, with `count` places."""
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": concurrency}
        group, cluster = None, self.config.cluster
        if cluster.gpus and cluster.colocated:
            options |= {"num_cpus": 1, "num_gpus": 0.5}
            group = self._placed = self._placed or self._place(2.0, 1.0, count, "shared devices")
        elif cluster.gpus:
            options |= {"num_cpus": 1, "num_gpus": gpus}
            group = self._place(1.0, gpus, count, title)
        remote: Any = ray.remote(kind)

        def spawn(number: int, life: int) -> ActorHandle[Any]:
            if group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=number
                )
            name = f"{title}-{number}" + (f".{life}" if life else "")
            actor: ActorHandle[Any] = remote.options(name=name, **options).remote(*given)
            self._actors.append(actor)
            return actor

        return spawn

    def _place(self, cpus: float, gpus: float, count: int, what: str) -> PlacementGroup:
        group: PlacementGroup = placement_group(
            [{"CPU": cpus, "GPU": gpus}] * count, strategy="PACK"
        )
        self._placements.append(group)
        self._get(group.ready(), "placement", what)
        return group


def _watched(dashboard: str | None, address: str) -> str:
    """Where the dashboard is and how to enter, and the command that shows the cluster."""
    shown = f"ray status --address={address}"
    if not dashboard:
        return f"Ray: {shown} shows the cluster; cluster.dashboard=true serves its dashboard"
    asks = os.environ.get("RAY_AUTH_MODE", "token") == "token"
    key = ", which asks for the token that `ray get-auth-token` prints" if asks else ""
    return f"Ray: dashboard at http://{dashboard}{key}; {shown} shows the cluster"
