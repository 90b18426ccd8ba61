"""The gate before every route: pages of other sites, keys, bounds on a body and its time, request ids, the log line."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from aloud.server import log
from aloud.server.problems import Problem, problem_of, refuse
from aloud.server.settings import Settings

OPEN_PREFIX = "/health/"
"""What needs no key: whoever watches over the process has none."""
SAFE_METHODS = ("GET", "HEAD")
"""What a page of another site may ask for: nothing is changed by it, and browsers do not let the page read it."""
HANDSHAKES = {"websocket.accept": 101, "websocket.close": 403}
"""The status that a WebSocket's handshake is answered with, by the first message that is sent on it."""
KEY_PREFIX = "openai-insecure-api-key."
"""Of a subprotocol that is a key: pages send no headers with a WebSocket, and OpenAI's clients there send this."""
EVERYBODY = "everybody"
"""The owner of what is made on a server without keys."""


class Gate:
    """ASGI middleware, around everything but `Origins`."""

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
        log.REQUEST_ID.set(request_id)
        path = route_path(scope)
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            elif status == 0 and message["type"] in HANDSHAKES:
                status = HANDSHAKES[message["type"]]
            await send(message)

        try:
            refusal = self._foreign(scope, path, headers)
            if refusal is not None:
                await self._refuse(scope, receive, send_with_id, refusal)
                return
            owner = self._owner(scope, path, headers)
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
            await self._fail(scope, receive, send_with_id, problem_of(error), is_answered=status != 0)
        finally:
            milliseconds = round(1000 * (time.monotonic() - started), 1)
            line = {"method": scope.get("method", "WS"), "path": path, "status": status, "ms": milliseconds}
            log.write(**line | state.get("log", {}))

    def _foreign(self, scope: Scope, path: str, headers: Headers) -> Problem | None:
        """Why a request may come from a page of another site, which a browser lets ask every server it reaches."""
        host = headers.get("host", "")
        is_open = path.startswith(OPEN_PREFIX)
        # A name of the attacker's may lead here: then the page and the server are one site to the browser.
        if self._settings.hosts and not is_open and _name(host) not in self._settings.hosts:
            message = "Without keys, this server answers to this machine's own names alone. Start it with a key file."
            return Problem(403, message, "foreign_host")
        if scope["type"] == "http" and scope["method"] in SAFE_METHODS:
            return None
        if _is_own(headers) or set(headers.getlist("origin")) <= set(self._settings.origins):
            return None
        message = (
            "Pages of other sites may not ask, unless --allow-origin names theirs. "
            "Behind a proxy, let it pass the Host header on."
        )
        return Problem(403, message, "foreign_origin")

    def _owner(self, scope: Scope, path: str, headers: Headers) -> str | None:
        """Who asks: a name made from the key; None for nobody who may."""
        if not self._settings.keys or path.startswith(OPEN_PREFIX):
            return EVERYBODY
        # First what a page chose to send: it cannot know what else the browser, or a proxy, sends with it.
        sent = (name.removeprefix(KEY_PREFIX) for name in scope.get("subprotocols", ()) if name.startswith(KEY_PREFIX))
        given = next(sent, "") or _key(headers)
        if not given:
            return None
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in self._settings.keys]
        return hashlib.sha256(given.encode()).hexdigest()[:16] if any(matches) else None

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
        if scope["type"] == "websocket":
            await receive()
            await refuse(WebSocket(scope, receive, send), problem)
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


def route_path(scope: Scope) -> str:
    """The path as this application's routes have it, wherever it is mounted."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] or "/" if path.startswith(f"{root}/") or path == root else path


class _Body:
    """A request's body, counted as it comes."""

    def __init__(self, receive: Receive, settings: Settings, headers: Headers) -> None:
        self._receive = receive
        self._settings = settings
        self._bytes = 0
        self._structure = 0
        self._is_read = False
        self._is_json = not headers.get("content-type", "").lower().startswith("multipart/")
        self._end = time.monotonic() + settings.limits.body_seconds
        length = headers.get("content-length", "0")
        self.is_too_long = not length.isdecimal() or len(length) > 20 or int(length) > settings.limits.body_bytes

    async def receive(self) -> Message:
        """The next message; raises a `Problem` when it is too much, or takes too long, in part or whole."""
        if self._is_read:
            return await self._receive()
        # Not `asyncio.wait_for`, which before Python 3.12 can swallow a cancellation.
        receiving = asyncio.ensure_future(self._receive())
        try:
            seconds = min(self._settings.limits.read_seconds, max(0.0, self._end - time.monotonic()))
            await asyncio.wait({receiving}, timeout=seconds)
            if not receiving.done():
                raise Problem(408, "The request's body did not come in time.", "timeout")
            message = receiving.result()
        finally:
            receiving.cancel()
        data = message.get("body", b"")
        self._bytes += len(data)
        self._is_read = not message.get("more_body", False)
        if self._bytes > self._settings.limits.body_bytes:
            raise _too_long(self._settings)
        if self._is_json:
            # What is small as bytes may be large, and slow, as objects.
            self._structure += sum(data.count(mark) for mark in b"{[,")
            if self._structure > self._settings.limits.json_parts:
                raise Problem(413, f"JSON may have {self._settings.limits.json_parts:,} parts.", "too_large")
        return message


def _key(headers: Headers) -> str:
    """The key of a header: a bearer token, or the password of basic authentication, which is what browsers send.

    They remember it, and send it for pages of other sites, too: those may not use it.
    """
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic" and _is_own(headers):
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, no ASCII, no UTF-8
            return ""
    return ""


def _is_own(headers: Headers) -> bool:
    """Whether no page of another site asks."""
    return all(_is_same(origin, headers.get("host", "")) for origin in headers.getlist("origin"))


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        named = urlsplit(f"//{host}")
        return (named.hostname or "") if named.port is None or named.port else ""  # raises for what is no port
    except ValueError:
        return ""


def _is_same(origin: str, host: str) -> bool:
    """Whether a page's origin is the server that a Host header names; a port that goes without saying may be said."""
    try:
        page = urlsplit(origin)
        ours = urlsplit(f"{page.scheme}://{host}")
        default = {"http": 80, "https": 443}.get(page.scheme)
        return (
            bool(page.hostname) and page.hostname == ours.hostname and (page.port or default) == (ours.port or default)
        )
    except ValueError:
        return False


def _unauthorised() -> Problem:
    return Problem(401, "A key is needed: send it as `Authorization: Bearer KEY`.", "invalid_api_key")


def _too_long(settings: Settings) -> Problem:
    return Problem(413, f"The request's body may have {settings.limits.body_bytes:,} bytes.", "too_large")
