"""`python -m elpo_ray.credit TREES.jsonl [algorithm=elpo|grpo|...] [key=value ...]`

Prints one line of JSON per dumped tree; nothing at all if any line is malformed. Exit codes: 0
done, 2 a mistake in the call or the file, one line on stderr.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from elpo_ray.config import CONF_DIR
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.arguments import Parser
from elpo_ray.config.values import overridden
from elpo_ray.credit import assign
from elpo_ray.dump import MalformedTreeError, read_line
from elpo_ray.tree import RolloutTree

EPILOG = """\
Input: one tree a line, as in runs/NAME/trees/step_NNNNN.jsonl (docs/tree.schema.json); rules that
compare across inputs take the file as one training batch.
Output: one line a tree, {"task_id", "nodes": [{"id", "r", "a_branch", "a_traj", "advantage",
"clip_low"}]}, in full precision; clip_low is the lower bound of the probability ratio, 1 - ε_low^t,
the lowest one where leaves that share a node have different bounds.

Keys are those of the algorithm section in elpo_ray/config/, for example:
  credit.lam=0.3                        weight of the branch level (Eq. 10)
  credit.ddof=1                         sample instead of population standard deviation
  clip.scope=searched_only              none, critical_subtree, searched_only, first_wrong_all,
                                        posterior
  clip.eps_elc=0.2                      added to clip.eps_low on the critical step and its suffix
"""

COLUMNS = {
    "r": "r",
    "a_branch": "a_branch",
    "a_traj": "a_traj",
    "advantage": "advantage",
    "clip_low": "loosest_clip_low",
}
"""What is printed, and the field of `credit.Credit` that it is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("credit", "Advantages and clip bounds of dumped rollout trees.", EPILOG)
    parser.add_argument("trees", metavar="TREES.jsonl", type=Path, help="dumped trees")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="algorithm=elpo|grpo|... (elpo), or a setting",
    )
    arguments = parser.parse_args(argv)

    def command() -> None:
        config = compose(arguments.overrides)
        lines = list(credit_lines(arguments.trees, config))
        sys.stdout.writelines(f"{line}\n" for line in lines)

    return parser.run(command)


def compose(overrides: Sequence[str]) -> AlgorithmConfig:
    """The algorithm's YAML over the schema, then `overrides` in order, with or without the leading
    `algorithm.` that they have in a run. Raises ValueError."""
    name = "elpo"
    settings = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override}: not of the form key=value; try --help")
        if key == "algorithm":
            name = value
        else:
            settings.append(override.removeprefix("algorithm."))
    options = sorted(path.stem for path in (CONF_DIR / "algorithm").glob("*.yaml"))
    if name not in options:
        raise ValueError(f"algorithm={name}: no such option; choose one of {', '.join(options)}")
    values = OmegaConf.load(CONF_DIR / "algorithm" / f"{name}.yaml")
    # Hydra's list of other groups, the reward's: a dump already has its rewards.
    assert isinstance(values, DictConfig)
    values.pop("defaults", None)
    return overridden(AlgorithmConfig, values, settings)


def credit_lines(path: Path, config: AlgorithmConfig) -> Iterator[str]:
    """Yield one line of JSON per tree in `path`, which are one batch. Raises ValueError, with the
    line number where a line is malformed."""
    trees = read_trees(path)
    for tree, credit in zip(trees, assign(trees, config), strict=True):
        columns = {name: getattr(credit, field).tolist() for name, field in COLUMNS.items()}
        nodes = [
            {"id": node.label} | {name: column[node.id] for name, column in columns.items()}
            for node in tree.nodes
        ]
        yield json.dumps({"task_id": tree.task_id, "nodes": nodes})


def read_trees(path: Path) -> list[RolloutTree]:
    """Return the trees of a dump. Raises ValueError, which names the line of a malformed tree."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a file of dumped trees") from error
    trees = []
    with file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                trees.append(read_line(line))
            except MalformedTreeError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    return trees


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    sys.exit(main())
