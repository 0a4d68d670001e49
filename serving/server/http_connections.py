"""Limits the connections of an asyncio server."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web

_BODY = b'{"error":"shed: full: too many connections are open."}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    b"X-Shed: full\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_BODY), _BODY)
)


class _Refusing(asyncio.Protocol):
    """Says so, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = cast(asyncio.Transport, transport)
        connection.write(_REFUSAL)
        connection.close()


def limited(server: web.Server, most: int) -> Callable[[], Any]:
    """Makes the protocols of new connections: the server's, or a refusing one where ``most`` are open."""
    return lambda: server() if len(server.connections) < most else _Refusing()
