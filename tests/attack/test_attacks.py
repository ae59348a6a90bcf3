"""Every attack in every tier that this machine offers: as root, as an ordinary user, in the open
and under the filter and capabilities of a container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalogue import ATTACKS

pytestmark = pytest.mark.attack

HOST = Path(__file__).with_name("host.py")
WORLDS = {
    "root": [],
    "user": ["user"],
    "root-container": ["container"],
    "user-container": ["user", "container"],
    "root-bubblewrap": ["bubblewrap"],
    "user-bubblewrap": ["user", "bubblewrap"],
}


class Host:
    """A supervisor's process in surroundings of its own."""

    def __init__(self, world: str) -> None:
        self.world = world
        self._process = subprocess.Popen(
            [sys.executable, str(HOST), *WORLDS[world]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said = self._listen()

    def _listen(self) -> dict[str, str] | str | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the supervisor died"
        said: dict[str, str] | str | None = json.loads(line)
        return said

    def suffers(self, number: int) -> str | dict[str, str] | None:
        """What went wrong in one attack."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return self._listen()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._process.stdout.close()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(world, marks=[pytest.mark.long] * world.endswith("bubblewrap"))
        for world in WORLDS
    ],
)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    if request.param.startswith("root") and os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    made = Host(request.param)
    if isinstance(made.said, dict) and "absent" in made.said:
        made.close()
        pytest.skip(made.said["absent"])
    yield made
    made.close()


def test_the_tier_is_what_these_surroundings_offer(host: Host) -> None:
    assert isinstance(host.said, dict)
    if host.world.endswith("container"):
        assert host.said["isolation"] == "standard"
    elif host.world.endswith("bubblewrap"):
        assert host.said["isolation"] == "strong"
    else:
        assert host.said["isolation"] in ("strong", "standard")


def test_all_attacks_are_there() -> None:
    assert sorted(ATTACKS) == list(range(1, 71))


@pytest.mark.parametrize("number", sorted(ATTACKS), ids=lambda n: f"{n}-{ATTACKS[n].name}")
def test_attack_ends_as_it_must(host: Host, number: int) -> None:
    wrong = host.suffers(number)
    assert wrong is None, wrong
