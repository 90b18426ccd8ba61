"""What goes wrong, as HTTP says it: a status and a body in OpenAI's shape, with a sentence and nothing internal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.responses import JSONResponse

from aloud import errors


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
    """What a client is told of an error."""
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
    return Problem(500, "The speech could not be made. Ask again.", "internal")
