"""Mimi by chunks with carried state: the same as whole, whatever the chunks, slots and neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from moshi.modules.transformer import set_attention_context
from torch import Tensor

from aloud.codec.mimi import (
    MimiState,
    allocate_decoder_state,
    allocate_encoder_state,
    decode,
    decode_chunk,
    encode,
    encode_chunk,
    reset,
)
from oracle.mimi import Codec, assert_same_codes, named_codec, speech_like

FRAMES = 41
"""Over eight windows of `small`, and more than one chunk of the whole-sequence functions."""

CHUNKINGS = {
    "one_frame": [1] * FRAMES,
    "two_frames": [2] * 20 + [1],
    "uneven": [3, 1, 7, 12, 1, 1, 16],
    "at_once": [FRAMES],
    "long_then_short": [36, 1, 1, 1, 1, 1],
}
VARIANTS = ["small", "grouped_heads", "residual_layers", "shortcuts", "four_positions_a_frame"]


def codes_of(codec: Codec, rows: int, frames: int, generator: torch.Generator) -> Tensor:
    config = codec.model.config
    return torch.randint(config.codebook_size, (rows, config.num_quantizers, frames), generator=generator)


def assert_near(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def tensors_of(state: MimiState) -> list[tuple[Tensor, int]]:
    """All tensors of a state, with the dimension that is the slot."""
    assert {field.name for field in fields(state)} == {"positions", "ring", "resample", "seanet"}
    return [(state.positions, 0), (state.ring, 2), (state.resample, 0), *((leaf, 0) for leaf in state.seanet.leaves())]


@pytest.mark.parametrize("lengths", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("name", VARIANTS)
def test_decode_by_chunks_equals_whole(name: str, lengths: list[int], seed: int, generator: torch.Generator) -> None:
    codec = named_codec(name, seed)
    config, weights = codec.ours
    codes = codes_of(codec, 1, FRAMES, generator)
    state, slots = allocate_decoder_state(config, 1), torch.tensor([0])
    chunks = [decode_chunk(config, weights, state, chunk, slots)[0] for chunk in codes.split(lengths, dim=2)]
    assert_near(torch.cat(chunks), decode(config, weights, codes[0]))


@pytest.mark.parametrize("lengths", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("name", VARIANTS)
def test_encode_by_chunks_equals_whole(name: str, lengths: list[int], seed: int, generator: torch.Generator) -> None:
    codec = named_codec(name, seed)
    config, weights = codec.ours
    samples = speech_like(FRAMES * config.frame_size - config.frame_size // 3, generator)  # a partial last frame
    state, slots = allocate_encoder_state(config, 1), torch.tensor([0])
    starts = [sum(lengths[:index]) * config.frame_size for index in range(len(lengths))]
    chunks = [
        encode_chunk(config, weights, state, samples[None, start : start + length * config.frame_size], slots)[0]
        for start, length in zip(starts, lengths, strict=True)
    ]
    assert_same_codes(torch.cat(chunks, dim=1), encode(config, weights, samples), codec.model, samples)


@contextmanager
def moshi_streaming(codec: Codec, rows: int) -> Iterator[Any]:
    """Stream with the moshi package, with an attention window that does not depend on the chunks.

    Its ring of keys has as many places as the window, and it writes a chunk's keys before it attends: the first of two
    new positions misses its oldest key, so that past the first window moshi's streaming is not moshi's whole sequence.
    One place more in the ring makes them equal.
    """
    window = codec.config["sliding_window"]
    moshi = codec.moshi
    set_attention_context(moshi, window + 1)
    with torch.no_grad(), moshi.streaming(rows):
        set_attention_context(moshi, window)
        yield moshi


def test_decode_equals_moshi_streaming(seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    codes = codes_of(codec, 3, FRAMES, generator)
    state, slots = allocate_decoder_state(config, 3), torch.arange(3)
    with moshi_streaming(codec, rows=3) as moshi:
        for frame in codes.split(1, dim=2):
            assert_near(decode_chunk(config, weights, state, frame, slots), moshi.decode(frame)[:, 0])


def test_decode_equals_plain_moshi_streaming_within_one_window(seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    codes = codes_of(codec, 3, config.sliding_window // config.downsample_ratio, generator)
    state, slots = allocate_decoder_state(config, 3), torch.arange(3)
    with torch.no_grad(), codec.moshi.streaming(3):
        for frame in codes.split(1, dim=2):
            assert_near(decode_chunk(config, weights, state, frame, slots), codec.moshi.decode(frame)[:, 0])


def test_encode_equals_moshi_streaming(seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    samples = torch.stack([speech_like(FRAMES * config.frame_size, generator) for _ in range(2)])
    state, slots = allocate_encoder_state(config, 2), torch.arange(2)
    ours, theirs = [], []
    with moshi_streaming(codec, rows=2) as moshi:
        for frame in samples.split(config.frame_size, dim=1):
            ours.append(encode_chunk(config, weights, state, frame, slots))
            theirs.append(moshi.encode(frame[:, None]))
    for row in range(2):
        assert_same_codes(torch.cat(ours, dim=2)[row], torch.cat(theirs, dim=2)[row], codec.model, samples[row])


def run_schedule(
    step: Callable[[Tensor, Tensor], Tensor], streams: Tensor, slots: list[int], frame_length: int
) -> list[Tensor]:
    """Run streams `[rows, ..., length]` in their slots, each with its own start, pauses and row of the batch."""
    frames = streams.shape[-1] // frame_length
    done = [0] * len(streams)
    outputs: list[list[Tensor]] = [[] for _ in streams]
    tick = 0
    while min(done) < frames:
        running = [
            row for row in range(len(streams)) if done[row] < frames and (tick + row) % (row + 2) and tick >= row
        ]
        running = running[::-1] if tick % 2 else running
        if running:
            chunk = torch.stack(
                [streams[row][..., done[row] * frame_length : (done[row] + 1) * frame_length] for row in running]
            )
            for row, output in zip(running, step(chunk, torch.tensor([slots[row] for row in running])), strict=True):
                outputs[row].append(output)
                done[row] += 1
        tick += 1
    return [torch.cat(output, dim=-1) for output in outputs]


def test_decode_rows_are_streams_of_their_own(seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    codes = codes_of(codec, 4, 23, generator)
    state = allocate_decoder_state(config, 6)
    outputs = run_schedule(
        lambda chunk, slots: decode_chunk(config, weights, state, chunk, slots), codes, [5, 0, 3, 2], frame_length=1
    )
    for row in range(4):
        assert_near(outputs[row], decode(config, weights, codes[row]))


def test_encode_rows_are_streams_of_their_own(seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    samples = torch.stack([speech_like(23 * config.frame_size, generator) for _ in range(4)])
    state = allocate_encoder_state(config, 6)
    outputs = run_schedule(
        lambda chunk, slots: encode_chunk(config, weights, state, chunk, slots),
        samples,
        [5, 0, 3, 2],
        frame_length=config.frame_size,
    )
    for row in range(4):
        assert_same_codes(outputs[row], encode(config, weights, samples[row]), codec.model, samples[row])


@pytest.mark.parametrize("side", ["decode", "encode"])
def test_slots_not_named_stand_still(side: str, seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    allocate = allocate_decoder_state if side == "decode" else allocate_encoder_state
    state = allocate(config, 3)
    for tensor, _ in tensors_of(state):
        tensor.copy_(torch.randint(1, 100, tensor.shape, generator=generator))
    before = [tensor.clone() for tensor, _ in tensors_of(state)]
    slots = torch.tensor([1])
    if side == "decode":
        decode_chunk(config, weights, state, codes_of(codec, 1, 1, generator), slots)
    else:
        encode_chunk(config, weights, state, speech_like(config.frame_size, generator)[None], slots)
    changed = 0
    for (tensor, dimension), old in zip(tensors_of(state), before, strict=True):
        for slot in (0, 2):
            assert torch.equal(tensor.select(dimension, slot), old.select(dimension, slot))
        changed += int(not torch.equal(tensor.select(dimension, 1), old.select(dimension, 1)))
    assert changed == sum(tensor.numel() > 0 for tensor, _ in tensors_of(state))


@pytest.mark.parametrize("side", ["decode", "encode"])
def test_reset_leaves_nothing_and_touches_no_other_slot(side: str, seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    allocate = allocate_decoder_state if side == "decode" else allocate_encoder_state
    state = allocate(config, 3)
    for tensor, _ in tensors_of(state):
        tensor.fill_(12345 if tensor.dtype == torch.int64 else float("nan"))
    for slot in (2, 0):
        reset(state, slot)
    for tensor, dimension in tensors_of(state):
        if tensor.numel():
            assert not tensor.select(dimension, 0).any()
            assert tensor.select(dimension, 1).isnan().all() or (tensor.select(dimension, 1) == 12345).all()
    slots = torch.tensor([2, 0])
    if side == "decode":
        codes = codes_of(codec, 2, FRAMES, generator)
        chunks = [decode_chunk(config, weights, state, chunk, slots) for chunk in codes.split(1, dim=2)]
        for row, ours in enumerate(torch.cat(chunks, dim=1)):
            assert_near(ours, decode(config, weights, codes[row]))
    else:
        samples = torch.stack([speech_like(FRAMES * config.frame_size, generator) for _ in range(2)])
        frames = samples.split(config.frame_size, dim=1)
        codes = torch.cat([encode_chunk(config, weights, state, frame, slots) for frame in frames], dim=2)
        for row in range(2):
            assert_same_codes(codes[row], encode(config, weights, samples[row]), codec.model, samples[row])


@pytest.mark.parametrize("side", ["decode", "encode"])
def test_writes_only_state_and_result(side: str, seed: int, generator: torch.Generator) -> None:
    codec = named_codec("small", seed)
    config, weights = codec.ours
    parameters = [leaf.weight for tree in (weights.encoder, weights.decoder) for leaf in tree.leaves()]
    parameters += [getattr(layer, field.name) for layer in weights.decoder_transformer for field in fields(layer)]
    parameters += [getattr(layer, field.name) for layer in weights.encoder_transformer for field in fields(layer)]
    parameters += [weights.acoustic.codebooks, weights.acoustic.half_norms, weights.upsample.weight]
    slots = torch.tensor([1, 0])
    if side == "decode":
        given = codes_of(codec, 2, 2, generator)
        state = allocate_decoder_state(config, 2)
    else:
        given = torch.stack([speech_like(2 * config.frame_size, generator) for _ in range(2)])
        state = allocate_encoder_state(config, 2)
    before = [tensor.clone() for tensor in (*parameters, given, slots)]
    chunk = decode_chunk if side == "decode" else encode_chunk
    result = chunk(config, weights, state, given, slots)
    kept = result.clone()
    chunk(config, weights, state, given, slots)
    assert torch.equal(result, kept)
    for tensor, old in zip((*parameters, given, slots), before, strict=True):
        assert torch.equal(tensor, old)
