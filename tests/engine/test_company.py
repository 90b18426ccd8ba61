"""What a stream says depends on nothing but itself: not on its company, its row, its slot, or what was there before."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aloud import Guards, Runtime, Sampling, Segment
from aloud.engine.loop import Loop
from aloud.engine.slots import Slots
from aloud.engine.steps import EagerSteps
from aloud.engine.stream import Job, Stream
from aloud.memory import tensors_of
from aloud.models.csm import Csm, CsmState
from aloud.prepare import read_segments
from aloud.prompt_block import Piece, pack
from oracle import csm as oracle

TEXTS = ("Hi.", "Hello from Aloud, how are you today?", "One, two, three, four. " * 16)
SLOTS, POSITIONS = 6, 480


@dataclass(repr=False)
class Voices:
    """A model, some jobs of it, and what each says when it is alone in fresh memory."""

    model: Csm
    jobs: list[Job]
    alone: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


@pytest.fixture(scope="module")
def voices(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Voices:
    seed: int = request.config.getoption("--seed")
    config = oracle.small_config(codebooks=3, rope=oracle.LLAMA3, depth_rope=oracle.DEPTH_LLAMA3, positions=POSITIONS)
    folder = oracle.save(oracle.random_model(config, seed), tmp_path_factory.mktemp("checkpoint"))
    runtime = Runtime.load(folder, device="cpu")
    model, jobs = runtime._model, []
    for number in range(9):
        segments = [Segment(TEXTS[number % 3], speaker=number % 2)]
        prompt, _ = read_segments(model, runtime._tokenizer, segments, max_positions=POSITIONS)
        sampling = Sampling(0.9, 20, 0.8, 0) if number % 2 else Sampling(0.0, 0, 0.7, 5)
        jobs.append(Job(prompt, sampling, seed + number, 3 + number, Guards.off(), None))
    made = Voices(model, jobs)
    for job in jobs:
        loop, _ = loop_of(model, slots=1)
        made.alone.append(all_of(loop, loop.submit(job)))
    return made


def loop_of(
    model: Csm, slots: int = SLOTS, batch_sizes: tuple[int, ...] = tuple(range(1, 17)), ahead: int = 0
) -> tuple[Loop, CsmState]:
    state = model.allocate(slots + 1, POSITIONS)
    steps = EagerSteps(model, Slots(state, slots, POSITIONS), batch_sizes=batch_sizes, ahead=ahead)
    return Loop(steps, slots, 12.5), state


def all_of(loop: Loop, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    codes, samples = [], []
    while (spoken := loop.next(stream)) is not None:
        codes.append(spoken.codes)
        samples.append(spoken.samples)
    return np.stack(codes) if codes else np.zeros((0, 3)), np.concatenate(samples) if samples else np.zeros(0)


def assert_same(received: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(received[0], expected[0])
    np.testing.assert_array_equal(received[1], expected[1])


def poison(state: CsmState, slot: int) -> None:
    """Fill everything that a slot owns with NaN, or with numbers that no stream has."""
    for tensor in tensors_of(state):
        if any(tensor is shared for shared in (state.scratch.row_tokens, state.scratch.finished)):
            continue
        by_decoder = tensor is state.temperature or tensor is state.top_k
        dimension = 2 if tensor.dim() == 6 else 1 if by_decoder else 0
        assert tensor.shape[dimension] == state.position.shape[0]
        tensor.select(dimension, slot).fill_(torch.nan if tensor.is_floating_point() else 77)


@pytest.mark.parametrize("ahead", [0, 1], ids=["read at once", "one frame ahead"])
@pytest.mark.parametrize(
    "batch_sizes", [tuple(range(1, 17)), (1, 2, 4, 8), (16,), (1, 2)], ids=["any", "powers", "sixteen", "at most two"]
)
def test_together_as_alone(voices: Voices, batch_sizes: tuple[int, ...], ahead: int) -> None:
    loop, _ = loop_of(voices.model, batch_sizes=batch_sizes, ahead=ahead)
    streams = [loop.submit(job) for job in voices.jobs]
    for stream, expected in zip(streams, voices.alone, strict=True):
        assert_same(all_of(loop, stream), expected)
    assert loop.is_idle


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schedule=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 12), st.none() | st.integers(0, 9), st.booleans()),
        min_size=1,
        max_size=14,
    ),
    slots=st.integers(1, 5),
    sizes=st.sampled_from([(1, 2, 3, 4, 5), (1, 2, 4, 8), (4, 8), (1, 2)]),
    ahead=st.integers(0, 2),
)
def test_any_schedule(
    voices: Voices,
    schedule: list[tuple[int, int, int | None, bool]],
    slots: int,
    sizes: tuple[int, ...],
    ahead: int,
) -> None:
    """Jobs that come at any tick, in real time or not, some of them cancelled after any number of ticks."""
    loop, state = loop_of(voices.model, slots=slots, batch_sizes=sizes, ahead=ahead)
    for slot in range(slots):
        poison(state, slot)
    streams: list[tuple[int, Stream, int | None]] = []
    for tick in range(40):
        for job, begins, lasts, realtime in schedule:
            if begins == tick:
                paced = replace(voices.jobs[job], lead_seconds=60.0 if realtime else None)
                streams.append((job, loop.submit(paced), None if lasts is None else tick + lasts))
        for _, stream, until in streams:
            if until == tick:
                loop.cancel(stream)
        loop.step()
    for job, stream, until in streams:
        expected = voices.alone[job]
        codes, samples = all_of(loop, stream)
        assert stream.finish_reason == "cancelled" or until is None or len(codes) == len(expected[0])
        if stream.finish_reason == "cancelled":
            expected = expected[0][: len(codes)], expected[1][: len(samples)]
        assert_same((codes, samples), expected)
    assert loop.is_idle


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("after", [1, 2, 4, 10])
def test_suspended_as_if_it_had_not_been(voices: Voices, after: int, ahead: int) -> None:
    """In one slot, which the other stream uses meanwhile; and in another one than before."""
    for slots in (1, 2):
        loop, state = loop_of(voices.model, slots=slots, ahead=ahead)
        slow = [loop.submit(voices.jobs[8]) for _ in range(slots)]
        while not all(len(stream.frames) >= after for stream in slow):
            loop.step()
        live = [loop.submit(replace(voices.jobs[number], lead_seconds=60.0)) for number in range(2 * slots)]
        while not all(stream.is_over for stream in (*slow, *live)):
            loop.step()
            for slot in loop._free:
                poison(state, slot)
        for number, stream in enumerate(live):
            assert_same(all_of(loop, stream), voices.alone[number])
        for stream in slow:
            assert_same(all_of(loop, stream), voices.alone[8])
        assert loop.counts.suspended == slots or after == 10  # of 11 frames, the last of which may be under way


def test_nothing_of_the_stream_before_remains(voices: Voices) -> None:
    loop, state = loop_of(voices.model, slots=1, ahead=1)
    for job, expected in zip(voices.jobs[:4], voices.alone, strict=False):
        poison(state, 0)
        assert_same(all_of(loop, loop.submit(job)), expected)
        assert_same(all_of(loop, loop.submit(job)), expected)  # and after an ordinary stream, the same one


def test_rows_in_any_order(voices: Voices, generator: torch.Generator) -> None:
    model = voices.model

    def started() -> CsmState:
        state = model.allocate(SLOTS + 1, POSITIONS)
        for slot, job in enumerate(voices.jobs[:SLOTS]):
            model.start(state, slot, job.sampling, job.seed, len(job.prompt))
            model.prefill(state, pack([Piece(slot, job.prompt, 0, len(job.prompt), 0)], len(job.prompt), SLOTS))
        return state

    in_order, shuffled = started(), started()
    slots = torch.arange(SLOTS)
    for _ in range(3):
        order = torch.randperm(SLOTS, generator=generator)
        codes = model.draw(in_order, slots)
        assert torch.equal(model.draw(shuffled, order), codes[order])
        samples = model.decode(in_order, codes, slots).samples
        assert torch.equal(model.decode(shuffled, codes[order], order).samples, samples[order])


def test_a_prompt_behind_a_pasted_prefix_is_the_whole_prompt(voices: Voices) -> None:
    """The keys and values of a prefix are those that reading it again would leave."""
    model, job = voices.model, voices.jobs[2]
    positions = len(job.prompt)
    whole = model.allocate(2, POSITIONS)
    model.start(whole, 0, job.sampling, job.seed, positions)
    model.prefill(whole, pack([Piece(0, job.prompt, 0, positions, 0)], positions, 1))
    pasted = model.allocate(3, POSITIONS)
    model.start(pasted, 1, job.sampling, job.seed, positions)
    model.paste_prefix(pasted, 1, model.copy_prefix(whole, 0, 120), 100)
    model.prefill(pasted, pack([Piece(1, job.prompt, 100, positions, 100)], positions - 100, 2))
    torch.testing.assert_close(pasted.next_input[1], whole.next_input[0])
    torch.testing.assert_close(
        pasted.backbone_cache[:, :, 1, :, :positions],
        whole.backbone_cache[:, :, 0, :, :positions],
        rtol=1e-5,
        atol=1e-6,
    )
    for _ in range(3):
        assert torch.equal(model.draw(pasted, torch.tensor([1])), model.draw(whole, torch.tensor([0])))


def test_the_scratch_slot_stands_still(voices: Voices) -> None:
    state = voices.model.allocate(3, POSITIONS)
    for _ in range(2):
        voices.model.draw(state, torch.tensor([2, 2, 0, 2]))
    assert state.position.tolist() == [2, 0, 0]
