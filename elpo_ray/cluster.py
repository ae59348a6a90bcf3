"""The only Ray: which actors there are, where they live, and how the driver speaks to them.

Actors are thin: each holds one plain class and forwards to it. The driver sees three groups
(`LearnerGroup`, `RolloutGroup`, the sandbox handles inside them) with ordinary blocking methods.
Every wait has a deadline (`cluster.call_timeout_s`) whose miss names the actor and the phase.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from elpo_ray.checks import gpus_asked
from elpo_ray.config import Config, OptimizerConfig, require
from elpo_ray.forest import TrainForest
from elpo_ray.metrics import Values
from elpo_ray.model_folder import local_folder
from elpo_ray.tree import RolloutTree
from elpo_ray.types import Problem, Score
from elpo_ray.weights import HostPublisher, Publisher

Advance = Callable[[int], None]
Job = tuple[str, Problem, int]
"""A rollout worker's method, and what it is called with."""
BUCKET_BYTES = 256 * 2**20
"""Most bytes of weights that are gathered and in flight at once."""
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""On CPU engine and learner take turns on the same cores: idle threads must sleep, not spin."""
POLL_S = 0.25
"""Seconds between two looks at what has finished."""
FETCH_S = 120.0
"""Seconds that the fetch of a finished result may take."""


class LearnerActor:
    """A learner rank's process."""

    def endpoint(self) -> tuple[str, int]:
        """Address and a free port of this node, for the ranks' rendezvous."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return str(ray.util.get_node_ip_address()), probe.getsockname()[1]

    def start(
        self, config: Config, folder: str, rank: int, master: tuple[str, int], total_steps: int
    ) -> None:
        from elpo_ray.learner import LearnerRank, LearnerSettings, RankProcess

        settings = LearnerSettings(
            model=config.model,
            learner=config.learner,
            clip=config.algorithm.clip,
            loss=config.algorithm.loss,
            temperature=config.sampling.temperature,
        )
        process = RankProcess(
            rank=rank,
            world_size=config.cluster.learner_ranks,
            master_address=master[0],
            master_port=master[1],
            gpu=config.cluster.gpus,
            threads=config.cluster.learner_threads,
            timeout_s=config.cluster.call_timeout_s,
        )
        seed = config.trainer.seed
        self.config, self.index = config, rank
        self.rank = LearnerRank(
            local_folder(folder), settings, process, total_steps=total_steps, seed=seed
        )

    def update(self, forest: TrainForest, supervised: bool) -> Values:
        from elpo_ray.learner import Objective

        objective = Objective.nll if supervised else Objective.surrogate
        return asdict(self.rank.update(forest, objective))

    def connect(self, workers: list[ActorHandle[Any]]) -> None:
        """Prepare to publish weights to these rollout workers' engines."""
        engines, buckets, config = RemoteEngines(workers), self.rank.weight_buckets, self.config
        self.publisher: Publisher
        if config.cluster.gpus:
            from elpo_ray.nccl_transfer import BucketSource, NcclPublisher

            counts = [config.engine.tensor_parallel_size] * len(workers)
            source = BucketSource(buckets, BUCKET_BYTES)
            self.publisher = NcclPublisher(self.index, engines, source, counts, self.endpoint())
        else:
            self.publisher = HostPublisher(self.index, engines, buckets, BUCKET_BYTES)

    def publish(self, version: int) -> None:
        self.publisher.publish(version)

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int, reference: str) -> None:
        self.rank.reset_optimizer(config, total_steps, reference)

    def save(self, path: str) -> None:
        self.rank.save(path)

    def load(self, path: str) -> None:
        self.rank.load(path)

    def export(self, path: str) -> None:
        self.rank.export(path)


