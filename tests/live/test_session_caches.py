"""Sessions keep what they have read within a bound: who spoke longest ago reads again, and says the same."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from aloud import Audio, Engine, Session, errors
from live.quick import QuickSteps, codes_of, quick_runtime

POSITION_BYTES = 8  # of a position that `QuickSteps` has read


@contextmanager
def engine_of(session_bytes: int | None, slots: int = 2) -> Iterator[tuple[Engine, QuickSteps]]:
    steps = QuickSteps(slots)
    steps.length_of = lambda _: 4
    with Engine(quick_runtime(steps, slots), session_bytes=session_bytes) as engine:
        yield engine, steps
    assert not steps.wrong


def says(session: Session, text: str) -> np.ndarray:
    chunks: list[Audio] = list(session.stream(text, seed=7, pace="full"))
    return codes_of(chunks)


def conversation(engine: Engine, number: int) -> Callable[[], np.ndarray]:
    """A session -> a function that takes a turn more and gives its codes; every third turn is heard."""
    session, turns = engine.session(speaker=number % 3), 0

    def go_on() -> np.ndarray:
        nonlocal turns
        turns += 1
        if turns % 3 == 0:
            session.hear_sync(f"Turn {turns} of conversation {number}.")
        return says(session, f"Answer {turns}.")

    return go_on


def test_the_bound_holds_and_nobody_says_anything_else(seed: int) -> None:
    order = random.Random(seed).choices(range(8), k=60)
    with engine_of(10**9) as (engine, _):
        roomy = [conversation(engine, number) for number in range(8)]
        expected = [roomy[number]() for number in order]
        assert engine.stats().sessions_evicted == 0
        whole = engine.stats().session_bytes
    with engine_of(whole // 3) as (engine, _):
        tight = [conversation(engine, number) for number in range(8)]
        for number, codes in zip(order, expected, strict=True):
            np.testing.assert_array_equal(tight[number](), codes)
            assert engine.stats().session_bytes <= whole // 3
        assert engine.stats().sessions_evicted > 8
        read_tight = engine.stats().prefill_positions
    with engine_of(0) as (engine, _):
        none = [conversation(engine, number) for number in range(8)]
        for number, codes in zip(order, expected, strict=True):
            np.testing.assert_array_equal(none[number](), codes)
            assert engine.stats().session_bytes == 0
        assert engine.stats().prefill_positions > read_tight


def test_who_spoke_longest_ago_reads_again() -> None:
    with engine_of(10**9) as (engine, _):
        says(first := engine.session(), "Hello.")
        turn = engine.stats().session_bytes
        first.hear_sync("x")
        longer = engine.stats().session_bytes
    with engine_of(turn + longer + POSITION_BYTES) as (engine, _):
        sessions = [engine.session() for _ in range(3)]
        for session in sessions[:2]:
            says(session, "Hello.")
        sessions[0].hear_sync("x")  # now the second one is the oldest
        says(sessions[2], "Hello.")
        assert [session.stats.cached_positions > 0 for session in sessions] == [True, False, True]
        assert [session.stats.rebuilds for session in sessions] == [0, 1, 0]
        assert engine.stats().session_bytes == turn + longer
        assert engine.stats().sessions_evicted == 1


def test_one_that_does_not_fit_by_itself_leaves_the_others_theirs() -> None:
    with engine_of(1000) as (engine, _):
        sessions = [engine.session() for _ in range(4)]
        for session in sessions:
            says(session, "Hi.")
        before = engine.stats().session_bytes
        long = engine.session()
        long.hear_sync("A turn of many words. " * 20)
        assert long.stats.cached_positions == 0
        assert engine.stats().session_bytes == before > 0
        assert engine.stats().sessions_evicted == 1
        says(long, "And an answer.")
        assert [session.stats.rebuilds for session in sessions] == [0, 0, 0, 0]


def test_what_is_gone_already_is_not_evicted() -> None:
    with engine_of(10**9) as (engine, _):
        session = engine.session()
        says(session, "Hello.")
        session._conversation.forget_read()
        engine._caches.limit_bytes = 300
        for _ in range(3):
            says(engine.session(), "Hello.")
        assert session.stats.rebuilds == 1
        assert engine.stats().session_bytes <= 300


def test_a_session_that_is_gone_takes_no_room() -> None:
    with engine_of(10**9) as (engine, _):
        session = engine.session()
        says(session, "Hello.")
        assert engine.stats().session_bytes > 0
        del session
        says(engine.session(), "Others go on.")
        gc.collect()
        assert engine.stats().session_bytes == 0


def test_evicted_in_the_middle_of_a_turn() -> None:
    """The turn that runs holds what it began behind; the one after reads all that was not kept."""
    with engine_of(10**9) as (engine, _):
        session = engine.session()
        expected = [says(session, "One."), says(session, "Two."), says(session, "Three.")]
    with engine_of(10**9) as (engine, _):
        session = engine.session()
        heard = [says(session, "One.")]
        stream = session.stream("Two.", seed=7, pace="full")
        chunks = [next(stream)]
        session._conversation.forget_read()
        heard += [codes_of([*chunks, *stream]), says(session, "Three.")]
        for codes, same in zip(heard, expected, strict=True):
            np.testing.assert_array_equal(codes, same)


def test_without_memory_for_a_copy_the_turn_is_whole_and_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def says_and_hears(engine: Engine) -> list[np.ndarray]:
        session = engine.session()
        answers = [says(session, "One.")]
        session.hear_sync("I see.")
        asyncio.run(session.hear("And?"))
        assert len(session.turns) == 3
        return [*answers, says(session, "Two.")]

    def fails(*given: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with engine_of(10**9) as (engine, _):
        expected = says_and_hears(engine)
    with engine_of(10**9) as (engine, steps):
        monkeypatch.setattr(steps, "copy_prefix", fails)
        for codes, same in zip(says_and_hears(engine), expected, strict=True):
            np.testing.assert_array_equal(codes, same)
        assert engine.stats().session_bytes == engine.stats().failed == 0


@pytest.mark.parametrize("wrong", [-1, 1.5, "1 GB", True])
def test_what_is_no_number_of_bytes_is_refused(wrong: object) -> None:
    with pytest.raises(errors.RequestError, match="session_bytes must be a whole number"):
        Engine(quick_runtime(QuickSteps(1), 1), session_bytes=wrong)  # type: ignore[arg-type]


def test_by_default_it_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aloud.memory.free_bytes", lambda device: 1000)
    with engine_of(None) as (engine, _):
        assert engine._caches.limit_bytes == 500
    monkeypatch.setattr("aloud.memory.free_bytes", lambda device: None)
    with engine_of(None) as (engine, _):
        assert engine._caches.limit_bytes == 1024**3
