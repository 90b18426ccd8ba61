"""Speech over a WebSocket: what is heard is what the engine says, piece by piece, and every message is answered."""

from __future__ import annotations

import io
import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
import websockets.exceptions
from server_websocket.loopback import Served, audio

from aloud import Engine
from aloud.audio_file import to_int16
from aloud.live_speech import LiveSpeech
from aloud.server.connection import SocketLimits
from aloud.server.settings import Limits, Settings

FIRST, SECOND = "Hello there, my friend. How are you?", "I am very well indeed."


def pcm(chunks: LiveSpeech) -> bytes:
    return b"".join(to_int16(chunk.samples).astype("<i2").tobytes() for chunk in chunks)


@pytest.mark.parametrize("way", ["base64", "binary"])
def test_text_in_pieces_sounds_as_the_session_says_it(served: Served, engine: Engine, way: str, seed: int) -> None:
    expected = pcm(engine.session(speaker=0).stream(FIRST, seed=seed, max_seconds=1.0))
    with served.connect() as client:
        client.send("session.config", voice="alloy", seed=seed, max_seconds=1.0, audio=way)
        assert client.receive() == {"type": "session.configured", "sample_rate": 24_000}
        for word in FIRST.split(" "):
            client.send("input.text", text=word + " ")
        client.send("input.done")
        events = client.until("audio.done")
    assert audio(events) == expected
    assert [event["type"] for event in events] == ["audio.start", *["audio.delta"] * (len(events) - 2), "audio.done"]
    assert events[0]["content_type"] == "audio/pcm"
    assert events[-1]["audio_seconds"] == pytest.approx(len(expected) / 48_000)
    assert events[-1]["finish_reason"] in ("length", "end")
    served.wait_until_free()


@pytest.mark.parametrize("name", ["wav", "mp3", "opus", "aac", "flac"])
def test_every_format_is_one_stream_that_can_be_decoded(served: Served, name: str) -> None:
    with served.connect() as client:
        client.send("session.config", response_format=name, max_seconds=0.8)
        client.send("input.text", text=FIRST)
        client.send("input.flush")
        client.send("input.text", text=SECOND)
        client.send("input.done")
        events = client.until("audio.done")
    seconds = sum(event["audio_seconds"] for event in events if "audio_seconds" in event)
    assert [event["type"] for event in events].count("audio.start") == 1
    with av.open(io.BytesIO(audio(events))) as container:
        heard = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    assert heard == pytest.approx(seconds, abs=0.1)
    assert seconds > 0.5


def test_audio_comes_while_the_text_is_still_open(served: Served) -> None:
    with served.connect() as client:
        client.send("input.text", text="This is one whole sentence. And this is")
        events = client.until("audio.delta")
        assert [event["type"] for event in events] == ["audio.start", "audio.delta"]
        client.send("input.cancel")
        client.until("audio.cancelled")
    served.wait_until_free()


def test_a_flush_speaks_what_is_held_and_the_conversation_goes_on(served: Served, engine: Engine, seed: int) -> None:
    session = engine.session(speaker=0)
    turns = [pcm(session.stream(text, seed=seed, max_seconds=0.8)) for text in ("no end", "and more")]
    with served.connect() as client:
        client.send("session.config", seed=seed, max_seconds=0.8)
        client.send("input.text", text="no end")
        client.send("input.flush")
        first = client.until("audio.flushed")
        client.send("input.text", text="and more")
        client.send("input.done")
        second = client.until("audio.done")
    assert [audio(first), audio(second)] == turns[:2]
    # The second turn is spoken behind the first: said alone, it sounds otherwise.
    assert turns[1] != pcm(engine.session(speaker=0).stream("and more", seed=seed, max_seconds=0.8))


