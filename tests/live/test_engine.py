"""The engine: every way to speak, who leaves and who lags, refusals, numbers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from aloud import Audio, Engine, Request, Segment, errors
from aloud.arrivals import Arrivals
from aloud.engine.loop import Loop
from aloud.engine.stream import BUFFERED_FRAMES, Stream
from live.quick import LIMIT_SECONDS, Held, QuickSteps, codes_of, is_empty, quick_job, quick_runtime, run, until
from scripted import FRAME_RATE

HELLO = "Hello there how are you today?"
LONG = "One thing follows from another, as it does. " * 4  # in pieces


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.open.set()
    until(lambda: is_empty(held.runtime.loop))
    assert not held.steps.wrong


# --- speaking ---------------------------------------------------------------------------------------------------------


def test_every_way_to_speak_says_the_same(held: Held) -> None:
    expected = held.expected(HELLO, 5)

    async def parts() -> AsyncIterator[str]:
        for word in HELLO.split(" "):
            yield word + " "

    async def in_loop(engine: Engine) -> list[np.ndarray]:
        return [
            (await engine.speak(HELLO, seed=5)).codes,
            (await engine.speak(parts(), seed=5)).codes,
            codes_of([chunk async for chunk in engine.stream(HELLO, seed=5)]),
            codes_of([chunk async for chunk in engine.stream([*HELLO.split("e")[0:1], HELLO[1:]], seed=5)]),
        ]

    with Engine(held.runtime) as engine:
        spoken = run(in_loop(engine))
        spoken += [
            engine.speak_sync(HELLO, seed=5).codes,
            engine.speak_sync(iter(HELLO), seed=5).codes,
            codes_of(list(engine.stream(HELLO, seed=5, pace="full"))),
        ]
    for codes in spoken:
        np.testing.assert_array_equal(codes, expected)


def test_the_ways_to_say_what_ends_it(held: Held) -> None:
    with Engine(held.runtime) as engine:
        speech = engine.stream(LONG, seed=5, max_seconds=0.16, pace="full")
        assert (speech.seed, speech.finish_reason) == (5, None)
        assert len(list(speech)) == 2
        assert speech.finish_reason == "length"
        speech = engine.stream(HELLO, seed=5)
        assert list(speech)
        assert speech.finish_reason == "end"
        assert list(speech) == []
        with engine.stream(LONG, seed=5) as speech:
            next(speech)
        assert speech.finish_reason == "cancelled"
        never = engine.stream(LONG)
        never.close()
        assert (never.finish_reason, list(never)) == ("cancelled", [])


def test_a_batch_ends_beside_an_engine_that_takes_one_of_its_slots_for_a_while() -> None:
    """The other's frames are taken while the first has no slot; that there is room for more is told to the engine."""
    steps = QuickSteps(2)
    steps.length_of = lambda _: 1000
    runtime = quick_runtime(steps, 2)
    with Engine(runtime) as engine:
        live: list[Stream] = []

        def before() -> None:
            time.sleep(0.0005)
            if steps.launches == 8 and not live:
                live.append(engine.loop.submit(quick_job(9, max_frames=10, lead_seconds=0.4)))

        steps.before_launch = before
        batch = [Request("One.", seed=1, max_seconds=10 * 0.08), Request("Two.", seed=2, max_seconds=200 * 0.08)]
        with ThreadPoolExecutor(1) as thread:
            speaking = thread.submit(runtime.speak_batch, batch)
            try:
                audios = speaking.result(LIMIT_SECONDS)
            finally:
                engine.close()  # which ends it in any case
        assert engine.stats().suspensions == 1
    assert [len(audio.codes) for audio in audios if audio.codes is not None] == [10, 200]
    assert not steps.wrong


