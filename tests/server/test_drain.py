"""`aloud serve` as a process: it starts, speaks, drains at a signal and stops at the second."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from aloud.checkpoint.random import write_random
from server.running import FRAME, LONG, asked, assert_problem, wait_until

KEY = "a-key-for-the-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("process")
    write_random(folder / "model", "small", seed=0, dtype="float32")
    (folder / "keys").write_text(f"# keys of the app\n\n{KEY}\nanother\n")
    return folder


@contextmanager
def process(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "aloud.cli",
        "serve",
        str(folder / "model"),
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    command += ["--api-key-file", str(folder / "keys"), "--max-streams", "2", "--max-positions", "600", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False) as client:
        try:
            wait_until(lambda: is_ready(client) or running.poll() is not None, 60)
            assert running.poll() is None
            yield running, client
        finally:
            running.kill()
            running.communicate()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_it_drains(folder: Path) -> None:
    """The speech that runs is finished, sentence by sentence, while new ones are sent away; then it exits with 0."""
    with process(folder) as (running, client):
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        comment = {"authorization": "Bearer # keys of the app"}
        assert client.get("/v1/models", headers=comment).status_code == 401
        body = asked(input="One. Two.", max_seconds=6)  # the second sentence begins after the signal
        whole = client.post("/v1/audio/speech", json=body)
        assert len(whole.content) == 2 * 75 * 1920
        received = b""
        done = threading.Event()

        def listen() -> None:
            nonlocal received
            with (
                httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as other,
                other.stream("POST", "/v1/audio/speech", json=body, headers=client.headers) as answer,
            ):
                for part in answer.iter_raw():
                    received += part
            done.set()

        thread = threading.Thread(target=listen)
        thread.start()
        wait_until(lambda: bool(received))
        running.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_ready(client))
        refused = client.post("/v1/audio/speech", json=asked())
        if not done.is_set():
            assert_problem(refused, 503, "draining")
            assert refused.headers["retry-after"] == "5"
            assert refused.headers["x-should-retry"] == "true"
            assert_problem(client.get("/health/ready"), 503, "draining")
            assert client.get("/health/live").status_code == 200
        thread.join(60)
        assert done.is_set()
        assert received == whole.content
        assert running.wait(20) == 0
        assert "Traceback" not in running.stderr.read()  # type: ignore[union-attr]


def until_closed(client: ClientConnection) -> Iterator[str | bytes]:
    with suppress(ConnectionClosed):
        while True:
            yield client.recv(timeout=20)


def test_sockets_do_not_hold_it(folder: Path) -> None:
    """A turn whose text never ends is spoken as far as it was given; a silent socket is closed at once."""
    headers = {"authorization": f"Bearer {KEY}"}
    with process(folder) as (running, client):
        address = f"ws://127.0.0.1:{client.base_url.port}"
        with (
            connect(f"{address}/v1/audio/speech/stream", additional_headers=headers) as speaking,
            connect(f"{address}/v1/realtime", additional_headers=headers) as silent,
        ):
            speaking.send(json.dumps({"type": "session.config", "max_seconds": 3}))
            assert json.loads(speaking.recv(timeout=20))["type"] == "session.configured"
            speaking.send(json.dumps({"type": "input.text", "text": "One sentence that is whole. And another that is"}))
            assert json.loads(speaking.recv(timeout=20))["type"] == "audio.start"
            began = time.monotonic()
            running.send_signal(signal.SIGTERM)
            assert json.loads(silent.recv(timeout=20))["type"] == "session.created"
            with pytest.raises(ConnectionClosed) as closed:
                silent.recv(timeout=20)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1012
            events: list[dict[str, Any]] = [json.loads(message) for message in until_closed(speaking)]
            assert speaking.protocol.close_code == 1012
        assert events[-1]["type"] == "audio.done"
        assert sum(len(base64.b64decode(event.get("audio", ""))) for event in events) == 38 * FRAME * 2
        assert running.wait(20) == 0
        assert time.monotonic() - began < 50  # and not the 100 s that it may take
        assert "Traceback" not in running.stderr.read()  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_ends_it_at_once(folder: Path, number: signal.Signals) -> None:
    """The second SIGTERM, or Ctrl-C: what runs is cut, which is no fault to write a traceback of."""
    body = asked(input=LONG * 2, max_seconds=30)
    headers = {"authorization": f"Bearer {KEY}"}
    with process(folder) as (running, client), client.stream("POST", "/v1/audio/speech", json=body) as answer:
        parts = answer.iter_raw()
        next(parts)
        address = f"ws://127.0.0.1:{client.base_url.port}/v1/audio/speech/stream"
        with connect(address, additional_headers=headers) as listening:
            listening.send(json.dumps({"type": "session.config", "max_seconds": 3}))
            assert json.loads(listening.recv(timeout=20))["type"] == "session.configured"
            if number == signal.SIGTERM:
                running.send_signal(number)
                time.sleep(0.3)
                assert running.poll() is None
            running.send_signal(number)
            began = time.monotonic()
            assert running.wait(10) == 0
            assert time.monotonic() - began < 5
            with pytest.raises(httpx.TransportError):
                for _ in parts:
                    pass
        assert running.stderr is not None
        lines = running.stderr.read().splitlines()
    assert not [line for line in lines if "Traceback" in line or "Exception" in line]
    (line,) = [json.loads(line) for line in lines if '"POST"' in line]
    assert (line["path"], line["status"], line["outcome"]) == ("/v1/audio/speech", 200, "client_gone")
    (line,) = [json.loads(line) for line in lines if '"/v1/audio/speech/stream"' in line]


def test_the_limit_of_draining(folder: Path) -> None:
    with process(folder, "--drain-seconds", "0.2") as (running, client):
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
        with pytest.raises(httpx.TransportError):
            client.get("/health/live")


def test_a_key_file_without_keys(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n# none yet\n")
    command = [
        sys.executable,
        "-m",
        "aloud.cli",
        "serve",
        str(folder / "model"),
        "--api-key-file",
        str(tmp_path / "empty"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "no key" in done.stderr
    assert "Traceback" not in done.stderr
