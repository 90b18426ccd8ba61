"""A state machine against the real server: any message on any socket in any order; the model says what must come."""

from __future__ import annotations

import json
import logging
import random
import socket
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import websockets.exceptions
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from server_websocket.loopback import Client
from server_websocket.quick_speech import LongFrames, Quick, quick_server
from server_websocket.socket_model import Bounds, Config, Event, Message, Model
from server_websocket.socket_oracle import Manner, Oracle
from websockets.sync.client import connect

from aloud.server.connection import SocketLimits
from live.quick import until

BOUNDS = Bounds(contexts=3, turns=3, characters=400)
LIMITS = SocketLimits(sockets=3, contexts=3, turns=3, errors=10**6, message_bytes=20_000, buffered_events=1)
MOST_FRAMES = 24
MOST_PASTS = 16  # that may be at once: all are tried while nothing is read, and the server waits 30 s for a reader

INVALID = ["invalid_message"]
WRONG: list[tuple[str | bytes, list[str]]] = [
    ("{", INVALID),
    ("", INVALID),
    ("null", INVALID),
    ("[1]", INVALID),
    ("[" * 5000, INVALID),
    (b"", INVALID),
    (b"\x00\xff", INVALID),
    (b'{"type": "input.flush"}', INVALID),
    ('{"type": "input.audio"}', INVALID),
    ('{"type": ["input.text"]}', INVALID),
    ('{"type": "input.text"}', INVALID),
    ('{"type": "input.text", "text": ""}', INVALID),
    ('{"type": "input.text", "text": 7}', INVALID),
    ('{"type": "input.text", "text": "\\ud800"}', INVALID),
    ('{"type": "input.text", "text": "a", "context_id": "\\udfff"}', INVALID),
    ('{"type": "input.text", "text": "a", "context_id": ""}', INVALID),
    ('{"type": "input.text", "text": "a", "context_id": "../a"}', INVALID),
    ('{"type": "input.text", "text": "a", "voice": "ash"}', INVALID),
    ('{"type": "input.flush", "text": "a"}', INVALID),
    ('{"type": "input.done", "context_id": null}', INVALID),
    ('{"type": "input.cancel", "context_id": 1}', INVALID),
    ('{"type": "session.close", "code": 1000}', INVALID),
    ('{"type": "session.config", "seed": -1}', INVALID),
    ('{"type": "session.config", "seed": 1e400}', INVALID),
    ('{"type": "session.config", "seed": ' + "9" * 400 + "}", INVALID),
    ('{"type": "session.config", "max_seconds": NaN}', INVALID),
    ('{"type": "session.config", "response_format": "ogg"}', INVALID),
    ('{"type": "session.config", "voice": "nobody"}', ["voice_not_found"]),
    ('{"type": "session.config", "voice": "../alloy"}', ["invalid_name"]),
    ('{"type": "input.flush", "context_id": "nobody"}', ["context_not_found"]),
    ('{"type": "input.done", "context_id": "nobody"}', ["context_not_found"]),
]
PROSE = "Well, hello there. Is it you? Yes, this goes on: a few words more! And now, it is the end of it."
NAMES = st.sampled_from(["a", "b", "c", "d", "default"])
TEXTS = st.one_of(
    st.lists(st.sampled_from(PROSE.split(" ")), min_size=1, max_size=12).map(lambda words: " ".join(words) + " "),
    st.sampled_from(["Yes. ", "and", "  ", "\n\n", "é¿ ", "早上好。你好。", "x" * 250, "y " * 210, "No way, "]),
)


@dataclass
class Sent:
    """A message, as it was sent, and its fence's number."""

    message: Message
    fence: int


