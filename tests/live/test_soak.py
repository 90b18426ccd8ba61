"""Ten minutes of everything at once: memory, threads and open files stay where they are, and no slot is lost."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aloud import Engine, Runtime, Segment
from aloud.errors import NothingSpoken, Overloaded
from oracle import csm as oracle
from standing_threads import standing_threads

SECONDS = 600.0
WARM_UP_SECONDS = 60.0
CALLERS = 12
GROWTH_BYTES = 48 << 20
"""What memory may grow by after the warm-up: allocators keep what they once had, but a leak of one frame's samples a
second would be more."""

pytestmark = pytest.mark.full_size


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def words(drawn: random.Random) -> AsyncIterator[str]:
    for _ in range(drawn.randint(1, 12)):
        await asyncio.sleep(drawn.random() * 0.02)
        yield drawn.choice(("hello, ", "and then. ", "Well! ", "what ", "is that? "))
    yield "end."


async def call(engine: Engine, sound: object, drawn: random.Random) -> str:
    """One of the things that callers do -> which."""
    what = drawn.choice(("whole", "pieces", "leave", "cancel", "session", "voice"))
    frames = drawn.randint(1, 20)
    if what == "whole":
        await engine.speak("Hello from Aloud, how are you?", max_seconds=frames * 0.08)
    elif what == "pieces":
        async for _ in engine.stream(words(drawn), max_seconds=frames * 0.08, pace="full"):
            pass
    elif what == "leave":
        async with engine.stream("Hello there, and then some more.", lead_seconds=1.0) as speech:
            async for _ in speech:
                if drawn.random() < 0.3:
                    break
    elif what == "cancel":
        task = asyncio.ensure_future(engine.speak("Hello there.", max_seconds=4.0))
        await asyncio.sleep(drawn.random() * 0.2)
        task.cancel()
        await asyncio.wait({task})
    elif what == "session":
        session = engine.session(speaker=drawn.randint(0, 3))
        for _ in range(drawn.randint(1, 4)):
            await session.hear("How are you?", sound if drawn.random() < 0.5 else None)  # type: ignore[arg-type]
            await session.speak("Fine, thank you.", max_seconds=frames * 0.08)
    else:
        voice = await asyncio.to_thread(engine.runtime.voice, [Segment("Hi there.", sound, 1)])  # type: ignore[arg-type]
        await engine.speak("Hello.", voice=voice, max_seconds=frames * 0.08)
    return what


def test_nothing_grows(tmp_path: Path, seed: int) -> None:
    config = oracle.small_config(codebooks=2, layers=1, positions=200)
    folder = oracle.save(oracle.random_model(config, seed), tmp_path)
    runtime = Runtime.load(folder, device="cpu", max_streams=6)
    sound = oracle.speech_like(0.5, seed)
    done: dict[str, int] = {}
    marks: list[tuple[float, int, int, int]] = []  # seconds, bytes, threads, files

    async def caller(engine: Engine, number: int, end: float) -> None:
        drawn = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            try:
                what = await call(engine, sound, drawn)
            except (Overloaded, NothingSpoken) as error:
                what = type(error).__name__
                await asyncio.sleep(0.05)
            done[what] = done.get(what, 0) + 1

    async def watch(began: float, end: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(SECONDS / 60)
            gc.collect()
            marks.append((time.monotonic() - began, resident_bytes(), standing_threads(), open_files()))

    async def everything() -> None:
        began = time.monotonic()
        async with Engine(runtime, max_waiting=64) as engine:
            await asyncio.gather(
                watch(began, began + SECONDS), *(caller(engine, number, began + SECONDS) for number in range(CALLERS))
            )
            assert await engine.drain(60)
            stats = engine.stats()
            assert (stats.slots_used, stats.streams_waiting, stats.failed) == (0, 0, 0)
            print(stats)

    asyncio.run(everything())
    print(done)
    settled = [mark for mark in marks if mark[0] >= WARM_UP_SECONDS]
    half = len(settled) // 2
    first, last = settled[:half], settled[half:]
    growth = min(mark[1] for mark in last) - min(mark[1] for mark in first)
    print(
        f"{sum(done.values())} calls; grew by {growth / 1e6:.1f} MB from {min(mark[1] for mark in first) / 1e6:.0f} MB"
    )
    assert growth < GROWTH_BYTES
    assert max(mark[2] for mark in last) <= max(mark[2] for mark in first)
    assert max(mark[3] for mark in last) <= max(mark[3] for mark in first) + 2
    assert set(done) >= {"whole", "pieces", "leave", "cancel", "session", "voice"}