def test_two_event_loops_and_threads_share_one_engine(held: Held) -> None:
    expected = {seed: held.expected(HELLO, seed) for seed in range(40)}
    spoken: dict[int, np.ndarray | None] = {}

    async def some(engine: Engine, first: int) -> None:
        audios = await asyncio.gather(*(engine.speak(HELLO, seed=first + number) for number in range(10)))
        spoken.update({first + number: audio.codes for number, audio in enumerate(audios)})

    def in_turn(engine: Engine, first: int) -> None:
        spoken.update({seed: engine.speak_sync(HELLO, seed=seed).codes for seed in range(first, first + 10)})

    with Engine(held.runtime) as engine, ThreadPoolExecutor(4) as threads:
        work = [threads.submit(run, some(engine, 0)), threads.submit(run, some(engine, 10))]
        work += [threads.submit(in_turn, engine, 20), threads.submit(in_turn, engine, 30)]
        for done in work:
            done.result(LIMIT_SECONDS)
    assert spoken.keys() == expected.keys()
    for seed, codes in spoken.items():
        np.testing.assert_array_equal(codes, expected[seed])


def test_news_between_a_look_and_the_wait_for_it_is_not_missed() -> None:
    class Sudden(Stream):
        """Is over in the moment in which somebody has seen that it is not."""

        @property
        def is_over(self) -> bool:
            was_over = super().is_over
            if not was_over and threading.current_thread() is waiting:
                self.finish_reason = "end"
                loop.wake()
            return was_over

    loop = Loop(QuickSteps(1), 1, FRAME_RATE)
    waiting = threading.Thread(target=lambda: loop.wait(Sudden(quick_job(1))), daemon=True)
    with loop._drive(wait=False) as driving:
        assert driving
        waiting.start()
        waiting.join(LIMIT_SECONDS)
        assert not waiting.is_alive()


def test_news_that_came_before_somebody_waits_is_not_waited_for() -> None:
    loop, stream = Loop(QuickSteps(1), 1, FRAME_RATE), Stream(quick_job(1))
    stream.finish_reason = "end"

    async def wait() -> None:
        await Arrivals(loop, asyncio.get_running_loop()).wait(stream)

    run(wait())


def test_text_that_comes_while_a_frame_is_awaited_leaves_nothing_behind(held: Held) -> None:
    most = 0

    async def parts() -> AsyncIterator[str]:
        nonlocal most
        yield "This is the sentence to begin with. And"
        held.open.clear()
        for _ in range(50):
            yield " more"
            await asyncio.sleep(0.001)
            most = max(most, len(asyncio.all_tasks()))
        held.open.set()

    with Engine(held.runtime) as engine:
        held.talk_for(30)
        run(engine.speak(parts(), seed=1))
    assert 3 <= most <= 6  # the speech, the wait for its frame, the text on its way, what `run` adds


# --- leaving and lagging ----------------------------------------------------------------------------------------------


def test_a_cancelled_stream_is_launched_once_more_at_most(held: Held) -> None:
    """Its slot is free within a frame: the one that was being launched."""
    held.talk_for(1000)
    expected = [held.alone.speak(HELLO, seed=seed, max_seconds=4).codes for seed in range(3)]
    with Engine(held.runtime) as engine:
        others = [engine.stream(HELLO, seed=seed, pace="full", max_seconds=4) for seed in range(3)]
        speech = engine.stream(HELLO, seed=99, pace="full", max_seconds=80)
        held.open.clear()
        chunks: list[list[Audio]] = [[] for _ in others]
        readers = [
            threading.Thread(target=lambda mine=mine, other=other: mine.extend(other))
            for mine, other in zip(chunks, others, strict=True)
        ]
        left = threading.Thread(target=lambda: list(speech))
        for thread in (*readers, left):
            thread.start()
        until(lambda: engine.loop.used_slots + engine.loop.waiting == 4)
        held.open.set()
        until(lambda: held.steps.launched_rows[99] >= 3)
        held.open.clear()
        until(lambda: engine.loop.stuck_seconds > 0.01)  # it is in a launch, and stays there
        before = held.steps.launched_rows[99]
        speech.cancel()
        held.open.set()
        for thread in (*readers, left):
            thread.join(LIMIT_SECONDS)
        assert held.steps.launched_rows[99] <= before + 1
        for mine, codes in zip(chunks, expected, strict=True):
            np.testing.assert_array_equal(codes_of(mine), codes)
        assert engine.stats().cancelled == 1


