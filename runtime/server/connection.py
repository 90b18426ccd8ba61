"""One WebSocket: messages in one by one, events out through a bounded buffer, and when it must end."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from aloud.errors import EngineClosed
from aloud.server.problems import POLICY, Problem, problem_of

NORMAL, IDLE, TOO_LARGE, STOPPING = 1000, 1001, 1009, 1012
LOOK_SECONDS = 0.2
"""How often a socket on which nothing comes looks whether the server is stopping."""


@dataclass(frozen=True)
class SocketLimits:
    """What one socket may ask for and how long it may take."""

    sockets: int = 64  # of one kind that one key may have open
    contexts: int = 8  # that one socket may have
    turns: int = 16  # of one context that wait to be spoken
    message_bytes: int = 262_144
    errors: int = 100  # messages in all that were answered with an error, after which a socket is closed
    idle_seconds: float = 300.0  # without a message from either side
    write_seconds: float = 30.0  # that a client may take to read what is sent
    buffered_events: int = 8  # that wait to be sent; who makes more waits too


async def accept(websocket: WebSocket, subprotocol: str) -> None:
    """Let it in, by this subprotocol if it is among those that it comes with.

    Browsers that ask for some take it amiss when none is chosen.
    """
    await websocket.accept(subprotocol if subprotocol in websocket.scope.get("subprotocols", []) else None)


class Door:
    """Counts each key's sockets, and turns away what may not come in."""

    def __init__(self, limits: SocketLimits, is_stopping: Callable[[], bool]) -> None:
        self._most = limits.sockets
        self._is_stopping = is_stopping
        self._open: Counter[str] = Counter()

    @contextmanager
    def entered(self, websocket: WebSocket) -> Iterator[None]:
        """Be one of the open sockets; raises a `Problem`."""
        if self._is_stopping():
            raise _stopping()
        owner = websocket.scope["state"]["owner"]
        if self._open[owner] >= self._most:
            raise Problem(429, "There are too many sockets. Close one.", "too_many_sockets", retry_after_seconds=5)
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]


class Connection:
    """An accepted WebSocket.

    Events are dictionaries, which go out as JSON, and bytes; those that are sent together stay together.
    """

    def __init__(self, websocket: WebSocket, limits: SocketLimits, is_stopping: Callable[[], bool]) -> None:
        self._websocket = websocket
        self._limits = limits
        self._is_stopping = is_stopping
        self._outbox: asyncio.Queue[tuple[dict[str, Any] | bytes, ...]] = asyncio.Queue(limits.buffered_events)
        self._is_over = asyncio.Event()
        self._last = time.monotonic()
        self._errors = 0

    async def run(
        self,
        take: Callable[[str], Awaitable[None]],
        error_event: Callable[[Problem], Any],
        finish: Callable[[], Awaitable[None]],
    ) -> None:
        """Hand each message to `take` until the socket ends.

        What `take` raises becomes one event, made by `error_event`, and the socket lives on. When the server stops,
        the socket ends with what `finish` still has to say.
        """
        writing = asyncio.ensure_future(self._write())
        over = asyncio.ensure_future(self._is_over.wait())
        receiving = asyncio.ensure_future(self._websocket.receive())
        finishing: asyncio.Future[None] | None = None
        try:
            while not over.done():
                if finishing is None and self._is_stopping():
                    finishing = asyncio.ensure_future(self._finish(finish))
                left = self._last + self._limits.idle_seconds - time.monotonic()
                if left <= 0:
                    await self.close(IDLE, "Nothing was said for long.")
                    return
                waited = min(left, LOOK_SECONDS)
                await asyncio.wait({receiving, over}, timeout=waited, return_when=asyncio.FIRST_COMPLETED)
                if over.done() or not receiving.done():
                    continue
                message = receiving.result()
                if message["type"] == "websocket.disconnect":
                    return
                self._last = time.monotonic()
                await self._take(message, take, error_event)
                receiving = asyncio.ensure_future(self._websocket.receive())
        finally:
            self._is_over.set()
            tasks = {task for task in (writing, over, receiving, finishing) if task is not None}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            while not self._outbox.empty():  # so that nobody waits for room in it
                self._outbox.get_nowait()
                await asyncio.sleep(0)

    def check_takes_work(self) -> None:
        """Raise a `Problem` when the server stops."""
        if self._is_stopping():
            raise _stopping()

    async def send(self, *events: dict[str, Any] | bytes) -> None:
        """Send events; waits while the client is behind with reading, and does nothing once the socket is over."""
        if not self._is_over.is_set():
            await self._outbox.put(events)

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Send what waits to be sent, and end."""
        await self.send({"type": "websocket.close", "code": code, "reason": reason})
        await self._is_over.wait()

    async def _finish(self, finish: Callable[[], Awaitable[None]]) -> None:
        await finish()
        await self.close(STOPPING, "The server is stopping.")

    async def _take(
        self, message: Any, take: Callable[[str], Awaitable[None]], error_event: Callable[[Problem], Any]
    ) -> None:
        text, data = message.get("text"), message.get("bytes")
        if max(len(text.encode(errors="replace")) if text else 0, len(data) if data else 0) > (
            self._limits.message_bytes
        ):
            await self.close(TOO_LARGE, f"A message may have {self._limits.message_bytes:,} bytes.")
            return
        try:
            if text is None:
                raise Problem(400, "Messages are JSON text, not binary.", "invalid_message")
            await take(text)
        except Exception as error:
            self._errors += 1
            problem = _invalid(error) if isinstance(error, ValidationError) else problem_of(error)
            await self.send(error_event(problem))
            if self._errors >= self._limits.errors:
                await self.close(POLICY, "There were too many wrong messages.")

    async def _write(self) -> None:
        """Send what is in the outbox; once the client is gone or too slow, throw it away, so that nobody waits."""
        while True:
            for event in await self._outbox.get():
                if self._is_over.is_set():
                    continue
                if not await self._sent(_message(event)):
                    self._is_over.set()
                if isinstance(event, dict) and event["type"] == "websocket.close":
                    self._is_over.set()

    async def _sent(self, message: dict[str, Any]) -> bool:
        """Send one message -> whether the client took it in time."""
        # Not `asyncio.wait_for`: before Python 3.12 it can swallow a cancellation, and the writer would never end.
        sending = asyncio.ensure_future(self._websocket.send(message))
        try:
            await asyncio.wait({sending}, timeout=self._limits.write_seconds)
            if not sending.done():
                return False
            sending.result()
        except (WebSocketDisconnect, RuntimeError, OSError):
            return False
        finally:
            sending.cancel()
        self._last = time.monotonic()
        return True


def _message(event: dict[str, Any] | bytes) -> dict[str, Any]:
    if isinstance(event, bytes):
        return {"type": "websocket.send", "bytes": event}
    if event["type"] == "websocket.close":
        return event
    return {"type": "websocket.send", "text": json.dumps(event)}


def _stopping() -> Problem:
    return problem_of(EngineClosed("The server is stopping."))


def _invalid(error: ValidationError) -> Problem:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "message"
    return Problem(400, f"{where}: {first['msg']}.", "invalid_message", where)