class RemoteEngines:
    """`weights.EngineHandles` over the rollout workers."""

    def __init__(self, workers: list[ActorHandle[Any]]) -> None:
        self._workers = workers

    def call(self, method: str, *args: Any) -> None:
        shared = [ray.put(arg) for arg in args]
        ray.get([worker.engine_call.remote(method, *shared) for worker in self._workers])

    def call_each(self, method: str, args: Sequence[Any]) -> None:
        pairs = zip(self._workers, args, strict=True)
        ray.get([worker.engine_call.remote(method, arg) for worker, arg in pairs])


class SandboxActor:
    """A sandbox host's process."""

    async def start(self, config: Config) -> None:
        """Raises SandboxUnavailable where the machine cannot isolate."""
        from elpo_ray.tools import SandboxHost, limits_of
        from sandbox.supervisor import Sandbox

        sandbox = Sandbox(limits_of(config.sandbox), sessions=config.cluster.sandbox_sessions)
        probe = await sandbox.open()
        await probe.close()
        self.host = SandboxHost(sandbox)

    async def open(self, setup: str, at: Any) -> str:
        return await self.host.open(setup, at)

    async def call(self, session_id: str, code: str) -> Any:
        return await self.host.call(session_id, code)

    async def close(self, session_id: str) -> None:
        await self.host.close(session_id)

    async def metrics(self) -> Values:
        return self.host.metrics()

    async def stop(self) -> None:
        await self.host.shutdown()


class RemoteHost:
    """A sandbox actor as `tools.PooledTools` sees it: the same methods, awaited over Ray."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self._actor = actor

    async def open(self, setup: str = "", at: Any = None) -> str:
        return str(await self._actor.open.remote(setup, at))

    async def call(self, session_id: str, code: str) -> Any:
        return await self._actor.call.remote(session_id, code)

    async def close(self, session_id: str) -> None:
        await self._actor.close.remote(session_id)


class RolloutActor:
    """A rollout worker's process: one engine, and the trees that grow next to it."""

    async def start(self, config: Config, folder: str, sandboxes: list[ActorHandle[Any]]) -> None:
        from elpo_ray.chat import Chat
        from elpo_ray.engine import Engine
        from elpo_ray.rollout import RolloutWorker
        from elpo_ray.tasks import make_task
        from elpo_ray.tools import PooledTools

        model = local_folder(folder)
        task = make_task(config.task, config.trainer.seed)
        chat = Chat.from_folder(str(model), task.tools)
        hosts = [RemoteHost(actor) for actor in sandboxes]
        self.tools = PooledTools(hosts, config.sandbox, faults=(ray.exceptions.RayError,))
        self.engine = Engine(
            model,
            config.model,
            config.engine,
            seed=config.trainer.seed,
            gpus=config.cluster.gpus,
            threads=config.cluster.engine_threads,
        )
        self.worker = RolloutWorker(self.engine, self.tools, chat, task, config)
        await self.engine.start()

    async def grow(self, problem: Problem, step: int) -> RolloutTree:
        tree = await self.worker.grow(problem, step)
        self.tools.check()
        return tree

    async def evaluate(self, problem: Problem, index: int) -> Score:
        return await self.worker.evaluate(problem, index)

    async def completed(self) -> int:
        """Trajectories finished since the actor started."""
        return self.worker.completed

    async def engine_call(self, method: str, *args: Any) -> None:
        await getattr(self.engine, method)(*args)

    async def stop(self) -> None:
        await self.engine.stop()