def test_a_slow_consumer_holds_back_itself_alone(held: Held) -> None:
    text = "Word after word after word in one piece of text."

    async def both(engine: Engine) -> None:
        slow = engine.stream(text, seed=1, pace="full")
        heard = [await anext(slow)]
        quick = [(await engine.speak(HELLO, seed=seed)).codes for seed in range(8)]
        for seed, codes in enumerate(quick):
            np.testing.assert_array_equal(codes, held.expected(HELLO, seed))
        assert engine.stats().slots_used <= 1
        heard += [chunk async for chunk in slow]
        np.testing.assert_array_equal(codes_of(heard), expected)

    held.talk_for(30)
    expected = held.alone.speak(text, seed=1).codes
    with Engine(held.runtime) as engine:
        run(both(engine))


def test_what_nobody_takes_is_bounded() -> None:
    """A stream that talks on: made until its buffer is full, and then no further."""
    held = Held(2)
    held.talk_for(1000)
    steps = held.steps
    with Engine(held.runtime) as engine:
        speech = engine.stream(HELLO, seed=1, max_seconds=40, pace="full")
        next(speech)
        until(lambda: steps.launched_rows[1] >= BUFFERED_FRAMES)
        for seed in range(2, 12):
            assert len(list(engine.stream(HELLO, seed=seed, max_seconds=1, pace="full"))) == 13
        assert BUFFERED_FRAMES <= steps.launched_rows[1] <= BUFFERED_FRAMES + 2
        assert len(list(speech)) == 499


# --- refusing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_waiting", [0, 1, 3])
def test_more_than_may_wait_are_refused(held: Held, max_waiting: int) -> None:
    async def crowd(engine: Engine) -> None:
        running = [engine.stream(HELLO, seed=seed, pace="full") for seed in range(4)]
        begun = [await anext(speech) for speech in running]  # the rest is not taken, and fills their buffers
        waiting = [asyncio.ensure_future(engine.speak(HELLO, seed=seed)) for seed in range(max_waiting + 3)]
        await asyncio.wait(waiting[-3:])
        assert engine.stats().streams_waiting == max_waiting
        for seed, speech in enumerate(running):
            heard = codes_of([begun[seed], *[chunk async for chunk in speech]])
            np.testing.assert_array_equal(heard, held.expected(HELLO, seed))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        refused = [result for result in results if isinstance(result, errors.Overloaded)]
        assert len(refused) == 3
        assert all(result is refusal for result, refusal in zip(results[-3:], refused, strict=True))
        for refusal in refused:
            assert 0 < refusal.retry_after_seconds <= 30
            assert str(refusal) == f"{max_waiting} requests wait for a stream already. Ask again later."
        for seed, result in enumerate(results[:-3]):
            np.testing.assert_array_equal(result.codes, held.expected(HELLO, seed))
        stats = engine.stats()
        assert (stats.refused, stats.finished, stats.failed) == (3, 4 + max_waiting, 0)
        assert (await engine.speak(HELLO, seed=1)).codes is not None

    held.talk_for(100)
    with Engine(held.runtime, max_waiting=max_waiting) as engine:
        run(crowd(engine))


def test_as_many_as_there_are_slots_come_at_once_though_none_may_wait(held: Held) -> None:
    async def together(engine: Engine) -> None:
        await asyncio.gather(*(engine.speak(HELLO, seed=seed) for seed in range(4)))

    with Engine(held.runtime, max_waiting=0) as engine:
        run(together(engine))
        assert engine.stats().refused == 0


