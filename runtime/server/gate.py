"""The gate before every route: request ids, keys, bounds on the body and on how long it takes, and the log line."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import secrets
import time
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aloud.server.problems import Problem, problem_of
from aloud.server.settings import Settings

logger = logging.getLogger("aloud.server")

OPEN_PREFIX = "/health/"
"""What needs no key: whoever watches over the process has none."""
EVERYBODY = "everybody"
"""The owner of what is made on a server without keys."""


class Gate:
    """ASGI middleware, around everything else."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id = secrets.token_hex(8)
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            owner = self._owner(scope["path"], headers)
            if owner is None:
                await self._refuse(scope, receive, send_with_id, _unauthorised())
                return
            state["owner"] = owner
            if scope["type"] == "http":
                body = _Body(receive, self._settings, headers)
                if body.is_too_long:
                    await self._refuse(scope, receive, send_with_id, _too_long(self._settings))
                    return
                receive = body.receive
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:  # while its body was read
            state["log"] = {"outcome": "client_gone"}
        except Exception as error:
            logger.error(json.dumps({"request_id": request_id} | _fault(error)))
            await self._fail(scope, receive, send_with_id, problem_of(error), is_answered=status != 0)
        finally:
            milliseconds = round(1000 * (time.monotonic() - started), 1)
            line = {"request_id": request_id, "method": scope.get("method", "WS"), "path": scope["path"]}
            logger.info(json.dumps(line | {"status": status, "ms": milliseconds} | state.get("log", {})))

    def _owner(self, path: str, headers: Headers) -> str | None:
        """Who asks: a name made from the key; None for nobody who may."""
        if not self._settings.keys or path.startswith(OPEN_PREFIX):
            return EVERYBODY
        given = _key(headers.get("authorization", ""))
        if not given:
            return None
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in self._settings.keys]
        return hashlib.sha256(given.encode()).hexdigest()[:16] if any(matches) else None

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": problem.message})
            return
        response = problem.response()
        if problem.status == 401:
            response.headers["www-authenticate"] = 'Basic realm="aloud", charset="UTF-8"'
        await response(scope, receive, send)

    async def _fail(self, scope: Scope, receive: Receive, send: Send, problem: Problem, *, is_answered: bool) -> None:
        """Say that something went wrong, if there is still somebody to say it to; an answer that began is cut."""
        with suppress(OSError, RuntimeError):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1011, "reason": problem.message})
            elif not is_answered:
                await problem.response()(scope, receive, send)


class _Body:
    """A request's body, counted as it comes."""

    def __init__(self, receive: Receive, settings: Settings, headers: Headers) -> None:
        self._receive = receive
        self._limits = settings.limits
        self._settings = settings
        self._bytes = 0
        self._is_read = False
        length = headers.get("content-length", "0")
        self.is_too_long = not length.isdecimal() or int(length) > settings.limits.body_bytes

    async def receive(self) -> Message:
        """The next message; raises a `Problem` when it is too much, or takes too long."""
        if self._is_read:
            return await self._receive()
        # Not `asyncio.wait_for`, which before Python 3.12 can swallow a cancellation.
        receiving = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait({receiving}, timeout=self._limits.read_seconds)
            if not receiving.done():
                raise Problem(408, "The request's body did not come in time.", "timeout")
            message = receiving.result()
        finally:
            receiving.cancel()
        self._bytes += len(message.get("body", b""))
        self._is_read = not message.get("more_body", False)
        if self._bytes > self._limits.body_bytes:
            raise _too_long(self._settings)
        return message


def _key(authorization: str) -> str:
    """The key of a header: a bearer token, or the password of basic authentication, which is what browsers send."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _fault(error: BaseException) -> dict[str, Any]:
    """What is written of a fault: what kind and where, innermost last, but not its message, which may quote a text."""
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return {"fault": type(error).__name__, "at": places[-8:]}


def _unauthorised() -> Problem:
    return Problem(401, "A key is needed: send it as `Authorization: Bearer KEY`.", "invalid_api_key")


def _too_long(settings: Settings) -> Problem:
    return Problem(413, f"The request's body may have {settings.limits.body_bytes:,} bytes.", "too_large")
