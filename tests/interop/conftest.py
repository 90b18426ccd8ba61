"""Real clients, and the server they talk to: run by `python3 dev.py interop`, in an environment of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")

from aloud import Engine, Runtime
from aloud.checkpoint.random import write_random
from server.running import Running, serving


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Four slots over a small random checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random(folder, "small", seed=request.config.getoption("--seed"), dtype="float32")
    with Engine(Runtime.load(folder, device="cpu", max_streams=4, max_positions=512), max_waiting=64) as engine:
        # How much a busy machine can speak in time differs from run to run; here nobody minds what is late.
        engine.loop.scheduler.retry_after = lambda *_: None  # type: ignore[method-assign]
        yield engine


@pytest.fixture(scope="session")
def served(engine: Engine) -> Iterator[Running]:
    """A server without keys."""
    with serving(engine) as running:
        yield running
