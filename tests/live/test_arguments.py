"""What the engine says of wrong arguments."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from aloud import Engine, Segment, errors
from live.quick import QuickSteps, is_empty, quick_runtime, run, until

HELLO = "Hello there how are you today?"
LONG = "One thing follows from another, as it does. " * 4  # in pieces


async def words() -> AsyncIterator[str]:
    yield HELLO


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(quick_runtime(QuickSteps(2), 2)) as engine:
        yield engine


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"pace": "fast"}, r'^pace must be "realtime" or "full", got \'fast\'\.$'),
        ({"pace": None}, r'^pace must be "realtime" or "full", got None\.$'),
        ({"lead_seconds": 0.01}, r"^lead_seconds must be from 0\.08 to 60, got 0\.01\.$"),
        ({"lead_seconds": 61}, "^lead_seconds must be from"),
        ({"lead_seconds": float("nan")}, "^lead_seconds must be from"),
        ({"lead_seconds": True}, "^lead_seconds must be from"),
        ({"lead_seconds": "0.4"}, r"^lead_seconds must be from 0\.08 to 60, got '0\.4'\.$"),
        ({"lead_seconds": "0.4", "pace": "full"}, "^lead_seconds must be from"),
        ({"text": ""}, r"^There is no text to say\. Give at least one letter\.$"),
        ({"text": " \n "}, "^There is no text to say"),
        ({"text": None}, r"^The text is a string or an iterator of strings, got NoneType\.$"),
        ({"text": 5}, r"^The text is a string or an iterator of strings, got int\.$"),
        ({"text": "\ud800"}, "^The text to say holds"),
        ({"speaker": -1}, "^speaker must be a whole number from 0 to 999"),
        ({"temperature": -1}, "^temperature must be 0"),
        ({"top_k": 1.5}, "^top_k must be a whole number"),
        ({"seed": 2**64}, "^seed must be a whole number"),
        ({"max_seconds": 0}, "^max_seconds must be above 0"),
        ({"guards": False}, "^guards must be aloud.Guards"),
        ({"context": "Hi."}, "^The context is a list of aloud.Segment"),
        ({"voice": "anna"}, r"^voice is what `Runtime\.voice` returns, got str\.$"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_request_is_said_at_once(engine: Engine, given: dict[str, Any], sentence: str) -> None:
    before = engine.stats().accepted
    with pytest.raises(errors.RequestError, match=sentence):
        engine.stream(**({"text": HELLO} | given))
    if not given.keys() & {"pace", "lead_seconds"}:
        with pytest.raises(errors.RequestError, match=sentence):
            engine.speak_sync(**({"text": HELLO} | given))
        with pytest.raises(errors.RequestError, match=sentence):
            run(engine.speak(**({"text": HELLO} | given)))
    assert engine.stats().accepted == before


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ([], errors.TextEmpty, r"^There is no text to say\. Give at least one letter\.$"),
        (["", " "], errors.TextEmpty, "^There is no text to say"),
        (["Hi. ", 5], errors.RequestError, r"^Parts of a text are strings, got int\.$"),
        (b"Hi.", errors.RequestError, r"^Parts of a text are strings, got int\.$"),
        ([None], errors.RequestError, r"^Parts of a text are strings, got NoneType\.$"),
    ],
    ids=str,
)
def test_what_is_wrong_with_parts_is_said_when_they_come(
    engine: Engine, text: Any, error: type[Exception], sentence: str
) -> None:
    async def parts() -> AsyncIterator[Any]:
        for part in text:
            yield part

    for ask in (lambda: engine.speak_sync(text), lambda: run(engine.speak(text)), lambda: run(engine.speak(parts()))):
        with pytest.raises(error, match=sentence):
            ask()
    until(lambda: is_empty(engine.loop))


def test_text_that_comes_asynchronously_needs_an_async_for(engine: Engine) -> None:
    with pytest.raises(errors.RequestError, match=r"^Parts of text that come asynchronously can only be spoken with"):
        next(engine.stream(words()))
    with pytest.raises(errors.RequestError, match=r"can only be spoken with `async for`\.$"):
        engine.speak_sync(words())


def test_a_voice_of_another_runtime(engine: Engine) -> None:
    voice = quick_runtime(QuickSteps(1), 1).voice([Segment("Hi.")])
    for ask in (
        lambda: engine.stream(HELLO, voice=voice),
        lambda: engine.session(voice=voice),
        lambda: engine.speak_sync(HELLO, voice=voice),
        lambda: run(engine.speak(HELLO, voice=voice)),
    ):
        with pytest.raises(errors.RequestError, match=r"^The voice was made by another runtime\. Make it with `voice`"):
            ask()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_waiting": -1}, r"^max_waiting must be a whole number, 0 or more, got -1\.$"),
        ({"max_waiting": 1.5}, "^max_waiting must be a whole number"),
        ({"max_waiting": True}, "^max_waiting must be a whole number"),
        ({"max_waiting": "8"}, r"^max_waiting must be a whole number, 0 or more, got '8'\.$"),
        ({"stuck_after_seconds": 0}, r"^stuck_after_seconds must be above 0 and at most 86,400, got 0\.$"),
        ({"stuck_after_seconds": float("nan")}, "^stuck_after_seconds must be"),
        ({"stuck_after_seconds": "60"}, "^stuck_after_seconds must be"),
        ({"stuck_after_seconds": None}, "^stuck_after_seconds must be"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be(given: dict[str, Any], sentence: str) -> None:
    threads = threading.active_count()
    with pytest.raises(errors.RequestError, match=sentence):
        Engine(quick_runtime(QuickSteps(1), 1), **given)
    assert threading.active_count() == threads


@pytest.mark.parametrize("wrong", ["a", -1, float("nan"), True, []], ids=repr)
def test_a_limit_of_draining_that_cannot_be(engine: Engine, wrong: Any) -> None:
    for drain in (lambda: run(engine.drain(wrong)), lambda: engine.drain_sync(wrong)):
        with pytest.raises(errors.RequestError, match=r"^limit_seconds must be a number of seconds, 0 or more, got "):
            drain()
    assert not engine.is_draining


@pytest.mark.parametrize(
    ("wrong", "kind"), [(["x"], "str"), ([None], "NoneType"), (None, "NoneType"), (5, "int")], ids=str
)
def test_turns_that_cannot_be_restored(engine: Engine, wrong: Any, kind: str) -> None:
    session = engine.session()
    sentence = rf"^Turns are a list of those that `Session\.turns` gave, got {kind}\.$"
    with pytest.raises(errors.RequestError, match=sentence):
        session.restore(wrong)
    assert not session.turns


@pytest.mark.parametrize("given", ["sesame/csm-1b", None], ids=repr)
def test_an_engine_of_no_runtime(given: Any) -> None:
    with pytest.raises(
        errors.RequestError, match=rf"^An Engine is made of a Runtime, got {type(given).__name__}: Engine\("
    ):
        Engine(given)
