"""A server that drains: sockets say what they were given, take no more, and are closed with 1012."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import websockets.exceptions
from server_websocket.loopback import Client, audio
from server_websocket.quick_speech import FRAME, Quick, quick_server
from websockets.sync.client import connect

from server.running import wait_until

FIRST, SECOND = "This is the first sentence of it. ", "And this is the second one of it."
OPEN = FIRST + "And"  # a sentence, and held words
NOTHING = {"finish_reason": None, "audio_seconds": 0.0}


@pytest.fixture
def gate() -> threading.Event:
    """Closed, no frame is made."""
    return threading.Event()


@pytest.fixture
def quick(gate: threading.Event) -> Iterator[Quick]:
    with quick_server(frames=lambda _: 5, before_launch=lambda: gate.wait(20)) as quick:
        yield quick
        gate.set()


def socket(quick: Quick, path: str = "/v1/audio/speech/stream") -> Client:
    return Client(connect(f"ws://127.0.0.1:{quick.running.port}{path}", max_size=None))


def stop(quick: Quick) -> None:
    """What SIGTERM does."""
    quick.running.server.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: quick.engine.is_draining)


def begun(quick: Quick, streams: int) -> None:
    """Wait until as many are spoken or wait for it."""
    wait_until(lambda: quick.engine.loop.used_slots + quick.engine.loop.waiting == streams)


def closed(client: Client) -> tuple[int, str]:
    """Wait until the server closes -> code and reason."""
    with pytest.raises(websockets.exceptions.ConnectionClosed) as ending:
        client.receive()
    assert ending.value.rcvd is not None
    return ending.value.rcvd.code, ending.value.rcvd.reason


def test_text_without_an_end_does_not_hold_the_server(quick: Quick, gate: threading.Event) -> None:
    """What was given is heard, held words included, and the server ends at once, not when its limit has passed."""
    began = time.monotonic()
    with socket(quick) as client:
        client.send("input.text", text=OPEN)
        begun(quick, 1)
        stop(quick)
        gate.set()
        events = client.until("audio.done")
        assert len(audio(events)) == 2 * 5 * FRAME * 2
        assert events[-1]["audio_seconds"] == pytest.approx(10 * 0.08)
        assert closed(client) == (1012, "The server is stopping.")
    wait_until(lambda: quick.running.server.should_exit, 3)
    assert time.monotonic() - began < 6


def test_turns_that_wait_are_spoken(quick: Quick, gate: threading.Event) -> None:
    """Of every context, each with its answer; the last bytes of a format with frames come, too."""
    with socket(quick) as client:
        client.send("session.config", response_format="mp3")
        for name in ("a", "b"):
            for text in (FIRST, SECOND):
                client.send("input.text", text=text, context_id=name)
                client.send("input.flush", context_id=name)
        client.send("input.text", text=OPEN, context_id="c")
        begun(quick, 3)
        stop(quick)
        gate.set()
        events: list[dict[str, Any]] = []
        while sum(event["type"] == "audio.done" for event in events) < 3:
            events.append(client.receive())
        assert not [event for event in events if event["type"] == "error"]
        for name, flushed in (("a", 2), ("b", 2), ("c", 0)):
            ends = [event for event in events if event.get("context_id") == name and "finish_reason" in event]
            assert [event["type"] for event in ends] == ["audio.flushed"] * flushed + ["audio.done"]
            assert [event["finish_reason"] for event in ends] == (["end", "end", None] if flushed else ["end"])
        assert closed(client)[0] == 1012


def test_text_that_comes_later_is_refused(quick: Quick, gate: threading.Event) -> None:
    with socket(quick) as client, socket(quick, "/v1/realtime") as realtime:
        client.send("input.text", text=OPEN)
        item = {"role": "user", "content": [{"type": "input_text", "text": FIRST}]}
        realtime.send("response.create", response={"input": [item]})
        begun(quick, 2)
        stop(quick)
        for context_id in ("default", "another"):
            client.send("input.text", text=SECOND, context_id=context_id)
            error = client.until("error")[-1]
            assert (error["error"]["code"], error["retry_after_seconds"]) == ("draining", 5)
        for event in ({"type": "conversation.item.create", "item": item}, {"type": "response.create"}):
            realtime.send(**event)
            assert realtime.until("error")[-1]["error"]["code"] == "draining"
        gate.set()
        assert len(audio(client.until("audio.done"))) == 2 * 5 * FRAME * 2
        done = realtime.until("response.done")[-1]["response"]
        assert (done["status"], done["usage"]["output_tokens"]) == ("completed", 5)
        assert closed(client)[0] == closed(realtime)[0] == 1012


@pytest.mark.parametrize("ending", ["input.done", "input.flush"])
def test_the_end_that_a_client_says_itself_is_no_error(quick: Quick, gate: threading.Event, ending: str) -> None:
    with socket(quick) as client:
        client.send("input.text", text=OPEN)
        begun(quick, 1)
        stop(quick)
        client.send(ending)
        client.send("session.config")  # is answered behind it
        assert client.receive()["type"] == "session.configured"
        gate.set()
        assert len(audio(client.until("audio.done"))) == 2 * 5 * FRAME * 2
        assert closed(client)[0] == 1012


def test_a_cancelled_context_says_nothing_more(quick: Quick, gate: threading.Event) -> None:
    with socket(quick) as client, socket(quick, "/v1/realtime") as realtime:
        client.send("input.text", text=OPEN)
        item = {"role": "user", "content": [{"type": "input_text", "text": FIRST}]}
        realtime.send("response.create", response={"input": [item]})
        begun(quick, 2)
        stop(quick)
        client.send("input.cancel")
        assert client.receive()["type"] == "audio.cancelled"
        assert client.receive() == {"type": "audio.done", "context_id": "default"} | NOTHING
        assert closed(client)[0] == 1012
        realtime.send("response.cancel")
        assert realtime.until("response.done")[-1]["response"]["status"] == "cancelled"
        assert closed(realtime)[0] == 1012


@pytest.mark.parametrize("path", ["/v1/audio/speech/stream", "/v1/realtime"])
def test_sockets_with_nothing_to_say_are_closed_at_once_and_none_comes_in(
    quick: Quick, gate: threading.Event, path: str
) -> None:
    with socket(quick) as busy, socket(quick, path) as silent:
        busy.send("input.text", text=OPEN)
        begun(quick, 1)
        if path == "/v1/realtime":
            assert silent.receive()["type"] == "session.created"
        began = time.monotonic()
        stop(quick)
        assert closed(silent)[0] == 1012
        assert time.monotonic() - began < 1
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            socket(quick, path)
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["retry-after"] == "5"
        gate.set()
        assert audio(busy.until("audio.done"))
