"""
What the pools of a running process do just now: for ``poolkeeper top``, and as a page to mount.

Nothing is served unless the program asks for it: `expose()` answers the same user of the same
machine on a Unix socket, `page()` is an ASGI application. None of it is loaded by
``import poolkeeper``.
"""

from ._page import page
from ._socket import Exposed, expose

__all__ = ["Exposed", "expose", "page"]
