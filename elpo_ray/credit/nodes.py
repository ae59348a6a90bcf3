"""Token counts and observations of nodes, whether these were just grown or come from a dump."""

from __future__ import annotations

from typing import Any

from elpo_ray.tree import RolloutTree


def action_tokens(tree: RolloutTree, node: int) -> int:
    """Sampled tokens of a node. Raises ValueError on a dump that does not say."""
    step = tree.nodes[node].step
    if step is not None:
        return len(step.turn.token_ids)
    count: Any = tree.nodes[node].extra.get("num_action_tokens")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise _missing(tree, node, "num_action_tokens", count, "a count of sampled tokens")
    return count


def observation(tree: RolloutTree, node: int) -> str:
    """The tool's response as the policy saw it. Raises ValueError on a dump that does not say."""
    step = tree.nodes[node].step
    if step is not None:
        return step.observation_text
    text: Any = tree.nodes[node].extra.get("observation")
    if not isinstance(text, str):
        raise _missing(tree, node, "observation", text, "the tool's response")
    return text


def _missing(tree: RolloutTree, node: int, key: str, value: Any, what: str) -> ValueError:
    label = tree.nodes[node].label
    return ValueError(
        f"tree {tree.task_id}, node {label}: {key}={value!r}: this credit rule needs {what}; "
        "dump trees as a run does"
    )
