"""What the sandbox costs on this machine: `python benchmarks/sandbox.py [--quick]` prints JSON.

`--against CHECKOUT` compares it with another version, in short turns: a line of JSON after each,
whose `ratio` is above 1 where this one is better.

All comparisons come from one run. Latencies are measured by the caller's clock with one call at a
time, so they include the effect of other load on the machine. `cpu_ms` is the processor time per
call of supervisor, spawner and sessions together; one free core would do 1000 / `cpu_ms` calls per
second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SERVE = "--serve"
"""With the folder of a checkout behind it: measure what is asked for on stdin, with its code."""
sys.path[0] = sys.argv[2] if sys.argv[1:2] == [SERVE] else str(ROOT)  # here this file is `sandbox`

from sandbox.limits import Limits  # noqa: E402
from sandbox.results import Keep, Kind, SessionState  # noqa: E402
from sandbox.supervisor import PRELOADS, Sandbox, Session  # noqa: E402

PRINT = "print(1 + 1)"
SOLVE = "from sympy import Symbol, solve\nx = Symbol('x')\nsolve(x**2 - 5*x + 6, x)"
LIMITS = Limits(wall_s=30, cpu_s=30)
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
MIXTURE = (
    "x = 1",
    "print('a' * 1000)",
    "1 / 0",
    "open('note', 'w').write('text')",
    "import os\nos._exit(1)",
    "sum(range(10_000))",
    "raise SystemExit",
    "[bytearray(1 << 20) for _ in range(4)] and None",
)
Values = dict[str, Any]


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def cpu_s() -> float:
    """Processor time of this process and its descendants, those that have ended included."""
    total = 0.0
    for pid in family(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15])) * TICK_S
    return total


def shares(seconds: list[float]) -> Values:
    """Percentiles in milliseconds."""
    ordered = sorted(seconds)
    return {
        "calls": len(ordered),
        "p50_ms": round(1000 * median(ordered), 2),
        "p99_ms": round(1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        "calls_per_s": round(len(ordered) / sum(ordered), 1),
    }


async def measured(count: int, once: Callable[[], Awaitable[object]]) -> Values:
    """Run `once` `count` times, after a few runs to warm up."""
    for _ in range(3):
        await once()
    seconds, cpu_before = [], cpu_s()
    for _ in range(count):
        start = time.perf_counter()
        await once()
        seconds.append(time.perf_counter() - start)
    cpu_ms = 1000 * (cpu_s() - cpu_before) / count
    return shares(seconds) | {"cpu_ms": round(cpu_ms, 2)}


def fresh_process(code: str, count: int) -> Values:
    """The same code in a new, unconfined Python process."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return shares(seconds)


