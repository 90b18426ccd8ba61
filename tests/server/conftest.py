"""An engine over a small checkpoint, and a server over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aloud import Engine, Runtime
from aloud.checkpoint.random import write_random
from server.running import RUNNING, Lines, Running, is_idle, logged, serving, wait_until


@pytest.fixture(scope="package")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Four slots, and room for as many requests as a test has."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random(folder, "small", seed=request.config.getoption("--seed"), dtype="float32")
    runtime = Runtime.load(folder, device="cpu", max_streams=4, max_positions=512)
    with Engine(runtime, max_waiting=64) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    """A server without keys."""
    with serving(engine) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(engine: Engine) -> Iterator[None]:
    """Every test gives back its slots, and the next one sees no line or count of its answers."""
    yield
    wait_until(lambda: is_idle(engine))
    wait_until(lambda: all(running.is_idle for running in RUNNING))


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What is logged during a test."""
    with logged() as lines:
        yield lines
