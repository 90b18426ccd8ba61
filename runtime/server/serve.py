"""Running the server: listen, load, serve, and stop in good order."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from aloud import open_files
from aloud.api import Runtime
from aloud.errors import RequestError
from aloud.live import Engine
from aloud.server.app import create_app
from aloud.server.opening import Opening
from aloud.server.settings import Limits, Settings

logger = logging.getLogger("aloud.serve")
TICKS = 10
"""Between two looks at the connections; uvicorn ticks ten times a second."""
OPEN_FILES = 65_536
CUT_SECONDS = 2.0
"""For requests to end whose connections were cut, and to write their lines in the log."""
SENDABLE = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
"""A key that can be part of a subprotocol's name (RFC 6455, section 4.1)."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Server(uvicorn.Server):
    """Uvicorn that drains: SIGTERM ends new work and lets what runs finish; a second one, or SIGINT, ends all at once.

    Before it is open, a signal ends the process as if nothing minded it. It also ends connections on which nothing
    moves: those that wait too long for a request's head, and those that are closed but for what the client does not
    read.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float, limits: Limits) -> None:
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        self._drain_seconds = drain_seconds
        self._limits = limits
        self._engine: Engine | None = None
        self._speaking: Callable[[], int] = lambda: 0
        self._is_stopping = False
        self._still: dict[Any, tuple[object, bool, float]] = {}  # connections on which nothing moves, since when

    def open(self, engine: Engine, speaking: Callable[[], int]) -> None:
        """There is an engine now; `speaking`: how many requests are being answered with speech."""
        self._engine, self._speaking = engine, speaking

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        if self._engine is None:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        if self._is_stopping or sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
            return
        self._is_stopping = True
        logger.info("Stopping: what runs is finished, and nothing new is taken; a second signal ends it all")
        threading.Thread(target=self._drain, args=(self._engine,), name="aloud-drain", daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second -> whether to stop."""
        if counter % TICKS == 0:
            self._end_still_connections(time.monotonic())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called at the end: wait for what runs, or cut it."""
        if self.force_exit:
            self._cut()
        await super().shutdown(sockets)
        self._cut()
        if self.server_state.tasks:
            await asyncio.wait(list(self.server_state.tasks), timeout=CUT_SECONDS)

    def _cut(self) -> None:
        """End every connection, so that its request ends by itself, as where a client leaves, and not as a fault."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _drain(self, engine: Engine) -> None:
        end = time.monotonic() + self._drain_seconds
        is_drained = engine.drain_sync(self._drain_seconds)
        # Between two sentences of a speech, and two turns of a socket, the engine has nothing of it.
        while is_drained and self._is_busy(engine) and time.monotonic() < end:
            time.sleep(0.01)
        self.should_exit = True

    def _is_busy(self, engine: Engine) -> bool:
        # WebSockets end by themselves when the engine drains.
        has_sockets = not all(isinstance(connection, H11Protocol) for connection in list(self.server_state.connections))
        return has_sockets or self._speaking() > 0 or not engine.loop.is_idle

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


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's says something.

    Behind each WebSocket that was refused with a whole answer, it takes the handshake for unanswered.
    """
    return record.msg != "ASGI callable returned without completing handshake."


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at an address. Raises a `RequestError` when they cannot be had."""
    if not 0 <= port <= 65_535:
        raise RequestError(f"There is no port {port}. Choose --port from 0 to 65535; 0 is any that is free.")
    with ExitStack() as opened, _address_errors(host, port):
        sockets = []
        for family, kind, protocol, _, address in dict.fromkeys(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        ):
            made = opened.enter_context(socket.socket(family, kind, protocol))
            if os.name == "posix":  # elsewhere it would let two listen
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(address)
            made.listen()
            sockets.append(made)
        opened.pop_all()
        return sockets


@contextmanager
def _address_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:  # the latter of names that are none
        reason = getattr(error, "strerror", None) or "it is no name of a machine"
        raise RequestError(f"{host} port {port} cannot be had: {reason}. Choose another --host or --port.") from error


def own_names(host: str) -> tuple[str, ...]:
    """The names to answer to when bound to an address that only this machine reaches; else none, which means any."""
    try:
        is_loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    return (*LOOPBACK, host) if is_loopback else ()


def serve(
    load: Callable[[], Runtime],
    settings: Settings,
    sockets: list[socket.socket],
    *,
    drain_seconds: float,
    max_waiting: int,
) -> int:
    """Serve on sockets of `bind` until a signal -> the exit status. Raises what loading does.

    Health is answered from the beginning, so that whoever watches over the process can tell loading from being stuck.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    open_files.allow(OPEN_FILES)
    opening = Opening(settings.origins)
    config = uvicorn.Config(
        opening,
        http=H11Protocol,
        lifespan="off",  # the application has none
        log_config=None,
        log_level="warning",
        access_log=False,  # the gate writes a line for each request
        timeout_graceful_shutdown=math.ceil(settings.limits.lead_seconds),
        server_header=False,
        ws_max_size=262_144,
        ws_per_message_deflate=False,  # audio in base64 hardly gets smaller, and it takes longer than all else
        h11_max_incomplete_event_size=65_536,
    )
    server = Server(config, drain_seconds, settings.limits)
    engines: list[Engine] = []
    errors: list[BaseException] = []

    def open_engine() -> None:
        try:
            engine = Engine(load(), max_waiting=max_waiting)
            engines.append(engine)
            app = create_app(engine, settings)
        except BaseException as error:
            errors.append(error)
            server.should_exit = True
            return
        server.open(engine, lambda: app.state.metrics.speaking)
        opening.app = app
        for bound in sockets:
            logger.info("Serving on %s (Ctrl-C ends it at once; SIGTERM lets what runs finish)", _url(bound))

    if not settings.keys and not settings.hosts:
        logger.warning("Whoever reaches this server may ask for everything: it was started without a key file.")
    if settings.origins and not all(map(SENDABLE.fullmatch, settings.keys)):
        logger.warning(
            "Pages cannot send every key with a WebSocket: only those of letters, digits and !#$%&'*+-.^_`|~."
        )
    threading.Thread(target=open_engine, name="aloud-open", daemon=True).start()
    try:
        server.run(sockets)
    finally:
        for engine in engines:
            engine.close()
    if errors:
        raise errors[0]
    return 0 if server.started else 1


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"
