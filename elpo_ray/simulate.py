"""`python -m elpo_ray.simulate`: what N_total, X and K take, from success probabilities alone.

It needs no model: the growth rule that trains runs on `evaluation.analysis.world`. Exit codes: 0
done; 2 a mistake in the call, one line on stderr; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from elpo_ray.config.arguments import Parser
from elpo_ray.config.growth import BelConfig, GrowthConfig, GrowthRule, PosteriorConfig
from elpo_ray.evaluation.analysis.world import Chain, Findings, completions_needed, simulate

PAPER = "paper"
"""The entropy gate's 1 to 3; with nothing known of entropies it asks for 2."""

EPILOG = """\
A trajectory has K tool steps and an answer. --success P spreads its failures evenly over them;
several values are a mix of inputs, each as frequent. --values V0,V1,…,VK gives the chance of
success from the prompt and from a sound prefix of 1, 2, …, K steps instead (`python -m
elpo_ray.analyze analysis=localization` measures it), and --tool-steps is not used. With either, all
sound prefixes of one length have the same chance. --beta A,B gives each sound prefix a chance of
its own, drawn from Beta(A, B): real ones differ, and those that seldom succeed are what searches
err on. After a fatal step nothing succeeds. --rule posterior names a step when its probability
reaches --threshold; here it has neither a prior nor equal prefixes to go by, as it has in training.

Columns
  search     X completions a probe of the binary search, or the other rule's name
  mixed      inputs with a success and a failure among the N_total leaves: only they teach anything
  searches   searches begun an input
  named      of those, searches that named a critical step before the budget ran out
  right      of those, named the step that really doomed the trajectory
  located    inputs with at least one critical step named rightly
  blamed     recoverable anchors whose X completions all failed: falsely "irrecoverable" (bel)
  turns      turns decoded, as a share of N_total whole trajectories

Examples
  python -m elpo_ray.simulate --success 0.3 --tool-steps 4
  python -m elpo_ray.simulate --success 0.05,0.3,0.7 --n-total 16,32 --x 1,2,4,8 --tool-steps 3,6
  python -m elpo_ray.simulate --values 0.2,0.3,0.5,0.9 --want 0.9 --json
  python -m elpo_ray.simulate --beta 0.6,1 --tool-steps 4 --rule bel,posterior --threshold 0.6
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)

    def command() -> None:
        try:
            rows = study(args)
        except ValueError as error:
            parser.error(str(error))
        if args.json:
            for row in rows:
                print(json.dumps(row))
        else:
            show(rows, args)

    return parser.run(command)


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a combination of K, N_total and X. ValueError on values that make no sense."""
    if args.inputs < 1:
        raise ValueError(f"--inputs={args.inputs}: use 1 or more")
    if not 0 < args.want < 1:
        raise ValueError(f"--want={args.want}: use a share between 0 and 1")
    lengths = [len(args.values) - 1] if args.values else args.tool_steps
    worlds = [chains(args, steps) for steps in lengths]
    rows = []
    for world, n_total, (rule, x) in product(worlds, args.n_total, searches(args)):
        config = growth_config(args, rule, x, n_total)
        findings = asyncio.run(simulate(world, config, args.inputs, args.seed))
        rows.append(
            {"tool_steps": world[0].tool_steps, "n_total": n_total, "rule": rule.value, "x": x}
            | rates(findings)
            | {"counts": asdict(findings), "values": [chain.values for chain in world]}
            | {"concentration": world[0].concentration}
        )
    return rows


def chains(args: argparse.Namespace, tool_steps: int) -> list[Chain]:
    """The inputs that the rules are tried on. ValueError if what was asked for is no chance."""
    if args.values and args.beta:
        raise ValueError(f"--beta={args.beta}: give it or --values, not both")
    if args.values:
        return [Chain(tuple(args.values))]
    if args.beta:
        if len(args.beta) != 2:
            raise ValueError(f"--beta={args.beta}: give two numbers, as in 0.6,1")
        a, b = args.beta
        return [Chain.spread(a, b, tool_steps)]
    return [Chain.even(success, tool_steps) for success in args.success]


def searches(args: argparse.Namespace) -> list[tuple[GrowthRule, str | None]]:
    """The rules, the binary search with each probe size."""
    sizes: dict[GrowthRule, list[str | None]] = {GrowthRule.bel: list(args.x)}
    return [(rule, x) for rule in args.rule for x in sizes.get(rule, [None])]


def growth_config(
    args: argparse.Namespace, rule: GrowthRule, x: str | None, n_total: int
) -> GrowthConfig:
    """What a row is grown with."""
    low, high = (1, 3) if x in (None, PAPER) else (int(x or 0), int(x or 0))
    posterior = PosteriorConfig(threshold=args.threshold, max_probes=args.max_probes)
    if args.beta:
        posterior = replace(posterior, beta=tuple(args.beta))
    return GrowthConfig(
        rule=rule,
        n_total=n_total,
        bel=BelConfig(x_min=low, x_max=high, b_max=args.b_max),
        posterior=posterior,
    )


