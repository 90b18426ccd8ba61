"""A server of the sockets over steps that cost microseconds, with frames as long as the real codec's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from fastapi import FastAPI

from aloud import Engine, Runtime
from aloud.server.connection import SocketLimits
from aloud.server.encode import Encoders
from aloud.server.gate import Gate
from aloud.server.metrics import Metrics
from aloud.server.realtime import realtime_routes
from aloud.server.settings import Limits, Settings
from aloud.server.voices import Registry
from aloud.server.websocket import websocket_routes
from live.quick import Flying, QuickSteps, quick_runtime
from scripted import FRAME_SIZE as SHORT_FRAME
from scripted import ScriptedModel
from server.running import Running, serving

RATE, FRAME = 24_000, 1920


class LongFrames(QuickSteps):
    """Frames of as many samples as the real codec's, so that a buffer that fills up does."""

    def launch(self, slots: np.ndarray) -> Flying:
        flying = super().launch(slots)
        samples = np.repeat(flying.frame.samples, FRAME // SHORT_FRAME, axis=1)
        return replace(flying, frame=replace(flying.frame, samples=samples))


def long_runtime(steps: LongFrames, slots: int) -> Runtime:
    """A runtime over such steps."""
    runtime = quick_runtime(steps, slots)
    codec = SimpleNamespace(frame_rate=12.5, frame_size=FRAME, sample_rate=RATE)
    model = ScriptedModel()
    model.config = SimpleNamespace(codec=codec, codebooks=model.config.codebooks, end_token=0)  # type: ignore[misc]
    made = Runtime(model, runtime.tokenizer, runtime.sampling, "quick")  # type: ignore[arg-type]
    made._parts = runtime._parts
    return made


@dataclass
class Quick:
    """A server that runs, and the steps under it."""

    running: Running
    steps: LongFrames
    engine: Engine


@contextmanager
def quick_server(
    limits: SocketLimits | None = None, *, slots: int = 4, frames: Any = None, before_launch: Any = None
) -> Iterator[Quick]:
    """Serve; `frames` of speech, of a number that depends on all that was read."""
    steps = LongFrames(slots)
    steps.length_of = frames or steps.length_of
    steps.before_launch = before_launch or steps.before_launch
    given = Settings("quick", limits=Limits(lead_seconds=60.0, text_characters=400))
    with Engine(long_runtime(steps, slots), max_waiting=1000) as engine:
        engine.loop.scheduler.retry_after = lambda *_: None  # type: ignore[method-assign]
        registry, metrics = Registry(engine.runtime, given), Metrics(engine)
        app = FastAPI()
        app.add_middleware(Gate, settings=given)
        app.state.metrics = metrics
        app.include_router(
            websocket_routes(engine, given, registry, metrics, Encoders(engine.runtime.sample_rate), limits)
        )
        app.include_router(realtime_routes(engine, given, registry, metrics, limits))

        @app.get("/tasks")
        async def tasks() -> list[str]:
            return [str(task.get_coro()) for task in asyncio.all_tasks()]

        with serving(engine, given, app) as running:
            # Sockets have it from the one that listens: they are full soon when the client does not read.
            running.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            yield Quick(running, steps, engine)
    assert not steps.wrong
