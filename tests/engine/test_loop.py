"""The loop: each stream its own end, none stepped once more than needed, slots used again, failures alone."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch

from aloud.engine.loop import Loop
from aloud.engine.slots import allocate_slots
from aloud.engine.steps import EagerSteps, Launched
from aloud.engine.stream import Job, Spoken, Stream
from aloud.errors import LogitsNotFinite, Overloaded, StepFailed
from aloud.request import Guards, Prompt, Sampling
from scripted import CODEBOOKS, FRAME_RATE, NOT_FINITE, Frame, ScriptedModel, State, said


def job(seed: int, max_frames: int = 100, positions: int = 5, guards: Guards | None = None) -> Job:
    prompt = Prompt(torch.arange(positions), torch.zeros(positions, CODEBOOKS, dtype=torch.int64))
    return Job(prompt, Sampling(), seed, max_frames, guards or Guards.off(), text_limit_frames=None)


def words(*codes: int) -> list[Frame]:
    return [said(code) for code in codes]


def loop_of(model: ScriptedModel, slots: int = 4, ahead: int = 0, batch_sizes: tuple[int, ...] | None = None) -> Loop:
    memory = allocate_slots(model, slots, None)
    steps: EagerSteps[State] = EagerSteps(model, memory, batch_sizes=batch_sizes or (1, 2, 3, 4), ahead=ahead)
    return Loop(steps, slots, FRAME_RATE)


def all_of(loop: Loop, stream: Stream) -> list[int]:
    """The first code of every frame of a stream until it is over."""
    codes = []
    while (spoken := loop.next(stream)) is not None:
        codes.append(first_code(spoken))
    return codes


def first_code(spoken: Spoken) -> int:
    return int(spoken.codes[0])


def next_code(loop: Loop, stream: Stream) -> int:
    spoken = loop.next(stream)
    assert spoken is not None
    return first_code(spoken)


def test_each_stream_ends_by_itself_and_is_not_stepped_again() -> None:
    model = ScriptedModel({1: words(11, 12), 2: words(21), 3: words(31, 32, 33, 34)})
    loop = loop_of(model)
    streams = [loop.submit(job(1)), loop.submit(job(2)), loop.submit(job(3, max_frames=3))]
    assert [all_of(loop, stream) for stream in streams] == [[11, 12], [21], [31, 32, 33]]
    assert [stream.finish_reason for stream in streams] == ["end", "end", "length"]
    assert [stream.frames for stream in model.started] == [3, 2, 3]
    assert loop.is_idle


def test_one_frame_ahead_costs_one_discarded_frame_after_an_end_and_none_after_a_length() -> None:
    model = ScriptedModel({1: words(11, 12), 2: words(21, 22, 23, 24)})
    loop = loop_of(model, ahead=1)
    streams = [loop.submit(job(1)), loop.submit(job(2, max_frames=3))]
    assert [all_of(loop, stream) for stream in streams] == [[11, 12], [21, 22, 23]]
    assert [stream.frames for stream in model.started] == [4, 3]


def test_a_slot_is_used_again_while_a_frame_of_its_last_stream_is_in_flight() -> None:
    model = ScriptedModel({1: words(11), 2: words(21, 22), 3: words(31)})
    loop = loop_of(model, slots=1, ahead=1, batch_sizes=(1,))
    streams = [loop.submit(job(seed)) for seed in (1, 2, 3)]
    assert [all_of(loop, stream) for stream in streams] == [[11], [21, 22], [31]]
    assert len(model.started) == 3


def test_an_end_in_the_first_frame_is_no_frame() -> None:
    loop = loop_of(ScriptedModel({1: []}))
    stream = loop.submit(job(1))
    assert loop.next(stream) is None
    assert stream.finish_reason == "end"


def test_a_frame_is_computed_when_it_is_asked_for() -> None:
    model = ScriptedModel()
    loop = loop_of(model)
    stream = loop.submit(job(1))
    assert model.ticks == []
    for count in (1, 2):
        loop.next(stream)
        assert len(model.ticks) == count
    loop.cancel(stream)
    assert (len(model.ticks), stream.finish_reason, loop.is_idle) == (2, "cancelled", True)
    assert loop.next(stream) is None


def test_more_streams_than_slots_take_turns() -> None:
    model = ScriptedModel({seed: words(*range(seed, seed + seed % 4)) for seed in range(1, 20)})
    loop = loop_of(model, slots=3)
    streams = {seed: loop.submit(job(seed)) for seed in range(1, 20)}
    for seed, stream in streams.items():
        assert all_of(loop, stream) == list(range(seed, seed + seed % 4))
    assert max(slot for tick in model.ticks for slot in tick) == 2
    assert loop.is_idle


def test_rows_beyond_the_largest_batch_take_turns() -> None:
    model = ScriptedModel({seed: words(*range(10 * seed, 10 * seed + 6)) for seed in range(1, 5)})
    loop = loop_of(model, slots=4, batch_sizes=(1, 2))
    streams = {seed: loop.submit(job(seed)) for seed in range(1, 5)}
    for seed, stream in streams.items():
        assert all_of(loop, stream) == list(range(10 * seed, 10 * seed + 6))
    assert max(map(len, model.ticks)) == 2


def test_unused_rows_of_a_batch_are_the_scratch_slots() -> None:
    model = ScriptedModel({1: words(11, 12), 2: words(21), 3: words(31)})
    loop = loop_of(model, slots=5, batch_sizes=(4, 8))
    streams = [loop.submit(job(seed)) for seed in (1, 2, 3)]
    assert [all_of(loop, stream) for stream in streams] == [[11, 12], [21], [31]]
    assert {len(tick) for tick in model.ticks} == {4}
    assert all(tick.count(slot) <= 1 for tick in model.ticks for slot in range(5))
    assert {slot for tick in model.ticks for slot in tick} == {0, 1, 2, 5}


def test_a_long_prompt_is_read_in_passes() -> None:
    model = ScriptedModel({1: words(11)})
    loop = loop_of(model)
    stream = loop.submit(job(1, positions=700))
    assert all_of(loop, stream) == [11]
    assert model.started[0].read == dict(enumerate(range(700)))


def test_a_prefix_is_read_once() -> None:
    model = ScriptedModel({1: words(11)})
    loop = loop_of(model)
    first = Prompt(torch.arange(100, 140), torch.zeros(40, CODEBOOKS, dtype=torch.int64))
    reading = loop.submit(Job(first, Sampling(), 0, 0, Guards.off(), None, keeps_cache=True))
    assert all_of(loop, reading) == []
    assert reading.prefix is not None
    second = Prompt(torch.arange(7), torch.zeros(7, CODEBOOKS, dtype=torch.int64))
    speaking = Job(second, Sampling(), 1, 5, Guards.off(), None, prefix=reading.prefix)
    assert all_of(loop, loop.submit(speaking)) == [11]
    assert [stream.prompt_positions for stream in model.started] == [40, 47]
    assert [model.started[1].read[position] for position in range(47)] == [*range(100, 140), *range(7)]


@pytest.mark.parametrize(("script", "frames"), [(2, 2), (9, 3)], ids=["ended by itself", "cut"])
def test_a_kept_cache_is_of_what_has_certainly_been_read(script: int, frames: int) -> None:
    model = ScriptedModel({1: words(*range(1, script + 1))})
    loop = loop_of(model)
    prompt = Prompt(torch.arange(5), torch.zeros(5, CODEBOOKS, dtype=torch.int64))
    stream = loop.submit(Job(prompt, Sampling(), 1, 3, Guards.off(), None, keeps_cache=True))
    assert len(all_of(loop, stream)) == frames
    assert stream.prefix is not None
    # A frame is read by the step that draws the one after it, or the end.
    assert (
        len(stream.prefix.cache)
        == stream.prefix.positions
        == 5 + (frames if stream.finish_reason == "end" else frames - 1)
    )


def test_guards_watch_each_stream_on_its_own() -> None:
    guards = Guards(text_seconds_per_byte=None)
    model = ScriptedModel({1: words(*[5] * 40), 2: [said(code, 0.0) for code in range(1, 60)], 3: words(*[5] * 40)})
    loop = loop_of(model)
    streams = [loop.submit(job(1, guards=guards)), loop.submit(job(2, guards=guards)), loop.submit(job(3))]
    assert [len(all_of(loop, stream)) for stream in streams] == [13, 38, 40]
    assert [stream.finish_reason for stream in streams] == ["repeat", "silence", "end"]
    assert [stream.frames for stream in model.started] == [13, 38, 41]


def test_a_guard_and_the_length_in_one_frame_is_the_guard() -> None:
    loop = loop_of(ScriptedModel({1: words(*[5] * 40)}))
    stream = loop.submit(job(1, max_frames=13, guards=Guards()))
    assert len(all_of(loop, stream)) == 13
    assert stream.finish_reason == "repeat"


def test_logits_that_are_not_finite_fail_their_stream_alone() -> None:
    model = ScriptedModel({1: words(11, 12, 13), 2: [*words(21), NOT_FINITE]})
    loop = loop_of(model)
    well, ill = loop.submit(job(1)), loop.submit(job(2))
    assert next_code(loop, ill) == 21
    with pytest.raises(LogitsNotFinite, match=r"not finite in frame 2\. Load it in float32"):
        loop.next(ill)
    assert all_of(loop, well) == [11, 12, 13]
    assert loop.is_idle


@pytest.mark.parametrize("what", ["start", "prefill", "draw", "decode"])
def test_a_step_that_fails_fails_its_streams_and_the_loop_goes_on(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScriptedModel({1: words(11, 12), 2: words(21, 22), 3: words(31)})
    loop = loop_of(model)
    before = loop.submit(job(1))
    assert next_code(loop, before) == 11
    after = loop.submit(job(2))

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedModel, what, fail)
        with pytest.raises(StepFailed, match=r"^A step of the model failed: RuntimeError: the device is gone\."):
            loop.next(after)
    if what in ("start", "prefill"):  # which are the other's alone
        assert all_of(loop, before) == [12]
    else:
        with pytest.raises(StepFailed):
            loop.next(before)
    assert loop.is_idle
    assert all_of(loop, loop.submit(job(3))) == [31]


def test_an_interrupt_ends_the_streams_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScriptedModel({1: words(11, 12), 3: words(31)})
    loop = loop_of(model)
    stream = loop.submit(job(1))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedModel, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loop.next(stream)
    with pytest.raises(StepFailed):
        loop.next(stream)
    assert loop.is_idle
    assert all_of(loop, loop.submit(job(3))) == [31]


def test_a_stream_that_nobody_takes_from_holds_back_itself_alone() -> None:
    model = ScriptedModel()
    loop = loop_of(model)
    idle, busy = loop.submit(job(1, max_frames=200)), loop.submit(job(2, max_frames=200))
    assert len(all_of(loop, busy)) == 200
    assert len(idle.frames) == 64
    assert len(all_of(loop, idle)) == 200
    assert [stream.frames for stream in model.started] == [200, 200]


def test_frames_that_nobody_takes_do_not_keep_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand streams' frame is megabytes; one of them that is taken late keeps kilobytes of it."""
    batches: list[weakref.ref[np.ndarray]] = []
    launch = EagerSteps.launch

    def watched(self: EagerSteps[State], slots: np.ndarray) -> Launched:
        launched = launch(self, slots)
        batches.append(weakref.ref(launched.read().samples))
        return launched

    monkeypatch.setattr(EagerSteps, "launch", watched)
    loop = loop_of(ScriptedModel())
    late = [loop.submit(job(seed, max_frames=100)) for seed in range(3)]
    ended = loop.submit(job(9, max_frames=5))
    most = 0
    for _ in range(70):
        loop.step()
        most = max(most, sum(batch() is not None for batch in batches))
    assert len(batches) >= 64
    assert most <= 2  # the newest, while it is handed out
    assert sum(batch() is not None for batch in batches) == 0  # those that are held or over keep none
    assert [len(stream.frames) for stream in late] == [64, 64, 64]
    assert [all_of(loop, stream) for stream in late] == [[*range(1, 100), 1]] * 3
    assert all_of(loop, ended) == [1, 2, 3, 4, 5]