def rates(found: Findings) -> dict[str, float | None]:
    """The columns; None where nothing was there to be counted."""

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return {
        "mixed": share(found.mixed, found.inputs),
        "searches": share(found.searches, found.inputs),
        "named": share(found.named, found.searches),
        "right": share(found.right, found.named),
        "located": share(found.located, found.inputs),
        "blamed": share(found.probes_blamed, found.probes_sound),
        "turns": share(found.turns, found.turns_flat),
    }


def show(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """The table, then what it says about X and N_total."""
    console = Console()
    title = f"{args.inputs} simulated inputs a row, seed {args.seed}"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    columns = ("mixed", "searches", "named", "right", "located", "blamed", "turns")
    for name in ("K", "N_total", "search", *columns):
        table.add_column(name, justify="right")
    for row in rows:
        cells = ["–" if row[c] is None else _cell(c, row[c]) for c in columns]
        table.add_row(str(row["tool_steps"]), str(row["n_total"]), _search(row), *cells)
    console.print(table)
    for line in advice(rows, args.want):
        console.print(line, highlight=False, soft_wrap=True)


def advice(rows: Sequence[dict[str, Any]], want: float) -> list[str]:
    """For each K: the smallest setting whose named steps are right often enough, and the probe
    size that its hardest anchor asks for."""
    lines = []
    for steps in dict.fromkeys(row["tool_steps"] for row in rows):
        mine = [row for row in rows if row["tool_steps"] == steps]
        sure = [row for row in mine if (row["right"] or 0.0) >= want]
        enough = [row for row in sure if row["located"] >= want]
        hardest = min(min(values[1:]) for values in mine[0]["values"])
        spread = mine[0]["concentration"]
        needed = completions_needed(hardest, 1 - want, spread)
        text = f"K={steps}: "
        if sure:
            best = (
                min(enough, key=lambda row: row["n_total"])
                if enough
                else max(sure, key=lambda row: row["located"])
            )
            text += (
                f"N_total={best['n_total']} with {_search(best)} names the right step in "
                f"{best['right']:.0%} of its searches that name one, for {best['located']:.0%} of "
                "the inputs"
            )
        else:
            text += f"no setting here names the right step in {want:.0%} of the searches"
        if spread is None:
            text += f"; the hardest anchor succeeds with {hardest:.2f} a completion"
        else:
            text += f"; sound anchors succeed with {hardest:.2f} a completion on average"
        if needed is not None:
            missed = "it" if spread is None else "a sound one"
            text += f", so X={needed} misses {missed} at most {1 - want:.0%} of the time"
        lines.append(text)
    return lines


def _search(row: dict[str, Any]) -> str:
    return row["rule"] if row["x"] is None else f"X={row['x']}"


def _cell(column: str, value: float) -> str:
    return f"{value:.2f}" if column == "searches" else f"{value:.0%}"


def _parser() -> Parser:
    description = "How many leaves and probes error localization needs, without a model."
    parser = Parser("simulate", description, EPILOG)
    parser.add_argument("--success", type=_floats, default=[0.3], metavar="P[,P]")
    parser.add_argument("--values", type=_floats, default=None, metavar="V0,V1,…,VK")
    parser.add_argument("--beta", type=_floats, default=None, metavar="A,B")
    parser.add_argument("--rule", type=_rules, default=[GrowthRule.bel], metavar="bel[,posterior]")
    parser.add_argument("--tool-steps", type=_integers, default=[4], metavar="K[,K]")
    parser.add_argument("--n-total", type=_integers, default=[8, 16, 32], metavar="N[,N]")
    parser.add_argument(
        "--x",
        type=_probe_sizes,
        default=["1", PAPER, "4", "8"],
        metavar="X[,X]",
        help=f"completions a probe; {PAPER} = the entropy gate's 1 to 3",
    )
    parser.add_argument("--threshold", type=float, default=0.8, help="of the posterior")
    parser.add_argument("--max-probes", type=int, default=4, help="of a search by the posterior")
    parser.add_argument("--b-max", type=int, default=3, help="failures collected before a search")
    parser.add_argument("--inputs", type=int, default=300, help="simulated inputs a row")
    parser.add_argument("--want", type=float, default=0.8, help="share of named steps to be right")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object a row instead of the table")
    return parser


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers, as in 0.2,0.5") from None


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers, as in 4,8") from None


def _rules(text: str) -> list[GrowthRule]:
    known = [rule.value for rule in (GrowthRule.bel, GrowthRule.posterior)]
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is no search; use {' or '.join(known)}")
    return [GrowthRule(name) for name in names]


def _probe_sizes(text: str) -> list[str]:
    sizes = text.split(",")
    for size in sizes:
        if size != PAPER and not (size.isdecimal() and int(size) >= 1):
            raise argparse.ArgumentTypeError(f"{size!r} is neither {PAPER} nor 1 or more")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
