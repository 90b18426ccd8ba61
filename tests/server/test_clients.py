"""Clients that people have: OpenAI's Python library and curl, against the real server."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from aloud import Engine
from aloud.audio import Audio
from aloud.errors import Overloaded
from aloud.live_speech import LiveSpeech
from aloud.server.settings import Settings
from oracle.csm import speech_like
from server.running import LONG, TEXT, Running, asked, decoded, is_idle, serving, wait_until, wav

KEY = "sk-a-test"
EXTRA = {"seed": 7, "max_seconds": 0.8}


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[Running]:
    with serving(engine, Settings(model="small", keys=(KEY,))) as running:
        yield running


@pytest.fixture
def client(locked: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def expected(locked: Running) -> bytes:
    with locked.client(KEY) as client:
        return client.post("/v1/audio/speech", json=asked()).content


def test_bytes(client: openai.OpenAI, expected: bytes) -> None:
    speech = client.audio.speech.create(
        model="tts-1", voice="alloy", input=TEXT, response_format="pcm", extra_body=EXTRA
    )
    assert speech.read() == expected


def test_its_default_is_mp3(client: openai.OpenAI, tmp_path: Path) -> None:
    speech = client.audio.speech.create(model="gpt-4o-mini-tts", voice="coral", input=TEXT, extra_body=EXTRA)
    assert speech.response.headers["content-type"] == "audio/mpeg"
    speech.write_to_file(tmp_path / "speech.mp3")
    assert 0 <= len(decoded((tmp_path / "speech.mp3").read_bytes())) - 19_200 < 3500


def test_streaming(client: openai.OpenAI, expected: bytes) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input=TEXT, response_format="pcm", extra_body=EXTRA
    ) as answer:
        assert answer.request_id
        parts = list(answer.iter_bytes(1000))
    assert b"".join(parts) == expected


@pytest.mark.parametrize("format", ["pcm", "mp3"])
def test_events(client: openai.OpenAI, expected: bytes, format: str) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input=TEXT, response_format=format, stream_format="sse", extra_body=EXTRA
    ) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    data = b"".join(base64.b64decode(event["audio"]) for event in events if event["type"] == "speech.audio.delta")
    assert events[-1]["type"] == "speech.audio.done"
    if format == "pcm":
        assert data == expected
    else:
        assert 0 <= len(decoded(data)) - 19_200 < 3500


def test_a_voice(client: openai.OpenAI, expected: bytes, seed: int) -> None:
    made = client.post(
        "/audio/voices",
        body={"name": "ours", "consent": "I agree."},
        files={"audio_sample": ("a.wav", wav(speech_like(0.5, seed)), "audio/wav")},
        options={"headers": {"Content-Type": "multipart/form-data"}},
        cast_to=object,
    )
    assert made["name"] == "ours"  # type: ignore[index]
    for voice in ("ours", {"id": "ours"}):
        speech = client.audio.speech.create(
            model="tts-1", voice=voice, input=TEXT, response_format="pcm", extra_body=EXTRA
        )
        assert len(speech.read()) == len(expected)


def test_errors(client: openai.OpenAI, locked: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="one speed") as refused:
        client.audio.speech.create(model="tts-1", voice="alloy", input=TEXT, speed=2)
    assert refused.value.param == "speed"
    assert refused.value.code == "speed_unsupported"
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError, match="no voice nobody"):
        client.audio.speech.create(model="tts-1", voice="nobody", input=TEXT)
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError, match="key is needed"),
    ):
        stranger.models.list()


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by, type(model.created)) == ("small", "aloud", int)
    assert client.models.retrieve("small") == model
    with pytest.raises(openai.NotFoundError, match="There is no model of that name"):
        client.models.retrieve("gpt-4o-mini-tts")


@pytest.mark.parametrize("refusals", [1, 3])
def test_it_comes_again_after_429(
    client: openai.OpenAI, expected: bytes, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    """As long after as it was told, and gives up after two retries."""
    asked_at: list[float] = []
    original = LiveSpeech.__anext__

    async def refusing(self: LiveSpeech) -> Audio:
        if not hasattr(self, "_was_asked"):
            self._was_asked = True  # type: ignore[attr-defined]
            asked_at.append(time.monotonic())
            if len(asked_at) <= refusals:
                self.cancel()
                raise Overloaded("There is too much to do.", retry_after_seconds=0.2)
        return await original(self)

    monkeypatch.setattr(LiveSpeech, "__anext__", refusing)

    def speak() -> bytes:
        return client.audio.speech.create(
            model="tts-1", voice="alloy", input=TEXT, response_format="pcm", extra_body=EXTRA
        ).read()

    if refusals == 1:
        assert speak() == expected
        assert 0.9 < asked_at[1] - asked_at[0] < 5
    else:
        with pytest.raises(openai.RateLimitError, match="too much"):
            speak()
        assert len(asked_at) == 3


def test_leaving(client: openai.OpenAI, locked: Running) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input=LONG, response_format="pcm", extra_body={"max_seconds": 20}
    ) as answer:
        parts = answer.iter_bytes(1000)
        next(parts)
        assert locked.engine.stats().slots_used == 1
    wait_until(lambda: is_idle(locked.engine))


def curl(*arguments: str) -> bytes:
    path = shutil.which("curl")
    if path is None:
        pytest.skip("needs curl")
    command = [path, "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", "--max-time", "30", *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_curl(locked: Running, expected: bytes, tmp_path: Path, seed: int) -> None:
    given = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    speech = curl(f"{locked.url}/v1/audio/speech", *given, "-d", json.dumps(asked()))
    assert speech == expected
    (tmp_path / "me.wav").write_bytes(wav(speech_like(0.5, seed)))
    form = ["-F", "name=curled", "-F", "consent=I agree.", "-F", f"audio_sample=@{tmp_path}/me.wav"]
    assert json.loads(curl(f"{locked.url}/v1/audio/voices", *given[:2], *form))["name"] == "curled"
    spoken = curl(f"{locked.url}/v1/audio/speech", *given, "-d", json.dumps(asked(voice="curled")))
    assert len(spoken) == len(expected)
    assert np.any(np.frombuffer(spoken, "<i2"))
    assert json.loads(curl(f"{locked.url}/health/ready"))["status"] == "ready"
