"""Faults at every await of a caller, in texts, consumers and steps: no slot is leaked, and nobody hangs."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from types import coroutine
from typing import Any

import numpy as np
import pytest
import torch

from aloud import Audio, Engine
from aloud.errors import AloudError, OutOfMemory, StepFailed
from live.quick import LIMIT_SECONDS, Fault, QuickSteps, is_empty, quick_runtime, until
from scripted import CODEBOOKS

ERRORS: tuple[type[Exception], ...] = (RuntimeError, MemoryError, torch.OutOfMemoryError)
SLOTS = 3
PARTS = ("Well, he", "llo there. How a", "re you to", "day? I am ve", "ry well, thank you.")
ASIDE = "Nobody may hear anything of what happens to others."
SEED = 11


@dataclass
class Stage:
    """An engine over quick steps whose launches take a moment, so that callers wait for frames; and speech alone."""

    engine: Engine
    steps: QuickSteps
    text: np.ndarray  # codes of PARTS, spoken alone
    aside: np.ndarray  # of ASIDE
    injected: int = 0

    def speech(self, parts: Any = PARTS, seed: int = SEED) -> Any:
        return self.engine.stream(parts, seed=seed, pace="full")

    async def beside(self, work: Coroutine[Any, Any, None]) -> BaseException | None:
        """Do something that goes wrong while others speak, who must not hear it -> what it raised."""
        others = [asyncio.ensure_future(self.engine.speak(ASIDE, seed=SEED + 1)) for _ in range(2)]
        task = asyncio.ensure_future(work)
        _, hanging = await asyncio.wait({task, *others}, timeout=LIMIT_SECONDS)
        assert not hanging, "a caller hangs"
        for _ in range(5):  # what was cancelled ends in its next turns
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "something is still being waited for"
        for other in others:
            np.testing.assert_array_equal(other.result().codes, self.aside)
        return asyncio.CancelledError() if task.cancelled() else task.exception()

    def assert_clean(self) -> None:
        until(lambda: is_empty(self.engine.loop))
        stats = self.engine.stats()
        assert stats.slots_used == stats.streams_waiting == 0
        assert not self.steps.wrong


@pytest.fixture
def stage() -> Iterator[Stage]:
    steps = QuickSteps(SLOTS)
    with Engine(quick_runtime(steps, SLOTS)) as engine:
        alone = [engine.speak_sync(text, seed=seed) for text, seed in ((PARTS, SEED), (ASIDE, SEED + 1))]
        text, aside = (audio.codes for audio in alone)
        assert text is not None
        assert aside is not None
        assert len(text) > 8
        steps.before_launch = lambda: time.sleep(0.0003)
        stage = Stage(engine, steps, text, aside)
        yield stage
        stage.assert_clean()
        print(f"injected {stage.injected}")


async def in_parts(fails_at: int | None = None) -> AsyncIterator[str]:
    for number, part in enumerate(PARTS):
        await asyncio.sleep(0.001 * (number % 2))
        if number == fails_at:
            raise ValueError(f"part {number}")
        yield part


def in_parts_sync(fails_at: int | None = None) -> Iterator[str]:
    for number, part in enumerate(PARTS):
        if number == fails_at:
            raise ValueError(f"part {number}")
        yield part


def assert_heard(chunks: list[Audio], expected: np.ndarray, *, all_of_it: bool = False) -> None:
    codes = np.concatenate([chunk.codes for chunk in chunks]) if chunks else np.zeros((0, CODEBOOKS))
    assert np.array_equal(codes, expected[: len(codes)])
    assert not all_of_it or len(codes) == len(expected)


@coroutine
def cancelled_at(work: Coroutine[Any, Any, None], place: int, *, woken: bool) -> Generator[Any, None, bool]:
    """Await something whose task is cancelled where it waits for the n-th time, or in the moment in which that is over.

    -> whether it was: False where it waits less often.
    """
    task = asyncio.current_task()
    assert task is not None

    def go_on() -> Any:
        return work.send(None)

    for number in count():
        try:
            future = go_on()
        except StopIteration:
            return number > place
        if number == place and woken and future is not None:
            future.add_done_callback(lambda _: task.cancel())  # before the task's own callback
        elif number == place:
            task.cancel()
        try:
            yield future
        except BaseException as error:

            def go_on(error=error):
                return work.throw(error)
        else:

            def go_on():
                return work.send(None)

    raise AssertionError


@pytest.mark.parametrize("woken", [False, True], ids=["while it waits", "as it wakes"])
@pytest.mark.parametrize("text", ["whole", "in parts"])
def test_a_task_cancelled_at_any_await(stage: Stage, text: str, woken: bool) -> None:
    async def at(place: int) -> bool:
        heard: list[Audio] = []
        speech = stage.speech(in_parts() if text == "in parts" else PARTS)

        async def listen() -> None:
            async for chunk in speech:
                heard.append(chunk)

        async def work() -> None:
            nonlocal cancelled
            cancelled = await cancelled_at(listen(), place, woken=woken)

        cancelled = True
        error = await stage.beside(work())
        assert error is None or isinstance(error, asyncio.CancelledError)
        if error is not None:
            assert speech.finish_reason == "cancelled"
        assert_heard(heard, stage.text, all_of_it=error is None)
        stage.assert_clean()
        return cancelled

    async def everywhere() -> None:
        place = 0
        while await at(place):
            stage.injected += 1
            place += 1

    asyncio.run(everywhere())
    assert stage.injected >= 10


@pytest.mark.parametrize("woken", [False, True], ids=["while it waits", "as it wakes"])
def test_speak_cancelled_at_any_await(stage: Stage, woken: bool) -> None:
    async def everywhere() -> None:
        for place in count():
            spoken: list[Audio] = []

            async def speak(spoken: list[Audio] = spoken) -> None:
                spoken.append(await stage.engine.speak(in_parts(), seed=SEED))

            error = await stage.beside(cancelled_at(speak(), place, woken=woken))
            stage.assert_clean()
            if error is None:
                assert_heard(spoken, stage.text, all_of_it=True)
                return
            assert isinstance(error, asyncio.CancelledError)
            stage.injected += 1

    asyncio.run(everywhere())
    assert stage.injected >= 10


@pytest.mark.parametrize("fails_at", range(len(PARTS)))
@pytest.mark.parametrize("parts", [in_parts, in_parts_sync], ids=["async", "sync"])
def test_a_text_that_fails_on_its_way(stage: Stage, parts: Callable[[int], Any], fails_at: int) -> None:
    async def run() -> None:
        heard: list[Audio] = []
        speech = stage.speech(parts(fails_at))

        async def listen() -> None:
            async for chunk in speech:
                heard.append(chunk)

        error = await stage.beside(listen())
        assert isinstance(error, ValueError)
        assert str(error) == f"part {fails_at}"
        assert speech.finish_reason == "error"
        assert_heard(heard, stage.text)
        stage.assert_clean()
        with pytest.raises(StopAsyncIteration):
            await anext(speech)

    asyncio.run(run())
    if parts is in_parts_sync:
        with pytest.raises(ValueError, match="part"):
            list(stage.speech(parts(fails_at)))


async def aclose(speech: Any, heard: list[Audio], chunks: int) -> None:
    async with aclosing(speech):
        async for chunk in speech:
            heard.append(chunk)
            if len(heard) == chunks:
                break


async def raise_inside(speech: Any, heard: list[Audio], chunks: int) -> None:
    async with speech:
        async for chunk in speech:
            heard.append(chunk)
            if len(heard) == chunks:
                raise KeyError("the listener's own")


async def forget(speech: Any, heard: list[Audio], chunks: int) -> None:
    while len(heard) < chunks:
        heard.append(await anext(speech))


async def cancel_from_a_task(speech: Any, heard: list[Audio], chunks: int) -> None:
    async def interrupt() -> None:
        while len(heard) < chunks:
            await asyncio.sleep(0)
        speech.cancel()

    interrupting = asyncio.ensure_future(interrupt())
    async for chunk in speech:  # ends, and does not raise
        heard.append(chunk)
    await interrupting


async def cancel_from_a_thread(speech: Any, heard: list[Audio], chunks: int) -> None:
    thread = threading.Thread(target=lambda: (until(lambda: len(heard) >= chunks), speech.cancel()))
    thread.start()
    async for chunk in speech:
        heard.append(chunk)
    await asyncio.to_thread(thread.join)


WAYS_TO_LEAVE = [aclose, raise_inside, forget, cancel_from_a_task, cancel_from_a_thread]


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE, ids=lambda leave: leave.__name__)
def test_leaving_after_any_chunk(stage: Stage, leave: Callable[..., Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        for chunks, text in product(range(1, len(stage.text)), (PARTS, None)):
            heard: list[Audio] = []
            over: list[int] = []
            speech = stage.speech(in_parts() if text is None else text)
            speech._when_over = partial(over.append, 1)
            work = leave(speech, heard, chunks)
            del speech
            error = await stage.beside(work)
            assert (type(error) is KeyError) == (leave is raise_inside)
            del error, work
            gc.collect(0)
            assert_heard(heard, stage.text)
            assert len(heard) >= chunks
            stage.assert_clean()
            assert over == [1]
            stage.injected += 1

    asyncio.run(run())


def test_a_speech_that_is_cancelled_while_its_text_is_awaited_ends(stage: Stage) -> None:
    """And the task that iterates is not taken for a cancelled one."""

    async def never() -> AsyncIterator[str]:
        yield "Well, hello there. How"
        await asyncio.Event().wait()

    async def run() -> None:
        for begun in (False, True):
            speech = stage.speech(never() if begun else wait_for_ever())
            waiting = asyncio.ensure_future(collect(speech))
            await asyncio.sleep(0.05)
            speech.cancel()
            chunks = await asyncio.wait_for(waiting, LIMIT_SECONDS)
            assert bool(chunks) == begun
            assert speech.finish_reason == "cancelled"
            stage.assert_clean()

    async def wait_for_ever() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    async def collect(speech: Any) -> list[Audio]:
        return [chunk async for chunk in speech]

    asyncio.run(run())


def test_a_speech_that_is_cancelled_while_it_begins_takes_no_slot(stage: Stage) -> None:
    may_begin = threading.Event()
    speech = stage.speech()
    begin = speech._begin

    def slowly() -> Any:
        may_begin.wait(LIMIT_SECONDS)
        return begin()

    speech._begin, speech._begin_in = slowly, stage.engine.in_background

    async def run() -> None:
        waiting = asyncio.ensure_future(anext(speech))
        await asyncio.sleep(0.02)
        speech.cancel()
        may_begin.set()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, LIMIT_SECONDS)

    accepted = stage.engine.stats().accepted
    asyncio.run(run())
    assert speech.finish_reason == "cancelled"
    assert stage.engine.stats().accepted == accepted


def test_an_event_loop_closed_while_streams_run(stage: Stage) -> None:
    heard: list[Audio] = []

    async def listen(text: Any) -> None:
        async for chunk in stage.speech(text):
            heard.append(chunk)

    for number in range(7):
        event_loop = asyncio.new_event_loop()
        event_loop.set_exception_handler(lambda *_: None)  # which says that tasks were destroyed
        tasks = [event_loop.create_task(listen(text)) for text in (PARTS, in_parts(), ASIDE)]
        event_loop.run_until_complete(asyncio.sleep(0.001 * number))
        event_loop.close()
        del tasks, event_loop
        gc.collect()
        stage.assert_clean()
        stage.injected += 3
    np.testing.assert_array_equal(stage.engine.speak_sync(ASIDE, seed=SEED + 1).codes, stage.aside)
    assert len(stage.engine._arrivals) <= 1  # closed event loops are forgotten


def test_an_await_that_is_dropped(stage: Stage) -> None:
    async def run() -> None:
        for _ in range(10):
            coroutine = anext(stage.speech()).__await__()
            next(coroutine)  # it waits for the first frame now
            del coroutine
            gc.collect(0)
            stage.assert_clean()
            stage.injected += 1

    asyncio.run(run())


def test_a_fault_in_any_launch_reaches_every_caller(stage: Stage) -> None:
    """Async and sync callers; who was not in the step hears what is to be heard."""
    before = stage.steps.fault

    def listen(outcome: dict[str, Any]) -> None:
        heard: list[Audio] = []
        try:
            heard += stage.speech()
        except AloudError as error:
            outcome["error"] = error
        outcome["heard"] = heard

    async def run(step: str, call: int, error: type[Exception]) -> int:
        outcome: dict[str, Any] = {}
        stage.steps.fault = fault = Fault(step, call, error)
        thread = threading.Thread(target=listen, args=(outcome,))
        thread.start()
        results = await asyncio.wait_for(
            asyncio.gather(
                *(stage.engine.speak(text, seed=seed) for text, seed in ((in_parts(), SEED), (ASIDE, SEED + 1))),
                return_exceptions=True,
            ),
            LIMIT_SECONDS,
        )
        await asyncio.to_thread(thread.join, LIMIT_SECONDS)
        assert not thread.is_alive(), "a caller hangs"
        words = StepFailed if error is RuntimeError else OutOfMemory
        failed = 0
        for result, expected in zip(results, (stage.text, stage.aside), strict=True):
            if isinstance(result, BaseException):
                assert type(result) is words
                failed += 1
            else:
                np.testing.assert_array_equal(result.codes, expected)
        assert_heard(outcome["heard"], stage.text, all_of_it="error" not in outcome)
        assert type(outcome.get("error")) in (words, type(None))
        failed += "error" in outcome
        # Without memory to keep what was read, it is read again.
        reaches_somebody = step != "copy_prefix" or error is RuntimeError
        assert bool(failed) == bool(fault.happened and reaches_somebody)
        stage.assert_clean()
        return fault.happened

    for step, most in (("start", 7), ("prefill", 7), ("launch", 25), ("read", 25), ("copy_prefix", 4)):
        for call in range(most):
            stage.injected += asyncio.run(run(step, call, ERRORS[call % len(ERRORS)]))
    stage.steps.fault = before
    assert stage.injected >= 40
