"""Five hundred listeners at once, of a simulated model: each hears its own speech, byte for byte, and nothing is lost.

The real server, with clients in a process of their own. The model's steps cost microseconds, and what it says depends
on all that its slot was given: the voice, the text and the seed. What is expected is computed here from those alone. A
gate before the steps decides who is there at once, so that nothing depends on how fast the machine is.
"""

from __future__ import annotations

import base64
import json
import random
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aloud import Engine, prepare
from aloud.audio_file import to_int16
from aloud.benchmarks import http_client
from aloud.benchmarks.http_client import Ask, Plan
from aloud.server.settings import Limits, Settings
from live import quick
from live.quick import QuickSteps, is_empty, mixed, quick_runtime
from scripted import CODEBOOKS, FRAME_RATE, ByteTokenizer
from server.running import Lines, Running, asked, serving, wait_until, wav

STREAMS, WAITING, REFUSED = 500, 30, 50
LEAVING, LEAVING_BEFORE = 60, 20  # while they are spoken to, and while they wait
VOICES = ("anna", "bert", "cleo", "dora", "emil")
SHORTEST, LENGTHS = 14, 20  # frames of a speech: the least, and how many different lengths
HELD_LAUNCH = 6  # while it is held, nobody has heard more than so many frames
TEMPERATURE_THOUSANDTHS = 900  # the model's own
FILES = 4_096
RATE = 8_000  # the least that a sample of a voice may have
FRAME_SIZE = round(RATE / FRAME_RATE)
FRAME_BYTES = 2 * FRAME_SIZE
CONFIG = SimpleNamespace(
    codec=SimpleNamespace(frame_rate=FRAME_RATE, frame_size=FRAME_SIZE, sample_rate=RATE),
    codebooks=CODEBOOKS,
    end_token=0,
)
PATIENCE = 60.0


@dataclass
class Gate:
    """Lets steps be launched, or not yet."""

    launches: int = 0
    held: dict[int, threading.Event] = field(default_factory=dict)  # by the number of the launch

    def hold(self, launch: int) -> threading.Event:
        self.held[launch] = threading.Event()
        return self.held[launch]

    def __call__(self) -> None:
        self.launches += 1
        if self.launches in self.held:
            assert self.held[self.launches].wait(PATIENCE)


@dataclass
class Many:
    """A server of a simulated model with 500 slots."""

    running: Running
    steps: QuickSteps
    gate: Gate


def encode_level(_config: object, _codec: object, samples: torch.Tensor, codebooks: int) -> torch.Tensor:
    """A codec that hears nothing but how far a constant is from zero -> int64 [codebooks, frames]."""
    frames = -(-len(samples) // FRAME_SIZE)
    return torch.full((codebooks, frames), round(100 * float(samples.median())))


@pytest.fixture
def enough_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in (-1, resource.RLIM_INFINITY) and hard < 2 * STREAMS:
        pytest.skip(f"this system allows {hard} open files")
    most = FILES if hard in (-1, resource.RLIM_INFINITY) else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch, enough_files: None) -> Iterator[Many]:
    monkeypatch.setattr(prepare.mimi, "encode", encode_level)
    monkeypatch.setattr(quick, "FRAME_SIZE", FRAME_SIZE)
    gate = Gate()
    steps = QuickSteps(STREAMS, ahead=1, prefill_together=True, prefill_size=4096)
    steps.before_launch = gate
    steps.length_of = lambda digest: SHORTEST + digest % LENGTHS
    runtime = quick_runtime(steps, STREAMS)
    runtime.model.config, runtime.model.codec = CONFIG, None  # type: ignore[assignment]
    with Engine(runtime, max_waiting=WAITING, stuck_after_seconds=2 * PATIENCE) as engine:
        # Whether frames come in time is not what is tested, however busy the machine is.
        monkeypatch.setattr(engine.loop.scheduler, "retry_after", lambda *_: None)
        settings = Settings(model="simulated", limits=Limits(write_seconds=PATIENCE, read_seconds=PATIENCE))
        with serving(engine, settings) as running:
            yield Many(running, steps, gate)
            wait_until(lambda: not running.server.server_state.connections)


def level_of(voice: str) -> float:
    return 0.05 * (1 + VOICES.index(voice))


def said_by(voice: str) -> str:
    return f"This is how {voice} sounds."


