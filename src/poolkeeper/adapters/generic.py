"""
For whatever takes a lifespan: a function that is called with the application and returns an
async context manager.

MCP servers, or a program of your own, such as a gRPC server. Needs no framework.
"""

from ._shared import KEY, lifespan

__all__ = ["KEY", "lifespan"]
