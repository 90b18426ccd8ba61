"""A text that is heard has its slot until it is over; and who waits does not wait longer than for that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from aloud import Engine
from aloud.audio import Audio
from aloud.live import Pace
from aloud.live_speech import LiveSpeech
from live.quick import LIMIT_SECONDS, Held, is_empty, run, until

TWO = "This is the first sentence. And this is the second."
LEAD_SECONDS = 60.0
"""A slot would be kept for longer than a test may take."""


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held(1)
    yield held
    held.open.set()
    assert not held.steps.wrong


async def heard(speech: LiveSpeech) -> list[Audio]:
    return [chunk async for chunk in speech]


async def waits(engine: Engine) -> asyncio.Task[list[Audio]]:
    """Somebody who waits for the only slot, which is taken."""
    other = asyncio.ensure_future(heard(engine.stream("Me too.", seed=9, lead_seconds=LEAD_SECONDS)))
    while not engine.loop.waiting:
        await asyncio.sleep(0.001)
    return other


def launches(held: Held, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the rows that are launched from now on."""
    order: list[int] = []
    launch = held.steps.launch

    def launched(slots: np.ndarray) -> object:
        order.extend(held.steps._stream(slot).seed for slot in slots.tolist())
        return launch(slots)

    monkeypatch.setattr(held.steps, "launch", launched)
    return order


@pytest.mark.parametrize("pace", ["realtime", "full"])
def test_who_waits_gets_the_slot_behind_the_last_sentence(
    held: Held, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of full pace, between two: nobody plays it."""
    order = launches(held, monkeypatch)

    async def speak(engine: Engine) -> None:
        held.open.clear()
        lead = LEAD_SECONDS if pace == "realtime" else None
        first = asyncio.ensure_future(heard(engine.stream(TWO, seed=1, pace=pace, lead_seconds=lead)))
        await asyncio.to_thread(until, lambda: engine.loop.used_slots == 1)
        other = await waits(engine)
        held.open.set()
        await asyncio.gather(first, other)

    with Engine(held.runtime) as engine:
        run(speak(engine))
        assert is_empty(engine.loop)
    assert len(set(order)) == 3  # two sentences, and the other
    place = order.index(9)
    if pace == "realtime":
        assert set(order[place:]) == {9}
    else:
        assert set(order[place:]) != {9}


@pytest.mark.parametrize("how", ["cancelled", "max_seconds", "an error", "nobody holds it"])
def test_nobody_waits_for_a_text_of_which_nothing_more_comes(held: Held, how: str) -> None:
    async def speak(engine: Engine) -> None:
        more = asyncio.Event()

        async def text() -> AsyncIterator[str]:
            yield "This is the first sentence. And "
            await more.wait()
            if how == "an error":
                raise ValueError("mine")

        async def listen() -> None:
            bound = 0.08 if how == "max_seconds" else None
            speech = engine.stream(text(), seed=1, lead_seconds=LEAD_SECONDS, max_seconds=bound)
            for _ in range(1 if how == "max_seconds" else 3):
                await anext(speech)
            while engine.stats().finished < 1:
                await asyncio.sleep(0.001)
            if how == "cancelled":
                await speech.aclose()
            elif how != "nobody holds it":
                more.set()
                await heard(speech)

        held.talk_for(3)
        first = asyncio.ensure_future(listen())
        await asyncio.wait({first})
        assert (str(first.exception()) == "mine") == (how == "an error")
        del first
        assert len(await heard(engine.stream("Me too.", seed=9, lead_seconds=LEAD_SECONDS))) == 3

    with Engine(held.runtime) as engine:
        run(speak(engine))
        assert is_empty(engine.loop)


def test_a_listener_who_waits_for_the_text_has_the_slot_while_there_is_something_to_play(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def speak(engine: Engine) -> None:
        more = asyncio.Event()

        async def text() -> AsyncIterator[str]:
            yield "This is the first sentence. And "
            await more.wait()
            yield "this is the second."

        speaking = asyncio.ensure_future(heard(engine.stream(text(), seed=1, lead_seconds=LEAD_SECONDS)))
        while engine.stats().finished < 1:
            await asyncio.sleep(0.001)
        other = await waits(engine)
        await asyncio.sleep(0.05)
        assert not other.done()
        more.set()
        await asyncio.gather(speaking, other)

    order = launches(held, monkeypatch)
    with Engine(held.runtime) as engine:
        run(asyncio.wait_for(speak(engine), LIMIT_SECONDS))
    assert len(set(order)) == 3
    assert set(order[order.index(9) :]) == {9}