def test_contexts_do_not_mix(served: Served, seed: int) -> None:
    texts = {f"c{number}": f"This is what number {number} has to say." for number in range(6)}
    with served.connect() as client:
        client.send("session.config", seed=seed, max_seconds=0.8)
        alone = {name: audio(client.speak(text, name), name) for name, text in texts.items()}
        for name, text in texts.items():
            client.send("input.text", text=text, context_id=name)
            client.send("input.done", context_id=name)
        events = []
        while sum(event["type"] == "audio.done" for event in events) < len(texts):
            events.append(client.receive())
            assert events[-1]["type"] != "error", events[-1]
    assert {name: audio(events, name) for name in texts} == alone
    assert len(set(alone.values())) == len(texts)


def test_two_voices_on_one_socket(served: Served, engine: Engine, seed: int) -> None:
    with served.connect() as client:
        for number, name in enumerate(("alloy", "ash")):
            client.send("session.config", voice=name, seed=seed, max_seconds=0.4)
            expected = pcm(engine.session(speaker=number).stream(FIRST, seed=seed, max_seconds=0.4))
            assert audio(client.speak(FIRST, name)) == expected


class TestCancel:
    def test_stops_at_once_and_is_acknowledged(self, served: Served) -> None:
        with served.connect() as client:
            client.send("session.config", max_seconds=60)
            client.send("input.text", text="A long text. " * 30)
            client.until("audio.delta")
            client.send("input.cancel")
            cancelled = client.until("audio.cancelled")
            assert served.wait_until_free() < 1
            assert 0 < cancelled[-1]["audio_seconds"] < 12
            client.send("session.config")
            assert client.receive()["type"] == "session.configured"  # and no audio before it

    def test_leaves_the_context_with_what_was_heard(self, served: Served, seed: int) -> None:
        with served.connect() as client:
            client.send("session.config", seed=seed, max_seconds=0.8)
            fresh = audio(client.speak(SECOND, "a"))
            client.send("input.text", text="A long text. " * 30, context_id="a")
            client.until("audio.delta")
            client.send("input.cancel", context_id="a")
            client.until("audio.cancelled")
            again = client.speak(SECOND, "a")
            assert again[0]["type"] == "audio.start"
            assert audio(again) != fresh
            assert audio(client.speak(SECOND, "a")) == fresh  # done forgets

    @pytest.mark.parametrize(
        ("heard_seconds", "left"),
        [(0, [0, 0]), (0.35, [5, 0]), (0.8, [10, 0]), (1.2, [10, 5]), (1.6, [10, 10]), (60, [10, 10])],
    )
    def test_leaves_what_was_heard_since_audio_start(
        self, served: Served, engine: Engine, seed: int, heard_seconds: float, left: list[int]
    ) -> None:
        """A player's position, whatever turn it is in; all of both has been sent by then."""
        session = engine.session(speaker=0)
        for text, frames in zip((FIRST, SECOND), left, strict=True):
            speech = session.stream(text, seed=seed, max_seconds=0.8, pace="full")
            assert len(list(speech)) == 10
            speech.interrupt(frames * 0.08)
        expected = pcm(session.stream(FIRST, seed=seed, max_seconds=0.8))
        with served.connect() as client:
            client.send("session.config", seed=seed, max_seconds=0.8)
            for text in (FIRST, SECOND):
                client.send("input.text", text=text)
                client.send("input.flush")
                client.until("audio.flushed")
            client.send("input.cancel", heard_seconds=heard_seconds)
            assert client.until("audio.cancelled")[-1]["audio_seconds"] == 0
            assert audio(client.speak(FIRST)) == expected

    def test_leaves_what_was_heard_of_a_turn_that_is_being_spoken(
        self, served: Served, engine: Engine, seed: int
    ) -> None:
        session = engine.session(speaker=0)
        seconds = 11  # more than is sent ahead, so that it is still being spoken
        speech = session.stream("A long text. " * 30, seed=seed, max_seconds=seconds)
        for _ in range(3):
            next(speech)
        speech.interrupt(0.15)  # two frames
        expected = pcm(session.stream(SECOND, seed=seed, max_seconds=seconds, pace="full"))
        with served.connect() as client:
            client.send("session.config", seed=seed, max_seconds=seconds)
            client.send("input.text", text="A long text. " * 30)
            for _ in range(3):
                client.until("audio.delta")
            client.send("input.cancel", heard_seconds=0.15)
            assert client.until("audio.cancelled")[-1]["audio_seconds"] >= 3 * 0.08
            assert audio(client.speak(SECOND)) == expected

    def test_a_player_begins_anew_after_it(self, served: Served, seed: int) -> None:
        with served.connect() as client:
            client.send("session.config", seed=seed, max_seconds=0.8)
            answers = []
            for cancels in (True, False):
                client.send("input.text", text=FIRST)
                client.send("input.flush")
                client.until("audio.flushed")
                if cancels:
                    client.send("input.cancel", heard_seconds=0)  # and what comes next is the first that is heard
                    client.until("audio.cancelled")
            client.send("input.cancel", heard_seconds=0.8)
            client.until("audio.cancelled")
            answers.append(audio(client.speak(SECOND)))
            client.send("input.text", text=FIRST, context_id="b")
            client.send("input.flush", context_id="b")
            client.until("audio.flushed")
            answers.append(audio(client.speak(SECOND, "b"), "b"))
        assert answers[0] == answers[1]

    @pytest.mark.parametrize("before", ["nothing", "waiting", "queued", "done"])
    def test_is_answered_whatever_there_is_to_cancel(self, served: Served, before: str) -> None:
        with served.connect() as client:
            if before == "waiting":
                client.send("input.text", text="not even a clause")
            elif before == "queued":
                for _ in range(3):
                    client.send("input.text", text=FIRST)
                    client.send("input.flush")
            elif before == "done":
                client.send("session.config", max_seconds=0.2)
                client.receive()
                client.speak("Yes.")
            client.send("input.cancel")
            client.until("audio.cancelled")
        served.wait_until_free()


