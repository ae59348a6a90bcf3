"""Makes the table of docs/gpu.md: `python -m tests.gpu_page` writes it into the page.

A cell is what `check_only` says of an experiment with this model on GPUs of this size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from elpo_ray.config.compose import composed
from elpo_ray.config.memory import GPU_GIB, fit, hours
from elpo_ray.config.shapes import PUBLISHED, published
from tests.models_page import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- fits -->\n", "<!-- /fits -->\n"
RECIPES: dict[str, Sequence[str]] = {
    "one GPU, adapters": ("+experiment=aime_lora",),
    "one GPU, all weights": ("+experiment=aime_1gpu",),
    "two GPUs, all weights": ("+experiment=aime_2gpu",),
    "eight GPUs, shared": ("+experiment=aime", "cluster=gpu8_colocated"),
}
"""Overrides by the column's name."""


def cell(name: str, words: Sequence[str]) -> str:
    """The smallest card that the run fits on, and its hours on H100s."""
    shape = published(name)
    config = composed([*words, f"model.path=owner/{name}"])
    cards = [card for card, gib in GPU_GIB.items() if not fit(config, shape, gib * 2**30).missing]
    return f"{cards[0]}, {hours(config, shape):,.0f} h" if cards else "no"


def fits() -> str:
    """The table, with its commands."""
    rows = [[name, *(cell(name, words) for words in RECIPES.values())] for name in PUBLISHED]
    return table(["model", *RECIPES], rows) + "\n"


def written(text: str, made: str) -> str:
    """The page with another table."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    assert re.search(pattern, text, re.DOTALL), f"{PAGE} has no {BEGIN.strip()}"
    return re.sub(pattern, lambda _: f"{BEGIN}{made}{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), fits()))
