"""Draining, closing, and a device that does not answer: nobody is left waiting."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from aloud import Audio, Engine, Segment, errors
from aloud.arrivals import CHECK_SECONDS
from aloud.engine.stream import Stream
from aloud.live_speech import LiveSpeech
from aloud.request import Prompt
from live.quick import LIMIT_SECONDS, Held, codes_of, is_empty, run, until
from scripted import CODEBOOKS

HELLO = "Hello there how are you today?"
LONG = "One thing follows from another, as it does. " * 4  # in pieces


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.open.set()
    until(lambda: is_empty(held.runtime.loop))
    assert not held.steps.wrong


# --- draining and closing ---------------------------------------------------------------------------------------------


def test_draining_finishes_what_runs_and_refuses_what_comes(held: Held) -> None:
    async def drained(engine: Engine) -> None:
        later = engine.stream(HELLO, seed=3)
        held.open.clear()
        speaking = asyncio.ensure_future(engine.speak(LONG, seed=1))
        while engine.stats().slots_used < 1:
            await asyncio.sleep(0.001)
        draining = asyncio.ensure_future(engine.drain())
        await asyncio.sleep(0.02)
        assert engine.stats().is_draining
        for ask in (lambda: engine.stream(HELLO), lambda: engine.session().stream(HELLO)):
            with pytest.raises(errors.EngineClosed, match=r"^The engine is draining: it finishes what runs and takes"):
                ask()
        with pytest.raises(errors.EngineClosed):
            await anext(later)  # had not begun
        with pytest.raises(errors.EngineClosed):
            await engine.session().hear("Hi.")
        assert not draining.done()
        held.open.set()
        assert await draining
        np.testing.assert_array_equal((await speaking).codes, expected)
        engine.check_health()

    with Engine(held.alone) as engine:
        expected = engine.speak_sync(LONG, seed=1).codes
    with Engine(held.runtime) as engine:
        run(drained(engine))
        assert is_empty(engine.loop)
    with pytest.raises(errors.EngineClosed, match=r"^The engine is closed\. Make a new one\.$"):
        engine.check_health()


def test_draining_waits_for_text_that_is_still_to_come(held: Held) -> None:
    async def drained(engine: Engine) -> None:
        more = asyncio.Event()

        async def parts() -> AsyncIterator[str]:
            yield "Well, hello there. This is the first. "
            await more.wait()
            yield "And this is the second."

        speaking = asyncio.ensure_future(engine.speak(parts(), seed=1))
        while not (engine.loop.is_idle and engine.stats().finished):
            await asyncio.sleep(0.001)
        assert not await engine.drain(0.05)
        more.set()
        assert await engine.drain(LIMIT_SECONDS)
        np.testing.assert_array_equal((await speaking).codes, expected)

    with Engine(held.alone) as engine:
        text = "Well, hello there. This is the first. And this is the second."
        expected = engine.speak_sync(text, seed=1).codes
    with Engine(held.runtime) as engine:
        run(drained(engine))


def test_draining_says_when_the_limit_has_passed(held: Held) -> None:
    with Engine(held.runtime) as engine:
        held.open.clear()
        thread = threading.Thread(target=lambda: engine.speak_sync(HELLO, seed=1))
        thread.start()
        until(lambda: engine.stats().slots_used == 1)
        began = time.monotonic()
        assert not engine.drain_sync(0.1)
        assert 0.1 <= time.monotonic() - began < 5
        held.open.set()
        assert engine.drain_sync(LIMIT_SECONDS)
        thread.join(LIMIT_SECONDS)


@pytest.mark.parametrize("after_seconds", [0.0, 0.001, 0.003, 0.01, 0.03])
def test_closing_while_streams_run_leaves_nobody_waiting(after_seconds: float) -> None:
    """More callers than slots, async and not, at both paces, in pieces: each hears an end, or that it was closed."""
    held = Held(3)
    held.steps.before_launch = lambda: time.sleep(0.001)
    with Engine(held.alone) as engine:
        expected = {seed: engine.speak_sync(LONG, seed=seed).codes for seed in range(8)}
    outcomes: dict[Any, Any] = {}

    async def listen(engine: Engine, seed: int) -> None:
        chunks = []
        try:
            async for chunk in engine.stream(LONG, seed=seed, pace="full" if seed % 2 else "realtime"):
                chunks.append(chunk)
            outcomes["async", seed] = chunks
        except errors.EngineClosed as error:
            outcomes["async", seed] = error

    def listen_sync(engine: Engine, seed: int) -> None:
        try:
            outcomes["sync", seed] = list(engine.stream(LONG, seed=seed, pace="full"))
        except errors.EngineClosed as error:
            outcomes["sync", seed] = error

    async def everybody(engine: Engine) -> None:
        waiting = asyncio.gather(*(listen(engine, seed) for seed in range(8)))
        await asyncio.sleep(after_seconds)
        if int(after_seconds * 1000) % 2:
            await asyncio.to_thread(engine.close)
        else:
            engine.close()
        await waiting

    engine = Engine(held.runtime)
    threads = [threading.Thread(target=listen_sync, args=(engine, seed), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    run(everybody(engine))
    for thread in threads:
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive(), "a caller hangs"
    assert len(outcomes) == 12
    for (_, seed), outcome in outcomes.items():
        if not isinstance(outcome, errors.EngineClosed):
            np.testing.assert_array_equal(codes_of(outcome), expected[seed])
    assert any(isinstance(outcome, errors.EngineClosed) for outcome in outcomes.values())
    assert not engine._thread.is_alive()
    assert is_empty(held.runtime.loop)
    assert not held.steps.wrong
    # And the runtime is as it was.
    np.testing.assert_array_equal(held.runtime.speak(HELLO, seed=1).codes, held.expected(HELLO, 1))
    with Engine(held.runtime) as another:
        np.testing.assert_array_equal(another.speak_sync(HELLO, seed=1).codes, held.expected(HELLO, 1))


@pytest.mark.parametrize("has_begun", [False, True], ids=["before its first text", "between two parts"])
def test_closing_is_told_to_speech_that_waits_for_its_own_text(held: Held, has_begun: bool) -> None:
    """It holds no stream then that could tell it."""
    is_ended = False

    async def parts() -> AsyncIterator[str]:
        nonlocal is_ended
        try:
            if has_begun:
                yield "Well, hello there. This is the first. "
            await asyncio.sleep(1000)
            yield "And this never comes."
        finally:
            is_ended = True

    async def closed(engine: Engine) -> None:
        speech = engine.session().stream(parts(), seed=1)
        speaking = asyncio.ensure_future(_all_of(speech))
        while not speech.is_running or (has_begun and not (engine.loop.is_idle and engine.stats().finished)):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.close)
        with pytest.raises(errors.EngineClosed, match=r"^The engine was closed while it spoke\. Make a new one, and"):
            await asyncio.wait_for(speaking, 5)
        assert speech.finish_reason == "error"
        assert is_ended

    run(closed(Engine(held.runtime)))


async def _all_of(speech: LiveSpeech) -> list[Audio]:
    return [chunk async for chunk in speech]


def test_a_turn_that_was_taken_on_is_spoken_while_the_engine_drains(held: Held) -> None:
    async def drained(engine: Engine) -> None:
        session = engine.session()
        assert await engine.drain(LIMIT_SECONDS)
        with pytest.raises(errors.EngineClosed):
            session.stream(HELLO)
        chunks = [chunk async for chunk in session.stream(HELLO, seed=1, is_taken=True)]
        np.testing.assert_array_equal(codes_of(chunks), held.expected(HELLO, 1))
        engine.close()
        with pytest.raises(errors.EngineClosed):
            session.stream(HELLO, is_taken=True)

    run(drained(Engine(held.runtime)))


def test_a_job_that_comes_as_the_engine_closes_is_not_left_behind(held: Held) -> None:
    engine = Engine(held.runtime)
    speech = engine.stream(HELLO)
    submit = held.runtime.loop.submit

    def close_first(*job: Any, **given: Any) -> Stream:
        engine.close()
        return submit(*job, **given)

    held.runtime.loop.submit = close_first  # type: ignore[method-assign]
    with pytest.raises(errors.EngineClosed):
        run(anext(speech))
    assert is_empty(held.runtime.loop)


def test_a_closed_engine_takes_nothing_and_closes_again(held: Held) -> None:
    engine = Engine(held.runtime)
    before = engine.stream(HELLO)
    session = engine.session()
    engine.close()
    engine.close()
    for ask in (
        lambda: engine.stream(HELLO),
        lambda: engine.speak_sync(HELLO),
        lambda: next(before),
        lambda: session.hear_sync("Hi."),
        lambda: session.speak_sync(HELLO),
    ):
        with pytest.raises(errors.EngineClosed, match=r"^The engine is closed\. Make a new one\.$"):
            ask()
    with pytest.raises(errors.EngineClosed):
        run(engine.speak(HELLO))
    assert engine.drain_sync(1.0)


# --- a device that does not answer ------------------------------------------------------------------------------------


def test_a_stuck_device_is_reported_to_all_who_wait_and_may_come_back(held: Held) -> None:
    patience = 0.3
    found: dict[str, float] = {}

    def listen(engine: Engine) -> None:
        try:
            engine.speak_sync(HELLO, seed=1)
        except errors.DeviceStuck:
            found["sync"] = time.monotonic()

    async def listen_async(engine: Engine) -> None:
        thread = threading.Thread(target=listen, args=(engine,), daemon=True)
        held.open.clear()
        began = time.monotonic()
        speaking = [asyncio.ensure_future(engine.speak(HELLO, seed=seed)) for seed in range(6)]
        while not engine.stats().stuck_seconds > 0:
            await asyncio.sleep(0.001)
        thread.start()
        engine.check_health()
        lasted = engine.stats().stuck_seconds
        await asyncio.sleep(0.1)
        assert engine.stats().stuck_seconds >= lasted + 0.09
        for outcome in await asyncio.gather(*speaking, return_exceptions=True):
            assert isinstance(outcome, errors.DeviceStuck)
            assert re.match(r"The device has not answered for \d s\. Restart the process; if", str(outcome))
        assert patience <= time.monotonic() - began < patience + CHECK_SECONDS + 1.0
        await asyncio.to_thread(thread.join, LIMIT_SECONDS)
        assert patience <= found["sync"] - began < patience + 1.0
        with pytest.raises(errors.DeviceStuck, match=r"^The device has not answered for"):
            engine.check_health()
        with pytest.raises(errors.DeviceStuck):
            await asyncio.to_thread(engine.speak_sync, HELLO)
        held.open.set()
        await asyncio.to_thread(until, lambda: is_empty(engine.loop))
        engine.check_health()
        assert engine.stats().stuck_seconds < patience
        np.testing.assert_array_equal((await engine.speak(HELLO, seed=7)).codes, held.expected(HELLO, 7))

    with Engine(held.runtime, stuck_after_seconds=patience) as engine:
        run(listen_async(engine))


def test_an_engine_with_a_stuck_device_can_be_closed(held: Held) -> None:
    threads = threading.active_count()

    async def closed() -> list[Any]:
        engine = Engine(held.runtime, stuck_after_seconds=0.2)
        held.open.clear()
        speaking = [asyncio.ensure_future(engine.speak(HELLO, seed=seed)) for seed in range(6)]
        while not engine.stats().stuck_seconds > 0:
            await asyncio.sleep(0.001)
        began = time.monotonic()
        await asyncio.to_thread(engine.close)
        assert time.monotonic() - began < 2
        return await asyncio.gather(*speaking, return_exceptions=True)

    for outcome in run(closed()):
        assert isinstance(outcome, (errors.DeviceStuck, errors.EngineClosed))
    held.open.set()
    until(lambda: threading.active_count() <= threads)  # and the engine's, which came back, has left all in order
    assert is_empty(held.runtime.loop)
    held.runtime.loop.stuck_after_seconds = LIMIT_SECONDS
    np.testing.assert_array_equal(held.runtime.speak(HELLO, seed=1).codes, held.expected(HELLO, 1))


@pytest.mark.parametrize("what", ["speech", "hearing"])
def test_draining_waits_for_what_is_being_encoded_and_lets_it_finish(
    what: str, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Segment("As I said.", np.zeros(8, np.float32))
    encoding = threading.Event()
    reading = 0

    def read_turns(model: Any, tokenizer: Any, segments: Sequence[Segment], **_: int) -> list[Prompt]:
        nonlocal reading
        reading += 1
        assert encoding.wait(LIMIT_SECONDS)
        return [Prompt(torch.arange(3), torch.zeros(3, CODEBOOKS, dtype=torch.int64)) for _ in segments]

    for module in ("live", "session"):
        monkeypatch.setattr(f"aloud.{module}.read_turns", read_turns)

    async def drained(engine: Engine) -> None:
        session = engine.session()
        speech = engine.stream(HELLO, seed=1, context=[sound])
        work = _all_of(speech) if what == "speech" else session.hear("Hm.", sound.audio)
        running: asyncio.Future[Any] = asyncio.ensure_future(work)
        asked_later = engine.stream(HELLO, seed=1)
        await asyncio.to_thread(until, lambda: reading == 1)
        assert not await engine.drain(0.05)
        encoding.set()
        assert await engine.drain(LIMIT_SECONDS)
        assert running.done()
        assert len(session.turns if what == "hearing" else await running) > 0
        for late in (_all_of(asked_later), session.hear("Too late.")):
            with pytest.raises(errors.EngineClosed, match="draining"):
                await late

    with Engine(held.runtime) as engine:
        run(drained(engine))


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_draining_for_what_nobody_takes_can_be_given_up(held: Held, how: str) -> None:
    """And then no thread is left that waits on."""

    async def drained(engine: Engine) -> None:
        speech = engine.stream(HELLO, seed=1)
        await anext(speech)
        if how == "cancelled":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(engine.drain(), 0.05)
            return
        draining = asyncio.ensure_future(engine.drain())
        blocking = asyncio.ensure_future(asyncio.to_thread(engine.drain_sync))
        await asyncio.sleep(0.05)
        assert not draining.done()
        await asyncio.to_thread(engine.close)
        assert await asyncio.gather(draining, blocking) == [False, False]

    with Engine(held.runtime) as engine:
        run(drained(engine))


def test_closing_needs_none_of_the_threads_that_the_event_loop_lends(held: Held) -> None:
    async def closed() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        until_closed = threading.Event()
        waiting = asyncio.ensure_future(asyncio.to_thread(until_closed.wait, LIMIT_SECONDS))
        async with Engine(held.runtime) as engine:
            assert len(await _all_of(engine.stream(HELLO, seed=1))) > 0
            assert await engine.drain(LIMIT_SECONDS)
        until_closed.set()
        assert await waiting

    run(closed())
