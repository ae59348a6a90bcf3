"""`python -m elpo_ray.credit TREES.jsonl [--json] [algorithm=elpo|grpo|...] [key=value ...]`

Prints a table for each dumped tree, or one line of JSON; nothing at all if any line is malformed.
Exit codes: 0 done, 2 a mistake in the call or the file, one line on stderr.
"""

from __future__ import annotations

import json
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
Output: a table for each tree, children below their parent. With --json one line a tree, {"task_id",
"nodes": [{"id", "r", "a_branch", "a_traj", "advantage", "clip_low"}]}, in full precision. r is a
step's reward, clip_low the lower bound of the probability ratio, 1 - ε_low^t, the lowest one where
leaves that share a node have different bounds.

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
CELL = {"r": "{:8.3f}", "a_branch": "{:9.3f}", "a_traj": "{:8.3f}", "advantage": "{:10.3f}",
        "clip_low": "{:9.2f}"}  # fmt: skip
"""How a table shows each."""


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
    parser.add_argument("--json", action="store_true", help="one line of JSON for each tree")
    arguments = parser.parse_args(argv)

    def command() -> None:
        config = compose(arguments.overrides)
        show = credit_lines if arguments.json else credit_tables
        lines = list(show(arguments.trees, config))
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
    for tree, columns in _credited(path, config):
        nodes = [
            {"id": node.label} | {name: column[node.id] for name, column in columns.items()}
            for node in tree.nodes
        ]
        yield json.dumps({"task_id": tree.task_id, "nodes": nodes})


def credit_tables(path: Path, config: AlgorithmConfig) -> Iterator[str]:
    """Yield the same as one table per tree, a row for each node below its parent. Raises
    ValueError as `credit_lines`."""
    for tree, columns in _credited(path, config):
        leaves = tree.leaves()
        succeeded = sum(leaf.score is not None and leaf.score.success for leaf in leaves)
        found = (search.critical for search in tree.localizations)
        critical = {number for number in found if number is not None}
        named = ", ".join(str(tree.nodes[number].label) for number in sorted(critical))
        searched = f"; critical: node {named}" if named else ""
        rows = list(_rows(tree, 0, ""))
        width = max(len("node"), *(len(text) for _, text in rows))
        heads = "".join(name.rjust(len(form.format(0))) for name, form in CELL.items())
        lines = [f"{tree.task_id}: {len(leaves)} leaves, {succeeded} succeeded{searched}"]
        lines.append(f"{'node':{width}}{heads}")
        for number, text in rows:
            cells = "".join(form.format(columns[name][number]) for name, form in CELL.items())
            end = "  critical" if number in critical else ""
            lines.append(f"{text:{width}}{cells}{end}".rstrip())
        yield "\n".join(lines) + "\n"


def _rows(tree: RolloutTree, number: int, stem: str) -> Iterator[tuple[int, str]]:
    """Each node below `number`, and how its row begins: lines to its parent, id, outcome."""
    children = tree.nodes[number].children
    for child in children:
        node, last = tree.nodes[child], child == children[-1]
        outcome = ""
        if node.score is not None:
            outcome = " ?" if not node.score.graded else " ✓" if node.score.success else " ✗"
        yield child, f"{stem}{'└' if last else '├'} {node.label}{outcome}"
        yield from _rows(tree, child, stem + ("  " if last else "│ "))


def _credited(
    path: Path, config: AlgorithmConfig
) -> Iterator[tuple[RolloutTree, dict[str, list[float]]]]:
    """Each tree of a dump with the columns of its credit, by node."""
    trees = read_trees(path)
    if not trees:
        raise ValueError(f"{path}: no tree in it; name a file of dumped trees")
    for tree, credit in zip(trees, assign(trees, config), strict=True):
        yield tree, {name: getattr(credit, field).tolist() for name, field in COLUMNS.items()}


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
    sys.exit(main())