def test_waiting_for_a_slot_that_nobody_will_free_is_an_error() -> None:
    loop = loop_of(ScriptedModel(), slots=1)
    loop.stuck_after_seconds = 0.1
    untaken, waiting = loop.submit(job(1, max_frames=200)), loop.submit(job(2, max_frames=200))
    with pytest.raises(Overloaded, match=r"All 1 slots have streams whose frames nobody takes\. Take them, close"):
        loop.next(waiting)
    loop.cancel(untaken)
    assert next_code(loop, waiting) == 1


def test_threads_that_wait_together_each_get_their_own() -> None:
    model = ScriptedModel({seed: words(*(seed + 10 * step for step in range(20))) for seed in range(1, 10)})
    loop = loop_of(model, slots=4)
    received: dict[int, list[int]] = {}

    def listen(seed: int) -> None:
        received[seed] = all_of(loop, loop.submit(job(seed)))

    threads = [threading.Thread(target=listen, args=(seed,)) for seed in range(1, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert received == {seed: [seed + 10 * step for step in range(20)] for seed in range(1, 10)}
    assert loop.is_idle


def test_sampling_and_seed_reach_the_model() -> None:
    model = ScriptedModel()
    loop = loop_of(model)
    sampling = Sampling(0.5, 3, 0.25, 7)
    prompt = Prompt(torch.arange(4), torch.zeros(4, CODEBOOKS, dtype=torch.int64))
    all_of(loop, loop.submit(Job(prompt, sampling, 2**64 - 1, 1, Guards.off(), None)))
    (slot,) = model.started
    assert (slot.sampling, slot.seed, slot.prompt_positions) == (sampling, 2**64 - 1, 4)


def test_what_is_taken_is_a_copy() -> None:
    loop = loop_of(ScriptedModel())
    streams = [loop.submit(job(seed)) for seed in (1, 2, 3)]
    spoken = loop.next(streams[0])
    assert spoken is not None
    assert spoken.samples.base is None
    assert spoken.codes.base is None
    assert spoken.samples.nbytes < np.zeros(100).nbytes
