"""Tools of an MCP server: `{mcp: "python server.py"}` or `{mcp: "https://…/mcp"}` in `task.tools`.

A trajectory has a session of its own: over stdio a process, over HTTP a session of the server. Its
state cannot be copied, so where trajectories branch, calls are run again. With `stateful: false`
all trajectories of a worker share one session. A server that dies, or that cannot be reached, is a
fault of the machines: it is started again and the session's calls are run again.

A server over stdio sees the variables that `task.env` names, and those that any program needs
(`mcp.client.stdio.get_default_environment`). In `headers`, `$NAME` stands for such a variable.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from string import Template
from typing import TYPE_CHECKING, Any

from elpo_ray.config.task import TaskConfig
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.ready_made import check_name, needs, read_entry
from elpo_ray.tools.results import as_text, bounded
from elpo_ray.tools.sources import Schema
from elpo_ray.types import InfrastructureError, Problem, Score, ToolKind, ToolResult

if TYPE_CHECKING:
    from mcp import Client

DEFAULTS: dict[str, Any] = {"mcp": str, "tools": [], "stateful": True, "headers": {}}
"""The command or URL; names of the tools to offer, all without any; whether calls change what later
calls return; HTTP headers."""
PYTHONS = ("python", "python3")
"""Commands that mean the Python that runs this program."""


class McpSource:
    """One server."""

    rewards = False

    def __init__(
        self, where: str, entry: Mapping[str, Any], task: TaskConfig, caller: Caller
    ) -> None:
        """Starts the server once and asks for its tools. ValueError, which begins with `where`, if
        it cannot be reached or a tool cannot be used."""
        needs(where, "mcp")
        values = read_entry(where, entry, DEFAULTS)
        self.name = f"mcp {values['mcp']}"
        self.stateful: bool = values["stateful"]
        self.server = Server(where, values["mcp"], values["headers"], task.env, self.stateful)
        self.timeout_s = task.tool_timeout_s
        listed = _in_thread(where, self.server, self.timeout_s)
        self.schemas: Sequence[Schema] = _chosen(where, listed, values["tools"])

    def check(self, problem: Problem) -> None:
        """Any problem will do."""

    async def open(self, problem: Problem) -> McpInstance:
        return McpInstance(self, await Connection.to(self.server, self.timeout_s))

    async def close(self) -> None: ...


class McpInstance:
    """One session with the server."""

    opening: str | None = None

    def __init__(self, source: McpSource, connection: Connection) -> None:
        self._source = source
        self._connection = connection
        self._connecting = asyncio.Lock()

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """See `sources.ToolInstance`. A session that all trajectories share is made anew when it
        was lost."""
        source = self._source
        async with self._connecting:
            if not source.stateful and self._connection.lost:
                self._connection = await Connection.to(source.server, source.timeout_s)
        return await self._connection.call(name, arguments, source.timeout_s)

    async def fork(self) -> McpInstance | None:
        return None if self._source.stateful else self

    async def reward(self) -> float | bool | Score | None:
        return None

    async def close(self) -> None:
        await self._connection.close()


class Server:
    """How to reach a server."""

    def __init__(
        self,
        where: str,
        address: str,
        headers: Mapping[str, str],
        variables: Sequence[str],
        stateful: bool,
    ) -> None:
        self.address = address
        self._stateful = stateful
        self._variables = {name: os.environ[name] for name in variables if name in os.environ}
        self._words: list[str] = []
        try:
            self._headers = {
                key: Template(str(value)).substitute(self._variables)
                for key, value in headers.items()
            }
        except (KeyError, ValueError) as fault:
            raise ValueError(
                f"{where}: headers: {fault} is no variable that task.env names; add it there, and "
                "write $$ for a dollar sign"
            ) from None
        if self.over_http:
            return
        try:
            self._words = shlex.split(address)
        except ValueError as fault:
            raise ValueError(f"{where}: no command that a shell would read ({fault})") from None
        if not self._words:
            raise ValueError(f"{where}: give a command, such as python server.py, or a URL")
        if self._words[0] in PYTHONS:
            self._words[0] = sys.executable
        if shutil.which(self._words[0]) is None:
            raise ValueError(f"{where}: no program {self._words[0]}; install it or give its path")

    @property
    def over_http(self) -> bool:
        return self.address.startswith(("http://", "https://"))

    async def client(self, stack: AsyncExitStack, errors: Any) -> Client:
        """A client for the server, not yet connected; a process writes its stderr to `errors`. What
        it needs is closed with `stack`."""
        from mcp import Client, StdioServerParameters  # a second to import
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        if self.over_http:
            http = await stack.enter_async_context(create_mcp_http_client(headers=self._headers))
            # Only the older handshake gives a session, in which a server can keep state.
            return Client(
                streamable_http_client(self.address, http_client=http),
                mode="legacy" if self._stateful else "auto",
            )
        command, *arguments = self._words
        parameters = StdioServerParameters(command=command, args=arguments, env=self._variables)
        return Client(stdio_client(parameters, errlog=errors))


class Connection:
    """A connected client. One task of its own opens and closes it, as its library wants."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the connection
        self._closing = asyncio.Event()
        self._ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(self._hold())

    @classmethod
    async def to(cls, server: Server, timeout_s: float) -> Connection:
        """A connection. Raises InfrastructureError if there is none within the time limit."""
        connection = cls(server)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(connection._ready)
        except TimeoutError:
            why = f"no answer within {timeout_s:g} s"
        except Exception as fault:  # the library and the server may fail in any way
            why = _reason(fault)
        else:
            return connection
        said = connection._last_words()
        await connection.close()
        raise InfrastructureError(f"MCP server {server.address}: {why}{said}")

    @property
    def lost(self) -> bool:
        return self._task.done()

    async def client(self) -> Client:
        return await asyncio.shield(self._ready)

    async def call(self, name: str, arguments: dict[str, Any], timeout_s: float) -> ToolResult:
        """Run one call. Raises InfrastructureError if the server is lost."""
        client, began = await self.client(), time.perf_counter()
        asked = asyncio.ensure_future(client.call_tool(name, arguments))
        try:
            await asyncio.wait(
                {asked, self._task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if asked.done() and asked.exception() is None:
                return _result(asked.result(), time.perf_counter() - began)
            if asked.done() and not await self._answers(client, timeout_s):
                raise self._died(name, _reason(asked.exception()))
            if asked.done():
                text = f"Error: {_reason(asked.exception())}"
                return ToolResult(ToolKind.ERROR, bounded(text), time.perf_counter() - began)
            if self._task.done():
                raise self._died(name, "it ended")
            text = f"Error: {name} did not return within {timeout_s:g} s"
            return ToolResult(ToolKind.TIMEOUT, text, time.perf_counter() - began)
        finally:
            asked.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await asked

    async def close(self) -> None:
        """End the session, and with it the server's process. May be called again."""
        self._closing.set()
        if not self._ready.done():
            self._task.cancel()
        await asyncio.wait({self._task})
        self._errors.close()

    async def _hold(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                client = await self._server.client(stack, self._errors)
                await stack.enter_async_context(client)
                self._ready.set_result(client)
                await self._closing.wait()
        except Exception as fault:  # the library and the server may fail in any way
            if not self._ready.done():
                self._ready.set_exception(fault)
        finally:
            if not self._ready.done():
                self._ready.cancel()
            elif not self._ready.cancelled():
                self._ready.exception()  # somebody has looked at it

    async def _answers(self, client: Client, timeout_s: float) -> bool:
        """Whether the server still answers: after a call that failed in neither of the two ways in
        which MCP says that a tool failed."""
        with suppress(Exception):  # whatever it raises, it did not answer
            async with asyncio.timeout(timeout_s):
                await client.list_tools(cache_mode="bypass")
                return True
        return False

    def _died(self, name: str, why: str) -> InfrastructureError:
        self._closing.set()
        said = self._last_words()
        return InfrastructureError(
            f"MCP server {self._server.address} was lost in a call of {name}: {why}{said}"
        )

    def _last_words(self) -> str:
        """The last line that the server's process wrote to stderr, tables and the like aside."""
        with suppress(OSError, ValueError):
            self._errors.seek(0)
            lines = [
                line
                for line in self._errors.read().splitlines()
                if line[:1].strip() and line[0].isascii()
            ]
            return f" ({lines[-1].strip()[:200]})" if lines else ""
        return ""


def _in_thread(where: str, server: Server, timeout_s: float) -> list[Any]:
    """The server's tools. A loop may be running in the caller's thread."""

    async def tools() -> list[Any]:
        connection = await Connection.to(server, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                client = await connection.client()
                found, cursor = [], None
                while True:
                    page = await client.list_tools(cursor=cursor)
                    found += page.tools
                    if (cursor := page.next_cursor) is None:
                        return found
        finally:
            await connection.close()

    with ThreadPoolExecutor(1, thread_name_prefix="mcp") as own:
        try:
            return own.submit(asyncio.run, tools()).result()
        except Exception as fault:  # the library and the server may fail in any way
            why = fault if isinstance(fault, InfrastructureError) else _reason(fault)
            raise ValueError(
                f"{where}: its tools cannot be listed ({why}); start it by hand to see what it says"
            ) from None


def _chosen(where: str, listed: Sequence[Any], wanted: Sequence[str]) -> list[Schema]:
    """Schemas of the wanted tools, all without any."""
    known = {tool.name: tool for tool in listed}
    missing = [name for name in wanted if name not in known]
    if missing or not known:
        has = ", ".join(known) or "none"
        raise ValueError(f"{where}: it has no tool {', '.join(missing)}; its tools: {has}")
    for name in wanted or known:
        check_name(where, name)
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": known[name].description or known[name].title or name,
                "parameters": known[name].input_schema,
            },
        }
        for name in wanted or known
    ]


def _result(result: Any, duration_s: float) -> ToolResult:
    """An answer as the policy reads it: its texts, and a word for what is no text."""
    parts = [_part(part) for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [as_text(result.structured_content)]
    kind = ToolKind.ERROR if result.is_error else ToolKind.OK
    return ToolResult(kind, bounded("\n".join(parts)), duration_s)


def _part(part: Any) -> str:
    if part.type == "text":
        return str(part.text)
    if part.type == "resource" and isinstance(text := getattr(part.resource, "text", None), str):
        return text
    return f"[{part.type}: {getattr(part, 'mime_type', None) or getattr(part, 'uri', 'no text')}]"


def _reason(fault: BaseException | None) -> str:
    """The first cause in a group of exceptions, in one line."""
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    return f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:300]
