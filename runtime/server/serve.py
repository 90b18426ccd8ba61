"""Running the server: load, serve, and stop in good order."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from aloud.api import Runtime
from aloud.live import Engine
from aloud.server.app import create_app
from aloud.server.settings import Limits, Settings

TICKS = 10
"""Between two looks at the connections; uvicorn ticks ten times a second."""


class Server(uvicorn.Server):
    """Uvicorn that drains: the first signal ends new work and lets what runs finish, the second ends all.

    It also ends connections on which nothing moves: those that wait too long for a request's head, and those that are
    closed but for what the client does not read.
    """

    def __init__(
        self, config: uvicorn.Config, engine: Engine, drain_seconds: float, speaking: Callable[[], int], limits: Limits
    ) -> None:
        """`speaking`: how many requests are being answered with speech."""
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._speaking = speaking
        self._limits = limits
        self._is_stopping = False
        self._still: dict[Any, tuple[object, bool, float]] = {}  # connections on which nothing moves, since when

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        if self._is_stopping or sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
            return
        self._is_stopping = True
        threading.Thread(target=self._drain, name="aloud-drain", daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second -> whether to stop."""
        if counter % TICKS == 0:
            self._end_still_connections(time.monotonic())
        return await super().on_tick(counter)

    def _drain(self) -> None:
        end = time.monotonic() + self._drain_seconds
        is_drained = self._engine.drain_sync(self._drain_seconds)
        # Between two sentences of a speech the engine has nothing of it.
        while is_drained and (self._speaking() or not self._engine.loop.is_idle) and time.monotonic() < end:
            time.sleep(0.01)
        self.should_exit = True

    def _end_still_connections(self, now: float) -> None:
        still: dict[Any, tuple[object, bool, float]] = {}
        for connection in list(self.server_state.connections):
            if not isinstance(connection, H11Protocol):
                continue  # a WebSocket, which has limits of its own
            cycle, transport = connection.cycle, connection.transport
            is_closing = transport.is_closing()
            if not is_closing and cycle is not None and not cycle.response_complete:
                continue
            before = self._still.get(connection)
            since = before[2] if before is not None and before[:2] == (cycle, is_closing) else now
            if now - since > (self._limits.write_seconds if is_closing else self._limits.read_seconds):
                transport.abort()
            else:
                still[connection] = (cycle, is_closing, since)
        self._still = still


def serve(runtime: Runtime, settings: Settings, *, host: str, port: int, drain_seconds: float, max_waiting: int) -> int:
    """Serve until a signal -> the exit status: 0, or 1 when the address could not be had."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with Engine(runtime, max_waiting=max_waiting) as engine:
        app = create_app(engine, settings)
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=H11Protocol,
            access_log=False,  # the gate writes a line for each request
            timeout_graceful_shutdown=math.ceil(settings.limits.lead_seconds),
            server_header=False,
            ws_max_size=262_144,
            h11_max_incomplete_event_size=65_536,
        )
        server = Server(config, engine, drain_seconds, lambda: app.state.metrics.speaking, settings.limits)
        server.run()
        return 0 if server.started else 1
