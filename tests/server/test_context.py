"""`context` of a speech over HTTP: the conversation so far, as the engine takes it, and what is wrong with one."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from typing import Any

import numpy as np
import pytest
import soundfile

from aloud import Segment
from aloud.audio_file import to_int16
from aloud.codec import mimi
from aloud.server.settings import Limits, Settings
from oracle.csm import speech_like
from server.running import (
    RATE,
    TEXT,
    Lines,
    Running,
    asked,
    assert_problem,
    encoded,
    is_idle,
    serving,
    wait_until,
    wav,
)

SECONDS = 0.4


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def turn(seed: int, text: str = "Well, hello.", seconds: float = 0.5, **fields: Any) -> dict[str, Any]:
    return {"text": text, "audio": base64_of(wav(speech_like(seconds, seed))), **fields}


def engines_own(server: Running, segments: list[Segment], **arguments: Any) -> bytes:
    """What the engine says by itself, as 16-bit samples."""
    given = {"seed": 7, "max_seconds": SECONDS, **arguments}
    chunks = list(server.engine.stream(TEXT, context=segments, **given))
    return to_int16(np.concatenate([chunk.samples for chunk in chunks])).astype("<i2").tobytes()


def read_back(file: bytes) -> np.ndarray:
    """What a file holds: 16-bit samples, which are rounded in one format and cut off in another."""
    samples: np.ndarray = soundfile.read(io.BytesIO(file), dtype="float32")[0]
    return samples


def test_it_is_the_engines(server: Running, seed: int) -> None:
    """Byte for byte, with audio of two speakers and a turn of text alone; and it matters."""
    first, second = speech_like(0.5, seed), speech_like(0.7, seed + 1)
    given = [
        {"text": "Who is there?", "speaker": 1, "audio": base64_of(wav(first, subtype="FLOAT"))},
        {"text": "It is me.", "audio": base64_of(wav(second, subtype="FLOAT"))},
        {"text": "Come in.", "speaker": 1},
    ]
    segments = [Segment("Who is there?", first, 1), Segment("It is me.", second, 0), Segment("Come in.", None, 1)]
    answer = server.speech(context=given, max_seconds=SECONDS)
    assert answer.status_code == 200
    assert answer.content == engines_own(server, segments)
    for other in (given[:2], given[1:], [given[1], given[0], given[2]], [given[0] | {"speaker": 2}, *given[1:]], []):
        assert server.speech(context=other, max_seconds=SECONDS).content != answer.content
    assert server.speech(context=[], max_seconds=SECONDS).content == server.speech(max_seconds=SECONDS).content


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp4"])
def test_files_of_any_format(server: Running, kind: str, seed: int) -> None:
    samples = speech_like(0.5, seed)
    data = {
        "wav": lambda: wav(samples),
        "flac": lambda: wav(samples, format="FLAC"),
        "ogg": lambda: encoded(samples.repeat(2), "ogg", "libopus"),
        "mp4": lambda: encoded(samples, "mp4", "aac", rate=RATE),
    }[kind]()
    answer = server.speech(context=[{"text": "Hm.", "audio": base64_of(data)}], max_seconds=SECONDS)
    assert answer.status_code == 200
    if kind in ("wav", "flac"):
        assert answer.content == engines_own(server, [Segment("Hm.", read_back(data), 0)])


def test_behind_a_voice(server: Running, seed: int) -> None:
    """A voice that is kept and a context of another: the voice first, as in the engine."""
    sample, heard = wav(speech_like(0.6, seed)), wav(speech_like(0.5, seed + 1))
    with server.client() as client:
        fields = {"name": "behind", "consent": "Yes.", "text": "My voice."}
        assert client.post("/v1/audio/voices", data=fields, files={"audio_sample": sample}).status_code == 201
    voice = server.engine.runtime.voice([Segment("My voice.", read_back(sample), 0)])
    context = [{"text": "And you?", "speaker": 1, "audio": base64_of(heard)}]
    segments = [Segment("And you?", read_back(heard), 1)]
    both = server.speech(voice="behind", context=context, max_seconds=SECONDS).content
    assert both == engines_own(server, segments, voice=voice)
    assert both != server.speech(voice="behind", max_seconds=SECONDS).content
    assert both != server.speech(context=context, max_seconds=SECONDS).content
    assert server.speech(voice="echo", context=context, max_seconds=SECONDS).content == engines_own(
        server, segments, speaker=5
    )


GOOD = {"text": "Hm.", "speaker": 1}
REFUSED: dict[str, tuple[Any, str]] = {
    "no-list": ({"text": "Hm."}, "context"),
    "no-turn": (["Hm."], "context.0"),
    "no-text": ([{"speaker": 1}], "context.0.text"),
    "unknown-field": ([GOOD, {"text": "Hm.", "url": "http://127.0.0.1/"}], "context.1.url"),
    "speaker": ([GOOD, {"text": "Hm.", "speaker": 1000}], "context.1.speaker"),
    "speaker-negative": ([{"text": "Hm.", "speaker": -1}], "context.0.speaker"),
    "speaker-no-number": ([{"text": "Hm.", "speaker": True}], "context.0.speaker"),
    "nothing": ([GOOD, {"text": " \n"}], "context.1"),
    "base64": ([GOOD, {"text": "Hm.", "audio": "no base64!"}], "context.1.audio"),
    "base64-cut": ([GOOD, {"text": "Hm.", "audio": "UklGR"}], "context.1.audio"),
    "base64-foreign": ([{"text": "Hm.", "audio": "ÜÄÖß"}], "context.0.audio"),
    "address": ([{"text": "Hm.", "audio": "http://127.0.0.1/a.wav"}], "context.0.audio"),
    "empty": ([GOOD, {"text": "Hm.", "audio": ""}], "context.1.audio"),
    "no-audio": ([GOOD, {"text": "Hm.", "audio": base64_of(b"no audio at all " * 9)}], "context.1.audio"),
    "no-samples": ([GOOD, {"text": "Hm.", "audio": base64_of(wav(np.zeros(0)))}], "context.1.audio"),
    "not-finite": ([{"text": "", "audio": base64_of(wav(np.full(99, np.nan), subtype="FLOAT"))}], "context.0.audio"),
    "rate": ([{"text": "Hm.", "audio": base64_of(wav(np.zeros(99), 100))}], "context.0.audio"),
    "long": ([GOOD, {"text": "Hm.", "audio": base64_of(wav(np.zeros(121 * RATE), format="FLAC"))}], "context.1.audio"),
    "positions": ([GOOD, {"text": "Hm.", "audio": base64_of(wav(np.zeros(50 * RATE)))}], "context.1.audio"),
    "positions-text": ([GOOD, {"text": "Hm. " * 600}], "context.1.text"),
    "turns": ([GOOD] * 65, "context"),
    "characters": ([{"text": "a" * 10_001}, {"text": "a" * 10_000}], "context"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server: Running, case: str) -> None:
    context, parameter = REFUSED[case]
    before = server.engine.stats()
    answer = server.speech(context=context)
    assert_problem(answer, 400)
    assert answer.json()["error"]["param"] == parameter
    assert server.engine.stats().accepted == before.accepted


def test_not_in_a_session(server: Running) -> None:
    for context in ([], [GOOD]):
        answer = server.speech(context=context, session_id="has-its-own")
        assert_problem(answer, 400, "not_in_a_session")
        assert answer.json()["error"]["param"] == "context"
    with server.client() as client:
        assert_problem(client.get("/v1/sessions/has-its-own"), 404)


def test_the_limits_are_of_all_turns_together(server: Running, seed: int) -> None:
    """To the sample."""
    with serving(server.engine, Settings(model="small", limits=Limits(context_seconds=1.0, context_turns=2))) as strict:

        def status(*samples: int) -> tuple[int, str | None]:
            context = [{"text": "Hm.", "audio": base64_of(wav(np.zeros(count)))} for count in samples]
            answer = strict.speech(context=context, max_seconds=0.08)
            return answer.status_code, answer.json()["error"]["param"] if answer.status_code != 200 else None

        assert status(RATE) == (200, None)
        assert status(RATE // 3, RATE - RATE // 3) == (200, None)
        assert status(RATE + 1) == (400, "context.0.audio")
        assert status(RATE // 3, RATE - RATE // 3 + 1) == (400, "context.1.audio")
        assert status(RATE, 1) == (400, "context.1.audio")
        assert status(9, 9, 9) == (400, "context")


def test_a_context_that_leaves_no_room_for_the_text(server: Running) -> None:
    """It fits by itself; that the text does not is found when the speech begins, and is the same kind of error."""
    context = [{"text": "Hm.", "audio": base64_of(wav(np.zeros(40 * RATE)))}]  # 500 frames of 512 positions
    answer = server.speech(context=context, max_seconds=0.08)
    assert_problem(answer, 400, "ContextTooLong")
    assert answer.json()["error"]["param"] is None


def test_the_body_has_its_limit(server: Running) -> None:
    with serving(server.engine, Settings(model="small", limits=Limits(body_bytes=100_000))) as strict:
        context = [{"text": "Hm.", "audio": "A" * 120_000}]
        assert_problem(strict.speech(context=context), 413, "too_large")


def test_nothing_of_it_is_logged(server: Running, lines: Lines) -> None:
    private = "my-private-words"
    for audio in (None, "!", base64_of(b"x" * 99)):
        server.speech(context=[{"text": private, "audio": audio}], max_seconds=0.08)
    server.speech(context=[{"text": "Hm.", private: 1}])
    wait_until(lambda: len(lines.requests) == 4)
    assert private not in lines.text


@pytest.mark.parametrize("moment", ["decoding", "encoding"])
def test_a_client_that_leaves_while_it_is_read(
    server: Running, lines: Lines, monkeypatch: pytest.MonkeyPatch, seed: int, moment: str
) -> None:
    """No slot is taken for it, and nothing is left that would take one."""
    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()
    where = "aloud.server.speech.decode_audio" if moment == "decoding" else "aloud.prepare.encode"
    module, _, name = where.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)

    def held(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        try:
            return original(*arguments)
        finally:
            over.set()

    monkeypatch.setattr(where, held)
    before = server.engine.stats()
    body = json.dumps(asked(context=[turn(seed)], max_seconds=20)).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert begun.wait(20)
    if moment == "encoding":
        assert lines.request()["outcome"] == "client_gone"  # before it has been read
    go_on.set()
    assert over.wait(20)
    assert lines.request()["outcome"] == "client_gone"
    wait_until(lambda: is_idle(server.engine))
    wait_until(lambda: server.app.state.metrics.speaking == 0)
    assert server.engine.stats().accepted == before.accepted
    assert not lines.errors


def test_others_speak_while_it_is_read(server: Running, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Decoding and encoding happen beside the event loop."""
    loops: list[bool] = []
    original = mimi.encode

    def encode(*arguments: Any) -> Any:
        try:
            asyncio.get_running_loop()
            loops.append(True)
        except RuntimeError:
            loops.append(False)
        return original(*arguments)

    monkeypatch.setattr(mimi, "encode", encode)
    assert server.speech(context=[turn(seed), turn(seed + 1)], max_seconds=0.08).status_code == 200
    assert loops == [False, False]
