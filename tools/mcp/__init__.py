"""Tools that servers of the Model Context Protocol offer, over stdio and streamable HTTP."""

from polyturn.tools.mcp.tools import HttpServer, McpTools, StdioServer

__all__ = ["HttpServer", "McpTools", "StdioServer"]
