"""The pictures of docs/localization.md: numbers against the budget, and one search."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.searches.bank import Bank
from benchmarks.searches.replay import BankRollout
from benchmarks.searches.tables import Row
from elpo_ray.config.growth import GrowthConfig
from elpo_ray.growth import posterior
from elpo_ray.tree import Localization

DRAWN = ("bel", "bel, use_tree", "posterior", "posterior, nothing free")
"""The rules against the budget."""
DPI = 130


def against_budget(rows: Sequence[Row], path: Path) -> None:
    """Precision and located inputs, a column of panels a bank."""
    banks = list(dict.fromkeys(row.bank for row in rows))
    budgets = sorted({row.n_total for row in rows})
    figure = Figure(figsize=(3.4 * len(banks), 5.2), layout="constrained")
    panels = figure.subplots(2, len(banks), squeeze=False, sharex=True, sharey="row")
    for column, bank in enumerate(banks):
        for place, rule in enumerate(DRAWN):
            mine = [row for row in rows if (row.bank, row.rule) == (bank, rule)]
            for axes, value in zip(panels[:, column], ("precision", "located"), strict=True):
                _curve(axes, mine, value, 1 + 0.03 * (place - 1.5), rule)
        panels[0, column].set(title=bank, xscale="log", ylim=(0, 1.02))
        panels[1, column].set(xlabel="budget N_total", ylim=(0, 1.02))
        panels[1, column].set_xticks(budgets, [str(budget) for budget in budgets])
        panels[1, column].minorticks_off()
    panels[0, 0].set_ylabel("right, of named steps")
    panels[1, 0].set_ylabel("inputs with a right step")
    panels[1, -1].legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=DPI)


def _curve(axes: Any, rows: Sequence[Row], value: str, shift: float, label: str) -> None:
    middle = np.array([getattr(row, value) for row in rows])
    low, high = np.array([getattr(row, f"{value}_interval") for row in rows]).T
    places = np.array([row.n_total * shift for row in rows])
    axes.errorbar(places, middle, [middle - low, high - middle], marker="o", capsize=2, label=label)


def one_search(bank: Bank, config: GrowthConfig, path: Path) -> None:
    """The posterior as it moves: of the first search of the bank, by problem, that has evidence
    from the tree, a probe that fails and one that succeeds, and names a step."""
    found, truth = next(_telling(bank, config))
    belief = found.posterior
    assert belief is not None, "a search by evidence"
    free = ", ".join(f"{p.successes}/{p.attempts} after step {p.anchor}" for p in belief.free)
    rows = [("prior: surprise", belief.prior), (f"the tree: {free}", belief.trail[0])]
    for probe, after in zip(found.probes, belief.trail[1:], strict=True):
        said = "succeeds" if probe.successes else "fails"
        rows.append((f"a probe after step {probe.anchor} {said}", after))
    figure = Figure(figsize=(6.4, 1.0 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True)
    steps = np.arange(1, len(belief.prior) + 1)
    for axes, (title, values) in zip(panels, rows, strict=True):
        axes.bar(steps, values, color=["#b33" if step == truth else "#6b3fa0" for step in steps])
        axes.axhline(config.posterior.threshold, color="grey", lw=0.8, ls="--")
        axes.set(ylim=(0, 1.05))
        axes.set_title(title, fontsize=9, loc="left")
    names = [f"step {step}" for step in steps[:-1]] + ["answer"]
    panels[-1].set_xticks(steps, names)
    figure.savefig(path, dpi=DPI)


def _telling(bank: Bank, config: GrowthConfig) -> Iterator[tuple[Localization, int]]:
    for number, trajectories in enumerate(bank):
        rollout = BankRollout(trajectories, config.n_total, f"{number}/0", waits=False)
        asyncio.run(posterior.grow(rollout, config))
        for found in rollout.tree.localizations:
            outcomes = {probe.successes for probe in found.probes}
            truth = rollout.of_leaf[found.leaf].truth
            shown = found.posterior is not None and found.posterior.free
            if shown and outcomes == {0, 1} and found.critical is not None and truth is not None:
                yield found, truth