def register(running: Running, voice: str) -> None:
    """Half a second of a constant, and what is said in it."""
    sample = wav(np.full(RATE // 2, level_of(voice), np.float32), RATE)
    with running.client() as client:
        fields = {"name": voice, "consent": "A constant has no owner.", "text": said_by(voice)}
        answer = client.post("/v1/audio/voices", data=fields, files={"audio_sample": ("a.wav", sample)})
        assert answer.status_code == 201, answer.text
        assert round(answer.json()["seconds"] * FRAME_RATE) == 6


def speech_body(number: int, seed: int) -> dict[str, Any]:
    """Each has its own text, seed and voice."""
    text = f"Listener {number} hears nothing but this."
    return asked(input=text, voice=VOICES[number % len(VOICES)], seed=seed + number, max_seconds=60)


def expected_speech(body: dict[str, Any]) -> bytes:
    """What the simulated model says to a request behind its voice, from its tokens alone."""

    def turn(text: str) -> list[int]:
        return [31 * token for token in (ByteTokenizer.begin, *f"[0]{text}".encode(), ByteTokenizer.end)]

    sample = [CODEBOOKS * round(100 * level_of(body["voice"])) - 31] * 7  # frames: half a second
    digest = mixed(1, *turn(said_by(body["voice"])), *sample, -31, *turn(body["input"]))
    told = mixed(digest, body["seed"], TEMPERATURE_THOUSANDTHS)
    frames = []
    for _ in range(SHORTEST + told % LENGTHS):
        codes = [1 + mixed(told, 7919 * book**2) % 2000 for book in range(CODEBOOKS)]
        frames.append(codes[0])
        digest = mixed(digest, sum(codes) - 31)
        told = mixed(digest, body["seed"], TEMPERATURE_THOUSANDTHS)
    samples = np.repeat(np.array(frames), FRAME_SIZE).astype(np.float32) / 2048
    return to_int16(samples).astype("<i2").tobytes()


class Clients:
    """Listeners in a process of their own, each with a connection of its own."""

    def __init__(self, many: Many, asks: list[Ask]) -> None:
        self._plan = Plan(many.running.port, asks, bytes_per_second=2 * RATE, keeps_audio=True, most_seconds=PATIENCE)
        program = [sys.executable, "-I", str(Path(http_client.__file__))]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(self._plan)).encode())
        self._process.stdin.close()
        self._process.stdin = None

    def heard(self) -> list[tuple[Ask, dict[str, Any], bytes]]:
        """What became of each request, and its audio."""
        answer, _ = self._process.communicate(timeout=2 * PATIENCE)
        heard = json.loads(answer)["heard"]
        return [(ask, one, base64.b64decode(one["audio"])) for ask, one in zip(self._plan.requests, heard, strict=True)]


def waiting_connection(many: Many, body: dict[str, Any]) -> socket.socket:
    """Somebody who asks, and is not answered yet."""
    content = json.dumps(body).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    connection = socket.create_connection(("127.0.0.1", many.running.port), timeout=PATIENCE)
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    return connection


def test_five_hundred_at_once(many: Many, lines: Lines, seed: int) -> None:
    """500 speak, 30 wait, 50 are refused; 60 leave while they are spoken to and 20 while they wait."""
    running, gate, engine = many.running, many.gate, many.running.engine
    for voice in VOICES:
        register(running, voice)
    warm = [speech_body(number, seed) for number in range(len(VOICES))]
    for body in warm:
        assert running.speech(**body).content == expected_speech(body)
    assert len({expected_speech({**warm[0], "voice": voice}) for voice in VOICES}) == len(VOICES)
    before = engine.stats()

    bodies = iter([speech_body(number, seed) for number in range(1000, 2000)])
    chance = random.Random(seed)
    asks = [Ask(0.0, next(bodies)) for _ in range(STREAMS - LEAVING)]
    asks += [
        Ask(0.0, next(bodies), chance.randint(HELD_LAUNCH + 1, SHORTEST - 2) * FRAME_BYTES) for _ in range(LEAVING)
    ]
    chance.shuffle(asks)
    first = gate.hold(gate.launches + 1)
    later = gate.hold(gate.launches + HELD_LAUNCH)
    crowd = Clients(many, asks)
    wait_until(lambda: all_there(engine, STREAMS), PATIENCE)
    first.set()
    wait_until(lambda: engine.stats().slots_used == STREAMS, PATIENCE)

    wait_until(lambda: gate.launches >= max(gate.held), PATIENCE)
    impatient = [waiting_connection(many, next(bodies)) for _ in range(LEAVING_BEFORE)]
    wait_until(lambda: engine.stats().streams_waiting >= LEAVING_BEFORE, PATIENCE)
    speaking = running.app.state.metrics.speaking
    for connection in impatient:
        connection.close()
    wait_until(lambda: running.app.state.metrics.speaking <= speaking - LEAVING_BEFORE, PATIENCE)
    counted = engine.stats().streams_waiting
    too_many = Clients(many, [Ask(0.0, next(bodies)) for _ in range(WAITING + REFUSED)])
    wait_until(lambda: engine.stats().streams_waiting >= counted + WAITING + REFUSED, PATIENCE)
    later.set()

    finished = left = refused = 0
    for ask, one, audio in crowd.heard() + too_many.heard():
        expected = expected_speech(ask.body)
        if one["left"]:
            assert ask.leave_after_bytes is not None
            assert len(audio) >= ask.leave_after_bytes
            assert expected.startswith(audio)
            left += 1
        elif one["status"] == 429:
            assert int(one["headers"]["retry-after"]) >= 1
            assert one["headers"]["x-should-retry"] == "true"
            assert json.loads(one["text"])["error"]["code"] == "overloaded"
            assert not audio
            refused += 1
        else:
            assert (one["status"], one["is_whole"], one["text"]) == (200, True, "")
            assert one["headers"]["x-aloud-seed"] == str(ask.body["seed"])
            assert audio == expected
            finished += 1
    assert (finished, left, refused) == (STREAMS - LEAVING + WAITING, LEAVING, REFUSED)

    wait_until(lambda: is_empty(engine.loop) and running.app.state.metrics.speaking == 0)
    after = engine.stats()
    assert after.refused - before.refused == REFUSED
    assert after.failed == 0
    ended = after.finished + after.cancelled - before.finished - before.cancelled
    assert ended == STREAMS + WAITING + LEAVING_BEFORE
    # Who leaves may have been sent all of it by then.
    assert after.finished - before.finished >= STREAMS - LEAVING + WAITING
    assert many.steps.wrong == []
    assert many.steps.launched_rows.total() >= STREAMS * SHORTEST - LEAVING * SHORTEST
    assert not lines.errors, lines.errors[:3]


def all_there(engine: Engine, count: int) -> bool:
    """Whether so many have been taken on, or wait to be."""
    stats = engine.stats()
    return stats.slots_used + stats.streams_waiting >= count
