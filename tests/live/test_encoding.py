"""Audio of callers is encoded in threads of its own, a few at once: nobody else waits, and frames keep their time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from aloud import Engine, Segment, errors
from aloud.live import ENCODED_AT_ONCE
from aloud.request import Prompt
from live.quick import LIMIT_SECONDS, QuickSteps, quick_runtime, run, until
from scripted import CODEBOOKS

SOUND = Segment("As I said.", np.zeros(8, np.float32))


class Encoder:
    """Encoding that waits for as long as it is closed, and counts how many do it at once."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.now = self.most = self.all = 0
        self._lock = threading.Lock()

    def read_turns(self, model: Any, tokenizer: Any, segments: Sequence[Segment], **_: int) -> list[Prompt]:
        with self._lock:
            self.all += 1
            self.now += 1
            self.most = max(self.most, self.now)
        self.open.wait(LIMIT_SECONDS)
        with self._lock:
            self.now -= 1
        return [Prompt(torch.arange(3), torch.zeros(3, CODEBOOKS, dtype=torch.int64)) for _ in segments]


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoder]:
    encoder = Encoder()
    for module in ("live", "session"):
        monkeypatch.setattr(f"aloud.{module}.read_turns", encoder.read_turns)
    yield encoder
    encoder.open.set()


def is_closed(engine: Engine) -> bool:
    try:
        engine.check_health()
    except errors.EngineClosed:
        return True
    return False


async def said(engine: Engine, seed: int, context: Sequence[Segment] = ()) -> int:
    return len([chunk async for chunk in engine.stream("Hello there.", seed=seed, context=context)])


def test_a_few_at_once_and_nobody_else_waits(encoder: Encoder) -> None:
    async def flood(engine: Engine) -> None:
        sessions = [engine.session() for _ in range(8)]
        waiting = [asyncio.ensure_future(said(engine, seed, [SOUND])) for seed in range(24)]
        waiting += [asyncio.ensure_future(session.hear("Hm.", np.zeros(8, np.float32))) for session in sessions]
        await asyncio.to_thread(until, lambda: encoder.now == ENCODED_AT_ONCE)
        # Streams without audio, and threads that others need, are there at once.
        assert await said(engine, 99) > 0
        assert await asyncio.to_thread(lambda: 5) == 5
        assert not any(task.done() for task in waiting)
        encoder.open.set()
        assert all(frames is None or frames > 0 for frames in await asyncio.gather(*waiting))
        assert [len(session.turns) for session in sessions] == [1] * 8

    steps = QuickSteps(4)
    with Engine(quick_runtime(steps, 4), max_waiting=100) as engine:
        run(flood(engine))
    assert (encoder.most, encoder.all) == (ENCODED_AT_ONCE, 32)
    assert not steps.wrong


def test_who_leaves_while_waiting_for_its_turn_is_never_encoded(encoder: Encoder) -> None:
    async def leave(engine: Engine) -> None:
        waiting = [asyncio.ensure_future(said(engine, seed, [SOUND])) for seed in range(8)]
        await asyncio.to_thread(until, lambda: encoder.now == ENCODED_AT_ONCE)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        encoder.open.set()
        assert await said(engine, 9, [SOUND]) > 0

    with Engine(quick_runtime(QuickSteps(2), 2)) as engine:
        run(leave(engine))
    assert encoder.all == ENCODED_AT_ONCE + 1


def test_who_waits_for_its_turn_is_told_that_the_engine_is_closed(encoder: Encoder) -> None:
    async def close(engine: Engine) -> list[Any]:
        speeches = [asyncio.ensure_future(said(engine, seed, [SOUND])) for seed in range(5)]
        hearing = asyncio.ensure_future(engine.session().hear("Hm.", np.zeros(8, np.float32)))
        await asyncio.to_thread(until, lambda: encoder.now == ENCODED_AT_ONCE)
        session = engine.session()
        closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
        await asyncio.to_thread(until, lambda: is_closed(engine))
        with pytest.raises(errors.EngineClosed):
            await session.hear("Too late.", np.zeros(8, np.float32))
        encoder.open.set()  # what is being encoded is waited for
        await closing
        assert encoder.all == ENCODED_AT_ONCE, "nobody waits for the others' any more"
        return await asyncio.gather(*speeches, hearing, return_exceptions=True)

    results = run(close(Engine(quick_runtime(QuickSteps(2), 2))))
    assert [type(result) for result in results] == [errors.EngineClosed] * 6
