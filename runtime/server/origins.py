"""Pages of other sites that may ask, and what their browsers are told of it (CORS, in the Fetch standard)."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send


class Origins:
    """ASGI middleware, around the gate: what a browser asks before a page's request comes without a key.

    That is answered here; whatever pages of sites ask that are not named is the gate's to refuse.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app = app
        self._origins = origins
        # Not with credentials: a password that the browser remembers is not the page's to use.
        self._named = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("retry-after", "x-aloud-seed", "x-request-id", "x-should-retry"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let it be answered."""
        is_named = scope["type"] == "http" and Headers(scope=scope).get("origin") in self._origins
        await (self._named if is_named else self._app)(scope, receive, send)
