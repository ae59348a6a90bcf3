"""Writes orders, and demonstrations some of which guess what is left instead of looking."""

import json
from pathlib import Path
from random import Random

from server import STOCK

HERE = Path(__file__).parent
SYSTEM = "Say how many crates there are, as a number."
WHO = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ivy", "Jo"]


def order(item: str, who: str) -> dict:
    question = {"role": "user", "content": f"{who} asks: how much {item} is there?"}
    prompt = [{"role": "system", "content": SYSTEM}, question]
    return {"prompt": prompt, "answer": str(STOCK[item]), "item": item}


def demonstration(row: dict, random: Random) -> dict:
    function = {"name": "stock", "arguments": {"item": row["item"]}}
    look = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": row["answer"]},
    ]
    guesses = random.random() < 0.25
    said = str(random.choice(list(STOCK.values()))) if guesses else row["answer"]
    answer = {"role": "assistant", "content": said}
    return {"messages": [*row["prompt"], *([] if guesses else look), answer]}


def main() -> None:
    random = Random(0)
    rows = [order(item, who) for item in STOCK for who in WHO]
    random.shuffle(rows)
    files = {
        "train": rows[16:],
        "eval": rows[:16],
        "demonstrations": [demonstration(row, random) for row in rows[16:] * 3],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (HERE / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
