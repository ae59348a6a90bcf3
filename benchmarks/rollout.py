"""What growing trees costs beside decoding: `python benchmarks/rollout.py [SECTION ...]`, JSON.

control   trajectories per second with scripted workers that answer at once, and how many engines
          one driver could serve
memory    memory of the driver over 1,000 small steps with such a worker
growth    BEL trees against independent trajectories, whole stack against the bare engine, prefix
          hits and engine idleness; quickstart model, one engine
searches  growth by the search by evidence against growth by BEL, in pairs; --set and --model as for
          growth
overlap   steps per minute with staleness 1 against 0, engine and learner pinned to one core each
sync      weights of a 0.5 B-parameter model from a publisher into a serving engine

Both sides of a ratio alternate within one run. `--model` names a folder for `growth` and `overlap`;
without it the quickstart's cold start is made (or taken from its cache). `--layers` adds layers on
top of the model, and `--mlp` adds neurons; both leave its outputs unchanged. So the trees are the
same, but a token costs the engine more, as in a larger model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

from benchmarks.rollouts import control, growth, overlap, pairs, sync  # noqa: E402

SECTIONS = {
    "control": control.rates,
    "memory": control.memory,
    "growth": growth.measure,
    "searches": pairs.measure,
    "overlap": overlap.measure,
    "sync": sync.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--model", help="folder for growth and overlap")
    parser.add_argument("--layers", type=int, help="of that model")
    parser.add_argument("--mlp", type=int, help="width of its MLPs")
    parser.add_argument("--inputs", type=int, default=48, help="of a growth phase")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no pair begins")
    parser.add_argument("--steps", type=int, default=3, help="of each side of an overlap pair")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the quickstart")
    args = parser.parse_args()
    random.seed(0)
    with redirect_stdout(sys.stderr):  # some libraries log there
        report = {name: SECTIONS[name](args) for name in args.sections}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
