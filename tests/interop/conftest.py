"""Real clients, and the server they talk to: run by `python3 dev.py interop`, in an environment of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, which pip does not install: without one, what needs it is skipped. CI takes no skip here."""
    from playwright.sync_api import sync_playwright

    from interop.driving import ARGUMENTS

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS.split())
        yield browser
        browser.close()
