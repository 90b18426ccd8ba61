"""The real server on loopback, in a thread, and what tests ask of it."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import httpx
import numpy as np
import soundfile
import uvicorn

from aloud import Engine
from aloud.server.app import create_app
from aloud.server.serve import Server
from aloud.server.settings import Settings

RATE = 24_000
FRAME = 1920  # samples
TEXT = "Hello there, nice to hear you."
LONG = "This is a rather long sentence that goes on and on without ever coming to its end or to any point " * 3


@dataclass
class Running:
    """A server that runs."""

    url: str
    engine: Engine
    app: Any
    server: Server

    @property
    def is_idle(self) -> bool:
        """Whether every answer is over, its line in the log written and its counts made."""
        return not self.server.server_state.tasks

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.url.rpartition(":")[2])

    def client(self, key: str | None = None, **arguments: Any) -> httpx.Client:
        """An HTTP client of it."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **arguments)

    def speech(self, **body: Any) -> httpx.Response:
        """Ask for speech, and wait for all of it."""
        with self.client() as client:
            return client.post("/v1/audio/speech", json=asked(**body))


def asked(**body: Any) -> dict[str, Any]:
    """The body of a short request; None leaves a field out."""
    given = {"input": TEXT, "response_format": "pcm", "max_seconds": 0.8, "seed": 7, **body}
    return {name: value for name, value in given.items() if value is not None}


RUNNING: list[Running] = []
"""The servers that run."""


@contextmanager
def serving(engine: Engine, settings: Settings | None = None, app: Any = None) -> Iterator[Running]:
    """Serve an application over an engine, which several may share, until the block ends."""
    settings = settings or Settings(model="small")
    app = app or create_app(engine, settings)
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http="h11",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=2,
        server_header=False,
        ws_ping_interval=120,  # clients of a busy machine take long to answer
        ws_ping_timeout=120,
        h11_max_incomplete_event_size=65_536,
    )
    server = Server(config, 10.0, settings.limits)
    server.open(engine, lambda: app.state.metrics.speaking)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), 20)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Running(f"http://127.0.0.1:{port}", engine, app, server)
    RUNNING.append(running)
    try:
        yield running
    finally:
        RUNNING.remove(running)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> float:
    """Wait for something -> how many seconds it took; fails when it takes too long."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, "it did not come to pass"
        time.sleep(0.002)
    return time.monotonic() - began


def is_idle(engine: Engine) -> bool:
    """Whether no stream has or wants a slot."""
    stats = engine.stats()
    return stats.slots_used == 0 and stats.streams_waiting == 0


def pcm(data: bytes) -> np.ndarray:
    """16-bit samples -> float32 [samples]."""
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def decoded(data: bytes) -> np.ndarray:
    """A file that FFmpeg reads -> float32 [samples] at 24 kHz."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    parts = []
    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode(audio=0):
            parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
    parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.concatenate(parts)


def events_of(text: str) -> list[dict[str, Any]]:
    """The server-sent events of a body."""
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block[len("data: ") :]) for block in blocks]


def wav(samples: np.ndarray, rate: int = RATE, format: str = "WAV", **arguments: Any) -> bytes:
    """A file of samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, **arguments)
    return file.getvalue()


def encoded(samples: np.ndarray, container: str, codec: str, rate: int = 48_000, layout: str = "mono") -> bytes:
    """A file of samples, written by FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, layout=layout)
        for start in range(0, len(samples), rate):
            part = np.clip(samples[start : start + rate] * 32767, -32768, 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(part[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def assert_problem(response: httpx.Response, status: int, code: str | None = None) -> str:
    """An error in OpenAI's shape, with a sentence -> the sentence."""
    assert response.status_code == status, response.text[:200]
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers["x-request-id"]) == 16
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    message: str = error["message"]
    assert message.endswith(".")
    assert " " in message
    if code is not None:
        assert error["code"] == code
    return message


class Lines(logging.Handler):
    """Everything that is logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.records.append(record)

    @property
    def text(self) -> str:
        """All of it, tracebacks included."""
        formatter = logging.Formatter("%(name)s %(levelname)s %(message)s")
        return "\n".join(formatter.format(record) for record in self.records)

    @property
    def errors(self) -> list[str]:
        """What was logged as an error."""
        return [record.getMessage() for record in self.records if record.levelno >= logging.ERROR]

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The gate's lines."""
        lines = [record.getMessage() for record in self.records if record.name == "aloud.server"]
        return [content for content in map(json.loads, lines) if "path" in content]

    def request(self) -> dict[str, Any]:
        """The gate's last line, which is written when the answer is over."""
        wait_until(lambda: bool(self.requests))
        return self.requests[-1]


@contextmanager
def logged() -> Iterator[Lines]:
    """What is logged until the block ends."""
    lines, root = Lines(), logging.getLogger()
    level = root.level
    root.addHandler(lines)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(lines)
        root.setLevel(level)
