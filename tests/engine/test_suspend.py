"""Full pace takes what is left: its streams give their slots to those of real time, and go on as if they had not."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from aloud.engine.loop import Loop
from aloud.engine.slots import allocate_slots
from aloud.engine.steps import EagerSteps
from aloud.engine.stream import BUFFERED_FRAMES, Job, Stream
from aloud.errors import Overloaded, StepFailed
from aloud.request import Guards, Prompt, Sampling
from scripted import CODEBOOKS, FRAME_RATE, Frame, ScriptedModel, State, said

LEAD_SECONDS = 60.0
"""Long enough for a stream never to wait for its listener."""


def job(seed: int, *, realtime: bool = False, goes_on: bool = False, guards: Guards | None = None) -> Job:
    prompt = Prompt(torch.arange(5), torch.zeros(5, CODEBOOKS, dtype=torch.int64))
    lead = LEAD_SECONDS if realtime else None
    guards = guards or Guards.off()
    return Job(prompt, Sampling(), seed, 100, guards, None, lead_seconds=lead, goes_on=goes_on)


def words(*codes: int) -> list[Frame]:
    return [said(code) for code in codes]


class Memory:
    """Steps whose copies of streams can be made to fail."""

    def __init__(self, script: dict[int, Sequence[Frame]], slots: int = 1, ahead: int = 0) -> None:
        self.model = ScriptedModel(script)
        steps: EagerSteps[State] = EagerSteps(
            self.model, allocate_slots(self.model, slots, None), batch_sizes=(1, 2, 3, 4), ahead=ahead
        )
        self.loop = Loop(steps, slots, FRAME_RATE)

    def steps_until(self, stream: Stream, frames: int) -> None:
        """Until a stream has so many frames that nobody has taken, or is over."""
        for _ in range(300):
            if stream.is_over or len(stream.frames) >= frames:
                return
            self.loop.step()
        raise AssertionError("it never came")

    def rest_of(self, stream: Stream) -> list[int]:
        """The first code of each frame that has not been taken."""
        codes = []
        while (spoken := self.loop.next(stream)) is not None:
            codes.append(int(spoken.codes[0]))
        return codes


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_real_time_gets_the_slot_within_a_frame(frames: int, ahead: int) -> None:
    memory = Memory({1: words(11, 12, 13, 14, 15, 16, 17, 18, 19), 2: words(21, 22)}, ahead=ahead)
    slow = memory.loop.submit(job(1))
    memory.steps_until(slow, frames)
    launched = memory.model.started[0].frames
    live = memory.loop.submit(job(2, realtime=True))
    while len(memory.model.started) < 2:
        memory.loop.step()
    assert memory.model.started[0].frames == launched  # what was in flight is read, and no more is launched
    assert memory.rest_of(live) == [21, 22]
    assert memory.rest_of(slow) == [11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert (slow.finish_reason, memory.loop.counts.suspended) == ("end", 1)
    assert memory.loop.is_idle
    assert memory.loop.counts.accepted == memory.loop.counts.finished == 2


def test_only_as_many_as_are_wanted_give_their_slots_the_youngest_first() -> None:
    memory = Memory({9: words(91)}, slots=3)
    streams = [memory.loop.submit(job(1))]
    memory.steps_until(streams[0], 3)
    streams.append(memory.loop.submit(job(2)))
    memory.steps_until(streams[0], 5)
    streams.append(memory.loop.submit(job(3)))
    memory.steps_until(streams[0], 6)
    live = memory.loop.submit(job(9, realtime=True))
    memory.steps_until(live, 1)
    assert [stream.suspended is not None for stream in streams] == [False, False, True]
    assert memory.loop.waiting == 1
    while any(stream.suspended for stream in streams):
        memory.loop.step()
    assert memory.loop.counts.suspended == 1
    assert [memory.rest_of(stream) for stream in streams] == [[*range(1, 100), 1]] * 3


def test_no_slot_is_given_while_there_is_a_free_one_nor_to_full_pace() -> None:
    memory = Memory({1: words(11, 12, 13), 2: words(21, 22), 3: words(31)}, slots=2)
    streams = [memory.loop.submit(job(1)), memory.loop.submit(job(2, realtime=True)), memory.loop.submit(job(3))]
    assert [memory.rest_of(stream) for stream in streams] == [[11, 12, 13], [21, 22], [31]]
    assert memory.loop.counts.suspended == 0


def test_who_gives_a_slot_while_its_prompt_is_read_counts_once_as_one_with_a_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Memory({1: words(11), 2: words(21), 3: words(31)})
    before = memory.loop.submit(replace(job(3), keeps_cache=True))
    assert memory.rest_of(before) == [31]
    monkeypatch.setattr(memory.loop.scheduler, "prefill_positions", lambda *_: 0)
    slow = memory.loop.submit(replace(job(1), prefix=before.prefix))
    memory.loop.step()
    assert slow.slot == 0
    live = memory.loop.submit(job(2, realtime=True))
    memory.loop.step()
    assert slow.slot == -1
    monkeypatch.undo()
    assert (memory.rest_of(live), memory.rest_of(slow)) == ([21], [11])
    assert memory.loop.counts.with_prefix == 1


def test_one_that_plays_in_real_time_gives_no_slot() -> None:
    memory = Memory({1: words(11, 12, 13), 2: words(21)})
    playing, waiting = memory.loop.submit(job(1, realtime=True)), memory.loop.submit(job(2, realtime=True))
    memory.steps_until(playing, 1)
    assert waiting.slot == -1
    assert [memory.rest_of(stream) for stream in (playing, waiting)] == [[11, 12, 13], [21]]
    assert memory.loop.counts.suspended == 0


def test_those_that_nobody_takes_from_give_theirs_first_and_keep_what_they_have() -> None:
    memory = Memory({2: words(21)}, slots=2)
    busy, held = memory.loop.submit(job(1)), memory.loop.submit(job(3))
    taken = 0
    while not held.held:
        memory.loop.step()
        taken += memory.loop.take(busy) is not None
    young = taken  # `busy` is not older than `held`: without the rule it would have been either
    live = memory.loop.submit(job(2, realtime=True))
    memory.steps_until(live, 1)
    assert (held.suspended is not None, busy.suspended) == (True, None)
    assert len(held.frames) >= BUFFERED_FRAMES
    assert memory.rest_of(live) == [21]
    for _ in range(5):
        memory.loop.step()
    assert held.slot >= 0
    assert held.held  # in its new slot, too
    launched = [stream.frames for stream in memory.model.started if stream.seed == 3]
    for _ in range(5):
        memory.loop.step()
    assert [stream.frames for stream in memory.model.started if stream.seed == 3] == launched
    assert memory.rest_of(held) == [*range(1, 100), 1]
    assert len(memory.rest_of(busy)) == 100 - young


def test_its_consumer_may_take_all_of_it_while_it_is_suspended() -> None:
    memory = Memory({2: words(*range(50, 90))})
    held = memory.loop.submit(job(1))
    while not held.held:
        memory.loop.step()
    live = memory.loop.submit(job(2, realtime=True))
    memory.steps_until(live, 1)
    before = 0
    while memory.loop.take(held) is not None:
        before += 1
    memory.loop.step()
    assert (held.held, held.suspended is not None) == (False, True)
    assert memory.rest_of(live) == list(range(50, 90))
    assert len(memory.rest_of(held)) == 100 - before


@pytest.mark.parametrize("ahead", [0, 1])
def test_cancelled_while_it_gives_its_slot_or_waits_for_another(ahead: int) -> None:
    for ticks in range(4):
        memory = Memory({2: words(21, 22, 23)}, ahead=ahead)
        slow = memory.loop.submit(job(1))
        memory.steps_until(slow, 2)
        live = memory.loop.submit(job(2, realtime=True))
        for _ in range(ticks):
            memory.loop.step()
        memory.loop.cancel(slow)
        assert (slow.finish_reason, slow.suspended) == ("cancelled", None)
        assert memory.rest_of(live) == [21, 22, 23]
        assert memory.loop.is_idle


def test_who_wanted_the_slot_is_cancelled() -> None:
    memory = Memory({}, ahead=1)
    slow = memory.loop.submit(job(1))
    memory.steps_until(slow, 2)
    live = memory.loop.submit(job(2, realtime=True))
    memory.loop.step()
    assert slow.gives_slot
    memory.loop.cancel(live)
    assert memory.rest_of(slow) == [*range(1, 100), 1]
    assert memory.loop.is_idle


GUARDED: dict[str, tuple[list[Frame], Job]] = {
    "silence": (
        [said(1), *(said(code, 0.0) for code in range(2, 20))],
        job(1, guards=replace(Guards.off(), silence_seconds=5 / FRAME_RATE, silence_dbfs=-60.0)),
    ),
    "repeat": (
        [said(1), *(said(7) for _ in range(20))],
        job(1, guards=replace(Guards.off(), repeat_seconds=5 / FRAME_RATE)),
    ),
    "text_length": ([said(code) for code in range(1, 20)], replace(job(1), text_limit_frames=6)),
    "length": ([said(code) for code in range(1, 20)], replace(job(1), max_frames=6)),
}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("reason", GUARDED)
def test_what_ends_it_goes_on_counting(reason: str, ahead: int) -> None:
    script, guarded = GUARDED[reason]
    alone = Memory({1: script}, ahead=ahead)
    expected = alone.rest_of(alone.loop.submit(guarded))
    memory = Memory({1: script, 2: words(21)}, ahead=ahead)
    slow = memory.loop.submit(guarded)
    memory.steps_until(slow, 3)
    assert memory.rest_of(memory.loop.submit(job(2, realtime=True))) == [21]
    assert memory.rest_of(slow) == expected
    assert (slow.finish_reason, memory.loop.counts.suspended) == (reason, 1)
    assert memory.model.started[0].frames == alone.model.started[0].frames  # not one more is launched


def test_a_prompt_that_is_being_read_gives_its_slot_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagerSteps, "prefill_sizes", (4,))
    memory = Memory({1: words(11, 12), 2: words(21, 22)})
    prompt = Prompt(torch.arange(50), torch.zeros(50, CODEBOOKS, dtype=torch.int64))
    monkeypatch.setattr(memory.loop.scheduler, "prefill_positions", lambda now, planned, urgent: 0 if planned else 4)
    slow = memory.loop.submit(replace(job(1), prompt=prompt))
    for _ in range(5):
        memory.loop.step()
    assert 0 < slow.read_positions < 50
    live, later = memory.loop.submit(job(2, realtime=True)), memory.loop.submit(job(2))
    memory.steps_until(live, 1)
    assert (slow.slot, slow.read_positions) == (-1, 0)
    assert memory.rest_of(live) == [21, 22]
    assert memory.rest_of(slow) == [11, 12]
    assert not later.frames  # it came after
    assert memory.rest_of(later) == [21, 22]
    assert memory.loop.is_idle


def test_who_only_listens_does_not_wait_for_full_pace() -> None:
    """A session hears before it answers, and the answer is live."""
    memory = Memory({}, slots=2)
    memory.loop.max_waiting = 0
    slow = [memory.loop.submit(job(seed), is_refusable=True) for seed in (1, 2)]
    memory.steps_until(slow[1], 2)
    hearing = memory.loop.submit(replace(job(3), max_frames=0, keeps_cache=True), is_refusable=True)
    for _ in range(3):
        memory.loop.step()
    assert (hearing.finish_reason, hearing.error) == ("length", None)
    assert hearing.prefix is not None
    assert [len(memory.rest_of(stream)) for stream in slow] == [100, 100]


def test_where_one_copy_finds_no_memory_another_may(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory({9: words(91)}, slots=2)
    held = [memory.loop.submit(job(seed)) for seed in (1, 2)]
    while not all(stream.held for stream in held):
        memory.loop.step()
    copy, asked = memory.model.copy_stream, []

    def fails_once(state: State, slot: int, positions: int) -> tuple[torch.Tensor, ...]:
        asked.append(slot)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy(state, slot, positions)

    monkeypatch.setattr(memory.model, "copy_stream", fails_once)
    live = memory.loop.submit(job(9, realtime=True))
    assert memory.loop.step() == 0.0
    assert len(live.frames) == 1
    assert len(set(asked)) == 2


def test_without_memory_for_a_copy_it_keeps_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory({1: words(11, 12, 13, 14), 2: words(21)}, ahead=1)
    asked = []

    def fails(*given: object) -> tuple[torch.Tensor, ...]:
        asked.append(given)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory.model, "copy_stream", fails)
    slow = memory.loop.submit(job(1))
    memory.steps_until(slow, 1)
    live = memory.loop.submit(job(2, realtime=True))
    assert [memory.rest_of(stream) for stream in (slow, live)] == [[11, 12, 13, 14], [21]]
    assert len(asked) == 1  # and not at every tick


def test_a_copy_that_fails_is_its_own_streams_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("the device has a fault")

    for step in ("copy_stream", "paste_stream"):
        memory = Memory({1: words(11, 12, 13, 14), 2: words(21), 3: words(31)})
        monkeypatch.setattr(memory.model, step, fails)
        slow = memory.loop.submit(job(1))
        memory.steps_until(slow, 1)
        live, later = memory.loop.submit(job(2, realtime=True)), memory.loop.submit(job(3))
        assert [memory.rest_of(stream) for stream in (live, later)] == [[21], [31]]
        with pytest.raises(StepFailed, match="the device has a fault"):
            memory.rest_of(slow)
        assert memory.loop.is_idle


def test_the_copy_is_let_go() -> None:
    memory = Memory({1: words(11, 12, 13), 2: words(21)})
    slow = memory.loop.submit(job(1))
    memory.steps_until(slow, 1)
    live = memory.loop.submit(job(2, realtime=True))
    memory.steps_until(live, 1)
    assert slow.suspended is not None
    copy = weakref.ref(slow.suspended)
    assert memory.rest_of(slow) == [11, 12, 13]
    assert copy() is None


# --- who waits --------------------------------------------------------------------------------------------------------


def test_real_time_goes_before_what_goes_on_at_full_pace() -> None:
    memory = Memory({seed: words(10 * seed) for seed in range(1, 6)})
    streams = [
        memory.loop.submit(job(1, goes_on=True)),  # the next piece of a text that nobody listens to yet
        memory.loop.submit(job(2)),
        memory.loop.submit(job(3, realtime=True)),
        memory.loop.submit(job(4, realtime=True, goes_on=True)),
        memory.loop.submit(job(5, goes_on=True)),
    ]
    for stream in streams:
        memory.rest_of(stream)
    assert [stream.seed for stream in memory.model.started] == [4, 3, 1, 5, 2]


def test_suspended_streams_go_on_before_new_ones_begin() -> None:
    memory = Memory({1: words(11, 12, 13), 2: words(21), 3: words(31)})
    first = memory.loop.submit(job(1))
    memory.steps_until(first, 1)
    second, live = memory.loop.submit(job(2)), memory.loop.submit(job(3, realtime=True))
    memory.steps_until(live, 1)
    while not second.frames:
        memory.loop.step()
    assert first.is_over


def test_where_nobody_may_wait_real_time_is_taken_and_full_pace_refused() -> None:
    memory = Memory({9: words(91)}, slots=2)
    memory.loop.max_waiting = 0
    slow = [memory.loop.submit(job(seed), is_refusable=True) for seed in (1, 2)]
    memory.steps_until(slow[1], 2)
    refused = memory.loop.submit(job(3), is_refusable=True)
    live = [memory.loop.submit(job(9, realtime=True), is_refusable=True) for _ in range(3)]
    memory.loop.step()
    assert isinstance(refused.error, Overloaded)
    assert [type(stream.error) for stream in live] == [type(None), type(None), Overloaded]
    assert [memory.rest_of(stream) for stream in live[:2]] == [[91], [91]]
    later = memory.loop.submit(job(9, realtime=True), is_refusable=True)
    assert memory.rest_of(later) == [91]
    assert [len(memory.rest_of(stream)) for stream in slow] == [100, 100]
    assert memory.loop.is_idle
