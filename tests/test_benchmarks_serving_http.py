"""The suite `serving` over HTTP: `aloud serve` in a process, listeners in another, and how it counts what they hear."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import pytest

from aloud import Segment
from aloud.benchmarks import arrivals, http_client, serving, serving_http
from aloud.benchmarks.http_client import Ask, Heard, Plan
from aloud.checkpoint.random import write_random
from aloud.server.settings import Limits

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: audio/pcm\r\nTransfer-Encoding: chunked\r\n\r\n"
RATE = 1000.0  # bytes a second, as they are played


def test_the_engine_is_measured_with_the_servers_lead() -> None:
    assert Limits().lead_seconds == serving.SERVER_LEAD_SECONDS


# --- listeners --------------------------------------------------------------------------------------------------------

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def heard_from(answer: Answer, *asks: Ask, **given: Any) -> list[Heard]:
    """What listeners hear from a server that answers so, once a request's body has come."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        await answer(SimpleReader(head, await reader.readexactly(length)), writer)  # type: ignore[arg-type]
        writer.close()

    async def both() -> list[Heard]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await http_client.listen_to_all(Plan(port, list(asks), RATE, **given))
        finally:
            server.close()

    return asyncio.run(both())


class SimpleReader:
    """A request that has been read."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head, self.body = head, body


def test_a_listener_takes_chunks_however_they_are_cut(seed: int) -> None:
    random = np.random.default_rng(seed)
    sound = random.bytes(5000)
    whole = HEAD + b"".join(chunk(sound[at : at + 700]) for at in range(0, 5000, 700)) + b"0\r\n\r\n"
    cuts = sorted(random.integers(0, len(whole), 40).tolist())

    async def answer(asked: SimpleReader, writer: asyncio.StreamWriter) -> None:
        assert json.loads(asked.body) == {"input": "Hello."}
        assert b"POST /v1/audio/speech HTTP/1.1\r\n" in asked.head
        assert b"\r\nX-Test: yes\r\n" in asked.head
        for begin, end in zip([0, *cuts], [*cuts, None], strict=True):
            writer.write(whole[begin:end])
            await asyncio.sleep(0.001)

    (heard,) = heard_from(answer, Ask(0.0, {"input": "Hello."}), keeps_audio=True, headers={"X-Test": "yes"})
    assert (heard.status, heard.is_whole, heard.left, heard.bytes) == (200, True, False, 5000)
    assert heard.headers["content-type"] == "audio/pcm"
    assert base64.b64decode(heard.audio) == sound


def test_underruns_are_what_a_player_hears() -> None:
    async def answer(_: SimpleReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(3):
            writer.write(chunk(bytes(100)))  # 0.1 s, which is played by the time the rest comes
            await writer.drain()
            await asyncio.sleep(0.4)
        writer.write(chunk(bytes(2500)))  # as much as lasts beyond the next pause
        await writer.drain()
        await asyncio.sleep(1.0)
        writer.write(chunk(bytes(100)) + b"0\r\n\r\n")

    (heard,) = heard_from(answer, Ask(0.0, {}))
    assert 0.8 <= heard.underrun_seconds < 1.5, "each once, and not the last pause"
    assert heard.first_audio_seconds is not None
    assert heard.first_audio_seconds + 2.2 <= heard.seconds


def test_what_is_refused_cut_and_not_there() -> None:
    async def answer(asked: SimpleReader, writer: asyncio.StreamWriter) -> None:
        if b"refused" in asked.body:
            writer.write(b"HTTP/1.1 429 Too Many\r\nRetry-After: 2\r\nContent-Length: 4\r\n\r\nbusy")
        elif b"cut" in asked.body:
            writer.write(HEAD + chunk(bytes(10)))

    refused, cut, dumb = heard_from(answer, *(Ask(0.0, {"input": word}) for word in ("refused", "cut", "dumb")))
    assert (refused.status, refused.headers["retry-after"], refused.text) == (429, "2", "busy")
    assert refused.first_audio_seconds is None
    assert (cut.status, cut.bytes, cut.is_whole, cut.left) == (200, 10, False, False)
    assert (dumb.status, dumb.is_whole, dumb.left) == (None, False, False)
    closed = asyncio.run(http_client.listen_to_all(Plan(1, [Ask(0.0, {})], RATE)))
    assert (closed[0].status, closed[0].text) == (None, "ConnectionRefusedError")


def test_listeners_leave() -> None:
    """After some sound, after some time, when nobody new comes any more, and at the very end."""

    async def answer(asked: SimpleReader, writer: asyncio.StreamWriter) -> None:
        if b"slow" in asked.body:
            await asyncio.sleep(0.6)
        writer.write(HEAD)
        with_sound = b"silent" not in asked.body
        for _ in range(400):
            if with_sound:
                writer.write(chunk(bytes(10)))
            await asyncio.sleep(0.01)
            if writer.is_closing():
                return

    asks = [
        Ask(0.0, {"input": "some"}, leave_after_bytes=50),
        Ask(0.0, {"input": "silent"}, leave_after_seconds=0.2),
        Ask(0.0, {"input": "others"}),
        Ask(0.0, {"input": "slow"}),  # begins after the time to leave: it waits for its first sound
        Ask(0.1, {"input": "silent"}),
    ]
    some, silent, others, slow, last = heard_from(answer, *asks, hears_until=0.4, most_seconds=1.5)
    assert all(one.left and not one.is_whole for one in (some, silent, others, slow, last))
    assert 50 <= some.bytes < 200
    assert silent.bytes == 0
    assert 0.2 <= silent.seconds < others.seconds
    assert 0.4 <= others.seconds < slow.seconds
    assert slow.bytes
    assert last.bytes == 0
    assert 1.4 <= last.seconds < 3


def test_requests_are_asked_when_they_are_due() -> None:
    came: list[float] = []

    async def answer(_: SimpleReader, writer: asyncio.StreamWriter) -> None:
        came.append(asyncio.get_running_loop().time())
        writer.write(HEAD + chunk(bytes(10)) + b"0\r\n\r\n")

    first, second = heard_from(answer, Ask(0.0, {}), Ask(0.5, {}))
    assert came[1] - came[0] > 0.4
    for one in (first, second):
        assert one.asked_seconds is not None
        assert one.first_audio_seconds is not None
        assert 0 <= one.asked_seconds <= one.first_audio_seconds <= one.seconds


def test_listeners_as_a_program() -> None:
    plan = Plan(1, [Ask(0.0, {})], RATE)
    answer = serving_http.listen(plan)
    assert [Heard(**one).text for one in answer["heard"]] == ["ConnectionRefusedError"]
    assert answer["cpu_seconds"] > 0
    program = [sys.executable, "-I", str(Path(http_client.__file__))]
    assert subprocess.run(program, input=b"{}", capture_output=True).returncode != 0
    assert json.loads(json.dumps(asdict(plan)))["requests"] == [asdict(plan.requests[0])]


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random(folder, "small", seed=5, dtype="float32")
    return folder


VOICE_AUDIO = (0.1 * np.sin(np.arange(2 * 1920))).astype(np.float32)


def settings(**given: Any) -> Any:
    return SimpleNamespace(device="cpu", dtype="float32", seconds=0.5, seed=3, **given)


def test_arrivals_over_http(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_http.serving(checkpoint, "cpu", "float32", 8, 600) as server:
        with pytest.raises(serving_http.NoServer, match=r"^the server answered 400: .*60 s"):
            server.add_voice(Segment("Hello.", np.zeros(61 * 24_000, np.float32)))
        monkeypatch.setattr(serving_http, "serving", lambda *_: nullcontext(server))
        own = {8.0: {"p50_ms": 11.0, "p99_ms": 22.0}}
        rows: list[dict[str, Any]] = []
        serving_http.measure(checkpoint, settings(), Segment("Hello.", VOICE_AUDIO), 8, 600, own, rows)
        assert server.last_words() == ""
    assert server.process.poll() is not None
    (row,) = rows
    lengths = arrivals.letters(len(arrivals.poisson(8, 0.5, 3)), 3)
    assert row["requests"] == len(lengths)
    assert row["failed"] == 0
    assert 0 <= row["refused"] <= row["requests"]
    if row["refused"] < row["requests"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert 0 < row["audio_seconds"] <= row["requests"] * row["speech_seconds"]
    assert (row["engine_p50_ms"], row["engine_p99_ms"]) == (11.0, 22.0)
    assert row["asked_late_ms"] > 0
    out = capsys.readouterr().out
    assert "the same arrivals over HTTP" in out
    assert "not measured" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("line\naloud: The server needs fastapi. Install it.\nhint", "The server needs fastapi. Install it."),
        ("killed", "killed"),
        ("", "the server ended without a word."),
    ],
    ids=["a sentence", "other words", "none"],
)
def test_without_a_server_one_sentence_says_so(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was measured with the engine alone is reported all the same."""
    start = serving_http.start

    def start_nothing(command: list[str], log: TextIO) -> subprocess.Popen[bytes]:
        assert command[1:5] == ["-m", "aloud.cli", "serve", "folder"]
        return start([command[0], "-I", "-c", f"import sys; print({words!r}); sys.exit(1)"], log)

    monkeypatch.setattr(serving_http, "start", start_nothing)
    rows: list[dict[str, Any]] = []
    serving_http.measure(Path("folder"), settings(), Segment("Hello.", VOICE_AUDIO), 2, 600, {8.0: {}}, rows)
    assert rows == []
    assert capsys.readouterr().out == f"not measured over HTTP: {said}\n"


def test_rates_that_were_heard_are_there_after_an_interrupt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def arrive(_: object, rate: float, *__: object) -> dict[str, float]:
        if rate == 16.0:
            raise KeyboardInterrupt
        return {"rate": rate}

    server = SimpleNamespace(add_voice=lambda _: None, say_once=lambda: None)
    monkeypatch.setattr(serving_http, "serving", lambda *_: nullcontext(server))
    monkeypatch.setattr(serving_http, "serve_arrivals", arrive)
    rows: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        serving_http.measure(
            Path("folder"), settings(), Segment("Hello.", VOICE_AUDIO), 2, 600, {8.0: {}, 16.0: {}}, rows
        )
    assert rows == [{"rate": 8.0}]
    assert "the same arrivals over HTTP" in capsys.readouterr().out
