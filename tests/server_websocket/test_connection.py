"""A socket's bounded buffer: who does not read makes nothing pile up, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from server_websocket.loopback import Served

from aloud import Engine
from aloud.server.connection import SocketLimits
from aloud.server.encode import Encoders
from aloud.server.metrics import Metrics
from aloud.server.realtime import realtime_routes
from aloud.server.settings import Settings
from aloud.server.voices import Registry
from aloud.server.websocket import websocket_routes


@pytest.mark.parametrize(
    ("path", "events"),
    [
        ("/v1/audio/speech/stream", [{"type": "input.text", "text": "A long text. " * 30}, {"type": "input.done"}]),
        (
            "/v1/realtime",
            [
                {
                    "type": "response.create",
                    "response": {"input": [{"content": [{"type": "text", "text": "A long text. " * 30}]}]},
                }
            ],
        ),
    ],
    ids=["speech", "realtime"],
)
def test_a_client_that_does_not_read_is_left(engine: Engine, path: str, events: list[dict[str, Any]]) -> None:
    limits = SocketLimits(write_seconds=1.0, buffered_events=4)
    given_settings = Settings("small")
    registry, metrics = Registry(engine.runtime, given_settings), Metrics(engine)
    app = FastAPI()
    app.include_router(
        websocket_routes(engine, given_settings, registry, metrics, Encoders(engine.runtime.sample_rate), limits)
    )
    app.include_router(realtime_routes(engine, given_settings, registry, metrics, limits))
    sent: list[Any] = []
    largest = 0

    async def run() -> None:
        nonlocal largest
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        inbox.put_nowait({"type": "websocket.connect"})
        for event in events:
            inbox.put_nowait({"type": "websocket.receive", "text": json.dumps(event)})

        async def send(message: Any) -> None:
            if len(sent) >= 6:
                await asyncio.sleep(1000)  # the client's window is full
            sent.append(message)

        scope = {
            "type": "websocket", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
            "headers": [], "subprotocols": [], "state": {"owner": "me"}, "scheme": "ws", "http_version": "1.1",
        }  # fmt: skip
        before = asyncio.all_tasks()
        running = asyncio.ensure_future(app(scope, inbox.get, send))  # type: ignore[arg-type]
        while not running.done():
            await asyncio.sleep(0.01)
            largest = max(largest, engine.loop.used_slots)
        running.result()
        while engine.loop.used_slots:
            await asyncio.sleep(0.01)
        # Nothing that belongs to the socket runs on.
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(run(), 30))
    assert largest == 1
    assert len(sent) == 6


NAMES = st.sampled_from(["a", "b"])
MESSAGES = st.one_of(
    st.fixed_dictionaries(
        {
            "type": st.just("input.text"),
            "context_id": NAMES,
            "text": st.sampled_from(["Yes. ", "No, ", "and", "   ", "é¿", "\n"]),
        }
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["input.flush", "input.done", "input.cancel"]), "context_id": NAMES}
    ),
    st.fixed_dictionaries({"type": st.just("session.config"), "max_seconds": st.sampled_from([0.08, 0.2])}),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    ),
)


@settings(max_examples=25, deadline=None)
@given(messages=st.lists(MESSAGES, max_size=12))
def test_whatever_is_sent_is_answered_and_leaves_nothing(served: Served, messages: list[Any]) -> None:
    """Each cancel, and each wrong message, has its answer, and the socket is as good as new afterwards."""
    with served.connect() as client:
        client.send("session.config", max_seconds=0.2)
        for message in messages:
            client.socket.send(json.dumps(message))
        for name in ("a", "b"):
            client.send("input.cancel", context_id=name)
        client.send("input.text", text="The end.", context_id="last")
        client.send("input.done", context_id="last")
        events: list[dict[str, Any]] = []
        while not events or (events[-1]["type"], events[-1].get("context_id")) != ("audio.done", "last"):
            events.append(client.receive())
    kinds = [event["type"] for event in events]
    objects = [message for message in messages if isinstance(message, dict)]
    cancels = sum(message["type"] == "input.cancel" for message in objects)
    assert kinds.count("audio.cancelled") == cancels + 2
    assert kinds.count("session.configured") == 1 + sum(message["type"] == "session.config" for message in objects)
    general = [event for event in events if event["type"] == "error" and "context_id" not in event]
    assert len(general) >= len(messages) - len(objects)
    assert {event["error"]["code"] for event in events if event["type"] == "error"} <= {
        "invalid_message", "context_not_found", "context_done", "TextEmpty", "nothing_spoken", "overloaded",
    }  # fmt: skip
    served.wait_until_free()
