"""The examples run: as a user would run them, on a small checkpoint of random weights."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from aloud import Engine
from aloud.checkpoint.random import write_random
from aloud.text.split import split

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LIMIT_SECONDS = 60.0
FRAME_BYTES = 1920 * 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "small"
    write_random(folder, "small", seed=0, dtype="float32")
    return folder


def module_of(name: str) -> ModuleType:
    """An example, imported."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agent_turns(checkpoint: Path, tmp_path: Path) -> None:
    """Three turns, of which the second is interrupted; what is saved is what was heard."""
    soundfile.write(tmp_path / "me.wav", 0.1 * np.sin(np.arange(24_000) / 20), 24_000)
    arguments = ["--model", str(checkpoint), "-o", "out.wav", "--voice", "me.wav", "--seed", "5"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "agent_turns.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    *turns, stats = done.stdout.splitlines()
    said = [re.fullmatch(r"(.*) -> ([\d.]+) s, (\w+)", turn) for turn in turns]
    assert len(said) == 3
    seconds = [float(turn[2]) for turn in said if turn is not None]
    assert all(length > 0.5 for length in seconds)
    assert [turn[3] == "cancelled" for turn in said if turn is not None] == [False, True, False]
    assert seconds[1] == 1.6
    info = soundfile.info(tmp_path / "out.wav")
    assert info.samplerate == 24_000
    assert info.frames % 1920 == 0
    assert info.frames / 24_000 == pytest.approx(sum(seconds), abs=0.16)  # printed in tenths
    first, _, last = module_of("agent_turns").ANSWERS
    # Three questions, two whole answers, and the sentence that was interrupted.
    assert f"turns={3 + len(split(first)) + 1 + len(split(last))}, dropped_turns=0, rebuilds=0)" in stats


# --- embed_in_fastapi -------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """The example's app, served on loopback."""

    port: int
    engine: Engine

    def post(self, text: Any) -> http.client.HTTPResponse:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_SECONDS)
        body = json.dumps({"text": text})
        self.connection.request("POST", "/speech", body, {"content-type": "application/json"})
        return self.connection.getresponse()

    def hang_up(self) -> None:
        self.connection.close()


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    pytest.importorskip("fastapi", reason="the example needs fastapi: pip install fastapi uvicorn")
    uvicorn = pytest.importorskip("uvicorn", reason="the example needs uvicorn: pip install fastapi uvicorn")
    app = module_of("embed_in_fastapi").create_app(str(checkpoint))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started
        yield Served(server.servers[0].sockets[0].getsockname()[1], app.state.engine)
    finally:
        server.should_exit = True
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()


def until(condition: Any) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.005)


def test_fastapi_sends_the_speech(served: Served, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("aloud.live.LEAD_SECONDS", 60.0)  # as fast as it goes
    monkeypatch.setattr("aloud.prepare.secrets.randbits", lambda _: seed)
    answer = served.post("Hello.")
    assert answer.status == 200
    assert answer.getheader("content-type") == "audio/pcm"
    sound = np.frombuffer(answer.read(), "<i2")
    chunks = list(served.engine.runtime.stream("Hello.", seed=seed))
    expected = np.concatenate([chunk.samples for chunk in chunks])
    assert len(sound) == len(expected) > 10 * 1920
    np.testing.assert_allclose(sound / 32767, expected.clip(-1, 1), atol=1 / 32767)
    assert np.abs(sound).max() > 100


def test_fastapi_sends_while_it_speaks_and_stops_when_nobody_listens(served: Served) -> None:
    before = served.engine.stats()
    answer = served.post("This is a text that takes a while, and nobody will hear the end of it.")
    assert len(answer.read(3 * FRAME_BYTES)) == 3 * FRAME_BYTES
    assert served.engine.stats().slots_used == 1
    served.hang_up()
    answer.close()
    until(lambda: served.engine.stats().slots_used == 0)
    after = served.engine.stats()
    assert after.cancelled == before.cancelled + 1
    assert after.finished == before.finished
    assert after.frames - before.frames < 40  # of some two hundred


@pytest.mark.parametrize("text", ["", "  \n"], ids=["empty", "blank"])
def test_fastapi_says_what_is_wrong(served: Served, text: str) -> None:
    answer = served.post(text)
    assert answer.status == 422
    assert json.loads(answer.read()) == {"detail": "There is no text to say. Give at least one letter."}


def test_fastapi_says_when_to_come_back(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine.loop.scheduler, "retry_after", lambda *_: 2.3)
    answer = served.post("Hello.")
    assert answer.status == 503
    assert answer.getheader("retry-after") == "3"
    assert "Ask again in 2.3 s" in json.loads(answer.read())["detail"]
    assert served.engine.stats().slots_used == 0
