"""OpenAI's client for Node, against the real server; `dev.py interop` installs it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aloud import Engine
from aloud.audio import Audio
from aloud.errors import Overloaded
from aloud.live_speech import LiveSpeech
from aloud.server.settings import Settings
from oracle.csm import speech_like
from server.running import LONG, Running, asked, decoded, is_idle, serving, wait_until, wav

KEY = "sk-a-test"
CLIENT = Path(__file__).parent / "node" / "client.mjs"
MODULES = Path(sys.prefix) / "node" / "node_modules"
pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (MODULES / "openai").is_dir(),
    reason="needs node and OpenAI's client for it: python3 dev.py interop",
)


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[Running]:
    with serving(engine, Settings(model="small", keys=(KEY,))) as running:
        yield running


@pytest.fixture(scope="module")
def expected(locked: Running) -> bytes:
    with locked.client(KEY) as client:
        return client.post("/v1/audio/speech", json=asked()).content


@pytest.fixture(autouse=True)
def nothing_left(engine: Engine) -> Iterator[None]:
    yield
    wait_until(lambda: is_idle(engine))


def node(server: Running, what: str, argument: str = "", key: str = KEY) -> Any:
    """What one of the client's calls gives."""
    command = ["node", str(CLIENT), str(MODULES), server.url, key, what, argument]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_bytes(locked: Running, expected: bytes) -> None:
    given = node(locked, "bytes", "pcm")
    assert given["type"] == "audio/pcm"
    assert base64.b64decode(given["audio"]) == expected


def test_a_stream(locked: Running, expected: bytes) -> None:
    given = node(locked, "stream")
    assert given["parts"] > 1
    assert base64.b64decode(given["audio"]) == expected


@pytest.mark.parametrize("form", ["pcm", "mp3", "opus"])
def test_events(locked: Running, expected: bytes, form: str) -> None:
    given = node(locked, "events", form)
    assert given["last"]["type"] == "speech.audio.done"
    data = base64.b64decode(given["audio"])
    if form == "pcm":
        assert data == expected
    else:
        assert 0 <= len(decoded(data)) - len(expected) // 2 < 3500


def test_a_voice(locked: Running, expected: bytes, tmp_path: Path, seed: int) -> None:
    (tmp_path / "me.wav").write_bytes(wav(speech_like(0.5, seed)))
    given = node(locked, "voice", str(tmp_path / "me.wav"))
    assert (given["made"]["id"], given["made"]["object"]) == ("noded", "audio.voice")
    assert given["deleted"] == {"id": "noded", "object": "audio.voice.deleted", "deleted": True}
    data = base64.b64decode(given["audio"])
    assert len(data) == len(expected)
    assert data != expected


def test_errors(locked: Running) -> None:
    speed, voice = node(locked, "errors")
    assert (speed["kind"], speed["code"], speed["param"]) == ("BadRequestError", "speed_unsupported", "speed")
    assert (voice["kind"], voice["code"]) == ("NotFoundError", "voice_not_found")
    assert len(speed["request"]) == len(voice["request"]) == 16


def test_models(locked: Running) -> None:
    assert node(locked, "models") == ["small"]


def test_it_comes_again_after_429(locked: Running, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_at: list[float] = []
    original = LiveSpeech.__anext__

    async def refusing_once(self: LiveSpeech) -> Audio:
        if not hasattr(self, "_was_asked"):
            self._was_asked = True  # type: ignore[attr-defined]
            asked_at.append(time.monotonic())
            if len(asked_at) == 1:
                self.cancel()
                raise Overloaded("There is too much to do.", retry_after_seconds=0.2)
        return await original(self)

    monkeypatch.setattr(LiveSpeech, "__anext__", refusing_once)
    assert base64.b64decode(node(locked, "stream")["audio"]) == expected
    assert 0.9 < asked_at[1] - asked_at[0] < 10


def test_leaving(locked: Running) -> None:
    cancelled = locked.engine.stats().cancelled
    node(locked, "leave", LONG)
    wait_until(lambda: is_idle(locked.engine))
    assert locked.engine.stats().cancelled > cancelled