def test_who_would_make_others_late_is_refused_with_the_time_to_come_back(held: Held) -> None:
    async def two(engine: Engine) -> None:
        first = engine.stream(HELLO, seed=1, max_seconds=0.8)
        await anext(first)
        for _ in range(40):
            engine.loop.scheduler.observe_frame(2, 0.2)  # a frame of two streams takes longer than it lasts
        second = engine.stream(HELLO, seed=2)
        with pytest.raises(errors.Overloaded, match=r"^One more stream would make those that run late\. Ask again in"):
            await anext(second)
        with pytest.raises(errors.Overloaded) as refusal:
            next(engine.stream(HELLO, seed=2))
        assert 0 < refusal.value.retry_after_seconds <= 30
        assert (
            await engine.speak(HELLO, seed=2, max_seconds=0.8)
        ).codes is not None  # at full pace it makes nobody late
        assert len([chunk async for chunk in first]) == 9

    held.talk_for(1000)
    with Engine(held.runtime) as engine:
        run(two(engine))
        assert engine.stats().refused == 2


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_numbers_after_a_known_workload(held: Held) -> None:
    voice = held.runtime.voice([Segment("A voice of text alone.")])
    with Engine(held.runtime, max_waiting=0) as engine:
        begun = engine.stats()
        texts = ["Hello there.", "And a longer one than that."]
        audios = [engine.speak_sync(text, seed=seed, voice=voice) for seed, text in enumerate(texts)]
        chunks = list(engine.stream(texts[0], seed=3, max_seconds=0.24))
        cancelled = engine.stream(texts[1], seed=4)
        with cancelled:
            next(cancelled)
        until(lambda: engine.loop.is_idle)
        stats = engine.stats()
    frames = sum(len(audio.codes) for audio in audios if audio.codes is not None)
    assert (stats.slots, stats.slots_used, stats.streams_waiting) == (4, 0, 0)
    assert stats.accepted - begun.accepted == 4
    assert (stats.finished - begun.finished, stats.cancelled, stats.failed, stats.refused) == (3, 1, 0, 0)
    assert stats.prefix_hits == 2
    positions = [len(f"[0]{text}".encode()) + 2 for text in texts]
    assert stats.prefill_positions - begun.prefill_positions == 2 * sum(positions)
    # Every stream drew one frame more, its end, but for the one with a length; the last may have made several.
    least = frames + len(audios) + len(chunks) + 1
    assert least <= stats.frames <= least + 6
    assert stats.steps == stats.frames  # one stream at a time
    assert stats.rows_per_step == 1.0
    assert 1 <= stats.realtime_frames - len(chunks) <= 7
    assert (stats.late_frames, stats.lateness_max_seconds) == (0, 0.0)
    assert stats.frames_per_second > 0
    assert not stats.is_draining
    assert stats.stuck_seconds == 0


def test_late_frames_are_counted(held: Held) -> None:
    """A device that takes longer than the sound lasts."""
    held.steps.before_launch = lambda: time.sleep(0.1)
    held.talk_for(1000)
    with Engine(held.runtime) as engine:
        chunks = list(engine.stream(HELLO, seed=3, max_seconds=0.48))
        stats = engine.stats()
    assert stats.realtime_frames == len(chunks) == 6
    assert stats.late_frames == 5
    assert 0.1 <= stats.lateness_max_seconds < 1
    assert 0.02 <= stats.lateness_p50_seconds <= stats.lateness_p99_seconds <= stats.lateness_max_seconds


def test_a_stream_in_real_time_keeps_its_lead_and_no_more(held: Held) -> None:
    held.talk_for(1000)
    with Engine(held.runtime) as engine, engine.stream(HELLO, seed=1, lead_seconds=0.4) as speech:
        began = time.monotonic()
        while time.monotonic() - began < 0.8:
            time.sleep(0.01)
            if not speech.is_running:
                next(speech)
                began = time.monotonic()
        made = held.steps.launched_rows[1]
    assert 0.8 <= made / FRAME_RATE <= 1.6
