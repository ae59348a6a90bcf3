"""An MCP server for tests, over stdio or, given a port, over HTTP."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mcp.server.mcpserver import MCPServer

server = MCPServer("test", log_level="ERROR")
count = 0


@server.tool()
def add(amount: int) -> int:
    """Add to the count."""
    global count
    count += amount
    return count


@server.tool()
def fail() -> str:
    """Fail, as a tool may."""
    raise KeyError("nope")


@server.tool()
def die_once(marker: str) -> int:
    """End the process, unless the file is there already: then add 100."""
    if not Path(marker).exists():
        Path(marker).touch()
        os._exit(3)
    return add(100)


@server.tool()
def die() -> None:
    """End the process."""
    os._exit(3)


@server.tool()
def sleep(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "slept"


@server.tool()
def variables() -> list[str]:
    """The names of the environment's variables."""
    return sorted(os.environ)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
