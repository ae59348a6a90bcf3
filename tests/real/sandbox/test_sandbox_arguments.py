"""Wrong arguments of the sandbox: each comes to one line that names it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sandbox.limits import Limits
from sandbox.results import SandboxFailure
from sandbox.supervisor import Sandbox

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    "wrong",
    [
        {"setup": 5}, {"setup": None}, {"setup": b"1"}, {"at": 5}, {"at": ""}, {"tree": 5},
        {"keep": "bad"}, {"keep": None}, {"setup": "#" * (9 << 20)},
    ],
)  # fmt: skip
async def test_what_no_session_can_be_opened_with_is_refused_in_one_line(
    wrong: dict[str, Any],
) -> None:
    async with Sandbox() as made:
        with pytest.raises((TypeError, ValueError), match=rf"^{next(iter(wrong))}[=:].*$") as said:
            await made.open(**wrong)
        assert len(str(said.value)) < 250 and made.layers == ()


async def test_only_strings_are_cells() -> None:
    async with Sandbox() as made:
        session = await made.open()
        for wrong in (5, None, b"1", ["1"]):
            code: Any = wrong
            with pytest.raises(TypeError, match=rf"^code={re.escape(repr(wrong))}: use a string$"):
                await session.call(code)
        assert (await session.call("1 + 1")).value == "2"


@pytest.mark.parametrize(
    "wrong",
    [
        {"preload": 5}, {"preload": None}, {"preload": [1]}, {"preload": b"math"},
        {"limits": {"wall_s": 1}}, {"limits": 5}, {"allow_degraded": "x"}, {"bubblewrap": 1},
    ],
)  # fmt: skip
def test_what_no_sandbox_can_be_made_with_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{next(iter(wrong))}=.*: use .*$"):
        Sandbox(**wrong)


@pytest.mark.parametrize("name", ["memory_mib", "open_files"])
def test_a_limit_that_no_session_starts_with_is_refused(name: str) -> None:
    few: dict[str, Any] = {name: 1}
    with pytest.raises(ValueError, match=rf"^limits\.{name}=1: use \d+ or more$"):
        Limits(**few)


async def test_a_session_starts_with_the_least_limits() -> None:
    async with Sandbox(Limits(memory_mib=64, open_files=16)) as made:
        session = await made.open()
        await session.call("x = 1")
        assert (await session.call("x + 1")).value == "2"


async def test_too_little_memory_for_what_is_preloaded_is_said() -> None:
    pytest.importorskip("sympy")
    async with Sandbox(Limits(memory_mib=64), preload=("numpy", "sympy")) as made:
        with pytest.raises(SandboxFailure, match=r"raise limits\.memory_mib"):
            await made.open()
