"""A server in a thread, and a client for its sockets."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI
from websockets.sync.client import connect

from aloud import Engine

WAIT_SECONDS = 30


class Served:
    """A server in a thread."""

    def __init__(self, app: FastAPI, engine: Engine) -> None:
        self.engine = engine
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)
        self._thread.start()
        self.wait(lambda: self._server.started)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(WAIT_SECONDS)

    def wait(self, condition: Callable[[], bool]) -> float:
        """Until it holds -> seconds."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < WAIT_SECONDS, "it never came to be"
            time.sleep(0.002)
        return time.monotonic() - began

    def wait_until_free(self) -> float:
        """Until nothing is spoken and nothing waits -> seconds."""
        return self.wait(lambda: self.engine.loop.used_slots == 0 and self.engine.loop.waiting == 0)

    def connect(self, path: str = "/v1/audio/speech/stream", **arguments: Any) -> Client:
        return Client(connect(f"ws://{self.address}{path}", max_size=None, **arguments))


class Client:
    """A socket to the server, from the client's side."""

    def __init__(self, connected: Any) -> None:
        self.socket = connected.__enter__()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.socket.close()

    def vanish(self) -> None:
        """Leave without a word."""
        self.socket.socket.shutdown(socket.SHUT_RDWR)

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def receive(self) -> dict[str, Any]:
        """The next event; a binary message becomes part of it."""
        event: dict[str, Any] = json.loads(self.socket.recv(timeout=WAIT_SECONDS))
        if "bytes" in event:
            data = self.socket.recv(timeout=WAIT_SECONDS)
            assert isinstance(data, bytes)
            assert len(data) == event["bytes"]
            event["data"] = data
        elif event["type"] == "audio.delta":
            event["data"] = base64.b64decode(event["audio"])
        return event

    def until(self, type: str, context_id: str | None = None) -> list[dict[str, Any]]:
        """The events up to one of a type, and of a context if one is given."""
        events = []
        while not events or events[-1]["type"] != type or context_id not in (None, events[-1].get("context_id")):
            events.append(self.receive())
            assert events[-1]["type"] != "error" or type == "error", events[-1]
        return events

    def speak(self, text: str, context_id: str = "default") -> list[dict[str, Any]]:
        """The events of one text's speech."""
        self.send("input.text", text=text, context_id=context_id)
        self.send("input.done", context_id=context_id)
        return self.until("audio.done", context_id)


def audio(events: list[dict[str, Any]], context_id: str | None = None) -> bytes:
    """All bytes of a context."""
    return b"".join(
        event["data"]
        for event in events
        if event["type"] == "audio.delta" and context_id in (None, event["context_id"])
    )
