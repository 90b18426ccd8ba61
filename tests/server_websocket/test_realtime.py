"""Realtime: what the openai client's own `realtime.connect` sees."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import pytest
from server_websocket.loopback import Served
from websockets.exceptions import ConnectionClosed

from aloud import Engine
from aloud.audio_file import to_int16
from aloud.server import realtime, websocket
from aloud.server.connection import SocketLimits
from aloud.server.realtime_events import UNSERVED

openai = pytest.importorskip("openai")

TEXT = "Hello there, my friend."


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[Any]:
    """The client's connection, whose greeting has been read."""
    client = openai.AsyncOpenAI(
        api_key="none", base_url=f"http://{served.address}/v1", websocket_base_url=f"ws://{served.address}/v1"
    )
    async with client, client.realtime.connect(model="small") as connection:
        created = await connection.recv()
        assert created.type == "session.created"
        assert created.session.audio.output.format.rate == 24_000
        yield connection


async def until(connection: Any, *types: str) -> list[Any]:
    events = []
    while not events or events[-1].type not in types:
        events.append(await asyncio.wait_for(connection.recv(), 30))
    return events


async def ask(connection: Any, text: str, role: str = "user") -> None:
    kind = "output_text" if role == "assistant" else "input_text"
    item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}
    await connection.conversation.item.create(item=item)


def pcm(events: list[Any]) -> bytes:
    return b"".join(base64.b64decode(event.delta) for event in events if event.type == "response.output_audio.delta")


