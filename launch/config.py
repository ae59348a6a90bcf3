"""Keys of the launchers. The run's own keys come after `--` and are checked as such."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from elpo_ray.config.rules import NonNegativeInt, PositiveInt, Section, at_least, between

NAME = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
"""Also a file's, a Slurm job's and a Kubernetes object's name."""

LONGEST_SCRATCH = 24
LONGEST_NAME = 40
"""Characters of a RayJob's name: KubeRay adds to it, and names may have 63."""
PRINTED = ("memory", "partition", "account", "qos", "constraint", "sbatch", "checkout", "logs")
"""Keys whose values stand in lines that sbatch reads."""
DIFFERENT = "use different values of 0 or more"
Port = Annotated[
    int, between(1024, 50000, "use 1024 to 50000: ten thousand ports from there on are in play")
]


class Runtime(Enum):
    """What starts the commands inside a container image on a Slurm cluster."""

    none = "none"
    """No container."""
    apptainer = "apptainer"
    """`apptainer exec` with a .sif file."""
    pyxis = "pyxis"
    """`srun --container-image`, where the cluster has NVIDIA's plugin."""


@dataclass(kw_only=True)
class ContainerConfig(Section, key="container"):
    """The image that the job's commands run in; without a runtime, the checkout's own `.venv`."""

    runtime: Runtime = Runtime.none
    image: str | None = None
    """A .sif file (apptainer), a .sqsh file or registry address (pyxis)."""
    mounts: list[str] = field(default_factory=list)
    """`source:target` of folders that the job needs beside the checkout and the run folder."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (self.runtime is Runtime.none) != (self.image is None):
            yield "image", "name an image together with container.runtime=apptainer or pyxis"
        for mount in self.mounts:
            if not re.fullmatch(r"/[^:,\s]*(:/[^:,\s]*){0,1}(:r[ow])?", mount):
                yield "mounts", f"write /source:/target instead of {mount}"


@dataclass(kw_only=True)
class SlurmConfig(Section, key=""):
    """One Slurm job, or an array of them with a seed each."""

    name: str = "elpo-ray"
    """Name of the job; its run folders are `<trainer.run_dir>/<name>-<job id>`."""
    nodes: PositiveInt = 1
    """Nodes of the job."""
    gpus_per_node: NonNegativeInt = 8
    """0 for a run without GPUs."""
    cpus_per_node: NonNegativeInt | None = None
    """`--cpus-per-task`; null = as many as the actors of the run need (`launch/resources.py`); 0 =
    what the partition gives."""
    memory: str | None = None
    """`--mem`; "0" = all of a node; null = what the actors need, on several nodes all of each; "" =
    what the partition gives."""
    time: str = "24:00:00"
    """Length of one stay on the cluster, as HH:MM:SS or D-HH:MM:SS: a longer run is requeued."""
    partition: str | None = None
    """Slurm's partition; null = the cluster's default."""
    account: str | None = None
    """The account that is charged; null = the user's default."""
    qos: str | None = None
    """Slurm's quality of service; null = the default."""
    constraint: str | None = None
    """Features that the nodes must have, in Slurm's form; null = none."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of `#SBATCH`, as in ["--mail-type=END"]."""
    seeds: list[Annotated[int, at_least(0, DIFFERENT)]] = field(default_factory=list)
    """An array job: one run for each of these values of `trainer.seed`."""
    seeds_at_once: PositiveInt | None = None
    """null = all of them."""
    signal_s: PositiveInt = 600
    """Seconds before the time limit at which the run must write a checkpoint and is requeued:
    longer than a step, whose update is not cut in two."""
    requeues: PositiveInt = 100
    """After so many the job ends instead."""
    preflight_s: PositiveInt = 300
    """Seconds that the look at the nodes may take."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before anything else, as in ["module load cuda"]."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for all of the job's processes, as in {NCCL_SOCKET_IFNAME: ib0}."""
    checkout: str | None = None
    """The folder where the job's commands start, at the same place on all nodes; null = the current
    one."""
    python: str | None = None
    """Under `checkout`, or absolute; in a container: the image's, such as `python`. null =
    .venv/bin/python; in the current folder, if it has none, the one that writes the script."""
    scratch: str = "/tmp"
    """Folder on each node's own disk for Ray's files."""
    logs: str = "runs/slurm"
    """Folder of the jobs' logs, on the shared file system."""
    first_port: Port = 20000
    """A job takes ten ports from here on, chosen by its number."""
    container: ContainerConfig = field(default_factory=ContainerConfig)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not re.fullmatch(NAME, self.name):
            yield "name", "use lower-case letters, digits and dashes"
        yield from self._line_conflicts()
        stay = seconds(self.time)
        if stay is None:
            yield "time", "write HH:MM:SS or D-HH:MM:SS"
        elif self.signal_s >= stay:
            yield "signal_s", f"must be below time={self.time}"
        if len(set(self.seeds)) < len(self.seeds):
            yield "seeds", DIFFERENT
        if not self.scratch.startswith("/") or len(self.scratch) > LONGEST_SCRATCH:
            remedy = f"use an absolute path of at most {LONGEST_SCRATCH} characters"
            yield "scratch", f"{remedy}: Ray puts sockets far below it, whose paths may have 107"

    def _line_conflicts(self) -> Iterator[tuple[str, str]]:
        """What would not stay within its line of the script, or not be read as it is meant."""
        for key in PRINTED:
            value = getattr(self, key)
            texts = value if isinstance(value, list) else [value or ""]
            if not all(text.isprintable() for text in texts):
                yield key, "leave out line breaks and other control characters"
        for key in ("logs", "checkout"):
            if "%" in (getattr(self, key) or ""):
                yield key, "use a path without %, which Slurm replaces"
        for option in self.sbatch:
            if not option.startswith("-"):
                yield "sbatch", f'write options as in "--mail-type=END" instead of {option!r}'
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                yield "environment", f"{name!r} names no variable; use letters, digits and _"