class Cluster:
    """Ray for the length of a `with` block: started or joined, its actors gone at the end."""

    def __init__(self, config: Config) -> None:
        """Raises ValueError, with Ray shut down again, if the cluster has too few GPUs."""
        self.config = config
        self._actors: list[ActorHandle[Any]] = []
        self._placements: list[PlacementGroup] = []
        cluster = config.cluster
        ray.init(
            address=cluster.address,
            include_dashboard=cluster.dashboard if cluster.address is None else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env=None if cluster.gpus else {"env_vars": PATIENT_THREADS},
        )
        try:
            self._check_gpus()
        except ValueError:
            ray.shutdown()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        for group in self._placements:
            remove_placement_group(group)
        ray.shutdown()

    def _check_gpus(self) -> None:
        asked, there = gpus_asked(self.config), int(ray.cluster_resources().get("GPU", 0))
        require(
            asked <= there,
            "cluster.gpus",
            self.config.cluster.gpus,
            f"{asked} GPUs asked for ({self.config.cluster.rollout_workers} rollout workers, "
            f"{self.config.cluster.learner_ranks} learner ranks) but the Ray cluster has {there}; "
            "lower cluster.rollout_workers or cluster.learner_ranks, or use cluster=local",
        )

    def _get(self, refs: Any, phase: str, actor: str) -> Any:
        return wait_for(refs, self.config.cluster.start_timeout_s, f"{phase} of {actor}")

    def learner(self, folder: Path, total_steps: int) -> LearnerGroup:
        """All learner ranks, with the weights of `folder`."""
        config, count = self.config, self.config.cluster.learner_ranks
        ranks = self._actor_group("learner", LearnerActor, count, gpus=1.0, concurrency=1)
        master = self._get(ranks[0].endpoint.remote(), "start", "learner-0")
        starts = [
            actor.start.remote(config, str(folder), rank, master, total_steps)
            for rank, actor in enumerate(ranks)
        ]
        self._get(starts, "start", "the learner")
        return LearnerGroup(ranks, config.cluster.call_timeout_s)

    def rollouts(self, folder: Path) -> RolloutGroup:
        """All rollout workers, their engines serving `folder` as version 0, and the sandboxes."""
        config, cluster = self.config, self.config.cluster
        sandboxes = self._actor_group(
            "sandbox", SandboxActor, cluster.sandbox_actors, gpus=0.0, concurrency=1000
        )
        self._get([actor.start.remote(config) for actor in sandboxes], "start", "a sandbox")
        tensor = float(config.engine.tensor_parallel_size)
        workers = self._actor_group(
            "rollout", RolloutActor, cluster.rollout_workers, gpus=tensor, concurrency=1000
        )
        starts = [actor.start.remote(config, str(folder), sandboxes) for actor in workers]
        self._get(starts, "start", "a rollout worker")
        return RolloutGroup(workers, sandboxes, config)

    def _actor_group(
        self, title: str, kind: type, count: int, *, gpus: float, concurrency: int
    ) -> list[ActorHandle[Any]]:
        """`count` actors named title-0, title-1, …; on GPUs in one placement group, packed."""
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": concurrency}
        if self.config.cluster.gpus and gpus:
            options |= {"num_cpus": 1, "num_gpus": gpus}
            group = placement_group([{"CPU": 1.0, "GPU": gpus}] * count, strategy="PACK")
            self._placements.append(group)
            self._get(group.ready(), "placement", title)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
        remote: Any = ray.remote(kind)
        actors: list[ActorHandle[Any]] = [
            remote.options(name=f"{title}-{i}", **options).remote() for i in range(count)
        ]
        self._actors += actors
        return actors


def wait_for(refs: Any, timeout_s: float, what: str) -> Any:
    """`ray.get` with a deadline; the actor's own exception comes out, not Ray's wrapping of it."""
    try:
        return ray.get(refs, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError(f"{what}: no answer within {timeout_s:.0f} s") from None
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if error.cause is not None else error) from error


