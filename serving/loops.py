"""The event loop of the server, the load generator and the explorer's measurements: one kind for all."""

import asyncio


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A new loop: uvloop's where that is installed, else asyncio's own; for ``asyncio.Runner``."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
