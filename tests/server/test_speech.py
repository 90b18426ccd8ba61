"""Speech over HTTP: every format, streamed, the same as the engine's own."""

from __future__ import annotations

import base64
import io
import time
import wave
from contextlib import closing

import httpx
import numpy as np
import pytest
import soundfile

from aloud import Engine
from aloud.audio_file import to_int16
from aloud.server.settings import Limits, Settings
from server.running import FRAME, LONG, RATE, TEXT, Running, asked, decoded, events_of, pcm, serving

CONTENT_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
SECONDS = 0.8
SAMPLES = round(SECONDS * RATE)


def samples_of(data: bytes, format: str) -> np.ndarray:
    return pcm(data) if format == "pcm" else decoded(data)


def similarity(ours: np.ndarray, original: np.ndarray, most_delay: int) -> float:
    """The largest correlation coefficient over delays of 0 to `most_delay` samples."""
    best = 0.0
    for delay in range(min(most_delay, max(0, len(ours) - len(original))) + 1):
        part = ours[delay : delay + len(original)]
        norm = np.linalg.norm(part) * np.linalg.norm(original[: len(part)])
        best = max(best, float(part @ original[: len(part)] / norm))
    return best


@pytest.fixture(scope="module")
def spoken(server: Running) -> np.ndarray:
    """What the engine says by itself, as the request asks for it: int16 [samples]."""
    chunks = list(server.engine.stream(TEXT, seed=7, max_seconds=SECONDS))
    return to_int16(np.concatenate([chunk.samples for chunk in chunks]))


def test_pcm_is_what_the_engine_says(server: Running, spoken: np.ndarray) -> None:
    answer = server.speech()
    assert answer.status_code == 200
    assert answer.headers["x-aloud-seed"] == "7"
    assert len(answer.headers["x-request-id"]) == 16
    assert answer.headers["cache-control"] == "no-store"
    np.testing.assert_array_equal(np.frombuffer(answer.content, "<i2"), spoken)
    assert len(spoken) == SAMPLES
    assert np.abs(spoken).max() > 100, "the test's checkpoint says nothing"


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("format", CONTENT_TYPES)
def test_every_format(server: Running, spoken: np.ndarray, format: str, stream_format: str) -> None:
    answer = server.speech(response_format=format, stream_format=stream_format)
    assert answer.status_code == 200
    if stream_format == "audio":
        data = answer.content
        assert answer.headers["content-type"] == CONTENT_TYPES[format]
    else:
        assert answer.headers["content-type"] == "text/event-stream"
        *deltas, done = events_of(answer.text)
        assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
        data = b"".join(base64.b64decode(delta["audio"], validate=True) for delta in deltas)
        assert done["type"] == "speech.audio.done"
        assert done["finish_reason"] == "length"
        usage = done["usage"]
        assert usage["output_tokens"] == SAMPLES // FRAME
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["input_tokens"] >= len(TEXT.split())
    samples = samples_of(data, format)
    original = spoken.astype(np.float32) / 32768
    if format in ("pcm", "wav", "flac"):
        np.testing.assert_array_equal(samples, original)
        return
    # Lossy formats begin with their coder's delay and end with a whole frame.
    assert 0 <= len(samples) - SAMPLES <= 3500
    assert similarity(samples, original, 3500) > 0.8


@pytest.mark.parametrize("format", ["wav", "mp3", "opus"])  # of FLAC it wants the length first
def test_libsndfile_reads_it(server: Running, spoken: np.ndarray, format: str) -> None:
    data = server.speech(response_format=format).content
    with soundfile.SoundFile(io.BytesIO(data)) as file:  # a stream's header does not say how much follows
        samples, rate = file.read(10 * RATE, dtype="int16"), file.samplerate
    if format == "wav":
        np.testing.assert_array_equal(samples, spoken)
        assert rate == RATE
    else:
        assert abs(len(samples) / rate - SECONDS) < 0.15


