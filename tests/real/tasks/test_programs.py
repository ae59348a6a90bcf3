"""Submitted programs on their tests in the real sandbox: both styles, hostile ones, big data."""

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from fakes import local_tools

from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.tasks.grading.programs import Test as Case
from elpo_ray.tasks.grading.programs import run_tests
from elpo_ray.tools.interpreter import PooledTools
from elpo_ray.tools.sandbox_host import limits_of
from sandbox.supervisor import Sandbox

pytestmark = pytest.mark.real

SUM = [Case(input="1 2\n", expected="3\n"), Case(input="10 -4\n", expected="6")]
DOUBLE = [Case(call="double", arguments=(2,), expected=4)]


@pytest_asyncio.fixture
async def tools() -> AsyncIterator[PooledTools]:
    config = SandboxConfig(wall_s=3, cpu_s=3)
    async with Sandbox(limits_of(config), sessions=4) as sandbox:
        yield local_tools(sandbox, config)


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("print(sum(map(int, input().split())))", 2),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", 2),
        ("print(sum(map(int, open(0).read().split())))", 2),
        ("import sys, os\na, b = sys.stdin.buffer.read().split()\n"
         "os.write(1, str(int(a) + int(b)).encode())", 2),
        ("import threading\ndef main():\n    print(sum(map(int, input().split())))\n"
         "threading.Thread(target=main).start()", 2),
        ("def main():\n    print(sum(map(int, input().split())))\n"
         "if __name__ == '__main__':\n    main()\n    exit()", 2),
        ("print(3)", 1),
        ("print(3.0)", 1),
        ("raise SystemExit(1)", 0),
        ("print(3); 1 / 0", 0),
        ("import os\nos._exit(0)", 0),
        ("print('verdict:' + '{\"status\": \"ok\", \"output\": \"3\"}')", 0),
        ("x = []\nwhile True: x.append('x' * 10**7)", 0),
    ],
)  # fmt: skip
async def test_standard_input_and_output(tools: PooledTools, program: str, passed: int) -> None:
    report = await run_tests(program, SUM, tools)
    assert (report.passed, report.total, report.compiles) == (passed, 2, True)


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def double(x): return 2 * x", 1),
        ("class Solution:\n    def double(self, x: List[int]) -> int:\n        return 2 * x", 1),
        ("def double(x): return [4]", 0),
        ("def double(x): return '4'", 0),
        ("def triple(x): return 3 * x", 0),
        ("class Equal:\n    def __eq__(self, other): return True\n"
         "def double(x): return Equal()", 0),
        ("import json\njson.loads = lambda *_: 4\njson.dumps = lambda *_: '4'\n"
         "def double(x): return 5", 0),
    ],
)  # fmt: skip
async def test_functions(tools: PooledTools, program: str, passed: int) -> None:
    assert (await run_tests(program, DOUBLE, tools)).passed == passed


@pytest.mark.parametrize("result", ["4", "[4]"])
async def test_a_wrapped_result_matches_both_ways(tools: PooledTools, result: str) -> None:
    wrapped = Case(call="double", arguments=(2,), expected=[4], wrapped=True)
    assert (await run_tests(f"def double(x): return {result}", [wrapped], tools)).passed == 1


async def test_a_program_that_does_not_compile_is_no_program(tools: PooledTools) -> None:
    assert not (await run_tests("def f(:", SUM, tools)).compiles


async def test_endless_programs_are_given_up_after_a_few_tests(tools: PooledTools) -> None:
    many = [Case(input=f"{i} 1", expected=str(i + 1)) for i in range(40)]
    report = await run_tests("while True: pass", many, tools)
    assert (report.passed, report.total) == (0, 40)


async def test_megabytes_in_and_out(tools: PooledTools) -> None:
    lines = "\n".join(f"{i} é\\n" for i in range(300_000))
    echo = "import sys\nsys.stdout.write(sys.stdin.read())"
    assert len(json.dumps(lines)) > 4_000_000
    good, bad = Case(input=lines, expected=lines), Case(input=lines, expected=lines + "x")
    assert (await run_tests(echo, [good, bad], tools)).passed == 1


async def test_code_that_checks_runs_after_the_program(tools: PooledTools) -> None:
    check = Case(check="def check(f):\n    assert abs(f(2) - 4) < 1e-6\ncheck(double)")
    assert (await run_tests("def double(x): return x + x", [check], tools)).passed == 1
    assert (await run_tests("def double(x): return x", [check], tools)).passed == 0
