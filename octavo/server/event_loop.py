"""The event loop of servers.

Made by the `serve` command and by front processes. Imports nothing of the server.
"""

from __future__ import annotations

import asyncio
import sys


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Returns the fastest loop there is: uvloop's, except on Windows, which has none."""
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()
