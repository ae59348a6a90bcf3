"""The end of a run: `summary.json` and the table that the user sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elpo_ray.config import Config
from elpo_ray.runs.folder import RunState


def summarize(config: Config, state: RunState, pass_at_1_after: float) -> dict[str, Any]:
    """Everything that `summary.json` holds; rates are fractions, times are seconds.

    A resumed run's seconds include those that it took up to its checkpoint.
    """
    totals = state.totals
    seconds = {
        key.removeprefix("seconds/"): value
        for key, value in totals.items()
        if key.startswith("seconds/")
    }
    judged = totals.get("localizations_judged", 0.0)
    return {
        "experiment": config.experiment,
        "algorithm": config.algorithm.name,
        "seed": config.trainer.seed,
        "steps": state.step,
        "inputs": state.cursor,
        "rollouts": int(totals.get("rollouts", 0)),
        "budget_per_input": config.algorithm.growth.n_total,
        "tokens_generated": int(totals.get("tokens_generated", 0)),
        "eval_problems": config.task.eval_problems,
        "eval_samples": config.task.eval_samples,
        "pass_at_1_before": state.pass_at_1_before,
        "pass_at_1_after": pass_at_1_after,
        "localization_accuracy": totals["localizations_right"] / judged if judged else None,
        "localizations_judged": int(judged),
        "weight_version": state.step,
        "wall_seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
    }


def show_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """Print what a user asks first: did it learn, did it find the errors, where are the files."""
    before, after = summary["pass_at_1_before"], summary["pass_at_1_after"]
    accuracy = summary["localization_accuracy"]
    held_out = f"{summary['eval_problems']} held-out problems x {summary['eval_samples']}"
    rows = {
        f"pass@1 before ({held_out})": f"{before:.1%}",
        "pass@1 after": f"{after:.1%}  ({100 * (after - before):+.1f} points)",
        "critical steps, against the oracle": "none to judge"
        if accuracy is None
        else f"{accuracy:.1%} of {summary['localizations_judged']} right",
        "rollouts": f"{summary['rollouts']:,} = {summary['inputs']} inputs x "
        f"{summary['budget_per_input']}",
        "seconds": f"{summary['wall_seconds']:.0f} = "
        + " + ".join(f"{v:.0f} {k}" for k, v in summary["seconds_by_phase"].items() if v >= 0.5),
    }
    table = Table(title=f"{summary['experiment']} · {summary['algorithm']}", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(f"everything lies in {folder}/", highlight=False, soft_wrap=True)
    for name, what in CONTENTS.items():
        console.print(f"  {name:<15}{what}", highlight=False, soft_wrap=True)
    look = f"see the trees: python -m elpo_ray.view {folder}"
    console.print(look, highlight=False, soft_wrap=True)


CONTENTS = {
    "summary.json": "the numbers above",
    "metrics.jsonl": "one object a step",
    "trees/": "every rollout tree, one a line",
    "checkpoints/": "weights, optimizer, data cursor",
    "config.yaml": "the resolved configuration",
}
"""What the run folder holds, for the user to find."""
