"""The loop: each stream its own end, none stepped once more than needed, memory exactly as much as frames need."""

from __future__ import annotations

import pytest
import torch

from aloud.engine.loop import Delivery, Job, run
from aloud.errors import LogitsNotFinite
from aloud.request import Guards, Prompt, Sampling
from scripted import CODEBOOKS, FRAME_RATE, NOT_FINITE, Frame, ScriptedModel, said


def job(seed: int, max_frames: int = 100, positions: int = 5, guards: Guards | None = None) -> Job:
    prompt = Prompt(torch.arange(positions), torch.zeros(positions, CODEBOOKS, dtype=torch.int64))
    return Job(prompt, Sampling(), seed, max_frames, guards or Guards.off(), text_limit_frames=None)


def words(*codes: int) -> list[Frame]:
    return [said(code) for code in codes]


def summary(deliveries: list[Delivery]) -> list[tuple[int, int | None, str | None]]:
    """(stream, its code, why it ended) of each delivery."""
    return [(d.job, None if d.spoken is None else int(d.spoken.codes[0]), d.finish_reason) for d in deliveries]


def test_each_stream_ends_by_itself_and_is_not_stepped_again() -> None:
    model = ScriptedModel({1: words(11, 12), 2: words(21), 3: words(31, 32, 33, 34)})
    jobs = [job(1), job(2), job(3, max_frames=3)]
    assert summary(list(run(model, jobs, FRAME_RATE))) == [
        (0, 11, None),
        (1, 21, None),
        (2, 31, None),
        (0, 12, None),
        (1, None, "end"),
        (2, 32, None),
        (0, None, "end"),
        (2, 33, "length"),
    ]
    assert model.ticks == [[0, 1, 2], [0, 1, 2], [0, 2]]


def test_an_end_in_the_first_frame_delivers_no_frame() -> None:
    model = ScriptedModel({1: []})
    assert summary(list(run(model, [job(1)], FRAME_RATE))) == [(0, None, "end")]


def test_the_end_of_speech_is_not_looked_for_beyond_the_length() -> None:
    model = ScriptedModel({1: words(11, 12)})
    assert summary(list(run(model, [job(1, max_frames=2)], FRAME_RATE)))[-1] == (0, 12, "length")
    assert len(model.ticks) == 2


def test_a_frame_is_computed_when_it_is_asked_for() -> None:
    model = ScriptedModel()
    deliveries = run(model, [job(1)], FRAME_RATE)
    assert model.ticks == []
    next(deliveries)
    assert len(model.ticks) == 1
    next(deliveries)
    assert len(model.ticks) == 2
    deliveries.close()
    assert len(model.ticks) == 2


@pytest.mark.parametrize(
    ("sizes", "needed"),
    [([(5, 1)], 5), ([(1, 1)], 1), ([(5, 10)], 14), ([(5, 10), (20, 2), (1, 21)], 21)],
    ids=["one frame", "one position", "ten frames", "the longest of several"],
)
def test_memory_is_for_prompt_and_frames_but_the_last_frame(sizes: list[tuple[int, int]], needed: int) -> None:
    model = ScriptedModel()
    jobs = [job(seed, max_frames, positions) for seed, (positions, max_frames) in enumerate(sizes)]
    for _ in run(model, jobs, FRAME_RATE):
        pass  # the scripted model fails when a frame reads beyond its memory
    assert [(state.positions, len(state.slots)) for state in model.states] == [(needed, len(sizes))]
    assert [slot.frames for slot in model.states[0].slots if slot] == [max_frames for _, max_frames in sizes]


def test_guards_watch_each_stream_on_its_own() -> None:
    guards = Guards(text_seconds_per_byte=None)
    model = ScriptedModel({1: words(*[5] * 40), 2: [said(code, 0.0) for code in range(1, 60)], 3: words(*[5] * 40)})
    ends = {
        d.job: d
        for d in run(model, [job(1, guards=guards), job(2, guards=guards), job(3)], FRAME_RATE)
        if d.finish_reason
    }
    assert {index: (d.finish_reason, d.spoken is None) for index, d in ends.items()} == {
        0: ("repeat", False),
        1: ("silence", False),
        2: ("end", True),
    }
    assert [slot.frames for slot in model.states[0].slots if slot] == [13, 38, 41]


def test_a_guard_and_the_length_in_one_frame_is_the_guard() -> None:
    model = ScriptedModel({1: words(*[5] * 40)})
    deliveries = list(run(model, [job(1, max_frames=13, guards=Guards())], FRAME_RATE))
    assert deliveries[-1].finish_reason == "repeat"


def test_logits_that_are_not_finite_name_the_request_and_the_frame() -> None:
    model = ScriptedModel({1: words(11, 12, 13), 2: [*words(21), NOT_FINITE]})
    received = []
    with pytest.raises(LogitsNotFinite, match=r"not finite in frame 2 of request 1\. Load it in float32"):
        received.extend(run(model, [job(1), job(2)], FRAME_RATE))


def test_sampling_and_seed_reach_the_model() -> None:
    model = ScriptedModel()
    sampling = Sampling(0.5, 3, 0.25, 7)
    prompt = Prompt(torch.arange(4), torch.zeros(4, CODEBOOKS, dtype=torch.int64))
    list(run(model, [Job(prompt, sampling, 2**64 - 1, 1, Guards.off(), None)], FRAME_RATE))
    (slot,) = model.states[0].slots
    assert slot is not None
    assert (slot.sampling, slot.seed, slot.prompt) == (sampling, 2**64 - 1, prompt)
