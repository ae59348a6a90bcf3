"""Terminal rewards: the search looks at success, the advantages at the reward."""

from __future__ import annotations

from elpo_ray.types import Score

SUCCESS = 1.0
FAILURE = -1.1
"""The values of the paper's Figure 4."""


def outcome(success: bool) -> Score:
    """The all-or-nothing score of a finished trajectory."""
    return Score(reward=SUCCESS if success else FAILURE, success=success)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{…}` in `text`, braces balanced; None if there is none."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    first = start + len(r"\boxed{")
    depth = 1
    for position in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[first:position].strip()
    return None
