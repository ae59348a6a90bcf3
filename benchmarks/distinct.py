"""How many of a run's trajectories differ, and how many of its successes do.

    python benchmarks/distinct.py RUN [RUN ...]

RUN is the folder of a run with its trees. Two trajectories of one input are the same if all their
turns and tool responses are. Prints one JSON object a run: means over its steps, each summed over
the step's inputs, and `steps`, how many these are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAMES = ("leaves", "distinct", "successes", "distinct_successes", "inputs_with_success")
Trajectory = tuple[tuple[str, str | None], ...]


def main() -> None:
    """Read every run that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for run in parser.parse_args().runs:
        steps = [step(path) for path in sorted((run / "trees").glob("step_*.jsonl"))]
        if not steps:
            parser.error(f"{run}: no trees there; name the folder of a run that kept its trees")
        means = {name: round(sum(s[name] for s in steps) / len(steps), 2) for name in NAMES}
        print(json.dumps({"run": run.name, "steps": len(steps), **means}), flush=True)


def step(path: Path) -> dict[str, int]:
    """The counts of one step, by name."""
    found = dict.fromkeys(NAMES, 0)
    for line in path.open():
        ends = list(trajectories(json.loads(line)["nodes"]))
        won = [taken for taken, success in ends if success]
        counts = (len(ends), len({taken for taken, _ in ends}), len(won), len(set(won)), bool(won))
        for name, count in zip(NAMES, counts, strict=True):
            found[name] += count
    return found


def trajectories(nodes: list[Mapping[str, Any]]) -> Iterator[tuple[Trajectory, bool]]:
    """What every trajectory of a tree said and was told, and whether it succeeded."""
    taken: dict[int, Trajectory] = {nodes[0]["id"]: ()}
    for node in nodes[1:]:
        taken[node["id"]] = (*taken[node["parent"]], (node["text"], node.get("observation")))
        if node.get("leaf"):
            yield taken[node["id"]], bool(node["success"])


if __name__ == "__main__":
    main()
