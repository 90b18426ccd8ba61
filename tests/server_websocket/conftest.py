"""A real server on loopback over a small random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("websockets")

from fastapi import FastAPI
from server_websocket.loopback import Served

from aloud import Engine, Runtime
from aloud.checkpoint.random import write_random
from aloud.server.app import create_app
from aloud.server.connection import SocketLimits
from aloud.server.encode import Encoders
from aloud.server.gate import Gate
from aloud.server.metrics import Metrics
from aloud.server.realtime import realtime_routes
from aloud.server.settings import Settings
from aloud.server.voices import Registry
from aloud.server.websocket import websocket_routes


@pytest.fixture(scope="session")
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random(folder, "small", seed=request.config.getoption("--seed"), dtype="float32")
    return Runtime.load(folder, device="cpu", max_streams=4, max_positions=512)


@pytest.fixture(scope="session")
def engine(runtime: Runtime) -> Iterator[Engine]:
    with Engine(runtime) as engine:
        # How much a busy machine can speak in time differs from run to run; here nobody minds what is late.
        engine.loop.scheduler.retry_after = lambda *_: None  # type: ignore[method-assign]
        yield engine


@pytest.fixture(scope="session")
def served(engine: Engine) -> Iterator[Served]:
    served = Served(create_app(engine, Settings(model="small")), engine)
    yield served
    served.stop()


@pytest.fixture(scope="session")
def serve(engine: Engine) -> Callable[..., Any]:
    """A server of the sockets alone, with limits or keys of its own, as a context manager."""

    @contextmanager
    def started(limits: SocketLimits | None = None, settings: Settings | None = None) -> Iterator[Served]:
        given = Settings(model="small") if settings is None else settings
        registry, metrics = Registry(engine.runtime, given), Metrics(engine)
        app = FastAPI()
        app.add_middleware(Gate, settings=given)
        app.include_router(
            websocket_routes(engine, given, registry, metrics, Encoders(engine.runtime.sample_rate), limits)
        )
        app.include_router(realtime_routes(engine, given, registry, metrics, limits))
        served = Served(app, engine)
        try:
            yield served
        finally:
            served.stop()

    return started
