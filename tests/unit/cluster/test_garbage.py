"""The collector of cyclic garbage, relaxed, and how such a process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import gc
import elpo_ray.training.driver
try:
    from triton._C import libtriton  # one of those that look for leaks
except ImportError:
    pass
from elpo_ray.cluster.garbage import THRESHOLDS, freeze_gc

freeze_gc()
assert gc.get_threshold() == THRESHOLDS and gc.get_freeze_count() > 1000
class Cycle: ...
for _ in range(10):
    cycle = Cycle()
    cycle.self = cycle
assert gc.collect() >= 9, "what comes later is collected"
"""


def test_what_is_loaded_is_never_looked_at_and_the_process_ends_quietly() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
