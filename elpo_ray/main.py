"""`python -m elpo_ray.main +experiment=quickstart` or `… shop.yaml`: compose, check, train.

Exit codes: `config.arguments`; on Ctrl-C a checkpoint is written first.
"""

from __future__ import annotations

from elpo_ray.config import Config
from elpo_ray.config.algebra import batch_algebra
from elpo_ray.config.arguments import EXIT_INTERRUPTED
from elpo_ray.config.compose import Command
from elpo_ray.training.checks import check, check_machine


def run(config: Config) -> int:
    """Everything after composition; the heavy imports wait until the configuration is sound.
    Returns the exit code."""
    check(config)
    print(batch_algebra(config) if config.check_only else headline(config), flush=True)
    check_machine(config)
    from elpo_ray.training.driver import rehearse, train

    if config.check_only:
        rehearse(config)
        return 0
    return EXIT_INTERRUPTED if train(config).interrupted else 0


def headline(config: Config) -> str:
    """The first line of a run."""
    trainer = config.trainer
    what = f"{config.experiment}: {config.algorithm.name} on {config.task.name}"
    resumed = "" if trainer.resume is None else f", from {trainer.resume}"
    return f"{what}, {trainer.steps} steps of {trainer.inputs_per_step} inputs{resumed}"


main = Command(Config, "config", run, trains=True)

if __name__ == "__main__":
    main()
