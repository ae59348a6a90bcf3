"""Submitted programs on their tests, in the sandbox.

Tests come as in the RL data and in LiveCodeBench: standard input and output, or arguments and the
result of a function. Invariants: every test has a session of its own; the expected output never
enters a session (but for test code that is more than literal comparisons, which can only run beside
the program), so a program cannot read or patch its way to a pass; a sandbox that fails raises
InfrastructureError, and only what the program did counts as a failed test.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import binascii
import inspect
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from elpo_ray.interfaces import Tools, ToolSession
from elpo_ray.tasks.grading import harness
from elpo_ray.tasks.grading.outputs import read_json, same_lines, same_value
from elpo_ray.tools.code_interpreter import NAME
from elpo_ray.types import InfrastructureError, ToolCall, ToolKind, ToolResult

AT_ONCE = 4
"""Tests of one program that run at the same time."""
MAX_TIMEOUTS = 3
"""A program that ran out of time on so many tests is not run on the rest, which it fails."""
CHUNK = 1 << 20
"""Characters of a test that are sent in one call; the sandbox bounds the length of a call."""
SPARE_BYTES, SPARE_FACTOR = 1 << 20, 16
"""An output longer than SPARE_BYTES + SPARE_FACTOR times the expected one is wrong unread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One test, of one of three styles: `input` is the standard input and `expected` the output;
    or `call` names a function and `expected` is its result, as JSON data; or `check` is code that
    must not raise after the program."""

    expected: Any = None
    input: str = ""
    call: str | None = None
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    check: str | None = None
    wrapped: bool = False
    """`expected` may be the result in a list: sets differ, and a row does not say."""


@dataclass(frozen=True, slots=True)
class TestReport:
    """How a program did."""

    passed: int
    total: int
    compiles: bool = True

    @property
    def fraction(self) -> float:
        return self.passed / self.total


async def run_tests(
    program: str, tests: Sequence[Test], tools: Tools, *, exact: bool = False
) -> TestReport:
    """Every test of `program`; numbers must be equal with `exact`, else close (`outputs`). Raises
    InfrastructureError."""
    assert tests, "a code problem has tests"
    passed = timeouts = 0
    for first in range(0, len(tests), AT_ONCE):
        batch = tests[first : first + AT_ONCE]
        results = await asyncio.gather(*(_run(program, test, tools, exact) for test in batch))
        if _Result.no_program in results:
            return TestReport(0, len(tests), compiles=False)
        passed += results.count(_Result.passed)
        timeouts += results.count(_Result.timeout)
        if timeouts >= MAX_TIMEOUTS:
            break
    return TestReport(passed, len(tests))


class _Result(Enum):
    """How one test ended."""

    passed = "passed"
    failed = "failed"
    timeout = "timeout"
    no_program = "no program"


async def _run(program: str, test: Test, tools: Tools, exact: bool) -> _Result:
    session = await tools.open(branches=False)
    try:
        result = await _call(session, await _cell(program, test, session))
        reply = _reply(result)
        if reply.get("status") == "syntax":
            return _Result.no_program
        if reply.get("status") != "ok":
            return _Result.timeout if result.kind is ToolKind.TIMEOUT else _Result.failed
        if test.check is not None or _is_digest(reply, test):
            return _Result.passed
        output = await _output(reply, test, session)
    finally:
        await session.close()
    # In a thread: outputs may be megabytes.
    right = output is not None and await asyncio.to_thread(matches, test, output, exact)
    return _Result.passed if right else _Result.failed


async def _cell(program: str, test: Test, session: ToolSession) -> str:
    """The code that runs the test. What is too long for one call is brought into the session
    first. Raises InfrastructureError if it does not take it: the program has not run yet."""
    given = asdict(test)
    del given["expected"], given["wrapped"]
    payload = json.dumps({"program": program, "test": given})
    code = inspect.getsource(harness)
    say = f"print('\\n{harness.MARK}' + json.dumps(run_test(**json.loads(given))))"
    if len(payload) <= CHUNK:
        return f"{code}\ngiven = {payload!r}\n{say}"
    parts = [payload[i : i + CHUNK] for i in range(0, len(payload), CHUNK)]
    for cell in ("given = ''", *(f"given += {part!r}" for part in parts), code):
        result = await _call(session, cell)
        if result.kind is not ToolKind.OK:
            raise InfrastructureError(
                f"a session did not take the {len(payload):,} characters of a test "
                f"({result.kind.value}: {result.text[-200:]}); raise sandbox.memory_mib, and leave "
                "sandbox.stateless out"
            )
    return say


async def _call(session: ToolSession, code: str) -> ToolResult:
    return await session.call(ToolCall(NAME, {"code": code}))


# --- what the harness says, which is the program's own claim --------------------------------------


def _said(result: ToolResult) -> str | None:
    """The line after the last mark; None if the call did not come to its end, or to that of
    the program's own process."""
    _, mark, said = result.text.rpartition(harness.MARK)
    told = mark and result.kind in (ToolKind.OK, ToolKind.EXITED)
    return said.split("\n")[0] if told else None


