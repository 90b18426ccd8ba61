"""A request's codes and PCM depend on its own inputs and seed alone, whatever else an engine does meanwhile."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aloud import Audio, Engine, Runtime, Segment, errors
from aloud.voice import Voice
from live.quick import QuickSteps, is_empty, quick_runtime, until
from oracle import csm as oracle

REQUESTS = 200
SLOTS = 5
LIMIT_SECONDS = 120.0
TEXTS = (
    "Hi there.",
    "How are you today?",
    "One two three four five six seven.",
    "Well, hello to you. How are you today? I am fine, thank you.",  # three pieces
    "A paragraph of its own.\n\nAnd a second one, spoken behind the first.",  # as many
)
WAYS = ("async", "async", "parts", "sync", "speak", "runtime")
LEAVINGS = ("", "", "", "close", "cancel", "task", "forget")


@dataclass(frozen=True)
class Asked:
    """One request, how it comes and how it goes."""

    given: dict[str, Any]  # of `Engine.stream`
    way: str
    comes_after_seconds: float
    leaves: str  # "": hears all of it
    leaves_after: int  # chunks
    takes_seconds: float  # for each chunk

    @property
    def text(self) -> str:
        """What is said."""
        return str(self.given["text"])


def random_requests(seed: int, voices: list[Voice | None], count: int) -> list[Asked]:
    chance = random.Random(seed)
    asked = []
    for number in range(count):
        way = chance.choice(WAYS)
        text = chance.choice(TEXTS[:3] if way == "runtime" else TEXTS)
        given = {
            "text": text,
            "speaker": chance.randrange(3),
            "seed": seed + 1000 * number,
            "voice": chance.choice(voices),
            "temperature": chance.choice([0.0, 0.5, 0.9, 1.3]),
            "top_k": chance.choice([0, 1, 5, 50]),
            "max_seconds": 0.08 * chance.randint(1, 6 if text in TEXTS[:3] else 12),
        }
        if chance.random() < 0.3:
            given["depth_temperature"], given["depth_top_k"] = chance.choice([0.0, 0.7]), chance.choice([0, 3])
        leaves = "" if way in ("speak", "runtime") else chance.choice(LEAVINGS)
        takes = chance.choice([0.0, 0.0, 0.0, 0.002, 0.02])
        asked.append(Asked(given, way, chance.expovariate(1.0), leaves, chance.randint(1, 5), takes))
    return asked


async def in_parts(text: str) -> Any:
    """A text as an LLM gives it."""
    for start in range(0, len(text), 5):
        await asyncio.sleep(0)
        yield text[start : start + 5]


class Heard:
    """What the callers of a crowd got: chunks, or the error that ended it."""

    def __init__(self, engine: Engine, runtime: Runtime) -> None:
        self.engine = engine
        self.runtime = runtime
        self.chunks: dict[int, list[Audio]] = {}
        self.errors: dict[int, BaseException] = {}
        self.whole = 0  # that were heard to their end

    async def everybody(self, asked: list[Asked]) -> None:
        tasks = [asyncio.ensure_future(self._one(number, one)) for number, one in enumerate(asked)]
        await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_SECONDS)

    async def _one(self, number: int, asked: Asked) -> None:
        await asyncio.sleep(asked.comes_after_seconds)
        work = self._listen(number, asked)
        if asked.leaves != "task":
            await work
            return
        listening = asyncio.ensure_future(work)
        while len(self.chunks.get(number, ())) < asked.leaves_after and not listening.done():
            await asyncio.sleep(0.001)
        listening.cancel()
        await asyncio.wait({listening})

    async def _listen(self, number: int, asked: Asked) -> None:
        chunks = self.chunks[number] = []
        pace = "realtime" if number % 4 == 0 else "full"
        try:
            if asked.way == "speak":
                chunks.append(await self.engine.speak(**asked.given))
            elif asked.way == "runtime":
                chunks.append(await asyncio.to_thread(lambda: self.runtime.speak(**asked.given)))
            elif asked.way == "sync":
                speech = self.engine.stream(**asked.given, pace=pace)
                await asyncio.to_thread(self._take, speech, asked, chunks)
            else:
                text = in_parts(asked.text) if asked.way == "parts" else asked.text
                speech = self.engine.stream(**(asked.given | {"text": text}), pace=pace)
                async for chunk in speech:
                    chunks.append(chunk)
                    await asyncio.sleep(asked.takes_seconds)
                    if len(chunks) == asked.leaves_after and self._leave(speech, asked.leaves):
                        return
        except errors.AloudError as error:
            self.errors[number] = error

    def _take(self, speech: Any, asked: Asked, chunks: list[Audio]) -> None:
        for chunk in speech:
            chunks.append(chunk)
            time.sleep(asked.takes_seconds)
            if len(chunks) == asked.leaves_after and self._leave(speech, asked.leaves):
                return

    def _leave(self, speech: Any, how: str) -> bool:
        if how == "close":
            speech.close()
        elif how == "cancel":
            threading.Thread(target=speech.cancel).start()
        return how in ("close", "cancel", "forget")

    def same(self, number: int, asked: Asked, expected: list[Audio] | BaseException) -> None:
        """Assert that a caller got what there is to get, bit for bit, until it left."""
        if isinstance(expected, BaseException):
            assert type(self.errors.get(number)) is type(expected) or asked.leaves == "task"
            return
        if isinstance(self.errors.get(number), errors.Overloaded):  # on a busy machine, of those in real time
            assert number % 4 == 0
            assert not self.chunks[number]
            return
        assert number not in self.errors
        codes, samples = together(self.chunks[number])
        all_codes, all_samples = together(expected)
        if not asked.leaves:
            self.whole += 1
            assert len(codes) == len(all_codes)
        assert codes.tobytes() == all_codes[: len(codes)].tobytes()
        assert samples.tobytes() == all_samples[: len(samples)].tobytes()


def together(chunks: list[Audio]) -> tuple[np.ndarray, np.ndarray]:
    if not chunks:
        return np.zeros((0, 3), np.int64), np.zeros(0, np.float32)
    codes = [chunk.codes for chunk in chunks if chunk.codes is not None]
    return np.concatenate(codes), np.concatenate([chunk.samples for chunk in chunks])


def alone(runtime: Runtime, engine: Engine, asked: Asked) -> list[Audio] | BaseException:
    """What a request gives when there is nobody else: of one piece, from a runtime that has no engine."""
    try:
        if asked.text in TEXTS[:3]:
            return [runtime.speak(**asked.given)]
        return [engine.speak_sync(**asked.given)]
    except errors.AloudError as error:
        return error


def small_runtimes(seed: int, folder: Any, *, max_streams: tuple[int, ...]) -> list[Runtime]:
    """Runtimes over one small model, each with slots of its own."""
    config = oracle.small_config(
        codebooks=3, layers=1, rope=oracle.LLAMA3, depth_rope=oracle.DEPTH_LLAMA3, positions=400
    )
    loaded = Runtime.load(oracle.save(oracle.random_model(config, seed), folder), device="cpu")
    return [
        Runtime(loaded.model, loaded.tokenizer, loaded.sampling, "small", max_streams=streams, max_positions=400)
        for streams in max_streams
    ]


def test_a_crowd_hears_what_each_hears_alone(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    runtime, lone, lone_engine = small_runtimes(seed, tmp_path_factory.mktemp("checkpoint"), max_streams=(SLOTS, 1, 1))
    turns = [
        Segment("Hi.", oracle.speech_like(0.5, seed), 1),
        Segment("Hello, you.", oracle.speech_like(0.9, seed + 1)),
    ]
    voices = [None, lone.voice(turns), lone.voice(turns[:1])]
    asked = random_requests(seed, voices, REQUESTS)
    began = time.monotonic()
    with Engine(lone_engine) as engine:
        expected = [alone(lone, engine, one) for one in asked]
    took_alone = time.monotonic() - began
    began = time.monotonic()
    with Engine(runtime, max_waiting=REQUESTS) as engine:
        heard = Heard(engine, runtime)
        asyncio.run(heard.everybody(asked))
        until(lambda: is_empty(engine.loop))
        stats = engine.stats()
    for number, one in enumerate(asked):
        heard.same(number, one, expected[number])
    silent = [one for one in expected if isinstance(one, BaseException)]
    print(
        f"{REQUESTS} requests, {heard.whole} heard to their end, {len(silent)} of "
        f"of all said nothing; {stats.frames} frames, {stats.rows_per_step:.2f} streams a step, {stats.cancelled} "
        f"cancelled, {stats.refused} refused, {stats.prefix_hits} behind a prefix; alone {took_alone:.1f} s, together "
        f"{time.monotonic() - began:.1f} s"
    )
    assert heard.whole > 70
    assert stats.rows_per_step > 1.5  # they did run together
    assert stats.cancelled > 10
    assert stats.failed == 0


# --- consumers of every kind, on steps that cost nothing --------------------------------------------------------------


@dataclass(frozen=True)
class Consumer:
    """Who takes what is spoken, and how."""

    seed: int
    pieces: int
    waits: int  # turns of the event loop before it comes
    slow: int  # turns of the event loop for each chunk
    leaves: str
    leaves_after: int
    pace: Literal["realtime", "full"]


CONSUMERS = st.builds(
    Consumer,
    seed=st.integers(0, 5),
    pieces=st.integers(1, 3),
    waits=st.integers(0, 30),
    slow=st.sampled_from([0, 0, 1, 7]),
    leaves=st.sampled_from(["", "", "close", "cancel", "task", "forget"]),
    leaves_after=st.integers(0, 9),
    pace=st.sampled_from(["full", "full", "realtime"]),
)
PIECE = "This is the sentence that is said. "


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(consumers=st.lists(CONSUMERS, min_size=1, max_size=9), slots=st.integers(1, 4), ahead=st.integers(0, 2))
def test_any_consumers(consumers: list[Consumer], slots: int, ahead: int) -> None:
    """Slow ones, ones that leave early, by every door, cancelled tasks: all others hear the same."""
    steps = QuickSteps(slots, ahead=ahead)

    async def listen(engine: Engine, consumer: Consumer, chunks: list[Audio]) -> bool:
        for _ in range(consumer.waits):
            await asyncio.sleep(0)
        speech = engine.stream(PIECE * consumer.pieces, seed=consumer.seed, pace=consumer.pace, lead_seconds=60.0)
        if consumer.leaves_after == 0 and consumer.leaves not in ("", "task"):
            await speech.aclose()
        async for chunk in speech:
            chunks.append(chunk)
            for _ in range(consumer.slow):
                await asyncio.sleep(0)
            if len(chunks) == consumer.leaves_after:
                if consumer.leaves == "cancel":
                    speech.cancel()
                elif consumer.leaves == "close":
                    await speech.aclose()
                elif consumer.leaves == "forget":
                    return False
        return True

    async def one(engine: Engine, consumer: Consumer, chunks: list[Audio]) -> None:
        task = asyncio.ensure_future(listen(engine, consumer, chunks))
        if consumer.leaves == "task":
            while len(chunks) < consumer.leaves_after and not task.done():
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        assert not task.cancelled() or consumer.leaves == "task"
        assert task.cancelled() or task.exception() is None

    async def everybody(engine: Engine) -> list[list[Audio]]:
        everything: list[list[Audio]] = [[] for _ in consumers]
        work = (one(engine, consumer, chunks) for consumer, chunks in zip(consumers, everything, strict=True))
        await asyncio.wait_for(asyncio.gather(*work), LIMIT_SECONDS)
        return everything

    with Engine(quick_runtime(steps, slots)) as engine:
        everything = asyncio.run(everybody(engine))
        until(lambda: is_empty(engine.loop))
    assert not steps.wrong
    for consumer, chunks in zip(consumers, everything, strict=True):
        codes, _ = together(chunks)
        whole = expected(consumer.seed, consumer.pieces)
        assert np.array_equal(codes, whole[: len(codes)])
        assert len(codes) == len(whole) or consumer.leaves


ALONE: dict[tuple[int, int], np.ndarray] = {}


def expected(seed: int, pieces: int) -> np.ndarray:
    """What a text of so many pieces is alone."""
    if (seed, pieces) not in ALONE:
        with Engine(quick_runtime(QuickSteps(1), 1)) as engine:
            codes = engine.speak_sync(PIECE * pieces, seed=seed).codes
        assert codes is not None
        ALONE[seed, pieces] = codes
    return ALONE[seed, pieces]
