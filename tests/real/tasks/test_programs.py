"""Submitted programs on their tests in the real sandbox: both styles, hostile ones, big data."""

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from fakes import local_tools

from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.tasks.grading.programs import Test as Case
from elpo_ray.tasks.grading.programs import read_tests, run_tests
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
        # What plain Python prints, counts.
        ("import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))", 2),
        ("import atexit, sys\nout = []\natexit.register(lambda: sys.stdout.write(''.join(out)))\n"
         "out.append(str(sum(map(int, input().split()))))\nsys.exit()", 2),
        ("import os\nf = os.fdopen(1, 'w')\nf.write(str(sum(map(int, input().split()))))", 2),
        ("import os\nwith os.fdopen(1, 'w') as f: f.write(str(sum(map(int, input().split()))))", 2),
        ("f = open(1, 'w')\nf.write(str(sum(map(int, input().split()))))", 2),
        ("import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)", 2),
        ("from os import _exit\nimport sys, threading\ndef main():\n"
         "    print(sum(map(int, input().split())))\n    sys.stdout.flush()\n    _exit(0)\n"
         "threading.Thread(target=main).start()", 2),
        ("import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(1)", 0),
        ("import os\nprint(sum(map(int, input().split())))\nos._exit(0)", 0),
        ("import sys\nprint(sum(map(int, input().split())))\nsys.stdout.close()", 2),
        ("import os, sys\nx = sum(map(int, input().split()))\nsys.stdout.close()\n"
         "os.write(1, str(x).encode())", 2),
        ("import sys\nx = sum(map(int, input().split()))\nsys.stdout.close()\nprint(x)", 0),
        ("import os, sys\nprint(sum(map(int, input().split())))\n"
         "sys.stdout = open(os.devnull, 'w')\nprint('lost')", 2),
        ("import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='ascii')\n"
         "print(sum(map(int, input().split())))", 2),
        ("import sys\nsys.__stdout__.write(str(sum(map(int, sys.__stdin__.read().split()))))", 2),
        ("class Last:\n    def __init__(self): self.x = sum(map(int, input().split()))\n"
         "    def __del__(self): print(self.x)\nlast = Last()", 2),
        ("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\n"
         "pool.submit(lambda: print(sum(map(int, input().split()))))", 2),
        ("import sys\nprint('x' * 10**7, file=sys.stderr)\n"
         "print(sum(map(int, input().split())))", 2),
        ("print(sum(map(int, open('/dev/stdin').read().split())))", 2),
        ("import os\nprint(sum(map(int, input().split())), *os.listdir())", 2),
        # The names and limits of LiveCodeBench.
        ("print(reduce(add, map(int, stdin.readline().split())))", 2),
        ("import sys\ndef f(n): return 0 if n == 0 else f(n - 1)\n"
         "print(sum(map(int, input().split())) + f(45_000))", 2),
        ("@lru_cache(None)\ndef f(n): return 0 if n == 0 else f(n - 1)\n"
         "print(sum(map(int, input().split())) + f(24_000))", 2),
        ("print(sum(map(int, input().split())) + len(str(10**50_000)) - 50_001)", 2),
        ("import datetime\nd = datetime.datetime(2024, 1, 1)\n"
         "print(sum(map(int, input().split())))", 2),
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


@pytest.mark.parametrize(
    ("program", "expected", "passed"),
    [
        ("import numpy as np\ndef f(): return np.int64(4)", 4, 1),
        ("import numpy as np\ndef f(): return np.array([[1, 2], [3, 4]])", [[1, 2], [3, 4]], 1),
        ("import numpy as np\ndef f(): return [np.float64(0.5), np.bool_(True)]", [0.5, True], 1),
        ("import numpy as np\ndef f(): return {np.int64(1): np.array([2])}", {"1": [2]}, 1),
        ("def f(): return (1, (2, 3))", [1, [2, 3]], 1),
        ("from fractions import Fraction\ndef f(): return Fraction(4, 2)", 2, 1),
        ("def f(): return {1, 2}", [1, 2], 0),
        ("def f(): return 2.0", 2, 1),
        ("def f(): return 2", 2.0, 1),
        ("def f(): return 2.0000001", 2, 0),
        ("def f(): return 0.1 + 0.2", 0.3, 1),
        ("def f(): return 0.30001", 0.3, 0),
        ("def f(): return {str(i): i / 3 for i in range(9999, -1, -1)}",
         {str(i): round(i / 3, 9) for i in range(10000)}, 1),
        ("def f(): return {str(i): i / 3 for i in range(9999, 0, -1)}",
         {str(i): round(i / 3, 9) for i in range(10000)}, 0),
        ("def f(): return '12'", "12", 1),
        ("def f(): return 12", "12", 0),
        ("class Solution:\n    def f(self): return 1\ndef g(): return 2", 1, 1),
        ("print('x' * 3_000_000)\ndef f(): return 1", 1, 1),
    ],
)  # fmt: skip
async def test_results(tools: PooledTools, program: str, expected: object, passed: int) -> None:
    case = Case(call="f", expected=expected)
    assert (await run_tests(program, [case], tools)).passed == passed


async def test_long_integers_are_results(tools: PooledTools) -> None:
    (case,) = read_tests({"fn_name": "f", "inputs": ["5000"], "outputs": ["1" + "0" * 5000]})
    assert (await run_tests("def f(n): return 10**n", [case], tools)).passed == 1
    assert (await run_tests("def f(n): return 10**n + 1", [case], tools)).passed == 0


async def test_names_that_are_given_are_not_those_of_the_program(tools: PooledTools) -> None:
    case = Case(call="search", arguments=([5, 7], 7), expected=1)
    method = "class Solution:\n    def search(self, xs, x): return xs.index(x)"
    assert (await run_tests(method, [case], tools)).passed == 1
    greatest = Case(call="gcd", arguments=(4, 6), expected=2)
    assert (await run_tests("x = 1", [greatest], tools)).passed == 0
    assert (await run_tests("from math import gcd", [greatest], tools)).passed == 1


@pytest.mark.parametrize(
    ("off", "exact", "passed"), [(0, True, 1), (1e-8, False, 1), (1e-8, True, 0), (1e-4, False, 0)]
)
async def test_many_numbers_are_compared_one_by_one(
    tools: PooledTools, off: float, exact: bool, passed: int
) -> None:
    expected = "".join(f"{i / 7:.9f} {i}\n" for i in range(30_000))
    case = Case(input="", expected=expected)
    program = f"for i in range(30_000): print(f'{{i / 7 + {off}:.9f}} {{i}}')"
    assert (await run_tests(program, [case], tools, exact=exact)).passed == passed


async def test_the_tests_own_data_is_not_the_programs(tools: PooledTools) -> None:
    numbers = "\n".join(str(i) for i in range(2_700_000)) + "\n"
    assert len(numbers) > 20_000_000
    case = Case(input=numbers, expected=str(sum(range(2_700_000))))
    for read in ("sys.stdin.buffer.read()", "open(0).read()", "b''.join(sys.stdin.buffer)"):
        program = f"import sys\nprint(sum(map(int, {read}.split())))"
        assert (await run_tests(program, [case], tools)).passed == 1, read
    small = Case(input=numbers[:12_000_000], expected="12000000")
    writes = "import os\nopen('own', 'w').write('x' * 10_000_000)\n"
    program = writes + "print(len(os.read(0, os.fstat(0).st_size)))"
    assert (await run_tests(program, [small], tools)).passed == 1
    assert (await run_tests("print(12000000)", [small, case], tools)).passed == 1


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
