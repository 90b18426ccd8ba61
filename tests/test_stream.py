"""Streaming: the same speech as in one piece, each frame as soon as it is made, and none made that nobody asked for."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from aloud import Audio, Guards, Runtime, Segment, SpeechStream
from aloud.models.csm import Csm, CsmState
from oracle import csm as oracle
from scripted import ScriptedModel, runtime_of, said


@pytest.fixture(scope="module")
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    seed: int = request.config.getoption("--seed")
    model = oracle.random_model(oracle.small_config(), seed)
    return Runtime.load(oracle.save(model, tmp_path_factory.mktemp("checkpoint")), device="cpu")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every call of the real model's draw()."""
    calls: list[int] = []
    draw = Csm.draw

    def counted(self: Csm, state: CsmState, slots: torch.Tensor) -> torch.Tensor:
        calls.append(len(slots))
        return draw(self, state, slots)

    monkeypatch.setattr(Csm, "draw", counted)
    return calls


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_stream_is_the_speech_in_pieces(runtime: Runtime, temperature: float, seed: int) -> None:
    arguments = {
        "speaker": 2,
        "context": [Segment("Hi there.", oracle.speech_like(0.6, seed), 1)],
        "temperature": temperature,
        "top_k": 30,
        "seed": seed,
        "max_seconds": 1.6,
    }
    whole = runtime.speak("Hello from Aloud.", **arguments)  # type: ignore[arg-type]
    stream = runtime.stream("Hello from Aloud.", **arguments)  # type: ignore[arg-type]
    chunks = list(stream)
    joined = Audio.concatenate(chunks)
    np.testing.assert_array_equal(joined.samples, whole.samples)
    np.testing.assert_array_equal(joined.codes, whole.codes)
    assert joined.seed == whole.seed == stream.seed == seed
    assert stream.finish_reason == whole.finish_reason
    assert [len(chunk.samples) for chunk in chunks] == [1920] * len(chunks)
    assert {chunk.sample_rate for chunk in chunks} == {24_000}


def test_each_chunk_comes_after_its_own_frame(runtime: Runtime, computed: list[int]) -> None:
    stream = runtime.stream("Hello.", max_seconds=0.8)
    assert computed == []
    for count in (1, 2, 3):
        next(stream)
        assert computed == [1] * count
    assert stream.finish_reason is None


def test_a_stream_that_is_closed_computes_no_more(runtime: Runtime, computed: list[int]) -> None:
    stream = runtime.stream("Hello.", max_seconds=0.8)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.finish_reason is None
    with runtime.stream("Hello.", max_seconds=0.8) as stream:
        next(stream)
        next(stream)
    assert list(stream) == []
    assert computed == [1] * 3
    runtime.stream("Hello.").close()  # before the first chunk


def test_a_stream_has_a_slot_from_its_first_chunk_until_it_is_closed(runtime: Runtime) -> None:
    loop, _ = runtime._running()
    stream = runtime.stream("Hello.", max_seconds=0.8)
    assert loop.is_idle  # nothing is held before the first chunk is asked for
    next(stream)
    assert not loop.is_idle
    stream.close()
    assert loop.is_idle
    forgotten = runtime.stream("Hello.", max_seconds=0.8)
    next(forgotten)
    assert not loop.is_idle
    del forgotten
    gc.collect()
    assert loop.is_idle


def test_two_streams_in_turns_do_not_mix(runtime: Runtime, seed: int) -> None:
    def stream(which: int) -> SpeechStream:
        return runtime.stream(("Hello.", "How are you today?")[which], seed=seed + which, max_seconds=0.8)

    expected = [Audio.concatenate(list(stream(which))) for which in (0, 1)]
    in_turns = list(zip(stream(0), stream(1), strict=True))
    for which in (0, 1):
        joined = Audio.concatenate([chunks[which] for chunks in in_turns])
        np.testing.assert_array_equal(joined.codes, expected[which].codes)
        np.testing.assert_array_equal(joined.samples, expected[which].samples)


@pytest.mark.parametrize(
    ("frames", "arguments", "reason", "chunks"),
    [(5, {}, "end", 5), (9, {"max_seconds": 0.4}, "length", 5), (99, {"text": "a"}, "text_length", 53)],
    ids=["end", "length", "guard"],
)
def test_why_a_stream_ended(frames: int, arguments: dict, reason: str, chunks: int) -> None:
    runtime = runtime_of(ScriptedModel({1: [said(code) for code in range(1, frames + 1)]}))
    stream = runtime.stream(**{"text": "Hello.", "seed": 1, **arguments})
    received = list(stream)
    assert len(received) == chunks
    assert stream.finish_reason == reason
    # Whether a frame is the last is known with it, unless the model ends by itself.
    assert [chunk.finish_reason for chunk in received] == [None] * (chunks - 1) + [None if reason == "end" else reason]


def test_a_silent_tail_is_not_taken_back() -> None:
    script = [said(1), said(2)] + [said(code, 0.0) for code in range(100, 160)]
    stream = runtime_of(ScriptedModel({1: script})).stream("A text of some length.", seed=1)
    assert len(list(stream)) == 2 + 38
    assert stream.finish_reason == "silence"
    off = runtime_of(ScriptedModel({1: script})).stream("A text of some length.", seed=1, guards=Guards.off())
    assert len(list(off)) == 62


def test_a_stream_that_begins_with_the_end_takes_the_next_seed() -> None:
    model = ScriptedModel({5: [], 6: [said(1), said(2)]})
    stream = runtime_of(model).stream("Hello.", seed=5)
    assert stream.seed == 5
    first = next(stream)
    assert (first.seed, stream.seed) == (6, 6)
    assert [int(chunk.codes[0, 0]) for chunk in (first, *stream) if chunk.codes is not None] == [1, 2]
    assert stream.finish_reason == "end"
