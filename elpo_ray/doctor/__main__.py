"""`python -m elpo_ray.doctor [--quick] [KEY=VALUE …]`: can this machine do this run? If not, why?

Takes the same files, experiments and keys as `elpo_ray.main`. Each line is ok, a warning or a
failure with what to do about it. `--quick` leaves out Ray, vLLM and DeepSpeed, which it otherwise
runs on the tiny model. Exit codes: 0 no failure; 1 a failure; 2 a configuration error, one line on
stderr.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from rich.console import Console

from elpo_ray.config import MADE, Config
from elpo_ray.config.compose import Command, composed
from elpo_ray.doctor.catalog import engine_checks, node_checks, shared_checks
from elpo_ray.doctor.finding import Check, Status, examine, print_finding
from elpo_ray.doctor.network import hub_answers

QUICK = "--quick"
SMALLEST = (
    "+experiment=quickstart",
    "algorithm=grpo",
    "algorithm.growth.n_total=4",
    "task.countdown.numbers=3",
    "task.countdown.demonstrations=256",
    "trainer.inputs_per_step=2",
    "learner.minibatch_inputs=2",
    "learner.optimizer.lr=0.01",
    "learner.optimizer.warmup_ratio=0",
    "engine.max_num_seqs=16",
    "cluster.start_timeout_s=600",
    "cluster.call_timeout_s=300",
)
"""The run that stands for all: the quickstart's, with steps that change the model visibly."""


def smallest(config: Config) -> Config:
    """The tiny run on the devices, the sandbox and the Ray cluster that `config` names: one GPU
    where engine and learner share one, else one for each. On GPUs it has the precision of the run,
    on which the choice of kernels depends."""
    small, asked = composed(SMALLEST), config.cluster
    shared = asked.gpus and asked.colocated
    cluster = dataclasses.replace(
        small.cluster, address=asked.address, gpus=asked.gpus, colocated=shared
    )
    precision = config.model.precision if asked.gpus else small.model.precision
    stage = 2 if shared else small.learner.zero_stage
    return dataclasses.replace(
        small,
        model=dataclasses.replace(small.model, precision=precision),
        learner=dataclasses.replace(small.learner, zero_stage=stage),
        cluster=cluster,
        sandbox=dataclasses.replace(config.sandbox, preload=small.sandbox.preload),
    )


def checks(config: Config, *, quick: bool) -> Iterable[Check]:
    """Everything that can be looked at on this machine for this run, the cheap first."""
    yield from node_checks(config)
    yield from shared_checks(config)
    if not quick:
        yield from engine_checks(smallest(config))


def _asks_the_hub(config: Config) -> bool:
    """Whether the model or the data may have to come from the hub."""
    named = config.model.path is not None and not Path(config.model.path).exists()
    return named or (config.task.name not in MADE and config.task.train_file is None)


def run(config: Config, *, quick: bool) -> int:
    """Look at everything, print it line by line, and return the exit code."""
    console = Console(highlight=False)
    if _asks_the_hub(config) and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # before its client is imported, which tries for long
    console.print(f"{config.experiment} on {Path.cwd()}")
    counts = dict.fromkeys(Status, 0)
    for finding in examine(checks(config, quick=quick)):
        print_finding(console, finding)
        counts[finding.status] += 1
    skipped = ", engines not tried (--quick)" if quick else ""
    console.print(
        f"{counts[Status.OK]} ok, {counts[Status.WARNING]} warnings, "
        f"{counts[Status.FAILURE]} failures{skipped}"
    )
    return int(counts[Status.FAILURE] > 0)


def main() -> None:
    """Check this machine for a run and end the process with the exit code."""
    quick = QUICK in sys.argv[1:]
    sys.argv = ["doctor.py", *(word for word in sys.argv[1:] if word != QUICK)]
    Command(Config, "doctor", partial(run, quick=quick))()


if __name__ == "__main__":
    main()
