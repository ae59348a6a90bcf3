"""Tools as a user writes them, for the tests: functions, environments, and what goes wrong."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from typing import Any, Literal

from elpo_ray.types import InfrastructureError

PRICES = {"tea": 3, "milk": 2, "cake": 5}
failures: list[str] = []
"""What `flaky` still has to raise."""


def search(query: str) -> str:
    """Search the price list.

    Args:
        query: words to look for
    """
    return ", ".join(f"{item} {price}" for item, price in PRICES.items() if query in item)


async def slowly(seconds: float) -> dict[str, float]:
    """Wait on the loop.

    Args:
        seconds: how long
    """
    await asyncio.sleep(seconds)
    return {"waited": seconds}


def sleep(seconds: float) -> str:
    """Wait in a thread.

    Args:
        seconds: how long
    """
    time.sleep(seconds)
    return "awake"


def spin() -> str:
    """Never come back, and use a processor."""
    while True:
        pass


def big(size: int) -> list[int]:
    """A large result.

    Args:
        size: how many numbers
    """
    return list(range(size))


def misbehave(
    how: Literal["raise", "exit", "interrupt", "empty", "print", "fork", "child exits"],
) -> str:
    """Do something that a tool should not.

    Args:
        how: what
    """
    match how:
        case "raise":
            raise KeyError("no such item")
        case "exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "empty":
            raise RuntimeError
        case "print":
            print("for the log")
        case "fork" | "child exits":
            child = os.fork()
            if child == 0 and how == "child exits":
                os._exit(4)
            if child == 0:
                return "the child"
            _, status = os.waitpid(child, 0)
            return f"the parent of {os.waitstatus_to_exitcode(status)}"
    return how


async def leave() -> str:
    """Exit from an async tool."""
    raise SystemExit(3)


def flaky(value: Any = None, choices: list[str] | None = None) -> Any:
    """Fail by the infrastructure as often as the test says.

    Args:
        value: what to return
        choices: never mind
    """
    if failures:
        raise InfrastructureError(failures.pop())
    return value


class Cart:
    """A cart with a budget."""

    made = 0
    closed = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.items: list[str] = []
        self.budget = 0
        self.spoilt = False

    def reset(self, budget: int = 10, **row: Any) -> str:
        self.budget = budget
        return f"You have {budget}."

    def add(self, item: str, count: int = 1) -> str:
        """Put something into the cart.

        Args:
            item: its name
            count: how many
        """
        if item not in PRICES:
            raise ValueError(f"no {item}")
        self.items += [item] * count
        self.budget -= PRICES[item] * count
        return f"{len(self.items)} items, {self.budget} left"

    def wait(self, seconds: float) -> str:
        """Hold the object.

        Args:
            seconds: how long
        """
        self.spoilt = True
        time.sleep(seconds)
        return "waited"

    def look(self) -> dict[str, Any]:
        """What is in the cart."""
        return {"items": self.items, "spoilt": self.spoilt}

    def reward(self) -> float:
        return float(self.budget >= 0) * len(self.items)

    def close(self) -> None:
        type(self).closed += 1


class ForkedCart(Cart):
    """Copies itself."""

    forks = 0

    def fork(self) -> ForkedCart:
        type(self).forks += 1
        copy = ForkedCart()
        copy.items, copy.budget, copy.spoilt = [*self.items], self.budget, self.spoilt
        return copy


class LockedCart(Cart):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Dice:
    """Not deterministic."""

    rolled = 0

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def roll(self) -> int:
        """Roll the dice."""
        type(self).rolled += 1
        return self.rolled


class Picky:
    """Wants a column."""

    def reset(self, level: int) -> None:
        if level < 0:
            raise OSError("no such level")

    def go(self) -> None:
        """Go on."""


class Broken:
    def reset(self) -> None:
        sys.exit(1)

    def go(self) -> None:
        """Go on."""

    def reward(self) -> float:
        raise ZeroDivisionError("no items")