def _reply(result: ToolResult) -> dict[str, Any]:
    """What `run_test` returned; {} if that is not known."""
    try:
        reply = json.loads(_said(result) or "{}")
    except (ValueError, RecursionError):
        return {}
    return reply if isinstance(reply, dict) else {}


def _is_digest(reply: dict[str, Any], test: Test) -> bool:
    """Whether the lines of an output are exactly the expected ones."""
    return test.call is None and reply.get("digest") == harness.digest(test.expected)


async def _output(reply: dict[str, Any], test: Test, session: ToolSession) -> str | None:
    """The output as text, fetched piece by piece; None if there is none, or if it is so much
    longer than the expected one that it cannot be right."""
    most = SPARE_BYTES + SPARE_FACTOR * len(str(test.expected))
    size, head = reply.get("size"), reply.get("head")
    if not isinstance(size, int) or not 0 <= size <= most or not isinstance(head, str):
        return None
    unpacker, output, number = zlib.decompressobj(), bytearray(), 0
    try:
        while True:
            output += unpacker.decompress(base64.b64decode(head), most + 1 - len(output))
            if unpacker.eof:
                return output.decode("utf-8", "backslashreplace")
            number += 1
            if len(output) > most or number * harness.PIECE_BYTES > most + SPARE_BYTES:
                return None
            fetch = f"print('\\n{harness.MARK}' + piece({number}))"
            head = _said(await _call(session, fetch))
            if not head:
                return None
    except (binascii.Error, ValueError, zlib.error):
        return None


def matches(test: Test, output: str, exact: bool) -> bool:
    """Whether an output, or a result as JSON, is what the test expects."""
    if test.call is None:
        return same_lines(output, test.expected, exact=exact)
    accepted = [test.expected, *(test.expected if test.wrapped else ())]
    try:
        result = read_json(output)
        return any(same_value(result, expected, exact=exact) for expected in accepted)
    except (ValueError, RecursionError):
        return False


# --- reading tests --------------------------------------------------------------------------------


