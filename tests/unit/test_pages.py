"""What pages say of the configuration, of the advantages in a picture, and of TRL is so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.reference import keys
from elpo_ray.credit import assign
from elpo_ray.credit.__main__ import compose
from elpo_ray.tree import Localization, RolloutTree
from elpo_ray.types import FinishReason, Score, Step, Turn

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(page: str, columns: int) -> Iterator[list[str]]:
    """The cells of the rows of all tables with so many columns, heads left out."""
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == columns:
            yield cells


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ALGORITHMS = {code(row[0])[0]: row for row in rows("algorithms.md", 5) if "=" not in row[0]}


def test_the_table_of_algorithms_has_all_of_them() -> None:
    assert set(ALGORITHMS) == {path.stem for path in (CONF_DIR / "algorithm").glob("*.yaml")}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_table_of_algorithms_says_what_the_files_set(name: str) -> None:
    config = compose([f"algorithm={name}"])
    _, growth, credit, bounds, _ = ALGORITHMS[name]
    assert code(growth) == [config.growth.rule] and code(credit) == [config.credit.rule]
    assert [float(each) for each in bounds.split(", ")] == [
        config.clip.eps_low,
        config.clip.eps_high,
    ]


def test_the_picture_of_a_tree_has_the_advantages_that_train() -> None:
    def step() -> Step:
        return Step(Turn((1,), (0.0,), (0.0,), FinishReason.STOP, 0))

    tree = RolloutTree("drawn", 4)
    tree.add_trajectory(0, [step(), step()], Score(1.0, True))
    searched = tree.add_trajectory(0, [step(), step(), step()], Score(-1.0, False))
    first, second, _ = tree.path(searched)
    tree.add_trajectory(first, [step(), step()], Score(1.0, True))
    tree.add_trajectory(second, [step()], Score(-1.0, False))
    tree.localizations.append(Localization(searched, second, True, (2, 2), []))
    (credit,) = assign([tree], AlgorithmConfig())
    drawn = re.findall(
        r">([+−]\d\.\d\d)<", (DOCS / "images" / "tree_credit.svg").read_text(encoding="utf-8")
    )
    numbers = sorted(float(number.replace("−", "-")) for number in drawn)
    assert numbers == sorted(round(float(a), 2) for a in credit.advantage[1:])
    text = (DOCS / "images" / "tree_credit.svg").read_text(encoding="utf-8")
    assert f"({credit.clip_low[second]:.3f}, not {credit.clip_low[first]:.1f})" in text


WORDS = list(rows("coming_from.md", 5))


def test_our_words_beside_those_of_others_are_keys() -> None:
    known = {key.name for key in keys(Config)} | {"task.reward"}  # short for its name
    assert len(WORDS) > 25
    for row in WORDS:
        for word in code(row[0]):
            name = re.split(r"[=:]", word)[0]
            if not name.startswith(("elpo ", "runs/")) and "." in name:
                assert name in known, name


def test_the_words_of_trl_are_fields_or_arguments_of_its() -> None:
    from trl import GRPOConfig

    trainer = Path(__import__("trl").__file__).parent / "trainer" / "grpo_trainer.py"
    arguments = set(re.findall(r"^        (\w+): ", trainer.read_text(), re.MULTILINE))
    known = {field.name for field in fields(GRPOConfig)} | arguments | {"save_model"}
    others = {"GRPOTrainer", "trl.experimental.async_grpo", "resume_from_checkpoint"}
    for row in WORDS:
        for word in code(row[1]):
            assert re.split(r"[=\[]", word)[0] in known | others, word