def test_a_wav_header_that_players_accept(server: Running, spoken: np.ndarray) -> None:
    data = server.speech(response_format="wav").content
    with closing(wave.open(io.BytesIO(data))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        read = file.readframes(2**20)
    np.testing.assert_array_equal(np.frombuffer(read, "<i2"), spoken)
    assert data[:4] == b"RIFF"
    assert len(data) == 44 + 2 * SAMPLES


@pytest.mark.parametrize("format", CONTENT_TYPES)
def test_it_streams(server: Running, format: str) -> None:
    """A frame's bytes come before the next frame is made: the first long before the last."""
    arrivals: list[tuple[float, int]] = []
    body = asked(input=LONG, response_format=format, max_seconds=2.4)
    with server.client() as client, client.stream("POST", "/v1/audio/speech", json=body) as answer:
        for part in answer.iter_raw():
            arrivals.append((time.monotonic(), len(part)))
    total = sum(size for _, size in arrivals)
    assert len(arrivals) >= 15, "30 frames came in fewer parts"
    assert max(size for _, size in arrivals) < total / 3
    first, last = arrivals[0][0], arrivals[-1][0]
    half = next(
        at for place, (at, _) in enumerate(arrivals) if sum(size for _, size in arrivals[: place + 1]) * 2 > total
    )
    assert first < half < last


def test_the_first_bytes_are_there_while_the_rest_is_made(server: Running) -> None:
    with (
        server.client() as client,
        client.stream("POST", "/v1/audio/speech", json=asked(max_seconds=8, input=LONG)) as answer,
    ):
        parts = answer.iter_raw()  # to be kept: the connection ends with it
        next(parts)
        assert server.engine.stats().slots_used == 1
        assert answer.status_code == 200


def test_a_seed_is_given_and_returned(server: Running) -> None:
    first = server.speech(seed=None)
    second = server.speech(seed=None)
    assert first.headers["x-aloud-seed"] != second.headers["x-aloud-seed"]
    assert first.content != second.content
    again = server.speech(seed=int(first.headers["x-aloud-seed"]))
    assert again.content == first.content


def test_fields_of_the_model(server: Running) -> None:
    plain = server.speech().content
    greedy = server.speech(temperature=0, depth_temperature=0).content
    assert greedy != plain
    assert server.speech(temperature=0, depth_temperature=0, seed=8).content == greedy
    assert server.speech(top_k=1, depth_top_k=1).content == greedy
    assert server.speech(speaker=3).content != plain
    assert len(server.speech(max_seconds=0.24).content) == 2 * 3 * FRAME


def test_voices_are_speakers_by_name_and_by_id(server: Running) -> None:
    plain = server.speech(voice="alloy").content
    assert server.speech(voice={"id": "alloy"}).content == plain
    assert server.speech(speaker=0).content == plain
    assert server.speech(voice="echo").content == server.speech(speaker=5).content != plain


def test_fields_that_change_nothing(server: Running) -> None:
    plain = server.speech().content
    assert server.speech(model="tts-1", instructions="Whisper.", speed=1).content == plain


def test_a_long_text_is_spoken_sentence_by_sentence(server: Running) -> None:
    text = "One. Two."
    made = list(server.engine.stream(text, seed=7, max_seconds=5.6))
    assert server.engine.stats().slots_used == 0
    answer = server.speech(input=text, max_seconds=5.6)
    np.testing.assert_array_equal(
        np.frombuffer(answer.content, "<i2"), to_int16(np.concatenate([chunk.samples for chunk in made]))
    )


def test_a_file_is_made_as_fast_as_it_can_be(engine: Engine) -> None:
    """The same audio as for who listens, in less time than to listen to it takes."""
    with serving(engine, Settings(model="small", limits=Limits(lead_seconds=0.4))) as server:
        began = time.monotonic()
        file = server.speech(input=LONG, max_seconds=8, pace="full", session_id="file")
        assert time.monotonic() - began < 8 - 0.4 - 1
        assert len(file.content) == 2 * round(8 * RATE)
        short = [server.speech(pace=pace).content for pace in ("full", "realtime")]
        assert short[0] == short[1]


def test_request_ids_differ(server: Running) -> None:
    with server.client() as client:
        ids = {client.get("/health/live").headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


def test_a_connection_serves_many(server: Running) -> None:
    with server.client(limits=httpx.Limits(max_connections=1)) as client:
        answers = [client.post("/v1/audio/speech", json=asked()).content for _ in range(3)]
    assert len(set(answers)) == 1
