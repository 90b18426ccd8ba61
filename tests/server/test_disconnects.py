"""Clients that leave, at every stage, and clients that come all at once: slots come back, nothing is lost or mixed."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time

import httpx
import pytest

from aloud.engine.loop import Loop
from server.running import FRAME, LONG, Lines, Running, asked, is_idle, pcm, wait_until


@pytest.fixture
def all_admitted(monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    """However busy the machine is: whether frames come in time is not what is tested."""
    monkeypatch.setattr(server.engine.loop.scheduler, "retry_after", lambda *_: None)
    monkeypatch.setattr(server.engine.loop, "max_waiting", 1000)


def leave(running: Running, stage: str, chance: random.Random) -> None:
    body = json.dumps(asked(input=LONG, max_seconds=20, response_format=chance.choice(["pcm", "mp3", "wav"]))).encode()
    path = "/v1/audio/voices" if chance.random() < 0.3 and stage == "upload" else "/v1/audio/speech"
    kind = "multipart/form-data; boundary=x" if path.endswith("voices") else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        if chance.random() < 0.5:  # a reset rather than a farewell
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if stage == "head":
            connection.sendall(head[: chance.randrange(1, len(head))])
        elif stage == "upload":
            connection.sendall(head + body[: chance.randrange(len(body))])
        else:
            connection.sendall(head + body)
        if stage == "soon":
            time.sleep(chance.uniform(0, 0.05))
        if stage == "streaming":
            for _ in range(chance.randrange(1, 6)):
                assert connection.recv(1000)


def test_two_hundred_leave(server: Running, lines: Lines, seed: int, all_admitted: None) -> None:
    chance = random.Random(seed)
    stages = [stage for stage in ("head", "upload", "soon", "soon", "streaming") for _ in range(40)]
    chance.shuffle(stages)
    waiting = list(stages)
    lock = threading.Lock()

    def clients(number: int) -> None:
        own = random.Random(seed + number)
        while True:
            with lock:
                if not waiting:
                    return
                stage = waiting.pop()
            leave(server, stage, own)

    threads = [threading.Thread(target=clients, args=(number,)) for number in range(8)]  # over 4 slots: some queue
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    wait_until(lambda: is_idle(server.engine), 5)
    wait_until(lambda: server.app.state.metrics.speaking == 0, 5)
    assert not lines.errors, lines.errors[:3]
    stats = server.engine.stats()
    assert stats.slots_used == stats.streams_waiting == 0
    assert server.speech().status_code == 200


def test_a_slot_is_free_within_a_frame(server: Running, all_admitted: None) -> None:
    """Of the loop's noticing that the client is gone."""
    for _ in range(5):
        steps = []
        original = Loop.cancel

        def cancel(self: Loop, stream: object, original=original, steps=steps) -> None:  # type: ignore[no-untyped-def]
            steps.append(self.counts.steps)
            original(self, stream)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch, server.client() as client:
            patch.setattr(Loop, "cancel", cancel)
            with client.stream("POST", "/v1/audio/speech", json=asked(input=LONG, max_seconds=20)) as answer:
                parts = answer.iter_raw()  # to be kept: the connection ends with it
                next(parts)
                assert server.engine.stats().slots_used == 1
            wait_until(lambda: is_idle(server.engine))
            assert server.engine.loop.counts.steps - steps[0] <= 2  # the one in flight, and the one that was launched


def test_those_who_queue_leave_the_queue(server: Running, lines: Lines, all_admitted: None) -> None:
    held = [server.engine.stream("Hello there.", pace="full", max_seconds=20) for _ in range(4)]
    try:
        for speech in held:
            next(speech)
        body = json.dumps(asked()).encode()
        head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connections = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(10)]
        for connection in connections:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        wait_until(lambda: server.engine.stats().streams_waiting == 10)
        for connection in connections:
            connection.close()
        wait_until(lambda: server.engine.stats().streams_waiting == 0)
        assert server.engine.stats().slots_used == 4
    finally:
        for speech in held:
            speech.cancel()
    assert not lines.errors


def test_sixty_four_at_once(server: Running, lines: Lines, all_admitted: None) -> None:
    """Over four slots: each gets its own speech, sample for sample what it gets alone."""
    kinds = [{"seed": seed, "speaker": seed % 3, "max_seconds": 0.24 + 0.08 * (seed % 3)} for seed in range(8)]
    alone = [server.speech(**kind).content for kind in kinds]
    assert len(set(alone)) == len(kinds)

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False, limits=limits) as client:
            return await asyncio.gather(
                *(client.post("/v1/audio/speech", json=asked(**kinds[number % 8])) for number in range(64))
            )

    answers = asyncio.run(ask_all())
    assert [answer.status_code for answer in answers] == [200] * 64
    for number, answer in enumerate(answers):
        assert len(answer.content) == len(alone[number % 8])
        difference = abs(pcm(answer.content) - pcm(alone[number % 8])).max()
        assert answer.content == alone[number % 8], difference
    assert not lines.errors


def test_what_is_too_much_is_refused_cleanly(
    server: Running, lines: Lines, monkeypatch: pytest.MonkeyPatch, all_admitted: None
) -> None:
    monkeypatch.setattr(server.engine.loop, "max_waiting", 8)
    expected = server.speech(max_seconds=0.4).content
    before = server.engine.stats()

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False, limits=limits) as client:
            return await asyncio.gather(
                *(client.post("/v1/audio/speech", json=asked(max_seconds=0.4)) for _ in range(64))
            )

    answers = asyncio.run(ask_all())
    spoken = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(spoken) + len(refused) == 64
    assert len(spoken) >= 12
    assert all(answer.content == expected for answer in spoken)
    for answer in refused:
        assert answer.headers["x-should-retry"] == "true"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"
    after = server.engine.stats()
    assert after.refused - before.refused == len(refused)
    assert after.finished - before.finished == len(spoken)
    assert len(expected) == 2 * 5 * FRAME
    assert not lines.errors
