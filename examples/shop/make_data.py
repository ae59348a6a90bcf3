"""Writes train.jsonl, eval.jsonl and demonstrations.jsonl.

A demonstration buys everything that is wanted, but its shop assistant pays little heed to the
budget: he takes the cheapest brand only now and then. That is what training has to find out.
"""

import json
from pathlib import Path
from random import Random

from shop import PRICES, Cart, search

SYSTEM = "You fill a cart. Look up each thing, then add one brand of it. Stay within the budget."
HERE = Path(__file__).parent


def problem(random: Random) -> dict:
    wanted = random.sample(sorted(PRICES), 3)
    budget = sum(min(PRICES[thing].values()) for thing in wanted) + random.randint(1, 5)
    text = f"Buy {wanted[0]} and {wanted[1]} and {wanted[2]}. Budget: {budget}"
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"prompt": prompt, "budget": budget, "wanted": wanted}


def demonstration(random: Random) -> dict:
    row = problem(random)
    cart, messages = Cart(), list(row["prompt"])
    cart.reset(**row)
    for thing in row["wanted"]:
        brand = random.choices(["plain", "fancy", "royal"], weights=[5, 3, 2])[0]
        messages += call("search", search(thing), thing=thing)
        messages += call("add", cart.add(thing, brand), thing=thing, brand=brand)
    return {"messages": [*messages, {"role": "assistant", "content": "done"}]}


def call(name: str, said: str, **arguments: str) -> list[dict]:
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turn = {"role": "assistant", "content": "", "tool_calls": [function]}
    return [turn, {"role": "tool", "content": said}]


def main() -> None:
    random, seen = Random(0), {}
    while len(seen) < 500:
        row = problem(random)
        seen[row["prompt"][1]["content"]] = row
    rows = list(seen.values())
    files = {
        "train": rows[:400],
        "eval": rows[400:],
        "demonstrations": [demonstration(random) for _ in range(200)],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (HERE / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
