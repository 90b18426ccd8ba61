"""Running the server: load, serve, and stop in good order."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

import uvicorn

from aloud.api import Runtime
from aloud.live import Engine
from aloud.server.app import create_app
from aloud.server.settings import Settings


class Server(uvicorn.Server):
    """Uvicorn that drains: the first signal ends new work and lets what runs finish, the second ends all."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._is_stopping = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        if self._is_stopping or sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
            return
        self._is_stopping = True
        threading.Thread(target=self._drain, name="aloud-drain", daemon=True).start()

    def _drain(self) -> None:
        self._engine.drain_sync(self._drain_seconds)
        self.should_exit = True


def serve(runtime: Runtime, settings: Settings, *, host: str, port: int, drain_seconds: float, max_waiting: int) -> int:
    """Serve until a signal -> the exit status: 0, or 1 when the address could not be had."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with Engine(runtime, max_waiting=max_waiting) as engine:
        config = uvicorn.Config(
            create_app(engine, settings),
            host=host,
            port=port,
            access_log=False,  # the gate writes a line for each request
            timeout_graceful_shutdown=5,
            server_header=False,
            h11_max_incomplete_event_size=65_536,
        )
        server = Server(config, engine, drain_seconds)
        server.run()
        return 0 if server.started else 1
