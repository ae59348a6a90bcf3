"""`python -m elpo_ray.sft +experiment=paper_7b`: the cold start as a run of its own.

Takes the same files, experiments and keys as `elpo_ray.main`; the section `cold_start` says how it
trains.
Exit codes: `config.arguments`; on Ctrl-C a checkpoint is written first.
"""

from __future__ import annotations

from elpo_ray.config import Config
from elpo_ray.config.algebra import cold_start_algebra
from elpo_ray.config.arguments import EXIT_INTERRUPTED
from elpo_ray.config.compose import Command
from elpo_ray.training.checks import check, check_machine


def run(config: Config) -> int:
    """Everything after composition; returns the exit code."""
    check(config)
    said = f"{config.experiment}: supervised training on demonstrations of {config.task.name}"
    print(cold_start_algebra(config) if config.check_only else said, flush=True)
    check_machine(config, engines=False)
    from elpo_ray.training.cold_start import rehearse, train_supervised

    if config.check_only:
        rehearse(config)
        return 0
    return EXIT_INTERRUPTED if train_supervised(config).interrupted else 0


main = Command(Config, "sft", run, trains=True)

if __name__ == "__main__":
    main()
