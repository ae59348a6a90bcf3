"""Memory put into large pages: its contents stay, and the pages are large where the kernel can."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, hashlib, json, mmap, os
from sandbox import pages

MIB = 1 << 20
data = bytearray(os.urandom(8 * MIB))
trial = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
trial.write(b"x" * (4 * MIB))
start = -(-ctypes.addressof(ctypes.c_char.from_buffer(trial)) // (2 * MIB)) * 2 * MIB
can = pages._LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(2 * MIB), 25) == 0

def large():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))

before, digest = large(), hashlib.sha256(data).hexdigest()
pages.put_together()
same = hashlib.sha256(data).hexdigest() == digest
print(json.dumps({"can": can, "same": same, "gained_kib": large() - before}))
"""


def test_memory_is_put_into_large_pages_and_keeps_its_contents() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    if not found["can"]:
        pytest.skip("this kernel makes no large page on request, or has no free block for one")
    assert found["gained_kib"] >= 4096
