"""Scripts and manifests from a launcher's configuration and a run's overrides.

Invariant: what is rendered was checked: the run composes, its devices are there, its files exist.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from elpo_ray.config import Config
from elpo_ray.config.algebra import gpus_asked
from elpo_ray.config.compose import composed
from elpo_ray.config.files import file_word, is_file
from elpo_ray.config.rules import require
from elpo_ray.config.values import hydra_value
from elpo_ray.doctor.software import pinned
from elpo_ray.training.checks import check
from launch.config import LONGEST_NAME, KubeRayConfig, Runtime, SlurmConfig
from launch.resources import memory_gib, processors

TEMPLATES = Path(__file__).parent / "templates"
VENV = ".venv/bin/python"
SHARED = "/shared"
"""Where the volume is that all pods of a RayJob mount."""
OPTIONS = {
    "mem": "memory",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
}
"""sbatch's names of keys that are passed on where they are set."""


def slurm_script(config: SlurmConfig, overrides: Sequence[str]) -> str:
    """The sbatch script. Raises ValueError if the run is not sound or does not fit the job."""
    run = _checked(overrides, config.nodes * config.gpus_per_node, "nodes x gpus_per_node")
    require(
        run.trainer.resume is None and run.trainer.run_name is None,
        "trainer.run_name",
        run.trainer.run_name or run.trainer.resume,
        "leave run_name and resume out: the job names its run and resumes it",
    )
    require(
        run.cluster.address is None,
        "cluster.address",
        run.cluster.address,
        "leave it out: the job starts its own Ray",
    )
    seeded = bool(config.seeds) and any(word.startswith("trainer.seed=") for word in overrides)
    require(not seeded, "seeds", config.seeds, "give trainer.seed or seeds, not both")
    checkout = Path(config.checkout or Path.cwd()).absolute()
    python = config.python or VENV
    if config.container.runtime is Runtime.none:
        python = str(checkout / python)
        if config.python is None and checkout.is_dir() and not Path(python).exists():
            python = sys.executable  # of a pip installation
    config = _sized(config, run)
    run_dir, logs = checkout / run.trainer.run_dir, checkout / config.logs
    paths = (checkout, run_dir, logs, config.scratch, *run.task.modules)
    own = dict.fromkeys(str(path) for path in paths)
    return _render(
        "slurm.sh.jinja",
        c=config,
        options=[(o, getattr(config, k)) for o, k in OPTIONS.items() if getattr(config, k)],
        checkout=str(checkout),
        run_dir=str(run_dir),
        run_dir_word=f"trainer.run_dir={hydra_value(str(run_dir))}",
        logs=str(logs),
        python=python,
        bin=str(Path(python).parent),
        mounts=[f"{path}:{path}" for path in own] + config.container.mounts,
        overrides=_from_anywhere(overrides),
    )


def _sized(config: SlurmConfig, run: Config) -> SlurmConfig:
    """The configuration with the processors and the memory that the run needs, where it names
    none."""
    cpus, memory = config.cpus_per_node, config.memory
    if cpus is None:
        cpus = processors(run, config.nodes)
    if memory is None:  # several nodes are taken whole
        memory = "0" if config.nodes > 1 else f"{memory_gib(run)}G"
    return replace(config, cpus_per_node=cpus, memory=memory)


def _from_anywhere(overrides: Sequence[str]) -> list[str]:
    """The run's words with its file as an absolute path: the job starts in another folder."""
    return [os.path.abspath(word) if is_file(word) else word for word in overrides]


def kuberay_manifest(config: KubeRayConfig, overrides: Sequence[str]) -> str:
    """A RayJob as YAML. Raises ValueError as `slurm_script` does."""
    file = file_word(overrides)
    require(
        file is None or Path(file).is_relative_to(SHARED),
        "file",
        file,
        f"pods see nothing of this folder; put it, with its modules and data, under {SHARED}",
    )
    run = _checked(overrides, config.workers * config.gpus_per_worker, "workers x gpus_per_worker")
    config = replace(config, name=config.name or _unique_name(run))
    start = ["python", "-m", "launch.start", "--run", f"{SHARED}/runs/{config.name}"]
    cache = f"cold_start.cache={SHARED}/cache"  # actors on all nodes load what is made there
    return _render(
        "rayjob.yaml.jinja",
        c=config,
        ray_version=pinned("cpu")["ray"],
        entrypoint=shlex.join([*start, "--address", "auto", "--", cache, *overrides]),
    )


def _unique_name(run: Config) -> str:
    """A name for a Kubernetes object that no other run has."""
    ending = f"-{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    words = re.sub(r"[^a-z0-9]+", "-", f"{run.experiment}-{run.algorithm.name}".lower())
    return words.strip("-")[: LONGEST_NAME - len(ending)].strip("-") + ending


def _checked(overrides: Sequence[str], gpus: int, key: str) -> Config:
    run = composed(overrides)
    check(run)
    asked = gpus_asked(run)
    require(
        asked <= gpus,
        key,
        gpus,
        f"the run asks for {asked} GPUs ({run.cluster.rollout_workers} engines, "
        f"{run.cluster.learner_ranks} learner ranks); give the job as many or lower these",
    )
    require(
        bool(asked) or not gpus,
        key,
        gpus,
        "the run uses no GPU: ask for none (site=cpu on Slurm, gpus_per_worker=0), or choose a "
        "cluster with GPUs",
    )
    return run


def shell_word(text: str) -> str:
    """A text as one word on one line of a bash script."""
    if text.isprintable():
        return shlex.quote(text)
    signs = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    told = "".join(signs[s] if s in signs else s if s.isprintable() else _bytes(s) for s in text)
    return f"$'{told}'"


def _bytes(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", "surrogateescape"))


def sbatch_value(text: str) -> str:
    """The value of an option in an #SBATCH line, in quotes where it must be."""
    if re.fullmatch(r"[\w./:,%@+=-]*", text, re.ASCII):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sh"] = shell_word
    environment.filters["sbatch"] = sbatch_value
    environment.filters["json"] = json.dumps  # every JSON text is YAML
    return environment.get_template(template).render(**values)
