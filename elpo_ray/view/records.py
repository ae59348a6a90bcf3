"""One tree and its credit as compact data for the page: columns over nodes, short numbers.

Node ids are places in `RolloutTree.nodes`; `label` keeps a dump's own. A column that is null
everywhere is left out. Optional fields of a dump are taken only if they have the type that the
schema gives them.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from elpo_ray.config.algorithm import ElcScope
from elpo_ray.credit import Credit
from elpo_ray.credit.clip import elc_region
from elpo_ray.growth.budget import SpendKind
from elpo_ray.tree import Localization, Node, RolloutTree
from sandbox.limits import MAX_FIGURES, MAX_FIGURES_BYTES
from sandbox.png import cleaned

HERMES = "<tool_call>"
"""It begins a call in the text of a turn, in the format that the page reads itself."""
DIGITS = 5
"""A number on the page has so many significant digits."""
MOST_NATS = 1e6
"""No entropy or log-probability of a token is larger than this in absolute value."""


@dataclass(frozen=True)
class PageLimits:
    """Bounds on what a page takes of one node, so that a browser can hold thousands of trees."""

    chars: int = 6000
    """A turn and a response keep so many characters each, half of them from the end."""
    tokens: int = 1500


def tree_record(
    tree: RolloutTree, credit: Credit | None, scope: ElcScope, limits: PageLimits
) -> dict[str, Any]:
    """Return everything that the tree page shows, but the texts of token ids."""
    nodes = tree.nodes
    columns: dict[str, list[Any]] = {
        "parent": [node.parent for node in nodes],
        "label": [node.label if node.label != node.id else None for node in nodes],
        "reward": [node.score.reward if node.score else None for node in nodes],
        "outcome": [leaf_outcome(node) for node in nodes],
        "end": [node.end.value if node.end else None for node in nodes],
        "group": [node.group for node in nodes],
        "text": [_text(node, "text", limits) for node in nodes],
        "observation": [_text(node, "observation", limits) for node in nodes],
        "tool": [_text(node, "tool", limits) for node in nodes],
        "arguments": [_arguments(node, limits) for node in nodes],
        "kind": [_text(node, "tool_kind", limits) for node in nodes],
        "seconds": [short(_number(node, "tool_seconds")) for node in nodes],
        "restored": [_text(node, "restored_by", limits) for node in nodes],
        "figures": [_figures(node) for node in nodes],
        "entropy": [short(_number(node, "entropy")) for node in nodes],
        "tokens": [_number(node, "num_action_tokens") for node in nodes],
        "observed": [_number(node, "num_observation_tokens") for node in nodes],
        "version": [_number(node, "weight_version") for node in nodes],
        "elc": [int(inside) or None for inside in elc_region(tree, scope)],
    }
    for name in ("ids", "entropies", "logprobs"):
        columns[name] = [_tokens(node, f"token_{name}", limits) for node in nodes]
    if credit is not None:
        for name in ("r", "a_branch", "a_traj", "advantage", "share"):
            columns[name] = [short(value) for value in getattr(credit, name).tolist()]
        columns["clip_low"] = [short(value) for value in credit.loosest_clip_low.tolist()]
    return {
        "task": tree.task_id,
        "budget": tree.budget,
        "messages": [_message(message, limits) for message in tree.messages],
        "size": len(nodes),
        "columns": {k: v for k, v in columns.items() if any(x is not None for x in v)},
        "searches": [_search(tree, found) for found in tree.localizations],
        "spends": _spends(tree),
        "lost": sum(not entry.get("charged", True) for entry in tree.ledger),
    }


def table_row(tree: RolloutTree, credit: Credit | None) -> dict[str, Any]:
    """Return one line of the table of inputs."""
    leaves = [leaf_outcome(leaf) for leaf in tree.leaves()]
    scores = [leaf.score for leaf in tree.leaves() if leaf.score]
    rewards = [score.reward for score in scores if score.graded]
    entropies = [value for node in tree.nodes if (value := _number(node, "entropy")) is not None]
    kinds = [node.extra.get("tool_kind") for node in tree.nodes]
    confirmed = [found for found in tree.localizations if found.confirmed]
    depths = [len(tree.path(leaf.id)) for leaf in tree.leaves()]
    first = confirmed[0] if confirmed else None
    bare_advantage = [] if credit is None else credit.advantage.tolist()
    return {
        "task": tree.task_id,
        "leaves": len(leaves),
        "succeeded": leaves.count("success"),
        "failed": leaves.count("failure"),
        "ungraded": leaves.count("ungraded"),
        "reward": short(math.fsum(rewards) / len(rewards)) if rewards else None,
        "steps": len(tree.nodes) - 1,
        "depth": max(depths),
        "searches": len(tree.localizations),
        "confirmed": len(confirmed),
        "critical": None if first is None else _depth(tree, first.critical),
        "searched": None if first is None else len(tree.path(first.leaf)),
        "tokens": sum(_number(node, "num_action_tokens") or 0 for node in tree.nodes),
        "entropy": short(math.fsum(entropies) / len(entropies)) if entropies else None,
        "tool_faults": sum(kind not in (None, "ok") for kind in kinds),
        "spread": short(max(bare_advantage) - min(bare_advantage)) if bare_advantage else None,
        "prompt": _prompt(tree)[:160],
    }


def leaf_outcome(node: Node) -> str | None:
    """Return what became of a leaf; None for an inner node."""
    if node.score is None:
        return None
    if not node.score.graded:
        return "ungraded"
    return "success" if node.score.success else "failure"


def short(value: float | None) -> float | None:
    """Round to `DIGITS` significant digits; None for what JSON does not know."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def clipped(text: str, limit: int) -> str:
    """Return the text; beyond `limit` characters its middle is replaced by how much it was."""
    if len(text) <= limit:
        return text
    half = limit // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[… {left_out:,} characters not on this page …]\n{text[-half:]}"


