"""What goes wrong, as HTTP says it: a status and a body in OpenAI's shape, with a sentence and nothing internal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from aloud import errors
from aloud.server import log

POLICY = 1008
"""What a WebSocket is closed with that may not come in, or not stay."""


@dataclass
class Problem(Exception):
    """An answer other than the one that was asked for."""

    status: int
    message: str
    code: str
    parameter: str | None = None
    retry_after_seconds: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, in the ways that clients look for it; and an end to bodies that are not read on."""
        if self.status in (408, 413):
            return {"connection": "close"}
        if self.retry_after_seconds is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_seconds))), "x-should-retry": "true"}

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an error; one that is nobody's but ours is logged."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, errors.Overloaded):
        return Problem(429, str(error), "overloaded", retry_after_seconds=error.retry_after_seconds)
    if isinstance(error, errors.EngineClosed):
        return Problem(503, "The server is stopping. Ask again soon.", "draining", retry_after_seconds=5)
    if isinstance(error, errors.SessionBusy):
        return Problem(409, str(error), "session_busy")
    if isinstance(error, errors.RequestError):
        return Problem(400, str(error), type(error).__name__)
    if isinstance(error, errors.NothingSpoken):
        return Problem(422, str(error), "nothing_spoken")
    if isinstance(error, errors.DeviceStuck):
        return Problem(503, "The device does not answer.", "device_stuck", retry_after_seconds=30)
    log.write_fault(error)
    return Problem(500, "The speech could not be made. Ask again.", "internal")


async def refuse(websocket: WebSocket, problem: Problem) -> None:
    """Answer a WebSocket's handshake, which has been received, with a problem."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(problem.response())
    else:
        await websocket.close(POLICY, problem.message)
