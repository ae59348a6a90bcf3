"""`pytest` in this folder: the tools do what the agent is told, and the data fits them."""

import json
from pathlib import Path

from shop import PRICES, Cart, search

HERE = Path(__file__).parent


def cart(budget: int, *wanted: str) -> Cart:
    made = Cart()
    made.reset(budget, list(wanted))
    return made


def test_the_search_shows_every_brand():
    assert search("milk") == "plain 2, fancy 4, royal 7"


def test_a_cart_within_the_budget_is_a_success():
    buyer = cart(5, "milk", "bread")
    assert buyer.add("milk", "plain") == "left: 3"
    assert not buyer.reward()
    buyer.add("bread", "plain")
    assert buyer.reward()


def test_a_cart_above_the_budget_is_none():
    buyer = cart(5, "milk")
    buyer.add("milk", "royal")
    assert not buyer.reward()


def test_every_problem_can_be_solved():
    for name in ("train", "eval"):
        for line in (HERE / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            cheapest = sum(min(PRICES[thing].values()) for thing in row["wanted"])
            assert cheapest <= row["budget"]