async def calls(sandbox: Sandbox, count: int) -> Values:
    """Single calls: `stateless` in a kept tree, `alone` each in a confined family of its own."""
    found: Values = {}
    for name, code in (("print", PRINT), ("sympy", SOLVE)):
        session = await sandbox.open(tree="stateless", keep=Keep.NOTHING)

        async def once(session: Session = session, code: str = code) -> None:
            result = await session.call(code)
            assert result.kind is Kind.OK, result

        async def alone(code: str = code) -> None:
            session = await sandbox.open()
            result = await session.call(code)
            assert result.kind is Kind.OK, result
            await session.close()

        found[f"{name}_stateless"] = await measured(count, once)
        await session.close()
        found[f"{name}_alone"] = await measured(count // 4, alone)
    await sandbox.release("stateless")
    return found


async def steps(sandbox: Sandbox, count: int) -> Values:
    """Steps of sessions up to depths of 8 and of 16; each step leaves a snapshot."""
    found: Values = {}
    for name, code, depth in (
        ("trivial_depth_8", "n = n + 1", 8),
        ("sympy_depth_8", SOLVE, 8),
        ("trivial_depth_16", "n = n + 1", 16),
    ):
        seconds, cpu_before = [], cpu_s()
        for _ in range(max(1, count // depth)):
            session = await sandbox.open(setup="n = 0")
            for _ in range(depth):
                start = time.perf_counter()
                result = await session.call(code)
                seconds.append(time.perf_counter() - start)
                assert (result.kind, result.snapshot) == (Kind.OK, "kept"), result
            await session.close()
        found[name] = shares(seconds) | {
            "cpu_ms_with_open_and_close": round(1000 * (cpu_s() - cpu_before) / len(seconds), 2)
        }
    return found


async def branching(sandbox: Sandbox, repeats: int) -> Values:
    """A branch from a prefix of 16 cells of 0.2 s, until its first call has returned."""
    trunk = await sandbox.open(tree="branching")
    for number in range(16):
        await trunk.call(f"import time\ntime.sleep(0.2)\nx = {number}")
    by = {}
    for how, at in (
        ("fork", trunk.state),
        ("replay", replace(trunk.state, tree="", host="")),
    ):
        seconds = []
        for _ in range(repeats if how == "fork" else 2):
            start = time.perf_counter()
            branch = await sandbox.open(at=at)
            result = await branch.call("x")
            seconds.append(time.perf_counter() - start)
            assert (result.value, result.restored_by) == ("15", how), result
            await branch.close()
        by[how] = median(seconds)
    await trunk.close()
    await sandbox.release("branching")
    return {
        "depth_16_fork_ms": round(1000 * by["fork"], 2),
        "depth_16_replay_ms": round(1000 * by["replay"], 1),
        "times_faster": round(by["replay"] / by["fork"], 1),
    }


def private_kib(pid: int) -> int:
    """Memory that is freed when the process ends: private pages and page tables."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in (rollup + status).splitlines() if ":" in line)
    return sum(int(lines[name].split()[0]) for name in ("Private_Dirty", "VmPTE"))


async def memory(sandbox: Sandbox) -> Values:
    """Snapshots per GiB, by the memory that the kernel counts as private to each."""
    found: Values = {}
    for name, code, count in (("trivial", "n = 1", 40), ("sympy", SOLVE, 20)):
        before = set(family(os.getpid()))
        session = await sandbox.open(tree="memory")
        for _ in range(count // 4):  # chains of four, as branches are
            chain = await sandbox.open(at=session.state, tree="memory")
            for _ in range(4):
                await chain.call(code)
            await chain.close()
        made = set(family(os.getpid())) - before
        try:
            sizes = sorted(private_kib(pid) for pid in made)[1:]  # not the first process
        except PermissionError:
            found[name] = "needs root"
            continue
        finally:
            await session.close()
            await sandbox.release("memory")
        mean = sum(sizes) / len(sizes)
        found[name] = {"mib": round(mean / 1024, 2), "per_gib": int(2**20 / mean)}
    return found


async def limits(repeats: int) -> Values:
    """How late a timeout comes, by the caller's clock; also long outputs under a short limit."""
    late = []
    async with Sandbox(Limits(wall_s=0.5, cpu_s=30)) as hasty:
        session = await hasty.open()
        for code in ("while True: pass", "import time\ntime.sleep(9)") * repeats:
            start = time.perf_counter()
            result = await session.call(code)
            late.append(time.perf_counter() - start - 0.5 - result.queue_s)
            assert result.kind is Kind.TIMEOUT, result
    kinds = set()
    async with Sandbox(Limits(wall_s=3)) as prompt:
        session = await prompt.open()
        for _ in range(repeats):
            kinds.add((await session.call("print('x' * 150_000)")).kind.value)
    return {
        "timeout_overshoot_ms": {
            "p50": round(1000 * median(late), 1),
            "max": round(1000 * max(late), 1),
        },
        "print_150_kb": sorted(kinds),
    }


def remains(folder: Path) -> Values:
    """What could be left behind: processes, descriptors, files, memory of the processes (KiB)."""
    pids = family(os.getpid())
    resident = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        resident += next(
            int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")
        )
    files = sum(len(names) + len(inner) for _, inner, names in os.walk(folder))
    descriptors = len(os.listdir("/proc/self/fd"))
    return {"processes": len(pids), "descriptors": descriptors, "files": files, "kib": resident}


async def endurance(total: int) -> Values:
    """Mixed calls, eight per session, some of them in a tree with branches."""
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        start = remains(Path(folder))
        async with Sandbox(LIMITS, sessions=8) as sandbox:

            async def worker(number: int, share: int) -> None:
                for turn in range(share // len(MIXTURE)):
                    tree = f"{number}-{turn}" if turn % 2 else None
                    trunk = await sandbox.open(tree=tree)
                    state = SessionState()
                    for code in MIXTURE[: len(MIXTURE) // 2]:
                        await trunk.call(code)
                        state = trunk.state
                    branch = await sandbox.open(at=state, tree=tree)
                    for code in MIXTURE[len(MIXTURE) // 2 :]:
                        await branch.call(code)
                    await branch.close()
                    await trunk.close()
                    if tree is not None:
                        await sandbox.release(tree)

            async def round_of(count: int) -> Values:
                await asyncio.gather(*(worker(number, count // 4) for number in range(4)))
                await asyncio.sleep(1)
                return remains(Path(folder))

            early = await round_of(total // 10)
            begun, cpu_before = time.perf_counter(), cpu_s()
            late = await round_of(total - total // 10)
            seconds, cpu = time.perf_counter() - begun - 1, cpu_s() - cpu_before
            counted = sandbox.gauges()
        end = remains(Path(folder))
        tempfile.tempdir = None
    return {
        "calls": counted["calls"],
        "sandbox_failures": counted["failures"],
        "calls_per_s": round((total - total // 10) / seconds, 1),
        "cpu_ms": round(1000 * cpu / (total - total // 10), 2),
        "start": start,
        "after_a_tenth": early,
        "after_all": late,
        "closed": end,
    }


class Compared:
    """What is compared with another checkout, in short turns."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._trunk: Session | None = None

    async def print(self) -> Values:
        return await self._stateless(PRINT, 60)

    async def sympy(self) -> Values:
        return await self._stateless(SOLVE, 20)

    async def _stateless(self, code: str, count: int) -> Values:
        session = await self._sandbox.open(tree="stateless", keep=Keep.NOTHING)

        async def once() -> None:
            result = await session.call(code)
            assert result.kind is Kind.OK, result

        found = await measured(count, once)
        await session.close()
        return found

    async def step_depth_8(self) -> Values:
        seconds, cpu_before = [], cpu_s()
        for _ in range(4):
            session = await self._sandbox.open(setup="n = 0")
            for _ in range(8):
                start = time.perf_counter()
                result = await session.call("n = n + 1")
                seconds.append(time.perf_counter() - start)
                assert (result.kind, result.snapshot) == (Kind.OK, "kept"), result
            await session.close()
        return shares(seconds) | {"cpu_ms": round(1000 * (cpu_s() - cpu_before) / 32, 2)}

    async def branch_depth_16(self) -> Values:
        if self._trunk is None:
            self._trunk = await self._sandbox.open(tree="branching")
            for number in range(16):
                await self._trunk.call(f"x = {number}")
        state = self._trunk.state

        async def once() -> None:
            branch = await self._sandbox.open(at=state)
            result = await branch.call("x")
            assert (result.value, result.restored_by) == ("15", "fork"), result
            await branch.close()

        return await measured(20, once)

    async def snapshots(self) -> Values:
        return await memory(self._sandbox)

    async def serve(self) -> None:
        """Answer each name of a comparison on stdin with a line of JSON."""
        while name := (await asyncio.to_thread(sys.stdin.readline)).strip():
            print(json.dumps(await getattr(self, name)()), flush=True)


async def serve() -> None:
    async with Sandbox(LIMITS, preload=PRELOADS["math"]) as sandbox:
        await Compared(sandbox).serve()


COMPARISONS = ("print", "sympy", "step_depth_8", "branch_depth_16", "snapshots")


def better_by(name: str, found: list[Values], others: list[Values]) -> Values:
    """By what factor the first is better than the second: medians over all turns so far."""

    def middle(values: list[Values], *path: str) -> float:
        for key in path:
            values = [value[key] for value in values]
        return median(map(float, values))  # type: ignore[arg-type]

    if name == "snapshots":
        paths = {kind: (kind, "per_gib") for kind in found[0]}
        return {
            kind: round(middle(found, *path) / middle(others, *path), 3)
            for kind, path in paths.items()
        }
    return {
        unit.removesuffix("_ms"): round(middle(others, unit) / middle(found, unit), 3)
        for unit in ("p50_ms", "p99_ms", "cpu_ms")
    }


def compare(other: Path, turns: int, names: Sequence[str]) -> None:
    """Print, after each turn, how this checkout compares with another one; above 1 is better."""
    command = [sys.executable, str(Path(__file__).resolve()), SERVE]
    servers = [
        subprocess.Popen(
            [*command, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for root in (ROOT, other.resolve())
    ]
    found: dict[str, tuple[list[Values], list[Values]]] = {name: ([], []) for name in names}
    for turn in range(turns):
        for name, values in found.items():
            for at in (0, 1) if turn % 2 else (1, 0):
                stdin, stdout = servers[at].stdin, servers[at].stdout
                assert stdin is not None and stdout is not None
                stdin.write(f"{name}\n")
                stdin.flush()
                values[at].append(json.loads(stdout.readline()))
            line = {"turn": turn + 1, "what": name, "ratio": better_by(name, *values)}
            print(json.dumps(line | {"here": values[0][-1], "other": values[1][-1]}), flush=True)
    for server in servers:
        server.communicate("\n")


async def run(quick: bool) -> Values:
    count = 60 if quick else 300
    report: Values = {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load_before": os.getloadavg(),
        },
        "fresh_process": {
            "print": fresh_process(PRINT, 10),
            "sympy": fresh_process(SOLVE, 3 if quick else 6),
        },
    }
    async with Sandbox(LIMITS, preload=PRELOADS["math"]) as sandbox:
        report["calls"] = await calls(sandbox, count)
        report["isolation"] = sandbox.isolation
        report["steps"] = await steps(sandbox, count // 2)
        report["branching"] = await branching(sandbox, 10)
        report["snapshots"] = await memory(sandbox)
    report |= await limits(3 if quick else 10)
    report["endurance"] = await endurance(1000 if quick else 10_000)
    fresh, ours = report["fresh_process"]["sympy"], report["calls"]["sympy_stateless"]
    report["sympy_times_faster_than_fresh"] = round(fresh["p50_ms"] / ours["p50_ms"], 1)
    report["machine"]["load_after"] = os.getloadavg()
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="compare with another one, in turns"
    )
    parser.add_argument("--turns", type=int, default=6, help="of a comparison")
    parser.add_argument("--what", nargs="+", choices=COMPARISONS, default=COMPARISONS)
    parser.add_argument(SERVE, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        asyncio.run(serve())
    elif asked.against:
        compare(asked.against, asked.turns, asked.what)
    else:
        print(json.dumps(asyncio.run(run(asked.quick)), indent=2))
