"""What a launcher may be told. The run's own keys come after `--` and are checked as such."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from elpo_ray.config.rules import require

NAME = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
"""Also a file's, a Slurm job's and a Kubernetes object's name."""

LONGEST_SCRATCH = 24


class Runtime(Enum):
    """What starts the commands inside a container image on a Slurm cluster."""

    none = "none"
    apptainer = "apptainer"
    pyxis = "pyxis"


@dataclass(kw_only=True)
class ContainerConfig:
    """The image that the job's commands run in; without a runtime, the checkout's own `.venv`."""

    runtime: Runtime = Runtime.none
    image: str | None = None
    """A .sif file (apptainer), a .sqsh file or registry address (pyxis)."""
    mounts: list[str] = field(default_factory=list)
    """`source:target` of folders that the job needs beside the checkout and the run folder."""

    def __post_init__(self) -> None:
        require(
            (self.runtime is Runtime.none) == (self.image is None),
            "container.image",
            self.image,
            "name an image together with container.runtime=apptainer or pyxis",
        )
        for mount in self.mounts:
            require(
                re.fullmatch(r"/[^:,\s]*(:/[^:,\s]*){0,1}(:r[ow])?", mount) is not None,
                "container.mounts",
                mount,
                "write /source:/target",
            )


@dataclass(kw_only=True)
class SlurmConfig:
    """One Slurm job, or an array of them with a seed each."""

    name: str = "elpo-ray"
    """Of the job; its run folders are `<trainer.run_dir>/<name>-<job id>`."""
    nodes: int = 1
    gpus_per_node: int = 8
    """0 for a run without GPUs."""
    cpus_per_node: int | None = None
    """null = what the partition gives."""
    memory: str | None = None
    """As `--mem` has it; "0" = all of a node; null = what the partition gives."""
    time: str = "24:00:00"
    """Of one stay on the cluster, as HH:MM:SS or D-HH:MM:SS: a longer run is requeued."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: list[str] = field(default_factory=list)
    """Further options of `#SBATCH`, as in ["--mail-type=END"]."""
    seeds: list[int] = field(default_factory=list)
    """An array job: one run for each of these values of `trainer.seed`."""
    seeds_at_once: int | None = None
    """null = all of them."""
    signal_s: int = 600
    """Seconds before the time limit at which the run is told to write a checkpoint and is requeued:
    longer than a step, whose update is not cut in two."""
    requeues: int = 100
    """After so many the job ends instead."""
    preflight_s: int = 300
    """Seconds that the look at the nodes may take."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before anything else, as in ["module load cuda"]."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for all of the job's processes, as in {NCCL_SOCKET_IFNAME: ib0}."""
    checkout: str | None = None
    """This project's folder, at the same place on all nodes; null = the current one."""
    python: str = ".venv/bin/python"
    """Under `checkout`, or absolute; in a container: the image's, such as `python`."""
    scratch: str = "/tmp"
    """Folder on each node's own disk for Ray's files."""
    logs: str = "runs/slurm"
    """Folder of the jobs' logs, on the shared file system."""
    first_port: int = 20000
    """A job takes ten ports from here on, chosen by its number."""
    container: ContainerConfig = field(default_factory=ContainerConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(NAME, self.name) is not None,
            "name",
            self.name,
            "use lower-case letters, digits and dashes",
        )
        for key in ("nodes", "signal_s", "preflight_s", "requeues"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "use 1 or more")
        require(self.gpus_per_node >= 0, "gpus_per_node", self.gpus_per_node, "use 0 or more")
        for key in ("cpus_per_node", "seeds_at_once"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "use 1 or more, or null")
        require(
            1024 <= self.first_port <= 50000,
            "first_port",
            self.first_port,
            "use 1024 to 50000: ten thousand ports from there on are in play",
        )
        require(seconds(self.time) is not None, "time", self.time, "write HH:MM:SS or D-HH:MM:SS")
        require(
            self.signal_s < (seconds(self.time) or 0),
            "signal_s",
            self.signal_s,
            f"must be below time={self.time}",
        )
        require(
            len(set(self.seeds)) == len(self.seeds) and min(self.seeds, default=0) >= 0,
            "seeds",
            self.seeds,
            "use different values of 0 or more",
        )
        require(
            self.scratch.startswith("/") and len(self.scratch) <= LONGEST_SCRATCH,
            "scratch",
            self.scratch,
            f"use an absolute path of at most {LONGEST_SCRATCH} characters: Ray puts sockets far "
            "below it, whose paths may have 107",
        )


@dataclass(kw_only=True)
class KubeRayConfig:
    """One RayJob: a head with the driver, and workers."""

    name: str = "elpo-ray"
    namespace: str | None = None
    image: str = "elpo-ray:0.1.0-gpu"
    """Built from docker/; must hold this version of the package."""
    workers: int = 1
    """Pods with GPUs; the head has none."""
    gpus_per_worker: int = 8
    cpus: int = 16
    """Of each pod."""
    memory: str = "128Gi"
    shared_memory: str = "32Gi"
    """Of each pod's /dev/shm; counts towards its memory."""
    claim: str = "elpo-runs"
    """PersistentVolumeClaim, ReadWriteMany, mounted at /shared: models, data, run folders."""
    secret: str | None = None
    """Secret whose keys become variables of all pods, such as HF_TOKEN or WANDB_API_KEY."""
    retries: int = 3
    """Times that the whole job starts again after a failure; it goes on from its checkpoint."""
    queue: str | None = None
    """Kueue's LocalQueue."""

    def __post_init__(self) -> None:
        for key in ("name", "claim"):
            value = getattr(self, key)
            ok = re.fullmatch(NAME, value) is not None and len(value) <= 40
            require(ok, key, value, "use up to 40 lower-case letters, digits and dashes")
        for key in ("cpus", "workers"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "use 1 or more")
        for key in ("gpus_per_worker", "retries"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "use 0 or more")
        for key in ("memory", "shared_memory"):
            value = getattr(self, key)
            require(re.fullmatch(r"[1-9]\d*[MG]i", value) is not None, key, value, "write as 128Gi")


def seconds(time: str) -> int | None:
    """Of HH:MM:SS or D-HH:MM:SS; None of anything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", time)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
