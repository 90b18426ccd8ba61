"""The application while its model is loaded: it is alive and not ready, and whatever is asked is to be asked again."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from aloud.server.origins import Origins
from aloud.server.problems import Problem, refuse


class Opening:
    """An ASGI application that hands everything to another once there is one.

    It is the outermost one. Nobody but the server cancels what it does, and only when the server itself ends: that is
    no fault, of which there is anything to tell.
    """

    def __init__(self, origins: tuple[str, ...]) -> None:
        """origins: of other sites whose pages may read the answer."""
        self.app: ASGIApp | None = None
        self._warming = Origins(_warming, origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let it be answered."""
        try:
            await (self._warming if self.app is None else self.app)(scope, receive, send)
        except asyncio.CancelledError:
            return


async def _warming(scope: Scope, receive: Receive, send: Send) -> None:
    warming = Problem(503, "The server loads its model. Ask again soon.", "warming", retry_after_seconds=5)
    if scope["type"] == "websocket":
        await receive()
        await refuse(WebSocket(scope, receive, send), warming)
    elif scope["path"] == "/health/live":
        await JSONResponse({"status": "alive"})(scope, receive, send)
    else:
        await warming.response()(scope, receive, send)