def read_tests(ground_truth: Any) -> list[Test]:
    """The tests of a row of RL data: `inputs`, `outputs` and optionally `fn_name`; or `test_code`
    that defines `check(candidate)`, with `entry_point` and `import_prefix`. As a dict or its JSON.

    ValueError, saying what is wrong.
    """
    data = _json(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if not isinstance(data, dict):
        raise ValueError("the tests are not an object with inputs and outputs")
    if data.get("test_code"):
        return _asserted(data)
    inputs, outputs = data.get("inputs"), data.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise ValueError("the tests have no lists of inputs and outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    name = data.get("fn_name")
    pairs = list(zip(inputs, outputs, strict=True))
    if name is None:
        return [Test(expected=_text(out), input=_text(given)) for given, out in pairs]
    return [_call_test(name, given, out) for given, out in pairs]


def read_livecodebench(row: dict[str, Any]) -> list[Test]:
    """Public and private tests of a LiveCodeBench row. ValueError, saying what is wrong."""
    name = (_json(row.get("metadata") or "{}") or {}).get("func_name")
    cases = _cases(row["public_test_cases"]) + decode_private(row["private_test_cases"])
    tests = []
    for case in cases:
        if case.get("testtype") == "functional":
            if not name:
                raise ValueError("a functional test, but metadata has no func_name")
            tests.append(_call_test(name, case["input"], case["output"]))
        else:
            tests.append(Test(expected=case["output"], input=case["input"]))
    if not tests:
        raise ValueError("no tests")
    return tests


def read_public(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Input and output of the public tests of a LiveCodeBench row, as text."""
    return [(str(case["input"]), str(case["output"])) for case in _cases(row["public_test_cases"])]


def _cases(text: str) -> list[dict[str, Any]]:
    cases = _json(text)
    if not isinstance(cases, list):
        raise ValueError("the test cases are not a list")
    for case in cases:
        if not isinstance(case, dict) or not all(
            isinstance(case.get(name), str) for name in ("input", "output")
        ):
            raise ValueError("a test case has no input and output as text")
    return cases


class _StringUnpickler(pickle.Unpickler):
    """Reads untrusted data: plain values only."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused: {module}.{name}")


def decode_private(text: str) -> list[dict[str, Any]]:
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickled JSON string."""
    if not text.lstrip().startswith("["):
        try:
            packed = zlib.decompress(base64.b64decode(text))
            text = _StringUnpickler(io.BytesIO(packed)).load()
        except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, IndexError) as fault:
            raise ValueError(f"private_test_cases cannot be decoded: {fault}") from None
    return _cases(text)


def _call_test(name: str, given: Any, out: Any) -> Test:
    """Arguments and result as JSON values, or both as text: one JSON value a line. So a result that
    is text beside arguments that are values is that text."""
    if isinstance(given, str):
        arguments = tuple(_json(line) for line in given.split("\n") if line.strip())
        if isinstance(out, str):
            with suppress(ValueError, RecursionError):
                out = read_json(out)
            return Test(expected=out, call=name, arguments=arguments)
    else:
        arguments = tuple(given) if isinstance(given, list) else (given,)
    wrapped = isinstance(out, list) and len(out) == 1
    return Test(expected=out, call=name, arguments=arguments, wrapped=wrapped)


def _asserted(data: dict[str, Any]) -> list[Test]:
    """Arguments and results of literal `assert candidate(…) == …` lines; if the test code has
    others, the one test that runs it, with the expected results, beside the program."""
    code, entry = data["test_code"], data.get("entry_point")
    if not isinstance(code, str) or not isinstance(entry, str):
        raise ValueError("test_code and entry_point are not both text")
    try:
        asserts = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
        tests = [_literal_test(node, entry) for node in asserts]
    except SyntaxError as fault:
        raise ValueError(f"test_code is not Python: {fault}") from None
    except (ValueError, TypeError):  # not literal, or no JSON
        tests = []
    prefix = str(data.get("import_prefix") or "")
    return tests or [Test(check=f"{prefix}\n{code}\ncheck({entry})")]


def _literal_test(node: ast.Assert, entry: str) -> Test:
    match node.test:
        case ast.Compare(
            left=ast.Call(func=ast.Name(), args=given, keywords=named),
            ops=[ast.Eq()],
            comparators=[result],
        ):
            keywords = {str(k.arg): ast.literal_eval(k.value) for k in named}
            arguments = tuple(ast.literal_eval(value) for value in given)
            expected = json.loads(json.dumps(ast.literal_eval(result)))
            json.dumps([arguments, keywords])
            return Test(expected=expected, call=entry, arguments=arguments, keywords=keywords)
    raise ValueError("not a literal comparison")


def _text(value: Any) -> str:
    """Standard input or output: some sets give a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as fault:
        raise ValueError(f"not JSON: {fault}") from None