def _search(tree: RolloutTree, found: Localization) -> dict[str, Any]:
    path = tree.path(found.leaf)
    return {
        "leaf": found.leaf,
        "critical": found.critical,
        "step": _depth(tree, found.critical),
        "confirmed": found.confirmed,
        "interval": list(found.interval),
        "length": len(path),
        "probes": [
            {"anchor": p.anchor, "attempts": p.attempts, "successes": p.successes}
            for p in found.probes
            if p.anchor <= len(path)
        ],
        "posterior": _posterior(found),
    }


def _posterior(found: Localization) -> dict[str, Any] | None:
    """Return how a search by evidence moved, None of a binary search."""
    belief = found.posterior
    if belief is None:
        return None
    return {
        "prior": [short(value) for value in belief.prior],
        "free": [
            {"anchor": p.anchor, "attempts": p.attempts, "successes": p.successes}
            for p in belief.free
        ],
        "trail": [[short(value) for value in row] for row in belief.trail],
    }


def _spends(tree: RolloutTree) -> dict[int, dict[str, Any]]:
    """Return, for every leaf, where its completion started."""
    spends: dict[int, dict[str, Any]] = {}
    for entry in tree.ledger:
        leaf, anchor, kind = entry.get("leaf"), entry.get("anchor"), entry.get("kind")
        if isinstance(leaf, int) and kind in list(SpendKind):
            spends[leaf] = {"kind": kind, "anchor": anchor if isinstance(anchor, int) else None}
    return spends


def _depth(tree: RolloutTree, node: int | None) -> int | None:
    return None if node is None else len(tree.path(node))


def _prompt(tree: RolloutTree) -> str:
    """Return the last thing that the user says."""
    said = [m.get("content") for m in tree.messages if m.get("role") == "user"]
    return " ".join(str(said[-1]).split()) if said else ""


def _message(message: dict[str, Any], limits: PageLimits) -> dict[str, str]:
    content = message.get("content")
    text = content if isinstance(content, str) else str(content)
    return {"role": str(message.get("role")), "content": clipped(text, limits.chars)}


def _text(node: Node, key: str, limits: PageLimits) -> str | None:
    value = node.extra.get(key)
    return clipped(value, limits.chars) if isinstance(value, str) else None


def _arguments(node: Node, limits: PageLimits) -> str | None:
    """Return a call's arguments as JSON text, unless the page can read the call in the turn's."""
    said = node.extra.get("text")
    if isinstance(said, str) and HERMES in said:
        return None
    return _text(node, "arguments", limits)


def _figures(node: Node) -> list[str] | None:
    """Return a call's images in base64: those that are sound PNG, in bounds. None without any."""
    said = node.extra.get("figures")
    found, room = [], MAX_FIGURES_BYTES
    for text in said[:MAX_FIGURES] if isinstance(said, list) else ():
        try:
            image = cleaned(base64.b64decode(text, validate=True))
        except (TypeError, ValueError):  # no base64, or no text at all
            continue
        room -= len(image or b"")
        if image is not None and room >= 0:
            found.append(base64.b64encode(image).decode())
    return found or None


def _number(node: Node, key: str) -> float | None:
    value: Any = node.extra.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) < 1e15 else None


def _tokens(node: Node, key: str, limits: PageLimits) -> list[int] | None:
    """Return a turn's first tokens, or their entropies or log-probabilities in hundredths of a
    nat; None unless the whole list is of numbers in their range."""
    values = node.extra.get(key)
    if not isinstance(values, list) or not values or not {*map(type, values)} <= {int, float}:
        return None
    kept = values[: limits.tokens]
    if key == "token_ids":
        sound = {*map(type, kept)} == {int} and min(kept) >= 0 and max(kept) < 1 << 32
        return kept if sound else None
    if not (min(kept) > -MOST_NATS and max(kept) < MOST_NATS):
        return None
    hundredths = np.rint(100 * np.array(kept, dtype=np.float64))
    return hundredths.astype(int).tolist() if np.isfinite(hundredths).all() else None