WRONG = {
    "not json": "{",
    "no object": "[1]",
    "null": "null",
    "no type": "{}",
    "unknown type": '{"type": "input.audio"}',
    "unknown field": '{"type": "session.close", "please": 1}',
    "empty text": '{"type": "input.text", "text": ""}',
    "text is a number": '{"type": "input.text", "text": 5}',
    "context is a path": '{"type": "input.text", "text": "a", "context_id": "../a"}',
    "context with a newline": '{"type": "input.text", "text": "a", "context_id": "a\\n"}',
    "lone surrogate": '{"type": "input.text", "text": "\\ud800"}',
    "unknown context": '{"type": "input.flush", "context_id": "nobody"}',
    "done with nothing": '{"type": "input.done", "context_id": "nobody"}',
    "unknown voice": '{"type": "session.config", "voice": "nobody"}',
    "voice is a path": '{"type": "session.config", "voice": "../../etc/passwd"}',
    "no such format": '{"type": "session.config", "response_format": "ogg"}',
    "too hot": '{"type": "session.config", "temperature": 1e9}',
    "not a number": '{"type": "session.config", "temperature": NaN}',
    "negative seed": '{"type": "session.config", "seed": -1}',
    "deep": "[" * 10_000,
    "binary": b"\x00\x01",
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_message_gets_one_error_and_the_socket_lives(served: Served, wrong: str | bytes) -> None:
    with served.connect() as client:
        client.socket.send(wrong)
        error = client.receive()
        assert error["type"] == "error"
        assert error["error"]["code"]
        assert error["error"]["message"]
        assert "Traceback" not in json.dumps(error)
        client.send("session.config")
        assert client.receive()["type"] == "session.configured"


def test_a_text_without_words_fails_and_is_still_answered(served: Served) -> None:
    with served.connect() as client:
        client.send("input.text", text="  ", context_id="a")
        client.send("input.done", context_id="a")
        error, done = client.receive(), client.receive()
        assert (error["type"], error["context_id"], error["error"]["code"]) == ("error", "a", "TextEmpty")
        assert (done["type"], done["finish_reason"]) == ("audio.done", "error")


@pytest.mark.parametrize("name", ["pcm", "wav", "mp3", "opus", "aac", "flac"])
def test_what_a_format_holds_back_comes_behind_a_last_turn_without_words(served: Served, name: str) -> None:
    """It is of the turns before, and all of it was said."""
    with served.connect() as client:
        client.send("session.config", response_format=name, max_seconds=0.8)
        client.receive()
        client.send("input.text", text=FIRST)
        client.send("input.flush")
        spoken = client.until("audio.flushed")
        client.send("input.text", text="  ")
        client.send("input.done")
        assert client.receive()["error"]["code"] == "TextEmpty"
        behind = client.until("audio.done")
    holds_back = name not in ("pcm", "wav")
    assert [event["type"] for event in behind] == [*["audio.delta"] * holds_back, "audio.done"]
    data = audio(spoken + behind)
    if name == "pcm":
        heard = len(data) / 48_000
    else:
        with av.open(io.BytesIO(data)) as container:
            heard = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    assert heard == pytest.approx(spoken[-1]["audio_seconds"], abs=0.1)


def test_what_fails_in_the_engine_tells_nothing_of_it(
    served: Served, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("the secret path")

    with served.connect() as client:
        client.send("session.config", max_seconds=0.2)
        client.receive()
        monkeypatch.setattr(engine.loop, "submit", fails)
        client.send("input.text", text=FIRST)
        error = client.receive()
        client.send("input.text", text="and the rest of it, which is dropped")
        client.send("input.flush")
        assert client.receive()["type"] == "audio.flushed"
        monkeypatch.undo()
        assert (error["type"], error["error"]["code"]) == ("error", "internal")
        assert "secret" not in json.dumps(error)
        assert audio(client.speak(FIRST))  # the same context speaks again


def test_overload_is_an_error_that_says_when_to_come_again(
    served: Served, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.loop, "max_waiting", 0)
    with served.connect() as busy, served.connect() as client:
        for number in range(engine.loop.slots):
            busy.send("input.text", text="A long text. " * 30, context_id=f"c{number}")
        served.wait(lambda: engine.loop.used_slots == engine.loop.slots)
        client.send("input.text", text=FIRST)
        error = client.receive()
        assert (error["type"], error["error"]["code"]) == ("error", "overloaded")
        assert error["retry_after_seconds"] > 0
    served.wait_until_free()


class TestLimits:
    def test_text(self, serve: Callable[..., Any]) -> None:
        with (
            serve(settings=Settings("small", limits=Limits(text_characters=20))) as served,
            served.connect() as client,
        ):
            for texts in (["a" * 21], ["a" * 15, "a" * 6]):
                for text in texts:
                    client.send("input.text", text=text)
                assert client.receive()["error"]["code"] == "input_too_long"
                client.send("input.cancel")
                client.until("audio.cancelled")

    def test_contexts_and_turns(self, serve: Callable[..., Any]) -> None:
        with serve(SocketLimits(contexts=2, turns=2)) as served, served.connect() as client:
            for name in ("a", "b", "c"):
                client.send("input.text", text="held", context_id=name)
            assert client.receive()["error"]["code"] == "too_many_contexts"
            client.send("input.cancel", context_id="a")
            client.until("audio.cancelled")
            client.send("input.text", text="held", context_id="c")  # takes the place of a
            client.send("input.flush", context_id="a")
            assert client.receive()["error"]["code"] == "context_not_found"
            for number in range(3):
                client.send("input.text", text=f"{'Long text. ' * 20}{number}", context_id="b")
                client.send("input.flush", context_id="b")
            errors = [event["error"]["code"] for event in client.until("error") if event["type"] == "error"]
            assert errors == ["too_many_turns"]

    def test_message_size(self, serve: Callable[..., Any]) -> None:
        with serve(SocketLimits(message_bytes=1000)) as served, served.connect() as client:
            client.send("input.text", text="é" * 400)  # 2,400 bytes as JSON here, 800 as text
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                client.receive()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009

    def test_errors(self, serve: Callable[..., Any]) -> None:
        with serve(SocketLimits(errors=3)) as served, served.connect() as client:
            for _ in range(3):
                client.send("nonsense")
                assert client.receive()["type"] == "error"
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                client.receive()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008

    def test_idle(self, serve: Callable[..., Any]) -> None:
        with serve(SocketLimits(idle_seconds=0.3)) as served, served.connect() as client:
            client.send("input.text", text="held")
            began = time.monotonic()
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                client.receive()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001
            assert 0.2 < time.monotonic() - began < 5

    def test_sockets_of_a_key(self, serve: Callable[..., Any]) -> None:
        settings = Settings("small", keys=("one", "two"))
        with serve(SocketLimits(sockets=1), settings) as served:

            def connect(key: str) -> Any:
                return served.connect(additional_headers={"authorization": f"Bearer {key}"})

            with connect("one"), connect("two"):
                with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
                    connect("one")
                assert refused.value.response.status_code == 429
                assert refused.value.response.headers["retry-after"]
            served.wait(lambda: _opens(connect, "one"))


def _opens(connect: Callable[[str], Any], key: str) -> bool:
    try:
        connect(key).socket.close()
    except websockets.exceptions.InvalidStatus:
        return False
    return True


@pytest.mark.parametrize("path", ["/v1/audio/speech/stream", "/v1/realtime"])
def test_who_may_not_come_in(serve: Callable[..., Any], path: str) -> None:
    with serve(settings=Settings("small", keys=("one",))) as served:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer other"}, 401),
            ({"authorization": "Bearer one", "origin": "https://elsewhere.example"}, 403),
        ):
            with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
                served.connect(path, additional_headers=headers)
            assert refused.value.response.status_code == status
        own = {"authorization": "Bearer one", "origin": f"http://{served.address}"}
        served.connect(path, additional_headers=own).socket.close()


def test_a_socket_that_leaves_at_any_time_leaves_nothing(
    served: Served, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(seed)
    longest = 0.0
    with caplog.at_level(logging.WARNING):
        for _ in range(40):
            client = served.connect()
            for context in range(chance.randrange(4)):
                client.send("input.text", text=FIRST * chance.randrange(1, 5), context_id=f"c{context}")
                if chance.random() < 0.5:
                    client.send(chance.choice(["input.flush", "input.done", "input.cancel"]), context_id=f"c{context}")
            time.sleep(chance.random() * 0.05)
            if chance.random() < 0.5:
                client.vanish()
            else:
                client.socket.close()
            longest = max(longest, served.wait_until_free())
    assert longest < 2  # the engine itself takes a frame; the rest is for the network to notice
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_the_metrics_count_turns(serve: Callable[..., Any], served: Served) -> None:
    import httpx

    def count(outcome: str) -> float:
        text = httpx.get(f"http://{served.address}/metrics").text
        found = [line for line in text.splitlines() if line.startswith(f'aloud_requests_total{{outcome="{outcome}"}}')]
        return float(found[0].split()[1]) if found else 0.0

    before = count("finished")
    with served.connect() as client:
        client.send("session.config", max_seconds=0.2)
        client.receive()
        client.speak(FIRST)
        client.speak(SECOND)
    assert count("finished") == before + 2


def test_silence_is_not_what_is_sent(served: Served) -> None:
    with served.connect() as client:
        client.send("session.config", max_seconds=0.8)
        client.receive()
        samples = np.frombuffer(audio(client.speak(FIRST)), "<i2")
    assert np.abs(samples).max() > 0
