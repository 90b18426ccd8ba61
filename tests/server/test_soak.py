"""Rounds of everything that clients do: after a few, memory, files, threads, tasks and tables stay where they are."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import random
import socket
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from aloud import Engine
from aloud.server.app import create_app
from aloud.server.connection import Connection, Door
from aloud.server.sessions import Sessions
from aloud.server.settings import Settings
from aloud.server.voices import Registry
from oracle.csm import speech_like
from server.running import LONG, Lines, Running, asked, assert_problem, is_idle, serving, wait_until, wav
from standing_threads import standing_threads

WARM_UP_ROUNDS, ROUNDS = 2, 4
PROCESS_BYTES = 24 << 20
"""What the process may grow by over half the rounds: each of its threads keeps memory for later."""
PYTHON_BYTES = 200_000
"""What Python's own memory may: less than one round's audio."""
FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")


@pytest.fixture
def running(engine: Engine) -> Iterator[Running]:
    """A server that tells how many tasks its event loop has."""
    settings = Settings(model="small")
    others = {id(kept) for kept in gc.get_objects() if type(kept) is Sessions}  # of servers that were here before
    app = create_app(engine, settings)
    app.state.others = others

    @app.get("/tasks")
    async def tasks() -> int:
        return len(asyncio.all_tasks())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.loop.scheduler, "retry_after", lambda *_: None)  # a busy machine refuses nothing here
        with serving(engine, settings, app) as running:
            yield running


def speak(client: httpx.Client, number: int, drawn: random.Random) -> None:
    """In every format, to the end and left in the middle, plain in one round and as events in the next."""
    for place, name in enumerate(FORMATS):
        way = "sse" if (number + place) % 2 else "audio"
        whole = asked(response_format=name, stream_format=way, max_seconds=0.24, seed=drawn.randrange(1000))
        answer = client.post("/v1/audio/speech", json=whole)
        assert answer.status_code == 200
        assert answer.content
        long = asked(input=LONG, max_seconds=8, response_format=name)
        with client.stream("POST", "/v1/audio/speech", json=long) as left:
            next(left.iter_raw())


def vanish(port: int, drawn: random.Random) -> None:
    """While the request is sent, or soon after."""
    body = json.dumps(asked()).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
    for size in (drawn.randrange(1, 60), len(request) - 5, len(request)):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(request[:size])


def keep(client: httpx.Client, number: int, sample: bytes) -> None:
    """Voices and sessions, which come and go."""
    name = f"voice-{number}"
    files = {"audio_sample": ("a.wav", sample)}
    fields = {"name": name, "consent": "It is a machine's.", "text": "Hello."}
    assert client.post("/v1/audio/voices", data=fields, files=files).status_code == 201
    say = asked(voice=name, session_id=name, max_seconds=0.24)
    assert client.post("/v1/audio/speech", json=say).status_code == 200
    heard = client.post(f"/v1/sessions/{name}/turns", data={"text": "Yes?"}, files={"audio": ("a.wav", sample)})
    assert heard.status_code == 200, heard.text
    assert client.post("/v1/audio/speech", json=say).status_code == 200
    content = client.get(f"/v1/sessions/{name}").json()
    assert client.put(f"/v1/sessions/{name}-again", json=content).status_code == 200
    assert client.delete(f"/v1/audio/voices/{name}").status_code == 200
    for path in (f"sessions/{name}", f"sessions/{name}-again"):
        assert client.delete(f"/v1/{path}").status_code == 204


def refused(client: httpx.Client) -> None:
    """Requests that are wrong."""
    post = lambda **body: client.post("/v1/audio/speech", json=asked(**body))  # noqa: E731
    assert_problem(post(input=""), 400)
    assert_problem(post(voice="nobody"), 404)
    assert_problem(post(input="a" * 20_001), 400)
    assert_problem(client.get("/v1/sessions/nobody"), 404)
    assert_problem(client.post("/v1/audio/voices", data={"name": "a"}), 400)
    fields = {"name": "a", "consent": "Yes."}
    assert_problem(client.post("/v1/audio/voices", data=fields, files={"audio_sample": b"no sound"}), 400)


def sockets(port: int, drawn: random.Random) -> None:
    """Sockets that speak, are cancelled, make mistakes, are closed, and vanish."""
    for way in ("close", "session.close", "vanish", "cancel"):
        with connect(f"ws://127.0.0.1:{port}/v1/audio/speech/stream", close_timeout=1) as client:
            for message in (
                {"type": "session.config", "max_seconds": 0.24, "response_format": drawn.choice(FORMATS)},
                {"type": "input.text", "text": "Hello there, my friend."},
                {"type": "input.done"},
                {"type": "nonsense"},
                *({"type": "input.text", "text": LONG, "context_id": name} for name in ("a", "b")),
            ):
                client.send(json.dumps(message))
            until(client, "audio.done")
            if way == "vanish":
                client.socket.shutdown(socket.SHUT_RDWR)
                with pytest.raises(ConnectionClosed):  # closed while something is still read, the client fails
                    until(client, "nothing")
            elif way == "cancel":
                client.send(json.dumps({"type": "input.cancel", "context_id": "a"}))
                until(client, "audio.cancelled")
            elif way == "session.close":
                client.send(json.dumps({"type": "session.close"}))
                with pytest.raises(ConnectionClosed):
                    until(client, "nothing")
    item = {"role": "user", "content": [{"type": "input_text", "text": LONG}]}
    for ends in (True, False):
        with connect(f"ws://127.0.0.1:{port}/v1/realtime", close_timeout=1) as client:
            client.send(json.dumps({"type": "response.create", "response": {"input": [item]}}))
            until(client, "response.output_audio.delta")
            if ends:
                client.send(json.dumps({"type": "response.cancel"}))
                until(client, "response.done")


def until(client: Any, kind: str) -> None:
    while json.loads(client.recv(timeout=30))["type"] != kind:
        pass


def everything(running: Running, number: int, sample: bytes, seed: int) -> None:
    """One round: the kinds at the same time, each in a thread."""
    drawn = [random.Random(seed + 10 * number + kind) for kind in range(3)]
    with running.client() as client, running.client() as other, ThreadPoolExecutor(4) as threads:
        done = [
            threads.submit(speak, client, number, drawn[0]),
            threads.submit(keep, other, number, sample),
            threads.submit(sockets, running.port, drawn[1]),
            threads.submit(vanish, running.port, drawn[2]),
        ]
        for kind in done:
            kind.result(120)
        refused(client)
    wait_until(lambda: is_idle(running.engine), 20)
    wait_until(lambda: running.app.state.metrics.speaking == 0, 20)
    wait_until(lambda: not running.server.server_state.connections, 20)


def resident_bytes() -> int:
    """Of this process, without what the allocator keeps for later."""
    with suppress(AttributeError, OSError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tables(running: Running) -> dict[str, int]:
    """The sizes of what the server, the engine and the process keep."""
    with running.client() as client:
        tasks = client.get("/tasks").json()
    wait_until(lambda: not running.server.server_state.connections, 20)
    gc.collect()
    objects = gc.get_objects()
    sizes: Counter[str] = Counter()
    for kept in objects:
        kind = type(kept)  # and not `isinstance`, which asks objects that warn of it
        if kind is Sessions and id(kept) not in running.app.state.others:
            sizes["sessions"] += len(kept._kept)
        elif kind is Registry and kept._runtime is running.engine.runtime:
            sizes["voices"] += len(kept._read) + len(list(kept._folder.rglob("*")))
        elif kind is Door:
            sizes["open sockets"] += sum(kept._open.values()) + len(kept._open)
        elif kind is Connection:
            sizes["connections"] += 1
        if str(kind.__module__).startswith("aloud."):
            sizes["objects of this project"] += 1
    sizes["speeches"] = len(running.engine._speeches)
    sizes["still connections"] = len(running.server._still)
    sizes["tasks"] = tasks
    sizes["threads"] = standing_threads()
    sizes["files"] = len(list(Path("/proc/self/fd").iterdir()))
    return dict(sizes)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_nothing_grows(running: Running, seed: int, lines: Lines) -> None:
    logging.getLogger().setLevel(logging.ERROR)  # what is logged is kept by those who test
    sample = wav(speech_like(0.4, seed))
    marks: list[tuple[int, int, int, dict[str, int]]] = []
    before = tables(running)  # what tests before this one still hold
    tracemalloc.start()
    for number in range(WARM_UP_ROUNDS + ROUNDS):
        everything(running, number, sample, seed)
        sizes = tables(running)
        marks.append((resident_bytes(), tracemalloc.get_traced_memory()[0], len(gc.get_objects()), sizes))
        print(number, f"{marks[-1][0] / 1e6:.1f} MB, {marks[-1][1] / 1e6:.2f} MB of Python's", marks[-1][2], sizes)
    tracemalloc.stop()
    assert lines.errors == []  # before memory: the sources of a traceback's lines are kept for later ones
    settled = marks[WARM_UP_ROUNDS:]
    first, last = settled[: ROUNDS // 2], settled[ROUNDS // 2 :]
    for name in first[0][3]:
        assert min(mark[3][name] for mark in last) <= max(mark[3][name] for mark in first), name
    for name in ("sessions", "open sockets", "connections", "speeches"):
        assert all(mark[3].get(name, 0) == before.get(name, 0) for mark in settled), name
    process, python, objects = (min(mark[i] for mark in last) - min(mark[i] for mark in first) for i in range(3))
    print(f"grew by {process / 1e6:.1f} MB, {python:,} bytes of Python's and {objects} objects")
    assert process < PROCESS_BYTES
    assert python < PYTHON_BYTES
    assert objects < 40 * ROUNDS  # each leaked socket, session or request is a hundred or more