class Socket:
    """One client and what it must see."""

    def __init__(self, quick: Quick, oracle: Oracle, counts: Counter[str]) -> None:
        self.counts = counts
        self.model = Model(oracle, BOUNDS, counts)
        self.client = entered(quick, "/v1/audio/speech/stream")
        self.sent: deque[Sent] = deque()
        self.fences = 0
        self.send({"type": "session.config", "config": Config(Manner(seed=1))}, {"type": "session.config", "seed": 1})

    def send(self, message: Message, wire: Any) -> None:
        """A message and its fence, without waiting."""
        if message.get("type") == "input.text":
            self._settle_before(message["context_id"])
        if message.get("type") == "input.cancel":
            self._hear_before(message["context_id"])
        self.fences += 1
        self.counts["messages"] += 2
        self.client.socket.send(wire if isinstance(wire, (str, bytes)) else json.dumps(wire))
        self.client.socket.send(json.dumps({"type": f"fence-{self.fences}."}))
        self.sent.append(Sent(message, self.fences))

    def _settle_before(self, name: str) -> None:
        """Where a new context may take another's place, it is settled whose: also one asked for before."""
        asked = {sent.message["context_id"] for sent in self.sent if sent.message.get("type") == "input.text"}
        names = asked | set(self.model.contexts)
        if len(names | {name}) > BOUNDS.contexts or self._ends(name):
            self.settle()

    def _hear_before(self, name: str) -> None:
        """Each cancelled turn may have had one frame more than was heard: a whole one tells what was said before it."""
        if self._pasts(name) > MOST_PASTS:
            self.settle()
        if self._pasts(name) > MOST_PASTS:
            for message in ({"type": "input.text", "text": "Well. "}, {"type": "input.flush"}):
                self.send(message | {"context_id": name}, message | {"context_id": name})
            self.settle()

    def _pasts(self, name: str) -> int:
        """How many a context may have, once what was sent is read."""
        known = len(self.model.contexts[name].pasts) if name in self.model.contexts else 1
        sent = (sent.message for sent in self.sent)
        return known * 2 ** sum(one.get("type") == "input.cancel" and one["context_id"] == name for one in sent)

    def _ends(self, name: str) -> bool:
        """Whether a context may go for which there is hardly a place afterwards."""
        is_ending = name in self.model.contexts and self.model.contexts[name].is_ending
        asked = any(sent.message.get("context_id") == name for sent in self.sent)
        return (is_ending or asked) and len(self.model.contexts) >= BOUNDS.contexts

    def read(self) -> None:
        """All answers to what was sent."""
        while self.sent:
            sent, events = self.sent.popleft(), []
            while not _is_fence(event := self.client.receive(), sent.fence):
                events.append(event)
            self.model.segment(sent.message, events)

    def settle(self) -> None:
        """And all that is said, but for turns whose text is still open."""
        self.read()
        while self.model.waits:
            self.model.event(self.client.receive())

    def closed(self) -> int:
        """Read what is left of an answered socket, until it is closed -> the code."""
        while True:
            try:
                self.model.event(self.client.receive())
            except websockets.exceptions.ConnectionClosed as closed:
                return 0 if closed.rcvd is None else closed.rcvd.code


def _is_fence(event: Event, number: int) -> bool:
    return event["type"] == "error" and f"fence-{number}." in event["error"]["message"]


class Sockets(RuleBasedStateMachine):
    """Up to three sockets of one server."""

    quick: Quick
    oracle: Oracle
    counts: Counter[str]
    tasks: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.sockets: list[Socket] = []
        self.now = 0

    @property
    def socket(self) -> Socket:
        return self.sockets[self.now % len(self.sockets)]

    @initialize()
    def begin(self) -> None:
        self.enter_one()

    @precondition(lambda self: len(self.sockets) < LIMITS.sockets)
    @rule()
    def enter(self) -> None:
        self.enter_one()

    def enter_one(self) -> None:
        self.sockets.append(Socket(self.quick, self.oracle, self.counts))
        self.now = len(self.sockets) - 1

    @precondition(lambda self: len(self.sockets) > 1)
    @rule()
    def look_at_another(self) -> None:
        self.now += 1

    @precondition(lambda self: self.sockets)
    @rule(
        voice=st.sampled_from([0, 1, 2]),
        format=st.sampled_from(["pcm", "pcm", "wav", "flac", "mp3"]),
        way=st.sampled_from(["base64", "binary"]),
        seed=st.sampled_from([None, 1, 2**64 - 1]),
        max_seconds=st.sampled_from([None, None, 0.2, 1.0]),
        reads=st.booleans(),
    )
    def configure(
        self, voice: int, format: str, way: str, seed: int | None, max_seconds: float | None, reads: bool
    ) -> None:
        wire = {"type": "session.config", "voice": ("alloy", "ash", "ballad")[voice], "response_format": format}
        wire |= {"audio": way, "seed": seed, "max_seconds": max_seconds}  # type: ignore[dict-item]
        self.say({"type": "session.config", "config": Config(Manner(voice, seed, max_seconds), format)}, wire, reads)

    @precondition(lambda self: self.sockets)
    @rule(name=NAMES, text=TEXTS, reads=st.booleans())
    def text(self, name: str, text: str, reads: bool) -> None:
        message = {"type": "input.text", "context_id": name, "text": text}
        self.say(message, message, reads)

    @precondition(lambda self: self.sockets)
    @rule(kind=st.sampled_from(["flush", "flush", "done", "cancel"]), name=NAMES, reads=st.booleans())
    def end(self, kind: str, name: str, reads: bool) -> None:
        message = {"type": f"input.{kind}", "context_id": name}
        self.say(message, {key: value for key, value in message.items() if value != "default"}, reads)

    @precondition(lambda self: self.sockets)
    @rule(
        name=NAMES,
        texts=st.lists(TEXTS, min_size=1, max_size=3),
        kinds=st.lists(st.sampled_from(["flush", "done", "cancel"]), max_size=2),
    )
    def talk(self, name: str, texts: list[str], kinds: list[str]) -> None:
        """Several turns at once, without reading."""
        for text in texts:
            self.text(name, text, False)
            for kind in kinds:
                self.end(kind, name, False)

    @precondition(lambda self: self.sockets)
    @rule(name=NAMES, milliseconds=st.sampled_from([1, 10, 40]), again=TEXTS)
    def interrupt(self, name: str, milliseconds: int, again: str) -> None:
        """Barge in on long speech that nobody reads, and ask for more."""
        self.text(name, PROSE * 3, False)
        time.sleep(milliseconds / 1000)
        self.end("cancel", name, False)
        self.text(name, again, False)

    @precondition(lambda self: self.sockets)
    @rule(wrong=st.sampled_from(WRONG), reads=st.booleans())
    def mistake(self, wrong: tuple[str | bytes, list[str]], reads: bool) -> None:
        self.say({"wrong": wrong[1]}, wrong[0], reads)

    @precondition(lambda self: self.sockets)
    @rule(milliseconds=st.sampled_from([1, 5, 20]))
    def wait(self, milliseconds: int) -> None:
        """Without reading."""
        time.sleep(milliseconds / 1000)

    @precondition(lambda self: self.sockets)
    @rule()
    def settle(self) -> None:
        self.socket.settle()

    @precondition(lambda self: len(self.sockets) > 1)
    @rule(way=st.sampled_from(["close", "session.close", "too large", "vanish"]))
    def leave(self, way: str) -> None:
        leaving = self.sockets.pop(self.now % len(self.sockets))
        if way in ("session.close", "too large"):
            leaving.read()
            wire = json.dumps({"type": "session.close"}) if way == "session.close" else "x" * 20_001
            leaving.client.socket.send(wire)
            assert leaving.closed() == (1000 if way == "session.close" else 1009)
        elif way == "vanish":
            leaving.client.vanish()
            leaving.client.socket.socket.close()  # or what was sent to it is waited for until it is too slow
        else:
            leaving.client.socket.close()
        self.counts[f"left by {way}"] += 1

    def say(self, message: Message, wire: Any, reads: bool) -> None:
        self.counts["steps"] += 1
        self.socket.send(message, wire)
        if reads or len(self.socket.sent) > 12:
            self.socket.read()

    def teardown(self) -> None:
        """What is asked for is answered; then all leave, some in the middle of a turn, and nothing is left."""
        try:
            for number, client in enumerate(self.sockets):
                client.settle()
                for name in list(client.model.contexts):
                    if number != 1 and client.model.contexts[name].takes_text:
                        message = {"type": "input.done", "context_id": name}
                        client.send(message, message)
                client.settle()
        finally:
            for client in self.sockets:
                client.client.socket.close()
        loop = self.quick.engine.loop
        until(lambda: loop.is_idle and loop.used_slots == 0 and loop.waiting == 0)
        until(lambda: len(tasks_of(self.quick)) <= len(self.tasks))
        assert not self.quick.steps.wrong


