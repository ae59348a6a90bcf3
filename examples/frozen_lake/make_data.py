"""Writes lakes (their number is all that differs) and demonstrations of walks, some of which end in
a hole or go nowhere."""

import json
from pathlib import Path
from random import Random
from types import MappingProxyType

from elpo_ray.tools.gymnasium import ACTIONS, TextEnvironment

HERE = Path(__file__).parent
SYSTEM = "Walk from S to G over the ice. H is a hole. Say done when it is over."
GOOD = ["down", "down", "right", "right", "down", "right"]


class Lake(TextEnvironment):
    """The environment that agent.yaml names."""

    id = "FrozenLake-v1"
    options = MappingProxyType({"is_slippery": False})
    actions = ACTIONS["FrozenLake"]


def lake(number: int) -> dict:
    question = {"role": "user", "content": f"Lake {number}."}
    return {"prompt": [{"role": "system", "content": SYSTEM}, question], "seed": number}


def demonstration(number: int, random: Random) -> dict:
    row, environment = lake(number), Lake()
    opening = environment.reset(**row)
    system, question = row["prompt"]
    messages = [system, {"role": "user", "content": f"{question['content']}\n\n{opening}"}]
    for action in GOOD:
        if random.random() < 0.15:
            action = random.choice(Lake.actions)
        function = {"name": "act", "arguments": {"action": action}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
            {"role": "tool", "content": environment.act(action)},
        ]
        if "It is over" in messages[-1]["content"]:
            break
    return {"messages": [*messages, {"role": "assistant", "content": "done"}]}


def main() -> None:
    random = Random(0)
    files = {
        "train": [lake(number) for number in range(200)],
        "eval": [lake(number) for number in range(200, 220)],
        "demonstrations": [demonstration(number, random) for number in range(150)],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
