"""`python -m launch.start --run FOLDER [--address HOST:PORT] -- KEY=VALUE …`: begin or go on.

Becomes `python -m elpo_ray.main`: with `trainer.resume` if FOLDER holds a complete checkpoint, as
after a requeue, else as a new run of that name. What an attempt without a checkpoint left is moved
aside, never deleted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from elpo_ray.config.values import hydra_value
from elpo_ray.runs.folder import RunFolder


def overrides(run: Path, given: Sequence[str], address: str | None) -> list[str]:
    """What `elpo_ray.main` is called with. Moves an unfinished first attempt aside."""
    folder = RunFolder(run)
    if folder.newest_checkpoint() is not None:
        place = [f"trainer.resume={hydra_value(str(run))}"]
    else:
        if (run / "config.yaml").exists():
            folder.aside()
        folder_of_runs = hydra_value(str(run.parent))
        place = [f"trainer.run_dir={folder_of_runs}", f"trainer.run_name={run.name}"]
    joined = [] if address is None else [f"cluster.address={address}"]
    return [*given, *joined, *place]


def main() -> None:
    """Start or continue the run of a job."""
    parser = argparse.ArgumentParser(prog="launch.start", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--pid-file", type=Path, help="gets the number of the driver's process")
    parser.add_argument("--address", help="the Ray cluster to join")
    parser.add_argument("overrides", nargs="*", help="the run's own keys, after --")
    known = parser.parse_args()
    words = overrides(known.run, known.overrides, known.address)
    if known.pid_file is not None:
        known.pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
    print("elpo_ray.main", *words, flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "elpo_ray.main", *words])


if __name__ == "__main__":
    main()