def greedy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions without a seed of their own, that say the same each time, and not for long."""
    session = engine.session

    def made(**given: Any) -> Any:
        kept = session(**given | {"temperature": 0.0, "depth_temperature": 0.0})
        stream = kept.stream
        kept.stream = lambda text, **arguments: stream(text, max_seconds=0.4, **arguments)  # type: ignore[method-assign]
        return kept

    monkeypatch.setattr(engine, "session", made)


def test_it_says_what_the_engine_says(served: Served, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy(engine, monkeypatch)
    session = engine.session(speaker=1)
    first, second = ([to_int16(chunk.samples).tobytes() for chunk in session.stream(TEXT)] for _ in range(2))

    async def run() -> None:
        async with connected(served) as connection:
            await connection.session.update(
                session={"type": "realtime", "instructions": "Be kind.", "audio": {"output": {"voice": "ash"}}}
            )
            updated = (await until(connection, "session.updated"))[-1]
            assert updated.session.audio.output.voice == "ash"
            await ask(connection, "Hello there,")
            await ask(connection, "my friend.", "assistant")
            await connection.response.create()
            events = await until(connection, "response.done")
            assert pcm(events) == b"".join(first)
            types = [event.type for event in events]
            order = ["response.created", "response.output_audio.delta", "response.output_audio.done", "response.done"]
            assert [types.index(name) for name in order] == sorted(types.index(name) for name in order)
            done = events[-1].response
            assert done.status == "incomplete"  # cut at its longest
            assert done.output[0].content[0].transcript == TEXT
            assert done.usage.output_tokens == len(first)
            # The next response is spoken behind the first.
            await connection.response.create(
                response={
                    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": TEXT}]}]
                }
            )
            assert pcm(await until(connection, "response.done")) == b"".join(second)

    asyncio.run(run())


def test_cancel_ends_the_response_at_once(served: Served) -> None:
    async def run() -> None:
        async with connected(served) as connection:
            await ask(connection, "A long text. " * 30)
            await connection.response.create()
            await until(connection, "response.output_audio.delta")
            await connection.response.cancel()
            events = await until(connection, "response.done")
            assert events[-1].response.status == "cancelled"
            await asyncio.to_thread(served.wait_until_free)
            await connection.response.cancel()
            assert (await until(connection, "error"))[-1].error.code == "response_cancel_not_active"
            await ask(connection, "Yes.")
            await connection.response.create()
            assert (await until(connection, "response.done"))[-1].response.status in ("completed", "incomplete")

    asyncio.run(run())


@pytest.mark.parametrize("heard_ms", [150, 0, 10_000])
def test_what_was_not_heard_is_no_context(
    served: Served, engine: Engine, monkeypatch: pytest.MonkeyPatch, heard_ms: int
) -> None:
    greedy(engine, monkeypatch)
    session = engine.session()
    speech = session.stream(TEXT)
    first = [to_int16(chunk.samples).tobytes() for chunk in speech]
    whole = engine.session()
    list(whole.stream(TEXT))
    behind_all = b"".join(to_int16(chunk.samples).tobytes() for chunk in whole.stream(TEXT))
    speech.interrupt(heard_ms / 1000)
    second = b"".join(to_int16(chunk.samples).tobytes() for chunk in session.stream(TEXT))
    assert (second == behind_all) == (heard_ms > 400)
    assert (second == b"".join(first)) == (heard_ms == 0)

    async def run() -> None:
        async with connected(served) as connection:
            await ask(connection, TEXT)
            await connection.response.create()
            events = await until(connection, "response.done")
            assert pcm(events) == b"".join(first)
            item_id = events[-1].response.output[0].id
            await connection.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=heard_ms)
            told = (await until(connection, "conversation.item.truncated"))[-1]
            assert (told.item_id, told.content_index, told.audio_end_ms) == (item_id, 0, heard_ms)
            await ask(connection, TEXT)
            await connection.response.create()
            assert pcm(await until(connection, "response.done")) == second
            # Who interrupted the first has heard nothing of what came behind it.
            await connection.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=0)
            await until(connection, "conversation.item.truncated")
            await ask(connection, TEXT)
            await connection.response.create()
            assert pcm(await until(connection, "response.done")) == b"".join(first)

    asyncio.run(run())


def test_truncation_stops_what_is_spoken(served: Served) -> None:
    async def run() -> None:
        async with connected(served) as connection:
            await ask(connection, "A long text. " * 30)
            await connection.response.create()
            delta = (await until(connection, "response.output_audio.delta"))[-1]
            await connection.conversation.item.truncate(item_id=delta.item_id, content_index=0, audio_end_ms=80)
            events = await until(connection, "conversation.item.truncated")
            assert events[-2].type == "response.done"
            assert events[-2].response.status == "cancelled"
            await asyncio.to_thread(served.wait_until_free)

    asyncio.run(run())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "audio in": ({"type": "input_audio_buffer.append", "audio": ""}, "event_ignored"),
    "unknown": ({"type": "input_audio_buffer.fill"}, "unknown_event"),
    "nothing to say": ({"type": "response.create"}, "nothing_to_say"),
    "truncation of nothing": (
        {"type": "conversation.item.truncate", "item_id": "item_1", "content_index": 0, "audio_end_ms": 80},
        "item_not_truncatable",
    ),
    "truncation without a time": ({"type": "conversation.item.truncate", "item_id": "item_1"}, "invalid_message"),
    **{
        f"truncation at {time}": (
            {"type": "conversation.item.truncate", "item_id": "item_1", "audio_end_ms": time},
            "invalid_message",
        )
        for time in (-1, 10**400, True, "15")
    },
    "no item": ({"type": "conversation.item.create"}, "item_missing"),
    "item of audio": (
        {"type": "conversation.item.create", "item": {"content": [{"type": "input_audio", "audio": ""}]}},
        "invalid_message",
    ),
    "unknown voice": (
        {"type": "session.update", "session": {"audio": {"output": {"voice": "nobody"}}}},
        "voice_not_found",
    ),
    "other rate": (
        {"type": "session.update", "session": {"audio": {"output": {"format": {"type": "audio/pcm", "rate": 8000}}}}},
        "rate_unsupported",
    ),
    "faster": ({"type": "session.update", "session": {"audio": {"output": {"speed": 2.0}}}}, "invalid_message"),
}


@pytest.mark.parametrize(("event", "code"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_error_that_names_its_event(served: Served, event: dict[str, Any], code: str) -> None:
    with served.connect("/v1/realtime") as client:
        assert client.receive()["type"] == "session.created"
        client.send(**event, event_id="mine")
        error = client.receive()
        assert (error["type"], error["error"]["code"], error["error"]["event_id"]) == ("error", code, "mine")
        client.send("session.update", session={})
        assert client.receive()["type"] == "session.updated"


def test_a_microphone_is_told_once_and_not_thrown_out(serve: Callable[..., Any]) -> None:
    with serve(SocketLimits(errors=3)) as served, served.connect("/v1/realtime") as client:
        assert client.receive()["type"] == "session.created"
        for event in UNSERVED:
            for _ in range(20):
                client.send(event, event_id=event, audio="AAAA")
            error = client.receive()["error"]
            assert (error["code"], error["event_id"]) == ("event_ignored", event)
            assert event in error["message"]
        client.send("session.update", session={})
        assert client.receive()["type"] == "session.updated"  # and no error before it
        for _ in range(3):
            client.send("nonsense")
            assert client.receive()["error"]["code"] == "unknown_event"
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008


@pytest.mark.parametrize("protocol", [realtime, websocket], ids=["realtime", "speech"])
def test_the_bound_on_wrong_messages_is_written_down(protocol: ModuleType) -> None:
    assert protocol.__doc__ is not None
    assert f"fter {SocketLimits().errors} " in " ".join(protocol.__doc__.split())


def test_a_second_response_waits_for_the_first(served: Served) -> None:
    with served.connect("/v1/realtime") as client:
        item = {"role": "user", "content": [{"type": "input_text", "text": "A long text. " * 30}]}
        client.send("conversation.item.create", item=item)
        client.send("response.create")
        client.until("response.output_audio.delta")
        client.send("conversation.item.create", item=item)
        client.send("response.create")
        error = client.until("error")[-1]
        assert error["error"]["code"] == "conversation_already_has_active_response"
    served.wait_until_free()


def test_a_failure_is_told_in_the_response(served: Served, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the secret path")

    with served.connect("/v1/realtime") as client:
        monkeypatch.setattr(engine.loop, "submit", fails)
        item = {"role": "user", "content": [{"type": "input_text", "text": TEXT}]}
        client.send("response.create", response={"input": [item]})
        done = client.until("response.done")[-1]["response"]
    assert done["status"] == "failed"
    assert done["status_details"]["error"]["code"] == "internal"
    assert "secret" not in str(done)