@dataclass(kw_only=True)
class KubeRayConfig(Section, key=""):
    """One RayJob: a head with the driver, and workers."""

    name: str | None = None
    """Name of the job and of its run folder, /shared/runs/<name>; null = one that no other run has,
    made of the experiment, the algorithm, the time and a random number. To go on with a run that
    was deleted from the cluster, give its name."""
    namespace: str | None = None
    """Namespace of the objects; null = kubectl's current one."""
    image: str = "elpo-ray:0.1.0-gpu"
    """Built from docker/; must hold this version of the package."""
    workers: PositiveInt = 1
    """Pods with GPUs; the head has none."""
    gpus_per_worker: NonNegativeInt = 8
    """GPUs of each worker's pod."""
    cpus: PositiveInt = 16
    """Processors of each pod."""
    memory: str = "128Gi"
    """Memory of each pod."""
    shared_memory: str = "32Gi"
    """Size of each pod's /dev/shm; counts towards its memory."""
    claim: str = "elpo-runs"
    """PersistentVolumeClaim, ReadWriteMany, mounted at /shared: models, data, run folders."""
    secret: str | None = None
    """Secret whose keys become variables of all pods, such as HF_TOKEN or WANDB_API_KEY."""
    retries: NonNegativeInt = 3
    """Times that the whole job starts again after a failure; it goes on from its checkpoint."""
    queue: str | None = None
    """Kueue's LocalQueue."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for key in ("name", "claim"):
            value = getattr(self, key)
            named = value is not None
            if named and (not re.fullmatch(NAME, value) or len(value) > LONGEST_NAME):
                yield key, f"use up to {LONGEST_NAME} lower-case letters, digits and dashes"
        for key in ("memory", "shared_memory"):
            if not re.fullmatch(r"[1-9]\d*[MG]i", getattr(self, key)):
                yield key, "write as 128Gi"


def seconds(time: str) -> int | None:
    """The seconds in HH:MM:SS or D-HH:MM:SS; None for any other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", time)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