def entered(quick: Quick, path: str) -> Client:
    """A socket with room for little in its buffers. Its place may still be taken by one that has just left."""
    end = time.monotonic() + 10
    while True:
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect(("127.0.0.1", quick.running.port))
        uri = f"ws://127.0.0.1:{quick.running.port}{path}"
        try:
            given = {"max_size": None, "max_queue": 2, "compression": None, "close_timeout": 0.2}
            # Who does not read hears no pings either, for longer than they are waited for where the machine is busy.
            return Client(connect(uri, sock=small, ping_interval=None, **given))
        except websockets.exceptions.InvalidStatus as refused:
            if refused.response.status_code != 429 or time.monotonic() > end:
                raise
            time.sleep(0.01)


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error; uvicorn takes the answer to a refused handshake for none."""
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    return [message for message in messages if message != "ASGI callable returned without completing handshake."]


def tasks_of(quick: Quick) -> list[str]:
    """The tasks of the server's event loop."""
    with urllib.request.urlopen(f"{quick.running.url}/tasks") as answer:
        found: list[str] = json.load(answer)
    return found


def frames(digest: int) -> int:
    """How long a piece of text is spoken."""
    return 1 + digest % MOST_FRAMES


@pytest.fixture
def quick(seed: int) -> Iterator[Quick]:
    drawn = random.Random(seed)
    with quick_server(
        LIMITS,
        frames=lambda digest: 1 + digest % MOST_FRAMES,
        before_launch=lambda: time.sleep(drawn.choice([0, 0.002])),
    ) as quick:
        yield quick


def test_sockets(quick: Quick, caplog: pytest.LogCaptureFixture) -> None:
    steps = LongFrames(1)
    steps.length_of = frames
    given = {"quick": quick, "oracle": Oracle(steps), "counts": Counter(), "tasks": tasks_of(quick)}
    profile = settings(
        max_examples=40,
        stateful_step_count=50,
        deadline=None,
        phases=[Phase.reuse, Phase.generate],  # what depends on time is hardly found smaller
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    began = time.monotonic()
    with caplog.at_level(logging.ERROR):
        run_state_machine_as_test(type("Machine", (Sockets,), given), settings=profile)
    given["oracle"].close()  # type: ignore[attr-defined]
    print(f"{time.monotonic() - began:.0f} s", dict(given["counts"]))  # type: ignore[call-overload]
    assert faults(caplog) == []