class LearnerGroup:
    """The learner's ranks as one: every call goes to all of them at once."""

    def __init__(self, ranks: list[ActorHandle[Any]], timeout_s: float) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s

    def update(self, forest: TrainForest, *, supervised: bool = False) -> Values:
        """Optimizer steps over `forest`; statistics over all ranks (`learner.UpdateStats`)."""
        shared = ray.put(forest)
        refs = [rank.update.remote(shared, supervised) for rank in self.ranks]
        return dict(self._all(refs, "update")[0])

    def connect(self, rollouts: RolloutGroup) -> None:
        """Must come before `publish`."""
        self._all([rank.connect.remote(rollouts.workers) for rank in self.ranks], "connect")

    def publish(self, version: int) -> None:
        """Every engine serves the learner's weights as `version` when this returns."""
        self._all([rank.publish.remote(version) for rank in self.ranks], "publish")

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int, reference: Path) -> None:
        refs = [r.reset_optimizer.remote(config, total_steps, str(reference)) for r in self.ranks]
        self._all(refs, "reset_optimizer")

    def save(self, path: Path) -> None:
        """Raises OSError if the disk refuses; then nothing of the checkpoint is left."""
        self._all([rank.save.remote(str(path)) for rank in self.ranks], "save")

    def load(self, path: Path) -> None:
        """Raises ValueError on a checkpoint of another model."""
        self._all([rank.load.remote(str(path)) for rank in self.ranks], "load")

    def export(self, path: Path) -> None:
        """Write a plain Hugging Face folder."""
        self._all([rank.export.remote(str(path)) for rank in self.ranks], "export")

    def _all(self, refs: list[Any], phase: str) -> Any:
        return wait_for(refs, self._timeout_s, f"{phase} of the learner")


class RolloutGroup:
    """The rollout workers as one: inputs are pulled by whoever has room."""

    def __init__(
        self,
        workers: list[ActorHandle[Any]],
        sandboxes: list[ActorHandle[Any]],
        config: Config,
    ) -> None:
        self.workers = workers
        self.sandboxes = sandboxes
        self._config = config

    def grow(self, inputs: Sequence[Problem], step: int, advance: Advance) -> list[RolloutTree]:
        """One tree an input, in order; `advance` hears how many trajectories are complete."""
        # Twice as many trajectories as the engine decodes at once: searches leave gaps.
        room = 2 * self._config.engine.max_num_seqs // self._config.algorithm.growth.n_total
        jobs = [("grow", problem, step) for problem in inputs]
        return self._pull(jobs, max(1, room), advance, f"growing the trees of step {step + 1}")

    def evaluate(self, problems: Sequence[Problem], samples: int, advance: Advance) -> list[Score]:
        """`samples` independent trajectories of each problem in turn, at temperature 1, their
        seeds fixed."""
        jobs = [("evaluate", problem, i) for problem in problems for i in range(samples)]
        return self._pull(jobs, self._config.engine.max_num_seqs, advance, "evaluating")

    def _pull(self, jobs: Sequence[Job], room: int, advance: Advance, phase: str) -> list[Any]:
        """Results of `jobs` in order; at most `room` unfinished ones per worker."""
        results: dict[int, Any] = {}
        running: dict[Any, tuple[int, int]] = {}
        waiting = deque(enumerate(jobs))
        begun = self._completed(phase)
        deadline = time.monotonic() + self._config.cluster.call_timeout_s

        def feed(worker: int) -> None:
            if waiting:
                index, (method, problem, key) = waiting.popleft()
                ref = getattr(self.workers[worker], method).remote(problem, key)
                running[ref] = (index, worker)

        for _ in range(room):
            for worker in range(len(self.workers)):
                feed(worker)
        while running:
            done, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_S)
            for ref in done:
                index, worker = running.pop(ref)
                results[index] = wait_for(ref, FETCH_S, f"{phase}: {jobs[index][1].id}")
                feed(worker)
            advance(self._completed(phase) - begun)
            if time.monotonic() > deadline:
                late = ", ".join(f"{jobs[i][1].id} on rollout-{w}" for i, w in running.values())
                raise TimeoutError(f"{phase}: still waiting for {late[:500]}")
        return [results[index] for index in range(len(jobs))]

    def _completed(self, phase: str) -> int:
        timeout_s = self._config.cluster.call_timeout_s
        counts = wait_for([w.completed.remote() for w in self.workers], timeout_s, phase)
        return sum(counts)
