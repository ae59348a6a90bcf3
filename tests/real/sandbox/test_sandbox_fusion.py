"""The remote backend against a small service of SandboxFusion's form on the loopback device."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import pytest_asyncio

from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.run import ClusterConfig
from elpo_ray.tools.interpreter import PooledTools
from elpo_ray.tools.sandbox_host import SandboxHost, sandbox_of
from elpo_ray.types import ToolCall, ToolsLost
from sandbox.fusion import FusionSandbox
from sandbox.limits import Limits
from sandbox.results import FileRefused, Keep, Kind, SandboxFailure
from sandbox.supervisor import Sandbox

pytestmark = pytest.mark.real


class Service(BaseHTTPRequestHandler):
    """Runs code unconfined, answers as SandboxFusion does."""

    broken = False

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, request["language"]) == ("/run_code", "python")
        if type(self).broken:
            self.send_error(500)
            return
        try:
            with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as file:
                file.write(request["code"].encode())
                file.flush()
                done = subprocess.run(
                    [sys.executable, "-I", file.name],
                    capture_output=True,
                    text=True,
                    timeout=request["run_timeout"],
                    stdin=subprocess.DEVNULL,
                    cwd=folder,
                )
            ran: dict[str, Any] = {
                "status": "Finished" if done.returncode == 0 else "Error",
                "execution_time": 0.1,
                "return_code": done.returncode,
                "stdout": done.stdout,
                "stderr": done.stderr,
            }
        except subprocess.TimeoutExpired:
            ran = {"status": "TimeLimitExceeded", "stdout": None, "stderr": None}
        status = "Success" if ran["status"] == "Finished" else "Failed"
        answer = json.dumps({"status": status, "message": "", "run_result": ran}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Service.broken = False
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest_asyncio.fixture
async def remote(url: str) -> AsyncIterator[FusionSandbox]:
    made = FusionSandbox(url, Limits(wall_s=5, output_kib=4))
    yield made
    await made.close()


async def test_state_lives_on_by_replay_and_branches(remote: FusionSandbox) -> None:
    session = await remote.open(setup="x = [1]\nprint('unseen')")
    result = await session.call("print('seen')\nx.append(2)\nx")
    assert (result.kind, result.stdout, result.value) == (Kind.OK, "seen\n", "[1, 2]")
    assert (result.restored_by, result.isolation) == ("fresh", "remote")
    state = session.state
    assert (await session.call("#" * (9 << 20))).refused and session.state is state
    assert (await session.call("x.append(3)\nx")).value == "[1, 2, 3]"
    branch = await remote.open(at=state)
    result = await branch.call("x.append('b')\nx")
    assert (result.value, result.restored_by) == ("[1, 2, 'b']", "replay")
    assert remote.gauges()["replayed_calls"] == 2


@pytest.mark.parametrize(
    ("code", "kind", "error_type", "kept"),
    [
        ("1 / 0", Kind.ERROR, "ZeroDivisionError", True),
        ("a b", Kind.ERROR, "SyntaxError", True),
        ("", Kind.OK, None, True),
        ("print('\\ud800')", Kind.OK, None, True),
        ("exit()", Kind.EXITED, "SystemExit", True),
        ("import os\nprint('last words', flush=True)\nos._exit(3)", Kind.EXITED, None, False),
        ("while True: pass", Kind.TIMEOUT, None, False),
        ("import os\nos.write(1, b'\\n{}' * 9)", Kind.OK, None, True),
    ],
)
async def test_odd_code_ends_clearly(
    url: str, code: str, kind: Kind, error_type: str | None, kept: bool
) -> None:
    remote = FusionSandbox(url, Limits(wall_s=1))
    session = await remote.open()
    await session.call("x = 41")
    result = await session.call(code)
    assert (result.kind, result.error_type, result.state_kept) == (kind, error_type, kept), result
    assert "harness" not in result.traceback
    assert (await session.call("x + 1")).value == "42"


async def test_a_state_goes_from_one_kind_of_host_to_the_other(remote: FusionSandbox) -> None:
    async with Sandbox(remote.limits) as own:
        session = await own.open(setup="import random")
        await session.call("print('p' * 9000)\nx = random.random()\n'v' * 9000")
        await session.call("1 / 0")
        there = await remote.open(at=session.state)
        expected = (await session.call("x, random.random()")).value
        assert (await there.call("x, random.random()")).value == expected
        back = await own.open(at=replace(there.state, tree=""))
        assert (await back.call("x")).restored_by == "replay"


async def test_files_go_in_and_out(remote: FusionSandbox) -> None:
    session = await remote.open(setup="import os")
    await session.call("os.mkdir('d'); os.chdir('d')")
    await session.put("data/in", bytes(range(256)))
    middle = session.state
    await session.call("open('../out', 'wb').write(open('../data/in', 'rb').read()[::-1])")
    await session.put("data/in", b"new")
    assert await session.get("out") == bytes(range(256))[::-1]
    assert await session.get("data/in") == b"new"
    branch = await remote.open(at=middle)
    assert await branch.get("data/in") == bytes(range(256))
    result = await branch.call("sorted(os.listdir('..'))")
    assert (result.value, result.replay_reason) == ("['d', 'data']", "unsupported")
    for name in ("../x", "/etc/passwd", ""):
        with pytest.raises(FileRefused, match="use a relative path"):
            await session.get(name)
    for name in ("nothing", "d"):
        with pytest.raises(FileRefused, match=f"file '{name}': "):
            await session.get(name)
    with pytest.raises(FileRefused, match="Is a directory"):
        await session.put("d", b"x")
    await session.put("large", bytes(3 << 20))
    with pytest.raises(FileRefused, match="more than 2 MiB"):
        await session.get("large")
    assert (await session.call("os.path.getsize('../large')")).value == str(3 << 20)
    Service.broken = True
    with pytest.raises(SandboxFailure, match="HTTP Error 500"):
        await session.put("a", b"x")
    Service.broken = False
    empty = await remote.open(keep=Keep.NOTHING)
    with pytest.raises(FileRefused, match="keeps nothing"):
        await empty.put("a", b"x")


async def test_a_state_with_files_goes_from_one_kind_of_host_to_the_other(
    remote: FusionSandbox,
) -> None:
    async with Sandbox(remote.limits) as own:
        session = await own.open()
        await session.put("a", b"1")
        with pytest.raises(FileRefused):
            await session.put("a/b", b"2")
        there = await remote.open(at=session.state)
        assert (await there.call("open('a').read()")).value == "'1'"
        await there.put("a", b"3")
        back = await own.open(at=replace(there.state, tree=""))
        assert await back.get("a") == b"3"
        assert (await back.call("1")).restored_by == "replay"


async def test_a_divergence_and_a_broken_service_are_failures(remote: FusionSandbox) -> None:
    session = await remote.open()
    await session.call("import os\nos.urandom(8)")
    result = await session.call("1")
    assert (result.kind, result.error_type) == (Kind.SANDBOX_FAILURE, "ReplayDiverged")
    Service.broken = True
    fresh = await remote.open()
    result = await fresh.call("1")
    assert result.kind is Kind.SANDBOX_FAILURE and "HTTP Error 500" in result.traceback
    assert fresh.state.entries == ()
    assert remote.gauges()["failures"] == 2


async def test_it_is_chosen_by_its_url(url: str) -> None:
    config = SandboxConfig(endpoint=url, wall_s=5)
    tools = PooledTools([SandboxHost(sandbox_of(config, ClusterConfig()))], config)
    session = await tools.open(setup="x = 1", tree="t")
    call = ToolCall("code_interpreter", {"code": "x += 1\nx"})
    assert [(await session.call(call)).text for _ in range(2)] == ["2", "3"]
    await tools.release("t")
    Service.broken = True
    with pytest.raises(ToolsLost, match="failed 3 times"):
        await session.call(call)
    with pytest.raises(ValueError, match=r"sandbox.endpoint='ftp://x'"):
        SandboxConfig(endpoint="ftp://x")
