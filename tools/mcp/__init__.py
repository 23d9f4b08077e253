"""Tools that servers of the Model Context Protocol offer, over stdio and streamable HTTP."""

from polyturn.tools.mcp.servers import HttpServer, StdioServer
from polyturn.tools.mcp.tools import McpTools

__all__ = ["HttpServer", "McpTools", "StdioServer"]
