"""`python -m elpo_ray.main +experiment=quickstart`: compose, check, train.

Exit codes: 0 done; 2 a configuration error, one line on stderr and nothing started; 130 on
Ctrl-C, after a checkpoint.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elpo_ray import checks
from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.errors import explain
from elpo_ray.runs import CheckpointError

ConfigStore.instance().store(name="schema", node=Config)

EXIT_CONFIGURATION, EXIT_INTERRUPTED = 2, 130


def fail(message: str) -> NoReturn:
    """End with the one line that a user's mistake deserves."""
    print(f"elpo_ray: {message}", file=sys.stderr)
    sys.exit(EXIT_CONFIGURATION)


def compose() -> list[DictConfig]:
    """What Hydra makes of the command line: one configuration, several under --multirun, none
    after --help. Jobs run later, outside Hydra, which would report their errors in its own way."""
    composed: list[DictConfig] = []
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(
        composed.append
    )()
    return composed


def run(composed: DictConfig) -> int:
    """Everything after composition; the heavy imports wait until the configuration is sound.
    Returns the exit code."""
    # Merged into the schema once more: `+key=value` may have added a key that it does not have.
    plain = OmegaConf.create(OmegaConf.to_container(composed))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    checks.check(config)
    if config.check_only:
        print(checks.batch_algebra(config))
        return 0
    from elpo_ray.driver import train

    return EXIT_INTERRUPTED if train(config).interrupted else 0


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise to `explain` instead of printing a traceback
    try:
        code = max((run(composed) for composed in compose()), default=0)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        message = explain(error)
        if message is None:
            raise
        fail(message)
    except CheckpointError as error:
        print(f"elpo_ray: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("elpo_ray: interrupted before the first step; nothing to keep", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code)


if __name__ == "__main__":
    main()
