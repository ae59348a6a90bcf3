"""What runs a submitted program on one test. Shipped as source into a session of the sandbox.

It shares its process with the program, which may be hostile: what it reports is the program's own
claim. Builtins and standard library only. The session's file descriptors 0 and 1 are the program's
for its run, so that `open(0)`, `sys.stdin.buffer`, `os.write` and `print` all work.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import types
from typing import Any

INLINE_CHARS = 8000
"""A longer output is reported as a digest: what a session may say is bounded."""
SOLUTION_NAMES = """
from typing import *
from collections import *
from functools import *
from itertools import *
from heapq import *
from bisect import *
from math import *
import collections, functools, itertools, heapq, bisect, math, string, re, random
del pow
"""
"""What programs in the style of LeetCode take for granted."""


def run_test(program: str, test: dict[str, Any]) -> dict[str, str]:
    """What `program` (source) makes of `test`: `status` ("ok", "syntax", "error") and, if ok,
    its `output` or the `digest` of it."""
    try:
        code = compile(program, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"status": "syntax"}
    try:
        if test["check"] is not None:
            exec(test["check"], run_module(code, "__program__").__dict__)
            output = ""
        elif test["call"] is not None:
            output = json.dumps(run_call(code, test["call"], test["arguments"], test["keywords"]))
        else:
            output = run_stdin(code, test["input"])
    except Exception:
        return {"status": "error"}
    if len(output) > INLINE_CHARS:
        return {"status": "ok", "digest": digest(output)}
    return {"status": "ok", "output": output}


def digest(output: str) -> str:
    """Fingerprint of the lines of `output`, spaces at their ends aside."""
    lines = [line.strip() for line in output.strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def run_stdin(code: types.CodeType, text: str) -> str:
    """What the program prints when `text` is its standard input. Raises what the program raises."""
    with open("stdin", "w", encoding="utf-8") as file:
        file.write(text)
    saved = [os.dup(0), os.dup(1)]
    streams = sys.stdin, sys.stdout
    flags = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY | os.O_CREAT | os.O_TRUNC}
    try:
        for number, name in enumerate(flags):
            opened = os.open(name, flags[name])
            os.dup2(opened, number)
            os.close(opened)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        run_module(code, "__main__")
        sys.stdout.flush()
    finally:
        for number, descriptor in enumerate(saved):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout = streams
    with open("stdout", encoding="utf-8", errors="backslashreplace") as file:
        return file.read()


def run_call(
    code: types.CodeType, name: str, arguments: list[Any], keywords: dict[str, Any]
) -> Any:
    """What the function `name` returns, or the method of that name of `Solution`."""
    module = run_module(code, "__program__")
    name = name.rpartition(".")[2]
    if name in module.__dict__:
        return module.__dict__[name](*arguments, **keywords)
    return getattr(module.__dict__["Solution"](), name)(*arguments, **keywords)


def run_module(code: types.CodeType, name: str) -> types.ModuleType:
    """The module after its code ran to the end, its threads included."""
    module = types.ModuleType(name)
    exec(SOLUTION_NAMES, module.__dict__)
    sys.modules[name] = module
    before = threading.enumerate()
    try:
        exec(code, module.__dict__)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError("exit status") from None
    for thread in threading.enumerate():
        if thread not in before and not thread.daemon:
            thread.join()
    return module
