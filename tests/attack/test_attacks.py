"""Every attack in every tier that this machine offers: as root, as an ordinary user, in the open
and under the filter and capabilities of a container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from catalogue import ATTACKS

pytestmark = pytest.mark.attack

HOST = Path(__file__).with_name("host.py")
USERS = ("root", "user")
Wrong = dict[str, str] | str | None


class Host:
    """A supervisor's process in surroundings of its own."""

    def __init__(self, *surroundings: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HOST), *surroundings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said = self._listen()

    def _listen(self) -> Wrong:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the supervisor died"
        said: Wrong = json.loads(line)
        return said

    def suffers(self, number: int) -> Wrong:
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


class Hosts:
    """One run by root and one by an ordinary user, attacked at the same time."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.absent: dict[str, str] = {}
        self._hosts: dict[str, Host] = {}
        for user in USERS:
            if user == "root" and os.geteuid() != 0:
                self.absent[user] = "the tests do not run as root"
                continue
            host = Host(*[word for word in (user, kind) if word not in ("root", "open")])
            if isinstance(host.said, dict) and "absent" in host.said:
                self.absent[user] = host.said["absent"]
                host.close()
            else:
                self._hosts[user] = host

    def said(self) -> dict[str, Wrong]:
        """First words of each that is there."""
        return {user: host.said for user, host in self._hosts.items()}

    def suffer(self, number: int) -> dict[str, Wrong]:
        """What went wrong in one attack, by user."""
        with ThreadPoolExecutor() as pool:
            wrong = pool.map(lambda host: host.suffers(number), self._hosts.values())
            return dict(zip(self._hosts, wrong, strict=True))

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()


@pytest.fixture(
    scope="module",
    params=["open", "container", pytest.param("bubblewrap", marks=pytest.mark.long)],
)
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    made = Hosts(request.param)
    if not made.said():
        pytest.skip(str(made.absent))
    yield made
    made.close()


def test_the_tier_is_what_these_surroundings_offer(hosts: Hosts) -> None:
    tiers = {"open": {"strong", "standard"}, "container": {"standard"}, "bubblewrap": {"strong"}}
    for said in hosts.said().values():
        assert isinstance(said, dict) and said["isolation"] in tiers[hosts.kind]


def test_who_is_missing_is_said(hosts: Hosts) -> None:
    if hosts.absent:
        pytest.skip(str(hosts.absent))
    assert set(hosts.said()) == set(USERS)


def test_all_attacks_are_there() -> None:
    assert sorted(ATTACKS) == [*range(1, 100), *range(101, 113), 115, 116]


@pytest.mark.parametrize("number", sorted(ATTACKS), ids=lambda n: f"{n}-{ATTACKS[n].name}")
def test_attack_ends_as_it_must(hosts: Hosts, number: int) -> None:
    wrong = {user: what for user, what in hosts.suffer(number).items() if what is not None}
    assert not wrong, "\n".join(f"{user}: {what}" for user, what in wrong.items())
