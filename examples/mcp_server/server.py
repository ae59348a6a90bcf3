"""A server of the Model Context Protocol with one tool. Any other server may stand in its place."""

from mcp.server.mcpserver import MCPServer

STOCK = {"tea": 12, "salt": 7, "rice": 30, "wool": 4, "corn": 25, "oil": 9, "wine": 16, "fish": 2}
server = MCPServer("warehouse", log_level="ERROR")


@server.tool()
def stock(item: str) -> str:
    """How many crates of something there are."""
    return str(STOCK[item])


if __name__ == "__main__":
    server.run()
